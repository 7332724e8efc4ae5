"""Frames as users have them, uint8 [frames, height, width, 3], and pixels as tokenizers take them.

It knows no models.
"""

from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..core.errors import UsageError, describe


def to_clip(frames: NDArray[np.uint8]) -> Float[Tensor, "1 3 frames height width"]:
    """Turn frames into pixels in [-1, 1].

    Args:
        frames: uint8 [frames, height, width, 3].
    """
    pixels = torch.from_numpy(frames.astype(np.float32)) / 127.5 - 1
    return rearrange(pixels, "f h w c -> 1 c f h w")


def to_frames(pixels: Float[Tensor, "batch 3 frames height width"]) -> NDArray[np.uint8]:
    """Turn pixels in [-1, 1] (what lies outside is clipped) into uint8 [batch, frames, h, w, 3]."""
    last = rearrange(pixels.clamp(-1, 1), "b c f h w -> b f h w c")
    return ((last.float() + 1) * 127.5).round().byte().cpu().numpy()


def checked_frames(name: str, frames: Any) -> NDArray[np.uint8]:
    """Check a clip: RGB bytes, at least one frame.

    Args:
        name: How the message calls it.
        frames: uint8 [frames, height, width, 3], or a list of pictures of one size.

    Raises:
        UsageError: anything else.
    """
    if isinstance(frames, list | tuple) and frames:
        kinds = {type(frame).__name__ for frame in frames if not isinstance(frame, Image.Image)}
        sizes = {frame.size for frame in frames if isinstance(frame, Image.Image)}
        if kinds or len(sizes) > 1:
            got: list[Any] = sorted(kinds) or sorted(sizes)
            raise UsageError(describe(name, got, "pictures of one size"))
        frames = np.stack([np.asarray(frame.convert("RGB")) for frame in frames])
    frames = np.asarray(frames)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        legal = "uint8 (frames, height, width, 3) with at least one frame"
        raise UsageError(describe(name, f"{frames.dtype} {frames.shape}", legal))
    return frames


def fit_frames(frames: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """Resample frames to a model's size; frames of that size stay as they are.

    Args:
        frames: uint8 [frames, height, width, 3].
        size: Height and width.
    """
    height, width = size
    if frames.shape[1:3] == (height, width):
        return frames
    # One at a time: a long clip must not be held as pictures too.
    resized = np.empty((len(frames), height, width, 3), np.uint8)
    for number, frame in enumerate(frames):
        picture = Image.fromarray(frame).resize((width, height), Image.Resampling.LANCZOS)
        resized[number] = np.asarray(picture)
    return resized
