"""Curves: pure functions from progress in [0, 1] to a fraction.

What it is: the mask-ratio curves of published decoders and the timestep shift of flow models.
What it does not know: token counts, schedulers, random numbers.
Invariants: every mask curve falls from 1 at progress 0 to 0 at progress 1; all arithmetic is
Python float64, because float32 pushes floor(n * cos(pi / 2)) to -1 at the last step.
"""

import math
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from .errors import check_one_of, check_range

Curve = Callable[[float], float]
Level = TypeVar("Level", float, Tensor)


def cosine(progress: float) -> float:
    """Fraction still masked, cos(pi/2 * progress), clamped at 0.

    Source: MaskGIT (arXiv:2202.04200), section 3.3.
    """
    return max(0.0, math.cos(math.pi / 2 * progress)) if progress < 1.0 else 0.0


def arccos(progress: float) -> float:
    """Fraction still masked: the arc cosine of progress over pi/2."""
    return math.acos(progress) / (math.pi / 2)


def linear(progress: float) -> float:
    """Fraction still masked, 1 - progress."""
    return 1.0 - progress


def square(progress: float) -> float:
    """Fraction still masked, 1 - progress^2."""
    return 1.0 - progress**2


def root(progress: float) -> float:
    """Fraction still masked, 1 - sqrt(progress)."""
    return 1.0 - math.sqrt(progress)


CURVES: dict[str, Curve] = {
    "cosine": cosine,
    "arccos": arccos,
    "linear": linear,
    "square": square,
    "root": root,
}


def curve(name: str) -> Curve:
    """Look a curve up by name.

    Raises:
        UsageError: Unknown name; the message suggests the closest.
    """
    check_one_of("curve", name, tuple(CURVES))
    return CURVES[name]


def shift_level(level: Level, shift: float = 1.0) -> Level:
    """Move a noise level towards noise: a * s / (1 + (a - 1) * s).

    Args:
        level: s in [0, 1], 1 = noise; a number or a tensor.
        shift: a > 0; 1 changes nothing, 3 spends more steps at high noise. 0 and 1 stay fixed.

    Source: Stable Diffusion 3 (arXiv:2403.03206), eq. 23.

    Example:
        >>> shift_level(0.5, 3.0)
        0.75
    """
    check_range("timestep shift", shift, 0.0, open_low=True)
    return shift * level / (1.0 + (shift - 1.0) * level)


def streaming_times(num_steps: int) -> list[float]:
    """Decoder times of D-AR's eight-group schedule, 0 = noise: t / (t + 2 (1 - t)).

    Args:
        num_steps: Number of decoder steps N; t runs over i / N.

    Source: D-AR (showlab/D-AR), sampling times of the diffusion tokenizer's decoder.

    Example:
        >>> [round(t, 4) for t in streaming_times(8)]
        [0.0, 0.0667, 0.1429, 0.2308, 0.3333, 0.4545, 0.6, 0.7778]
    """
    # The same map as `shift_level` with a = 1/2, since t / (2 - t) = .5 t / (1 - .5 t).
    return [shift_level(i / num_steps, 0.5) for i in range(num_steps)]
