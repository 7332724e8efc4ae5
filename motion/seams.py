"""Where made frames meet given ones: poses that flow into each other, paths that arrive.

What a model makes does not begin exactly where given frames end. The made frame at the border is
moved to where the given ones were heading, and what that took is let go over a few frames (known as
inertialization in animation); and a made piece between two given ones is bent until it ends where
the second begins.

It does not know models. Features are those of `features.py`.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .features import Start, advance

REACH = 10
"""Frames over which an error at a border is let go: half a second at 20 fps."""


def fading(first: int, count: int, reach: int = REACH) -> Float[Tensor, " count"]:
    """Return weights that fall from 1 to 0 behind a border, flat at both ends.

    Args:
        first: Frames between the border and the first weight.
        count: How many weights.
        reach: Frames until they are 0.

    Example:
        >>> fading(0, 3, 2).tolist()
        [1.0, 0.5, 0.0]
    """
    place = torch.arange(first, first + count, dtype=torch.float64) / reach
    return 0.5 * (1 + torch.cos(math.pi * place.clamp(max=1.0)))


def take_out(
    features: Float[Tensor, "frames features"],
    error: Float[Tensor, " features"],
    first: int = 0,
    reach: int = REACH,
) -> Float[Tensor, "frames features"]:
    """Add what a border needs to frames behind it: all of it at first, nothing after `reach`.

    Turn and way of the root are left as they are: they are no pose.

    Args:
        features: The frames.
        error: What the first frame behind the border should be, less what it is.
        first: Frames between the border and `features`.
        reach: Frames until nothing is added.
    """
    wanted = error.to(torch.float64).clone()
    wanted[:3] = 0
    return features + fading(first, len(features), reach)[:, None] * wanted


def arriving(
    features: Float[Tensor, "frames features"], start: Start | None, goal: Start
) -> tuple[Float[Tensor, "frames features"], Start, Float[np.ndarray, "frames 3"]]:
    """Bend a piece so that the frame after its last stands where it should.

    Args:
        features: The piece.
        start: Where it begins; None = it may begin anywhere, and nothing is bent.
        goal: Where the next frame stands.

    Returns:
        The features with other turns, where they start, and the shift of every frame in metres
        that is still to be added to the joints.
    """
    count = len(features)
    if start is None:
        turned = advance(features, Start()).heading
        heading = goal.heading - turned
        reached = advance(features, Start(0.0, 0.0, heading))
        begin = Start(goal.x - reached.x, goal.z - reached.z, heading)
        return features, begin, np.zeros((count, 3), np.float32)
    ramp = torch.arange(count + 1, dtype=torch.float64) / count
    ramp = ramp**2 * (3 - 2 * ramp)  # begins and ends without a jerk
    missing = math.remainder(goal.heading - advance(features, start).heading, 2 * math.pi)
    bent = features.clone()
    bent[:, 0] -= missing * ramp.diff() / 2
    reached = advance(bent, start)
    way = np.array([goal.x - reached.x, 0.0, goal.z - reached.z])
    return bent, start, (ramp[:-1, None].numpy() * way).astype(np.float32)
