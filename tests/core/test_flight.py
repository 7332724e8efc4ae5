"""Several blocks in flight: level matrices in the decode loop, cached or not, given or drawn."""

from dataclasses import replace

import pytest
import torch

from blockloom.core.endless import EndlessPlan
from blockloom.core.errors import ModelError, UsageError
from blockloom.core.exactness import violations
from blockloom.core.levels import level_matrix
from blockloom.core.plan import build_plan
from blockloom.core.proof import compare
from blockloom.core.recipe import load_recipe
from blockloom.core.rollout import Rollout, run
from blockloom.core.sampling import item_generator
from blockloom.core.schedule import scheduler_of

ONE_COPY = "video/diffusion_forcing"
SHAPES = {
    "pyramid": (ONE_COPY, "schedule.matrix=pyramid", "schedule.steps=4"),
    "slow pyramid": (ONE_COPY, "schedule.matrix=pyramid", "schedule.steps=4", "schedule.delay=2"),
    "trapezoid": (ONE_COPY, "schedule.matrix=trapezoid", "schedule.steps=4"),
    "full": (ONE_COPY, "schedule.matrix=full", "schedule.steps=4"),
    "renoise": (ONE_COPY, "schedule.matrix=pyramid", "schedule.steps=4", "schedule.update=renoise"),
    "rolling": ("video/rolling_forcing", "schedule.steps=6", "schedule.flight=3"),
    "fused": (ONE_COPY, "schedule.matrix=pyramid", "schedule.steps=4", "cache.write=fused"),
}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def fly(tiny, setup, *, items=2, frames=6, known=None, use_cache=True, guided=False, **changes):
    model = tiny.model(*setup, dtype=torch.float64, std=0.3)
    plan = replace(build_plan(model.recipe, tiny.height, tiny.width, frames=frames), **changes)
    values = tiny.contents(model, plan, items).values
    decoder = tiny.decoder(model, ["a red cat", "blue dog"][:items], guided)
    rng = torch.Generator().manual_seed(1)
    decoder.actions = torch.randn(2, frames, 4, generator=rng).double()[:items]
    is_known = torch.zeros(items, plan.num_slots, dtype=torch.bool)
    if known is not None:
        is_known[:, known] = True
    return Rollout(
        plan, decoder, scheduler_of(model.recipe, guidance_scale=2.0 if guided else 1.0),
        values=values, is_known=is_known, use_cache=use_cache,
        generators=[item_generator(0, k) for k in range(items)],
    )  # fmt: skip


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("shape", SHAPES)
def test_in_flight_blocks_are_the_same_with_and_without_a_cache(tiny, shape, guided):
    fast = fly(tiny, SHAPES[shape], guided=guided)
    slow = fly(tiny, SHAPES[shape], guided=guided, use_cache=False)
    cached, known = run(fast)
    plain, _ = run(slow)
    assert bool(known.all()) and torch.isfinite(cached).all()
    assert (cached - plain).abs().max() < 1e-10 * float(plain.abs().max())
    assert shape in ("full", "trapezoid") or fast.num_forwarded < slow.num_forwarded


def test_a_pyramid_whose_blocks_wait_is_one_block_after_the_other_bit_for_bit(tiny):
    setup = (ONE_COPY, "schedule.matrix=pyramid", "schedule.steps=3", "schedule.delay=3")
    slow_pyramid, _ = run(fly(tiny, setup))
    plain, _ = run(fly(tiny, setup, matrix="autoregressive"))
    assert torch.equal(slow_pyramid, plain)
    quick, _ = run(fly(tiny, setup, delay=1))
    assert not torch.equal(quick, plain)


def committed(rollout):
    """Blocks in the order they became permanent, with the row before each."""
    order, rows = [], 0
    for event in rollout.events():
        rows += event.kind == "row"
        if event.kind == "commit":
            order.append((event.block, rows))
    return order


def test_blocks_finish_in_their_order_as_the_matrix_says(tiny):
    steps, frames = 4, 6
    assert committed(fly(tiny, SHAPES["pyramid"])) == [(b, steps + b) for b in range(frames)]
    assert committed(fly(tiny, SHAPES["slow pyramid"])) == [
        (b, steps + 2 * b) for b in range(frames)
    ]
    assert committed(fly(tiny, SHAPES["full"])) == [(b, steps) for b in range(frames)]
    # The last block of a trapezoid is done as early as the first, and waits for the middle.
    ends = committed(fly(tiny, SHAPES["trapezoid"]))
    assert ends == [(0, 4), (1, 5), (2, 6), (3, 6), (4, 6), (5, 6)]
    # Six steps over three blocks in flight: a block every two rows.
    assert committed(fly(tiny, SHAPES["rolling"])) == [(b, 6 + 2 * b) for b in range(frames)]


def test_rows_say_which_slots_move_between_which_levels(tiny):
    rows = [e.data for e in fly(tiny, SHAPES["pyramid"]).events() if e.kind == "row"]
    matrix = level_matrix("pyramid", scheduler_of(load_recipe(*[SHAPES["pyramid"][0]], [
        *SHAPES["pyramid"][1:]])).levels(), 6)  # fmt: skip
    assert len(rows) == len(matrix) - 1
    for number, data in enumerate(rows):
        moved = (matrix[number] != matrix[number + 1]).nonzero()[:, 0].tolist()
        assert sorted({int(s) // 16 for s in data["sources"]}) == moved
        assert data["level"] == float(matrix[number, moved[0]])
        done = matrix[number + 1, data["sources"] // 16] == 0
        assert torch.equal(data["accepted"], done.expand(2, -1))


@pytest.mark.parametrize("shape", ["pyramid", "trapezoid", "full", "rolling"])
def test_given_frames_stay_and_are_looked_at(tiny, shape):
    given = torch.arange(2 * 16)
    drawn, _ = run(fly(tiny, SHAPES[shape], known=given))
    start = fly(tiny, SHAPES[shape], known=given)
    first = start.values.clone()
    assert torch.equal(drawn[:, given], first[:, given])
    start.values[:, given] += 1.0
    changed, _ = run(start)
    assert (changed[:, 32:48] - drawn[:, 32:48]).abs().max() > 1e-3
    # In between: the slots of a block may be given in part, too.
    some = torch.cat((torch.arange(8), torch.arange(80, 96)))
    between, _ = run(fly(tiny, SHAPES[shape], known=some))
    assert torch.equal(between[:, some], first[:, some])


@pytest.mark.parametrize("shape", ["pyramid", "rolling"])
def test_items_do_not_depend_on_one_another(tiny, shape):
    both, _ = run(fly(tiny, SHAPES[shape]))
    one, _ = run(fly(tiny, SHAPES[shape], items=1))
    assert torch.allclose(one[0], both[0], atol=1e-12) and not torch.equal(both[0], both[1])


@pytest.mark.parametrize("window", ["cache.window=2", "cache.window=null", "cache.sink=1"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_cached_flight_equals_the_masked_forward_at_the_same_levels(tiny, shape, window):
    model = tiny.model(*SHAPES[shape], window, dtype=torch.float64, std=0.3)
    plan = build_plan(model.recipe, tiny.height, tiny.width, frames=7)
    assert plan.flight > 1 and violations(model.recipe) == []
    contents = tiny.contents(model, plan)
    levels = torch.rand(plan.num_slots, generator=torch.Generator().manual_seed(2))
    contents = replace(contents, level=0.1 + 0.8 * levels)
    decoder = tiny.decoder(model, ["a red cat", "blue dog"])
    decoder.actions = torch.randn(2, 7, 4).double()
    right = compare(plan, decoder, contents)
    assert right.max_error < 1e-10 and right.scale > 1
    if shape == "rolling":  # the same contents in flights of another size: clearly another model
        assert compare(replace(plan, flight=2), decoder, contents).max_error < 1e-10


def test_rolling_plans_whose_mask_looks_too_far_are_refused():
    with pytest.raises(ModelError, match=r"cache\.exact = true is disproved"):
        load_recipe(
            "video/rolling_forcing", ["mask={C->C: LE(block), N->C: LT(block), N->N: EQ(group)}"]
        )
    with pytest.raises(ModelError, match="evicted before its last reader"):
        load_recipe(
            "video/rolling_forcing", ["mask={C->C: LE(block), N->C: LT(group), N->N: EQ(group)}"]
        )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (ONE_COPY, "schedule.matrix=rolling", "needs layout.copies = 2"),
        ("video/teacher_forcing", "schedule.matrix=pyramid", "needs layout.copies = 1"),
        ("video/masked", "schedule.matrix=full", 'head.kind = "categorical"'),
        ("video/rolling_forcing", "schedule.flight=2", "try 4"),
        ("video/rolling_forcing", "schedule.update=unipc", "history of one block"),
        ("video/rolling_forcing", "corruption.per=block", 'set corruption.per to "flight"'),
        ("video/teacher_forcing", "corruption.per=flight", 'set corruption.per to "block"'),
    ],
)
def test_combinations_that_cannot_fly_say_what_to_set(name, change, message):
    with pytest.raises(ModelError, match=message):
        load_recipe(name, [change])
    slow = ["schedule.matrix=pyramid", "schedule.delay=3"]
    with pytest.raises(ModelError, match=r"schedule\.delay = 3 is more than .* try 2"):
        load_recipe(ONE_COPY, slow)


def test_endless_rollouts_take_one_block_after_the_other(tiny):
    model = tiny.model(*SHAPES["pyramid"])
    with pytest.raises(UsageError, match='matrix = "pyramid" in an endless rollout'):
        EndlessPlan(build_plan(model.recipe, tiny.height, tiny.width))


def test_training_flights_start_anywhere():
    recipe = load_recipe("video/rolling_forcing")
    seen = set()
    for seed in range(20):
        plan = build_plan(recipe, 1, 1, generator=torch.Generator().manual_seed(seed))
        layout = plan.training_layout()
        assert layout.group[:6].tolist() == list(range(6))  # clean rows: their block
        seen.add(tuple(layout.group[6:].tolist()))
    assert seen == {(0, 0, 0, 3, 3, 3), (0, 1, 1, 1, 4, 4), (0, 0, 2, 2, 2, 5)}
