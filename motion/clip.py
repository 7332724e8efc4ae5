"""One clip of a moving body, and what is done to clips as wholes.

It does not know features, files or models.

Invariants: joints are the truth. Where a clip has rotations, forward kinematics with the
skeleton's bones gives its joints; a clip read from a file whose bones stretch keeps the joints as
they were, and `fk_error` says how far the two differ.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import DataError, UsageError, check_range, describe
from ..core.messages import explain
from .rotations import slerp, unit
from .skeleton import Skeleton, forward_kinematics, world_rotations

MAX_GROWN_PLACES = 10_000_000
"""Joints times frames that a slow clip may grow to at another rate: 240 MB of numbers."""


@dataclass(frozen=True)
class Motion:
    """A moving body.

    Attributes:
        joints: [frames, joints, 3], stored as float32; metres, Y up, right-handed, in the world.
        skeleton: The body; its bones are those of the rest pose.
        fps: Frames per second.
        rotations: [frames, joints, 4], stored as float32; unit quaternions (w, x, y, z), or None
            where only places are known. Entry j turns the bone that ends at joint j against the
            bone that ends at its parent; entry 0 is the root's in the world (see `skeleton.py`).
        text: What happens, or "".

    Raises:
        DataError: The parts do not fit, there is no frame, or a number is not finite.
    """

    joints: Float[np.ndarray, "frames joints 3"]
    skeleton: Skeleton
    fps: float = 20.0
    rotations: Float[np.ndarray, "frames joints 4"] | None = None
    text: str = ""

    def __post_init__(self) -> None:
        """Check the parts and store them as float32."""
        object.__setattr__(self, "joints", _checked("joints", self.joints, len(self.skeleton), 3))
        if self.rotations is not None:
            rotations = _checked("rotations", self.rotations, len(self.skeleton), 4)
            if len(rotations) != len(self.joints):
                raise DataError(
                    f"{len(self.joints)} frames of joints, {len(rotations)} of rotations"
                )
            lengths = np.linalg.norm(rotations, axis=-1)
            if np.abs(lengths - 1).max() > 1e-3:
                raise DataError(
                    f"rotations of a motion are unit quaternions; one has length "
                    f"{lengths.flat[np.abs(lengths - 1).argmax()]:.3g}"
                )
            object.__setattr__(self, "rotations", rotations)
        if not (np.isfinite(self.fps) and 0 < self.fps <= 10_000):
            raise DataError(f"fps of a motion is {self.fps}; allowed above 0, at most 10000")

    def __len__(self) -> int:
        """Return the number of frames."""
        return len(self.joints)

    @property
    def seconds(self) -> float:
        """Duration: frames over frames per second."""
        return len(self) / self.fps

    def cut(self, start: int, stop: int) -> "Motion":
        """Return frames start to stop (not included).

        Raises:
            UsageError: No frame is left, or the borders lie outside.
        """
        if not 0 <= start < stop <= len(self):
            allowed = f"0 <= start < stop <= {len(self)}"
            raise UsageError(describe("cut of a motion", (start, stop), allowed))
        turned = None if self.rotations is None else self.rotations[start:stop]
        return replace(self, joints=self.joints[start:stop], rotations=turned)

    def on_floor(self) -> "Motion":
        """Return the clip moved up or down so that its lowest joint touches the floor, y = 0."""
        up = np.array([0, 1, 0], dtype=np.float32)
        return replace(self, joints=self.joints - self.joints[..., 1].min() * up)

    def tensors(self) -> tuple[Tensor, Tensor | None]:
        """Return joints and rotations (or None) as float64 tensors; rotations of length 1."""
        joints = torch.from_numpy(self.joints.astype(np.float64))
        if self.rotations is None:
            return joints, None
        return joints, unit(torch.from_numpy(self.rotations.astype(np.float64)))


def _checked(name: str, values: NDArray, joints: int, size: int) -> NDArray[np.float32]:
    array = np.ascontiguousarray(values, dtype=np.float32)
    if array.ndim != 3 or array.shape[1:] != (joints, size) or not len(array):
        raise DataError(
            f"{name} of a motion are {list(array.shape)}; needed [frames, {joints}, {size}] with "
            "at least one frame"
        )
    if not np.isfinite(array).all():
        frame = int(np.argwhere(~np.isfinite(array).all(axis=(1, 2)))[0, 0])
        raise DataError(f"{name} of a motion are not finite in frame {frame}")
    return array


def motion_from_rotations(
    skeleton: Skeleton, rotations: Tensor, root: Tensor, fps: float = 20.0, text: str = ""
) -> Motion:
    """Build a clip by forward kinematics.

    Args:
        skeleton: The body.
        rotations: [frames, joints, 4], parent-relative unit quaternions.
        root: [frames, 3], place of the root, metres.
        fps: Frames per second.
        text: What happens.
    """
    joints = forward_kinematics(skeleton, rotations, root)
    return Motion(_numpy(joints), skeleton, fps, _numpy(rotations), text)


def _numpy(values: Tensor) -> NDArray[np.float32]:
    return values.detach().cpu().to(torch.float32).numpy()


def known_rotations(motion: Motion) -> Tensor:
    """Return a clip's rotations, float64 [frames, joints, 4], of length 1.

    Raises:
        DataError: It has none.
    """
    _, rotations = motion.tensors()
    if rotations is None:
        raise DataError("this motion has places only; `ik.solve` finds rotations for them")
    return rotations


def motion_world_rotations(motion: Motion) -> Tensor:
    """Return world rotations against the rest pose, float64 [frames, joints, 4].

    Raises:
        DataError: The clip has no rotations.
    """
    return world_rotations(motion.skeleton, known_rotations(motion))


def fk_error(motion: Motion) -> tuple[float, float]:
    """Return mean and largest distance, in millimetres, between joints and forward kinematics.

    Raises:
        DataError: The clip has no rotations.
    """
    rotations, (joints, _) = known_rotations(motion), motion.tensors()
    placed = forward_kinematics(motion.skeleton, rotations, joints[:, 0])
    return distance_mm(placed, joints)


def distance_mm(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Return mean and largest distance of points, [..., 3] metres, in millimetres."""
    distance = (first - second).norm(dim=-1) * 1000
    return float(distance.mean()), float(distance.max())


def select_joints(motion: Motion, names: Sequence[str]) -> Motion:
    """Return some of the joints, in another order; rotations and places stay as they are.

    Args:
        motion: The clip.
        names: Joints to keep, parents before children; a joint is kept only with its parent.

    Raises:
        UsageError: A joint is not there, or stands before or without its parent.
    """
    old, kept = motion.skeleton, tuple(names)
    index = old.indices(kept)
    parents = []
    for number, joint in enumerate(index):
        parent = old.parents[joint]
        if parent >= 0 and parent not in index[:number]:
            fault = f"{old.names[parent]!r} before {old.names[joint]!r}, which hangs on it"
            raise UsageError(describe("choice of joints", list(kept)[:8], fault))
        parents.append(-1 if parent < 0 else index.index(parent))
    lists = {
        key: tuple(name for name in getattr(old, key) if name in kept)
        for key in ("hips", "shoulders", "feet", "ends")
    }
    for key in ("hips", "shoulders"):
        lists[key] = lists[key] if len(lists[key]) == 2 else ()
    skeleton = Skeleton(kept, tuple(parents), old.offsets[index], **lists)
    turned = None if motion.rotations is None else motion.rotations[:, index]
    return replace(motion, joints=motion.joints[:, index], skeleton=skeleton, rotations=turned)


def check_length(motion: Motion, fps: float, most: float = math.inf, name: str = "motion") -> None:
    """Refuse a clip that is too long as it is, or would be at another rate: slow ones grow.

    Args:
        motion: The clip.
        fps: The other rate.
        most: Frames it may have, as it is and at that rate.
        name: Of the clip, for the message.

    Raises:
        DataError: More frames, or it would grow over `MAX_GROWN_PLACES`.
    """
    count: float = len(motion)
    resampled = 1 + (len(motion) - 1) * fps / motion.fps
    if resampled >= count + 1:
        count = resampled
        most = min(most, MAX_GROWN_PLACES // len(motion.skeleton))
    if count > most:
        got = f"{len(motion)} frames"
        got += f" at {motion.fps:g} fps, {count:.7g} at {fps:g}" if count > len(motion) else ""
        raise DataError(explain(f"{name} is too long", got=got, allowed=f"{most}"))


def resample(motion: Motion, fps: float) -> Motion:
    """Return the clip at another frame rate: places in straight lines, rotations by slerp.

    The first frame stays; the last lies at or just before the old last one. Joints of a clip with
    rotations follow from its rotations, so bones keep their lengths; what the clip's own joints
    differ from forward kinematics is kept.

    Raises:
        UsageError: fps is not above 0 and at most 10000.
    """
    check_range("fps", fps, 0, 10_000, open_low=True)
    # A hair is allowed for, so that 120 -> 20 -> 120 does not lose its last frame to rounding.
    count = int((len(motion) - 1) * fps / motion.fps + 1e-6) + 1
    time = torch.arange(count, dtype=torch.float64) * motion.fps / fps
    low = time.floor().long().clamp(max=len(motion) - 1)
    high = (low + 1).clamp(max=len(motion) - 1)
    ratio = (time - low).clamp(0, 1)
    joints, rotations = motion.tensors()
    if rotations is None:
        joints = torch.lerp(joints[low], joints[high], ratio[:, None, None])
        return replace(motion, joints=_numpy(joints), fps=fps)
    rest = joints - forward_kinematics(motion.skeleton, rotations, joints[:, 0])
    rest = torch.lerp(rest[low], rest[high], ratio[:, None, None])
    root = torch.lerp(joints[low, 0], joints[high, 0], ratio[:, None])
    rotations = slerp(rotations[low], rotations[high], ratio[:, None])
    joints = forward_kinematics(motion.skeleton, rotations, root) + rest
    return replace(motion, joints=_numpy(joints), rotations=_numpy(rotations), fps=fps)
