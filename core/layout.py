"""Which tokens stand in a sequence, in what order, with which per-token attributes.

A `Layout` is a frozen bundle of integer tensors; the mask language (core/masks.py) reads nothing
else. It does not know tokenizers, prompts as text, or pixels.

Invariants: every attribute has the same leading shape, `[tokens]` or `[batch, tokens]`;
`position` has one extra axis and `level` is a float in [0, 1] (1 = noise or masked, 0 = clean).
"""

from dataclasses import dataclass, fields, replace
from enum import IntEnum, IntFlag
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


class Copy(IntEnum):
    """Which copy of the data a row carries; row and column index of a visibility table."""

    CLEAN = 0
    NOISY = 1
    DRAFT = 2


class Role(IntFlag):
    """Bits a row may carry; tested by the unary relations `q.NAME` and `k.NAME`."""

    PROMPT = 1
    TEXT = 2
    SINK = 4
    COND = 8
    LAST = 16
    KEEP = 32
    ACTION = 64
    COARSE = 128


INT_ATTRIBUTES = (
    "block",
    "copy",
    "order",
    "role",
    "group",
    "tree_in",
    "tree_out",
    "reach",
    "document",
    "source",
)
ATTRIBUTES = (*INT_ATTRIBUTES, "position", "level")
_RECORD_KEYS = (
    "block",
    "copy",
    "order",
    "role",
    "position",
    "document",
    "source",
    "level",
    "group",
)


def _lead(name: str, value: Tensor) -> tuple[int, ...]:
    """Leading shape of one attribute: its shape without the axes of `position`."""
    return tuple(value.shape[:-1] if name == "position" else value.shape)


@dataclass(frozen=True, eq=False)
class Layout:
    """Per-token attributes of one sequence or of a batch of sequences.

    Attributes:
        block: Autoregressive block, monotone in generation order; -1 = static prompt.
        copy: `Copy` value of the row.
        order: Rank in compute order; it may differ from `position`.
        role: `Role` bits.
        group: Free grouping id for `EQ(group)` and `LT(group)`.
        tree_in: First number of the depth-first interval of a draft-tree node.
        tree_out: One past the last number of that interval.
        reach: Window of the query for `NEAR(attr, reach)`.
        document: Packed document id; -1 = padding.
        source: Data slot the row carries; -1 for prompt rows.
        position: Coordinates read by the positional operator only, float32.
        level: Noise level of the row in [0, 1], 1 = noise or masked.
    """

    block: Int[Tensor, "*lead tokens"]
    copy: Int[Tensor, "*lead tokens"]
    order: Int[Tensor, "*lead tokens"]
    role: Int[Tensor, "*lead tokens"]
    group: Int[Tensor, "*lead tokens"]
    tree_in: Int[Tensor, "*lead tokens"]
    tree_out: Int[Tensor, "*lead tokens"]
    reach: Int[Tensor, "*lead tokens"]
    document: Int[Tensor, "*lead tokens"]
    source: Int[Tensor, "*lead tokens"]
    position: Float[Tensor, "*lead tokens axes"]
    level: Float[Tensor, "*lead tokens"]

    def __post_init__(self) -> None:
        shapes = {name: _lead(name, getattr(self, name)) for name in ATTRIBUTES}
        if len(set(shapes.values())) != 1 or len(shapes["block"]) not in (1, 2):
            raise ValueError(
                f"layout attributes must share one shape [tokens] or [batch, tokens], got {shapes}"
            )

    @staticmethod
    def make(
        num_tokens: int, *, device: torch.device | str | None = None, **attributes: Any
    ) -> "Layout":
        """Build a layout from scalars, sequences or tensors; missing attributes get defaults.

        Args:
            num_tokens: Number of rows, at least 0.
            device: Where the tensors live; None = CPU.
            **attributes: Any of `ATTRIBUTES`, scalar or `[tokens]` or `[batch, tokens]`
                (`position`: with a trailing axes dimension, or without for one axis).
                Defaults: `order` and `source` count rows, `position` is `order` on one axis,
                everything else is 0.

        Returns:
            A layout whose attributes all have the widest leading shape given.

        Raises:
            ValueError: Unknown attribute name, or a value whose length is not `num_tokens`.
        """
        rank = torch.arange(num_tokens, device=device)
        values: dict[str, Any] = dict.fromkeys(INT_ATTRIBUTES, 0) | {"order": rank, "source": rank}
        values |= {"level": 0.0, "position": None}
        _refuse_unknown(attributes)
        values |= {name: value for name, value in attributes.items() if value is not None}
        if values["position"] is None:
            values["position"] = torch.as_tensor(values["order"], device=device)
        return _assemble(values, num_tokens, device)

    @property
    def num_tokens(self) -> int:
        """Number of rows of one sequence, padding included."""
        return self.block.shape[-1]

    @property
    def device(self) -> torch.device:
        """Device of every attribute."""
        return self.block.device

    @property
    def num_axes(self) -> int:
        """Number of position axes."""
        return self.position.shape[-1]

    @property
    def is_batched(self) -> bool:
        """Whether attributes are `[batch, tokens]` instead of `[tokens]`."""
        return self.block.ndim == 2

    def take(self, index: Int[Tensor, " rows"] | slice) -> "Layout":
        """Select rows by position, the same for every sequence of a batch.

        Args:
            index: Row numbers in [0, tokens) or a slice.

        Returns:
            The layout of the selected rows, in the order given.
        """
        picked = {name: getattr(self, name)[..., index] for name in ATTRIBUTES[:-2]}
        picked |= {"level": self.level[..., index], "position": self.position[..., index, :]}
        return Layout(**picked)

    def take_rows(self, index: Int[Tensor, "batch rows"]) -> "Layout":
        """Select rows per sequence; a one-dimensional layout is first expanded.

        Args:
            index: Row numbers in [0, tokens), one list per sequence.

        Returns:
            A batched layout `[batch, rows]`.
        """
        wide = self.expand(index.shape[0])
        picked = {
            name: getattr(wide, name).gather(1, index) for name in ATTRIBUTES if name != "position"
        }
        deep = index[..., None].expand(*index.shape, self.num_axes)
        return Layout(**picked, position=wide.position.gather(1, deep))

    def replace(self, **attributes: Any) -> "Layout":
        """Return a layout with some attributes exchanged; scalars broadcast.

        Args:
            **attributes: Any of `ATTRIBUTES`, as in `make`.

        Returns:
            A new layout; it becomes batched when one of the values is.

        Raises:
            ValueError: Unknown attribute name, or a value of another length.
        """
        _refuse_unknown(attributes)
        values = {name: getattr(self, name) for name in ATTRIBUTES} | attributes
        return _assemble(values, self.num_tokens, self.device)

    def to(self, device: torch.device | str) -> "Layout":
        """Move every attribute to a device; returns self when nothing has to move."""
        if torch.device(device) == self.device:
            return self
        return replace(self, **{name: getattr(self, name).to(device) for name in ATTRIBUTES})

    def expand(self, batch: int) -> "Layout":
        """Give every attribute a batch axis (views, no copies).

        Args:
            batch: Number of sequences; a layout that is already batched must have this many.

        Returns:
            A layout with attributes `[batch, tokens]`.

        Raises:
            ValueError: The layout is batched with another number of sequences.
        """
        if self.is_batched:
            if self.block.shape[0] not in (1, batch):
                raise ValueError(f"layout has {self.block.shape[0]} sequences, asked for {batch}")
            return replace(
                self,
                **{
                    n: getattr(self, n).expand(batch, *getattr(self, n).shape[1:])
                    for n in ATTRIBUTES
                },
            )
        return replace(
            self, **{n: getattr(self, n).expand(batch, *getattr(self, n).shape) for n in ATTRIBUTES}
        )

    def records(self) -> list[dict[str, Any]]:
        """List every row as plain numbers, for `inspect` and JSON.

        Returns:
            One dictionary per row with block, copy, order, role, position, document, source,
            level and group; batched layouts add `batch` and list sequence after sequence.
        """
        columns = {name: getattr(self, name).tolist() for name in _RECORD_KEYS}
        if not self.is_batched:
            return [
                dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
            ]
        return [
            {"batch": item} | dict(zip(columns, row, strict=True))
            for item in range(self.block.shape[0])
            for row in zip(*(column[item] for column in columns.values()), strict=True)
        ]

    @staticmethod
    def cat(layouts: list["Layout"]) -> "Layout":
        """Join layouts along the token axis; unbatched ones are expanded where needed.

        Args:
            layouts: At least one layout; all must have the same number of position axes.

        Returns:
            One layout with the rows of all, attributes unchanged.

        Raises:
            ValueError: Empty list or different numbers of axes.
        """
        axes = {layout.num_axes for layout in layouts}
        if len(axes) != 1:
            raise ValueError(f"layouts to join must share one number of axes, got {sorted(axes)}")
        batches = [layout.block.shape[0] for layout in layouts if layout.is_batched]
        parts = [layout.expand(max(batches)) for layout in layouts] if batches else layouts
        joined = {name: torch.cat([getattr(p, name) for p in parts], -1) for name in INT_ATTRIBUTES}
        joined["level"] = torch.cat([part.level for part in parts], -1)
        return Layout(**joined, position=torch.cat([part.position for part in parts], -2))


def _refuse_unknown(attributes: dict[str, Any]) -> None:
    unknown = sorted(set(attributes) - set(ATTRIBUTES))
    if unknown:
        raise ValueError(f"unknown layout attribute {unknown}; allowed {list(ATTRIBUTES)}")


def _assemble(values: dict[str, Any], num_tokens: int, device: Any) -> Layout:
    """Broadcast raw values to one leading shape and freeze them."""
    tensors = {}
    for field in fields(Layout):
        dtype = torch.float32 if field.name in ("position", "level") else torch.int64
        value = torch.as_tensor(values[field.name], device=device).to(dtype)
        if field.name == "position" and (value.ndim < 2 or value.shape[-2] != num_tokens):
            # Coordinates on one axis may be given without the axes dimension.
            value = rearrange(value, "... -> ... 1")
        if value.ndim and _lead(field.name, value)[-1:] not in ((num_tokens,), ()):
            raise ValueError(
                f"layout attribute {field.name} has {_lead(field.name, value)[-1]} rows, "
                f"the layout has {num_tokens}"
            )
        tensors[field.name] = value
    lead = torch.broadcast_shapes((num_tokens,), *(_lead(n, v) for n, v in tensors.items()))
    for name, value in tensors.items():
        shape = (*lead, value.shape[-1]) if name == "position" else lead
        tensors[name] = value.expand(shape)
    return Layout(**tensors)
