"""Where made frames meet given ones: poses that flow into each other, paths that arrive.

What a model makes does not begin exactly where given frames end, nor move as they do. Made frames
at a border are moved to where the given ones were heading, as fast as these were, and what that
took is let go over a few frames (known as inertialization in animation); and a made piece between
two given ones is bent until it ends where the second begins.

It does not know models. Features are those of `features.py`.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .features import Start, advance

REACH = 10
"""Frames over which an error at a border is let go: half a second at 20 fps."""
ROOT = 3
"""First features, the root's turn and way to the next frame: paces, not places."""


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


class Border(NamedTuple):
    """What the made frames at a border lack, counted away from it.

    Attributes:
        error: What the first made frame should be, less what it is.
        pace: How much more each frame should differ from the one before it than it does.
    """

    error: Float[Tensor, " features"]
    pace: Float[Tensor, " features"]


def border(given: Float[Tensor, "given features"], made: Float[Tensor, "made features"]) -> Border:
    """Compare where given frames are heading with where made ones begin.

    Both count away from the given ones; turn them round where the made frames come first. The pose
    should go on at the pace of the last two given frames, the root's turn and way as they were.

    Args:
        given: At least the last frame; of more than one, the last two count.
        made: At least the first frame.
    """
    heading, begins = _pace(given[-2:]), _pace(made[:2])
    error = given[-1] + heading - made[0]
    pace = heading - begins if min(len(given), len(made)) > 1 else torch.zeros_like(error)
    error[:ROOT] = given[-1, :ROOT] - made[0, :ROOT]
    pace[:ROOT] = 0
    return Border(error, pace)


def _pace(rows: Float[Tensor, "rows features"]) -> Float[Tensor, " features"]:
    return rows[-1] - rows[0]


def take_out(
    features: Float[Tensor, "frames features"],
    lacking: Border,
    first: int = 0,
    reach: int = REACH,
) -> Float[Tensor, "frames features"]:
    """Add what a border needs to frames behind it: all of it at first, nothing after `reach`.

    With e the error, p the pace and w a weight that falls from 1 to 0 over `reach` frames, frame t
    gets w(t) (e + t p), so that place and pace agree at the border; turn and way of the root are
    paces themselves and have p = 0.

    Args:
        features: The frames, counted away from the border.
        lacking: As `border` finds it.
        first: Frames between the border and `features`.
        reach: Frames until nothing is added.

    Source: inertialization (Bollo, "Inertialization: high-performance animation transitions in
    'Gears of War'", GDC 2018); differs: raised cosines instead of its quintic.
    """
    time = torch.arange(first, first + len(features), dtype=torch.float64)[:, None]
    weight = fading(first, len(features), reach)[:, None]
    return features + weight * (lacking.error + time * lacking.pace)


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
