"""Talking mouths made by rule: shapes, coarticulation, speakers, sounds, held-out sentences."""

import numpy as np
import pytest

from blockloom.core.errors import UsageError
from blockloom.training.visemes import (
    NAMES,
    NUM_POINTS,
    NUM_SOUNDS,
    SPEAKERS,
    lip_points,
    talking_clip,
    talking_clips,
    unit_sounds,
)


def test_an_open_jaw_parts_the_lips_and_closed_lips_stay_closed():
    points = lip_points(
        np.array([[1.0, 0, 0, 0], [1.0, 0, 0, 1.0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]])
    )
    assert points.shape == (4, NUM_POINTS, 3)
    gap = points[:, 1:3, 1].mean(1) - points[:, 5:7, 1].mean(1)  # upper lip over lower lip
    assert gap[0] == pytest.approx(2 * np.cos(np.pi / 8))
    assert gap[1] < 0  # pressed together
    width = points[:, 0, 0] - points[:, 3, 0]
    assert width[2] < 0 < width[3] and points[2, :, 2].min() > 0.4  # rounded lips come forward


def test_a_unit_looks_different_among_different_neighbours():
    clips = [talking_clip(0, index, 400) for index in range(0, 40, 4)]  # one speaker
    middles = [
        clip.points[round(middle)]
        for clip in clips
        for name, middle in clip.units
        if name == "k" and middle < 399
    ]
    lips = np.stack(middles)[:, 5, 1]
    assert len(middles) > 30 and lips.std() > 0.05
    # A closure pulls hard: its lips are where they should be, whoever stands beside it.
    closed = np.array(
        [c.points[round(m)] for c in clips for n, m in c.units if n == "m" and m < 399]
    )[:, 5, 1]
    assert closed.std() < 0.5 * lips.std()


def test_speakers_move_differently_and_sound_alike():
    spread = {}
    for index, name in enumerate(SPEAKERS):
        clip = talking_clip(5, index, 600)
        assert clip.speaker == name
        spread[name] = float(np.ptp(clip.points[:, 5, 1]))
        loud = np.linalg.norm(clip.sounds, axis=1)
        assert 0.3 < loud.mean() < 1.0
    assert spread["cho"] > 1.5 * spread["ben"]
    assert np.allclose(np.linalg.norm(unit_sounds(), axis=1)[NAMES.index("a")], 1.0)


def test_clips_depend_on_their_seed_alone_and_are_told_what_is_heard():
    data = talking_clips(3, 2, 7, num_frames=50)
    again = talking_clips(8, 1, 7, num_frames=50)
    assert data.split == ["train"] * 3 + ["held_out"] * 2 and data.fps == 30.0
    assert np.array_equal(data.frames[:200], again.frames[:200])
    assert not np.array_equal(data.frames, talking_clips(3, 2, 8, num_frames=50).frames)
    assert data.captions[:2] == ["speaker ada", "speaker ben"]
    clip = talking_clip(7, 1, 50)
    assert data.clip_actions(1).shape == (50, NUM_SOUNDS)
    assert np.allclose(data.clip_actions(1)[:-1], clip.sounds[1:], atol=1e-6)
    assert not data.clip_actions(1)[-1].any()
    with pytest.raises(UsageError):
        talking_clips(0, 1)
