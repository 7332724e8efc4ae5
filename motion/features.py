"""A pose as numbers relative to the body: what motion models see instead of world coordinates.

The order is HumanML3D's, for any number of joints J and feet F (22 and 4 give 263 numbers):

    0                 turn of the heading to the next frame, as HALF the angle, sign reversed
    1, 2              x, z of the root's way to the next frame, in the NEXT frame's heading
    3                 height of the root
    3 (J - 1)         places of joints 1.., x and z relative to the root, in the heading
    6 (J - 1)         rotations of joints 1.., 6-D, each relative to the parent's (see below)
    3 J               ways of all joints to the next frame, in this frame's heading
    F                 1 where a foot rests: squared way to the next frame below 0.002 m^2 at 20 fps

A frame needs the next one, so T poses give T - 1 feature frames and the last pose is lost, as in
HumanML3D. All ways are per frame, not per second.

Heading h is the angle whose direction (sin h, 0, cos h) lies at right angles to the line through
the hips plus the line through the shoulders; it is smoothed over time as HumanML3D does.

Source: Guo et al., "Generating Diverse and Natural 3D Human Motions from Text" (CVPR 2022) and the
processing published with its data. Differs: (1) the 6-D rotations are the clip's own where it has
them, twist included, instead of twist-free inverse kinematics; (2) each is relative to its parent,
while theirs start anew from the heading at the collars; (3) the turn of the heading is right when
the body passes half a turn away from +Z, where theirs changes sign for one frame; (4) nothing is
moved, turned or resized here: `start_of`, `Motion.on_floor` and `retarget` do that.
What it does not know: models, statistics, data sets.

Invariants: `recover` inverts `motion_features` for joints up to rounding, given the start; it is
float64 inside and adds up in order, so pieces recovered one after the other have the same bits as
the whole.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor

from ..core.errors import DataError, UsageError, check_range, describe
from .clip import Motion, distance_mm
from .ik import solve, swing_to
from .rotations import (
    about_axis,
    inverse,
    quaternion_from_six_d,
    rotate,
    six_d_from_quaternion,
    unit,
    yaw,
)
from .skeleton import HUMAN22, Skeleton, local_rotations, world_rotations

HUMAN_SIZE = 263
SMOOTHING_SECONDS = 1.0
"""Deviation of the Gaussian that smooths the heading: HumanML3D's 20 frames at 20 fps."""
CONTACT_SPEED = math.sqrt(0.002) * 20
"""Metres per second below which a foot rests: HumanML3D's 0.002 squared metres per frame."""


class Start(NamedTuple):
    """Where a body stands: x and z of the root in metres, heading in radians."""

    x: float = 0.0
    z: float = 0.0
    heading: float = 0.0


@dataclass(frozen=True)
class Layout:
    """Where each part of a feature frame lies, as slices.

    Attributes:
        joints: Number of joints J.
        feet: Number of feet F.
    """

    joints: int
    feet: int

    @property
    def places(self) -> slice:
        """Places of joints 1.. relative to the root."""
        return slice(4, 4 + 3 * (self.joints - 1))

    @property
    def rotations(self) -> slice:
        """6-D rotations of joints 1.. ."""
        return slice(self.places.stop, self.places.stop + 6 * (self.joints - 1))

    @property
    def ways(self) -> slice:
        """Ways of all joints to the next frame."""
        return slice(self.rotations.stop, self.rotations.stop + 3 * self.joints)

    @property
    def contacts(self) -> slice:
        """Foot contacts."""
        return slice(self.ways.stop, self.ways.stop + self.feet)

    @property
    def size(self) -> int:
        """Numbers per frame."""
        return self.contacts.stop


def layout_of(skeleton: Skeleton) -> Layout:
    """Return the layout of a skeleton's features."""
    return Layout(len(skeleton), len(skeleton.feet))


def headings(
    motion: Motion, smoothing_seconds: float = SMOOTHING_SECONDS
) -> Float[Tensor, " frames"]:
    """Return the heading of every frame, float64 radians, without jumps by full turns.

    Taken from hips and shoulders; without them from the root's rotation.

    Args:
        motion: The clip.
        smoothing_seconds: Deviation of the Gaussian over time; 0 makes every frame's heading its
            own, so that a piece of a clip has the same headings as the whole.

    Raises:
        UsageError: The smoothing is below 0.
        DataError: The skeleton has neither hips nor shoulders and the clip no rotations.
    """
    check_range("smoothing_seconds", smoothing_seconds, 0)
    skeleton, (joints, rotations) = motion.skeleton, motion.tensors()
    pairs = [skeleton.indices(pair) for pair in (skeleton.hips, skeleton.shoulders) if pair]
    if pairs:
        across = torch.stack([joints[:, left] - joints[:, right] for right, left in pairs])
        # Not of length 1 on the floor: a body on its side says little about where it faces.
        across = unit(across.sum(dim=0))
        forward = torch.stack([-across[:, 2], across[:, 0]], dim=-1)
    elif rotations is not None:
        angle = yaw(rotations[:, 0])
        forward = torch.stack([angle.sin(), angle.cos()], dim=-1)
    else:
        raise DataError(
            "heading unknown: the skeleton names neither hips nor shoulders and the motion has no "
            "rotations; name them in the skeleton"
        )
    return _unwrapped(_smoothed(forward, smoothing_seconds * motion.fps))


def _smoothed(values: Tensor, deviation: float) -> Tensor:
    """Filter [frames, parts] by a Gaussian cut at four deviations; ends are held."""
    radius = int(4 * deviation + 0.5)
    if not radius:
        return values
    offsets = torch.arange(-radius, radius + 1, dtype=values.dtype)
    weights = torch.exp(-0.5 * (offsets / deviation) ** 2)
    index = torch.arange(len(values))[:, None] + offsets.long()
    held = values[index.clamp(0, len(values) - 1)]
    return torch.einsum("fkp,k->fp", held, weights / weights.sum())


def _unwrapped(forward: Tensor) -> Tensor:
    angle = torch.atan2(forward[:, 0], forward[:, 1])
    return torch.from_numpy(np.unwrap(angle.numpy()))


def start_of(
    motion: Motion, frame: int = 0, *, smoothing_seconds: float = SMOOTHING_SECONDS
) -> Start:
    """Return where a clip stands in a frame: what `recover` needs to put it back from there on.

    Args:
        motion: The clip.
        frame: Which frame.
        smoothing_seconds: See `headings`.
    """
    root = motion.joints[frame, 0].astype(float)
    return Start(root[0], root[2], float(headings(motion, smoothing_seconds)[frame]))


def motion_features(
    motion: Motion, smoothing_seconds: float = SMOOTHING_SECONDS
) -> Float32[np.ndarray, "frames features"]:
    """Describe a clip relative to the body, for any skeleton.

    Args:
        motion: The clip, two frames or more. Without rotations they are found by `ik.solve`.
        smoothing_seconds: See `headings`.

    Returns:
        One row per frame but the last, in the order at the top of this file.

    Raises:
        DataError: Fewer than two frames, or no heading can be found.
    """
    if len(motion) < 2:
        raise DataError("features need two frames or more: each frame tells the way to the next")
    skeleton, (joints, rotations) = motion.skeleton, motion.tensors()
    if rotations is None:
        rotations = solve(skeleton, joints)
    heading = headings(motion, smoothing_seconds)
    facing = about_axis("Y", heading)
    undo = inverse(facing)[:, None]

    world = world_rotations(skeleton, rotations)
    world = torch.cat([facing[:, None], world[:, 1:]], dim=1)
    local = local_rotations(skeleton, world)[:, 1:]

    ways = joints[1:] - joints[:-1]
    root_ways = rotate(undo[1:, 0], ways[:, 0])
    places = joints - joints[:, :1] * joints.new_tensor([1.0, 0.0, 1.0])
    feet = ways[:, skeleton.indices(skeleton.feet)].norm(dim=-1) * motion.fps
    rows = [
        -heading.diff()[:, None] / 2,
        root_ways[:, [0, 2]],
        joints[:-1, 0, 1:2],
        rotate(undo, places)[:-1, 1:].flatten(1),
        six_d_from_quaternion(local)[:-1].flatten(1),
        rotate(undo[:-1], ways).flatten(1),
        (feet < CONTACT_SPEED).to(joints),
    ]
    return torch.cat(rows, dim=1).to(torch.float32).numpy()


def human_features(
    motion: Motion, smoothing_seconds: float = SMOOTHING_SECONDS
) -> Float32[np.ndarray, "frames 263"]:
    """Describe a clip of the 22 joints by HumanML3D's 263 numbers, see `motion_features`.

    Raises:
        DataError: Other joints, or fewer than two frames.
    """
    if motion.skeleton.names != HUMAN22.names or len(motion.skeleton.feet) != 4:
        raise DataError(
            f"the 263 numbers need the {len(HUMAN22)} joints of human22 in their order; got "
            f"{len(motion.skeleton)} joints, {', '.join(motion.skeleton.names[:4])} ...; "
            "`retarget` brings a motion there"
        )
    return motion_features(motion, smoothing_seconds)


def _paths(features: Tensor, start: Start) -> tuple[Tensor, Tensor]:
    """Return headings [..., frames + 1] and root places [..., frames + 1, 2] (x, z)."""

    def summed(first: Tensor, steps: Tensor) -> Tensor:
        first = first.expand(*steps.shape[:-2], 1, steps.shape[-1])
        return torch.cat([first, steps], dim=-2).cumsum(dim=-2)

    origin = features.new_tensor([start.heading, start.x, start.z])
    heading = summed(origin[:1], -2 * features[..., :1])[..., 0]
    x, z = features[..., 1], features[..., 2]
    cosine, sine = heading[..., 1:].cos(), heading[..., 1:].sin()
    steps = torch.stack([cosine * x + sine * z, cosine * z - sine * x], dim=-1)
    return heading, summed(origin[1:], steps)


def _as_double(features: Tensor | np.ndarray) -> Tensor:
    return torch.as_tensor(features).to(torch.float64)


def advance(
    features: Float[Tensor, "frames features"] | np.ndarray, start: Start | None = None
) -> Start:
    """Return where the frame after the last one starts, to go on recovering a piece later."""
    heading, root = _paths(_as_double(features), start or Start())
    return Start(float(root[-1, 0]), float(root[-1, 1]), float(heading[-1]))


def recover(
    features: Float[Tensor, "*batch frames features"] | np.ndarray,
    start: Start | None = None,
    joints: int = len(HUMAN22),
) -> Float[Tensor, "*batch frames joints 3"]:
    """Turn features back into joint places; only the root's part and the places are read.

    Args:
        features: As `motion_features` gives them.
        start: Where the first frame stands; None is the origin, facing +Z.
        joints: Number of joints.

    Returns:
        float32, metres, in the world; one pose per row.

    Raises:
        UsageError: Rows too short for that many joints.

    Source: `recover_from_ric` of HumanML3D, in float64.
    """
    values = _as_double(features)
    heading, root = _checked_paths(values, start, joints)
    return _place(values, heading, root, joints).to(torch.float32)


def _checked_paths(values: Tensor, start: Start | None, joints: int) -> tuple[Tensor, Tensor]:
    least = Layout(joints, 0).size
    if values.ndim < 2 or values.shape[-1] < least:
        allowed = f"[..., frames, {least} or more] for {joints} joints"
        raise UsageError(describe("features", list(values.shape), allowed))
    heading, root = _paths(values, start or Start())
    return heading[..., :-1], root[..., :-1, :]


def _place(values: Tensor, heading: Tensor, root: Tensor, joints: int) -> Tensor:
    height = values[..., 3]
    local = values[..., Layout(joints, 0).places].unflatten(-1, (joints - 1, 3))
    turned = rotate(about_axis("Y", heading)[..., None, :], local)
    shift = torch.stack([root[..., 0], torch.zeros_like(height), root[..., 1]], dim=-1)
    pelvis = shift + torch.stack([torch.zeros_like(height), height, torch.zeros_like(height)], -1)
    return torch.cat([pelvis[..., None, :], turned + shift[..., None, :]], dim=-2)


def features_to_motion(
    features: Float[Tensor, "frames features"] | np.ndarray,
    skeleton: Skeleton = HUMAN22,
    fps: float = 20.0,
    start: Start | None = None,
    text: str = "",
) -> Motion:
    """Build a clip whose joints and rotations agree and whose bones keep their lengths.

    Rotations come from the 6-D part; then, from the root outwards, each bone is swung by the
    shortest turn so that it points at the place `recover` gives for its end. So the 6-D part
    decides the twist and the places decide the direction. `body_error` says what is left, which
    is nothing where the features' bones have the skeleton's lengths. The root's own rotation is
    not among the features: it is taken from the hips, which turn with it.

    Args:
        features: As `motion_features` gives them for this skeleton.
        skeleton: The body.
        fps: Frames per second.
        start: Where the first frame stands; None is the origin, facing +Z.
        text: What happens.

    Raises:
        UsageError: Rows of another length than the skeleton's.
        DataError: Numbers that are not finite.
    """
    values = _as_double(features)
    layout = layout_of(skeleton)
    if values.ndim != 2 or values.shape[1] != layout.size:
        raise UsageError(describe("features", list(values.shape), f"[frames, {layout.size}]"))
    heading, root = _checked_paths(values, start, len(skeleton))
    target = _place(values, heading, root, len(skeleton))
    local = quaternion_from_six_d(values[:, layout.rotations].unflatten(-1, (-1, 6)))
    facing = about_axis("Y", heading)
    world = world_rotations(skeleton, torch.cat([facing[:, None], local], dim=1))
    world, joints = swing_to(skeleton, world, target)
    world = torch.cat([_root_rotation(skeleton, world)[:, None], world[:, 1:]], dim=1)
    rotations = local_rotations(skeleton, world)
    return Motion(joints.float().numpy(), skeleton, fps, rotations.float().numpy(), text)


def _root_rotation(skeleton: Skeleton, world: Tensor) -> Tensor:
    """Return the mean world rotation of the hips, or of all bones that leave the root."""
    leaving = skeleton.children(0)
    hips = [joint for joint in skeleton.indices(skeleton.hips) if joint in leaving]
    used = hips or leaving
    if not used:
        return world[:, 0]
    first = world[:, used[0]]
    signs = (world[:, used] * first[:, None]).sum(-1, keepdim=True).sign()
    return unit((world[:, used] * torch.where(signs < 0, -1.0, 1.0)).sum(dim=1))


def body_error(
    motion: Motion,
    features: Float[Tensor, "frames features"] | np.ndarray,
    start: Start | None = None,
) -> tuple[float, float]:
    """Return mean and largest distance in millimetres of a clip from its features' places.

    It is how far bones of constant length cannot follow what the features say.
    """
    joints, _ = motion.tensors()
    return distance_mm(joints, recover(features, start, len(motion.skeleton)).to(joints))
