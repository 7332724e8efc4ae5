"""Rotations in the forms motion data uses, batched and differentiable.

Forms: quaternions (w, x, y, z) of length 1; matrices that turn column vectors, v' = R v; the 6-D
form, which is the first column of the matrix followed by its second (HumanML3D's; some others
store the first two rows instead); Euler angles in degrees of any axis order. An order is read as
intrinsic and left to right: "ZXY" means R = Rz Rx Ry, as BVH channels do.

What it does not know: skeletons, clips, files.

Invariants: every function works on any leading axes, broadcast against each other, and keeps
dtype and device; q and -q are the same rotation, and functions that return a quaternion say
nothing about the sign unless told.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UsageError, describe, nearest

Quaternions = Float[Tensor, "*#batch 4"]
Vectors = Float[Tensor, "*#batch 3"]
Matrices = Float[Tensor, "*#batch 3 3"]

EULER_ORDERS = (
    *("XYZ", "XZY", "YXZ", "YZX", "ZXY", "ZYX"),
    *("XYX", "XZX", "YXY", "YZY", "ZXZ", "ZYZ"),
)


def unit(vectors: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Scale to length 1; a vector of length 0 stays 0."""
    tiny = torch.finfo(vectors.dtype).tiny
    return vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True).clamp(min=tiny)


def identity(*batch: int, like: Tensor) -> Quaternions:
    """Return rotations that turn nothing, with the dtype and device of `like`."""
    return torch.eye(4, dtype=like.dtype, device=like.device)[0].expand(*batch, 4)


def multiply(left: Quaternions, right: Quaternions) -> Quaternions:
    """Compose: the result turns by `right` first and then by `left`."""
    w, v = left[..., :1], left[..., 1:]
    other_w, other_v = right[..., :1], right[..., 1:]
    if v.ndim != other_v.ndim:  # of axes of other sizes the cross product takes care itself
        v, other_v = torch.broadcast_tensors(v, other_v)
    real = w * other_w - (v * other_v).sum(-1, keepdim=True)
    return torch.cat([real, w * other_v + other_w * v + torch.linalg.cross(v, other_v)], dim=-1)


def inverse(rotations: Quaternions) -> Quaternions:
    """Turn back: the conjugate, which is the inverse of a unit quaternion."""
    return torch.cat([rotations[..., :1], -rotations[..., 1:]], dim=-1)


def rotate(rotations: Quaternions, vectors: Vectors) -> Vectors:
    """Turn vectors."""
    v = rotations[..., 1:]
    if v.ndim != vectors.ndim:
        v, vectors = torch.broadcast_tensors(v, vectors)
    twice = 2 * torch.linalg.cross(v, vectors)
    return vectors + rotations[..., :1] * twice + torch.linalg.cross(v, twice)


def about_axis(axis: str, angle: Float[Tensor, "*#batch"]) -> Quaternions:
    """Build rotations about one of the coordinate axes.

    Args:
        axis: "X", "Y" or "Z".
        angle: Radians, counterclockwise when the axis points at the viewer.
    """
    zero = torch.zeros_like(angle)
    parts = [torch.cos(angle / 2), zero, zero, zero]
    parts[1 + "XYZ".index(axis)] = torch.sin(angle / 2)
    return torch.stack(parts, dim=-1)


def angle_of(rotations: Quaternions) -> Float[Tensor, "*#batch"]:
    """Return how far each rotation turns, in radians in [0, pi]."""
    return 2 * torch.atan2(rotations[..., 1:].norm(dim=-1), rotations[..., 0].abs())


def between(source: Vectors, target: Vectors) -> Quaternions:
    """Return the shortest rotation that turns `source` to the direction of `target`.

    Opposite directions have no single shortest rotation: half a turn about some axis at right
    angles is returned. A vector of length 0 gives the identity. Lengths do not matter.
    """
    source, target = torch.broadcast_tensors(unit(source), unit(target))
    has_both = ((source != 0).any(-1, keepdim=True)) & ((target != 0).any(-1, keepdim=True))
    middle = source + target
    is_opposite = middle.norm(dim=-1, keepdim=True) < 8 * torch.finfo(source.dtype).eps
    if bool(is_opposite.any()):
        # The coordinate axis the source leans to least gives a safe axis of half a turn.
        least = torch.eye(3, dtype=source.dtype, device=source.device)[source.abs().argmin(-1)]
        side = unit(torch.linalg.cross(source, least))
        middle = torch.where(is_opposite, side, middle)
    middle = unit(middle)
    half = torch.cat(
        [(source * middle).sum(-1, keepdim=True), torch.linalg.cross(source, middle)], dim=-1
    )
    return torch.where(has_both, unit(half), identity(like=source))


def slerp(start: Quaternions, end: Quaternions, ratio: Float[Tensor, "*#batch"]) -> Quaternions:
    """Go from one rotation to another at constant angular speed, the shorter way round.

    Args:
        start: Rotation at ratio 0.
        end: Rotation at ratio 1.
        ratio: Where between the two, usually in [0, 1]; broadcasts against the rotations.
    """
    step = multiply(inverse(start), end)
    step = torch.where(step[..., :1] < 0, -step, step)
    axis = step[..., 1:]
    sine = axis.norm(dim=-1)
    half = torch.atan2(sine, step[..., 0]) * ratio
    tiny = torch.finfo(sine.dtype).tiny
    turned = torch.sin(half)[..., None] * axis / sine.clamp(min=tiny)[..., None]
    return unit(multiply(start, torch.cat([torch.cos(half)[..., None], turned], dim=-1)))


def yaw(rotations: Quaternions) -> Float[Tensor, "*#batch"]:
    """Return the heading, in radians in [-pi, pi]: where the turned +Z axis points over the floor.

    Heading h means the direction (sin h, 0, cos h). When +Z points straight up or down, the
    heading is that of the rotation's twist about the vertical.
    """
    forward = rotate(rotations, torch.eye(3, dtype=rotations.dtype, device=rotations.device)[2])
    flat = forward[..., [0, 2]].norm(dim=-1)
    heading = torch.atan2(forward[..., 0], forward[..., 2])
    twist = 2 * torch.atan2(rotations[..., 2], rotations[..., 0])
    twist = torch.atan2(torch.sin(twist), torch.cos(twist))
    return torch.where(flat > 32 * torch.finfo(flat.dtype).eps, heading, twist)


def align_signs(rotations: Float[Tensor, "frames *batch 4"]) -> Float[Tensor, "frames *batch 4"]:
    """Choose between q and -q so that no frame is more than a right angle from the one before.

    The first frame gets w >= 0. Needed before anything that averages or filters quaternions.
    """
    products = (rotations[1:] * rotations[:-1]).sum(-1, keepdim=True)
    first = torch.where(rotations[:1, ..., :1] < 0, -1.0, 1.0).to(rotations)
    flips = torch.where(products < 0, -1.0, 1.0).to(rotations)
    return rotations * torch.cat([first, flips]).cumprod(dim=0)


def matrix_from_quaternion(rotations: Quaternions) -> Matrices:
    """Return the matrices; their columns are the turned coordinate axes."""
    axes = torch.eye(3, dtype=rotations.dtype, device=rotations.device)
    return rotate(rotations[..., None, :], axes).transpose(-1, -2)


def quaternion_from_matrix(matrices: Matrices) -> Quaternions:
    """Return unit quaternions with w >= 0, accurate for every rotation.

    Source: Shepperd, "Quaternion from rotation matrix" (1978): of four equivalent formulas, the
    one with the largest divisor.
    """
    diagonal = matrices.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.sum(-1, keepdim=True)
    squares = torch.cat([1 + trace, 1 + 2 * diagonal - trace], dim=-1)  # 4 w^2, 4 x^2, ...
    plus, minus = matrices + matrices.transpose(-1, -2), matrices - matrices.transpose(-1, -2)
    wx, wy, wz = minus[..., 2, 1], minus[..., 0, 2], minus[..., 1, 0]
    xy, xz, yz = plus[..., 1, 0], plus[..., 0, 2], plus[..., 2, 1]
    ww, xx, yy, zz = squares.unbind(-1)
    rows = [(ww, wx, wy, wz), (wx, xx, xy, xz), (wy, xy, yy, yz), (wz, xz, yz, zz)]
    products = torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)
    index = squares.argmax(-1)[..., None, None].expand(*squares.shape[:-1], 1, 4)
    best = unit(products.gather(-2, index)[..., 0, :])
    return torch.where(best[..., :1] < 0, -best, best)


def six_d_from_matrix(matrices: Matrices) -> Float[Tensor, "*batch 6"]:
    """Return the first column followed by the second.

    Source: Zhou et al., "On the Continuity of Rotation Representations" (arXiv:1812.07035).
    """
    return torch.cat([matrices[..., :, 0], matrices[..., :, 1]], dim=-1)


def matrix_from_six_d(values: Float[Tensor, "*batch 6"]) -> Matrices:
    """Return the nearest-by-Gram-Schmidt rotations of any six numbers.

    The first column keeps its direction; the second is made square to it. Six numbers that name
    no two directions (zeros, or parallel columns) give a rotation too, an arbitrary one.

    Source: Zhou et al. (arXiv:1812.07035), section 4.2.
    """
    axes = torch.eye(3, dtype=values.dtype, device=values.device)
    small = 32 * torch.finfo(values.dtype).eps
    first, second = values[..., :3], unit(values[..., 3:])
    is_zero = first.norm(dim=-1, keepdim=True) < torch.finfo(values.dtype).tiny
    first = unit(torch.where(is_zero, axes[0], first))
    rest = second - (first * second).sum(-1, keepdim=True) * first
    spare = axes[first.abs().argmin(-1)]
    spare = spare - (first * spare).sum(-1, keepdim=True) * first
    second = unit(torch.where(rest.norm(dim=-1, keepdim=True) < small, spare, rest))
    return torch.stack([first, second, torch.linalg.cross(first, second)], dim=-1)


def six_d_from_quaternion(rotations: Quaternions) -> Float[Tensor, "*batch 6"]:
    """Return the 6-D form of quaternions."""
    return six_d_from_matrix(matrix_from_quaternion(rotations))


def quaternion_from_six_d(values: Float[Tensor, "*batch 6"]) -> Quaternions:
    """Return unit quaternions with w >= 0 of any six numbers, see `matrix_from_six_d`."""
    return quaternion_from_matrix(matrix_from_six_d(values))


def check_order(order: str) -> None:
    """Require one of the twelve Euler orders.

    Raises:
        UsageError: Another text; the nearest order is named.
    """
    if order not in EULER_ORDERS:
        allowed = ", ".join(EULER_ORDERS)
        raise UsageError(describe("Euler order", order, allowed, nearest(order, EULER_ORDERS)))


def quaternion_from_euler(angles: Float[Tensor, "*batch axes"], order: str) -> Quaternions:
    """Compose turns about coordinate axes, intrinsic and left to right.

    Args:
        angles: Degrees, one per letter of `order`.
        order: Letters X, Y, Z, any number of them; none gives the identity.

    Raises:
        UsageError: Another letter, or another number of angles.
    """
    if set(order) - set("XYZ") or angles.shape[-1] != len(order):
        given = f"{order!r} with {angles.shape[-1]} angles"
        raise UsageError(describe("Euler order", given, "letters X, Y, Z and one angle for each"))
    result = identity(*angles.shape[:-1], like=angles)
    for axis, angle in zip(order, torch.deg2rad(angles).unbind(-1), strict=True):
        result = multiply(result, about_axis(axis, angle))
    return result


def euler_from_quaternion(rotations: Quaternions, order: str) -> Float[Tensor, "*#batch 3"]:
    """Return angles in degrees of any of the twelve orders.

    The middle angle is in [-90, 90] for three different axes and in [0, 180] for X-Y-X kinds,
    the others in [-180, 180]. At the lock (middle angle at an end) only the sum or difference of
    the others is defined: the last is then 0.

    Raises:
        UsageError: Not one of `EULER_ORDERS`.
    """
    check_order(order)
    m = matrix_from_quaternion(rotations)
    first, middle, last = ("XYZ".index(letter) for letter in order)
    sign = 1.0 if (first + 1) % 3 == middle else -1.0
    if first == last:
        other = 3 - first - middle
        down, across = m[..., first, middle], sign * m[..., first, other]
        b = torch.atan2(torch.hypot(down, across), m[..., first, first])
        a = torch.atan2(m[..., middle, first], -sign * m[..., other, first])
        c = torch.atan2(down, across)
        locked_a = torch.atan2(sign * m[..., other, middle], m[..., middle, middle])
        size = torch.hypot(down, across)
    else:
        size = torch.hypot(m[..., first, first], m[..., first, middle])
        b = torch.atan2(sign * m[..., first, last], size)
        a = torch.atan2(-sign * m[..., middle, last], m[..., last, last])
        c = torch.atan2(-sign * m[..., first, middle], m[..., first, first])
        locked_a = torch.atan2(sign * m[..., last, middle], m[..., middle, middle])
    is_locked = size < math.sqrt(torch.finfo(size.dtype).eps)
    a = torch.where(is_locked, locked_a, a)
    c = torch.where(is_locked, torch.zeros_like(c), c)
    return torch.rad2deg(torch.stack([a, b, c], dim=-1))
