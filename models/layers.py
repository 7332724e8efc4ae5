"""The layers of the backbone and what one pass tells all of them.

Attention, SwiGLU and their per-row modulation. The layers do not know masks as predicates,
schedules, or what a row stands for; the backbone (models/backbone.py) works out positions, row
ranges and conditioning vectors once per pass and hands them in as a `RowContext`.

Invariant: while gradients are off, everything here that depends on the prompt and the row ranges
alone is computed once per rollout, with the bits it would have if computed in every pass.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ..core.attention import Lowered, attend
from ..core.cache import CacheView
from ..core.layout import Copy, Layout
from ..core.numerics import (
    RowStableActivation,
    RowStableLinear,
    item_stable_attention,
    row_stable_activation,
)
from ..core.positions import Positions, rope_angles
from ..core.routing import Routing


def level_features(
    level: Float[Tensor, "*lead"], dim: int, rate: float = 1000.0
) -> Float[Tensor, "*lead dim"]:
    """Sinusoids of a noise level in [0, 1]: frequencies fall from `rate` radians 10000-fold."""
    half = dim // 2
    frequency = rate * 1e-4 ** (torch.arange(half, device=level.device) / max(half - 1, 1))
    # At least single precision: in half precision neighbouring levels would be one.
    angle = level.to(torch.promote_types(level.dtype, torch.float32))[..., None] * frequency
    return functional.pad(torch.cat((angle.cos(), angle.sin()), -1), (0, dim - 2 * half))


MOST_REMEMBERED = 128
"""Modulations that one prompt remembers: kinds of rows times noise levels of a schedule."""


def common_level(level: Float[Tensor, "*items rows"]) -> float | None:
    """Return the noise level that all rows of all items share, or None.

    Levels with an axis of items are not looked into: whether they agree would depend on who else
    is in the batch. Neither are those on a GPU, which reading a number stalls, nor those that
    gradients go through.
    """
    if level.ndim != 1 or level.device.type != "cpu" or torch.is_grad_enabled():
        return None
    low, high = level.aminmax()
    return float(low) if bool(low == high) else None


def rms_norm(x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
    """Divide by the root mean square of the last axis (no gain: modulation supplies it)."""
    return torch.rms_norm(x, (x.shape[-1],), None, 1e-6)


class Run(NamedTuple):
    """Rows start..stop-1 of one copy and one kind: prompt rows, or data rows.

    `is_one_frame`: all of them stand on one place of the first position axis, as the rows of one
    frame of a video do.
    """

    start: int
    stop: int
    copy: int
    is_data: bool
    is_one_frame: bool


_RUNS: WeakKeyDictionary[Layout, list[Run]] = WeakKeyDictionary()
_ANGLES: WeakKeyDictionary[Layout, dict[tuple, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def row_runs(layout: Layout) -> list[Run]:
    """Split rows into runs of one copy and one kind.

    Remembered per layout, because reading a tensor's numbers stalls a GPU.
    """
    if layout not in _RUNS:
        kind = layout.copy * 2 + (layout.source >= 0)
        edges = (kind[1:] != kind[:-1]).nonzero()[:, 0] + 1
        stops = [*edges.tolist(), layout.num_tokens]
        starts = [0, *stops[:-1]]
        axis = layout.position[:, 0]
        kinds = kind[torch.tensor(starts, device=kind.device)].tolist()
        _RUNS[layout] = [
            Run(start, stop, code // 2, bool(code % 2), _is_constant(axis[start:stop]))
            for start, stop, code in zip(starts, stops, kinds, strict=True)
        ]
    return _RUNS[layout]


def _is_constant(x: Tensor) -> bool:
    return bool((x == x[:1]).all())


def layout_angles(
    layout: Layout, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines of a layout's rows, remembered per layout."""
    known = _ANGLES.setdefault(layout, {})
    key = (head_dim, theta, dtype)
    if key not in known:
        cos, sin = rope_angles(layout.position, head_dim, theta)
        known[key] = (cos.to(dtype), sin.to(dtype))
    return known[key]


def doubled_angles(angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines for both halves of a head: x cos + swapped halves of x * sin."""
    cos, sin = angles
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def distance_bias(
    queries: Layout, keys: Layout, heads: int, decay: float, period: int = 1
) -> Float[Tensor, "#batch heads queries keys"]:
    """Lower scores with the distance along the first axis, a slope per head, period by period.

    Slopes fall geometrically from decay * 2^(-8 / heads) to decay * 2^-8; a score falls by its
    slope times floor(distance / period). Prompt rows are near.

    Args:
        queries: Active rows.
        keys: Cached and active rows.
        heads: Query heads.
        decay: Scale of all slopes.
        period: Frames over which a score stays the same; 1 = linear in the distance.

    Source: ALiBi (arXiv:2108.12409), over the frames of a video as in FAR (arXiv:2503.19325); in
        periods as in FaceFormer (arXiv:2112.05329), section 3.3.
    """
    head = torch.arange(1, heads + 1, device=keys.device)
    slope = decay * 2.0 ** (-8.0 * head / heads)
    gap = (queries.position[..., 0][..., :, None] - keys.position[..., 0][..., None, :]).abs()
    gap = gap if period == 1 else gap.div(period, rounding_mode="floor")
    gap = gap.masked_fill((keys.source < 0)[..., None, :], 0.0)
    gap = gap if gap.ndim == 3 else gap[None]
    return -slope[:, None, None] * gap[:, None]


def period_features(
    place: Float[Tensor, " rows"], dim: int, period: int
) -> Float[Tensor, "rows dim"]:
    """Sinusoids of a place within its period: frequencies fall from 1 radian 10000-fold.

    Args:
        place: Whole numbers, negative ones too.
        dim: Width.
        period: Places after which the features repeat.

    Source: FaceFormer (arXiv:2112.05329), section 3.3, the periodic positional encoding.
    """
    half = dim // 2
    frequency = 1e-4 ** (torch.arange(half, device=place.device, dtype=torch.float64) / half)
    angle = place.double().remainder(period)[..., None] * frequency
    return functional.pad(torch.cat((angle.sin(), angle.cos()), -1), (0, dim - 2 * half))


Vectors = tuple[Tensor, ...]
"""Shift, scale and gate of attention, then of the MLP; scales already hold 1 + scale."""


@dataclass(frozen=True)
class Told:
    """What rows of one kind are told: `modulation` [batch|1, rows|1, 6, dim], shared by all layers.

    `final` holds the shift and scale of the last norm; `layers` the vectors of a layer once known.
    """

    copy: int
    modulation: Tensor
    final: Vectors
    layers: dict[int | tuple[int, ...], Vectors] = field(default_factory=dict)


Parts = list[tuple[int, int, Vectors]]
"""Row ranges (start, stop) with the vectors of each, broadcast over its rows."""


@dataclass(frozen=True)
class RowContext:
    """Per-row facts shared by all layers of one pass."""

    segments: list[tuple[int, int, Told]]
    positions: Positions
    sees_words: Tensor
    cross: list[tuple[Tensor, Tensor]] | None
    cross_valid: Tensor | None
    bias: Tensor | None = None
    routing: Routing | None = None
    aligned: Tensor | None = None


def modulate(x: Tensor, parts: Parts, *, shift: int, scale: int) -> Tensor:
    """Scale and shift every row range by its own vectors: shift + x * (1 + scale)."""
    if len(parts) == 1:
        six = parts[0][2]
        return torch.addcmul(six[shift], x, six[scale])
    pieces = [torch.addcmul(six[shift], x[:, start:stop], six[scale]) for start, stop, six in parts]
    return torch.cat(pieces, 1)


def add_gated(x: Tensor, out: Tensor, parts: Parts, *, gate: int) -> Tensor:
    """Add a branch through its gate: x + gate * out."""
    if len(parts) == 1:
        return torch.addcmul(x, out, parts[0][2][gate])
    pieces = [
        torch.addcmul(x[:, start:stop], out[:, start:stop], six[gate]) for start, stop, six in parts
    ]
    return torch.cat(pieces, 1)


def split_heads(x: Float[Tensor, "b n c"], head_dim: int) -> Float[Tensor, "b h n d"]:
    """Cut the channels into heads; a plain view, because einops costs as much as a kernel here."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def join_heads(x: Float[Tensor, "b h n d"]) -> Float[Tensor, "b n c"]:
    """Put the heads back side by side."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.to_qkv = RowStableLinear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.to_out = RowStableLinear(heads * self.head_dim, dim, bias=False)
        # One learned temperature per head stands for the gains of both norms: they only multiply.
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(
        self, x: Tensor, layer: int, positions: Positions, lowered: Lowered, view: CacheView | None,
        bias: Tensor | None = None, routing: Routing | None = None,
    ) -> Tensor:  # fmt: skip
        """Attend from the active rows to the cached and active rows."""
        if view is None:
            query, key, value = self._project(x, positions)
        elif view.cache.rotated:
            query, key, value = self._project(x, positions)
            key, value = view.extend(layer, key, value)
        else:
            query, key, value = self._project(x, None)
            query = positions.queries(query)
            key, value = view.extend(layer, key, value)
            key = positions.read(key)
        query = query * self.temperature.to(query.dtype)
        if routing is not None:
            chosen = routing.bias(query, key.to(query.dtype))
            bias = chosen if bias is None else bias + chosen
        out = attend(query, key.to(query.dtype), value.to(query.dtype), lowered, bias=bias)
        return self.to_out(join_heads(out))

    def store(self, x: Tensor, layer: int, positions: Positions, view: CacheView) -> None:
        """Stage keys and values without attending."""
        _, key, value = self._project(x, positions if view.cache.rotated else None)
        view.extend(layer, key, value)

    def _project(self, x: Tensor, positions: Positions | None) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries and keys, transformed where positions are given, and values."""
        heads = split_heads(self.to_qkv(x), self.head_dim)
        both, value = heads.split_with_sizes((self.heads + self.kv_heads, self.kv_heads), dim=1)
        both = rms_norm(both)
        both = both if positions is None else positions.active(both, self.heads)
        query, key = both.split_with_sizes((self.heads, self.kv_heads), dim=1)
        return query, key, value


class CrossAttention(nn.Module):
    """Attention to the prompt's words; keys and values are computed once per rollout."""

    def __init__(self, dim: int, heads: int, prompt_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_query = RowStableLinear(dim, dim, bias=False)
        self.to_key_value = RowStableLinear(prompt_dim, 2 * dim, bias=False)
        self.to_out = RowStableLinear(dim, dim, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def prepare(self, words: Float[Tensor, "b t p"]) -> tuple[Tensor, Tensor]:
        """Project the words to keys and values [batch, heads, words, head_dim]."""
        both = rearrange(
            self.to_key_value(words), "b t (two h d) -> two b h t d", two=2, h=self.heads
        )
        return both[0], both[1]

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], valid: Tensor) -> Tensor:
        """Add what the words say."""
        query = rearrange(self.to_query(rms_norm(x)), "b n (h d) -> b h n d", h=self.heads)
        key, value = (part.to(query.dtype) for part in memory)
        mask = valid[:, None, None, :].to(query.device)
        out = item_stable_attention(query, key, value, mask)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class AlignedAttention(nn.Module):
    """Cross-attention whose mask is the diagonal: a row reads the numbers of its own frame.

    Softmax over one key is 1, so queries and keys have no say and a linear map is left.

    Source: the alignment mask of FaceFormer (arXiv:2112.05329), section 3.3.
    """

    def __init__(self, dim: int, numbers: int) -> None:
        super().__init__()
        self.to_value = RowStableLinear(numbers, dim, bias=False)
        self.to_out = RowStableLinear(dim, dim, bias=False)

    def forward(self, aligned: Float[Tensor, "b n a"]) -> Float[Tensor, "b n d"]:
        """Return what the frame of every row says."""
        return self.to_out(self.to_value(aligned))


class SwiGLU(nn.Module):
    """silu(W1 x) * W2 x, projected back."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        inner = 8 * math.ceil(dim * ratio / 8)
        self.to_gate_value = RowStableLinear(dim, 2 * inner, bias=False)
        self.to_out = RowStableLinear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gated map."""
        gate, value = self.to_gate_value(x).chunk(2, dim=-1)
        return self.to_out(row_stable_activation("silu", gate) * value)


class Layer(nn.Module):
    """One transformer layer with a modulation table of one row per copy."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, mlp_ratio: float, prompt_dim: int,
        aligned_dim: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention = SelfAttention(dim, heads, kv_heads)
        self.cross = CrossAttention(dim, heads, prompt_dim) if prompt_dim else None
        self.aligned = AlignedAttention(dim, aligned_dim) if aligned_dim else None
        self.mlp = SwiGLU(dim, mlp_ratio)
        # Rows: copies. Columns: shift, scale, gate of attention, then of the MLP.
        table = torch.zeros(len(Copy), 6, dim)
        table[:, 2::3] = 1.0  # gates start open; the shared projection starts at zero
        self.table = nn.Parameter(table)

    def forward(
        self, x: Tensor, layer: int, rows: RowContext, lowered: Lowered, view: CacheView | None
    ) -> Tensor:
        """Run attention, optional cross-attention and the MLP."""
        parts = [(a, b, self.vectors(layer, told)) for a, b, told in rows.segments]
        normed = modulate(rms_norm(x), parts, shift=0, scale=1)
        attended = self.attention(
            normed, layer, rows.positions, lowered, view, rows.bias, rows.routing
        )
        x = add_gated(x, attended, parts, gate=2)
        if self.cross is not None and rows.cross is not None:
            added = self.cross(x, rows.cross[layer], rows.cross_valid)
            x = x + torch.where(rows.sees_words[..., None], added, 0.0)
        if self.aligned is not None and rows.aligned is not None:
            x = x + self.aligned(rows.aligned)
        normed = modulate(rms_norm(x), parts, shift=3, scale=4)
        return add_gated(x, self.mlp(normed), parts, gate=5)

    def store(self, x: Tensor, layer: int, rows: RowContext, view: CacheView) -> None:
        """Stage this layer's keys and values: all that a commit pass needs of the last layer."""
        parts = [(a, b, self.vectors(layer, told)) for a, b, told in rows.segments]
        self.attention.store(
            modulate(rms_norm(x), parts, shift=0, scale=1), layer, rows.positions, view
        )

    def vectors(self, layer: int, told: Told) -> Vectors:
        """Vectors of this layer for rows of one kind; kept while gradients are off."""
        if layer in told.layers:
            return told.layers[layer]
        six = list((told.modulation + self.table[told.copy]).unbind(dim=-2))
        six[1], six[4] = 1 + six[1], 1 + six[4]
        if not torch.is_grad_enabled():
            told.layers[layer] = tuple(six)
        return tuple(six)


def two_maps(features: int, dim: int) -> nn.Sequential:
    """Embed `features` numbers as a vector of width `dim`: linear, SiLU, linear."""
    return nn.Sequential(
        RowStableLinear(features, dim), RowStableActivation("silu"), RowStableLinear(dim, dim)
    )
