"""How cost grows with the number of blocks, against the closed form.

N blocks of b tokens, S forwards and one commit each, P weights in linear maps, L layers of width D:
cached 2 P b N (S + 1) + 4 D L b^2 (S + 1) N (N + 1) / 2 operations, recomputed
2 P b S N (N + 1) / 2 + 4 D L b^2 S N (N + 1) (2 N + 1) / 6. The slope from N to 2 N is
log2(cost(2 N) / cost(N)); measured and predicted slopes should agree.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from common import Row, Timing, build_model, draw, in_turns, report_row

SLOPE_LINE = 0.25  # design: on a CPU, for N >= 4
DIM, LAYERS, TOKENS, STEPS = 256, 4, 64, 4
COUNTS = (2, 4, 8, 16)


def cost(blocks: int, weights: int, *, is_cached: bool) -> float:
    """Count multiply-adds twice: operations of one rollout."""
    linear, pairs = 2 * weights * TOKENS, 4 * DIM * LAYERS * TOKENS**2
    triangle = blocks * (blocks + 1) / 2
    if is_cached:
        return (STEPS + 1) * (linear * blocks + pairs * triangle)
    pyramid = blocks * (blocks + 1) * (2 * blocks + 1) / 6
    return STEPS * (linear * triangle + pairs * pyramid)


def run(device: torch.device, *, repeats: int = 3, counts: Sequence[int] = COUNTS) -> list[Row]:
    """Measure both sides at every count; one row per doubling and side."""
    timings: dict[int, Timing] = {}
    weights = 0
    for blocks in counts:
        model = build_model(
            "image/block_masked",
            [f"backbone.dim={DIM}", f"backbone.layers={LAYERS}", "backbone.heads=4",
             f"schedule.steps={STEPS}", "schedule.temperature=0.0", f"layout.block={TOKENS}",
             "schedule.choice_temperature=0.0", "backbone.mlp_ratio=3"],
            blocks, TOKENS, codebook_size=256, device=device,
        )  # fmt: skip
        layers = model.backbone.layers
        weights = sum(p.numel() for p in layers.parameters() if p.ndim == 2)
        with torch.inference_mode():
            timings[blocks] = in_turns(
                lambda model=model: draw(model),
                lambda model=model: draw(model, use_cache=False),
                repeats=repeats,
                device=device,
            )
    rows = []
    for small, large in pairwise(counts):
        for side, is_cached in (("cached", True), ("recomputed", False)):
            pick = "ours" if is_cached else "theirs"
            before, after = (min(getattr(timings[n], pick)) for n in (small, large))
            measured = math.log2(after / before)
            predicted = math.log2(
                cost(large, weights, is_cached=is_cached)
                / cost(small, weights, is_cached=is_cached)
            )
            seconds = Timing([before], [after], [before], [after], timings[small].clock)
            row = report_row(
                f"slope {small}-{large}", f"growth of the {side} rollout", "the closed form",
                seconds, shape={"blocks": [small, large]}, pass_line=None, device=device,
                measured_slope=measured, predicted_slope=predicted, side=side,
            )  # fmt: skip
            if small >= 4:
                row.passed = abs(measured - predicted) <= SLOPE_LINE
            rows.append(row)
    return rows
