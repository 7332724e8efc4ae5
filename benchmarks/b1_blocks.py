"""B1: blocks of a picture denoised one after another, with the cache and by recomputing the past.

Every block takes `steps` forwards and one commit pass. Without the cache each forward runs over
the whole past with the block-causal mask; both sides give the same codes.
"""

import torch
from common import Row, build_model, draw, in_turns, report_row, require_equal

PASS_RATIO = 5.1  # 0.75 of the closed form's linear part at 16 blocks and 4 steps


def run(
    device: torch.device, *, dim: int = 256, layers: int = 4, heads: int = 4, tokens: int = 64,
    blocks: int = 16, steps: int = 4, codes: int = 256, repeats: int = 3,
) -> list[Row]:  # fmt: skip
    """Measure one shape: `blocks` runs of `tokens` tokens in raster order."""
    sizes = [f"backbone.dim={dim}", f"backbone.layers={layers}", f"backbone.heads={heads}"]
    schedule = [f"schedule.steps={steps}", "schedule.temperature=0.0", f"layout.block={tokens}"]
    quiet = ["schedule.choice_temperature=0.0", "backbone.mlp_ratio=3"]
    model = build_model(
        "image/block_masked", [*sizes, *schedule, *quiet], blocks, tokens,
        codebook_size=codes, device=device,
    )  # fmt: skip
    with torch.inference_mode():
        cached, recomputed = (draw(model, use_cache=flag) for flag in (True, False))
        require_equal(cached, recomputed, "B1")
        timing = in_turns(
            lambda: draw(model),
            lambda: draw(model, use_cache=False),
            repeats=repeats,
            device=device,
        )
    shape = {
        "dim": dim, "layers": layers, "heads": heads, "tokens_per_block": tokens,
        "blocks": blocks, "steps": steps,
    }  # fmt: skip
    row = report_row(
        "B1", "cached block rollout", "our own full recompute with a mask", timing,
        shape=shape, pass_line=PASS_RATIO, device=device,
    )  # fmt: skip
    return [row]
