"""The layers of the backbone for one new row per item: decoding token by token on a CPU.

There the arithmetic is small and the calls around it are not, so this path keeps a batch of rows
two-dimensional and padded to the four or eight columns the kernel of `row_stable_linear` wants
anyway, and calls no modules. It does what `Layer.forward` does and nothing else.

Invariant: the same bits as the layers called one by one (its slow twin), for every batch size.
"""

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from ..core.attention import Lowered, NoMask
from ..core.cache import CacheView, KVCache
from ..core.numerics import ROW_MULTIPLE, RowStableLinear, item_stable_attention
from ..core.positions import Rotary
from .layers import Layer, RowContext, Told, Vectors, doubled_angles, rms_norm


def fits_single_row(
    layers: Sequence[Layer], x: Tensor, rows: RowContext, lowered: Lowered,
    view: CacheView | None,
) -> bool:  # fmt: skip
    """Say whether a pass is one this path covers: one row per item, all of the past visible.

    Replaced or quantised linear maps (adapters) go through the modules.
    """
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.shape[1] == 1
        and 0 < x.shape[0] <= ROW_MULTIPLE
        and isinstance(lowered, NoMask)
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


def run_single_rows(
    layers: Sequence[Layer], x: Float[Tensor, "b 1 d"], rows: RowContext, view: CacheView
) -> Float[Tensor, "b 1 d"]:
    """Run all layers on one row per item.

    Args:
        layers: The backbone's layers, for which `fits_single_row` holds.
        x: Input rows.
        rows: Facts of the pass.
        view: Open pass of a cache with rotated keys.

    Returns:
        Output rows.
    """
    batch = x.shape[0]
    told = rows.segments[0][2]
    attention = layers[0].attention
    sizes = (attention.heads + attention.kv_heads, attention.kv_heads)
    key_sizes, head_dim = (attention.heads, attention.kv_heads), attention.head_dim
    assert isinstance(rows.positions, Rotary), "only for passes that fit"
    cos, sin = doubled_angles(rows.positions.rows)
    x = _widen(x[:, 0])
    known = _weights(layers, view.cache)
    assert known is not None, "only for layers that fit"
    for index, weights in enumerate(known):
        layer, to_qkv, temperature, to_out, to_gate_value, to_down = weights
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _wide_vectors(layer, index, told, x)
        normed = torch.addcmul(shift, rms_norm(x), scale)
        product = functional.linear(to_qkv, normed).t()[:batch].contiguous()
        both, value = product.view(batch, -1, 1, head_dim).split_with_sizes(sizes, 1)
        both = rms_norm(both)
        both = torch.addcmul(both * cos, both.roll(head_dim // 2, -1), sin)
        query, key = both.split_with_sizes(key_sizes, 1)
        key, value = view.extend(index, key, value)
        seen = item_stable_attention(query * temperature, key, value)
        seen = functional.linear(to_out, _widen(seen.flatten(1))).t().contiguous()
        x = torch.addcmul(x, seen, gate)
        normed = torch.addcmul(mlp_shift, rms_norm(x), mlp_scale)
        # The product is [channels, rows]: gate and value are its halves without a copy.
        opened, value = functional.linear(to_gate_value, normed).chunk(2)
        inner = (functional.silu(opened) * value).t().contiguous()
        out = functional.linear(to_down, inner).t().contiguous()
        x = torch.addcmul(x, out, mlp_gate)
    return x[:batch, None]


def _widen(x: Float[Tensor, "b d"]) -> Float[Tensor, "wide d"]:
    """Pad rows to four or eight, as `row_stable_linear` does for single rows."""
    batch = x.shape[0]
    width = ROW_MULTIPLE // 2 if batch <= ROW_MULTIPLE // 2 else ROW_MULTIPLE
    if batch == 1:
        return x.expand(width, -1).contiguous()
    return x.contiguous() if batch == width else functional.pad(x, (0, 0, 0, width - batch))


def _wide_vectors(layer: Layer, index: int, told: Told, x: Tensor) -> Vectors:
    """Modulation vectors of one layer as [1 or wide, dim], remembered beside the plain ones."""
    key = (index, x.shape[0])
    known = told.layers.get(key)
    if known is None:
        plain = layer.vectors(index, told)
        known = tuple(v[:, 0] if len(v) == 1 else _widen(v[:, 0]) for v in plain)
        told.layers[key] = known
    return known
