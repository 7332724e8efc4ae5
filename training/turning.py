"""How far a view from above turns between two frames, found by fitting a rigid motion.

Where the picture turns with whoever is steered, the ground moves rigidly from frame to frame: a
rotation about the pivot, and a shift. Both are found on grey pictures, coarse to fine: every
rotation and shift of a grid is tried on a small picture, then robust Gauss-Newton steps go on from
the best one at half and at full size. It does not know models or actions.

Angles are degrees per pair of frames; above 0 means that the steered one turned to the right, so
that the ground turned to the left.
"""

import math

import torch
from einops import rearrange, reduce
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import DataError, check_range

PIVOT = (0.5, 0.8)
"""Where the steered one is, in shares of width and height, unless a world says otherwise."""
GREY = (0.299, 0.587, 0.114)
COARSE_SIDE = 16
MAX_ANGLE, ANGLE_STEP = 15.0, 3.0
"""Rotations tried on the small picture, in degrees; the fit goes on from there."""
MAX_SHIFT, NUM_SHIFTS = 1 / 6, 7
"""Shifts tried, in shares of the picture's side, and how many per axis."""
CAR_RADIUS = 0.09
"""Around the pivot nothing is compared: what is steered does not move with the ground."""
FIT_STEPS = 6
NOISE = 0.06
"""Grey difference (of 1) beyond which a pixel counts as something that does not fit."""
PAIRS_AT_ONCE = 64
LEAST_SHARE = 0.3
"""Part of the picture that must overlap for a motion to be tried."""


def turn_angles(
    before: UInt8[Tensor, "pairs height width 3"],
    after: UInt8[Tensor, "pairs height width 3"],
    pivot: tuple[float, float] = PIVOT,
) -> Float[Tensor, " pairs"]:
    """Find how far the view turned from the first to the second frame of every pair.

    Args:
        before: First frames, square.
        after: The frames that followed.
        pivot: x and y of what is steered, in shares of width and height.

    Returns:
        Degrees, above 0 to the right; float32. Every pair for itself, whatever its neighbours.

    Raises:
        DataError: Frames of different or other shapes.
        UsageError: A pivot outside the picture.
    """
    return rigid_fit(before, after, pivot)[:, 0]


def rigid_fit(
    before: UInt8[Tensor, "pairs height width 3"],
    after: UInt8[Tensor, "pairs height width 3"],
    pivot: tuple[float, float] = PIVOT,
) -> Float[Tensor, "pairs 3"]:
    """Find rotation and shift of every pair of frames.

    The fit is `after(p) = before(R(angle) p + shift)` with p counted from the pivot.

    Args:
        before: First frames, square.
        after: The frames that followed.
        pivot: x and y of what is steered, in shares of width and height.

    Returns:
        Degrees (above 0 = to the right), then x and y of the shift in pixels.

    Raises:
        DataError: Frames of different or other shapes.
        UsageError: A pivot outside the picture.
    """
    shape = before.shape
    if shape != after.shape or len(shape) != 4 or shape[1] != shape[2] or shape[3] != 3:
        raise DataError(
            f"pairs of frames are {list(shape)} and {list(after.shape)}; needed twice "
            "[pairs, side, side, 3]"
        )
    for name, value in zip("xy", pivot, strict=True):
        check_range(f"pivot {name}", value, 0.0, 1.0)
    parts = zip(before.split(PAIRS_AT_ONCE), after.split(PAIRS_AT_ONCE), strict=True)
    return torch.cat([_fit(_grey(one), _grey(two), pivot) for one, two in parts])


def _grey(frames: Tensor) -> Float[Tensor, "pairs side side"]:
    return torch.einsum("b h w c, c -> b h w", frames.float() / 255, torch.tensor(GREY))


def _fit(before: Tensor, after: Tensor, pivot: tuple[float, float]) -> Float[Tensor, "pairs 3"]:
    side = before.shape[-1]
    factor = max(1, side // COARSE_SIDE)
    motion = _best_of_grid(_shrunk(before, factor), _shrunk(after, factor), pivot)
    motion[:, 1:] *= factor
    for shrink in (2, 1) if side >= 2 * COARSE_SIDE else (1,):
        motion[:, 1:] /= shrink
        motion = _refined(_shrunk(before, shrink), _shrunk(after, shrink), motion, pivot)
        motion[:, 1:] *= shrink
    return torch.cat((torch.rad2deg(motion[:, :1]), motion[:, 1:]), 1)


def _shrunk(frames: Tensor, factor: int) -> Tensor:
    """Average squares of pixels, then blur, so that edges have a slope to follow."""
    height = frames.shape[1] // factor * factor
    small = reduce(
        frames[:, :height, :height], "b (h p) (w q) -> b 1 h w", "mean", p=factor, q=factor
    )
    line = torch.tensor([0.25, 0.5, 0.25])
    kernel = torch.outer(line, line)[None, None]
    return F.conv2d(F.pad(small, (1, 1, 1, 1), mode="replicate"), kernel)[:, 0]


def _points(side: int, pivot: tuple[float, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return pixel centres counted from the pivot [side^2, 2], the pivot [2], and who counts."""
    line = torch.arange(side) + 0.5
    centre = torch.tensor(pivot) * side
    place = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).flatten(0, 1) - centre
    return place, centre, place.norm(dim=-1) > CAR_RADIUS * side


def _moved(motion: Tensor, place: Tensor) -> Float[Tensor, "motions points 2"]:
    """Apply R(angle) p + shift."""
    cos, sin = motion[:, 0].cos()[:, None], motion[:, 0].sin()[:, None]
    x, y = place[:, 0], place[:, 1]
    turned = torch.stack((cos * x - sin * y, sin * x + cos * y), -1)
    return turned + motion[:, None, 1:]


def _best_of_grid(
    before: Tensor, after: Tensor, pivot: tuple[float, float]
) -> Float[Tensor, "pairs 3"]:
    """Try every rotation and shift; return the best (radians, pixels) of every pair."""
    side = before.shape[-1]
    angles = torch.arange(-MAX_ANGLE, MAX_ANGLE + ANGLE_STEP / 2, ANGLE_STEP).deg2rad()
    shifts = torch.linspace(-MAX_SHIFT, MAX_SHIFT, NUM_SHIFTS) * side
    motions = torch.cartesian_prod(angles, shifts, shifts)
    place, centre, counts = _points(side, pivot)
    at = (_moved(motions, place) + centre) / side * 2 - 1
    inside = (at.abs() <= 1).all(-1) & counts
    # All pairs share the places that are looked at, so pairs are the channels here.
    seen = F.grid_sample(before[None], at[None], align_corners=False, padding_mode="border")[0]
    error = (seen - after.flatten(1)[:, None]).abs().clamp_max(4 * NOISE)
    number = inside.sum(-1)
    cost = (error * inside).sum(-1) / number.clamp_min(1)
    cost[:, number < LEAST_SHARE * side**2] = math.inf
    return motions[cost.argmin(1)]


def _refined(
    before: Tensor, after: Tensor, motion: Tensor, pivot: tuple[float, float]
) -> Float[Tensor, "pairs 3"]:
    """Go on from a motion by robust Gauss-Newton steps; the best one on the way is kept."""
    side = before.shape[-1]
    place, centre, counts = _points(side, pivot)
    padded = F.pad(before[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    slope_x = (padded[:, 1:-1, 2:] - padded[:, 1:-1, :-2]) / 2
    slope_y = (padded[:, 2:, 1:-1] - padded[:, :-2, 1:-1]) / 2
    maps, target = torch.stack((before, slope_x, slope_y), 1), after.flatten(1)
    best, least = motion, torch.full((len(motion),), math.inf)
    for step in range(FIT_STEPS + 1):
        moved = _moved(motion, place)
        at = (moved + centre) / side * 2 - 1
        inside = (at.abs() <= 1).all(-1) & counts
        seen = F.grid_sample(maps, at[:, None], align_corners=False, padding_mode="border")[:, :, 0]
        error = seen[:, 0] - target
        weight = inside / (1 + (error / NOISE).square()).square()
        cost = (inside * (1 - 1 / (1 + (error / NOISE).square()))).sum(-1)
        cost = cost / inside.sum(-1).clamp_min(1)
        cost[inside.sum(-1) < LEAST_SHARE * side**2] = math.inf
        better = cost < least
        best, least = torch.where(better[:, None], motion, best), torch.where(better, cost, least)
        if step < FIT_STEPS:
            motion = motion - _step(moved - motion[:, None, 1:], seen[:, 1:], error, weight, side)
    return best


def _step(
    turned: Tensor, slope: Tensor, error: Tensor, weight: Tensor, side: int
) -> Float[Tensor, "pairs 3"]:
    """Solve the normal equations of one Gauss-Newton step."""
    # d(R p)/d(angle) = (-y, x) of the turned point; angles count in pixels at half a side.
    arm = side / 2
    by_angle = (slope[:, 1] * turned[..., 0] - slope[:, 0] * turned[..., 1]) / arm
    slopes = torch.stack((by_angle, slope[:, 0], slope[:, 1]), -1)
    weighted = slopes * weight[..., None]
    square = rearrange(weighted, "b p i -> b i p") @ slopes
    # A bare road says nothing about the way along it: without damping the fit would run away.
    ridge = 1e-2 * square.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-6)
    square = square + ridge[:, None, None] * torch.eye(3)
    change = torch.linalg.solve(square, (weighted * error[..., None]).sum(1))
    change = change.clamp(-2.0, 2.0)
    return torch.cat((change[:, :1] / arm, change[:, 1:]), 1)
