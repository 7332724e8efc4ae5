"""Measure motions as joints: feet that slide, jerk, bones that stretch, errors and seams.

All functions take joints in metres with Y up and frames per second, and give plain numbers in SI
units (errors in millimetres). They know no model and no features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from ..core.errors import DataError

Joints = Float[np.ndarray, "frames joints 3"]
FEET = (10, 11)
"""Balls of the feet in the SMPL / HumanML3D order."""
CONTACT_HEIGHT = 0.05
"""Metres above the floor below which a foot counts as standing."""
SKATING_SPEED = 0.5
"""Metres per second along the floor above which a standing foot slides (2.5 cm at 20 fps)."""
UP = 1
GROUND = (0, 2)
REAL_QUANTILE = 0.95


@dataclass(frozen=True)
class FootSkating:
    """How feet meet the floor.

    Attributes:
        ratio: Share of the steps from frame to frame in which a standing foot slides, in [0, 1].
        contact_ratio: Share of the steps in which a foot stands, in [0, 1].
        speed: Mean speed of standing feet along the floor, m/s; None where no foot ever stands.
    """

    ratio: float
    contact_ratio: float
    speed: float | None


def check_joints(joints: NDArray, least: int) -> None:
    """Require finite joints of enough frames.

    Args:
        joints: Array to check.
        least: Frames that are needed.

    Raises:
        DataError: Not [frames, joints, 3], too few frames, or numbers that are not finite.
    """
    if joints.ndim != 3 or joints.shape[2] != 3 or not joints.shape[1]:
        raise DataError(f"joints have shape {list(joints.shape)}; needed [frames, joints, 3]")
    if len(joints) < least:
        raise DataError(f"a motion of {len(joints)} frames; at least {least} are needed here")
    if not np.isfinite(joints).all():
        raise DataError("joints hold numbers that are not finite")


def velocities(joints: Joints, fps: float) -> Float[np.ndarray, "steps joints 3"]:
    """Difference the joints from frame to frame, in m/s."""
    return np.diff(joints.astype(np.float64), axis=0) * fps


def foot_skating(
    joints: Joints, fps: float, *, feet: Sequence[int] = FEET, floor: float | None = None,
    height: float = CONTACT_HEIGHT, speed: float = SKATING_SPEED,
) -> FootSkating:  # fmt: skip
    """Measure how much standing feet slide.

    A foot stands in a step from frame to frame when it is below `height` over the floor in both
    frames; it slides when it also moves faster than `speed` in the plane of the floor.

    Args:
        joints: [frames, joints, 3], metres, at least 2 frames.
        fps: Frames per second.
        feet: Numbers of the joints that touch the floor.
        floor: Height of the floor; None = the lowest foot of the motion, so that a motion that
            floats or sinks as a whole is not let off.
        height: Metres over the floor.
        speed: Metres per second.

    Raises:
        DataError: Joints that `check_joints` refuses.

    Source: skating ratio of GMD (Karunratanakul et al., arXiv:2305.12577, section 5): 5 cm, 2.5 cm
        per frame. Differs: the floor is the motion's own.
    """
    check_joints(joints, 2)
    placed = joints[:, list(feet)].astype(np.float64)
    above = placed[..., UP] - (placed[..., UP].min() if floor is None else floor)
    stands = (above[1:] < height) & (above[:-1] < height)
    moves = np.linalg.norm(velocities(placed, fps)[..., GROUND], axis=-1)
    slides = stands & (moves > speed)
    return FootSkating(
        float(slides.any(1).mean()),
        float(stands.any(1).mean()),
        float(moves[stands].mean()) if stands.any() else None,
    )


def jerk(joints: Joints, fps: float) -> float:
    """Average the length of the third derivative over joints and time, in m/s^3.

    Args:
        joints: [frames, joints, 3], metres, at least 4 frames.
        fps: Frames per second.

    Source: Flash and Hogan (1985), equation 1, as third differences. Differs: mean of lengths, not
        of squares, so that single frames do not rule.
    """
    check_joints(joints, 4)
    third = np.diff(joints.astype(np.float64), n=3, axis=0) * fps**3
    return float(np.linalg.norm(third, axis=-1).mean())


def bone_lengths(joints: Joints, parents: Sequence[int]) -> Float[np.ndarray, "frames bones"]:
    """Measure every bone in every frame, in metres.

    Args:
        joints: [frames, joints, 3].
        parents: Number of each joint's parent, -1 for the root.
    """
    ends = [joint for joint, parent in enumerate(parents) if parent >= 0]
    starts = [parents[joint] for joint in ends]
    bones = joints[:, ends].astype(np.float64) - joints[:, starts]
    return np.linalg.norm(bones, axis=-1)


def bone_stretch(joints: Joints, parents: Sequence[int]) -> float:
    """Average, over bones, the deviation of the length over time divided by its mean.

    0 for a rigid skeleton; bones of no length are left out.

    Args:
        joints: [frames, joints, 3], at least 1 frame.
        parents: Number of each joint's parent, -1 for the root.
    """
    check_joints(joints, 1)
    lengths = bone_lengths(joints, parents)
    mean = lengths.mean(0)
    real = mean > 1e-6
    return float((lengths.std(0)[real] / mean[real]).mean()) if real.any() else 0.0


def bone_error(
    joints: Joints, parents: Sequence[int], reference: Float[np.ndarray, " bones"]
) -> float:
    """Average, over bones and time, the deviation from given lengths divided by these.

    Args:
        joints: [frames, joints, 3], at least 1 frame.
        parents: Number of each joint's parent, -1 for the root.
        reference: Length of each bone in metres, in the order of `bone_lengths`; bones of no
            length are left out.

    Raises:
        DataError: Another number of bones.
    """
    check_joints(joints, 1)
    lengths = bone_lengths(joints, parents)
    if lengths.shape[1:] != np.shape(reference):
        raise DataError(f"{len(reference)} bone lengths for {lengths.shape[1]} bones")
    real = np.asarray(reference) > 1e-6
    return float((np.abs(lengths - reference)[:, real] / np.asarray(reference)[real]).mean())


def mpjpe(joints: Joints, target: Joints, *, root: int | None = None) -> float:
    """Average the distance of joints to their targets, in millimetres.

    Args:
        joints: [frames, joints, 3], metres.
        target: The same shape.
        root: Joint that is laid on its target in every frame first; None = nothing is aligned.

    Raises:
        DataError: Different shapes.

    Source: Ionescu et al., Human3.6M (TPAMI 2014), section 4 (mean per joint position error).
    """
    check_joints(joints, 1)
    if joints.shape != target.shape:
        raise DataError(f"joints {list(joints.shape)} and target {list(target.shape)} differ")
    difference = joints.astype(np.float64) - target.astype(np.float64)
    if root is not None:
        difference = difference - difference[:, root : root + 1]
    return float(np.linalg.norm(difference, axis=-1).mean() * 1000)


def velocity_jumps(joints: Joints, fps: float) -> Float[np.ndarray, " inner_frames"]:
    """Measure, at every inner frame, the largest change of a joint's velocity, in m/s.

    Args:
        joints: [frames, joints, 3], metres, at least 3 frames.
        fps: Frames per second.

    Returns:
        Entry i belongs to frame i + 1: the velocity after it minus the one before it.
    """
    check_joints(joints, 3)
    return np.linalg.norm(np.diff(velocities(joints, fps), axis=0), axis=-1).max(1)


def usual_jump(motions: Sequence[Joints], fps: float, quantile: float = REAL_QUANTILE) -> float:
    """Return the quantile of velocity jumps over all inner frames of real motions, in m/s.

    Args:
        motions: Real motions; those of fewer than 3 frames are left out.
        fps: Frames per second.
        quantile: In [0, 1].

    Raises:
        DataError: No motion of 3 frames.
    """
    jumps = [velocity_jumps(motion, fps) for motion in motions if len(motion) > 2]
    if not jumps:
        raise DataError("no motion of at least 3 frames to measure velocity jumps on")
    return float(np.quantile(np.concatenate(jumps), quantile))


def seam_jump(joints: Joints, seam: int, fps: float) -> float:
    """Measure the largest velocity jump at the two frames that a seam lies between, in m/s.

    Divided by `usual_jump` of real motion it says whether a cut shows: 1 is a jump of which real
    motion has one in twenty frames.

    Args:
        joints: [frames, joints, 3], metres, kept and generated frames together.
        seam: First frame after the cut.
        fps: Frames per second.

    Raises:
        DataError: A seam that is not inside.
    """
    jumps = velocity_jumps(joints, fps)
    if not 1 <= seam <= len(joints) - 1:
        raise DataError(f"seam {seam} of {len(joints)} frames; allowed 1..{len(joints) - 1}")
    return float(jumps[max(0, seam - 2) : seam].max())
