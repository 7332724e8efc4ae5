"""Drawn figures: in the picture, the right way round, near before far, and the same every time."""

import time

import numpy as np
import pytest

from blockloom.core.errors import UsageError
from blockloom.motion.clip import Motion
from blockloom.motion.figure import Camera, draw_frames, draw_strip
from blockloom.motion.look import COLORS
from blockloom.motion.skeleton import HUMAN22, Skeleton

REST = HUMAN22.rest_joints().astype(np.float32)


def standing(frames=3, step=(0.0, 0.0, 0.0)):
    walk = np.arange(frames, dtype=np.float32)[:, None, None] * np.float32(step)
    return Motion(REST[None] + walk, HUMAN22)


def share(picture, color, reach=40):
    """Tell which part of a picture has about this colour."""
    return (np.abs(picture.astype(int) - color).max(-1) < reach).mean()


def middle_of(picture, color):
    rows, columns = np.nonzero(np.abs(picture.astype(int) - color).max(-1) < 40)
    return columns.mean(), rows.mean()


def test_a_standing_figure_faces_the_eye_with_its_left_on_the_right():
    frames = list(draw_frames(standing(), 128))
    assert len(frames) == 3 and frames[0].shape == (128, 128, 3) and frames[0].dtype == np.uint8
    for color in COLORS.values():
        assert share(frames[0], color) > 0.002
    left, right = (middle_of(frames[0], COLORS[side]) for side in ("left", "right"))
    assert left[0] > right[0] + 5
    # The head is above the feet, and nothing touches the border.
    rows = np.nonzero(np.abs(frames[0].astype(int) - COLORS["middle"]).max(-1) < 40)[0]
    assert rows.min() > 3 and rows.min() < 64
    assert np.array_equal(frames[0], next(draw_frames(standing(), 128)))


def test_near_limbs_hide_far_ones():
    sticks = Skeleton(
        ("root", "left_a", "right_a"), (-1, 0, 0),
        np.array([[0, 0, 0], [0, 1.0, 0], [0, 1.0, 0]]),
    )  # fmt: skip
    places = np.zeros((1, 3, 3), np.float32)
    places[0, 1:, 1] = 1
    for near in (1, 2):
        moved = places.copy()
        moved[0, near] += [0.06, 0, 0.09]  # towards the eye
        drawn = next(draw_frames(Motion(moved, sticks), 128))
        hidden, shown = ("right", "left") if near == 1 else ("left", "right")
        assert share(drawn, COLORS[shown]) > share(drawn, COLORS[hidden])


def test_the_camera_follows_who_walks_and_sees_all_of_a_short_path():
    far = standing(40, (0.2, 0, 0))
    followed = list(draw_frames(far, 96))
    places = [middle_of(frame, COLORS["middle"])[0] for frame in followed]
    assert 40 < min(places) and max(places) < 56
    still = [middle_of(f, COLORS["middle"])[0] for f in draw_frames(far, 96, view="whole")]
    assert still[-1] > still[0] + 40 and 3 < min(still) and max(still) < 93
    assert not np.array_equal(
        followed[0][-1], followed[21][-1]
    )  # the floor moves under the follower


def test_every_joint_stays_inside():
    jump = standing(20)
    joints = jump.joints.copy()
    joints[10, :, 1] += 2.0
    joints[:, HUMAN22.names.index("left_wrist"), 0] += np.linspace(0, 1.5, 20, dtype=np.float32)
    for view in ("follow", "whole"):
        for frame in draw_frames(Motion(joints, HUMAN22), 96, view=view):
            rim = np.concatenate([frame[0], frame[:, 0], frame[:, -1]])
            for color in COLORS.values():
                assert share(rim[None], color) == 0


def test_projection_keeps_up_and_depth():
    camera = Camera(np.zeros(3), 5.0, (200, 100))
    middle, up, near = camera.project(np.array([[0, 0, 0], [0, 1, 0], [0, 0, 1.0]]))
    assert np.allclose(middle, [100, 50, 5.0])
    assert up[1] < 50 and abs(up[0] - 100) < 1e-9 and near[2] < 5.0


def test_a_strip_shows_poses_side_by_side():
    motion = standing(30, (0.05, 0, 0))
    strip = draw_strip(motion, 8, 100)
    assert strip.size == (8 * 62, 100)
    panels = np.asarray(strip).reshape(100, 8, 62, 3).transpose(1, 0, 2, 3)
    assert all(share(panel, COLORS["left"]) > 0.002 for panel in panels)
    assert draw_strip(motion.cut(0, 2), 8, 100).size == (2 * 62, 100)


def test_bad_settings_name_the_nearest_legal_value():
    motion = standing(1)
    cases = [({"size": 31}, "try 32"), ({"size": 9999}, "try 2048"), ({"view": "fly"}, "view")]
    for settings, words in cases:
        with pytest.raises(UsageError, match=words):
            next(draw_frames(motion, **settings))
    with pytest.raises(UsageError, match=r"poses.*try 1"):
        draw_strip(motion, 0)


@pytest.mark.slow
def test_drawing_is_faster_than_playing():
    motion = standing(60, (0.02, 0, 0.01))
    begin = time.process_time()
    assert len(list(draw_frames(motion, 256))) == 60
    assert 60 / (time.process_time() - begin) >= 30
