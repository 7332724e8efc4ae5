"""The BabyAI simulator gives recorded episodes again: rooms, instructions, frames, rewards."""

import hashlib
import sys

import numpy as np
import pytest

from blockloom.core.errors import DataError, UsageError
from blockloom.training.acting import begin_recorded, evaluate_acting, read_episodes
from blockloom.training.babyai import BabyAISimulator

# pygame, which Minigrid imports, asks for resources in a way that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:pkg_resources is deprecated")
NAME = "video/par"
GO_TO = "BabyAI-GoToLocal-v0"
# An episode of the recorded data set, seed 3: its first frame, and the six moves of the expert.
FRAME = "d991db6260d3d6aebb3c4e57364d2197329d6a88a4e23f4b7e717132c4f15fd5"
EXPERT = (1, 2, 2, 0, 2, 2)


@pytest.fixture
def room():
    pytest.importorskip("minigrid")
    room = BabyAISimulator(GO_TO)
    yield room
    room.close()


def test_a_seed_gives_the_same_room_and_pixels(room, capsys):
    first = room.reset(3)
    assert (room.instruction, room.max_steps) == ("go to the red key", 64)
    assert first.shape == (64, 64, 3) and first.dtype == np.uint8
    other = BabyAISimulator(GO_TO)
    assert np.array_equal(other.reset(3), first)
    assert not np.array_equal(other.reset(4), first)
    # Rooms that are thrown away while one is made are nobody's business.
    assert capsys.readouterr().out == ""
    assert FRAME == hashlib.sha256(first.tobytes()).hexdigest()


def test_turning_four_times_comes_back_and_steps_run_out(room):
    first = room.reset(3)
    frames = [room.step(0)[0] for _ in range(4)]
    assert np.array_equal(frames[-1], first)
    assert all(not np.array_equal(frame, first) for frame in frames[:-1])
    over = [room.step(0) for _ in range(60)]
    assert [is_over for _, _, is_over in over] == [False] * 59 + [True]
    assert all(reward == 0 for _, reward, _ in over)


def test_following_the_instruction_is_rewarded(room):
    room.reset(3)
    outcomes = [room.step(action) for action in EXPERT]
    assert [is_over for _, _, is_over in outcomes] == [False] * (len(EXPERT) - 1) + [True]
    assert outcomes[-1][1] == pytest.approx(0.915625)


def test_odd_actions_and_names_are_refused(room):
    room.reset(3)
    with pytest.raises(UsageError, match="allowed 0 to 6"):
        room.step(7)
    with pytest.raises(UsageError, match="unknown simulator; got BabyAI-Nowhere-v0"):
        BabyAISimulator("BabyAI-Nowhere-v0")


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(UsageError, match=r"not installed; try pip install blockloom\[babyai\]"):
        BabyAISimulator(GO_TO)


def recorded(path, mission="go to the red key"):
    first = BabyAISimulator(GO_TO).reset(3)
    np.savez(
        path, env=np.array([GO_TO] * 2), seed=np.array([2, 3]), split=np.array(["train", "test"]),
        mission=np.array(["go to the grey ball", mission]), offsets=np.array([0, 1, 2]),
        frames=np.stack([first, first]), actions=np.array([2, -1], np.int8),
    )  # fmt: skip
    return path


def test_recorded_episodes_are_begun_anew(tmp_path):
    pytest.importorskip("minigrid")
    episodes = read_episodes(recorded(tmp_path / "clips.npz"))
    assert episodes.chosen("test", None, 0) == [1] and episodes.actions.tolist()[:4] == [0, 0, 1, 0]
    room, frame = begin_recorded(episodes, 1)
    assert room.instruction == "go to the red key" and np.array_equal(frame, episodes.first[1])
    other = read_episodes(recorded(tmp_path / "other.npz", "go to the moon"))
    with pytest.raises(DataError, match="recorded with 'go to the moon', the simulator says"):
        begin_recorded(other, 1)


def test_files_that_hold_no_episodes_are_refused(tmp_path, tiny):
    np.savez(tmp_path / "clips.npz", frames=np.zeros((1, 8, 8, 3), np.uint8))
    with pytest.raises(DataError, match="no array 'env'"):
        read_episodes(tmp_path / "clips.npz")
    (tmp_path / "text.npz").write_text("nothing")
    with pytest.raises(DataError, match=r"text\.npz is no \.npz of recorded episodes"):
        read_episodes(tmp_path / "text.npz")
    with pytest.raises(UsageError, match=r"acting\.codes = 4; the BabyAI simulator takes 7"):
        evaluate_acting(tiny.model(NAME), None, tmp_path / "clips.npz")
