"""A transformer over the patches of frames that never looks ahead, whole or frame by frame.

One frame is one block: its tokens see each other and those of the last frames. Over a whole clip
the mask language says so; in a stream the cache holds the keys and values of the frames that are
still seen, and the same table says who sees whom. It does not know pixels, codes or losses.

Invariant: `step` keeps nothing in the module; what it remembers goes in and out as plain tensors,
batch first, of a size that does not grow with the number of frames.
"""

import math
from functools import lru_cache

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from ..core.attention import Lowered, attend, lower
from ..core.cache import CacheView, KVCache
from ..core.layout import Layout
from ..core.layouts import frames as lay_out_frames
from ..core.positions import rope_angles, rotate
from ..core.rules import rule

Angles = tuple[Tensor, Tensor]
ROPE_THETA = 100.0
_NUMBER = "frame"


class CausalAttention(nn.Module):
    """Multi-head attention with normalised, rotated queries and keys."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.temperature = nn.Parameter(torch.full((heads, 1, 1), math.sqrt(2.0)))

    def forward(
        self,
        x: Float[Tensor, "batch tokens dim"],
        layer: int,
        angles: Angles,
        lowered: Lowered,
        view: CacheView | None,
    ) -> Float[Tensor, "batch tokens dim"]:
        """Attend to the tokens at hand and, through an open view, to cached ones."""
        query, key, value = rearrange(
            self.to_qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads
        )
        size = (query.shape[-1],)
        query = rotate(functional.rms_norm(query, size, eps=1e-6), angles) * self.temperature
        key = rotate(functional.rms_norm(key, size, eps=1e-6), angles)
        if view is not None:
            key, value = view.extend(layer, key, value)
        return self.to_out(rearrange(attend(query, key, value, lowered), "b h n d -> b n (h d)"))


class CausalLayer(nn.Module):
    """Pre-norm attention and a GELU MLP."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = 8 * math.ceil(dim * mlp_ratio / 8)
        self.norm_attention = nn.RMSNorm(dim, eps=1e-6)
        self.attention = CausalAttention(dim, heads)
        self.norm_mlp = nn.RMSNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(dim, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, dim)
        )

    def forward(
        self, x: Tensor, layer: int, angles: Angles, lowered: Lowered, view: CacheView | None
    ) -> Tensor:
        """Run the layer."""
        x = x + self.attention(self.norm_attention(x), layer, angles, lowered, view)
        return x + self.mlp(self.norm_mlp(x))


class FrameTransformer(nn.Module):
    """Layers over the tokens of frames, block-causal with one frame per block."""

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        depth: int,
        heads: int,
        window: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        """Build the layers.

        Args:
            grid: Token rows and columns of a frame.
            dim: Width of a token.
            depth: Layers.
            heads: Attention heads; `dim / heads` must be even.
            window: Frames a frame sees, its own counted.
            mlp_ratio: Inner width of the MLP over `dim`.
        """
        super().__init__()
        self.grid, self.dim, self.heads, self.window = grid, dim, heads, window
        # The rule's one clean column: a frame sees itself and the window - 1 frames before it.
        self.table = rule("block_causal", window=window)
        self.place = nn.Parameter(torch.randn(grid[0] * grid[1], dim) * 0.02)
        self.layers = nn.ModuleList(CausalLayer(dim, heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.RMSNorm(dim, eps=1e-6)

    def forward(
        self, x: Float[Tensor, "batch frames tokens dim"]
    ) -> Float[Tensor, "batch frames tokens dim"]:
        """Run all frames of a clip at once, under the mask.

        Args:
            x: Embedded tokens in raster order.
        """
        count = x.shape[1]
        layout = _clip_layout(count, *self.grid).to(x.device)
        lowered = lower(self.table, layout, layout)
        tokens = rearrange(x + self.place, "b f n d -> b (f n) d")
        tokens = self._run(tokens, layout, lowered, None)
        return rearrange(tokens, "b (f n) d -> b f n d", f=count)

    def step(
        self, x: Float[Tensor, "batch tokens dim"], features: dict[str, Tensor]
    ) -> tuple[Float[Tensor, "batch tokens dim"], dict[str, Tensor]]:
        """Run the next frame of a stream.

        Args:
            x: Embedded tokens of one frame.
            features: What the step before returned; empty at the start.

        Returns:
            The frame's tokens, and what the next step needs: a snapshot of the cache, and the
            number of the next frame.
        """
        cache = self.new_cache(len(x), x.dtype, x.device)
        number = 0
        if features:
            number = int(features[_NUMBER][0])
            cache.restore({name: kept for name, kept in features.items() if name != _NUMBER})
        layout = _frame_layout(number, *self.grid).to(x.device)
        view = cache.view(layout, keep=torch.arange(layout.num_tokens))
        x = self._run(x + self.place, layout, lower(self.table, layout, view.layout), view)
        cache.write(view)
        cache.commit()
        cache.evict(window=self.window, next_block=number + 1)
        following = torch.full((len(x),), number + 1)
        return x, cache.snapshot() | {_NUMBER: following}

    def new_cache(self, batch: int, dtype: torch.dtype, device: torch.device) -> KVCache:
        """Allocate the cache of a stream: the window, the frame at hand included."""
        return KVCache(
            num_layers=len(self.layers),
            batch=batch,
            capacity=self.window * len(self.place),
            num_kv_heads=self.heads,
            head_dim=self.dim // self.heads,
            num_axes=3,
            dtype=dtype,
            device=device,
            rotated=True,
        )

    def _run(self, x: Tensor, layout: Layout, lowered: Lowered, view: CacheView | None) -> Tensor:
        cos, sin = rope_angles(layout.position, self.dim // self.heads, ROPE_THETA)
        angles = (cos.to(x.dtype), sin.to(x.dtype))
        for index, layer in enumerate(self.layers):
            x = layer(x, index, angles, lowered, view)
        return self.norm(x)


@lru_cache(maxsize=16)
def _clip_layout(count: int, height: int, width: int) -> Layout:
    return lay_out_frames(count, height, width)


def _frame_layout(number: int, height: int, width: int) -> Layout:
    """Rows of frame `number` alone."""
    first = _clip_layout(1, height, width)
    shift = torch.tensor([number, 0, 0], device=first.device)
    return first.replace(
        block=number,
        order=first.order + number * first.num_tokens,
        source=first.source + number * first.num_tokens,
        position=first.position + shift,
    )
