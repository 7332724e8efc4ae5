"""Numbers about frames: how near they are to others, how sharp, how much they move.

Frames are uint8 pictures here, as people see them. Invariant: every statistic is one number per
frame; means and ratios of them are taken elsewhere, over stated sets of frames.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .clip_run import frame_psnr
from .clips import tokenizer_input

MOST_DB = 60.0
"""What a frame that is matched exactly counts: else one would decide the mean."""


def byte_psnr(
    frames: UInt8[Tensor, "items frames height width 3"],
    target: UInt8[Tensor, "items frames height width 3"],
) -> Float[Tensor, "items frames"]:
    """Measure the PSNR of every frame in dB, for a peak of 255, at most 60.

    Args:
        frames: Frames.
        target: What they should be; a single frame stands for all.
    """
    pixels, wanted = tokenizer_input(frames), tokenizer_input(target.expand_as(frames))
    return frame_psnr(pixels, wanted).clamp_max(MOST_DB)


def sharpness(
    frames: UInt8[Tensor, "items frames height width 3"],
) -> Float[Tensor, "items frames"]:
    """Measure edges: the mean absolute difference of neighbouring pixels, in grey levels.

    Blur lowers it, noise raises it.
    """
    values = frames.float()
    down, right = values.diff(dim=2).abs(), values.diff(dim=3).abs()
    return down.mean(dim=(2, 3, 4)) + right.mean(dim=(2, 3, 4))


def motion(
    frames: UInt8[Tensor, "items frames height width 3"],
    before: UInt8[Tensor, "items 1 height width 3"],
) -> Float[Tensor, "items frames"]:
    """Measure change: the mean absolute difference to the frame before, in grey levels.

    Args:
        frames: Frames in order.
        before: The frame before the first one.
    """
    return torch.cat((before, frames), 1).float().diff(dim=1).abs().mean(dim=(2, 3, 4))


def contrast(
    frames: UInt8[Tensor, "items frames height width 3"],
) -> Float[Tensor, "items frames"]:
    """Measure the standard deviation over the pixels of a frame, in grey levels."""
    return frames.float().std(dim=(2, 3), correction=0).mean(dim=-1)
