"""Learning checks of motion: what a drawn motion shows, and that a short run learns."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from blockloom.core.plan import build_plan
from blockloom.core.recipe import load_recipe
from blockloom.training import motion_run
from blockloom.training.clip_learning import baseline_of
from blockloom.training.clip_predictors import FrameCodes, NextFrameCodes
from blockloom.training.clip_stage import ClipTokens
from blockloom.training.motion_learning import (
    _Traits,
    motion_learning_check,
    procedural_clips,
)
from blockloom.training.motion_run import trained_tokenizer

SMALL = (
    "tokenizer.width=16",
    "tokenizer.codebook_size=16",
    "backbone.dim=32",
    "backbone.layers=1",
    "backbone.heads=2",
)


@pytest.fixture(scope="module")
def clips():
    return procedural_clips(50, 25, 3)


def test_motions_are_made_once_and_held_out_ones_are_others(clips):
    assert clips is procedural_clips(50, 25, 3)
    train, test = clips.only("train"), clips.only("test")
    assert (len(train), len(test)) == (50, 25)
    assert set(train.captions) == set(test.captions) and len(set(test.captions)) == 25
    same = [
        a == b and np.array_equal(train.clip(i)[:8], test.clip(k)[:8])
        for i, a in enumerate(train.captions)
        for k, b in enumerate(test.captions)
    ]
    assert not any(same)


class Plain:
    """Stands in for a tokenizer: all that traits read of one."""

    feature_mean = torch.zeros(263, 1)
    feature_std = torch.ones(263, 1)


def test_real_motions_are_nearest_to_their_own_caption(clips):
    tokenizer = Plain()
    train = torch.from_numpy(clips.only("train").frames)
    tokenizer.feature_mean, tokenizer.feature_std = train.mean(0)[:, None], train.std(0)[:, None]
    tokenizer.feature_std = tokenizer.feature_std.clamp_min(0.01)
    traits, names = _Traits(tokenizer), sorted(set(clips.captions))
    centres = traits.centres(clips.only("train"), names)
    held_out = clips.only("test")
    truth = np.array([names.index(text) for text in held_out.captions])
    real = [held_out.clip(i) for i in range(len(held_out))]
    assert (traits.nearest(real, centres) == truth).mean() >= 0.9
    # A motion of another caption is not taken for it.
    moved = [*real[1:], real[0]]
    assert (traits.nearest(moved, centres) == truth).mean() <= 0.1


def test_a_tokenizer_is_trained_once_for_all_recipes_of_its_kind(clips, monkeypatch):
    monkeypatch.setattr(motion_run, "_TRAINED", {})
    first = trained_tokenizer(load_recipe("motion/t2m_gpt", list(SMALL)), clips, 2, 0)
    assert trained_tokenizer(load_recipe("motion/mmm", list(SMALL)), clips, 2, 0) is first
    assert not first.training
    assert trained_tokenizer(load_recipe("motion/mmm", list(SMALL)), clips, 3, 0) is not first
    other = replace(clips, split=clips.split[::-1])  # what was held out, and what was not
    assert trained_tokenizer(load_recipe("motion/mmm", list(SMALL)), other, 2, 0) is not first


class Stage:
    """The parts of a stage that a baseline reads."""

    def __init__(self, model, plan):
        self.model, self._plan = model, plan
        codes = torch.randint(7, (40, 1, 1), generator=torch.Generator().manual_seed(0))
        self.values = ClipTokens(codes, torch.tensor([0, 20, 40]), 10)
        self.recipe = model.recipe

    def plan(self, generator):
        return (self._plan, None, None)


@pytest.mark.parametrize(
    ("name", "kind"), [("motion/t2m_gpt", NextFrameCodes), ("motion/bad_ordered", FrameCodes)]
)
def test_the_baseline_knows_the_frame_before_where_it_comes_before(tiny, name, kind):
    model = tiny.model(name)
    assert type(baseline_of(Stage(model, build_plan(model.recipe, 1, 1)))) is kind


def test_a_short_run_beats_guessing(monkeypatch):
    monkeypatch.setattr(motion_run, "_TRAINED", {})
    recipe = load_recipe("motion/mmm", [*SMALL, "train.lr=0.01"])
    kept = {}
    report = motion_learning_check(
        recipe, 25, tokenizer_steps=10, motions=50, held_out=25, draw=True, keep=kept
    )
    assert report.value < report.baseline
    assert report.chance == 1 / 25 and report.drawn == 25
    assert len(kept["motions"]) == 25 and all(np.isfinite(m).all() for m in kept["motions"])
    assert report.spec().budget.startswith("25 steps x 16")
    assert "drawn motions are nearest to their caption (chance 4%" in report.spec().drawn
