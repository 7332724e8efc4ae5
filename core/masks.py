"""Visibility tables: one relation per (query copy, key copy), evaluated densely.

The relations themselves live in core/relations.py and are offered here too. True always means "the
query may attend the key". The module does not know attention kernels, caches or schedules.

Invariant: `dense` is the reference every lowering (core/lowering.py) is tested against.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from .layout import Copy, Layout
from .relations import (
    AHEAD,
    ALL,
    EQ,
    IN,
    LE,
    LT,
    NEAR,
    NONE,
    POSE,
    ROUTE,
    Get,
    K,
    Q,
    Relation,
    Routes,
    parse_relation,
)

__all__ = [
    "AHEAD",
    "ALL",
    "EQ",
    "IN",
    "LE",
    "LT",
    "NEAR",
    "NONE",
    "POSE",
    "ROUTE",
    "Get",
    "K",
    "MaskTable",
    "Q",
    "Relation",
    "Routes",
    "dense",
    "parse_relation",
]

_LETTERS = {"C": Copy.CLEAN, "N": Copy.NOISY, "D": Copy.DRAFT}


@dataclass(frozen=True)
class MaskTable:
    """A visibility table: one relation per (query copy, key copy); missing entries are NONE.

    The document test (`EQ(document)` and key not padding) is always and-ed.
    """

    items: tuple[tuple[tuple[Copy, Copy], Relation], ...]

    @staticmethod
    def of(entries: Mapping[tuple[Copy, Copy], Relation]) -> "MaskTable":
        """Build a table from relations; entries are sorted so that equal tables are equal."""
        return MaskTable(tuple(sorted(entries.items(), key=lambda item: item[0])))

    @staticmethod
    def parse(entries: Mapping[str, str]) -> "MaskTable":
        """Build a table from text such as `{"N->C": "LT(block)"}` (letters C, N, D).

        Args:
            entries: Query and key copy letters -> relation text.

        Returns:
            The table.

        Raises:
            ValueError: Bad copy letters or a bad relation.
        """
        parsed = {}
        for name, text in entries.items():
            query, _, key = (part.strip() for part in name.partition("->"))
            if query not in _LETTERS or key not in _LETTERS:
                raise ValueError(f"mask entry {name!r} must read 'X->Y' with X, Y in C, N, D")
            parsed[_LETTERS[query], _LETTERS[key]] = parse_relation(text)
        return MaskTable.of(parsed)

    @property
    def entries(self) -> dict[tuple[Copy, Copy], Relation]:
        """The relations by (query copy, key copy)."""
        return dict(self.items)

    def to_dict(self) -> dict[str, str]:
        """Write the table as `parse` reads it."""
        letters = {copy: letter for letter, copy in _LETTERS.items()}
        return {f"{letters[q]}->{letters[k]}": str(relation) for (q, k), relation in self.items}

    def __str__(self) -> str:
        return " ; ".join(f"{name} {relation}" for name, relation in self.to_dict().items())

    def route_names(self) -> frozenset[str]:
        """Names of all routing tables the relations read."""
        return frozenset().union(*(relation.route_names() for _, relation in self.items))

    def evaluate(self, q: Get, k: Get, routes: Routes) -> Tensor:
        """Evaluate the table for attribute getters that broadcast against each other."""
        seen = NONE.evaluate(q, k, routes)
        for (query, key), relation in self.items:
            is_entry = (q("copy") == int(query)) & (k("copy") == int(key))
            seen = seen | (is_entry & relation.evaluate(q, k, routes))
        return seen & (q("document") == k("document")) & (k("document") >= 0)

    def visible(
        self,
        q: Layout,
        k: Layout,
        *,
        routes: Mapping[str, Bool[Tensor, "*lead queries blocks"]] | None = None,
    ) -> Bool[Tensor, "*out queries keys"]:
        """Evaluate the table densely; the reference every lowering is tested against.

        Args:
            q: Query rows.
            k: Key rows; pass the same object for self-attention, then padding rows see themselves
                so that a softmax over them stays finite (their output is discarded).
            routes: Routing tables, True = the query reads that block of the past. `[queries,
                blocks]`, `[batch, queries, blocks]` or `[batch, heads, queries, blocks]`.

        Returns:
            True where the query may attend the key; with a 4-D routing table the result has a
            head axis.

        Raises:
            ValueError: A relation names a routing table that was not given.
        """
        seen = dense(self, q, k, routes=routes)
        if q is k:
            # Padding rows: NaN guard of the softmax, never read by anyone.
            eye = torch.eye(q.num_tokens, dtype=torch.bool, device=q.device)
            seen = seen | (eye & (q.document < 0)[..., :, None].reshape(*_pad(seen, q), -1, 1))
        return seen


def dense(
    table: MaskTable,
    q: Layout,
    k: Layout,
    *,
    routes: Mapping[str, Bool[Tensor, "*lead queries blocks"]] | None = None,
) -> Bool[Tensor, "*out queries keys"]:
    """Evaluate a table densely, without the self edge of padding rows.

    Args:
        table: Visibility table.
        q: Query rows.
        k: Key rows.
        routes: As in `MaskTable.visible`.

    Returns:
        True where the query may attend the key.
    """
    routes = routes or {}
    has_heads = any(route.ndim == 4 for route in routes.values())

    def side(layout: Layout, axis: int) -> Get:
        def get(name: str) -> Tensor:
            value = getattr(layout, name)
            value = value[:, None] if has_heads and value.ndim == 2 else value
            return value.unsqueeze(axis)

        return get

    lookups = {name: _dense_route(route, has_heads) for name, route in routes.items()}
    seen = table.evaluate(side(q, -1), side(k, -2), lookups)
    return seen.expand(*seen.shape[:-2], q.num_tokens, k.num_tokens)


def _dense_route(route: Tensor, has_heads: bool) -> Callable[[Tensor], Tensor]:
    table = route[:, None] if has_heads and route.ndim == 3 else route

    def look_up(block: Tensor) -> Tensor:
        lead = torch.broadcast_shapes(table.shape[:-2], block.shape[:-2])
        rows = table.expand(*lead, *table.shape[-2:])
        index = block.clamp(max=table.shape[-1] - 1).expand(*lead, table.shape[-2], -1)
        return rows.gather(-1, index) & (block < table.shape[-1])

    return look_up


def _pad(seen: Tensor, layout: Layout) -> tuple[int, ...]:
    """Leading shape that puts a layout's batch axis in front of a possible head axis."""
    lead = layout.document.shape[:-1]
    return (*lead, *(1 for _ in range(seen.ndim - 2 - len(lead)))) if lead else ()
