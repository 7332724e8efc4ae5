"""Context as a pair: the noise a finished block is kept with, and the level its rows are told."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from blockloom.core.errors import ModelError
from blockloom.core.plan import build_plan
from blockloom.core.proof import compare, decode_forward
from blockloom.core.recipe import load_recipe
from blockloom.core.rollout import Rollout, run
from blockloom.core.sampling import item_generator, per_item_randn
from blockloom.core.schedule import scheduler_of
from blockloom.models.generate import Request, start
from blockloom.models.live import LiveRollout
from blockloom.training.objective import ModelStage

PAIR = ("cache.context_noise=0.3", "cache.context_level=0.2")
TOLD = ("video/diffusion_forcing", "condition.actions=0", "layout.frames=6", *PAIR)
UNTOLD = ("video/teacher_forcing", "condition.actions=0", "layout.frames=6", PAIR[0])
SETUPS = {
    "block": TOLD,
    "fused": (*TOLD, "cache.write=fused"),
    "far": ("video/far", "condition.actions=0", "layout.frames=6", *PAIR),
    "separate": UNTOLD,
    "diffusion": ("video/magi_ctf", "layout.frames=6", PAIR[0], "condition.actions=0"),
    "rolling": ("video/rolling_forcing", "condition.actions=0", PAIR[0]),
}
SETUP = pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS)
WORDS = ["a red cat", "blue dog", "sun"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def generators(items):
    return [item_generator(5, k) for k in range(items)]


def rollout_of(tiny, model, *, items=2, use_cache=True):
    plan = build_plan(model.recipe, tiny.height, tiny.width)
    shape = (items, plan.num_slots)
    return Rollout(
        plan, tiny.decoder(model, WORDS[:items]), scheduler_of(model.recipe),
        values=torch.zeros(*shape, tiny.channels, dtype=model.dtype),
        is_known=torch.zeros(shape, dtype=torch.bool), generators=generators(items),
        use_cache=use_cache,
    )  # fmt: skip


@SETUP
def test_cached_rows_equal_the_masked_forward_over_the_noised_context(tiny, setup):
    model = tiny.model(*setup, dtype=torch.float64, std=0.3)
    plan = build_plan(model.recipe, tiny.height, tiny.width)
    decoder, contents = tiny.decoder(model, WORDS[:2]), tiny.contents(model, plan)
    parity = compare(plan, decoder, contents)
    assert parity.max_error < 1e-10 and parity.scale > 0.5
    # The noise reaches what follows: after clean context the same rows have other states.
    clean = replace(build_plan(model.recipe, tiny.height, tiny.width), context_noise=0.0)
    noised, plain = (decode_forward(p, decoder, contents)[-1][1] for p in (plan, clean))
    assert (noised - plain).abs().max() > 1e-3


def _split(setup):
    return setup[0], [text for text in setup[1:] if "context" not in text]


@SETUP
def test_the_slow_twin_draws_the_same(tiny, setup):
    model = tiny.model(*setup, dtype=torch.float64, std=0.3)
    fast, slow = (rollout_of(tiny, model, use_cache=cached) for cached in (True, False))
    run(fast), run(slow)
    assert (fast.values - slow.values).abs().max() < 1e-9 * max(1, fast.values.abs().max())
    assert torch.allclose(fast.kept, slow.kept, atol=1e-8)


def test_a_finished_block_is_kept_as_the_scheduler_would_have_noised_it(tiny):
    model = tiny.model(*TOLD)
    rollout, source = rollout_of(tiny, model), torch.arange(16)
    stream = generators(2)
    for event in rollout.events():
        if event.kind == "commit":
            break
    clean = rollout.values[:, source]
    # The block's own stream first, then that of its context noise.
    seeds = [[int(torch.randint(2**62, (), generator=g)) for g in stream] for _ in range(2)]
    noise = per_item_randn(
        clean.shape[1:], [torch.Generator().manual_seed(s) for s in seeds[1]], clean.device
    )
    assert torch.equal(rollout.kept[:, source], 0.7 * clean + 0.3 * noise)
    assert rollout.cache.layout.level[0, :16].tolist() == pytest.approx([0.2] * 16)
    assert not torch.equal(clean[0], rollout.kept[0, source])


def test_zero_and_zero_is_what_recipes_did_before(tiny):
    name, settings = _split(TOLD)
    plain = rollout_of(tiny, tiny.model(name, *settings))
    none = ("cache.context_noise=0", "cache.context_level=0")
    zero = rollout_of(tiny, tiny.model(name, *settings, *none))
    assert torch.equal(run(plain)[0], run(zero)[0])
    assert plain.kept is None
    assert not bool(plain.cache.layout.level.any())


def test_noise_and_what_is_said_about_it_are_two_things(tiny):
    name, settings = _split(TOLD)
    drawn = []
    for pair in ((0, 0), (0.3, 0), (0, 0.3), (0.3, 0.3)):
        told = (f"cache.context_noise={pair[0]}", f"cache.context_level={pair[1]}")
        drawn.append(run(rollout_of(tiny, tiny.model(name, *settings, *told, std=0.3)))[0])
    first = [x[:, :16] for x in drawn]
    assert all(torch.equal(x, first[0]) for x in first)  # the first block has no context
    assert not any(torch.equal(a, b) for a, b in pairwise(drawn))


@pytest.mark.parametrize("setup", [TOLD, (*TOLD, "cache.write=fused"), UNTOLD])
def test_streams_and_requests_and_single_items_have_the_same_bits(tiny, setup):
    model = tiny.model(*setup, std=0.3)
    request = Request(WORDS, generators(3), frames=9)
    whole, _ = run(start(model, request))
    live = LiveRollout(model, WORDS, generators(3))
    parts = [live.step() for _ in range(4)]
    state = live.snapshot()
    parts += [live.step() for _ in range(5)]
    assert torch.equal(torch.cat(parts, 1), whole)
    other = LiveRollout(model, WORDS, generators(3))
    other.restore(state)
    assert all(torch.equal(other.step(), parts[4 + k]) for k in range(5))
    for item in range(3):
        alone, _ = run(start(model, Request(WORDS[item : item + 1], [item_generator(5, item)],
                                            frames=9)))  # fmt: skip
        assert torch.equal(alone[0], whole[item])


def test_given_blocks_are_kept_with_noise_too(tiny):
    model = tiny.model(*TOLD, std=0.3)
    values = torch.randn(2, 96, tiny.channels, generator=torch.Generator().manual_seed(0))
    known = torch.zeros(2, 96, dtype=torch.bool)
    known[:, :32] = True
    rollout = start(model, Request(WORDS[:2], generators(2), values=values, is_known=known))
    run(rollout)
    assert torch.equal(rollout.values[:, :32], values[:, :32])
    assert 0.2 < float((rollout.kept - rollout.values)[:, :32].std()) < 0.6
    live = LiveRollout(model, WORDS[:2], generators(2))
    live.observe(values[:, :16]), live.observe(values[:, 16:32])
    assert torch.equal(live.step(), rollout.values[:, 32:48])


def test_blocks_that_stay_clean_in_training_stand_as_they_will_be_kept(tiny):
    model = tiny.model(*TOLD, "corruption.clean=0.5")
    values = torch.randn(40, 96, tiny.channels, generator=torch.Generator().manual_seed(0))
    ids = model.text_encoder.tokenize(["sun"] * 40)
    stage, rng = ModelStage(model, values, ids, ["sun"] * 40), torch.Generator().manual_seed(1)
    plan, layout, _ = stage.plan(rng)
    batch = stage.corrupt(values, plan, layout, rng)
    kept = batch.weight == 0
    assert 0.3 < float(kept.float().mean()) < 0.7
    assert torch.equal(batch.level[kept], torch.full_like(batch.level[kept], 0.2))
    left = (batch.values - 0.7 * values)[kept]
    assert float(left.std()) == pytest.approx(0.3, rel=0.05)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("video/masked", ["cache.context_noise=0.1"], "needs latents on straight paths"),
        ("video/teacher_forcing", ["cache.context_level=0.1"], "needs layout.copies = 1"),
        ("video/diffusion_forcing", ["cache.context_noise=1"], "less than 1"),
        ("image/acdit", ["cache.context_noise=0.1"], "straight paths"),
        ("image/mar", ["cache.context_noise=0.1"], "separate"),
    ],
)
def test_pairs_that_no_recipe_can_keep_are_refused(name, settings, words):
    with pytest.raises(ModelError, match=words):
        load_recipe(name, settings)


def test_context_at_a_level_that_training_draws_is_matched():
    name = "video/diffusion_forcing"
    alike = ["cache.context_noise=0.1", "cache.context_level=0.1", "cache.matched=true"]
    assert load_recipe(name, alike).cache.matched
    for other in ("cache.context_level=0.2", "corruption.per=sample", "cache.context_noise=0"):
        with pytest.raises(ModelError, match="matched"):
            load_recipe(name, [*alike, other])
