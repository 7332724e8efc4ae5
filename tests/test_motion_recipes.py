"""Every motion recipe that ships: cached = masked, items alone = items together, levels in turn.

Sizes are tiny and weights random, as in test_recipes.py.
"""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.exactness import NUM_DRAWS, _plans, violations
from blockloom.core.plan import build_plan
from blockloom.core.proof import compare, training_forward
from blockloom.core.recipe import frames_per_block, list_recipes, load_recipe
from blockloom.core.rollout import run
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start

MOTIONS = list_recipes("motion")
PROMPTS = ["a person walks", "jump twice", ""]


def short(name):
    """Forget something: a window shorter than the training windows of a recipe that has one."""
    recipe = load_recipe(name)
    together = frames_per_block(recipe.layout.block) or 1
    blocks = recipe.layout.frames // together
    return (f"cache.window={min(3, blocks - 2)}",) if recipe.cache.window else ()


CACHED = [
    *[(name, short(name)) for name in MOTIONS if load_recipe(name).cache.exact],
    ("motion/mogo", ("cache.write=separate", "cache.window=2", "cache.sink=1")),
    ("motion/mogo_levels", ("cache.keys=unrotated", "cache.window=3")),
    ("motion/mogo_levels", ("layout.block=frames:2", "cache.window=2")),
    ("motion/block_flow", ("layout.block=frames:2", "cache.window=2", "cache.sink=1")),
    # Actions among the tokens, and levels of a chunk that are told what is observed before it.
    ("motion/control", ("cache.write=separate", "cache.window=5")),
    # Levels in turn over frames of a video, too: any codes with several tokens a frame.
    ("motion/mogo_levels", ("backbone.decay=8", "cache.window=3")),
    # Tokens that are given, with a sink, and numbers told to two copies by aligned attention.
    (
        "motion/timar",
        ("layout.block=frames:2", "layout.frames=10", "cache.window=2", "cache.sink=1"),
    ),
    ("motion/timar", ("cache.write=fused", "cache.keys=unrotated", "cache.window=2")),
    ("motion/faceformer", ("backbone.period=3", "cache.window=9")),
    (
        "motion/block_flow",
        (
            "condition.actions=4",
            "condition.aligned=true",
            "backbone.position=periodic",
            "backbone.period=3",
            "cache.window=3",
        ),
    ),
]


def plan_for(tiny, model, **how):
    return build_plan(model.recipe, *tiny.grid(model.recipe), **how)


def draw(model, prompts, seeds, **settings):
    generators = [item_generator(seed, 0) for seed in seeds]
    rollout = start(model, Request(prompts, generators, **settings))
    with torch.no_grad():
        values, known = run(rollout)
    assert bool(known.all()) and bool(torch.isfinite(values.float()).all())
    return values


def told(model, items, frames):
    """Draw what a request of a recipe is told: numbers per frame, and tokens that are given."""
    recipe, rng = model.recipe, torch.Generator().manual_seed(0)
    settings = {}
    if recipe.condition.actions:
        shape = (items, frames, recipe.condition.actions)
        settings["actions"] = torch.randn(shape, generator=rng).to(model.dtype)
    if recipe.layout.given:
        slots = frames * model.slots_per_frame
        settings["values"] = torch.randn(items, slots, model.config.latent_channels, generator=rng)
        settings["is_known"] = model.is_given(torch.arange(slots)).expand(items, -1)
    return settings


def test_what_is_not_exact_keeps_nothing_and_every_recipe_names_its_source():
    approximate = {name for name in MOTIONS if not load_recipe(name).cache.exact}
    assert all(load_recipe(name).cache.write == "none" for name in approximate)
    assert {name for name, _ in CACHED} == set(MOTIONS) - approximate
    assert all(load_recipe(n).system.differs and load_recipe(n).system.url for n in MOTIONS)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(("name", "overrides"), CACHED)
def test_cached_motion_equals_the_masked_forward(tiny, name, overrides, guided):
    model = tiny.model(name, *overrides, dtype=torch.float64)
    plan = plan_for(tiny, model)
    assert model.recipe.cache.exact and (model.recipe.cache.window or 0) < plan.num_blocks - 1
    decoder = tiny.decoder(model, PROMPTS[:2], guided)
    decoder.actions = told(model, 2, model.recipe.layout.frames).get("actions")
    with torch.no_grad():
        parity = compare(plan, decoder, tiny.contents(model, plan))
    assert parity.max_error < 1e-10
    assert 1.0 < parity.scale < 10 and parity.num_rows >= plan.num_slots


@pytest.mark.parametrize("name", MOTIONS)
def test_motions_together_are_motions_alone_bit_for_bit(tiny, name):
    model = tiny.model(name)
    others = told(model, 3, 5)
    together = draw(model, PROMPTS, range(3), frames=5, **others)
    for item in range(3):
        own = {name: part[item : item + 1] for name, part in others.items()}
        alone = draw(model, PROMPTS[item : item + 1], [item], frames=5, **own)
        assert torch.equal(alone[0], together[item])
    assert not any(torch.equal(a, b) for a, b in pairwise(together))


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in MOTIONS
        if load_recipe(name).cache.exact and load_recipe(name).head.kind == "categorical"
    ],
)
def test_greedy_codes_are_equal_with_and_without_a_cache(tiny, name):
    model = tiny.model(name, dtype=torch.float64, std=0.3)
    settings = {"frames": 6, "temperature": 0.0, **told(model, 2, 6)}
    cached = draw(model, PROMPTS[:2], range(2), **settings)
    assert torch.equal(cached, draw(model, PROMPTS[:2], range(2), **settings, use_cache=False))
    assert len(cached.unique()) > 1


@pytest.mark.parametrize("name", [n for n in MOTIONS if load_recipe(n).schedule.levels])
def test_levels_are_filled_in_turn(tiny, name):
    model = tiny.model(name)
    levels = model.recipe.schedule.levels
    others = told(model, 1, 4)
    rollout = start(model, Request(["walk"], [item_generator(0, 0)], frames=4, **others))
    seen: list[tuple[int, int]] = []
    with torch.no_grad():
        for event in rollout.events():
            if event.kind != "row":
                continue
            level = (event.data["sources"] % len(levels))[event.data["accepted"][0]].unique()
            assert len(level) == 1
            seen.append((event.block, int(level)))
            assert event.data["row"] < event.data["of_rows"]
    assert seen == sorted(seen)
    assert {level for _, level in seen} == set(range(len(levels)))


def test_the_first_levels_rows_can_be_asked_for(tiny):
    model = tiny.model("motion/momask")
    counts = []
    for steps in (2, None):
        rollout = start(
            model, Request(["walk"], [item_generator(0, 0)], frames=12, num_steps=steps)
        )
        with torch.no_grad():
            counts.append(sum(event.kind == "row" for event in rollout.events()))
    assert counts == [2 + 3, 10 + 3]


@pytest.mark.parametrize("name", ["motion/bad", "motion/bad_ordered"])
def test_orders_of_their_own_start_with_what_is_given(tiny, name):
    model = tiny.model(name)
    given = torch.zeros(1, 8, dtype=torch.bool)
    given[:, [2, 7]] = True
    values = torch.full((1, 8, 1), 3)
    rollout = start(
        model,
        Request(["walk"], [item_generator(0, 0)], values=values, is_known=given, frames=8),
    )
    order = rollout.plan.content.source.tolist()
    assert order[:2] == [2, 7] and sorted(order) == list(range(8))
    halton = build_plan(model.recipe, 1, 1, frames=8).content.source.tolist()
    assert halton == [4, 2, 6, 1, 5, 3, 7, 0]  # from coarse to fine
    assert [slot for slot in halton if slot not in (2, 7)] == order[2:]
    with torch.no_grad():
        drawn, _ = run(rollout)
    assert drawn[0, [2, 7], 0].tolist() == [3, 3] and len(drawn.unique()) > 1


def test_rows_say_whether_they_are_known(tiny):
    model = tiny.model("motion/bad")
    rollout = start(model, Request(["walk"], [item_generator(0, 0)], frames=6, num_steps=3))
    seen = []
    forward = rollout.decoder.forward

    def spy(values, is_masked, layout, *rest):
        seen.append((layout.copy.tolist(), is_masked[0].tolist(), layout.source.tolist()))
        return forward(values, is_masked, layout, *rest)

    rollout.decoder.forward = spy
    with torch.no_grad():
        run(rollout)
    assert len(seen) == 3
    for copies, is_masked, _ in seen:
        assert [copy == 1 for copy in copies] == is_masked  # noisy where masked, else clean
    assert [sum(masked) for _, masked, _ in seen] == [6, 5, 3]
    # A later row sees more rows as clean, in the order of the layout.
    assert seen[1][0] == [0, 1, 1, 1, 1, 1] and seen[2][0] == [0, 0, 0, 1, 1, 1]


def test_items_of_one_request_have_the_same_given_slots(tiny):
    model = tiny.model("motion/bad")
    given = torch.zeros(2, 6, dtype=torch.bool)
    given[0, 1] = given[1, 2] = True
    request = Request(
        ["a", "b"], [item_generator(0, k) for k in range(2)], is_known=given,
        values=torch.zeros(2, 6, 1, dtype=torch.long), frames=6,
    )  # fmt: skip
    with pytest.raises(UsageError, match="one request per item"):
        start(model, request)


def test_masked_rows_are_told_their_turn(tiny):
    model = tiny.fresh_model("motion/bad")
    with torch.no_grad():
        model.backbone.order_table.weight.zero_()
    other = tiny.model("motion/bad")
    drawn = [draw(m, ["walk"], [0], frames=6, temperature=0.0) for m in (model, other)]
    assert not torch.equal(*drawn)


@pytest.mark.parametrize("write", ["fused", "separate"])
def test_cached_flow_equals_the_masked_forward_where_values_are_missing(tiny, write):
    model = tiny.model(
        "motion/block_flow", f"cache.write={write}", "cache.window=3", dtype=torch.float64
    )
    assert model.knows_missing
    plan = plan_for(tiny, model)
    whole = tiny.contents(model, plan)
    holed = replace(whole, values=whole.values.clone())
    holed.values[0, [1, 4]] = float("nan")
    with torch.no_grad():
        decoder = tiny.decoder(model, PROMPTS[:2])
        assert compare(plan, decoder, holed).max_error < 1e-10
        zeros = replace(whole, values=holed.values.nan_to_num(nan=0.0))
        states = [training_forward(plan, decoder, some)[1] for some in (whole, zeros, holed)]
    # What is missing is seen as such, and not as zeros, by that item alone.
    for other in states[:2]:
        assert (other[0] - states[2][0]).abs().max() > 1e-3
        assert torch.equal(other[1], states[2][1])


def test_orders_that_are_trained_are_proved_too():
    recipe = load_recipe("motion/bad_ordered")
    orders = {tuple(plan.content.order[plan.content.source.argsort()].tolist())
              for plan in _plans(recipe)}  # fmt: skip
    assert len(orders) == 1 + NUM_DRAWS  # Halton's, and some that were drawn
    assert not violations(recipe)
