"""Every motion recipe that ships: cached = masked, items alone = items together, levels in turn.

Sizes are tiny and weights random, as in test_recipes.py.
"""

from itertools import pairwise

import pytest
import torch

from blockloom.core.plan import build_plan
from blockloom.core.proof import compare
from blockloom.core.recipe import list_recipes, load_recipe
from blockloom.core.rollout import run
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start

MOTIONS = list_recipes("motion")
PROMPTS = ["a person walks", "jump twice", ""]
SHORT = ("cache.window=3",)  # shorter than a training window, so that the cache forgets
CACHED = [
    *[(name, SHORT) for name in MOTIONS if load_recipe(name).cache.exact],
    ("motion/mogo", ("cache.write=separate", "cache.window=2", "cache.sink=1")),
    ("motion/mogo_levels", ("cache.keys=unrotated", "cache.window=3")),
    ("motion/mogo_levels", ("layout.block=frames:2", "cache.window=2")),
    ("motion/block_flow", ("layout.block=frames:2", "cache.window=2", "cache.sink=1")),
    # Levels in turn over frames of a video, too: any codes with several tokens a frame.
    ("motion/mogo_levels", ("backbone.decay=8", "cache.window=3")),
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
    assert model.recipe.cache.exact and model.recipe.cache.window < plan.num_blocks - 1
    with torch.no_grad():
        parity = compare(plan, tiny.decoder(model, PROMPTS[:2], guided), tiny.contents(model, plan))
    assert parity.max_error < 1e-10
    assert 1.0 < parity.scale < 10 and parity.num_rows >= plan.num_slots


@pytest.mark.parametrize("name", MOTIONS)
def test_motions_together_are_motions_alone_bit_for_bit(tiny, name):
    model = tiny.model(name)
    together = draw(model, PROMPTS, range(3), frames=5)
    for item in range(3):
        alone = draw(model, PROMPTS[item : item + 1], [item], frames=5)
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
    settings = {"frames": 6, "temperature": 0.0}
    cached = draw(model, PROMPTS[:2], range(2), **settings)
    assert torch.equal(cached, draw(model, PROMPTS[:2], range(2), **settings, use_cache=False))
    assert len(cached.unique()) > 1


@pytest.mark.parametrize("name", [n for n in MOTIONS if load_recipe(n).schedule.levels])
def test_levels_are_filled_in_turn(tiny, name):
    model = tiny.model(name)
    levels = model.recipe.schedule.levels
    rollout = start(model, Request(["walk"], [item_generator(0, 0)], frames=4))
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
