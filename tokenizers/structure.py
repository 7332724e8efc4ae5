"""Structure maps: what a frame looks like without its colours, for models that are guided by it.

A map has one number in [0, 1] per pixel: brightness, or where edges are. Models are told it per
token of a latent frame, averaged over a few cells of the token. A map from elsewhere (depth, a
sketch) takes the same way in. It knows neither models nor data sets.

Source: Make-Your-Video (arXiv:2306.00943), whose structure is a depth map. Differs: plain functions
of the pixels, no depth network.
"""

from typing import Any

import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import UsageError, check_one_of

KINDS = ("luma", "edges")
_LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R BT.601)."""


def structure_map(
    kind: str, pixels: Float[Tensor, "batch 3 frames height width"]
) -> Float[Tensor, "batch frames height width"]:
    """Compute the map of every frame.

    Args:
        kind: "luma": brightness; "edges": length of the brightness's gradient by the Sobel
            operator, where a sharp border between black and white is 1.
        pixels: In [-1, 1]; what lies outside is clipped.

    Returns:
        Numbers in [0, 1].

    Raises:
        UsageError: another kind.
    """
    check_one_of("condition.structure", kind, KINDS)
    weights = torch.tensor(_LUMA, device=pixels.device, dtype=pixels.dtype)
    luma = torch.einsum("bcfhw,c->bfhw", (pixels.clamp(-1, 1) + 1) / 2, weights)
    if kind == "luma":
        return luma
    ramp = torch.tensor([-1.0, 0.0, 1.0], device=luma.device, dtype=luma.dtype)
    smooth = torch.tensor([1.0, 2.0, 1.0], device=luma.device, dtype=luma.dtype)
    across = smooth[:, None] * ramp[None, :] / 4
    kernels = torch.stack((across, across.t()))[:, None]
    flat = rearrange(luma, "b f h w -> (b f) 1 h w")
    slope = F.conv2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), kernels)
    steepness = slope.square().sum(1).sqrt().clamp_max(1)
    return rearrange(steepness, "(b f) h w -> b f h w", b=len(luma))


def structure_tokens(
    maps: Float[Tensor, "batch frames height width"], tokenizer: Any, size: int
) -> Float[Tensor, "batch latents cells numbers"]:
    """Cut maps into what every token of every latent frame is told.

    Args:
        maps: Numbers in [0, 1], at any size.
        tokenizer: The `VideoTokenizer` of the model; frames at the end that fill no latent frame
            are left out.
        size: Cells along a side of a token.

    Returns:
        size * size means per token in raster order, and over the pixel frames of a latent frame,
        brought to [-1, 1].

    Raises:
        UsageError: too few frames for a latent frame.
    """
    height, width = tokenizer.grid
    first, step = tokenizer.first_frames, tokenizer.step_frames
    if maps.shape[1] < first:
        raise UsageError(f"structure has {maps.shape[1]} frames; this model needs at least {first}")
    cells = F.adaptive_avg_pool2d(maps, (height * size, width * size))
    numbers = rearrange(
        cells, "b f (h r) (w c) -> b f (h w) (r c)", h=height, w=width, r=size, c=size
    )
    later = numbers[:, first : first + (maps.shape[1] - first) // step * step]
    head = reduce(numbers[:, :first], "b (l s) n k -> b l n k", "mean", l=tokenizer.first_latents)
    tail = reduce(later, "b (l s) n k -> b l n k", "mean", s=max(step // tokenizer.step_latents, 1))
    return torch.cat((head, tail), 1) * 2 - 1
