"""What `group` means in a video: the place, the frame, or a window in space and time.

A mask that asks `EQ(group)` is one relation; which rows share a group is said here, layer by layer
where a recipe names several groupings. Groups are functions of the positions alone, so keys in a
cache are grouped as they were in training.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from .layout import Layout
from .lowering import Lowered, Routes, lower, repeat_mask
from .masks import MaskTable
from .recipe import window_of

PROMPT_GROUP = -1
"""Group of prompt rows, whose positions are before the first frame."""


@dataclass(frozen=True)
class PerLayer:
    """One lowered mask per layer, in turn."""

    masks: tuple[Lowered, ...]

    def of(self, layer: int) -> Lowered:
        """Return the mask of a layer."""
        return self.masks[layer % len(self.masks)]


def regroup(layout: Layout, group: str, height: int, width: int) -> Layout:
    """Set `group` as a recipe's `layout.group` says.

    Args:
        layout: Rows of a video, positions (frame, row, column).
        group: "site", "frame", "block" (left as it is) or "window:TxHxW[:shifted]".
        height: Token rows of a frame.
        width: Token columns of a frame.

    Returns:
        The layout with other groups; prompt rows have `PROMPT_GROUP`.
    """
    if group == "block":
        return layout
    frame, row, column = layout.position.long().unbind(-1)
    if group == "frame":
        number = frame
    elif group == "site":
        number = row * width + column
    else:
        number = _window(group, frame, row, column, height, width)
    return layout.replace(group=torch.where(layout.source < 0, PROMPT_GROUP, number))


def _window(
    group: str,
    frame: Int[Tensor, "*lead rows"],
    row: Int[Tensor, "*lead rows"],
    column: Int[Tensor, "*lead rows"],
    height: int,
    width: int,
) -> Int[Tensor, "*lead rows"]:
    """Number the windows; shifted ones start half a window earlier and are short at the edges."""
    sizes = window_of(group)
    if sizes is None:
        raise ValueError(f"layout.group = {group!r}; try 'window:2x2x2'")
    *lengths, is_shifted = sizes
    number = torch.zeros_like(frame)
    # Time comes first and needs no count: frames go on for ever.
    counts = (1, height, width)
    for axis, length, count in zip((frame, row, column), lengths, counts, strict=True):
        shift = length // 2 if is_shifted else 0
        number = number * (count // length + 2) + (axis + shift) // length
    return number


def repeat_items(lowered: Lowered | PerLayer, times: int) -> Lowered | PerLayer:
    """Repeat masks that differ from item to item, for batches of several guidance branches."""
    if isinstance(lowered, PerLayer):
        return PerLayer(tuple(repeat_mask(mask, times) for mask in lowered.masks))
    return repeat_mask(lowered, times)


def lower_layers(
    table: MaskTable, queries: Layout, keys: Layout, groups: tuple[str, ...], height: int,
    width: int, *, backend: str = "auto", routes: Routes | None = None,
) -> Lowered | PerLayer:  # fmt: skip
    """Lower a table for layers that take groupings in turn.

    Args:
        table: Who sees whom.
        queries: Active rows.
        keys: Keys; the same object as `queries` where nothing is cached.
        groups: Of `LayoutSpec.groups`.
        height: Token rows of a frame.
        width: Token columns of a frame.
        backend: See `lower`.
        routes: See `lower`.

    Returns:
        One lowered mask, or one per layer in turn where there are several groupings.
    """
    if groups in (("site",), ("block",)):  # as laid out
        return lower(table, queries, keys, backend=backend, routes=routes)
    masks = []
    for group in groups:
        own = regroup(queries, group, height, width)
        other = own if keys is queries else regroup(keys, group, height, width)
        masks.append(lower(table, own, other, backend=backend, routes=routes))
    return masks[0] if len(masks) == 1 else PerLayer(tuple(masks))
