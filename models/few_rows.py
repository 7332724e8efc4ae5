"""The layers of the backbone for a handful of rows: decoding a token or two at a time on a CPU.

There the arithmetic is small and the calls around it are not, so this path keeps the rows of all
items two-dimensional and padded as the kernels of `row_stable_linear` want them anyway, and calls
no modules. It does what `Layer.forward` does and nothing else.

Invariant: the same bits as the layers called one by one (its slow twin), for every batch size.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ..core.attention import Lowered, attend
from ..core.cache import CacheView, KVCache
from ..core.numerics import ROW_MULTIPLE, RowStableLinear, row_stable_activation
from ..core.positions import Rotary
from .layers import Layer, Parts, RowContext, Vectors, doubled_angles, join_heads, rms_norm


def fits_few_rows(
    layers: Sequence[Layer], x: Tensor, rows: RowContext, view: CacheView | None
) -> bool:
    """Say whether a pass is one this path covers: at most eight rows, keys rotated when written.

    Replaced or quantised linear maps (adapters) go through the modules.
    """
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and 0 < x.shape[0] * x.shape[1] <= ROW_MULTIPLE
        and view is not None
        and view.cache.rotated
        and view.cache.keys[0].dtype == x.dtype
        and rows.cross is None
        and rows.bias is None
        and rows.aligned is None
        and isinstance(rows.positions, Rotary)
        and rows.routing is None
        and not torch.is_autocast_enabled("cpu")
        and _weights(layers, view.cache) is not None
    )


Weights = tuple[Layer, Tensor, Tensor, Tensor, Tensor, Tensor]
"""A layer, then its query-key-value map, temperature, output map and the two maps of the MLP."""

_WEIGHTS: WeakKeyDictionary[KVCache, list[Weights] | None] = WeakKeyDictionary()


def _weights(layers: Sequence[Layer], cache: KVCache) -> list[Weights] | None:
    """Collect the parameters once per rollout; None where a layer is not a plain one."""
    if cache not in _WEIGHTS:
        plain = all(_is_plain(layer) for layer in layers)
        _WEIGHTS[cache] = [_parameters(layer) for layer in layers] if plain else None
    return _WEIGHTS[cache]


def _parameters(layer: Layer) -> Weights:
    attention, mlp = layer.attention, layer.mlp
    return (
        layer,
        attention.to_qkv.weight,
        attention.temperature,
        attention.to_out.weight,
        mlp.to_gate_value.weight,
        mlp.to_out.weight,
    )


def _is_plain(layer: Layer) -> bool:
    if type(layer) is not Layer or layer.training:
        return False
    attention, mlp = layer.attention, layer.mlp
    maps = (attention.to_qkv, attention.to_out, mlp.to_gate_value, mlp.to_out)
    hooked = attention._forward_hooks or mlp._forward_hooks or layer._forward_hooks
    return not hooked and all(type(linear) is RowStableLinear for linear in maps)


def run_few_rows(
    layers: Sequence[Layer], x: Float[Tensor, "b n d"], rows: RowContext, lowered: Lowered,
    view: CacheView,
) -> Float[Tensor, "b n d"]:  # fmt: skip
    """Run all layers on a handful of rows.

    Args:
        layers: The backbone's layers, for which `fits_few_rows` holds.
        x: Input rows.
        rows: Facts of the pass.
        lowered: Which keys, cached and active, every row sees.
        view: Open pass of a cache with rotated keys.

    Returns:
        Output rows.
    """
    batch, count, dim = x.shape
    total, alone = batch * count, count == 1
    attention = layers[0].attention
    sizes = (attention.heads + attention.kv_heads, attention.kv_heads)
    key_sizes, head_dim = (attention.heads, attention.kv_heads), attention.head_dim
    assert isinstance(rows.positions, Rotary), "only for passes that fit"
    cos, sin = doubled_angles(rows.positions.rows)
    x = _widen(x.reshape(total, dim), alone)
    known = _weights(layers, view.cache)
    assert known is not None, "only for layers that fit"
    for index, weights in enumerate(known):
        layer, to_qkv, temperature, to_out, to_gate_value, to_down = weights
        vectors = _wide_vectors(layer, index, rows, batch, x)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = vectors
        normed = torch.addcmul(shift, rms_norm(x), scale)
        product = _times(to_qkv, normed, alone)[:total].contiguous()
        heads = product.view(batch, count, -1, head_dim).transpose(1, 2)
        both, value = heads.split_with_sizes(sizes, 1)
        both = rms_norm(both)
        if alone:
            both = torch.addcmul(both * cos, both.roll(head_dim // 2, -1), sin)
        else:  # on strided rows kernels round as their slow twin's do
            both = rows.positions.active(both, attention.heads)
        query, key = both.split_with_sizes(key_sizes, 1)
        key, value = view.extend(index, key, value)
        seen = join_heads(attend(query * temperature, key, value, lowered)).view(total, -1)
        x = torch.addcmul(x, _times(to_out, _widen(seen, alone), alone).contiguous(), gate)
        normed = torch.addcmul(mlp_shift, rms_norm(x), mlp_scale)
        out = _times(to_down, _gated(to_gate_value, normed, alone), alone).contiguous()
        x = torch.addcmul(x, out, mlp_gate)
    return x[:total].view(batch, count, dim)


def _times(weight: Float[Tensor, "out d"], x: Float[Tensor, "wide d"], alone: bool) -> Tensor:
    """Multiply rows by a matrix, from the side `row_stable_linear` does for as many per item."""
    return functional.linear(weight, x).t() if alone else functional.linear(x, weight)


def _gated(weight: Tensor, x: Float[Tensor, "wide d"], alone: bool) -> Float[Tensor, "wide inner"]:
    """Run the first map of the MLP and its gate."""
    if alone:
        # The product is [channels, rows]: gate and value are its halves without a copy.
        opened, value = functional.linear(weight, x).chunk(2)
        return (functional.silu(opened) * value).t().contiguous()
    opened, value = functional.linear(x, weight).chunk(2, -1)
    return row_stable_activation("silu", opened) * value


def _widen(x: Float[Tensor, "rows d"], alone: bool) -> Float[Tensor, "wide d"]:
    """Pad rows to eight, or to four where that does, as `row_stable_linear` pads them."""
    count = x.shape[0]
    width = ROW_MULTIPLE // 2 if alone and count <= ROW_MULTIPLE // 2 else ROW_MULTIPLE
    if alone and count == 1:
        return x.expand(width, -1).contiguous()
    return x.contiguous() if count == width else functional.pad(x, (0, 0, 0, width - count))


def _wide_vectors(layer: Layer, index: int, rows: RowContext, batch: int, x: Tensor) -> Vectors:
    """Modulation vectors of one layer as [1 or wide, dim], remembered beside the plain ones."""
    last = rows.segments[-1][2]  # what the others are told goes with it: they share a prompt
    key = (index, x.shape[0], *(stop for _, stop, _ in rows.segments))
    known = last.layers.get(key)
    if known is None:
        parts = [(start, stop, layer.vectors(index, told)) for start, stop, told in rows.segments]
        known = tuple(_wide(parts, which, batch, x) for which in range(6))
        last.layers[key] = known
    return known


def _wide(parts: Parts, which: int, batch: int, x: Float[Tensor, "wide d"]) -> Tensor:
    """Write one vector beside every row, where not all rows have the same."""
    if len(parts) == 1 and parts[0][2][which].shape[:2] == (1, 1):
        return parts[0][2][which][0]
    pieces = [six[which].expand(batch, stop - start, -1) for start, stop, six in parts]
    full = torch.cat(pieces, 1).flatten(0, 1)
    return functional.pad(full, (0, 0, 0, x.shape[0] - len(full)))
