"""Classifier-free guidance: one formula, and how its scale moves during a decode.

What it is: the combination rule and the ramps published recipes use.
What it does not know: which tokens the unconditional branch drops, caches, heads.
Invariants: scale 1 returns the conditional branch bit for bit; every ramp starts no lower than 1
for scale >= 1 and reaches `scale` at progress 1.
"""

import math

from jaxtyping import Float
from torch import Tensor

from .errors import check_one_of, check_range

RAMPS = ("constant", "linear", "mar_linear", "cosine_power")


def guide(
    uncond: Float[Tensor, "*shape"], cond: Float[Tensor, "*shape"], scale: float | int
) -> Float[Tensor, "*shape"]:
    """Move a prediction away from the unconditional one: uncond + scale * (cond - uncond).

    Papers that write (1 + w) * cond - w * uncond mean scale = 1 + w.

    Args:
        uncond: Prediction without the condition.
        cond: Prediction with it.
        scale: 0 = unconditional, 1 = conditional, more = guided.

    Source: Ho & Salimans, classifier-free guidance (arXiv:2207.12598), eq. 6.
    """
    if scale == 1.0:
        return cond  # u + (c - u) is not bit-equal to c in floating point
    return uncond + scale * (cond - uncond)


def guidance_at(
    ramp: str, scale: float | int, progress: float | int, *, start: float = 1.0, power: float = 2.75
) -> float:
    """Look up the guidance scale at one moment of a decode.

    Args:
        ramp: "constant": scale. "linear" and "mar_linear": start + (scale - start) * progress; they
            differ in what the caller calls progress (row index, or share of tokens revealed).
            "cosine_power": start + (scale - start) * (1 - cos(pi * progress^power)) / 2.
        scale: Scale at progress 1.
        progress: In [0, 1].
        start: Scale at progress 0.
        power: Exponent of "cosine_power"; larger keeps guidance low for longer.

    Raises:
        UsageError: Unknown ramp, or progress outside [0, 1].

    Source: Muse (arXiv:2301.00704) linear; MAR (arXiv:2406.11838) over revealed tokens; RAR
        (arXiv:2411.00776) power-cosine.

    Example:
        >>> [round(guidance_at("cosine_power", 16.0, p, power=1.0), 3) for p in (0.0, 0.5, 1.0)]
        [1.0, 8.5, 16.0]
    """
    check_one_of("guidance_ramp", ramp, RAMPS)
    check_range("guidance progress", progress, 0.0, 1.0)
    if ramp == "constant":
        return scale
    share = progress
    if ramp == "cosine_power":
        share = (1.0 - math.cos(math.pi * progress**power)) / 2.0
    return start + (scale - start) * share
