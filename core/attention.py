"""The one place that calls an attention kernel.

`attend` runs a lowered mask (core/lowering.py) with PyTorch's scaled dot product attention or with
FlexAttention. It knows neither masks as predicates nor caches.

Invariant: all lowered forms give the same result up to rounding; rows that see nothing return 0.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.attention.flex_attention as flex_module
from jaxtyping import Float
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention

from .lowering import (
    BACKENDS,
    DenseMask,
    FlexMask,
    Lowered,
    NoMask,
    Rect,
    Rectangles,
    flops,
    lower,
    mask_predicate,
)
from .numerics import item_stable_attention

__all__ = [
    "BACKENDS",
    "DenseMask",
    "FlexMask",
    "Lowered",
    "NoMask",
    "Rect",
    "Rectangles",
    "attend",
    "flops",
    "lower",
    "mask_predicate",
]


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    lowered: Lowered,
    *,
    bias: Float[Tensor, "#batch #heads queries keys"] | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Run masked attention, scaled by 1 / sqrt(head_dim).

    Args:
        query: Queries.
        key: Keys; `heads` must be a multiple of `kv_heads` (grouped-query attention).
        value: Values.
        lowered: Result of `lower` for layouts of these lengths.
        bias: Added to the scores before the softmax.

    Returns:
        Attention output; exactly 0 for rows that see no key.

    Raises:
        ValueError: `heads` is not a multiple of `kv_heads`.
    """
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"heads must be a multiple of kv_heads, got {query.shape[1]} and {key.shape[1]}"
        )
    if isinstance(lowered, NoMask):
        return _sdpa(query, key, value, bias)
    if isinstance(lowered, Rectangles):
        return _attend_rectangles(query, key, value, lowered, bias)
    if isinstance(lowered, FlexMask):
        output = _attend_flex(query, key, value, lowered, bias)
    else:
        mask: Tensor = lowered.may_attend
        if bias is not None:
            mask = torch.where(mask, bias, -torch.inf)
        output = _sdpa(query, key, value, mask)
    if lowered.is_blind is None:
        return output
    return output.masked_fill(lowered.is_blind[..., None], 0.0)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return item_stable_attention(query, key, value, mask)


def _attend_rectangles(
    query: Tensor, key: Tensor, value: Tensor, lowered: Rectangles, bias: Tensor | None
) -> Tensor:
    """Attend one query range at a time over the concatenated key slices it sees."""
    shape = (*query.shape[:-1], value.shape[-1])
    edges = sorted({edge for rect in lowered.rects for edge in (rect.k_start, rect.k_stop)})
    take_key, take_value = _slicer(key, edges), _slicer(value, edges)
    ranges = lowered.ranges()
    take_query = _slicer(
        query, sorted({edge for start, stop, _ in ranges for edge in (start, stop)})
    )
    parts, done = [], 0
    for start, stop, rects in ranges:
        if start > done:
            parts.append(query.new_zeros(*shape[:2], start - done, shape[-1]))
        spans = [(rect.k_start, rect.k_stop) for rect in rects]
        keys, values = take_key(spans), take_value(spans)
        mask: Tensor | None = None
        if rects[-1].kind == "causal":
            # Bottom-right aligned: the causal square is the tail of the concatenated keys.
            mask = causal_lower_right(stop - start, keys.shape[2])
        if bias is not None:
            part = torch.cat([bias[..., start:stop, slice(*span)] for span in spans], -1)
            mask = part if mask is None else _with_tail(part)
        parts.append(_sdpa(take_query([(start, stop)]), keys, values, mask))
        done = stop
    if done < shape[2]:
        parts.append(query.new_zeros(*shape[:2], shape[2] - done, shape[-1]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _slicer(tensor: Tensor, edges: list[int]) -> Callable[[list[tuple[int, int]]], Tensor]:
    """Return a function that concatenates spans of the token axis.

    Without gradients a span is a view. With gradients the tensor is split once at all edges,
    because the backward of every single slice would fill a tensor of full length.
    """
    needs_grad = tensor.requires_grad and torch.is_grad_enabled()
    cuts = [0, *(edge for edge in edges if 0 < edge < tensor.shape[2]), tensor.shape[2]]
    pieces = tensor.split([b - a for a, b in pairwise(cuts)], 2) if needs_grad else ()
    index = {edge: number for number, edge in enumerate(cuts)}

    def take(spans: list[tuple[int, int]]) -> Tensor:
        if needs_grad:
            parts = [part for a, b in spans for part in pieces[index[a] : index[b]]]
        else:
            parts = [tensor[:, :, a:b] for a, b in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    return take


def _with_tail(bias: Tensor) -> Tensor:
    """Hide the upper right corner of a bias, aligned to the bottom right."""
    rows, keys = bias.shape[-2:]
    hidden = torch.ones(rows, keys, dtype=torch.bool, device=bias.device).triu(keys - rows + 1)
    return bias.masked_fill(hidden, -torch.inf)


@lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=True)


def _add_bias(bias: Tensor) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Write a bias [batch, heads, queries, keys] as a FlexAttention `score_mod`."""

    def score_mod(
        score: Tensor, batch: Tensor, head: Tensor, q_index: Tensor, k_index: Tensor
    ) -> Tensor:
        return score + bias[batch, head, q_index, k_index]

    return score_mod


def _attend_flex(
    query: Tensor, key: Tensor, value: Tensor, lowered: FlexMask, bias: Tensor | None
) -> Tensor:
    wide = None if bias is None else bias.expand(*query.shape[:2], *bias.shape[-2:])
    is_grouped = query.shape[1] != key.shape[1]
    with _eager_flex(query.device.type != "cuda"):
        run: Callable[..., Any] = flex_attention
        if query.device.type == "cuda":
            run = _compiled_flex()
        return run(
            query,
            key,
            value,
            score_mod=None if wide is None else _add_bias(wide),
            block_mask=lowered.block_mask,
            enable_gqa=is_grouped,
        )


@contextmanager
def _eager_flex(is_eager: bool) -> Iterator[None]:
    """Run FlexAttention without Dynamo, as its own documentation offers for debugging.

    Off CUDA it only serves as an equality reference without backward; traced there, it warns about
    its speed, and its guards fail on predicates that have been collected (torch 2.11).
    """
    before = flex_module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG
    flex_module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = is_eager or before
    try:
        yield
    finally:
        flex_module._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = before
