"""Rotations for joint places: swings from bone directions, with a twist that stays smooth.

Places alone do not say how a bone twists about its own axis. Twist comes, in this order, from a
reference where one is given; at joints with several bones from where those bones point (the
pelvis from hips and spine, the chest from collars and neck); elsewhere from the parent, so that a
limb is bent and never wrung.

It does not know clips, files or features.

Invariants: no frame's result depends on frames after it. Where bones have the skeleton's lengths,
forward kinematics of the result gives the places; otherwise every bone points where it should.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from .rotations import (
    angle_of,
    between,
    inverse,
    multiply,
    quaternion_from_matrix,
    rotate,
    slerp,
    unit,
)
from .skeleton import Skeleton, local_rotations, world_rotations

_NEAR_OPPOSITE = -0.9
"""Cosine below which a bone is so close to opposite its rest direction that the shortest turn
jumps about; such frames go on from the frame before."""
_RETURN = 0.15
"""Part of the way back to the shortest turn's twist that each later frame goes."""
_CLOSE = 0.01
"""Radians from the shortest turn at which later frames take it again."""


def solve(
    skeleton: Skeleton,
    joints: Float[Tensor, "frames joints 3"],
    reference: Float[Tensor, "frames joints 4"] | None = None,
) -> Float[Tensor, "frames joints 4"]:
    """Find parent-relative rotations for joint places.

    Args:
        skeleton: The body; only the directions of its bones matter.
        joints: Places, metres.
        reference: Parent-relative rotations whose twist is kept, for instance predicted ones; or
            None.

    Returns:
        Unit quaternions, convention of `skeleton.py`, dtype of `joints`.
    """
    offsets = torch.as_tensor(skeleton.offsets.copy(), dtype=joints.dtype, device=joints.device)
    parents = torch.tensor(skeleton.parents[1:], dtype=torch.long, device=joints.device)
    bones = torch.zeros_like(joints)
    bones[:, 1:] = joints[:, 1:] - joints[:, parents]
    if reference is not None:
        return _from_reference(skeleton, bones, offsets, reference)
    world: list[Tensor] = []
    for joint, parent in enumerate(skeleton.parents):
        frame = _body_frame(_leaving(skeleton, joint), bones, offsets)
        if parent < 0:
            only = _leaving(skeleton, 0)[:1]
            swing = between(offsets[only[0]], bones[:, only[0]]) if only else None
            upright = torch.zeros_like(bones[:, 0, :1]) + joints.new_tensor([1.0, 0.0, 0.0, 0.0])
            world.append(frame if frame is not None else upright if swing is None else swing)
        elif frame is not None and float(offsets[joint].norm()):
            swing = between(rotate(frame, offsets[joint]), bones[:, joint])
            world.append(unit(multiply(swing, frame)))
        else:
            bone = rotate(inverse(world[parent]), bones[:, joint])
            local = _steady_swing(offsets[joint], bone)
            world.append(unit(multiply(world[parent], local)))
    return local_rotations(skeleton, torch.stack(world, dim=1))


def _from_reference(
    skeleton: Skeleton, bones: Tensor, offsets: Tensor, reference: Tensor
) -> Tensor:
    world = world_rotations(skeleton, unit(reference.to(bones)))
    swing = between(rotate(world, offsets), bones)
    return local_rotations(skeleton, unit(multiply(swing, world)))


def _steady_swing(rest: Tensor, bones: Tensor) -> Tensor:
    """Return shortest turns of `rest` to each bone, going on steadily where they are unclear.

    Near the opposite of `rest` the twist of the frame before is carried on; past it, the twist
    goes back to that of the shortest turn little by little.
    """
    turns = between(rest, bones)
    is_unclear = (unit(bones) * unit(rest)).sum(-1) < _NEAR_OPPOSITE
    carries = False
    for frame in range(1, len(turns) if bool(is_unclear.any()) else 0):
        unclear = bool(is_unclear[frame])
        if not (unclear or carries):
            continue
        before, shortest = turns[frame - 1], turns[frame].clone()
        step = between(rotate(before, rest), bones[frame])
        turns[frame] = unit(multiply(step, before))
        carries = unclear or float(angle_of(multiply(inverse(turns[frame]), shortest))) > _CLOSE
        if not unclear:
            back = torch.tensor(_RETURN if carries else 1.0).to(turns)
            turns[frame] = slerp(turns[frame], shortest, back)
    return turns


def _leaving(skeleton: Skeleton, joint: int) -> list[int]:
    """Return the joints at the other ends of the bones that leave a joint's place.

    Bones of length 0, which some programs put in between, are looked through.
    """
    found: list[int] = []
    for child in skeleton.children(joint):
        is_bone = np.linalg.norm(skeleton.offsets[child]) > 0
        found += [child] if is_bone else _leaving(skeleton, child)
    return found


def _body_frame(leaving: list[int], bones: Tensor, offsets: Tensor) -> Tensor | None:
    """Fit one rotation to the bones that leave a joint; None where they leave twist open.

    Source: Kabsch, "A solution for the best rotation to relate two sets of vectors" (1976), on
    directions: every bone counts alike.
    """
    rest = unit(offsets[leaving])
    if len(leaving) < 2 or torch.linalg.matrix_rank(rest, atol=0.1) < 2:
        return None
    products = torch.einsum("fci,cj->fij", unit(bones[:, leaving]), rest)
    left, _, right = torch.linalg.svd(products)
    sign = torch.ones_like(left[..., 0])
    sign[..., 2] = torch.linalg.det(left @ right).sign()
    return quaternion_from_matrix(left @ (sign[..., None] * right))


def swing_to(
    skeleton: Skeleton,
    world: Float[Tensor, "frames joints 4"],
    target: Float[Tensor, "frames joints 3"],
) -> tuple[Float[Tensor, "frames joints 4"], Float[Tensor, "frames joints 3"]]:
    """Swing every bone by the shortest turn so that it points at its target, root outwards.

    Args:
        skeleton: The body.
        world: Rotations in the world before; their twist is kept.
        target: Where the joints should be, metres.

    Returns:
        The rotations after, and the joints they give.
    """
    offsets = torch.as_tensor(skeleton.offsets.copy(), dtype=world.dtype, device=world.device)
    turned, places = world.clone(), target.clone()
    for joints, parents in skeleton.generations_on(world.device):
        start, own, bone = places[:, parents], world[:, joints], offsets[joints]
        swing = between(rotate(own, bone), target[:, joints] - start)
        own = unit(multiply(swing, own))
        turned.index_copy_(1, joints, own)
        places.index_copy_(1, joints, start + rotate(own, bone))
    return turned, places
