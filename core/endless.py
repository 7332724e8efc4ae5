"""A plan without a last block: videos and worlds that go on for as long as anybody watches.

The blocks of a finite plan are laid out once; further blocks are the same rows shifted along the
first axis, and their values live in the same slots again (a ring). It knows no models or pixels.

Sinks are never farther away than they were in the finite plan: once it would be over they move with
the window (ids relative to the window, as in the endless variant of LongLive, arXiv:2509.22622).

Invariants: block b of an endless plan has the rows that block b of a long enough finite plan has,
up to the slots its values live in; memory does not grow with the number of blocks.
"""

import sys

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import UsageError
from .layout import Copy, Layout, Role
from .plan import DecodePlan

MEMO_LIMIT = 64
"""Remembered layouts; blocks that have passed are never asked for again."""


def repeats(sizes: list[int]) -> bool:
    """Tell whether a list is a shorter one twice or more often."""
    return any(
        len(sizes) % period == 0 and sizes == sizes[:period] * (len(sizes) // period)
        for period in range(1, len(sizes) // 2 + 1)
    )


class EndlessPlan(DecodePlan):
    """Blocks 0, 1, 2, ... without end.

    Only for plans whose cache forgets: with a window, and block sizes that repeat (one size, or
    the two of a frame and its action). Sinks need keys that are rotated when they are read.
    """

    def __init__(self, plan: DecodePlan, *, rotated: bool = False) -> None:
        """Continue a finite plan.

        Args:
            plan: Its blocks become the ring of slots.
            rotated: Whether keys are stored rotated.

        Raises:
            UsageError: a plan that cannot go on, with the setting that forbids it.
        """
        super().__init__(
            table=plan.table, content=plan.content, prompt=plan.prompt, height=plan.height,
            width=plan.width, copies=plan.copies, shift=plan.shift, write=plan.write,
            window=plan.window, sink=plan.sink, groups=plan.groups, matrix=plan.matrix,
            context_noise=plan.context_noise, context_level=plan.context_level, far=plan.far,
            levels=plan.levels, order=plan.order, relabels=plan.relabels,
        )  # fmt: skip
        if self.order == "any":
            raise UsageError(
                "an endless rollout makes frames in order, and this recipe's come in an order of "
                'their own; set layout.permute to "none"'
            )
        if self.matrix != "autoregressive":
            raise UsageError(
                f'schedule.matrix = "{self.matrix}" in an endless rollout, which takes one block '
                'after the other; set schedule.matrix to "autoregressive"'
            )
        sizes = [len(rows) for rows in self.rows_of_block]
        if self.window is None or self.write not in ("separate", "fused", "block"):
            raise UsageError(
                "an endless rollout needs cache.window and cache.write = separate, fused or block; "
                f"got {self.window} and {self.write}; try cache.window=8"
            )
        if self.far is not None and self.far.blocks is None:
            raise UsageError(
                "cache.far.blocks = null keeps a coarse copy of everything, and an endless rollout "
                f"would grow for ever; try cache.far.blocks={2 * self.window}"
            )
        if self.sink and rotated:
            raise UsageError(
                f"cache.sink = {self.sink} in an endless rollout moves with the window, which "
                'cache.keys = "rotated" forbids; set cache.keys to "unrotated" or cache.sink to 0'
            )
        if not repeats(sizes):
            raise UsageError(
                f"an endless rollout needs at least two blocks of one size, or sizes that repeat; "
                f"got {sizes} rows; change layout.frames"
            )
        axis = self.content.position[:, 0]
        self._period = float(axis.max() - axis.min()) + 1

    @property
    def num_blocks(self) -> int:
        """More than anybody will wait for."""
        return sys.maxsize

    @property
    def ring(self) -> int:
        """Blocks whose values are kept."""
        return len(self.rows_of_block)

    def sink_shift(self, block: int) -> float:
        """Return how far sinks move before a block runs: not at all while the finite plan lasts."""
        return self._period / self.ring if self.sink and block >= self.ring else 0.0

    def sources(self, block: int) -> Int[Tensor, " tokens"]:
        """Slots of a block: those of the block one ring earlier are used again."""
        return super().sources(block % self.ring)

    def _remember(self, key: tuple, copy: Copy, level: float) -> Layout:
        if len(self._memo) > MEMO_LIMIT:
            self._memo.clear()
        if key not in self._memo:
            block = key[1]
            turns = block // self.ring
            rows = self._rows_of(key[0], block % self.ring)
            shift = torch.zeros(rows.num_axes)
            shift[0] = turns * self._period
            self._memo[key] = rows.replace(
                copy=int(copy), level=level, block=block,
                order=rows.order + turns * self.num_slots,
                position=rows.position + shift.to(rows.position),
                role=rows.role if turns == 0 else rows.role & ~int(Role.SINK),
            )  # fmt: skip
        return self._memo[key]
