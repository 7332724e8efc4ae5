"""Image tokenizers for one CPU core: shallow networks on a coarse grid, decoded in about 1 ms.

Small world models show every frame as soon as it is drawn, so the decoder must cost next to
nothing: one convolution on the coarse grid, one or more at patch resolution, one to pixels.

It does not know how latents or codes are generated, nor that frames follow each other.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import FSQ

from .continuous import ContinuousTokenizer
from .discrete import DiscreteTokenizer
from .fsq import FSQTokenizer
from .sigma import SigmaVAETokenizer


class LightEncoder(nn.Module):
    """Pixels to a coarse grid: patches, convolutions, patches of those, one more convolution."""

    def __init__(self, patch: int, fold: int, width: int, depth: int, out_channels: int):
        """Build the encoder.

        Args:
            patch: Side of the patches cut at the door, in pixels.
            fold: Side, in patches, of a grid cell.
            width: Channels per patch.
            depth: Convolutions at patch resolution, at least 1.
            out_channels: Channels of a grid cell.
        """
        super().__init__()
        self.patch = patch
        self.fold = fold
        widths = [3 * patch**2] + [width] * depth
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.head = nn.Conv2d(fold**2 * width, out_channels, 3, padding=1)

    def forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch out grid_height grid_width"]:
        """Encode pixels in [-1, 1] into unbounded features."""
        features = F.pixel_unshuffle(pixels, self.patch)
        for layer in self.layers:
            features = F.silu(layer(features))
        return self.head(F.pixel_unshuffle(features, self.fold))


class LightDecoder(nn.Module):
    """A coarse grid to pixels; mirrors the encoder."""

    def __init__(self, patch: int, fold: int, width: int, depth: int, in_channels: int):
        """Build the decoder.

        Args:
            patch: Side of the patches the head paints, in pixels.
            fold: Side, in patches, of a grid cell.
            width: Channels per patch.
            depth: Convolutions at patch resolution, the head among them; at least 1.
            in_channels: Channels of a grid cell.
        """
        super().__init__()
        self.patch = patch
        self.fold = fold
        self.stem = nn.Conv2d(in_channels, fold**2 * width, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(depth - 1))
        self.head = nn.Conv2d(width, 3 * patch**2, 3, padding=1)

    def forward(
        self, features: Float[Tensor, "batch channels grid_height grid_width"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Decode features into pixels; about [-1, 1], not clamped."""
        features = F.silu(F.pixel_shuffle(self.stem(features), self.fold))
        for layer in self.layers:
            features = features + F.silu(layer(features))
        return F.pixel_shuffle(self.head(features), self.patch)


class LightTokenizer(ContinuousTokenizer):
    """Shallow autoencoder with standardised latents and the sigma bottleneck.

    Source: LatentLM (arXiv:2412.08635), section 3.2, for the bottleneck.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        stride: int = 16,
        patch: int = 4,
        width: int = 48,
        depth: int = 2,
        latent_channels: int = 32,
        noise_std: float = 0.5,
        regulariser_weight: float = 1e-3,
        absolute_weight: float = 1.0,
        square_weight: float = 2.0,
        edge_weight: float = 1.0,
    ):
        """Build the network.

        Args:
            image_size: Side of the image in pixels; a multiple of `stride`.
            stride: Side of a grid cell in pixels; a multiple of `patch`.
            patch: Side of a patch in pixels.
            width: Channels per patch.
            depth: Convolutions at patch resolution, at least 1.
            latent_channels: Floats per token.
            noise_std: Noise scale; the drawn scale has deviation `noise_std / 0.8`.
            regulariser_weight: Loss weight of the mean squared mean.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.

        Raises:
            ValueError: Sizes that do not fit together.
        """
        super().__init__()
        self.image_size = image_size
        self.latent_channels = latent_channels
        self.grid, fold = _check_light(image_size, stride, patch, depth)
        self.encoder: Any = LightEncoder(patch, fold, width, depth, latent_channels)
        self.decoder: Any = LightDecoder(patch, fold, width, depth, latent_channels)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    posterior_mean = SigmaVAETokenizer.posterior_mean
    posterior_sample = SigmaVAETokenizer.posterior_sample


class LightFSQTokenizer(DiscreteTokenizer):
    """Shallow autoencoder whose latent is quantised to groups of lattice points.

    Source: Finite Scalar Quantization (arXiv:2309.15505), section 3.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        stride: int = 16,
        patch: int = 4,
        width: int = 48,
        depth: int = 2,
        levels: Sequence[int] = (4, 4, 4),
        num_codebooks: int = 10,
        absolute_weight: float = 1.0,
        square_weight: float = 2.0,
        edge_weight: float = 1.0,
    ):
        """Build the network.

        Args:
            image_size: Side of the image in pixels; a multiple of `stride`.
            stride: Side of a grid cell in pixels; a multiple of `patch`.
            patch: Side of a patch in pixels.
            width: Channels per patch.
            depth: Convolutions at patch resolution, at least 1.
            levels: Lattice steps per axis, each at least 3; their product is the codebook size.
            num_codebooks: Codes per token.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.

        Raises:
            ValueError: Sizes that do not fit together, or fewer than 3 levels on an axis.
        """
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"levels is {list(levels)}; every axis needs at least 3 steps")
        self.image_size = image_size
        self.num_codebooks = num_codebooks
        self.codebook_size = math.prod(levels)
        channels = len(levels) * num_codebooks
        self.grid, fold = _check_light(image_size, stride, patch, depth)
        self.encoder: Any = LightEncoder(patch, fold, width, depth, channels)
        self.decoder: Any = LightDecoder(patch, fold, width, depth, channels)
        self.quantizer = FSQ(list(levels), num_codebooks=num_codebooks, keep_num_codebooks_dim=True)

    quantize = FSQTokenizer.quantize
    lookup = FSQTokenizer.lookup


def _check_light(
    image_size: int, stride: int, patch: int, depth: int
) -> tuple[tuple[int, int], int]:
    """Return the grid and the patches along a side of a cell."""
    if patch < 1 or stride < patch or stride % patch:
        nearest = max(patch, round(stride / max(patch, 1)) * patch)
        raise ValueError(
            f"stride is {stride}; it must be a multiple of patch {patch}, nearest {nearest}"
        )
    if image_size < stride or image_size % stride:
        nearest = max(stride, round(image_size / stride) * stride)
        raise ValueError(
            f"image_size is {image_size}; it must be a multiple of stride {stride}, "
            f"nearest {nearest}"
        )
    if depth < 1:
        raise ValueError(f"depth is {depth}; it must be at least 1")
    side = image_size // stride
    return (side, side), stride // patch
