"""Far history: coarse rows are laid out, seen, cached and evicted as training showed them."""

from dataclasses import replace

import pytest
import torch

from blockloom.core.cache import KVCache
from blockloom.core.endless import EndlessPlan
from blockloom.core.errors import ModelError, UsageError
from blockloom.core.exactness import violations
from blockloom.core.far import coarse_members, coarse_rows, is_coarse
from blockloom.core.layout import Copy, Layout, Role
from blockloom.core.layouts import frames
from blockloom.core.masks import MaskTable
from blockloom.core.plan import build_plan
from blockloom.core.proof import compare, decode_forward, training_forward
from blockloom.core.rollout import Rollout, run
from blockloom.core.rules import rule
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start
from blockloom.models.live import LiveRollout

EXACT, WRONG = 1e-10, 1e-3
PROMPTS = ["a red cat", "blue dog"]
CLIP = ("condition.actions=0", "layout.frames=7", "cache.window=2")
FAR = (*CLIP, "cache.far.patch=2")
BOUNDED = (*FAR, "cache.far.blocks=2")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def test_one_row_per_patch_in_the_middle_of_it():
    rows = coarse_rows(frames(2, 2, 4), 2, 4, 2)
    assert rows.position.tolist() == [[0, 0.5, 0.5], [0, 0.5, 2.5], [1, 0.5, 0.5], [1, 0.5, 2.5]]
    assert rows.block.tolist() == [0, 0, 1, 1] and rows.source.tolist() == [0, 2, 8, 10]
    assert bool(is_coarse(rows).all()) and set(rows.copy.tolist()) == {int(Copy.CLEAN)}


def test_patches_must_fill_frames():
    with pytest.raises(UsageError, match=r"patch = 3 does not divide frames of 4x8 tokens; try 2"):
        coarse_rows(frames(2, 4, 8), 4, 8, 3)
    with pytest.raises(UsageError, match=r"leave cache\.far out"):
        coarse_rows(frames(2, 1, 3), 1, 3, 2)


def test_members_are_the_clean_rows_of_the_patch_in_raster_order():
    content = frames(2, 2, 4)
    noisy = content.replace(copy=int(Copy.NOISY), level=1.0)
    shuffled = content.take(torch.randperm(16, generator=torch.Generator().manual_seed(0)))
    layout = Layout.cat([noisy, shuffled, coarse_rows(content, 2, 4, 2)])
    coarse, members = coarse_members(layout, 2)
    assert coarse.tolist() == [32, 33, 34, 35]
    sources = layout.source[members].tolist()
    assert sources == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert int(members.min()) >= 16  # never the noisy copy
    with pytest.raises(ValueError, match="without all 4 clean rows"):
        coarse_members(layout.take(torch.arange(17, 36)), 2)


def test_who_sees_whom(tiny):
    plan = build_plan(tiny.recipe("video/teacher_forcing", *BOUNDED), 2, 2)
    layout = plan.training_layout()
    seen = plan.table.visible(layout, layout)
    coarse = is_coarse(layout)
    assert int(coarse.sum()) == 7 and plan.far_window == 4

    def blocks(query, keys):
        return sorted(set(layout.block[seen[query.nonzero()[0, 0]] & keys].tolist()))

    clean, noisy = layout.copy == Copy.CLEAN, layout.copy == Copy.NOISY
    last = layout.block == 6
    for query, own in ((noisy & last, []), (clean & ~coarse & last, [6])):
        assert blocks(query, clean & ~coarse) == [5, *own]
        assert blocks(query, coarse) == [3, 4]
    assert blocks(coarse & last, coarse) == [3, 4, 5, 6]
    assert blocks(coarse & last, ~coarse) == []


SYSTEMS = [
    ("video/teacher_forcing", ()),
    ("video/acdit", ()),
    ("video/acdit", ("layout.block=frames:2", "layout.frames=8")),
    ("video/acdit", ("cache.keys=unrotated", "cache.sink=1", "schedule.guidance_scale=2.0")),
    ("video/acdit", ("condition.prefix=true", "backbone.decay=16.0")),
    ("video/rolling_forcing", ("layout.frames=8",)),
    ("video/resampling_forcing", ("backbone.route=0", "cache.context_noise=0.1")),
    ("image/block_masked", ("modality=video", "layout.kind=frames", "layout.block=frame")),
]


@pytest.mark.parametrize("far", [FAR, BOUNDED], ids=["all", "bounded"])
@pytest.mark.parametrize(("name", "extra"), SYSTEMS)
def test_cached_rows_equal_the_masked_forward(tiny, name, extra, far):
    model = tiny.model(name, *far, *extra, dtype=torch.float64, std=0.3)
    assert violations(model.recipe) == []
    plan = build_plan(model.recipe, tiny.height, tiny.width)
    decoder = tiny.decoder(model, PROMPTS, guided=model.recipe.schedule.guidance_scale != 1)
    contents = tiny.contents(model, plan)
    parity = compare(plan, decoder, contents)
    layout = plan.training_layout()
    assert parity.max_error < EXACT and parity.scale > 0.1
    # Every coarse row but the last block's was compared, too.
    last = layout.block == plan.num_blocks - 1
    assert parity.num_rows >= int((~last | (layout.copy == Copy.NOISY)).sum())


def setup(tiny, *extra):
    model = tiny.model("video/acdit", *BOUNDED, *extra, dtype=torch.float64, std=0.3)
    plan = build_plan(model.recipe, tiny.height, tiny.width)
    decoder = tiny.decoder(model, PROMPTS)
    return plan, decoder, tiny.contents(model, plan)


def errors_against(plan, other, decoder, contents):
    """Largest error of decoding by one plan what another was trained with."""
    layout, states = training_forward(plan, decoder, contents)

    def keys(rows):
        return zip(rows.copy.tolist(), rows.order.tolist(), is_coarse(rows).tolist(), strict=True)

    place = {key: row for row, key in enumerate(keys(layout))}
    return max(
        float((hidden[:, at] - states[:, place[key]]).abs().max())
        for rows, hidden in decode_forward(other, decoder, contents)
        for at, key in enumerate(keys(rows))
    )


@pytest.mark.parametrize("write", ["separate", "fused"])
def test_dropping_coarse_rows_a_block_early_shows(tiny, write):
    plan, decoder, contents = setup(tiny, f"cache.write={write}")
    assert errors_against(plan, plan, decoder, contents) < EXACT
    assert plan.far is not None
    early = replace(plan, far=replace(plan.far, blocks=1))
    assert errors_against(plan, early, decoder, contents) > WRONG
    blind = replace(plan, table=rule("block_diffusion", window=2, far=1))
    assert errors_against(plan, blind, decoder, contents) > WRONG


def test_far_rows_carry_the_far_past_and_only_that(tiny):
    """Changing frame 0 reaches frame 5 through coarse rows, and not without them."""
    model = tiny.model("video/acdit", *FAR, dtype=torch.float64, std=0.3)
    plain = tiny.model("video/acdit", *CLIP, dtype=torch.float64, std=0.3)
    changes = []
    for each in (model, plain):
        plan = build_plan(each.recipe, tiny.height, tiny.width)
        contents = tiny.contents(each, plan)
        values = contents.values.clone()
        values[:, plan.sources(0)] += 1.0
        decoder = tiny.decoder(each, PROMPTS)
        states = []
        for held in (contents, replace(contents, values=values)):
            layout, hidden = training_forward(plan, decoder, held)
            states.append(hidden[:, (layout.block == 5) & (layout.copy == Copy.NOISY)])
        changes.append(float((states[0] - states[1]).abs().max()))
    # Two layers with a window of two blocks see no farther than frame 3.
    assert changes[0] > WRONG and changes[1] == 0.0


def far_table(**entries):
    """The table of `BOUNDED` with some entries exchanged."""
    right = rule("block_diffusion", window=2, far=2).to_dict()
    return right | {name.replace("_", "->"): text for name, text in entries.items()}


WRONG_TABLES = [
    # A window of coarse rows one too long, for noisy rows (a fused pass evicts after it, so that
    # its noisy rows find one block more) and for coarse ones.
    {"N_C": "LT(block) & ((NEAR(block,2) & ~k.COARSE) | (k.COARSE & NEAR(block,5)))"},
    {
        "C_C": "(~q.COARSE & ~k.COARSE & LE(block) & NEAR(block,2)) | "
        "(q.COARSE & k.COARSE & LE(block) & NEAR(block,5))"
    },
    # Tokens one block after they were dropped.
    {"N_C": "LT(block) & ((NEAR(block,3) & ~k.COARSE) | (k.COARSE & NEAR(block,4)))"},
    # The coarse copy of the block that is being made.
    {"N_C": "(LT(block) & NEAR(block,2) & ~k.COARSE) | (k.COARSE & LE(block) & NEAR(block,4))"},
]


@pytest.mark.parametrize(
    ("entries", "write"),
    [*((wrong, "separate") for wrong in WRONG_TABLES), *((w, "fused") for w in WRONG_TABLES[1::2])],
)
def test_tables_off_by_one_are_refused_and_really_wrong(tiny, entries, write):
    table = far_table(**entries)
    name, settings = "video/acdit", (*BOUNDED, f"cache.write={write}")
    text = "{" + ", ".join(f'"{key}": "{value}"' for key, value in table.items()) + "}"
    assert violations(tiny.recipe(name, *settings)) == []
    with pytest.raises(ModelError, match=r"cache\.exact = true is disproved: \(c\)"):
        tiny.recipe(name, *settings, f"mask={text}")
    plan, decoder, contents = setup(tiny, f"cache.write={write}")
    bad = replace(plan, table=MaskTable.parse(table))
    assert compare(bad, decoder, contents).max_error > WRONG


def test_the_right_table_written_out_is_proved(tiny):
    text = "{" + ", ".join(f'"{key}": "{value}"' for key, value in far_table().items()) + "}"
    assert violations(tiny.recipe("video/acdit", *BOUNDED, f"mask={text}")) == []


def test_coarse_rows_stay_when_their_tokens_go():
    cache = KVCache(num_layers=0, batch=1, capacity=40, num_kv_heads=1, head_dim=2, num_axes=3)
    content = frames(6, 2, 2)
    rows = Layout.cat([content, coarse_rows(content, 2, 2, 2)])
    view = cache.view(rows, keep=torch.arange(rows.num_tokens))
    cache.write(view)
    cache.commit()

    def left():
        length = int(cache.written[0])
        role, block = cache.layout.role[0, :length], cache.layout.block[0, :length]
        coarse = (role & int(Role.COARSE)) > 0
        return sorted(set(block[~coarse].tolist())), sorted(block[coarse].tolist())

    assert cache.evict(window=2, next_block=5, sink=1) == 4 * 3 and left()[1] == [0, 1, 2, 3, 4, 5]
    assert cache.evict(window=2, next_block=6, sink=1, far=4) == 4 + 3
    assert left() == ([0, 5], [3, 4, 5])


@pytest.mark.parametrize("write", ["separate", "fused"])
@pytest.mark.parametrize("far", [FAR, BOUNDED], ids=["all", "bounded"])
def test_the_cache_is_as_large_as_needed(tiny, far, write):
    model = tiny.model("video/acdit", *far, f"cache.write={write}", "layout.frames=12")
    request = Request(PROMPTS, [item_generator(0, k) for k in range(2)])
    rollout = start(model, request)
    run(rollout)
    most = max(entry["written"][0] for entry in rollout.cache.log)
    assert most <= rollout.cache.capacity
    coarse = rollout.cache.layout.role[0, : int(rollout.cache.written[0])] == int(Role.COARSE)
    assert int(coarse.sum()) == 4 * (11 if far is FAR else 3)
    # 16 tokens of every frame, or 4 of those that are far.
    assert rollout.cache.capacity == 3 * 16 + 4 * (12 if far is FAR else 5)


def test_with_and_without_a_cache_the_same_video(tiny):
    model = tiny.model("video/acdit", *BOUNDED, dtype=torch.float64, std=0.3)
    made = []
    for use_cache in (True, False):
        request = Request(PROMPTS, [item_generator(0, k) for k in range(2)], use_cache=use_cache)
        made.append(run(start(model, request))[0])
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("write", ["separate", "fused"])
def test_endless_with_bounded_far_history_is_the_long_request_bit_for_bit(tiny, write):
    model = tiny.model("video/acdit", *BOUNDED, f"cache.write={write}", std=0.3)
    streams = [item_generator(7, k) for k in range(2)]
    live = LiveRollout(model, PROMPTS, streams)
    parts = [live.step() for _ in range(9)]
    request = Request(PROMPTS, [item_generator(7, k) for k in range(2)], frames=20)
    whole = run(start(model, request))[0].unflatten(1, (20, 16))[:, :9]
    assert torch.equal(torch.stack(parts, 1), whole)
    state, before = live.snapshot(), live.step()
    live.restore(state)
    assert torch.equal(live.step(), before)


def test_endless_with_unbounded_far_history_is_refused(tiny):
    plan = build_plan(tiny.recipe("video/acdit", *FAR), 4, 4)
    with pytest.raises(UsageError, match=r"would grow for ever; try cache\.far\.blocks=4"):
        EndlessPlan(plan)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("video/far", ("cache.far.patch=2",), r"layout\.copies = 1 .* needs 2 copies"),
        ("image/acdit", ("cache.far.patch=2",), r"blocks of whole frames"),
        ("video/acdit", ("cache.far.patch=2", "cache.window=null"), r"set cache\.window"),
        ("video/acdit", ("cache.far.patch=1",), r"cache\.far\.patch: .*greater than or equal to 2"),
        ("video/acdit", ("cache.far.blocks=0",), r"cache\.far\.blocks: .*greater than or equal"),
        ("video/acdit", ("cache.far.patches=2",), r"unknown key cache\.far\.patches; .*patch"),
        ("video/acdit", ("cache.far.patch=2", "mask=nbdiff"), r"leave cache\.far out"),
        ("video/par", ("cache.far.patch=2",), r"leave cache\.far out"),
    ],
)
def test_what_far_history_needs(tiny, name, settings, message):
    with pytest.raises(ModelError, match=message):
        tiny.recipe(name, *settings)


def test_training_reaches_the_patch_embedding(tiny):
    model = tiny.model("video/acdit", *FAR, std=0.3)
    plan = build_plan(model.recipe, tiny.height, tiny.width)
    layout = plan.training_layout()
    values = torch.randn(2, layout.num_tokens, 5, generator=torch.Generator().manual_seed(0))
    nothing = torch.zeros(2, layout.num_tokens, dtype=torch.bool)
    with torch.enable_grad():
        hidden = model.backbone(
            values, nothing, layout, layout.level, tiny.decoder(model, PROMPTS).cond,
            plan.lower(layout, layout),
        )  # fmt: skip
        noisy = layout.copy == Copy.NOISY
        (early,) = torch.autograd.grad(
            hidden[:, noisy & (layout.block < 2)].sum(), model.backbone.embed_patches.weight,
            retain_graph=True,
        )  # fmt: skip
        (late,) = torch.autograd.grad(
            hidden[:, noisy & (layout.block == 3)].sum(), model.backbone.embed_patches.weight
        )
    assert float(early.abs().max()) == 0.0 and float(late.abs().max()) > 0


def test_rollouts_need_no_more_from_a_decoder_than_before(tiny):
    """`Rollout` hands coarse rows to the model beside the clean rows they are made of."""
    model = tiny.model("video/acdit", *BOUNDED)
    plan = build_plan(model.recipe, tiny.height, tiny.width)
    contents = tiny.contents(model, plan)
    passes = []
    rollout = Rollout(
        plan, tiny.decoder(model, PROMPTS), None, values=contents.values,
        is_known=torch.ones(2, plan.num_slots, dtype=torch.bool),
        generators=[item_generator(0, k) for k in range(2)],
        record=lambda rows, hidden: passes.append(rows),
    )  # fmt: skip
    for _ in rollout.events():
        pass
    counts = [(int((~is_coarse(rows)).sum()), int(is_coarse(rows).sum())) for rows in passes]
    assert counts == [(16, 4)] * 6
