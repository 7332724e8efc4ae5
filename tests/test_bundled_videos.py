"""The bundled video models: small, documented with what was measured, and doing what they say."""

import json

import numpy as np
import pytest
import torch

from blockloom.pipelines.params import bundled_models
from blockloom.pipelines.video import VideoPipeline
from blockloom.pipelines.world import WorldPipeline
from blockloom.training.turning import turn_angles

SIZE_LIMIT = {"blockloom/world": 12_000_000, "blockloom/clips": 12_100_000}


@pytest.fixture(scope="module")
def world() -> WorldPipeline:
    return WorldPipeline.from_pretrained("blockloom/world")


@pytest.mark.parametrize("name", SIZE_LIMIT)
def test_weights_are_small_and_safe(name):
    folder = bundled_models()[name]
    weights = list(folder.rglob("*.safetensors"))
    assert len(weights) == 2
    assert sum(file.stat().st_size for file in weights) <= SIZE_LIMIT[name]
    kinds = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".md", ".npz"}


@pytest.mark.parametrize("name", SIZE_LIMIT)
def test_the_card_states_what_eval_measured(name):
    folder = bundled_models()[name]
    card = (folder / "README.md").read_text()
    measured = json.loads((folder / "eval.json").read_text())
    for side in ("model", "copy_last_frame", "mean_training_frame"):
        for figure in measured["horizons"][side]["psnr_db"]:
            assert f"{figure:.1f}" in card, f"{side} {figure:.1f} is measured but not in the card"
    for ratio in ("sharpness_ratio", "motion_ratio"):
        for figure in measured["horizons"]["model"][ratio]:
            assert f"{figure:.2f}" in card
    assert "CPU" in card and "licence" in card.lower()


def test_steering_turns_the_world_both_ways_from_every_start(world):
    starts = world.starts()
    assert len(starts) == 4
    for frames, actions in starts:
        ends = []
        for wheel in (-1.0, 1.0):
            session = world.start(frames, actions=list(actions), seed=3)
            drawn = np.concatenate([session.step([wheel, 0.0, 0.0]) for _ in range(8)])
            turns = turn_angles(torch.from_numpy(drawn[2:-1]), torch.from_numpy(drawn[3:]))
            ends.append(float(turns.sum()))
        assert ends[0] < -9 and ends[1] > 9  # degrees, over five transitions


def test_the_same_session_gives_the_same_frames(world):
    frames, actions = world.starts()[0]
    one, two = (world.start(frames, actions=list(actions), seed=5) for _ in range(2))
    first = np.concatenate([one.step([0.2, 0.1, 0.0]) for _ in range(3)])
    assert np.array_equal(first, np.concatenate([two.step([0.2, 0.1, 0.0]) for _ in range(3)]))
    assert np.abs(first[1:].astype(int) - first[:-1]).mean() > 0.5  # the road moves


def test_clips_go_on_from_words_and_know_light_from_dark():
    pipe = VideoPipeline.from_pretrained("blockloom/clips")
    pipe.set_progress_bar_config(disable=True)
    dark, light = (
        pipe(prompt=f"a fox, walk, {ground} background", num_frames=4, seed=1).frames[0]
        for ground in ("dark", "light")
    )
    assert dark.shape == (4, 64, 64, 3)
    assert dark.mean() + 60 < light.mean()
