"""What every image tokenizer promises, and the patch and checking helpers they share.

A tokenizer turns pixels into one value per grid cell and back: integer codes (`value` "code",
Int[batch tokens codebooks]) or standardised continuous latents (`value` "latent",
Float[batch tokens channels]). Tokens are in raster order; layouts reorder them, tokenizers do not.

It does not know prompts, masks or schedules.
"""

from typing import Literal, Protocol, runtime_checkable

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Value = Literal["code", "latent"]


@runtime_checkable
class ImageTokenizer(Protocol):
    """Pixels to tokens and back.

    Attributes:
        value: "code" (integers) or "latent" (floats with mean 0 and deviation 1).
        image_size: Side of the square image, in pixels.
        grid: Token rows and columns.
        num_codebooks: Codes per token; 0 for latents.
        codebook_size: Values of one code, 0..codebook_size-1; 0 for latents.
        latent_channels: Floats per token; 0 for codes.
    """

    value: Value
    image_size: int
    grid: tuple[int, int]
    num_codebooks: int
    codebook_size: int
    latent_channels: int

    def encode(self, pixels: Tensor) -> Tensor:
        """Turn pixels in [-1, 1] into codes or standardised latents."""
        ...

    def decode(self, values: Tensor) -> Tensor:
        """Turn codes or standardised latents into pixels in [-1, 1]."""
        ...

    def loss(
        self, pixels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the scalar training loss and named metrics."""
        ...


def split_patches(
    pixels: Float[Tensor, "batch channels height width"], patch: int
) -> Float[Tensor, "batch tokens features"]:
    """Cut pixels into square patches in raster order; features run (channel, row, column).

    Args:
        pixels: Any value range; both sides divisible by `patch`.
        patch: Side of a patch in pixels.

    Raises:
        ValueError: A side is not a multiple of `patch`.
    """
    height, width = pixels.shape[-2:]
    if height % patch or width % patch:
        nearest = [max(patch, round(side / patch) * patch) for side in (height, width)]
        raise ValueError(
            f"image of {height}x{width} pixels does not split into patches of {patch}; "
            f"nearest size {nearest[0]}x{nearest[1]}"
        )
    return rearrange(pixels, "b c (h p) (w q) -> b (h w) (c p q)", p=patch, q=patch)


def join_patches(
    patches: Float[Tensor, "batch tokens features"], grid: tuple[int, int], patch: int
) -> Float[Tensor, "batch channels height width"]:
    """Undo `split_patches`.

    Args:
        patches: Features (channel, row, column) for every patch in raster order.
        grid: Patch rows and columns.
        patch: Side of a patch in pixels.
    """
    return rearrange(
        patches, "b (h w) (c p q) -> b c (h p) (w q)", h=grid[0], w=grid[1], p=patch, q=patch
    )


def check_pixels(pixels: Tensor, image_size: int) -> None:
    """Refuse pixels of the wrong rank, channel count or size.

    Raises:
        ValueError: Not [batch, 3, image_size, image_size].
    """
    if pixels.ndim != 4 or tuple(pixels.shape[1:]) != (3, image_size, image_size):
        raise ValueError(
            f"pixels have shape {list(pixels.shape)}; this tokenizer takes "
            f"[batch, 3, {image_size}, {image_size}]"
        )


def check_codes(codes: Tensor, num_tokens: int, num_codebooks: int, codebook_size: int) -> None:
    """Refuse codes of the wrong shape or outside the codebook.

    Raises:
        ValueError: Not [batch, num_tokens, num_codebooks], or a code outside the codebook.
    """
    if codes.ndim != 3 or tuple(codes.shape[1:]) != (num_tokens, num_codebooks):
        raise ValueError(
            f"codes have shape {list(codes.shape)}; this tokenizer takes "
            f"[batch, {num_tokens}, {num_codebooks}]"
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= codebook_size):
        raise ValueError(
            f"codes span {int(codes.min())}..{int(codes.max())}; legal values are "
            f"0..{codebook_size - 1}"
        )


def check_latents(latents: Tensor, num_tokens: int, channels: int) -> None:
    """Refuse latents of the wrong shape.

    Raises:
        ValueError: Not [batch, num_tokens, channels].
    """
    if latents.ndim != 3 or tuple(latents.shape[1:]) != (num_tokens, channels):
        raise ValueError(
            f"latents have shape {list(latents.shape)}; this tokenizer takes "
            f"[batch, {num_tokens}, {channels}]"
        )


def psnr(
    pixels: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, " batch"]:
    """Measure the peak signal-to-noise ratio of every image, in dB, for a peak-to-peak range of 2.

    Args:
        pixels: Reconstruction, clamped to [-1, 1] here.
        target: Original in [-1, 1].
    """
    error = (pixels.clamp(-1, 1) - target).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error.clamp_min(1e-12))
