"""Learning checks of recipes that move an arm: short runs, odd recipes, and who moves it."""

import numpy as np
import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.recipe import list_recipes, load_recipe
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.control_learning import (
    ControlReport,
    control_learning_check,
    controls,
    require_arm,
)
from blockloom.training.movers import ChunkMover, StreamMover
from blockloom.training.reaching import Arms, reach
from blockloom.training.run import initial_model

SMALL = ("backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16",
         "text.buckets=32", "head.width=16", "head.steps=2")  # fmt: skip


def random_model(name, seed=0):
    """Build a model whose every weight counts, and its tokenizer."""
    recipe = load_recipe(name, list(SMALL))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
        model = initial_model(recipe, tokenizer, seed).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model, tokenizer


def test_recipes_that_move_something_are_told_by_what_they_say():
    found = {name for name in list_recipes() if controls(load_recipe(name))}
    assert found == {"motion/control", "motion/star"}
    with pytest.raises(UsageError, match="motion/mogo moves nothing"):
        require_arm(load_recipe("motion/mogo"))
    with pytest.raises(UsageError, match=r"acting\.numbers = 3; the arm takes 2"):
        require_arm(load_recipe("motion/control", ["acting.numbers=3"]))
    with pytest.raises(UsageError, match=r"condition\.actions = 5; the arm is observed by 12"):
        require_arm(load_recipe("motion/star", ["condition.actions=5"]))


def test_models_move_arms_and_arms_do_not_notice_each_other():
    for name, kind in (("motion/control", StreamMover), ("motion/star", ChunkMover)):
        model, tokenizer = random_model(name)
        together = reach([1, 2, 3], kind(model, tokenizer, 0), steps=9)
        assert np.isfinite(together).all()
        alone = reach([1], kind(model, tokenizer, 0), steps=9)
        assert alone[0] == pytest.approx(together[0], abs=1e-6)
        again = reach([1, 2, 3], kind(model, tokenizer, 0), steps=9)
        assert np.array_equal(together, again)
        assert not np.allclose(together, reach([1, 2, 3], kind(*random_model(name, 1), 0), steps=9))


def test_what_is_imagined_is_replaced_by_what_is_observed():
    model, tokenizer = random_model("motion/control")
    dreamer, plain = (
        StreamMover(model, tokenizer, 0, imagines=True),
        StreamMover(model, tokenizer, 0),
    )
    arms = Arms([4, 5])
    for mover in (dreamer, plain):
        mover.begin(arms)
    for step in range(4):
        seen = arms.observe()
        for mover in (dreamer, plain):
            mover.act(seen)
        streams = [m._stream.live._rollout for m in (dreamer, plain)]
        source = streams[0].plan.sources(2 * step)
        assert torch.equal(streams[0].values[:, source], streams[1].values[:, source])
        arms.step(np.full((2, 2), 0.5))
    assert dreamer.imagined[0] == 2 * 3 and (dreamer.imagined[1:] > 0).all()
    assert plain.imagined.tolist() == [0, 0, 0]


def test_a_chunk_is_drawn_when_the_one_before_is_done():
    model, tokenizer = random_model("motion/star")
    mover, arms = ChunkMover(model, tokenizer, 0), Arms([4])
    mover.begin(arms)
    blocks = []
    for _ in range(9):
        torques = mover.act(arms.observe())
        assert torques.shape == (1, 2)
        arms.step(torques)
        blocks.append(mover._live.block)
    assert blocks == [2] * 4 + [3] * 4 + [4]  # a chunk of rest came first


def test_figures_are_shaped_as_the_section_of_a_recipe():
    ends = {"model": np.array([0.01, 0.2]), "expert": np.zeros(2), "none": np.ones(2)}
    learns = ControlReport("m", 2.0, 1.0, "5 steps x 2, 1 s", ends, (0.125, 0.5)).spec()
    assert (learns.baseline, learns.value) == (2.0, 1.0)
    assert learns.drawn == (
        "acting: 50 % of 2 targets reached (expert 100 %, none 0 %); squared error of imagined "
        "next observations 0.1250 (the one before kept 0.5000)"
    )


@pytest.mark.slow
def test_short_runs_beat_the_linear_predictor():
    settings = {"episodes": 256, "held_out": 32}
    acted = control_learning_check(load_recipe("motion/control"), 120, **settings)
    assert acted.value < acted.baseline - 0.2
    assert acted.reached("expert") == 1.0 and acted.reached("none") < 0.2
