"""Numeric proof that a cached decode equals the masked training forward.

The theorem (docs/theorem.md) says when they agree; here they are run side by side on the same
contents: one masked forward over the training layout against the passes of a teacher-forced decode.
It knows no models: a `Decoder` runs both sides.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .decoder import Decoder
from .far import is_coarse
from .layout import Copy, Layout
from .missing import split_unknown, unknown_slots
from .plan import DecodePlan
from .rollout import Rollout
from .sampling import item_generator


@dataclass(frozen=True)
class Parity:
    """Result of a side-by-side run.

    `max_error` is the largest absolute difference of hidden states; `num_rows` how many rows were
    compared; `scale` the largest absolute hidden state, so that an error can be read in proportion.
    """

    max_error: float
    num_rows: int
    scale: float


@dataclass(frozen=True)
class Contents:
    """Teacher-forced contents: what every row holds.

    `values` [batch, slots, ...] are the clean tokens, -1 or not a number where nobody knows them;
    `is_masked` the slots hidden in noisy rows;
    `noisy` the noisy latents of recipes that denoise (None otherwise) and `level` their level, one
    number or one per slot. `kept` is what finished blocks look like to later ones, where that is
    not `values`.
    """

    values: Tensor
    is_masked: Bool[Tensor, "batch slots"]
    noisy: Tensor | None = None
    level: float | Float[Tensor, " slots"] = 0.5
    kept: Tensor | None = None

    def levels(self, source: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """Levels of the noisy rows of some slots."""
        if isinstance(self.level, Tensor):
            return self.level[source]
        return torch.full(source.shape, self.level)


def training_forward(
    plan: DecodePlan, decoder: Decoder, contents: Contents, block: int | None = None
) -> tuple[Layout, Tensor]:
    """Run the masked forward over the training layout; returns its rows and hidden states.

    With one copy whose finished rows are kept the levels say what is known: `block` and later
    blocks are noisy, earlier ones are context; None = all are. Where blocks fly together,
    `block` is the first of a full flight.
    """
    flies = plan.matrix == "rolling" and block is not None
    layout = plan.training_layout(block if flies else None)
    source = layout.source.clamp_min(0)
    is_noisy = layout.copy == Copy.NOISY
    if plan.keeps_only_copy:
        is_noisy &= layout.block >= (plan.num_blocks if block is None else block)
    clean, unknown = split_unknown(contents.values)
    values = clean[:, source]
    is_masked = contents.is_masked[:, source] & is_noisy | unknown[:, source]
    if contents.kept is not None:
        values = torch.where(is_noisy[:, None], values, contents.kept[:, source])
    level = is_masked.float()
    if contents.noisy is not None:
        values = torch.where(is_noisy[:, None], contents.noisy[:, source], values)
        is_masked = unknown[:, source]
        level = contents.levels(source).expand(is_masked.shape).float()
    level = torch.where(is_noisy, level, plan.context_level)
    poses = decoder.poses if plan.table.route_names() else None
    lowered = plan.lower(layout, layout, "dense", poses)
    return layout, decoder.forward(values, is_masked, layout, level, lowered, None)


def decode_forward(
    plan: DecodePlan, decoder: Decoder, contents: Contents, *, use_cache: bool = True
) -> list[tuple[Layout, Tensor]]:
    """Run the passes of a decode over the same contents; returns the rows and states of each."""
    return _decoded(plan, decoder, contents, use_cache)[0]


def _decoded(
    plan: DecodePlan, decoder: Decoder, contents: Contents, use_cache: bool = True
) -> tuple[list[tuple[Layout, Tensor]], Tensor | None]:
    """Run the passes of a decode, and return what its finished blocks were kept as."""
    passes: list[tuple[Layout, Tensor]] = []
    batch = len(contents.values)
    rollout = Rollout(
        plan, decoder, None, values=contents.values, is_known=~contents.is_masked,
        generators=[item_generator(0, i) for i in range(batch)], use_cache=use_cache,
        record=lambda rows, hidden: passes.append((rows, hidden)),
    )  # fmt: skip
    rollout.is_missing = unknown_slots(contents.values)
    for block in range(plan.num_blocks):
        if contents.noisy is None:
            rollout.predict_rows(block)
        else:
            _fly(rollout, contents, contents.noisy, block)
        rollout.is_known[:, plan.sources(block)] = True
        for _ in rollout.finish(block):
            pass
    return passes, rollout.kept


def _fly(rollout: Rollout, contents: Contents, noisy: Tensor, block: int) -> None:
    """Run a block with as many later ones as may be in flight with it."""
    plan = rollout.plan
    blocks = plan.in_flight(block, block + plan.flight - 1)
    source = torch.cat([plan.sources(b) for b in blocks])
    rows = [plan.flying_rows(b, block) for b in blocks]
    rollout.run_rows(rows, block, block_values=noisy[:, source], level=contents.levels(source))


def compare(plan: DecodePlan, decoder: Decoder, contents: Contents) -> Parity:
    """Compare every row of every decode pass with the same row of the training forward.

    Rows are matched by (copy, rank in compute order, scale); a shifted recipe's last token, which
    training leaves out, is not compared.
    """
    passes, kept = _decoded(plan, decoder, contents)
    contents = replace(contents, kept=kept)
    layout, trained = training_forward(plan, decoder, contents)
    place = {key: row for row, key in enumerate(_keys(layout))}
    worst, count = 0.0, 0
    for rows, hidden in passes:
        if plan.keeps_only_copy or plan.matrix == "rolling":
            noisy = rows.block[rows.level >= 1]
            block = int(noisy[0]) if len(noisy) else None
            trained = training_forward(plan, decoder, contents, block)[1]
        for at, key in enumerate(_keys(rows)):
            if key not in place:
                continue
            difference = hidden[:, at] - trained[: len(hidden), place[key]]
            error = float(difference.abs().max())
            # A NaN must not hide behind max(): it is the worst error of all.
            worst = float("inf") if error != error else max(worst, error)
            count += 1
    return Parity(worst, count, float(trained.abs().max()))


def _keys(layout: Layout) -> list[tuple[int, int, bool]]:
    coarse = is_coarse(layout).tolist()
    return list(zip(layout.copy.tolist(), layout.order.tolist(), coarse, strict=True))
