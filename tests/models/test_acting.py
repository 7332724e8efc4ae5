"""Models that act: rows by role, two heads, and an observation in place of what was imagined."""

from dataclasses import replace

import pytest
import torch

from blockloom.core.errors import ModelError, UsageError
from blockloom.core.layout import Copy, Role
from blockloom.core.layouts import acting_frames
from blockloom.core.plan import build_plan
from blockloom.core.proof import Contents, compare, decode_forward, training_forward
from blockloom.core.recipe import load_recipe
from blockloom.core.sampling import item_generator
from blockloom.models.acting import ActingRollout
from blockloom.models.live import LiveRollout
from blockloom.training.objective import ModelStage

NAME = "video/par"
NUMBERS = (
    "schedule.order=random", "acting.codes=0", "acting.numbers=2", "acting.head.kind=diffusion",
    "head.kind=diffusion",
)  # fmt: skip
TEXTS = ["go to the red cell", "go to the blue cell", "go"]


def stream(tiny, *overrides, items=2, dtype=torch.float64, seed=0, **settings):
    model = tiny.model(NAME, *overrides, dtype=dtype, std=0.3)
    generators = [item_generator(seed, k) for k in range(items)]
    return ActingRollout(model, TEXTS[:items], generators, **settings)


def frames(model, count, items=2, seed=0):
    """Draw frames to be seen."""
    rng = torch.Generator().manual_seed(seed)
    shape = (count, items, model.config.height * model.config.width)
    if model.config.codebook_size:
        return torch.randint(model.config.codebook_size, (*shape, 1), generator=rng)
    return torch.randn(*shape, model.config.latent_channels, generator=rng, dtype=model.dtype)


def test_a_step_is_a_frame_and_what_is_done_in_it():
    layout = acting_frames(3, 2, 2)
    assert layout.block.tolist() == [0, 0, 0, 0, 1, 2, 2, 2, 2, 3, 4, 4, 4, 4, 5]
    acts = (layout.role & int(Role.ACTION)) != 0
    assert acts.nonzero()[:, 0].tolist() == [4, 9, 14]
    assert layout.source.tolist() == layout.order.tolist() == list(range(15))
    assert layout.position[9].tolist() == [1.0, 0.5, 0.5]
    assert layout.position[6].tolist() == [1.0, 0.0, 1.0]


def test_an_action_sees_its_frame_and_all_before_and_never_another_prediction():
    plan = build_plan(load_recipe(NAME, ["cache.window=8"]), 1, 2, frames=3)
    layout = plan.training_layout()
    seen = plan.table.visible(layout, layout)
    is_clean = layout.copy == Copy.CLEAN
    row = int(((layout.block == 3) & ~is_clean).nonzero()[0, 0])  # the action of frame 1
    looked_at = [(int(layout.copy[k]), int(layout.block[k])) for k in seen[row].nonzero()[:, 0]]
    clean = [(0, 0), (0, 0), (0, 1), (0, 2), (0, 2)]
    assert looked_at == [*clean, (1, 3)]
    # A predicted frame sees itself and what was done on the way to it.
    row = int(((layout.block == 2) & ~is_clean).nonzero()[0, 0])
    looked_at = [(int(layout.copy[k]), int(layout.block[k])) for k in seen[row].nonzero()[:, 0]]
    assert looked_at == [(0, 0), (0, 0), (0, 1), (1, 2), (1, 2)]


@pytest.mark.parametrize("overrides", [(), ("cache.write=separate",), ("cache.window=4",), NUMBERS])
def test_cached_decode_equals_masked_forward(tiny, overrides):
    model = tiny.model(NAME, *overrides, dtype=torch.float64)
    plan = build_plan(model.recipe, 4, 4, frames=5)
    assert model.recipe.cache.exact and model.recipe.cache.window < plan.num_blocks - 1
    with torch.no_grad():
        parity = compare(plan, tiny.decoder(model, TEXTS[:2]), tiny.contents(model, plan))
    assert parity.max_error < 1e-10
    assert parity.scale > 1 and parity.num_rows >= plan.num_slots


def played(player, seen, imagines):
    """Play along given frames with told actions; imagine each frame before it is seen, or not."""
    acting, drawn = player.model.recipe.acting, []
    for step, frame in enumerate(seen):
        if imagines and step:
            player.imagine()
        player.see(frame)
        done = torch.full((2,), step % acting.codes)
        player.do(done)
        drawn.append(player.live._rollout.values.clone())
    return player.live._rollout


def test_after_an_observation_the_cache_is_that_of_a_run_that_was_given_the_frame(tiny):
    plain, replaced = (stream(tiny) for _ in range(2))
    seen = frames(plain.model, 7)  # more than the window and the ring of slots
    one, two = played(plain, seen, False), played(replaced, seen, True)
    assert torch.equal(one.values, two.values)
    assert torch.equal(one.cache.written, two.cache.written)
    length = int(one.cache.written[0])
    assert length > 16 and two.num_passes > one.num_passes
    for name in ("block", "order", "role", "source", "level", "copy"):
        ours = getattr(one.cache.layout, name)[:, :length]
        assert torch.equal(ours, getattr(two.cache.layout, name)[:, :length])
    pairs = [*zip(one.cache.keys, two.cache.keys, strict=True)]
    pairs += [*zip(one.cache.values, two.cache.values, strict=True)]
    worst = max(float((a - b)[:, :, :length].abs().max()) for a, b in pairs)
    assert worst < 1e-10 and float(one.cache.keys[1][:, :, :length].abs().max()) > 0.1
    # What follows is drawn alike.
    last = frames(plain.model, 1, seed=5)[0]
    for player in (plain, replaced):
        player.see(last)
        player.live._rollout.generators = [item_generator(9, k) for k in range(2)]
    assert torch.equal(plain.act(), replaced.act())


def test_what_replaces_a_frame_is_kept_with_noise_too(tiny):
    player = stream(tiny, *NUMBERS, "cache.context_noise=1e-6", "cache.exact=false", items=3)
    rollout, seen = player.live._rollout, frames(player.model, 3, items=3)
    for frame in seen[:2]:
        player.see(frame)
        player.act()
        player.imagine()
    player.see(seen[2])
    assert rollout.kept is not None and rollout.kept.shape == rollout.values.shape
    source = player.live.plan.sources(player.live.block - 1)
    assert (rollout.kept[:, source] - rollout.values[:, source]).abs().max() < 1e-4
    player.keep(torch.tensor([0, 2]))
    player.act()
    player.imagine()
    player.see(seen[2][[0, 2]])
    assert len(rollout.kept) == 2


def test_a_frame_that_is_not_replaced_stays(tiny):
    dreamt, replaced = stream(tiny), stream(tiny)
    seen = frames(dreamt.model, 2)
    for player in (dreamt, replaced):
        player.see(seen[0])
        player.do(torch.tensor([1, 2]))
    guess = dreamt.imagine()
    assert torch.equal(guess, replaced.imagine()) and not torch.equal(guess, seen[1])
    replaced.see(seen[1])
    for player in (dreamt, replaced):
        player.do(torch.tensor([0, 0]))
        player.imagine()  # runs the rows of the frame before
    kept = [p.live._rollout.cache.keys[1] for p in (dreamt, replaced)]
    assert (kept[0] - kept[1]).abs().max() > 1e-3


def test_only_the_frame_imagined_last_can_be_replaced(tiny):
    player = stream(tiny)
    seen = frames(player.model, 2)
    player.see(seen[0])
    with pytest.raises(UsageError, match="an action's turn"):
        player.see(seen[1])
    with pytest.raises(UsageError, match="an action's turn"):
        player.imagine()
    player.act()
    with pytest.raises(UsageError, match="a frame's turn"):
        player.act()
    player.imagine()
    player.act()
    with pytest.raises(UsageError, match="only the block finished last"):
        player.live._rollout.amend(2, seen[1])
    separate = stream(tiny, "cache.write=separate")
    separate.see(seen[0])
    separate.act()
    separate.imagine()
    with pytest.raises(UsageError, match=r'with cache\.write = "fused"'):
        separate.see(seen[1])


@pytest.mark.parametrize("overrides", [(), NUMBERS])
def test_players_together_are_players_alone_and_may_leave(tiny, overrides):
    together = stream(tiny, *overrides, items=3, dtype=torch.float32)
    alone = stream(tiny, *overrides, items=3, dtype=torch.float32)
    seen = frames(together.model, 4, items=3)
    left = torch.tensor([2, 0])
    for step, frame in enumerate(seen):
        if step == 2:
            alone.keep(left)
        places = torch.arange(3) if step < 2 else left
        together.see(frame)
        alone.see(frame[places])
        assert torch.equal(together.act()[places], alone.act())
        assert torch.equal(together.imagine()[places], alone.imagine())
        together.see(frame)
        alone.see(frame[places])
        done = torch.zeros(3, dtype=torch.long) if not overrides else torch.zeros(3, 2)
        together.do(done)
        alone.do(done[places])


def test_actions_are_codes_or_numbers_of_their_own_head(tiny):
    player = stream(tiny)
    player.see(frames(player.model, 1)[0])
    done = player.act()
    assert done.shape == (2,) and done.dtype == torch.int64
    assert bool(((done >= 0) & (done < 4)).all())
    numbers = stream(tiny, *NUMBERS)
    numbers.see(frames(numbers.model, 1)[0])
    drawn = numbers.act()
    assert drawn.shape == (2, 2) and drawn.dtype == torch.float64
    assert float(drawn.std()) > 0
    # The frame's head has no say in it, and the action's none in frames.
    assert player.model.action_head.vocab_size == 4 and player.model.head.vocab_size == 7


def test_what_was_done_changes_what_is_imagined(tiny):
    model = tiny.model(NAME, dtype=torch.float64, std=0.3)
    plan = build_plan(model.recipe, 4, 4, frames=3)
    contents = tiny.contents(model, plan)
    other = contents.values.clone()
    other[:, 16] = (other[:, 16] + 1) % 4  # the action of frame 0
    decoder = tiny.decoder(model, TEXTS[:2])
    with torch.no_grad():
        layout, one = training_forward(plan, decoder, contents)
        changed = Contents(other, contents.is_masked)
        two = training_forward(plan, decoder, changed)[1]
    moved = (one - two).abs().amax((0, 2)) > 1e-6
    noisy = layout.copy == Copy.NOISY
    assert moved[noisy & (layout.block == 2)].all()
    assert not moved[noisy & (layout.block == 0)].any()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("acting.numbers=3", "exactly one is above 0"),
        ("acting.codes=0", "exactly one is above 0"),
        ("layout.block=token", "acting needs layout.kind"),
        ("condition.actions=4", "condition.actions = 4"),
        ("cache.window=null", "cache.window = None"),
        ("acting.head.kind=gmm", r'acting.head.kind = "gmm"'),
        ("acting.weight=-1", "greater than or equal to 0"),
    ],
)
def test_odd_recipes_are_refused_in_one_line(change, said):
    with pytest.raises(ModelError, match=said) as caught:
        load_recipe(NAME, [change])
    assert "\n" not in str(caught.value)


def test_models_that_do_not_act_and_odd_actions_are_refused(tiny):
    with pytest.raises(UsageError, match="does not act"):
        ActingRollout(tiny.model("video/teacher_forcing"), ["a"], [item_generator(0, 0)])
    player = stream(tiny)
    player.see(frames(player.model, 1)[0])
    with pytest.raises(UsageError, match=r"legal \(2,\)"):
        player.do(torch.zeros(3, dtype=torch.long))
    with pytest.raises(UsageError, match=r"outside 0\.\.3"):
        player.do(torch.tensor([0, 4]))
    with pytest.raises(ModelError, match="do not fit the 5 channels"):
        tiny.model(NAME, *NUMBERS, "acting.numbers=6")


# -- what nobody knows ------------------------------------------------------------------------


def with_holes(model, contents, plan):
    """Hide a frame of the first item and an action of the second from everybody."""
    values = contents.values.clone()
    nothing = -1 if model.config.codebook_size else float("nan")
    values[0, plan.sources(2)] = nothing
    values[1, plan.sources(3)] = nothing
    return Contents(values, contents.is_masked)


@pytest.mark.parametrize("overrides", [(), ("cache.window=4",), ("cache.write=separate",), NUMBERS])
def test_cached_decode_equals_masked_forward_where_values_are_missing(tiny, overrides):
    model = tiny.model(NAME, *overrides, dtype=torch.float64)
    plan = build_plan(model.recipe, 4, 4, frames=5)
    contents = tiny.contents(model, plan)
    holes = with_holes(model, contents, plan)
    with torch.no_grad():
        parity = compare(plan, tiny.decoder(model, TEXTS[:2]), holes)
        whole, told = (
            training_forward(plan, tiny.decoder(model, TEXTS[:2]), c)[1] for c in (contents, holes)
        )
    assert parity.max_error < 1e-10
    assert parity.scale > 1 and parity.num_rows >= plan.num_slots
    # Later rows are told that nothing is known; earlier ones are what they were.
    layout = plan.training_layout()
    moved = (whole - told).abs().amax(-1) > 1e-6
    noisy = layout.copy == Copy.NOISY
    assert moved[0, noisy & (layout.block == 3)].all()
    assert moved[1, noisy & (layout.block == 4)].all()
    assert not moved[:, layout.block < 2].any() and not moved[1, layout.block == 2].any()


def test_training_masks_the_rows_that_decoding_masks(tiny):
    model = tiny.model(NAME, *NUMBERS, "layout.frames=5", dtype=torch.float64)
    plan = build_plan(model.recipe, 4, 4)
    hidden = replace(tiny.contents(model, plan), is_masked=torch.ones(2, plan.num_slots) > 0)
    holes = with_holes(model, hidden, plan)
    prompts = model.text_encoder.tokenize(TEXTS[:2])
    stage = ModelStage(model, holes.values, prompts, TEXTS[:2])
    never = torch.zeros(2, dtype=torch.bool)
    own, layout, lowered = stage.plan(torch.Generator())
    batch = stage.corrupt(holes.values, own, layout, torch.Generator().manual_seed(0))
    with torch.no_grad():
        trained = stage.hidden_states(torch.arange(2), never, batch, layout, lowered)
        passes = decode_forward(plan, tiny.decoder(model, TEXTS[:2]), holes)
    for block in (3, 5, 7, 9):  # actions: one row each, masked in training as in decoding
        at = (layout.block[batch.loss_rows] == block).nonzero()[0, 0]
        row = next(h[:, -1] for rows, h in passes if int(rows.block[-1]) == block)
        assert (trained[:, at] - row).abs().max() < 1e-10
    lost = batch.weight == 0
    assert lost[0].sum() >= 16 and lost[1, layout.source[batch.loss_rows] == 33].all()
    assert bool(batch.values.isfinite().all()) and bool(batch.target.isfinite().all())


def test_players_go_on_where_nothing_was_seen_or_nobody_knows_what_was_done(tiny):
    def last_action(frame, done):
        player = stream(tiny, *NUMBERS)
        seen = frames(player.model, 2)
        player.see(torch.where(torch.tensor(frame), torch.nan, seen[0]))
        player.do(torch.where(torch.tensor(done), torch.nan, torch.ones(2, 2)))
        player.see(seen[1])
        return player.act()

    whole = last_action([False], [False])
    blind = last_action([[[True]], [[False]]], [False])
    unsure = last_action([False], [[False], [True]])
    for drawn, own in ((blind, 0), (unsure, 1)):
        assert bool(drawn.isfinite().all())
        assert not torch.equal(drawn[own], whole[own])
        assert torch.equal(drawn[1 - own], whole[1 - own])  # nobody else notices
    coded = stream(tiny)
    coded.see(torch.full((2, 16, 1), -1))
    coded.do(torch.tensor([-1, 2]))
    assert int(coded.live._rollout.values.min()) == 0
    state = coded.live.snapshot()
    other = stream(tiny)
    other.live.restore(state)
    assert torch.equal(other.live._rollout.is_missing, coded.live._rollout.is_missing)
    assert int(other.live._rollout.is_missing.sum()) == 2 * 16 + 1


def test_models_that_never_saw_unknown_values_refuse_them(tiny):
    model = tiny.model("video/teacher_forcing")
    live = LiveRollout(model, ["a"], [item_generator(0, 0)])
    with pytest.raises(UsageError, match="hold unknown values"):
        live.observe(torch.full((1, 16, 5), torch.nan), torch.zeros(1, 1, 4))
