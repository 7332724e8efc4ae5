"""Motion metrics on motions made by hand, whose numbers are known."""

import math

import numpy as np
import pytest

from blockloom.core.errors import DataError
from blockloom.training.motion_metrics import (
    bone_error,
    bone_lengths,
    bone_stretch,
    foot_skating,
    jerk,
    mpjpe,
    seam_jump,
    usual_jump,
    velocity_jumps,
)

FPS = 20.0
PARENTS = (-1, 0, 1, 0)


def standing(frames: int = 11) -> np.ndarray:
    """22 joints at rest one metre up, both feet on a floor at height 0.3."""
    joints = np.zeros((frames, 22, 3), np.float32)
    joints[..., 1] = 1.3
    joints[:, [10, 11], 1] = 0.3
    return joints


def test_a_foot_that_slides_has_its_speed_and_its_share_of_frames():
    joints = standing()
    joints[:, 11, 1] = 0.5  # the right foot is in the air
    joints[:, 10, 2] = np.minimum(np.arange(11), 4) * 0.04  # 0.8 m/s for four of ten steps
    found = foot_skating(joints, FPS)
    assert found.ratio == pytest.approx(0.4) and found.contact_ratio == 1.0
    assert found.speed == pytest.approx(0.8 * 4 / 10, rel=1e-5)
    # Slower than the threshold: the speed is told, nothing counts as sliding.
    slow = standing()
    slow[:, 10, 0] = np.arange(11) * 0.02
    assert foot_skating(slow, FPS).ratio == 0.0
    assert foot_skating(slow, FPS).speed == pytest.approx(0.4 / 2, rel=1e-5)  # the other stands
    assert foot_skating(slow, FPS, speed=0.3).ratio == 1.0


def test_a_step_needs_the_foot_down_in_both_frames_and_up_moves_do_not_slide():
    joints = standing(5)
    joints[:, 11, 1] = 0.3 + 0.04 * np.array([0, 1, 0, 1, 0])  # up and down within 5 cm
    assert foot_skating(joints, FPS) == foot_skating(standing(5), FPS)
    joints[:, 10, 1] = [0.3, 0.3, 0.9, 0.3, 0.3]  # the left foot: down, up, down
    joints[:, 11, 1] = 0.9
    joints[:, 10, 0] = [0, 0.1, 0.2, 0.3, 0.4]
    found = foot_skating(joints, FPS)
    assert found.contact_ratio == pytest.approx(0.5) and found.ratio == pytest.approx(0.5)
    # With the floor given, feet 30 cm above it never stand.
    floating = foot_skating(joints, FPS, floor=0.0)
    assert floating.speed is None and floating.ratio == floating.contact_ratio == 0.0


def test_jerk_of_a_cubic_is_its_third_derivative():
    time = np.arange(12) / FPS
    joints = np.zeros((12, 2, 3))
    joints[:, 0, 0] = 2 * time**3 - time**2  # 12 m/s^3
    joints[:, 1, 1] = 5 * time**2  # none
    assert jerk(joints, FPS) == pytest.approx(6.0, rel=1e-9)
    with pytest.raises(DataError, match="at least 4"):
        jerk(joints[:3], FPS)


def test_bones_that_stretch_and_bones_of_another_length():
    joints = np.zeros((2, 4, 3))
    joints[:, 1, 1] = 1.0  # constant, 1 m
    joints[:, 2, 1] = [3.0, 4.0]  # 2 m, then 3 m: mean 2.5, deviation 0.5
    joints[:, 3, 2] = 0.5  # constant, 0.5 m
    assert bone_lengths(joints, PARENTS).tolist() == [[1.0, 2.0, 0.5], [1.0, 3.0, 0.5]]
    assert bone_stretch(joints, PARENTS) == pytest.approx((0 + 0.2 + 0) / 3)
    reference = np.array([1.0, 2.0, 0.4])
    assert bone_error(joints, PARENTS, reference) == pytest.approx((0 + 0.25 + 0.25) / 3)
    with pytest.raises(DataError, match="2 bone lengths for 3 bones"):
        bone_error(joints, PARENTS, reference[:2])


def test_joint_error_with_and_without_the_root():
    target = np.zeros((3, 2, 3))
    joints = target + np.array([0.03, 0.0, 0.04])  # everything 5 cm off
    assert mpjpe(joints, target) == pytest.approx(50.0)
    assert mpjpe(joints, target, root=0) == pytest.approx(0.0, abs=1e-9)
    joints[:, 1] += np.array([0.0, 0.02, 0.0])
    assert mpjpe(joints, target, root=0) == pytest.approx(10.0)  # mean of 0 and 20 mm
    with pytest.raises(DataError, match="differ"):
        mpjpe(joints, target[:2])


def test_a_seam_shows_as_a_jump_of_velocity():
    joints = np.zeros((8, 3, 3))
    joints[:, 0, 0] = np.arange(8) * 0.05  # 1 m/s throughout
    joints[4:, 1, 2] = 0.1  # 10 cm at once between frames 3 and 4: 0, then 2, then 0 m/s
    jumps = velocity_jumps(joints, FPS)
    assert jumps == pytest.approx([0, 0, 2, 2, 0, 0])
    assert seam_jump(joints, 4, FPS) == pytest.approx(2.0)
    assert seam_jump(joints, 3, FPS) == pytest.approx(2.0)  # frame 3 is next to it
    assert seam_jump(joints, 2, FPS) == pytest.approx(0.0, abs=1e-9)
    assert seam_jump(joints, 1, FPS) == pytest.approx(0.0, abs=1e-9)
    assert seam_jump(joints, 7, FPS) == pytest.approx(0.0, abs=1e-9)
    for seam in (0, 8):
        with pytest.raises(DataError, match=r"allowed 1\.\.7"):
            seam_jump(joints, seam, FPS)


def test_the_usual_jump_is_a_quantile_over_all_real_frames():
    def steady(change: float, frames: int) -> np.ndarray:
        time = np.arange(frames)
        joints = np.zeros((frames, 1, 3))
        joints[:, 0, 0] = change / FPS * time * (time - 1) / 2  # velocity grows by `change`
        return joints

    motions = [steady(0.1, 18), steady(0.5, 6), np.zeros((2, 1, 3))]  # 16 and 4 inner frames
    assert usual_jump(motions, FPS) == pytest.approx(0.5)
    assert usual_jump(motions, FPS, 0.5) == pytest.approx(0.1)
    with pytest.raises(DataError, match="at least 3 frames"):
        usual_jump([np.zeros((2, 1, 3))], FPS)


@pytest.mark.parametrize(
    ("joints", "words"),
    [
        (np.zeros((4, 22)), "needed"),
        (np.zeros((1, 22, 3)), "at least 2"),
        (np.full((4, 22, 3), math.nan), "not finite"),
    ],
)
def test_bad_joints_are_refused(joints, words):
    with pytest.raises(DataError, match=words):
        foot_skating(joints, FPS)
