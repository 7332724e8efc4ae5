"""Image tokenizers without weights: colours of a fixed palette, and raw patches.

They make tests and tiny recipes runnable without training a tokenizer first.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from .base import check_codes, check_latents, check_pixels, join_patches, split_patches
from .untrained import PlainError

# Corners of the RGB cube: black, red, green, yellow, blue, magenta, cyan, white.
CUBE_CORNERS = tuple((255 * (i & 1), 255 * (i >> 1 & 1), 255 * (i >> 2)) for i in range(8))


def _cells(image_size: int, patch: int) -> int:
    if patch < 1 or image_size < patch or image_size % patch:
        nearest = max(patch, round(image_size / max(patch, 1)) * patch)
        raise ValueError(
            f"image_size is {image_size}; it must be a multiple of patch {patch}, nearest {nearest}"
        )
    return image_size // patch


class PaletteTokenizer(ModelMixin, ConfigMixin, PlainError):
    """One code per square cell: the palette colour nearest to the cell's mean colour."""

    value = "code"
    latent_channels = 0
    num_codebooks = 1

    @register_to_config
    def __init__(
        self,
        image_size: int = 16,
        patch: int = 2,
        colors: Sequence[Sequence[int]] = CUBE_CORNERS,
    ):
        """Store the palette.

        Args:
            image_size: Side of the image in pixels.
            patch: Side of a cell in pixels.
            colors: RGB colours in 0..255; their number is the codebook size.

        Raises:
            ValueError: Sizes do not fit, fewer than 2 colours, or a colour outside 0..255.
        """
        super().__init__()
        side = _cells(image_size, patch)
        if len(colors) < 2:
            raise ValueError(f"colors has {len(colors)} entries; it needs at least 2")
        if any(len(c) != 3 or min(c) < 0 or max(c) > 255 for c in colors):
            raise ValueError("colors must be triples of numbers in 0..255")
        self.image_size = image_size
        self.grid = (side, side)
        self.codebook_size = len(colors)
        self.register_buffer("palette", torch.tensor(colors, dtype=torch.float32) / 127.5 - 1)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    def encode(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Int[Tensor, "batch tokens 1"]:
        """Name the palette colour nearest to each cell's mean; ties go to the lower code.

        Raises:
            ValueError: The image has another size.
        """
        check_pixels(pixels, self.image_size)
        means = F.avg_pool2d(pixels.float(), self.image_size // self.grid[0])
        means = rearrange(means, "b c h w -> b (h w) 1 c")
        distance = (means - self.palette.float()).square().sum(dim=-1)
        return distance.argmin(dim=-1, keepdim=True)

    def decode(
        self, values: Int[Tensor, "batch tokens 1"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Paint every cell in its colour.

        Raises:
            ValueError: Codes of another shape or outside the palette.
        """
        check_codes(values, self.num_tokens, 1, self.codebook_size)
        size = self.image_size // self.grid[0]
        return repeat(
            self.palette[values[..., 0]],
            "b (h w) c -> b c (h p) (w q)",
            h=self.grid[0],
            p=size,
            q=size,
        )


class PatchTokenizer(ModelMixin, ConfigMixin, PlainError):
    """One latent per square patch: its raw pixels, shifted and scaled by constants."""

    value = "latent"
    num_codebooks = 0
    codebook_size = 0

    @register_to_config
    def __init__(self, image_size: int = 16, patch: int = 4, mean: float = 0.0, std: float = 1.0):
        """Store the constants.

        Args:
            image_size: Side of the image in pixels.
            patch: Side of a patch in pixels; a latent has 3 * patch^2 channels.
            mean: Mean pixel value of the data, in [-1, 1].
            std: Deviation of pixel values of the data, above 0.

        Raises:
            ValueError: Sizes do not fit, or `std` is not above 0.
        """
        super().__init__()
        side = _cells(image_size, patch)
        if not std > 0:
            raise ValueError(f"std is {std}; it must be above 0")
        self.image_size = image_size
        self.grid = (side, side)
        self.latent_channels = 3 * patch**2
        self.register_buffer("latent_mean", torch.tensor([mean]))
        self.register_buffer("latent_std", torch.tensor([std]))

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    def encode(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch tokens channels"]:
        """Cut pixels into standardised patches.

        Raises:
            ValueError: The image has another size.
        """
        check_pixels(pixels, self.image_size)
        patches = split_patches(pixels, self.config["patch"])
        return (patches - self.latent_mean) / self.latent_std

    def decode(
        self, values: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Join patches to pixels clamped to [-1, 1].

        Raises:
            ValueError: Latents of another shape.
        """
        check_latents(values, self.num_tokens, self.latent_channels)
        patches = values * self.latent_std + self.latent_mean
        return join_patches(patches, self.grid, self.config["patch"]).clamp(-1, 1)
