"""Learning checks of recipes that are told how others act: baselines by value, short runs."""

import pytest
import torch

from blockloom.core.recipe import list_recipes, load_recipe
from blockloom.models.generator import GenerativeModel
from blockloom.training.told_learning import (
    LinearMap,
    _last_kept,
    _told,
    draw_told,
    is_told,
    told_learning_check,
)
from blockloom.training.visemes import talking_clips

TINY = ["backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "head.width=16"]


def test_recipes_are_chosen_by_what_they_are_told():
    chosen = {name for name in list_recipes() if is_told(load_recipe(name))}
    assert chosen == {"motion/timar", "motion/faceformer"}


def model_of(name, *settings):
    recipe = load_recipe(name, [*TINY, *settings])
    streams = recipe.tokenizer.get("streams", [recipe.tokenizer.get("features")])
    return GenerativeModel(
        recipe.model_dump(mode="json"), 1, len(streams), latent_channels=max(streams)
    ).eval()


@pytest.mark.parametrize(
    ("name", "block"), [("motion/faceformer", 1), ("motion/timar", 5)]
)  # fmt: skip
def test_the_linear_map_finds_a_linear_rule_with_delays(name, block):
    settings = ["layout.block=frames:5"] if block > 1 else []
    model, rng = model_of(name, *settings), torch.Generator().manual_seed(0)
    told = torch.randn(20, 40, 3, generator=rng)
    rule = torch.randn(3, 2, generator=rng)
    motion = told @ rule
    motion[:, 4:] += told[:, :-4].roll(1, -1) @ rule  # frames of long ago count, too
    guess = LinearMap(model, told, motion)
    assert guess.block == block
    other = torch.randn(5, 40, 3, generator=rng)
    wanted = other @ rule
    wanted[:, 4:] += other[:, :-4].roll(1, -1) @ rule
    assert float((guess.predict(other) - wanted).square().mean()) < 1e-3


def test_a_pose_is_kept_through_a_block():
    truth = torch.arange(1.0, 8.0)[None, :, None]
    assert _last_kept(truth, 3)[0, :, 0].tolist() == [0, 0, 0, 3, 3, 3, 6]


@pytest.mark.parametrize("name", ["motion/timar", "motion/faceformer"])
def test_motion_is_drawn_from_what_is_told_alone(name):
    torch.manual_seed(0)
    model = model_of(name)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    frames, spec = 20, model.recipe
    rng = torch.Generator().manual_seed(1)
    given, numbers = spec.layout.given, spec.condition.actions
    shape = (2, frames, given, model.config.latent_channels) if given else (2, frames, numbers)
    asked = torch.randn(shape, generator=rng)
    drawn = draw_told(model, ["speaker ada"] * 2, asked, 0)
    assert drawn.shape == (2, frames, model.config.latent_channels)
    assert torch.equal(drawn, draw_told(model, ["speaker ada"] * 2, asked, 0))
    changed = asked.clone()
    changed[:, -1] += 1
    other = draw_told(model, ["speaker ada"] * 2, changed, 0)
    before = frames - 10 if given else frames - 1
    assert torch.equal(drawn[:, :before], other[:, :before])
    assert not torch.equal(drawn[:, before:], other[:, before:])


@pytest.mark.slow
def test_a_few_steps_already_leave_the_mean_pose_behind():
    settings = ["layout.frames=20", "cache.window=21", "train.batch_size=16"]
    report = told_learning_check(
        load_recipe("motion/faceformer", settings), 50, clips=32, held_out=4
    )
    assert report.value < 0.8 * report.still and report.kept != report.kept
    assert report.spec().budget.startswith("50 steps x 16")
    assert "mean pose held" in report.spec().drawn


def test_speakers_have_one_number_in_training_and_held_out_clips():
    """Both sets are told speakers by the same names, although held-out clips lack some of them."""
    clips = talking_clips(6, 2, 0)
    names = sorted(set(clips.captions))
    assert set(clips.only("held_out").captions) < set(names)
    model = model_of("motion/faceformer")
    some = clips.only("held_out")
    values = torch.zeros(len(some.frames), 1, model.config.latent_channels)
    told = _told(model, some, values, names)[0]
    who = told[:, 0, -len(names) :]
    assert [names[row.argmax()] for row in who] == some.captions and bool((who.sum(1) == 1).all())
