"""Residual convolutional encoder and decoder shared by the trained image tokenizers.

Pixels enter as patches (space to depth), pass residual convolutions at falling resolution and, on
the coarsest grid, attention over all cells. The decoder mirrors this and holds the larger share of
the weights; its last convolutions run at high resolution so that patches leave no seams.

Invariants: tensors are channels-last in memory; every residual branch starts at zero, so a fresh
network is a chain of linear resamplings. It does not know how features are quantised.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.numerics import item_stable_attention


class ResidualConv(nn.Module):
    """Two 3x3 convolutions after one group norm, added to the input."""

    def __init__(self, width: int):
        """Build the layer.

        Args:
            width: Channels in and out; a multiple of 8.
        """
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv_in = nn.Conv2d(width, width, 3, padding=1)
        self.conv_out = nn.Conv2d(width, width, 3, padding=1)
        start_at_zero(self.conv_out)

    def forward(
        self, features: Float[Tensor, "batch width height columns"]
    ) -> Float[Tensor, "batch width height columns"]:
        """Refine features of any range; same shape out."""
        return features + self.conv_out(F.silu(self.conv_in(F.silu(self.norm(features)))))


class GridAttention(nn.Module):
    """One pre-norm transformer layer over all cells of a small grid, with learned positions."""

    def __init__(self, width: int, num_cells: int, heads: int = 4, expansion: int = 2):
        """Build the layer.

        Args:
            width: Channels; a multiple of `heads`.
            num_cells: Cells of the grid.
            heads: Attention heads.
            expansion: Hidden width of the feed-forward part, in multiples of `width`.
        """
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.zeros(num_cells, width))
        self.norm_attention = nn.LayerNorm(width)
        self.to_qkv = nn.Linear(width, 3 * width, bias=False)
        self.to_out = nn.Linear(width, width)
        self.norm_feed = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, expansion * width)
        self.feed_out = nn.Linear(expansion * width, width)
        nn.init.normal_(self.position, std=0.02)
        start_at_zero(self.to_out)
        start_at_zero(self.feed_out)

    def forward(
        self, features: Float[Tensor, "batch width height columns"]
    ) -> Float[Tensor, "batch width height columns"]:
        """Mix all cells; same shape out."""
        height = features.shape[-2]
        tokens = rearrange(features, "b c h w -> b (h w) c")
        qkv = self.to_qkv(self.norm_attention(tokens + self.position))
        query, key, value = rearrange(qkv, "b n (s h d) -> s b h n d", s=3, h=self.heads)
        mixed = item_stable_attention(query, key, value)
        tokens = tokens + self.to_out(rearrange(mixed, "b h n d -> b n (h d)"))
        tokens = tokens + self.feed_out(F.silu(self.feed_in(self.norm_feed(tokens))))
        return rearrange(tokens, "b (h w) c -> b c h w", h=height)


class ConvEncoder(nn.Module):
    """Pixels to a grid of features: patches, then residual layers at each halved resolution."""

    def __init__(
        self,
        image_size: int,
        patch: int,
        widths: Sequence[int],
        depths: Sequence[int],
        out_channels: int,
    ):
        """Build the encoder.

        Args:
            image_size: Side of the image in pixels.
            patch: Side of the patches cut at the door, in pixels.
            widths: Channels from the finest to the coarsest resolution, each half the last.
            depths: Layers at each resolution.
            out_channels: Channels of a grid cell.
        """
        super().__init__()
        self.patch = patch
        side = image_size // patch // 2 ** (len(widths) - 1)
        self.stem = nn.Conv2d(3 * patch**2, widths[0], 3, padding=1)
        layers: list[nn.Module] = []
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            coarsest = level == len(widths) - 1
            for _ in range(depth):
                layers.append(GridAttention(width, side**2) if coarsest else ResidualConv(width))
            if not coarsest:
                layers.append(nn.Conv2d(width, widths[level + 1], 2, stride=2))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(8, widths[-1])
        self.head = nn.Conv2d(widths[-1], out_channels, 1)

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch out grid_height grid_width"]:
        """Encode pixels in [-1, 1] into unbounded features."""
        features = F.pixel_unshuffle(pixels, self.patch)
        features = features.contiguous(memory_format=torch.channels_last)
        return self.head(F.silu(self.norm(self.layers(self.stem(features)))))


class ConvDecoder(nn.Module):
    """A grid of features to pixels; mirrors the encoder and ends with convolutions on pixels."""

    def __init__(
        self,
        image_size: int,
        patch: int,
        widths: Sequence[int],
        depths: Sequence[int],
        in_channels: int,
        pixel_width: int = 16,
    ):
        """Build the decoder.

        Args:
            image_size: Side of the image in pixels.
            patch: Side of the patches the encoder cut at the door, in pixels; a power of two.
            widths: Channels from the finest to the coarsest resolution, as in the encoder.
            depths: Layers at each resolution, same order.
            in_channels: Channels of a grid cell.
            pixel_width: Channels of the last convolution's input, at full resolution.
        """
        super().__init__()
        side = image_size // patch // 2 ** (len(widths) - 1)
        self.stem = nn.Conv2d(in_channels, widths[-1], 1)
        layers: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            width, coarsest = widths[level], level == len(widths) - 1
            for _ in range(depths[level]):
                layers.append(GridAttention(width, side**2) if coarsest else ResidualConv(width))
            if level:
                layers.append(nn.ConvTranspose2d(width, widths[level - 1], 2, stride=2))
        self.layers = nn.Sequential(*layers)
        self.norm = nn.GroupNorm(8, widths[0])
        self.spread = nn.ModuleList()
        width = widths[0]
        for _ in range(patch.bit_length() - 1):
            finer = max(pixel_width, width // 2)
            self.spread.append(nn.Conv2d(width, 4 * finer, 1))
            self.spread.append(nn.Conv2d(finer, finer, 3, padding=1))
            width = finer
        self.head = nn.Conv2d(width, 3, 3, padding=1)

    def forward(
        self, features: Float[Tensor, "batch channels grid_height grid_width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Decode features into pixels; about [-1, 1], not clamped."""
        features = features.contiguous(memory_format=torch.channels_last)
        features = F.silu(self.norm(self.layers(self.stem(features))))
        for spread, smooth in zip(self.spread[::2], self.spread[1::2], strict=True):
            features = F.silu(F.pixel_shuffle(spread(features), 2))
            features = features + smooth(features)
        return self.head(features)


def start_at_zero(layer: nn.Module) -> None:
    """Set all parameters of a layer to 0, so that the branch it ends adds nothing at first."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
