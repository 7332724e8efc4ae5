"""The model stage: what each recipe hides or noises, which rows carry the loss, that it learns."""

import pytest
import torch

from blockloom.core.recipe import list_recipes
from blockloom.models.generate import caption_codes
from blockloom.training.objective import ModelStage, stage_summary
from blockloom.training.objective_rows import stream_values

RECIPES = list_recipes("image")
CAPTIONS = ["a red cat", "blue dog", "sun", "tree"]


def stage_of(tiny, name, *overrides, items=4):
    model = tiny.fresh_model(name, *overrides).train()
    rng = torch.Generator().manual_seed(1)
    if model.config.codebook_size:
        values = torch.randint(tiny.codes, (items, 16, 1), generator=rng)
    else:
        values = torch.randn(items, 16, tiny.channels, generator=rng)
    captions = (CAPTIONS * items)[:items]
    return ModelStage(model, values, model.text_encoder.tokenize(captions), captions)


def corrupted(stage, seed=0, items=4):
    rng = torch.Generator().manual_seed(seed)
    plan, layout, _ = stage.plan(rng)
    return plan, layout, stage.corrupt(stage.values[:items], plan, layout, rng)


@pytest.mark.parametrize("name", RECIPES)
def test_a_loss_is_finite_seeded_and_reaches_every_parameter(tiny, name):
    stage = stage_of(tiny, name, "condition.drop=0.5")

    def loss(seed):
        return stage.loss(torch.arange(4), torch.Generator().manual_seed(seed), 0)

    (value, metrics), (again, _), (other, _) = loss(0), loss(0), loss(1)
    value, again, other = (x.detach() for x in (value, again, other))
    assert bool(value.isfinite()) and float(value) == float(again)
    assert stage.recipe.corruption.kind in ("none", "spans") or float(value) != float(other)
    assert metrics["token_loss"] == metrics["token_loss"]
    total = sum(loss(seed)[0] for seed in range(4))
    total.backward()
    reached = {n for n, p in stage.model.named_parameters() if p.grad is not None and p.grad.any()}
    layers = {
        n for n, _ in stage.model.named_parameters() if ".layers." in n or n.startswith("head")
    }
    assert reached >= layers
    if stage.model.uses_prompt:  # the words learn with the model, and so does the empty prompt
        assert sum("text_encoder" in n for n in reached) >= 3
        assert [n for n in reached if "null" in n]


@pytest.mark.parametrize("name", [n for n in RECIPES if n not in ("image/cm3",)])
def test_a_few_steps_lower_the_loss(tiny, name):
    stage = stage_of(tiny, name)
    optimizer = torch.optim.Adam(stage.model.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        loss, _ = stage.loss(torch.arange(4), torch.Generator().manual_seed(step), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < sum(losses[:5])


@pytest.mark.parametrize(
    "name", ["image/maskgit", "image/maskgil", "image/block_masked", "image/mar"]
)
def test_masked_rows_are_noisy_rows_and_carry_the_loss(tiny, name):
    stage = stage_of(tiny, name)
    _plan, layout, batch = corrupted(stage)
    assert torch.equal(layout.copy[batch.loss_rows], torch.ones_like(batch.loss_rows))
    assert not bool(batch.is_masked[:, layout.copy == 0].any())
    hidden = batch.is_masked[:, batch.loss_rows]
    assert bool(hidden.any(1).all())
    expected = hidden.float() if stage.recipe.corruption.loss_on == "masked" else 1.0
    assert torch.equal(batch.weight, torch.ones_like(batch.weight) * expected)
    assert torch.equal(batch.target, stage.values[:, layout.source[batch.loss_rows]])
    assert torch.equal(batch.level, batch.is_masked.float())


def test_block_recipes_draw_one_ratio_per_block(tiny):
    stage = stage_of(tiny, "image/block_masked", items=64)
    _plan, _layout, batch = corrupted(stage, items=64)
    counts = batch.is_masked[:, batch.loss_rows].view(64, 4, 4).sum(-1)
    assert int(counts.min()) >= 1 and len(counts[:, 0].unique()) > 1
    assert not torch.equal(counts[:, 0], counts[:, 1])


def test_damaged_context_swaps_clean_tokens_and_spares_the_targets(tiny):
    stage = stage_of(tiny, "image/block_masked", "corruption.context=0.9", items=64)
    _plan, layout, batch = corrupted(stage, items=64)
    true = stage.values[:, layout.source.clamp_min(0)]
    changed = (batch.values != true)[..., 0].float()
    assert 0.1 < changed[:, layout.copy == 0].mean() < 0.6
    assert not bool(changed[:, batch.loss_rows].any())
    assert torch.equal(batch.target, stage.values[:, layout.source[batch.loss_rows]])


def test_damaged_context_adds_untold_noise_to_clean_latents(tiny):
    stage = stage_of(tiny, "image/acdit", "corruption.context=0.5", items=64)
    _plan, layout, batch = corrupted(stage, items=64)
    data = (layout.copy == 0) & (layout.source >= 0)
    clean = stage.values[:, layout.source[data]]
    # (1 - s) x + s eps with one s in [0, 0.5] per item; eps is what is left over.
    kept = (batch.values[:, data] * clean).mean((1, 2)) / clean.square().mean((1, 2))
    assert 0.55 < kept.mean() < 0.95 and kept.min() < 0.75 and kept.max() > 0.9
    assert not bool(batch.level[:, data].any())


@pytest.mark.parametrize("name", ["image/acdit", "image/causalfusion"])
def test_noised_rows_mix_clean_values_at_their_level(tiny, name):
    stage = stage_of(tiny, name)
    plan, layout, batch = corrupted(stage)
    noisy, is_clean = batch.loss_rows, layout.copy == 0
    data = is_clean & (layout.source >= 0)
    assert torch.equal(batch.values[:, data], stage.values[:, layout.source[data]])
    assert not bool(batch.level[:, is_clean].any())
    level = batch.level[:, noisy]
    clean = stage.values[:, layout.source[noisy]]
    # eps prediction: the target is the noise that was mixed in.
    mixed = stage.scheduler.add_noise(clean, batch.target, level[..., None])
    assert torch.allclose(batch.values[:, noisy], mixed, atol=1e-5)
    per_block = [level[:, layout.block[noisy] == b] for b in range(plan.num_blocks)]
    assert all(torch.equal(part, part[:, :1].expand_as(part)) for part in per_block)
    distinct = len({float(part[0, 0]) for part in per_block})
    assert distinct == (plan.num_blocks if name == "image/acdit" else 1)


@pytest.mark.parametrize("name", ["video/far", "video/magi_mtf"])
def test_clean_blocks_are_whole_and_carry_no_loss(tiny, name):
    stage = clip_stage(tiny, name, "corruption.clean=0.5")
    _, layout, batch = corrupted(stage, items=16)
    whole = ~(batch.is_masked | (batch.level > 0))
    clean = stage.values[:, layout.source]
    per_block = torch.stack([whole[:, layout.block == b].all(1) for b in range(5)], 1)
    weights = torch.stack([batch.weight[:, layout.block == b].sum(1) for b in range(5)], 1)
    assert torch.equal(per_block, weights == 0)
    assert 0.3 < float(per_block.float().mean()) < 0.7
    kept = per_block[:, layout.block]
    assert torch.equal(batch.values[kept], clean[kept].to(batch.values))
    never = clip_stage(tiny, name, "corruption.clean=0", "cache.matched=false")
    _, _, plain = corrupted(never, items=16)
    assert bool((plain.weight.unflatten(1, (5, 16)).sum(-1) > 0).all())


def test_flights_rise_over_their_blocks_and_start_anywhere(tiny):
    stage = clip_stage(tiny, "video/rolling_forcing", frames=6)
    starts = set()
    for seed in range(12):
        _, layout, batch = corrupted(stage, seed, items=16)
        level = batch.level[:, batch.loss_rows].unflatten(1, (6, 16))
        assert torch.equal(level, level[..., :1].expand_as(level))
        group = layout.group[batch.loss_rows].unflatten(0, (6, 16))[:, 0]
        for first in group.unique():
            within = level[:, group == first, 0]
            assert bool((within[:, 1:] >= within[:, :-1]).all())
        starts.add(tuple(group.tolist()))
        assert not bool(batch.level[:, layout.copy == 0].any())
    assert len(starts) == 3


def clip_stage(tiny, name, *overrides, items=16, frames=5):
    model = tiny.fresh_model(name, "condition.actions=0", *overrides).train()
    values = torch.randn(
        items, frames * 16, tiny.channels, generator=torch.Generator().manual_seed(1)
    )
    return ModelStage(model, values, model.text_encoder.tokenize(["sun"] * items), ["sun"] * items)


def test_causalfusion_weighs_later_segments_less(tiny):
    stage = stage_of(tiny, "image/causalfusion", "layout.split=fixed", "layout.permute=none")
    _, _, batch = corrupted(stage)
    assert batch.weight[0].tolist() == [2.0] * 4 + [1.75] * 4 + [1.5] * 4 + [1.25] * 4


@pytest.mark.parametrize("name", ["image/llamagen", "image/far", "image/givt", "image/latentlm"])
def test_next_token_rows_predict_the_token_after_them(tiny, name):
    stage = stage_of(tiny, name)
    plan, layout, batch = corrupted(stage)
    assert batch.loss_rows.tolist() == list(range(plan.num_prompt_rows - 1, layout.num_tokens))
    assert torch.equal(batch.target, stage.values)
    inputs = batch.values[:, batch.loss_rows[1:]]
    assert torch.equal(inputs, stage.values[:, :-1])


def test_cm3_spells_captions_and_moves_a_span(tiny):
    stage = stage_of(tiny, "image/cm3")
    first = tiny.codes + 128
    assert stage.values[:, -3:, 0].tolist() == [[first, first + 1, first + 2]] * 4
    assert torch.equal(stage.values[:, :5, 0], caption_codes(CAPTIONS, 5, tiny.codes))
    moved = 0
    for seed in range(6):
        plan, _layout, batch = corrupted(stage, seed)
        assert torch.equal(batch.target, stage.values[:, plan.content.source])
        assert bool((batch.weight == 1).all())
        moved += plan.content.source.tolist() != sorted(plan.content.source.tolist())
    assert moved > 0
    plain = stream_values(torch.zeros(1, 4, 1, dtype=torch.long), ["ab"], 3, 9)
    assert plain[0, :, 0].tolist() == [106, 107, 9, 0, 0, 0, 0, 137, 138, 139]


def test_ardm_weights_make_an_unbiased_bound(tiny):
    stage = stage_of(tiny, "image/ardm", items=64)
    _, _, batch = corrupted(stage, items=64)
    hidden = batch.is_masked[:, batch.loss_rows].sum(1)
    assert torch.allclose(batch.weight.sum(1), torch.ones(64)) and int(hidden.min()) >= 1
    assert len(hidden.unique()) > 5


def test_summary_counts_parameters_and_slots(tiny):
    stage = stage_of(tiny, "image/maskgit")
    summary = stage_summary(stage)
    assert summary["items"] == 4 and summary["slots"] == 16 and summary["parameters"] > 10_000
