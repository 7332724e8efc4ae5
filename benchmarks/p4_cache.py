"""P4: how the cost of a block rollout grows with the number of blocks.

N blocks of b tokens, S forwards and one commit each. Counting multiplications, recomputing costs
S(N+1) / (2(S+1)) times the cached rollout in the linear maps and S(2N+1) / (3(S+1)) times in
attention; the speed-up must reach 0.75 of the first, the smaller one. The slope is the exponent of
the cached cost between N and 2N blocks: 1 when linear maps rule, 2 when attention does.
"""

import math
import statistics

import torch
from common import Row, build_model, draw, in_turns, report_row, require_equal

SHARE = 0.75


def closed_form(blocks: int, steps: int) -> tuple[float, float]:
    """Speed-up of linear maps and of attention.

    Returns:
        S(N+1) / (2(S+1)) and S(2N+1) / (3(S+1)).
    """
    linear = steps * (blocks + 1) / (2 * (steps + 1))
    return linear, steps * (2 * blocks + 1) / (3 * (steps + 1))


def cached_cost(blocks: int, tokens: int, dim: int, layers: int, params: int, steps: int) -> float:
    """Multiply-adds of a cached rollout: 2Pb N(S+1) + 4DL b^2 (S+1) N(N+1)/2."""
    linear = 2 * params * tokens * blocks * (steps + 1)
    return linear + 4 * dim * layers * tokens**2 * (steps + 1) * blocks * (blocks + 1) / 2


def run(
    device: torch.device, *, dim: int = 256, layers: int = 4, heads: int = 4, tokens: int = 64,
    blocks: tuple[int, ...] = (4, 8, 16), steps: int = 4, codes: int = 256, repeats: int = 3,
) -> list[Row]:  # fmt: skip
    """Measure the speed-up at every number of blocks and the slopes between them."""
    rows: list[Row] = []
    seconds: dict[int, float] = {}
    sizes = [f"backbone.dim={dim}", f"backbone.layers={layers}", f"backbone.heads={heads}"]
    schedule = [f"schedule.steps={steps}", "schedule.temperature=0.0", f"layout.block={tokens}"]
    quiet = ["schedule.choice_temperature=0.0", "backbone.mlp_ratio=3"]
    for count in blocks:
        model = build_model(
            "image/block_masked", [*sizes, *schedule, *quiet], count, tokens,
            codebook_size=codes, device=device,
        )  # fmt: skip
        with torch.inference_mode():
            require_equal(draw(model), draw(model, use_cache=False), "P4")
            timing = in_turns(
                lambda model=model: draw(model),
                lambda model=model: draw(model, use_cache=False),
                repeats=repeats,
                device=device,
            )
        linear, attention = closed_form(count, steps)
        seconds[count] = statistics.median(timing.ours)
        params = sum(p.numel() for p in model.backbone.layers.parameters())
        half = count // 2
        notes = {"closed_form_linear": linear, "closed_form_attention": attention}
        if half in seconds:
            shape = (tokens, dim, layers, params, steps)
            predicted = math.log2(cached_cost(count, *shape) / cached_cost(half, *shape))
            measured = math.log2(seconds[count] / seconds[half])
            notes |= {"slope_predicted": predicted, "slope_measured": measured}
        shape_of = {
            "dim": dim, "layers": layers, "tokens_per_block": tokens, "blocks": count,
            "steps": steps,
        }  # fmt: skip
        rows.append(
            report_row(
                f"P4-N{count}", "cached block rollout", "our own full recompute with a mask",
                timing, shape=shape_of, pass_line=SHARE * linear, device=device, **notes,
            )
        )  # fmt: skip
    return rows
