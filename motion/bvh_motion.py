"""BVH objects to motions and back.

A BVH joint turns what hangs on it; a `Motion` names a turn after the joint where the bone ends
(`skeleton.py`). So a BVH joint's turn becomes that of its children, End Sites included, and on the
way back bones that leave one joint but turn differently get a joint of length 0 of their own, named
"<joint>_pivot", which readers of BVH show right and `bvh_to_motion` takes out again.

It does not know files.

Invariants: joints survive Motion -> BVH -> Motion to the six decimals of the format; rotations do
too where bones keep their lengths.
"""

import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.errors import DataError, UsageError, check_range, describe
from ..core.messages import one_line
from .bvh import POSITIONS, ROTATIONS, Bvh, BvhJoint
from .clip import Motion, fk_error, motion_world_rotations
from .names import name_parts
from .rotations import (
    angle_of,
    check_order,
    euler_from_quaternion,
    identity,
    inverse,
    multiply,
    quaternion_from_euler,
    rotate,
)
from .skeleton import Skeleton, local_rotations

logger = logging.getLogger(__name__)

UNITS = {
    "metres": (0.6, 3.0, 1.0),
    "feet": (4.0, 8.0, 0.3048),
    "decimetres": (9.0, 20.0, 0.1),
    "CMU units": (20.0, 45.0, 0.0254 / 0.45),
    "inches": (45.0, 85.0, 0.0254),
    "centimetres": (85.0, 300.0, 0.01),
    "millimetres": (850.0, 3000.0, 0.001),
}
"""Name: heights of a resting body between which this unit is guessed, and metres per unit."""
PIVOT = "_pivot"
_SAME = 1e-4
"""Radians below which bones that leave one joint count as turning together."""
_STILL = 5e-5
"""Metres below which a bone's length counts as constant."""
_TIP = 0.35
"""Length of the End Site written behind a last joint, as a part of the bone before it."""


def guess_scale(bvh: Bvh) -> tuple[float, str]:
    """Guess metres per unit from how large the body is at rest; BVH itself has no unit.

    Returns:
        Metres per unit and the unit's name; centimetres, said to be assumed, where no unit gives
        a body of human size.
    """
    places: list[np.ndarray] = []
    for joint in bvh.joints:
        base = places[joint.parent] if joint.parent >= 0 else np.zeros(3)
        places.append(base + np.array(joint.offset) * (joint.parent >= 0))
    size = float(np.ptp(np.stack(places), axis=0).max())
    for name, (low, high, scale) in UNITS.items():
        if low <= size < high:
            return scale, name
    return 0.01, "centimetres (assumed)"


def bvh_to_motion(
    bvh: Bvh, scale: float | None = None, text: str = "", keep_ends: bool = True
) -> Motion:
    """Read places and rotations out of a BVH object.

    A joint's position channels stand for its OFFSET, which is what nearly all programs mean; where
    those of all joints but the root are 0 throughout, they are taken as additions to it.

    Args:
        bvh: The object.
        scale: Metres per unit; None guesses it from the body's size and logs the guess.
        text: What happens.
        keep_ends: Whether End Sites become joints, named "<joint>_end". Without them, the turn of
            a last joint is lost.

    Returns:
        The clip, joints in the order of the file (`clip.select_joints` gives another), at
        1 / frame time frames per second (whole numbers where the file's rounding allows). Bones
        that stretch keep their mean length in the skeleton; the joints are exact.

    Raises:
        UsageError: The scale is not above 0.
    """
    if scale is None:
        scale, unit = guess_scale(bvh)
        logger.info("BVH units taken as %s: %g metres per unit", unit, scale)
    check_range("scale", scale, 0, open_low=True)
    turns, shifts = _channels(bvh)
    nodes: list[Tensor] = []
    places: list[Tensor] = []
    for number, joint in enumerate(bvh.joints):
        if joint.parent < 0:
            nodes.append(turns[number])
            places.append(shifts[number])
        else:
            nodes.append(multiply(nodes[joint.parent], turns[number]))
            bone = rotate(nodes[joint.parent], shifts[number])
            places.append(places[joint.parent] + bone)
    kept = [n for n, joint in enumerate(bvh.joints) if keep_ends or not joint.is_end]
    kept = [n for n in kept if not _is_pivot(bvh, n)]
    world = torch.stack([nodes[max(bvh.joints[n].parent, 0)] for n in kept], dim=1)
    joints = torch.stack([places[n] for n in kept], dim=1) * scale
    offsets = [shift.mean(0).numpy() * scale for shift in shifts]
    offsets[0] = np.array(bvh.joints[0].offset) * scale
    skeleton = _skeleton(bvh, kept, offsets)
    local = local_rotations(skeleton, world)
    fps = _frames_per_second(bvh.frame_time)
    return Motion(joints.numpy(), name_parts(skeleton), fps, local.numpy(), text)


def _channels(bvh: Bvh) -> tuple[list[Tensor], list[Tensor]]:
    """Return each joint's own turn [frames, 4] and its place in its parent [frames, 3]."""
    values = torch.from_numpy(np.ascontiguousarray(bvh.values))
    moving = [
        values[:, column][:, [name in POSITIONS for name in joint.channels]]
        for joint, column in zip(bvh.joints[1:], bvh.columns()[1:], strict=True)
    ]
    is_added = all(not bool(part.any()) for part in moving)
    turns, shifts = [], []
    for number, (joint, column) in enumerate(zip(bvh.joints, bvh.columns(), strict=True)):
        own = values[:, column]
        order = "".join(name[0] for name in joint.channels if name in ROTATIONS)
        angles = own[:, [name in ROTATIONS for name in joint.channels]]
        turns.append(quaternion_from_euler(angles, order))
        shift = values.new_tensor(joint.offset).repeat(len(values), 1)
        for name, row in zip(joint.channels, own.T, strict=True):
            if name in POSITIONS and (number == 0 or not is_added):
                shift[:, "XYZ".index(name[0])] = row
        shifts.append(shift)
    return turns, shifts


def _is_pivot(bvh: Bvh, number: int) -> bool:
    joint = bvh.joints[number]
    still = not any(joint.offset) and not set(joint.channels) & set(POSITIONS)
    return joint.name.endswith(PIVOT) and joint.parent >= 0 and still


def _skeleton(bvh: Bvh, kept: list[int], offsets: list[np.ndarray]) -> Skeleton:
    """Build the skeleton of the kept joints; pivots have length 0, so offsets stay."""
    names: list[str] = []
    parents: list[int] = []
    taken = {joint.name for joint in bvh.joints}
    for number in kept:
        joint, parent = bvh.joints[number], bvh.joints[number].parent
        while parent >= 0 and parent not in kept:
            parent = bvh.joints[parent].parent
        name, tries = joint.name, 1
        while joint.is_end and (not name or name in taken):
            name = f"{bvh.joints[joint.parent].name}_end{tries if tries > 1 else ''}"
            tries += 1
        taken.add(name)
        names.append(name)
        parents.append(-1 if parent < 0 else kept.index(parent))
    rest = np.stack([offsets[number] for number in kept])
    ends = tuple(n for n, k in zip(names, kept, strict=True) if bvh.joints[k].is_end)
    return Skeleton(tuple(names), tuple(parents), rest, ends=ends)


def _frames_per_second(frame_time: float) -> float:
    """Return 1 / frame time, or the whole number its printed digits stand for."""
    fps = 1 / frame_time
    digits = f"{frame_time:.10f}".rstrip("0").split(".")[1]
    last = 0.5 * 10.0 ** -len(digits)
    is_near = abs(1 / max(round(fps), 1) - frame_time) <= last
    return float(round(fps)) if is_near and len(digits) > 2 else fps


@dataclass(frozen=True)
class _Node:
    """A joint of the file to be.

    Attributes:
        joint: As it is written.
        turn: [frames, 4], what it turns with, in the world.
        shift: [frames, 3], its place in its parent, or None where that stays as it is.
    """

    joint: BvhJoint
    turn: Tensor
    shift: Tensor | None


def motion_to_bvh(
    motion: Motion, order: str = "ZXY", scale: float = 0.01, stretch_mm: float = 1.0
) -> Bvh:
    """Write a clip as a BVH object.

    Args:
        motion: The clip, with rotations.
        order: Axis order of the rotation channels, one of the six with three different axes.
        scale: Metres per unit; 0.01 writes centimetres, which most programs expect.
        stretch_mm: If forward kinematics misses the joints by more millimetres than this, joints
            whose bones stretch get position channels; otherwise only the root has them.

    Returns:
        The object. A last joint that is no end gets an End Site that goes on in its bone's
        direction.

    Raises:
        DataError: The clip has no rotations, or a joint's name is no line of text.
        UsageError: The order or the scale is not legal.
    """
    check_order(order)
    if len(set(order)) < 3:
        raise UsageError(describe("rotation order", order, "three different axes", "ZXY"))
    check_range("scale", scale, 0, open_low=True)
    for name in motion.skeleton.names:
        if one_line(name) != name or name.strip() != name or set("{}") & set(name):
            raise DataError(f"joint name {name!r} cannot stand in a BVH file")
    may_stretch = fk_error(motion)[1] > stretch_mm
    nodes = _nodes(motion, _rotation_channels(order), may_stretch, scale)
    columns = []
    for node in nodes:
        parent = node.joint.parent
        if node.shift is not None:
            columns.append(node.shift / scale)
        if node.joint.channels:
            base = nodes[parent].turn if parent >= 0 else identity(like=node.turn)
            angles = euler_from_quaternion(multiply(inverse(base), node.turn), order)
            columns.append(torch.from_numpy(_continuous(angles.numpy())))
    joints = tuple(node.joint for node in nodes)
    return Bvh(joints, torch.cat(columns, dim=1).numpy(), 1 / motion.fps)


def _rotation_channels(order: str) -> tuple[str, ...]:
    return tuple(f"{letter}rotation" for letter in order)


def _nodes(
    motion: Motion, rotations: tuple[str, ...], may_stretch: bool, scale: float
) -> list[_Node]:
    """Lay the joints out in the order of a BVH file, pivots and End Sites added."""
    skeleton = motion.skeleton
    world = motion_world_rotations(motion)
    places, _ = motion.tensors()
    nodes: list[_Node] = []

    def add(name: str, parent: int, offset: np.ndarray, turn: Tensor, shift: Tensor | None,
            is_end: bool = False) -> int:  # fmt: skip
        x, y, z = (float(value) / scale for value in offset)
        moved = POSITIONS if shift is not None else ()
        channels = () if is_end else (*moved, *rotations)
        joint = BvhJoint("" if is_end else name, parent, (x, y, z), channels, is_end)
        nodes.append(_Node(joint, turn, shift))
        return len(nodes) - 1

    todo = [(0, -1)]
    while todo:  # depth first, as the file wants it
        joint, parent = todo.pop()
        name, offset, turn = skeleton.names[joint], skeleton.offsets[joint], world[:, joint]
        shift = places[:, 0] if joint == 0 else None
        if joint and may_stretch:
            bone = rotate(inverse(turn), places[:, joint] - places[:, skeleton.parents[joint]])
            is_still = bool(((bone - bone.new_tensor(offset)).norm(dim=-1) < _STILL).all())
            shift = None if is_still else bone
        if joint and float(angle_of(multiply(inverse(nodes[parent].turn), turn)).max()) > _SAME:
            pivot = f"{skeleton.names[skeleton.parents[joint]]}_{name}{PIVOT}"
            parent = add(pivot, parent, np.zeros(3), turn, None)
        if name in skeleton.ends and shift is None:
            add("", parent, offset, turn, None, is_end=True)
            continue
        children = skeleton.children(joint)
        own = world[:, children[0]] if children and joint else turn
        here = add(name, parent, offset, own, shift)
        todo += [(child, here) for child in reversed(children)]
        if not children:
            add("", here, offset * _TIP, own, None, is_end=True)
    return nodes


def _continuous(angles: np.ndarray) -> np.ndarray:
    """Choose, frame by frame, the writing of three Euler angles nearest to the frame before.

    (a, b, c) and (a + 180, 180 - b, c + 180) are one rotation, and so are full turns; jumping
    between them looks like spinning to programs that interpolate channels.
    """
    result = angles.copy()
    for frame in range(1, len(result)):
        before, own = result[frame - 1], angles[frame]
        other = np.array([own[0] + 180, 180 - own[1], own[2] + 180])
        near = [turn - 360 * np.round((turn - before) / 360) for turn in (own, other)]
        result[frame] = min(near, key=lambda turn: float(np.abs(turn - before).sum()))
    return result
