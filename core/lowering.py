"""From a mask table to something an attention kernel can run.

Four forms, all tested equal to the dense reference: no mask at all, dense booleans, rectangles
(key slices per query range, with a causal tail), and a FlexAttention block mask. `lower` picks one.
The module does not run attention and does not know models or caches.

Invariants: `flops` of every form is the exact number of visible pairs; a row that sees nothing is
`blind` and attends to nothing (its output is zero), so padding never makes a NaN.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
from jaxtyping import Bool
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from .layout import INT_ATTRIBUTES, Layout
from .masks import Get, MaskTable, dense

BACKENDS = ("auto", "dense", "flex", "rectangles", "none")
# Each extra query range costs a kernel call; it must hide this many pairs to pay for itself
# (measured on CPU, forward and backward, 64 channels per head).
MIN_HIDDEN_PER_RANGE = 1000
# Below this length FlexAttention does not repay its compilation, and dense booleans are small.
MIN_FLEX_LENGTH = 1024

Routes = Mapping[str, Bool[Tensor, "*lead queries blocks"]]


@dataclass(frozen=True, eq=False)
class NoMask:
    """Every query sees every key: the usual decode case."""

    num_pairs: int


@dataclass(frozen=True, eq=False)
class DenseMask:
    """The reference: one boolean per pair.

    Attributes:
        may_attend: True = visible, `[queries, keys]` or `[batch, 1 or heads, queries, keys]`.
        is_blind: Rows that see nothing, same leading shape; None when there is no such row.
    """

    may_attend: Bool[Tensor, "*lead queries keys"]
    is_blind: Bool[Tensor, "*lead queries"] | None
    num_pairs: int


class Rect(NamedTuple):
    """A rectangle of visible pairs.

    `kind` is `"full"`, or `"causal"`: a square whose row i sees its first i + 1 keys.
    """

    q_start: int
    q_stop: int
    k_start: int
    k_stop: int
    kind: str


@dataclass(frozen=True, eq=False)
class Rectangles:
    """Disjoint rectangles, sorted by query range; a causal one is the last of its range."""

    rects: tuple[Rect, ...]
    num_queries: int
    num_keys: int
    num_pairs: int

    def ranges(self) -> list[tuple[int, int, tuple[Rect, ...]]]:
        """Group the rectangles by query range."""
        grouped: dict[tuple[int, int], list[Rect]] = {}
        for rect in self.rects:
            grouped.setdefault((rect.q_start, rect.q_stop), []).append(rect)
        return [(start, stop, tuple(rects)) for (start, stop), rects in grouped.items()]


@dataclass(frozen=True, eq=False)
class FlexMask:
    """A FlexAttention block mask whose predicate reads the attribute tensors."""

    block_mask: BlockMask
    is_blind: Bool[Tensor, "*lead queries"] | None
    num_pairs: int


Lowered = NoMask | DenseMask | Rectangles | FlexMask

# Layouts are immutable and compared by identity, so a lowered mask can be remembered per pair.
_MEMORY: WeakKeyDictionary[Layout, dict[tuple[Any, ...], tuple[Any, Lowered]]] = WeakKeyDictionary()


def lower(
    table: MaskTable,
    q: Layout,
    k: Layout,
    *,
    backend: str = "auto",
    routes: Routes | None = None,
) -> Lowered:
    """Turn a table and two layouts into a form `attend` can run.

    Args:
        table: Visibility table.
        q: Query rows.
        k: Key rows.
        backend: One of `BACKENDS`. `"auto"` takes no mask when all pairs are visible, on CPU
            rectangles when few query ranges suffice, FlexAttention for long sequences on CUDA,
            else dense.
        routes: Routing tables, as in `MaskTable.visible`; they always lower densely.

    Returns:
        The lowered mask; the same object for the same table, layouts and backend.

    Raises:
        ValueError: Unknown backend; `"none"` although some pair is hidden; `"rectangles"` for
            sequences of one batch that differ; a backend other than dense with routes.
    """
    if backend not in BACKENDS:
        raise ValueError(f"attention backend must be one of {list(BACKENDS)}, got {backend!r}")
    if routes:
        if backend not in ("auto", "dense"):
            raise ValueError(f"routed masks lower to 'dense' only, got backend {backend!r}")
        return _dense_mask(dense(table, q, k, routes=routes))
    memory = _MEMORY.setdefault(q, {})
    key = (table, id(k), backend)
    known = memory.get(key)
    if known is not None and known[0]() is k:
        return known[1]
    lowered = _lower(table, q, k, backend)
    memory[key] = (ref(k), lowered)
    return lowered


def flops(lowered: Lowered) -> int:
    """Count the visible pairs exactly, summed over the batch rows of the layouts.

    Args:
        lowered: Result of `lower`.

    Returns:
        Number of (query, key) pairs; multiply by 4 * head_dim * heads for attention FLOPs.
    """
    return lowered.num_pairs


def repeat_mask(lowered: Lowered, times: int) -> Lowered:
    """Repeat a dense mask whose items differ, batch after batch; others serve any batch."""
    if not isinstance(lowered, DenseMask) or lowered.may_attend.ndim != 4:
        return lowered
    blind = lowered.is_blind
    return DenseMask(
        lowered.may_attend.repeat(times, 1, 1, 1),
        None if blind is None else blind.repeat(times, 1, 1),
        lowered.num_pairs * times,
    )


def _lower(table: MaskTable, q: Layout, k: Layout, backend: str) -> Lowered:
    batch = max(layout.block.shape[0] if layout.is_batched else 1 for layout in (q, k))
    if _is_shared(q) and _is_shared(k):
        q, k = _first(q), _first(k)
    seen = dense(table, q, k)
    if seen.ndim == 3 and bool((seen == seen[:1]).all()):
        # Rows of a batch nearly always share one mask; then the cheap forms apply.
        seen = seen[0]
    return _choose(table, q, k, seen, backend, batch if seen.ndim == 2 else 1)


def _is_shared(layout: Layout) -> bool:
    """Whether all sequences are views of one (an expanded layout); costs no comparison."""
    if not layout.is_batched:
        return True
    values = [getattr(layout, name) for name in INT_ATTRIBUTES]
    return all(value.shape[0] == 1 or value.stride(0) == 0 for value in values)


def _choose(
    table: MaskTable, q: Layout, k: Layout, seen: Tensor, backend: str, copies: int
) -> Lowered:
    is_full = bool(seen.all())
    if backend == "none" and not is_full:
        raise ValueError(
            f"attention backend 'none' needs every pair visible, {int((~seen).sum())} pairs of "
            f"{seen.numel()} are hidden; try 'auto'"
        )
    if backend == "none" or (backend == "auto" and is_full):
        return NoMask(seen.numel() * copies)
    if backend == "rectangles" or (backend == "auto" and seen.device.type == "cpu"):
        found = _rectangles(seen, copies, must_pay=backend == "auto")
        if found is not None:
            return found
    is_long = seen.device.type == "cuda" and min(seen.shape[-2:]) >= MIN_FLEX_LENGTH
    if backend == "flex" or (backend == "auto" and is_long):
        return _flex_mask(table, q, k, seen, copies)
    return _dense_mask(seen, copies)


def _blind(seen: Tensor) -> Tensor | None:
    is_blind = ~seen.any(-1)
    return is_blind if bool(is_blind.any()) else None


def _dense_mask(seen: Tensor, copies: int = 1) -> DenseMask:
    num_pairs = int(seen.sum()) * copies
    seen = seen[:, None] if seen.ndim == 3 else seen
    is_blind = _blind(seen)
    if is_blind is not None:
        # The kernel needs one visible key per row; `attend` zeroes the output of these rows.
        seen = seen | is_blind[..., None]
    return DenseMask(seen.contiguous(), is_blind, num_pairs)


def _rectangles(seen: Tensor, copies: int, must_pay: bool) -> Rectangles | None:
    """Find the rectangles of a mask, or None when they cost more than a masked kernel saves."""
    if seen.ndim != 2:
        if not must_pay:
            raise ValueError(
                "attention backend 'rectangles' needs one mask for the whole batch, the sequences "
                "differ; try 'dense'"
            )
        return None
    rows = seen.cpu().numpy()
    num_pairs = int(rows.sum())
    starts, stops, has_tail = _query_ranges(rows)
    hidden_per_range = (rows.size - num_pairs) / max(len(starts), 1)
    if must_pay and len(starts) > 1 and hidden_per_range < MIN_HIDDEN_PER_RANGE:
        return None
    rects = _cut(rows, starts, stops, has_tail)
    num_queries, num_keys = rows.shape
    return Rectangles(tuple(rects), num_queries, num_keys, num_pairs * copies)


def _query_ranges(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Split the query axis into runs of equal rows and runs of growing staircases.

    Returns:
        Start and stop of each run, and whether it is a staircase (each row adds the next key).
    """
    num_rows, num_keys = rows.shape
    if num_rows == 0:
        empty = np.zeros(0, dtype=np.int64)
        return empty, empty, empty.astype(bool)
    changed = rows[1:] ^ rows[:-1]
    num_changed = changed.sum(1)
    column = changed.argmax(1) if num_keys else np.zeros(num_rows - 1, dtype=np.int64)
    here = np.arange(num_rows - 1)
    grows = (num_changed == 1) & rows[1:][here, column]
    # A staircase step must add the key right after one the previous row already sees.
    grows &= (column > 0) & rows[:-1][here, np.maximum(column - 1, 0)]
    kind = np.where(num_changed == 0, 0, np.where(grows, 1, 2))
    joined = _join_steps(kind.tolist(), column.tolist())
    first = np.flatnonzero(np.concatenate([[True], ~joined]))
    last = np.append(first[1:], num_rows)
    has_tail = np.zeros(len(first), dtype=bool)
    wide = last - first > 1
    has_tail[wide] = kind[first[wide]] == 1
    return first, last, has_tail


def _join_steps(kind: list[int], column: list[int]) -> np.ndarray:
    """Mark the steps that join row i to row i + 1; a range holds steps of one kind only.

    Args:
        kind: 0 = equal rows, 1 = the next row adds one key, 2 = anything else.
        column: The key a step adds.
    """
    joined = np.zeros(len(kind), dtype=bool)
    for step, now in enumerate(kind):
        if now == 2:
            continue
        is_first = step == 0 or not joined[step - 1]
        joined[step] = is_first or (
            now == kind[step - 1] and (now == 0 or column[step] == column[step - 1] + 1)
        )
    return joined


def _cut(
    rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, has_tail: np.ndarray
) -> list[Rect]:
    """Turn query ranges into rectangles: runs of shared keys, then the causal square."""
    if not len(starts):
        return []
    base = rows[starts].copy()
    tails = np.flatnonzero(has_tail)
    # The first row of a staircase differs from the second in exactly the key after its own last.
    tail_start = (rows[starts[tails]] ^ rows[starts[tails] + 1]).argmax(1) - 1
    base[tails, tail_start] = False
    edges = np.diff(np.pad(base, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    index, k_start = np.nonzero(edges == 1)
    k_stop = np.nonzero(edges == -1)[1]
    rects = [
        Rect(int(starts[i]), int(stops[i]), int(a), int(b), "full")
        for i, a, b in zip(index, k_start, k_stop, strict=True)
    ]
    rects += [
        Rect(int(starts[i]), int(stops[i]), int(a), int(a + stops[i] - starts[i]), "causal")
        for i, a in zip(tails, tail_start, strict=True)
    ]
    return sorted(rects, key=lambda rect: (rect.q_start, rect.kind == "causal", rect.k_start))


def _flex_mask(table: MaskTable, q: Layout, k: Layout, seen: Tensor, copies: int) -> FlexMask:
    num_pairs = int(seen.sum()) * copies
    is_shared = seen.ndim == 2
    q = _first(q) if is_shared else q.expand(seen.shape[0])
    k = _first(k) if is_shared else k.expand(seen.shape[0])
    block_mask = create_block_mask(
        mask_predicate(table, q, k),
        None if is_shared else seen.shape[0],
        None,
        q.num_tokens,
        k.num_tokens,
        device=str(seen.device),
    )
    is_blind = _blind(seen)
    return FlexMask(
        block_mask, is_blind if is_shared or is_blind is None else is_blind[:, None], num_pairs
    )


def mask_predicate(
    table: MaskTable, q: Layout, k: Layout
) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Write a table as a FlexAttention `mask_mod` that reads the attribute tensors.

    Args:
        table: Visibility table without routing.
        q: Query rows, `[queries]` or `[batch, queries]`.
        k: Key rows, `[keys]` or `[batch, keys]`.

    Returns:
        Function of (batch, head, query index, key index) -> boolean scalar tensor.
    """
    q_values = {name: getattr(q, name).contiguous() for name in INT_ATTRIBUTES}
    k_values = {name: getattr(k, name).contiguous() for name in INT_ATTRIBUTES}

    def reader(values: dict[str, Tensor], batch: Tensor, index: Tensor) -> Get:
        def get(name: str) -> Tensor:
            value = values[name]
            return value[batch, index] if value.ndim == 2 else value[index]

        return get

    def mask_mod(batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return table.evaluate(
            reader(q_values, batch, q_index), reader(k_values, batch, k_index), {}
        )

    return mask_mod


def _first(layout: Layout) -> Layout:
    """One sequence of a batch whose sequences share their mask."""
    if not layout.is_batched:
        return layout
    picked = {name: getattr(layout, name)[0] for name in (*INT_ATTRIBUTES, "position", "level")}
    return Layout(**picked)
