"""Rotary positions in any number of axes (RoPE, arXiv:2104.09864).

Attention then depends on differences of positions only, which is condition (2) of the equivalence
theorem: a cached key may be rotated at read, at write, or re-based, without changing a logit.
The channels of a head are split evenly among the axes; what does not divide stays un-rotated.
"""

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def rope_angles(
    position: Float[Tensor, "*batch tokens axes"], head_dim: int, theta: float = 100.0
) -> tuple[Float[Tensor, "*batch tokens half"], Float[Tensor, "*batch tokens half"]]:
    """Compute cosine and sine of the rotation angles.

    Angle of pair j on axis a: position[a] * theta^(-j / pairs), pairs = head_dim // (2 * axes).

    Args:
        position: Position ids, one per axis, in tokens; any float.
        head_dim: Channels of one head (even).
        theta: Base of the geometric frequencies; small grids want a small base.

    Returns:
        cos and sin, each over head_dim // 2 pairs; unused pairs have angle 0.

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim} must be even; try {head_dim + 1}")
    axes = position.shape[-1]
    pairs = head_dim // (2 * axes)
    step = torch.arange(pairs, dtype=torch.float64, device=position.device) / max(pairs, 1)
    frequency = theta**-step
    angles = rearrange(
        position.double()[..., None] * frequency, "... axes pairs -> ... (axes pairs)"
    )
    rest = head_dim // 2 - angles.shape[-1]
    angles = torch.nn.functional.pad(angles, (0, rest))
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"],
    angles: tuple[Tensor, Tensor],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Rotate the pairs (j, j + half) of every head by the given angles.

    (a, b) -> (a cos - b sin, a sin + b cos). Angles are [tokens, half] or [batch, tokens, half].
    """
    cos, sin = (part.to(x.dtype) for part in angles)
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (
            torch.addcmul(first * cos, second, sin, value=-1),
            torch.addcmul(second * cos, first, sin),
        ),
        dim=-1,
    )
