"""Turn angles between frames: known motions are found, whatever else is in the picture."""

import math

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError, UsageError
from blockloom.training.clips import ClipDataset
from blockloom.training.steering import Steering, real_turns, steer_report
from blockloom.training.turning import rigid_fit, turn_angles

SIDE, PIVOT = 64, (0.5, 0.8)
STEERING = Steering((-1.0, 0.0), (1.0, 0.0), (0.0, 0.0), PIVOT)


def ground(x, y, seed=0):
    """Smooth colours of an endless ground at places in pixels."""
    rng = np.random.default_rng(seed)
    waves = rng.uniform(-0.25, 0.25, (24, 2))
    phase, part = rng.uniform(0, 2 * np.pi, (24, 3)), rng.uniform(0.3, 1.0, (24, 3))
    flow = (waves[:, 0] * x[..., None] + waves[:, 1] * y[..., None])[..., None]
    return 128 + 20 * (part * np.sin(flow + phase)).sum(-2)


def picture(heading, x, y, seed=0):
    """What is seen from above by somebody at (x, y) who looks that many degrees to the right."""
    line = np.arange(SIDE) + 0.5
    across, down = np.meshgrid(line - PIVOT[0] * SIDE, line - PIVOT[1] * SIDE)
    cos, sin = math.cos(math.radians(heading)), math.sin(math.radians(heading))
    colors = ground(x + cos * across - sin * down, y + sin * across + cos * down, seed)
    frame = colors.clip(0, 255).round().astype(np.uint8)
    middle = int(PIVOT[1] * SIDE), int(PIVOT[0] * SIDE)
    frame[middle[0] - 3 : middle[0] + 3, middle[1] - 1 : middle[1] + 1] = (204, 0, 0)
    return frame


def drive(turns, speed=3.0, seed=0):
    """Frames [turns + 1, ...] of a drive that turns by so many degrees per frame."""
    heading, x, y, frames = 20.0, 0.0, 0.0, []
    for turn in [*turns, 0.0]:
        frames.append(picture(heading, x, y, seed))
        heading += turn
        x += speed * math.sin(math.radians(heading))
        y -= speed * math.cos(math.radians(heading))
    return torch.from_numpy(np.stack(frames))


def test_turns_of_a_drive_are_found():
    turns = [0.0, 2.0, -2.0, 5.0, -9.0, 13.0, 0.5]
    frames = drive(turns)
    found = rigid_fit(frames[:-1], frames[1:], PIVOT)
    assert found[:, 0].tolist() == pytest.approx(turns, abs=0.15)
    # The ground comes towards the driver by the speed.
    assert found[:, 1:].norm(dim=1).tolist() == pytest.approx([3.0] * 7, abs=0.2)
    assert float(found[0, 2]) == pytest.approx(-3.0, abs=0.1)


def test_something_that_moves_on_its_own_is_not_mistaken_for_a_turn():
    frames = drive([4.0, -4.0])
    frames[0, 5:15, 5:15] = 255
    frames[1, 5:15, 45:55] = 255
    assert turn_angles(frames[:2], frames[1:], PIVOT).tolist() == pytest.approx([4, -4], abs=0.3)


def test_a_pair_does_not_depend_on_its_neighbours():
    frames = drive([3.0, -6.0, 1.0, 8.0])
    together = turn_angles(frames[:-1], frames[1:], PIVOT)
    alone = [turn_angles(frames[i : i + 1], frames[i + 1 : i + 2], PIVOT) for i in range(4)]
    assert torch.cat(alone).tolist() == pytest.approx(together.tolist(), abs=1e-3)


def test_bad_pairs_are_refused():
    frames = torch.zeros(2, 16, 16, 3, dtype=torch.uint8)
    with pytest.raises(DataError, match="needed twice"):
        turn_angles(frames, frames[:1])
    with pytest.raises(UsageError, match=r"pivot y.*allowed \[0.0, 1.0\]"):
        turn_angles(frames, frames, (0.5, 1.5))


def test_the_estimator_is_tried_on_real_frames_whose_wheel_acts_late():
    rng = np.random.default_rng(1)
    steer = np.repeat(rng.choice([-0.8, 0.0, 0.8], 8), 5).astype(np.float32)
    turns = 4.0 * np.concatenate([[0, 0], steer[:-2]])  # two frames late
    frames = drive(turns[:-1]).numpy()
    actions = np.stack([steer, np.zeros_like(steer)], 1)
    clips = ClipDataset(frames, np.array([0, len(frames)]), [""], ["test"], 10.0, actions)
    report = real_turns(clips, STEERING)
    best = max(report["by_lag"], key=lambda line: line["correlation"])
    assert best["frames_late"] == 2 and best["correlation"] > 0.99
    assert report["right_sign"] == 1.0 and report["right_sign_of"] > 10
    assert report["calm_median_degrees"] < 0.2 and report["calm_p95_degrees"] < 0.5


def test_how_far_an_action_steers_lies_between_left_and_right():
    actions = torch.tensor([[-1.0, 0.0], [1.0, 0.5], [0.0, 1.0], [0.25, 0.0]])
    assert STEERING.amount(actions).tolist() == [-1.0, 1.0, 0.0, 0.25]
    keys = Steering((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    three = torch.eye(3)
    assert keys.amount(three)[0] < 0 < keys.amount(three)[1]


def test_the_report_counts_from_the_third_transition_on():
    flat = torch.zeros(4, 6)
    left, right, straight = flat - 2, flat + 3, flat + 0.5
    left[0, :2], left[1] = 100.0, 1.0  # the first two do not count; one goes the wrong way
    straight[0] = 1.5
    report = steer_report({"left": left, "straight": straight, "right": right})
    assert report["left"]["right_sign"] == 0.75 and report["left"]["right_sign_of"] == 4
    assert report["right"]["right_sign"] == 1.0
    assert report["right"]["degrees_per_frame_at_end"] == 3.0
    assert report["left"]["degrees_per_frame"] == pytest.approx(-1.25)
    assert report["straight"]["within_bound"] == 0.75
    assert report["straight"]["median_absolute_degrees_per_frame_at_end"] == 0.5
    assert report["straight"]["p95_absolute_degrees_per_frame_at_end"] == pytest.approx(1.35)
    assert report["right_of_left"]["share"] == 1.0
