"""A motion from one body to another.

Every bone of the new body points where the old one's does, with the old one's twist; the way of
the root is scaled by the length of the legs. Nothing is solved for: feet may slide by as much as
the bodies' proportions differ, and hands that touched may no longer.

It does not know files.

Invariants: bones of the result have the new body's lengths, and forward kinematics holds; to the
body a motion already has it goes unchanged.
"""

from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import Tensor

from ..core.errors import DataError, UsageError, nearest
from .clip import Motion, motion_from_rotations
from .ik import solve
from .names import NAME_MAPS, guess_map
from .rotations import about_axis, between, identity, multiply, rotate, unit
from .skeleton import HUMAN22, Skeleton, local_rotations, world_rotations


def retarget(
    motion: Motion, skeleton: Skeleton = HUMAN22, names: Mapping[str, str] | None = None
) -> Motion:
    """Bring a motion to another body.

    Args:
        motion: The clip; without rotations they are found by `ik.solve` first.
        skeleton: The new body.
        names: {joint of the motion: joint of the new body}. Joints of the new body that nothing
            maps to go straight along with the bones around them. None takes equal names or, for
            the 22 joints, a known style (`names.NAME_MAPS`).

    Returns:
        The clip on the new body, in metres, with rotations.

    Raises:
        UsageError: `names` names a joint that is not there, or two joints for one; the nearest
            name is given.
        DataError: Without `names`: the joints' names fit no known style.
    """
    source = _sources(motion.skeleton, skeleton, names)
    joints, rotations = motion.tensors()
    if rotations is None:
        rotations = solve(motion.skeleton, joints)
    world = world_rotations(motion.skeleton, rotations)
    rest = torch.from_numpy(motion.skeleton.rest_joints())
    new_rest = torch.from_numpy(skeleton.rest_joints())
    facing = _rest_turn(rest, new_rest, source, skeleton)

    turned = [multiply(world[:, source[0]], facing)]
    for joint in range(1, len(skeleton)):
        start, end = _span(skeleton, source, joint)
        if start == end:  # nothing mapped lies behind: go on with the parent
            turned.append(turned[skeleton.parents[joint]])
            continue
        old_bone = rest[source[end]] - rest[source[start]]
        turn = world[:, source[end]]
        # Joints left out in between may bend: follow where the ends really are.
        seen = joints[:, source[end]] - joints[:, source[start]]
        turn = multiply(between(rotate(turn, old_bone), seen), turn)
        new_bone = rotate(facing, new_rest[end] - new_rest[start])
        align = multiply(between(new_bone, old_bone), facing)
        turned.append(unit(multiply(turn, align)))
    local = local_rotations(skeleton, torch.stack(turned, dim=1))
    root = joints[:, source[0]] * _size_ratio(rest, new_rest, source, skeleton)
    return motion_from_rotations(skeleton, local, root, motion.fps, motion.text)


def _sources(old: Skeleton, new: Skeleton, names: Mapping[str, str] | None) -> dict[int, int]:
    """Return {joint of the new body: joint of the old body}, the root among them."""
    if names is None:
        names = {name: name for name in new.names if name in old.names}
        if new.names == HUMAN22.names and len(names) < len(new) and (known := guess_map(old)):
            names = known
        if new.names[0] not in names.values() or 2 * len(names) < len(new):
            raise DataError(
                f"joints {', '.join(old.names[:6])} ... fit no known style "
                f"({', '.join(NAME_MAPS)}); give a map from their names to the new body's"
            )
    result: dict[int, int] = {}
    for from_name, to_name in names.items():
        for name, body, word in ((from_name, old, "the motion"), (to_name, new, "the new body")):
            if name not in body.names:
                hint = nearest(name, body.names) or body.names[0]
                raise UsageError(f"joint {name!r} is not in {word}; nearest {hint!r}")
        joint = new.index(to_name)
        if joint in result:
            both = f"{old.names[result[joint]]!r} and {from_name!r}"
            raise UsageError(f"joint {to_name!r} of the new body is given twice, by {both}")
        result[joint] = old.index(from_name)
    if 0 not in result:
        raise UsageError(f"no joint is mapped to {new.names[0]!r}, the root of the new body")
    return result


def _span(skeleton: Skeleton, source: Mapping[int, int], joint: int) -> tuple[int, int]:
    """Return the mapped joints before and at or behind a joint; equal where none is behind."""
    start = skeleton.parents[joint]
    while start not in source:
        start = skeleton.parents[start]
    queue = [joint]
    while queue:
        end = queue.pop(0)
        if end in source:
            return start, end
        queue += skeleton.children(end)
    return start, start


def _rest_turn(
    rest: Tensor, new_rest: Tensor, source: Mapping[int, int], skeleton: Skeleton
) -> Tensor:
    """Return the turn about the vertical from the new rest pose's facing to the old one's."""
    pairs = [skeleton.indices(pair) for pair in (skeleton.hips, skeleton.shoulders) if pair]
    pairs = [pair for pair in pairs if pair[0] in source and pair[1] in source]
    if not pairs:
        return identity(like=rest)
    old = sum((rest[source[left]] - rest[source[right]] for right, left in pairs), torch.zeros(3))
    new = sum((new_rest[left] - new_rest[right] for right, left in pairs), torch.zeros(3))
    angle = torch.atan2(new[2], new[0]) - torch.atan2(old[2], old[0])
    return about_axis("Y", angle)


def _size_ratio(
    rest: Tensor, new_rest: Tensor, source: Mapping[int, int], skeleton: Skeleton
) -> float:
    """Return how much longer the new legs are, over the joints both bodies have; else 1."""
    old_length = new_length = 0.0
    for foot in skeleton.indices(skeleton.feet):
        chain = [foot]
        while chain[-1] > 0:
            chain.append(skeleton.parents[chain[-1]])
        chain = [joint for joint in chain if joint in source]
        for joint, parent in pairwise(chain):
            old_length += float((rest[source[joint]] - rest[source[parent]]).norm())
            new_length += float((new_rest[joint] - new_rest[parent]).norm())
    return new_length / old_length if old_length > 0 else 1.0
