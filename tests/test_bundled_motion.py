"""The bundled motion model: small, documented with what was measured, and doing what it is told."""

import json

import numpy as np
import pytest

from blockloom.pipelines.motion import MotionPipeline
from blockloom.pipelines.params import bundled_models

SIZE_LIMIT = 12_000_000


@pytest.fixture(scope="module")
def pipe() -> MotionPipeline:
    pipe = MotionPipeline.from_pretrained("blockloom/motion")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_weights_are_small_and_safe():
    folder = bundled_models()["blockloom/motion"]
    weights = list(folder.rglob("*.safetensors"))
    assert len(weights) == 2
    assert sum(file.stat().st_size for file in weights) <= SIZE_LIMIT
    kinds = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".md"}


def test_the_card_states_what_eval_measured():
    folder = bundled_models()["blockloom/motion"]
    card = (folder / "README.md").read_text()
    measured = json.loads((folder / "eval.json").read_text())
    table = measured["table"]
    for metric in ("r_precision_top_1", "r_precision_top_2", "r_precision_top_3"):
        for who in ("generated", "real_held_out", "nearest_training_text"):
            found = table[metric][who]
            assert f"{found['value']:.2f}" in card, f"{metric} of {who} is not in the card"
    for who in ("generated", "nearest_training_text"):
        assert f"{table['frechet_distance'][who]['value']:.2f}" in card
    for error in ("mpjpe_mm", "mpjpe_root_aligned_mm"):
        assert f"{measured['reconstruction'][error]['value']:.1f} mm" in card
    others = table["r_precision_top_1"]["generated_in_other_words"]["value"]
    assert f"asked in other words | {others:.2f}" in card
    assert measured["evaluator"]["hash"] in card
    for word in ("HDM05", "mocap.cs.cmu.edu", "CC0", "CC BY-SA 3.0", "Apache", "CPU"):
        assert word in card


def lowest_pelvis(joints: np.ndarray) -> float:
    """How far down the hips go, against where they are at the start."""
    return float(joints[:, 0, 1].min() / joints[0, 0, 1])


def way(joints: np.ndarray) -> float:
    """Metres over the ground from the first pose to the last."""
    return float(np.linalg.norm(joints[-1, 0, [0, 2]] - joints[0, 0, [0, 2]]))


def test_bodies_do_what_the_words_say(pipe):
    texts = ["walk", "do one squat"]
    motions = pipe([[text] for text in texts], seconds=2.4, seed=0).motions
    walk, squat = (motion.joints for motion in motions)
    assert way(walk) > 1.2 > 0.5 > way(squat)
    assert lowest_pelvis(squat) < 0.75 < 0.9 < lowest_pelvis(walk)
    text = "rotate both arms backward once"
    draws = [m.joints for m in pipe(text, seconds=2.4, seed=0, num_motions_per_prompt=8).motions]
    assert max(way(arms) for arms in draws) < 0.5
    # Some draws bend the knees, too, as the card says; most stand.
    assert np.median([lowest_pelvis(arms) for arms in draws]) > 0.9
    assert min(lowest_pelvis(arms) for arms in draws) > 0.75 > lowest_pelvis(squat)
    wrists = [20, 21]  # hands go above the head
    assert all((arms[:, wrists, 1].max(0) > arms[:, 15, 1].min()).all() for arms in draws)


def test_they_do_it_told_of_somebody_too(pipe):
    texts = ["a person walks forward", "somebody does one squat", "a child sits down"]
    motions = pipe([[text] for text in texts], seconds=2.4, seed=0).motions
    walk, squat, sits = (motion.joints for motion in motions)
    assert way(walk) > 1.2 > 0.6 > max(way(squat), way(sits))
    assert max(lowest_pelvis(squat), lowest_pelvis(sits)) < 0.8 < 0.9 < lowest_pelvis(walk)


def test_bones_keep_their_lengths_and_feet_find_the_floor(pipe):
    motion = pipe("walk", seconds=4.0, seed=2).motions[0]
    parents = np.array(motion.skeleton.parents[1:])
    bones = np.linalg.norm(motion.joints[:, 1:] - motion.joints[:, parents], axis=-1)
    assert (bones.std(0) / bones.mean(0)).max() < 1e-4
    assert -0.1 < motion.joints[..., 1].min() < 0.1
    assert motion.joints.shape == (80, 22, 3) and motion.fps == 20


def test_the_stream_is_the_call_and_seeds_differ(pipe):
    whole = pipe("throw a basketball", seconds=2.0, seed=5).motions[0].joints
    parts = [
        event.data["joints"][0]
        for event in pipe.stream("throw a basketball", seconds=2.0, seed=5)
        if event.kind == "decoded"
    ]
    assert len(parts) > 3 and np.array_equal(np.concatenate(parts), whole)
    other = pipe("throw a basketball", seconds=2.0, seed=6).motions[0].joints
    assert np.abs(other - whole).max() > 0.05
