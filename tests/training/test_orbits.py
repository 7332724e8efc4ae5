"""Views of still scenes: geometry, poses, splits."""

import math

import numpy as np
import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.poses import poses_of, require_poses
from blockloom.training.clip_learning import nearest_given
from blockloom.training.clip_predictors import NextFrameGaussians
from blockloom.training.clip_stage import ClipTokens, leading_actions
from blockloom.training.orbits import (
    FIELD_OF_VIEW,
    SKY,
    Thing,
    camera,
    draw,
    orbit_clip,
    orbit_clips,
)
from blockloom.training.physics import COLORS, GROUNDS

SIZE = 64


def seen_at(frame, color, ground):
    """Mean place of the pixels nearer to a colour's hue than to ground and sky."""
    paint = np.array(COLORS[color]) / np.linalg.norm(COLORS[color])
    pixels = frame.astype(float)
    norm = np.linalg.norm(pixels, axis=-1)
    alike = (pixels @ paint) / np.maximum(norm, 1e-9)
    rows, columns = np.nonzero((alike > 0.98) & (norm > 20))
    return np.array([columns.mean() + 0.5, rows.mean() + 0.5]) / frame.shape[0]


def projected(point, pose):
    """Where a camera sees a point, in image sides."""
    x, y, z = np.linalg.inv(pose)[:3] @ np.array([*point, 1.0])
    return 0.5 + np.array([x, y]) / z / (2 * math.tan(FIELD_OF_VIEW / 2))


@pytest.mark.parametrize("angle", [0.0, 1.0, 3.5])
def test_a_ball_is_drawn_where_its_middle_is_projected(angle):
    ball = Thing("ball", (0.2, -0.1), 0.12, 0.0, "green")
    pose = camera(angle, 0.6)
    frame = draw((ball,), "navy", pose, SIZE)
    wanted = projected((0.2, -0.1, 0.12), pose)
    assert np.abs(seen_at(frame, "green", "navy") - wanted).max() < 0.01


def test_a_camera_is_a_rigid_motion_that_looks_at_the_middle():
    pose = camera(0.7, 0.5)
    assert np.allclose(pose[:3, :3].T @ pose[:3, :3], np.eye(3)) and np.isclose(
        np.linalg.det(pose[:3, :3]), 1
    )
    assert np.allclose(projected((0, 0, 0), pose), 0.5) and np.isclose(
        np.linalg.norm(pose[:3, 3]), 1
    )
    # Its y points down: what is higher in the world is higher in the picture.
    assert projected((0, 0, 0.2), pose)[1] < 0.5


def test_nearer_things_hide_farther_ones_and_boxes_have_sides():
    pose = camera(0.0, 0.3)
    near = Thing("box", (0.3, 0.0), 0.12, 0.0, "red")
    far = Thing("box", (-0.3, 0.0), 0.12, 0.0, "cyan")
    alone, both = draw((far,), "white", pose, SIZE), draw((near, far), "white", pose, SIZE)
    swapped = draw((far, near), "white", pose, SIZE)
    assert np.array_equal(both, swapped)
    assert (both != alone).any() and not (draw((near,), "white", pose, SIZE) != both).all()
    reds = {tuple(c) for c in draw((near,), "white", camera(0.6, 0.5), 128).reshape(-1, 3)
            if c[0] > 2.5 * c[1]}  # fmt: skip
    assert len(reds) >= 3  # top and two sides differ in light


def test_ground_and_sky_are_told_apart_by_the_horizon():
    frame = draw((), "white", camera(0.0, 0.2), SIZE)
    share = 0.45 + 0.55 * 0.866
    assert np.abs(frame[-1, 0] - share * np.array(GROUNDS["white"])).max() < 1
    assert frame[0, 0].tolist() == list(SKY)  # nothing shades the sky


def test_clips_depend_on_seed_and_index_only():
    one, again = orbit_clip(0, 3, num_views=4, size=16), orbit_clip(0, 3, num_views=4, size=16)
    assert np.array_equal(one.frames, again.frames) and one.caption == again.caption
    large = orbit_clip(0, 3, num_views=4, size=32)
    assert np.array_equal(large.poses, one.poses) and large.things == one.things
    small = large.frames.reshape(4, 16, 2, 16, 2, 3).astype(float).mean((2, 4))
    assert np.abs(small - one.frames).mean() < 3
    assert not np.array_equal(orbit_clip(0, 4, num_views=4, size=16).frames, one.frames)
    assert not np.array_equal(orbit_clip(1, 3, num_views=4, size=16).frames, one.frames)
    assert np.array_equal(one.poses[0], one.poses[0]) and np.allclose(one.poses[0], np.eye(4))


def test_poses_say_where_views_are_taken_from():
    """Seen from every camera, the middle of the ball lies where the frame shows the ball."""
    clip = orbit_clip(0, 17, num_views=5, size=SIZE, kind=("ball", "yellow", "navy"))
    assert len(clip.things) == 1
    seen = np.stack([seen_at(frame, "yellow", "navy") for frame in clip.frames])
    # The ball's place in the first camera's frame, from where two views see it.
    rows, right = [], []
    for pose, (u, v) in zip(clip.poses, seen, strict=True):
        inverse = np.linalg.inv(pose)
        for axis, place in ((0, u), (1, v)):
            slope = (place - 0.5) * 2 * math.tan(FIELD_OF_VIEW / 2)
            line = inverse[axis] - slope * inverse[2]
            rows.append(line[:3]), right.append(-line[3])
    point, *_ = np.linalg.lstsq(np.array(rows), np.array(right), rcond=None)
    for pose, place in zip(clip.poses, seen, strict=True):
        assert np.abs(projected(point, pose) - place).max() < 0.02
    require_poses(torch.from_numpy(clip.poses.reshape(5, 16)))
    assert np.allclose(clip.poses[0], np.eye(4))


def test_held_out_scenes_have_a_first_thing_that_training_never_shows():
    data = orbit_clips(60, 12, 0, num_views=3, size=8)
    kinds = {split: set() for split in ("train", "held_out")}
    for caption, split in zip(data.captions, data.split, strict=True):
        thing, ground = caption.split(" and ")[0].split(" on ")[0], caption.split(" on ")[1]
        kinds[split].add((thing, ground))
    assert not kinds["train"] & kinds["held_out"] and len(kinds["held_out"]) == 4
    with pytest.raises(UsageError):
        orbit_clip(0, 0, size=2)


def test_what_led_to_a_view_is_its_pose():
    data = orbit_clips(3, 0, 0, num_views=4, size=8)
    led = poses_of(leading_actions(data, 16)).reshape(3, 4, 4, 4)
    for index in range(3):
        clip = orbit_clip(0, index, num_views=4, size=8,
                          kind=_kind_of(data.captions[index]))  # fmt: skip
        assert torch.allclose(led[index].double(), torch.from_numpy(clip.poses), atol=1e-6)
    assert torch.equal(led[:, 0], torch.eye(4).expand(3, 4, 4))


def _kind_of(caption):
    _, color, shape = caption.split(" and ")[0].split(" on ")[0].split(" ")
    return shape, color, caption.split(" on ")[1]


def test_the_nearest_given_view_is_found():
    poses = torch.eye(4).repeat(1, 8, 1, 1)
    poses[0, :, 0, 3] = torch.tensor([0.0, 3.0, 1.0, 2.0, 0.2, 2.9, 1.4, 1.6])
    assert nearest_given(poses).tolist() == [[0, 1, 2, 3]]


def test_the_baseline_may_know_another_frame_than_the_one_before():
    rng = torch.Generator().manual_seed(0)
    frames = torch.randn(300, 4, 2, 3, generator=rng)
    frames[:, 3] = frames[:, 0] + 0.1 * torch.randn(300, 2, 3, generator=rng)
    frames[:, 2] = frames[:, 1] + 0.1 * torch.randn(300, 2, 3, generator=rng)
    frames[:, 1] = frames[:, 0] * 0.9
    offsets = torch.arange(301) * 4
    tokens = ClipTokens(frames.flatten(0, 1), offsets, 4)
    before = torch.tensor([0, 0, 1, 0]).expand(300, -1)
    near, last = NextFrameGaussians(tokens, before), NextFrameGaussians(tokens)
    assert near.name.endswith("nearest view before") and last.name.endswith("frame before")
    told = near.expected(frames[:, 0])
    assert (told - frames[:, 3]).square().mean() < 0.2
    assert (last.expected(frames[:, 2]) - frames[:, 3]).square().mean() > 0.6
