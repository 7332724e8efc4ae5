"""B1: blocks of a picture denoised one after another, with the cache and by recomputing the past.

Every block takes `steps` forwards; its commit is a pass of its own, or rides with the next block's
first forward (both exact). Without the cache each forward runs over the whole past with the
block-causal mask; all sides give the same codes.
"""

import torch
from common import Row, Timing, build_model, draw, in_turns, report_row, require_equal

from blockloom.models.generator import GenerativeModel

PASS_RATIO = 5.1  # 0.75 of the closed form's linear part at 16 blocks and 4 steps


def run(
    device: torch.device, *, dim: int = 256, layers: int = 4, heads: int = 4, tokens: int = 64,
    blocks: int = 16, steps: int = 4, codes: int = 256, repeats: int = 3,
) -> list[Row]:  # fmt: skip
    """Measure one shape: `blocks` runs of `tokens` tokens in raster order."""
    sizes = [f"backbone.dim={dim}", f"backbone.layers={layers}", f"backbone.heads={heads}"]
    schedule = [f"schedule.steps={steps}", "schedule.temperature=0.0", f"layout.block={tokens}"]
    quiet = ["schedule.choice_temperature=0.0", "backbone.mlp_ratio=3"]
    shape = {
        "dim": dim, "layers": layers, "heads": heads, "tokens_per_block": tokens,
        "blocks": blocks, "steps": steps,
    }  # fmt: skip
    rows = []
    for name, write, line in (("B1", "separate", PASS_RATIO), ("B1-fused", "fused", None)):
        model = build_model(
            "image/block_masked", [*sizes, *schedule, *quiet, f"cache.write={write}"], blocks,
            tokens, codebook_size=codes, device=device,
        )  # fmt: skip
        timing = _timed(model, device, repeats)
        row = report_row(
            name,
            f"cached block rollout, {write} commit",
            "our own full recompute with a mask",
            timing,
            shape=shape,
            pass_line=line,
            device=device,
        )
        rows.append(row)
    return rows


def _timed(model: GenerativeModel, device: torch.device, repeats: int) -> Timing:
    with torch.inference_mode():
        cached, recomputed = (draw(model, use_cache=flag) for flag in (True, False))
        require_equal(cached, recomputed, "B1")
        return in_turns(
            lambda: draw(model),
            lambda: draw(model, use_cache=False),
            repeats=repeats,
            device=device,
        )
