"""Learning checks of videos: the baselines are what they say, and rollouts go on from frames."""

import math

import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.recipe import load_recipe
from blockloom.training.clip_learning import ClipReport, _as_decoded, clip_learning_check, go_on
from blockloom.training.clip_predictors import (
    FrameCodes,
    FrameGaussians,
    NextFrameCodes,
    NextFrameGaussians,
)
from blockloom.training.clip_stage import ClipTokens
from blockloom.training.objective import ModelStage
from blockloom.training.predictors import CodeTable, Path, SlotGaussians

VIDEO = ("modality=video", "layout.kind=frames", "layout.block=frame", "layout.frames=6")


def codes(clips=60, frames=8, cells=2, seed=0):
    """Codes that stay with probability 3/4 and are drawn anew otherwise, from four."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.randint(4, (clips, frames, cells, 1), generator=rng)
    stays = torch.rand(clips, frames, cells, 1, generator=rng) < 0.75
    for frame in range(1, frames):
        kept = torch.where(stays[:, frame], values[:, frame - 1], values[:, frame])
        values[:, frame] = kept
    return values


def tokens_of(values, length=4):
    offsets = torch.arange(len(values) + 1) * values.shape[1]
    return ClipTokens(values.flatten(0, 1), offsets, length)


def test_codes_are_predicted_from_the_frame_before():
    train, other = tokens_of(codes(400)), codes(200, seed=1)
    table = NextFrameCodes(train, 4)
    values = other.flatten(1, 2)
    slots = torch.arange(values.shape[1])
    loss = table.loss(values, values, slots)
    stay = 0.75 + 0.25 / 4
    entropy = -stay * math.log(stay) - 3 * (1 - stay) / 3 * math.log((1 - stay) / 3)
    assert float(loss[:, 2:].mean()) == pytest.approx(entropy, rel=0.05)
    # The first frame has none before it.
    alone = CodeTable(train.frames, 4).loss(values[:, :2], torch.arange(2))
    assert torch.equal(loss[:, :2], alone)
    assert float(alone.mean()) == pytest.approx(math.log(4), rel=0.02)


def drifting(clips, seed=0, frames=6, left=0.3):
    """Latents whose next frame is this one with its two cells swapped, plus noise."""
    rng = torch.Generator().manual_seed(seed)
    noise = torch.randn(clips, frames, 2, 3, generator=rng)
    values = [noise[:, 0]]
    for frame in range(1, frames):
        values.append(0.9 * values[-1].flip(1) + left * noise[:, frame])
    return torch.stack(values, 1) + 2.0


def test_latents_are_expected_where_the_frame_before_sends_them():
    train, other = tokens_of(drifting(600)), drifting(50, seed=1)
    baseline = NextFrameGaussians(train)
    told = baseline.expected(other[:, 2])
    wanted = 0.9 * (other[:, 2].flip(1) - 2.0) + 2.0
    assert (told - wanted).square().mean() < 0.01 * wanted.var()
    # Denoising at level s: what is left of x0 given sample and expectation has a closed form.
    values, level, left = other.flatten(1, 2), 0.5, 0.3**2
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    share = torch.full((*values.shape[:2], 1), level)
    path = Path(1 - share, share, -torch.ones_like(share), torch.ones_like(share))
    sample = path.signal * values + path.noise * noise
    slots = torch.arange(values.shape[1])
    error = (baseline.predict(values, sample, path, slots) - (noise - values)).square().mean(-1)
    rest = left * level**2 / ((1 - level) ** 2 * left + level**2)
    assert float(error[:, 2:].mean()) == pytest.approx(rest / level**2, rel=0.1)
    alone = SlotGaussians(train.frames).predict(sample[:, :2], Path(*(p[:, :2] for p in path)),
                                                torch.arange(2))  # fmt: skip
    wanted = (alone - (noise - values)[:, :2]).square().mean(-1)
    torch.testing.assert_close(error[:, :2], wanted)


def test_baselines_without_a_past_know_the_place_in_the_frame_only():
    train, other = tokens_of(codes(400)), codes(200, seed=1)
    table, values = FrameCodes(train, 4), other.flatten(1, 2)
    loss = table.loss(values, values, torch.arange(values.shape[1]))
    assert float(loss.mean()) == pytest.approx(math.log(4), rel=0.02)
    assert torch.equal(
        loss[:, 4:6], CodeTable(train.frames, 4).loss(values[:, 4:6], torch.arange(2))
    )
    latents = tokens_of(drifting(300))
    wanted = SlotGaussians(latents.frames)
    sample = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    half = torch.full((3, 4, 1), 0.5)
    path = Path(1 - half, half, -torch.ones_like(half), torch.ones_like(half))
    got = FrameGaussians(latents).predict(sample, sample, path, torch.arange(4, 8))
    assert torch.equal(got, wanted.predict(sample, path, torch.arange(4) % 2))


def test_a_kept_single_copy_is_scored_with_a_clean_past(tiny):
    model = tiny.model("video/diffusion_forcing", "condition.actions=0")
    values = torch.randn(3, 80, tiny.channels, generator=torch.Generator().manual_seed(0))
    stage = ModelStage(model, values, model.text_encoder.tokenize(["sun"] * 3), ["sun"] * 3)
    rng = torch.Generator().manual_seed(1)
    plan, layout, _ = stage.plan(rng)
    whole = stage.corrupt(values, plan, layout, rng)
    parts = list(_as_decoded(whole, values, plan, layout, rng))
    assert len(parts) == 5
    assert torch.equal(sum(part.weight for part in parts), whole.weight)
    for block, part in enumerate(parts):
        past = layout.block < block
        assert torch.equal(part.values[:, past], values[:, past])
        assert torch.equal(part.values[:, ~past], whole.values[:, ~past])
        assert not bool(part.level[:, past].any()) and bool((part.level[:, ~past] > 0).all())
        assert bool((part.weight[:, layout.block != block] == 0).all())
    two = tiny.model("video/teacher_forcing", "condition.actions=0")
    stage = ModelStage(two, values, two.text_encoder.tokenize(["sun"] * 3), ["sun"] * 3)
    plan, layout, _ = stage.plan(rng)
    batch = stage.corrupt(values, plan, layout, rng)
    assert list(_as_decoded(batch, values, plan, layout, rng)) == [batch]


@pytest.mark.parametrize("name", ["image/acdit", "image/block_masked"])
def test_going_on_keeps_what_is_given_and_draws_from_it(tiny, name):
    few = ("cache.window=2", "schedule.steps=2", "condition.actions=3")
    model = tiny.model(name, *VIDEO, *few, std=0.3)
    rng = torch.Generator().manual_seed(0)
    is_code = bool(model.config.codebook_size)
    shape = (2, 3, 16, 1 if is_code else tiny.channels)
    given = torch.randint(tiny.codes, shape, generator=rng) if is_code else torch.randn(shape)
    actions = torch.randn(2, 5, 3, generator=rng)
    drawn = go_on(model, given, ["a", "b"], actions, 2, seed=0)
    assert drawn.shape == (2, 2, *shape[2:])
    again = go_on(model, given, ["a", "b"], actions, 2, seed=0)
    assert torch.equal(drawn, again)
    changed = (given + 3) % tiny.codes if is_code else given + 3
    assert not torch.equal(go_on(model, changed, ["a", "b"], actions, 2, seed=0), drawn)
    alone = go_on(model, given[:1], ["a"], actions[:1], 2, seed=0)
    assert torch.equal(alone[0], drawn[0])


def test_blocks_must_fill_and_the_tokenizer_must_be_per_frame(tiny):
    model = tiny.model("image/acdit", *VIDEO, "cache.window=2", "layout.block=frames:2")
    with pytest.raises(UsageError, match="3 given and 2 drawn frames in blocks of 2"):
        go_on(model, torch.zeros(1, 3, 16, tiny.channels), ["a"], None, 2, seed=0)
    causal = "tokenizer={kind: video_kl, frame_size: [16, 16], temporal_stride: 4}"
    with pytest.raises(UsageError, match="temporal stride 4, try 1"):
        clip_learning_check(load_recipe("image/acdit", [*VIDEO, causal]))


def test_a_check_measures_loss_baseline_and_decibels():
    sizes = ("backbone.dim=32", "backbone.layers=1", "train.batch_size=4", "cache.window=2")
    tokenizer = "tokenizer={kind: frames, image: {kind: patch, image_size: 8, patch: 4}}"
    recipe = load_recipe("image/acdit", [*VIDEO, "layout.frames=3", *sizes, tokenizer,
                                         "condition.actions=4", "schedule.steps=2"])  # fmt: skip
    report = clip_learning_check(recipe, 2, clips=48, held_out=6)
    assert report.budget.startswith("2 steps x 4, ")
    assert 0 < report.baseline < 1.2 and 0 < report.value < 1.5
    assert report.ceiling_db == 60.0  # raw patches lose nothing
    assert 10 < report.copy_db < 25 and 10 < report.mean_db < 25 and report.drawn_db < 20


def test_the_section_states_all_decibels():
    report = ClipReport("loss", 0.51234, "guess", 0.25, "2 steps x 4", 17.04, 16.2, 15.0, 20.0)
    spec = report.spec()
    assert spec.baseline == 0.512 and spec.value == 0.25 and spec.budget == "2 steps x 4"
    assert spec.drawn == (
        "4 frames after 4 given ones: 17.0 dB (last frame kept 16.2, mean frame kept 15.0, "
        "tokenizer 20.0)"
    )
