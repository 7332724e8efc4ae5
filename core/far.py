"""Far history at a coarser scale: what leaves the window stays as fewer tokens.

Every finished frame also stands in the sequence as coarse rows, one per patch of its tokens, with
an embedding of their own. Rows read the blocks of their window token by token and older blocks as
coarse rows; coarse rows read coarse rows of their own and earlier blocks only, so they are
permanent as soon as their block is, and tokens may be dropped when they leave the window.

A coarse row holds what the clean rows of its patch hold, which stand beside it in the same pass, in
training and in decoding alike. The module knows neither models nor masks.

Invariant: every coarse row has all tokens of its patch as clean rows in any layout that holds it.

Source: FAR (arXiv:2503.19325), long context of FAR-Long; AnyFlow-FAR's re-patchified chunks.
Differs: coarse rows of a frame exist while the frame is in the window, too, so that nothing is
encoded a second time when it leaves.
"""

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int
from torch import Tensor

from .errors import UsageError
from .layout import Copy, Layout, Role


@dataclass(frozen=True, eq=False)
class Far:
    """The coarse rows of a plan.

    Attributes:
        rows: One clean row per patch, in the order of `content`; see `coarse_rows`.
        blocks: Blocks older than the window that stay as coarse rows; None = all.
    """

    rows: Layout
    blocks: int | None

    def of_block(self, block: int) -> Layout:
        """Return the coarse rows of one block."""
        return self.rows.take((self.rows.block == block).nonzero()[:, 0])


def coarse_rows(content: Layout, height: int, width: int, patch: int) -> Layout:
    """Lay out one coarse row per patch x patch tokens of every frame.

    Args:
        content: Rows of a video, positions (frame, row, column), one slot per row.
        height: Token rows of a frame.
        width: Token columns of a frame.
        patch: Tokens along a side of a patch.

    Returns:
        Clean rows with the COARSE role and the attributes of the first token of their patch, apart
        from `position`, which is the mean over the patch.

    Raises:
        UsageError: patches that do not fill a frame.
    """
    if height % patch or width % patch:
        legal = [p for p in range(2, min(height, width) + 1) if not (height % p or width % p)]
        near = min(legal, key=lambda p: abs(p - patch)) if legal else None
        advice = f"try {near}" if near else "leave cache.far out"
        raise UsageError(
            f"cache.far.patch = {patch} does not divide frames of {height}x{width} tokens; {advice}"
        )
    row, column = content.position[:, 1].long(), content.position[:, 2].long()
    first = ((row % patch == 0) & (column % patch == 0)).nonzero()[:, 0]
    rows = content.take(first)
    middle = torch.tensor([0.0, (patch - 1) / 2, (patch - 1) / 2])
    return rows.replace(
        copy=int(Copy.CLEAN), level=0.0, position=rows.position + middle.to(rows.position),
        role=int(Role.COARSE),
    )  # fmt: skip


def is_coarse(layout: Layout) -> Tensor:
    """Tell which rows are coarse, bool with the shape of `layout.block`."""
    return (layout.role & int(Role.COARSE)) != 0


_MEMBERS: WeakKeyDictionary[Layout, dict[int, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def coarse_members(
    layout: Layout, patch: int
) -> tuple[Int[Tensor, " coarse"], Int[Tensor, "coarse members"]]:
    """Find, for every coarse row, the clean rows of its patch; remembered per layout.

    Args:
        layout: Rows of one pass, one-dimensional.
        patch: Tokens along a side of a patch.

    Returns:
        Numbers of the coarse rows, and of the patch * patch rows of each in raster order.

    Raises:
        ValueError: a coarse row without all tokens of its patch beside it.
    """
    known = _MEMBERS.setdefault(layout, {})
    if patch not in known:
        known[patch] = _find_members(layout, patch)
    return known[patch]


def _find_members(layout: Layout, patch: int) -> tuple[Tensor, Tensor]:
    coarse = is_coarse(layout).nonzero()[:, 0]
    if not len(coarse):
        return coarse, coarse.new_zeros(0, patch * patch)
    plain = (layout.copy == int(Copy.CLEAN)) & (layout.source >= 0) & ~is_coarse(layout)
    fine = plain.nonzero()[:, 0]
    frame, row, column = layout.position.floor().long().unbind(-1)
    span = int(torch.maximum(row, column).max()) // patch + 1
    number = (frame * span + row.div(patch, rounding_mode="floor")) * span
    number = number + column.div(patch, rounding_mode="floor")
    # Raster order within a patch, whatever order the rows stand in.
    inside = (row % patch) * patch + column % patch
    order = (number[fine] * patch * patch + inside[fine]).argsort()
    fine, wanted = fine[order], number[coarse]
    start = torch.searchsorted(number[fine].contiguous(), wanted.contiguous())
    place = start[:, None] + torch.arange(patch * patch, device=start.device)
    members = fine[place.clamp_max(len(fine) - 1)]
    whole = (number[members] == wanted[:, None]).all(-1) & (place[:, -1] < len(fine))
    if not bool(whole.all()):
        lone = int(coarse[(~whole).nonzero()[0, 0]])
        raise ValueError(
            f"coarse row {lone} stands without all {patch * patch} clean rows of its patch"
        )
    return coarse, members
