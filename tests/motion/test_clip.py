import dataclasses

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError, UsageError
from blockloom.motion.clip import (
    Motion,
    fk_error,
    motion_world_rotations,
    resample,
    select_joints,
)
from blockloom.motion.procedural import procedural_motion
from blockloom.motion.skeleton import HUMAN22


@pytest.fixture
def walk() -> Motion:
    return procedural_motion("a person walks forward", torch.Generator().manual_seed(0), 61)


def test_a_clip_keeps_its_parts_as_float32(walk: Motion) -> None:
    assert walk.joints.dtype == walk.rotations.dtype == np.float32
    assert len(walk) == 61 and walk.seconds == pytest.approx(3.05)
    assert fk_error(walk)[1] < 0.01  # millimetres
    part = walk.cut(10, 20)
    np.testing.assert_array_equal(part.joints, walk.joints[10:20])
    np.testing.assert_array_equal(part.rotations, walk.rotations[10:20])
    lifted = dataclasses.replace(walk, joints=walk.joints + np.float32(3))
    assert lifted.on_floor().joints[..., 1].min() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"joints": np.zeros((0, 22, 3))}, "at least one frame"),
        ({"joints": np.zeros((4, 21, 3))}, r"\[4, 21, 3\]"),
        ({"joints": np.full((61, 22, 3), np.inf)}, "not finite in frame 0"),
        ({"rotations": np.zeros((61, 22, 4))}, "unit quaternions"),
        ({"rotations": np.zeros((60, 22, 4))}, "61 frames of joints, 60 of"),
        ({"fps": 0.0}, "fps of a motion is 0"),
        ({"fps": float("nan")}, "fps of a motion is nan"),
    ],
)
def test_parts_that_do_not_fit_are_refused(walk: Motion, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        dataclasses.replace(walk, **change)


def test_cuts_outside_are_refused(walk: Motion) -> None:
    for borders in ((5, 5), (-1, 4), (0, 62)):
        with pytest.raises(UsageError, match="cut of a motion"):
            walk.cut(*borders)


def test_resampling_there_and_back(walk: Motion) -> None:
    fast = resample(walk, 60.0)
    assert len(fast) == 181 and fast.fps == 60
    assert fk_error(fast)[1] < 0.01  # bones keep their lengths between the frames too
    back = resample(fast, 20.0)
    np.testing.assert_allclose(back.joints, walk.joints, atol=1e-5)
    same = np.abs((back.rotations * walk.rotations).sum(-1))
    np.testing.assert_allclose(same, 1, atol=1e-5)


def test_resampling_places_alone_and_stretching_bones(walk: Motion) -> None:
    alone = dataclasses.replace(walk, rotations=None)
    half = resample(alone, 40.0)
    between = (walk.joints[3] + walk.joints[4]) / 2
    np.testing.assert_allclose(half.joints[7], between, atol=1e-6)
    stretched = dataclasses.replace(walk, joints=walk.joints * np.float32([1, 1.1, 1]))
    np.testing.assert_allclose(resample(stretched, 20.0).joints, stretched.joints, atol=1e-5)
    with pytest.raises(UsageError, match="fps"):
        resample(walk, 0)


def test_selecting_joints(walk: Motion) -> None:
    names = ("pelvis", "right_hip", "left_hip", "right_knee")
    part = select_joints(walk, names)
    assert part.skeleton.parents == (-1, 0, 0, 1) and part.skeleton.hips == HUMAN22.hips
    assert part.skeleton.shoulders == ()
    np.testing.assert_array_equal(part.joints[:, 3], walk.joints[:, HUMAN22.index("right_knee")])
    assert fk_error(part)[1] < 0.01
    with pytest.raises(UsageError, match="'left_hip' before 'left_knee'"):
        select_joints(walk, ("pelvis", "left_knee"))


def test_places_alone_have_no_world_rotations(walk: Motion) -> None:
    with pytest.raises(DataError, match="places only"):
        motion_world_rotations(dataclasses.replace(walk, rotations=None))
