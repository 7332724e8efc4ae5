"""Worlds: sessions that are steered, forked, saved and gone on with."""

import numpy as np
import pytest
from tests.tiny_video import tiny_video

from blockloom.core.errors import DataError, UsageError
from blockloom.pipelines.auto import AutoPipeline
from blockloom.pipelines.world import WorldPipeline, action_vector


@pytest.fixture(scope="module")
def pipe():
    return tiny_video()


def frames(count=4, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)


def play(session, actions):
    return np.concatenate([session.step(a) for a in actions])


def test_a_session_is_a_function_of_seed_frames_and_actions(pipe):
    first = play(pipe.start(frames(), seed=1), [0, 1, 2, None])
    assert first.shape == (4, 16, 16, 3) and first.dtype == np.uint8
    assert np.array_equal(first, play(pipe.start(frames(), seed=1), [0, 1, 2, None]))
    for other in (
        play(pipe.start(frames(), seed=2), [0, 1, 2, None]),
        play(pipe.start(frames(seed=5), seed=1), [0, 1, 2, None]),
        play(pipe.start(frames(), seed=1, prompt="a track"), [0, 1, 2, None]),
    ):
        assert not np.array_equal(first[0], other[0])
    turned = play(pipe.start(frames(), seed=1), [0, 2, 2, None])
    assert np.array_equal(first[0], turned[0]) and not np.array_equal(first[1], turned[1])


def test_actions_are_numbers_or_the_number_of_one(pipe):
    one = play(pipe.start(seed=3), [1, 2])
    same = play(pipe.start(seed=3), [[0.0, 1.0, 0.0], np.array([0, 0, 1])])
    assert np.array_equal(one, same)
    assert np.array_equal(play(pipe.start(seed=3), [None]), play(pipe.start(seed=3), [[0, 0, 0]]))


@pytest.mark.parametrize(
    ("action", "match"),
    [
        (3, "got 3; allowed 0 to 2; try 2"),
        (-1, "got -1; allowed 0 to 2; try 0"),
        ([1.0, 2.0], "3 numbers"),
        ([1.0, float("nan"), 0.0], "finite"),
        ("left", "3 numbers"),
    ],
)
def test_unknown_actions_are_refused_and_the_session_lives(pipe, action, match):
    session = pipe.start(seed=3)
    before = session.fork()
    with pytest.raises(UsageError, match=match):
        session.step(action)
    assert np.array_equal(session.step(0), before.step(0))


def test_action_vector():
    assert action_vector(1, 3).tolist() == [0.0, 1.0, 0.0]
    assert action_vector([0.5, -1, 2], 3).tolist() == [0.5, -1.0, 2.0]


def test_shown_frames_come_with_what_led_to_them(pipe):
    idle, told = (pipe.start(frames(), seed=1, actions=a) for a in (None, [0, 1, 2, 1]))
    for session in (idle, told):
        session.step(0)
    keys = [s.snapshot()["cache.keys.0"] for s in (idle, told)]
    assert float((keys[0] - keys[1]).abs().max()) > 1e-2
    for given, match in (
        (frames()[:, :8], r"legal|uint8 \(frames, 16, 16, 3\)"),
        (frames().astype(np.float32), "float32"),
        (frames(0), "clip has 0 frames"),
    ):
        with pytest.raises(ValueError, match=match):
            pipe.start(given)
    with pytest.raises(UsageError, match="number of actions"):
        pipe.start(frames(), actions=[0])


def test_a_fork_goes_its_own_way(pipe):
    session = pipe.start(frames(), seed=1)
    play(session, [0, 1])
    fork = session.fork()
    assert np.array_equal(play(session, [2, 2]), play(fork, [2, 2]))
    left, right = session.step(0), fork.step(1)
    assert not np.array_equal(left, right) and session.num_frames == fork.num_frames == 9


def test_a_saved_session_goes_on_bit_for_bit(pipe, tmp_path):
    session = pipe.start(frames(), seed=1, prompt="a track", num_inference_steps=3)
    play(session, [0, 1, 2, 0, 1])
    file = session.save(tmp_path / "game.safetensors")
    assert [f.name for f in tmp_path.iterdir()] == ["game.safetensors"]
    again = pipe.resume(file)
    assert again.prompt == "a track" and again.num_frames == session.num_frames
    assert np.array_equal(play(session, [2, 1, 0]), play(again, [2, 1, 0]))
    session.set_prompt("a forest")
    session.save(file)
    assert pipe.resume(file).prompt == "a forest"


def test_files_that_are_no_session_give_one_line(pipe, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}garbage")
    other = tiny_video("backbone.dim=48", "backbone.heads=3").start(seed=0)
    other.step(0)
    foreign = other.save(tmp_path / "other.safetensors")
    for path in (bad, foreign, tmp_path / "missing.safetensors"):
        with pytest.raises(DataError, match=f"{path.name} is no session of this model") as found:
            pipe.resume(path)
        assert "\n" not in str(found.value)


def test_a_world_without_actions_says_so():
    pipe = tiny_video("condition.actions=0")
    session = pipe.start(seed=0)
    assert session.step().shape == (1, 16, 16, 3)
    with pytest.raises(UsageError, match="takes no actions"):
        session.step(1)


def test_a_saved_pipeline_dreams_the_same(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "world")
    again = AutoPipeline.from_pretrained(str(tmp_path / "world"))
    assert type(again) is WorldPipeline
    assert np.array_equal(play(pipe.start(seed=4), [0, 1]), play(again.start(seed=4), [0, 1]))


def test_a_folder_brings_its_starts(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert pipe.starts() == WorldPipeline.from_pretrained(str(tmp_path)).starts() == []
    told = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    np.savez_compressed(tmp_path / "starts.npz", frames=frames()[None], actions=told[None])
    again = WorldPipeline.from_pretrained(str(tmp_path))
    ((given, actions),) = again.starts()
    assert np.array_equal(given, frames()) and np.array_equal(actions, told)
    first = again.start(given, actions=list(actions), seed=1).step(0)
    assert np.array_equal(first, pipe.start(frames(), actions=[0, 1, 2, 0], seed=1).step(0))
