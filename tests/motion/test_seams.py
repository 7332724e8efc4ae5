"""Seams: made frames flow out of given ones, and a piece arrives where the next begins."""

import math

import numpy as np
import torch

from blockloom.motion.clip import Motion
from blockloom.motion.features import Start, advance, human_features, recover, start_of
from blockloom.motion.seams import REACH, ROOT, arriving, border, fading, take_out
from blockloom.motion.skeleton import HUMAN22


def piece(frames=24, seed=0):
    """Features of a body that goes and turns at random."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(frames, 263, generator=generator, dtype=torch.float64) * 0.02
    rows[:, 2] += 0.04
    return rows


def test_weights_fall_from_one_to_nothing_and_go_on_over_pieces():
    weights = fading(0, 30)
    assert weights[0] > 0.97 and (weights.diff() <= 0).all()
    assert weights[REACH - 1] > 0 and not weights[REACH:].any()
    assert torch.equal(torch.cat([fading(0, 4), fading(4, 26)]), weights)


def test_what_goes_on_as_it_was_lacks_nothing():
    time = torch.arange(10, dtype=torch.float64)[:, None]
    rows = piece(1) + time * piece(1, 1)
    rows[:, :ROOT] = rows[0, :ROOT]  # the root's turn and way are paces, the same throughout
    for given in (1, 2, 6):
        lacking = border(rows[:given], rows[given:])
        if given > 1:
            assert lacking.error.abs().max() < 1e-12 and lacking.pace.abs().max() < 1e-12
        else:  # one frame tells no pace
            assert torch.allclose(lacking.error[ROOT:], rows[0, ROOT:] - rows[1, ROOT:])
            assert not lacking.pace.any()
    assert not border(rows[:4], rows[4:5]).pace.any()


def test_place_and_pace_agree_at_a_border_and_far_frames_stay():
    given, made = piece(6, 1), piece(seed=2)
    mended = take_out(made, border(given, made))
    both = torch.cat([given, mended])
    pace = both.diff(dim=0)
    assert torch.allclose(pace[5, ROOT:], pace[4, ROOT:], atol=1e-12)  # the step over the border
    first = fading(1, 1) * (border(given, made).error + border(given, made).pace)
    assert torch.allclose(mended[1], made[1] + first, atol=1e-12)
    assert (pace[6, ROOT:] - pace[4, ROOT:]).abs().max() < 0.1 * (made[1] - made[0]).abs().max()
    assert torch.allclose(mended[0, :ROOT], given[-1, :ROOT], atol=1e-12)
    assert torch.equal(mended[REACH:], made[REACH:])
    lacking = border(given, made)
    chunks = [take_out(made[k : k + 4], lacking, k) for k in range(0, 24, 4)]
    assert torch.equal(torch.cat(chunks), mended)


def test_a_piece_arrives_at_its_goal():
    rows, start = piece(), Start(1.0, -2.0, 0.7)
    for goal in (Start(2.0, 1.0, -2.9), Start(1.0, -2.0, 0.7), Start(0.0, 0.0, 0.7 + 6.4)):
        bent, begin, shift = arriving(rows, start, goal)
        end = advance(bent, begin)
        assert begin == start and torch.equal(bent[:, 1:], rows[:, 1:])
        assert abs(math.remainder(end.heading - goal.heading, 2 * math.pi)) < 1e-9
        # The shift starts at nothing, ends just short of what is missing, and never jerks.
        missing = np.array([goal.x - end.x, 0, goal.z - end.z])
        assert not shift[0].any() and not shift[:, 1].any()
        assert np.abs(shift[-1] - missing).max() < 0.01 * np.abs(missing).max() + 1e-9
        assert np.abs(np.diff(shift, 2, axis=0)).max() < 0.02 * np.abs(missing).max() + 1e-7


def test_a_piece_that_may_begin_anywhere_is_only_placed():
    rows, goal = piece(), Start(2.0, 1.0, -2.9)
    same, begin, shift = arriving(rows, None, goal)
    assert same is rows and not shift.any()
    assert np.allclose(advance(same, begin), goal, atol=1e-9)


def test_where_a_clip_stands_is_where_its_features_are_recovered():
    joints = recover(piece(40), Start(1.0, 2.0, 0.5))
    pose = torch.from_numpy(HUMAN22.rest_joints())
    walk = Motion((joints[:, :1] * torch.tensor([1.0, 0, 1]) + pose).float().numpy(), HUMAN22)
    rows = torch.from_numpy(human_features(walk))
    for frame in (0, 7, 30):
        again = recover(rows[frame:], start_of(walk, frame))
        assert np.abs(again.numpy() - walk.joints[frame:-1]).max() < 1e-4
