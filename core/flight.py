"""Several blocks between noise and clean at the same time: the rows of a level matrix.

The plain loop (core/rollout.py) finishes one block before the next begins; here every row moves all
blocks the matrix moves, against a cache of the finished ones where the recipe keeps them. Which
rows of a pass see each other is the mask's business.

It knows no models. Invariants: blocks become permanent in their order; an item's values depend on
its own generator only, of which every block takes one number, as in the plain loop.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import UsageError
from .levels import LevelRow, level_matrix, level_rows
from .sampling import per_item_randn
from .schedulers.base import Row

if TYPE_CHECKING:
    from .decoder import Event
    from .rollout import Rollout


class Flight:
    """The blocks of a rollout that are not given, in flight together."""

    def __init__(self, rollout: "Rollout", first: int) -> None:
        """Draw the noise of every block from `first` on.

        Args:
            rollout: Its plan names the matrix.
            first: Blocks before it are given and finished.

        Raises:
            UsageError: a rollout that starts from noised values.
        """
        plan = rollout.plan
        if rollout.start_level != 1.0:
            raise UsageError(
                f"start_level = {rollout.start_level:g} with several blocks in flight "
                f'(schedule.matrix = "{plan.matrix}"); set start_level to 1'
            )
        self.rollout, self.first, self.oldest = rollout, first, first
        self.rows: list[Row] = rollout.scheduler.rows(rollout.num_steps)
        levels = [row.level for row in self.rows] + [self.rows[-1].level_next]
        self.matrix = level_matrix(
            plan.matrix, levels, plan.num_blocks - first, delay=plan.delay, flight=plan.flight
        )
        self.level = [0.0] * first + [1.0] * (plan.num_blocks - first)
        self.samples: list[Tensor] = []
        self.noise: list[Tensor] = []
        self.streams: list[list[torch.Generator]] = []
        for block in range(plan.num_blocks):
            clean = rollout.values[:, plan.sources(block)].clone()
            self.streams.append(rollout._streams() if block >= first else [])
            noise = clean
            if block >= first:
                noise = per_item_randn(clean.shape[1:], self.streams[block], clean.device)
            self.noise.append(noise.to(clean.dtype))
            self.samples.append(self.noise[block])
        self.clean = rollout.values.clone()

    def events(self) -> Iterator["Event | None"]:
        """Run every row of the matrix; None where somebody said stop."""
        rollout = self.rollout
        rollout.scheduler.begin(rollout.num_steps)
        for row in level_rows(self.matrix):
            if rollout.should_stop():
                yield None
                return
            moved = [self.first + block for block in row.blocks]
            self._move(row, moved)
            yield self._event(row, moved)
            while self.oldest < rollout.plan.num_blocks and self.level[self.oldest] == 0.0:
                yield from rollout.finish(self.oldest)
                self.oldest += 1

    def _move(self, row: LevelRow, moved: list[int]) -> None:
        """Run the blocks in flight once and take a step with those that move."""
        rollout, plan = self.rollout, self.rollout.plan
        active = plan.in_flight(self.oldest, max(moved))
        for block in active:
            self.samples[block] = self._with_given(block)
        layouts = [plan.flying_rows(block, self.oldest) for block in active]
        sizes = [layout.num_tokens for layout in layouts]
        level = torch.tensor([self.level[block] for block in active])
        hidden = rollout.run_rows(
            layouts, self.oldest,
            block_values=torch.cat([self.samples[block] for block in active], 1),
            level=level.repeat_interleave(torch.tensor(sizes)),
        )  # fmt: skip
        steps = dict(zip(moved, row.steps, strict=True))
        for block, states in zip(active, hidden.split(sizes, 1), strict=True):
            if block in steps:
                self._step(block, self.rows[steps[block]], states)

    def _step(self, block: int, row: Row, states: Tensor) -> None:
        rollout, source = self.rollout, self.rollout.plan.sources(block)
        prediction = rollout.decoder.predict(states, row)
        sample = self.samples[block]
        sample = rollout.scheduler.step(prediction, row, sample, self.streams[block])
        self.level[block] = row.level_next
        self.samples[block] = sample
        self.samples[block] = self._with_given(block)
        rollout.values[:, source] = self.samples[block]
        if row.is_last:
            rollout.is_known[:, source] = True

    def _with_given(self, block: int) -> Tensor:
        """The block with what is given put in at the block's level."""
        rollout, source = self.rollout, self.rollout.plan.sources(block)
        given, clean = rollout.given[:, source][..., None], self.clean[:, source]
        level = self.level[block]
        noised = rollout.scheduler.add_noise(clean, self.noise[block], level) if level else clean
        return torch.where(given, noised, self.samples[block])

    def _event(self, row: LevelRow, moved: list[int]) -> "Event":
        plan = self.rollout.plan
        parts = [plan.sources(block) for block in moved]
        done = torch.tensor([block in row.finished for block in row.blocks])
        done = done.repeat_interleave(torch.tensor([len(part) for part in parts]))
        accepted = done.expand(len(self.rollout.values), -1)
        step = self.rows[row.steps[0]]
        shown = Row(
            row.index, len(self.matrix) - 1, row.levels[0], row.levels_next[0],
            guidance_scale=step.guidance_scale,
        )  # fmt: skip
        return self.rollout._row_event(
            moved[0], shown, torch.cat(parts), torch.ones_like(accepted), accepted
        )
