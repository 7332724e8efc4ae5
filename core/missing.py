"""Values that nobody knows: a sensor that failed, an action that was not recorded, a clip's end.

An unknown value is code -1, or a latent that is not a number. Rows that hold one are masked rows in
every copy: the model is told that nothing is known there, which is not what a value of zero says.
It does not know models or data sets.
"""

import torch
from jaxtyping import Bool
from torch import Tensor


def unknown_slots(values: Tensor) -> Bool[Tensor, "items slots"]:
    """Tell of which slots nothing is known: code -1, or latents that are not a number.

    Args:
        values: Codes [items, slots, codebooks] or latents [items, slots, channels].
    """
    return (values.isnan() if values.is_floating_point() else values < 0).any(-1)


def split_unknown(values: Tensor) -> tuple[Tensor, Bool[Tensor, "items slots"]]:
    """Fill unknown slots with zeros, which rows marked as masked never show.

    Args:
        values: Codes [items, slots, codebooks] or latents [items, slots, channels].

    Returns:
        A copy without unknown values, and which slots they stood in.
    """
    unknown = unknown_slots(values)
    return torch.where(unknown[..., None], torch.zeros_like(values), values), unknown
