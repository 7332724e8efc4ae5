"""Frames dreamt ahead: the same world with and without, and wrong guesses taken back."""

import numpy as np
import pytest
import torch
from tests.pipelines.test_world import frames
from tests.tiny_video import tiny_video

from blockloom.core.errors import UsageError
from blockloom.pipelines.look_ahead import same_action

ACTIONS = [0, 0, 0, 1, 1, 0, None, None, 2, 2, 2]


@pytest.fixture(scope="module")
def pipe():
    return tiny_video()


def plain(pipe, actions):
    session = pipe.start(frames(), seed=4)
    return np.stack([session.step(action) for action in actions]), session


@pytest.mark.parametrize("ahead", [1, 2, 4])
def test_guessed_frames_are_the_frames_of_a_session_that_never_guessed(pipe, ahead):
    wanted, quiet = plain(pipe, ACTIONS)
    session = pipe.start(frames(), seed=4)
    got = []
    for number, action in enumerate(ACTIONS):
        got.append(session.step(action))
        assert session.look_ahead(ahead) == ahead
        assert session.num_frames == 4 + number + 1
    assert np.array_equal(np.stack(got), wanted)
    # Actions repeat at 2, 2, 1, 1 and 2 places after a change; the first step had no guess.
    assert session.guesses == (6, 4)
    for name, part in quiet.snapshot().items():
        assert torch.equal(session.snapshot()[name], part), name


def test_forks_snapshots_and_shown_frames_do_not_see_guesses(pipe):
    wanted, _ = plain(pipe, [1, 1, 1])
    session = pipe.start(frames(), seed=4)
    session.step(1)
    session.look_ahead(3)
    fork = session.fork()
    assert np.array_equal(fork.step(1), wanted[1]) and np.array_equal(session.step(1), wanted[1])
    state = session.snapshot()
    session.look_ahead(2)
    session.restore(state)
    assert np.array_equal(session.step(1), wanted[2])
    shown, unseen = pipe.start(seed=1), pipe.start(seed=1)
    shown.look_ahead(2)
    for each in (shown, unseen):
        each.show(frames())
    assert np.array_equal(shown.step(0), unseen.step(0))


def test_a_wrong_action_leaves_the_guesses_taken_back(pipe):
    session = pipe.start(frames(), seed=4)
    session.step(0)
    session.look_ahead(2)
    with pytest.raises(UsageError, match="got 9"):
        session.step(9)
    assert np.array_equal(session.step(0), plain(pipe, [0, 0])[0][1])
    with pytest.raises(UsageError, match="count"):
        session.look_ahead(0)


def test_actions_are_the_same_by_value():
    assert same_action([0.0, 1.0], np.array([0.0, 1.0])) and same_action(None, None)
    assert not same_action(None, 0) and not same_action([0.0, 1.0], [0.0, 0.5])
