"""Every recipe that ships: cached = masked, items alone = items together, stream = call.

Sizes are tiny and weights random; what holds here holds because of masks and bookkeeping, not
because of training.
"""

import hashlib
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from blockloom.core.plan import build_plan
from blockloom.core.proof import compare, training_forward
from blockloom.core.recipe import list_recipes, load_recipe
from blockloom.core.rollout import Rollout, run
from blockloom.core.sampling import item_generator
from blockloom.core.schedule import scheduler_of
from blockloom.models.generate import Request, picture_values, start

# diffusers' multistep solver hands tensors to numpy in a way numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

RECIPES = list_recipes("image")
VIDEOS = list_recipes("video")
EXACT = [name for name in RECIPES if load_recipe(name).cache.exact]
PROMPTS = ["a red cat", "blue dog", "sun", "a very large green tree", ""]
VARIANTS = [
    *[(name, ()) for name in EXACT],
    ("image/acdit", ("cache.write=separate",)),
    ("image/block_masked", ("cache.write=fused",)),
    ("image/block_masked", ("layout.block=tile:2x2",)),
    ("image/block_masked", ("layout.block=5",)),
    # Clean rows that see the prompt need a cache per guidance branch.
    ("image/acdit", ("condition.modulate=[clean, noisy]",)),
    ("image/block_masked", ("condition.cross=true", "condition.modulate=[clean, noisy]")),
    ("image/block_masked", ("condition.cross=true",)),
    ("image/block_masked", ("mask=nbdiff",)),
    ("image/acdit", ("mask=nbdiff",)),
    # Windows, with and without a sink, in both commit modes and over tokens.
    ("image/acdit", ("cache.window=2",)),
    ("image/acdit", ("cache.window=1",)),
    ("image/acdit", ("cache.window=2", "cache.write=separate")),
    ("image/acdit", ("cache.window=2", "cache.sink=1")),
    ("image/causalfusion", ("cache.window=2", "cache.sink=1")),
    ("image/causalfusion", ("cache.window=2", "cache.write=fused")),
    ("image/llamagen", ("cache.window=3",)),
    ("image/llamagen", ("cache.window=4", "cache.sink=2")),
    ("image/llamagen", ("backbone.kv_heads=1",)),
    ("image/llamagen", ("cache.keys=rotated",)),
    ("image/acdit", ("cache.keys=rotated", "cache.window=2")),
    # Rows that read a few of the finished blocks only.
    ("image/acdit", ("backbone.route=1",)),
    ("image/acdit", ("backbone.route=1", "backbone.route_per=block", "cache.write=separate")),
    ("image/block_masked", ("backbone.route=1", "backbone.kv_heads=1", "cache.keys=rotated")),
    ("image/causalfusion", ("backbone.route=1",)),
]


def plan_for(tiny, model, **how):
    return build_plan(model.recipe, tiny.height, tiny.width, **how)


def test_thirteen_recipes_ship():
    assert [name.split("/")[1] for name in RECIPES] == sorted(
        "llamagen maskgit maskgil halton block_masked acdit causalfusion latentlm mar far givt cm3 "
        "ardm".split()
    )
    assert all(load_recipe(n).system.differs and load_recipe(n).system.url for n in RECIPES)
    assert sorted(set(RECIPES) - set(EXACT)) == ["image/ardm", "image/halton", "image/maskgit"]


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(("name", "overrides"), VARIANTS)
def test_cached_decode_equals_masked_forward(tiny, name, overrides, guided):
    model = tiny.model(name, *overrides, dtype=torch.float64)
    plan = plan_for(tiny, model)
    contents = tiny.contents(model, plan)
    with torch.no_grad():
        decoder = tiny.decoder(model, PROMPTS[:2], guided)
        parity = compare(plan, decoder, contents)
        other = tiny.decoder(model, PROMPTS[2:4], guided)
        states = [training_forward(plan, d, contents)[1][:2] for d in (decoder, other)]
        assert parity.max_error < 1e-10
        single = tiny.model(name, *overrides)
        rounded = compare(plan, tiny.decoder(single, PROMPTS[:2], guided), _single(contents))
    assert rounded.max_error <= 2e-6
    # Not trivially equal: states are of order one, and the words reach them.
    assert 1.0 < parity.scale < 10 and parity.num_rows >= plan.num_slots
    if model.uses_prompt:
        assert (states[0] - states[1]).abs().max() > 1e-3


def _single(contents):
    values, noisy = contents.values, contents.noisy
    if values.is_floating_point():
        values = values.float()
    noisy = None if noisy is None else noisy.float()
    return type(contents)(values, contents.is_masked, noisy, contents.level)


@pytest.mark.parametrize("name", ["image/causalfusion", "image/cm3"])
def test_random_layouts_are_exact_too(tiny, name):
    model = tiny.model(name, dtype=torch.float64)
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        span = (7, 13) if name == "image/cm3" else None
        plan = plan_for(tiny, model, generator=rng, span=span)
        with torch.no_grad():
            decoder = tiny.decoder(model, PROMPTS[:2])
            parity = compare(plan, decoder, tiny.contents(model, plan, seed=seed))
        assert parity.max_error < 1e-10 and parity.scale > 1


def greedy(tiny, model, use_cache, guided):
    plan = plan_for(tiny, model)
    values = tiny.contents(model, plan).values
    rollout = Rollout(
        plan,
        tiny.decoder(model, PROMPTS[:2], guided),
        scheduler_of(model.recipe, temperature=0.0, guidance_scale=2.0 if guided else 1.0),
        values=torch.zeros_like(values),
        is_known=torch.zeros(values.shape[:2], dtype=torch.bool),
        generators=[item_generator(0, k) for k in range(2)],
        num_steps=3,
        use_cache=use_cache,
    )
    with torch.no_grad():
        return (*run(rollout), rollout)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(
    ("name", "overrides"), [v for v in VARIANTS if "modulate" not in str(v)] + [("image/ardm", ())]
)
def test_greedy_tokens_are_equal_with_and_without_a_cache(tiny, name, overrides, guided):
    model = tiny.model(name, *overrides, dtype=torch.float64, std=0.3)
    cached, known, fast = greedy(tiny, model, True, guided)
    plain, _, slow = greedy(tiny, model, False, guided)
    assert bool(known.all()) and fast.num_passes >= slow.num_passes
    if model.recipe.cache.write != "none":
        assert fast.num_forwarded < slow.num_forwarded
    if cached.is_floating_point():
        assert (cached - plain).abs().max() < 1e-10 * max(1.0, float(plain.abs().max()))
    else:
        assert torch.equal(cached, plain) and len(cached.unique()) > 1


def draw(model, prompts, seeds, **settings):
    generators = [item_generator(seed, 0) for seed in seeds]
    rollout = start(model, Request(prompts, generators, num_steps=3, **settings))
    with torch.no_grad():
        values, known = run(rollout)
    assert bool(known.all()) and bool(torch.isfinite(values.float()).all())
    return picture_values(model, values)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5], ids=["plain", "guided"])
@pytest.mark.parametrize("name", RECIPES)
def test_five_together_are_five_alone_bit_for_bit(tiny, name, guidance_scale):
    model = tiny.model(name)
    together = draw(model, PROMPTS, range(5), guidance_scale=guidance_scale)
    for item in range(5):
        alone = draw(model, PROMPTS[item : item + 1], [item], guidance_scale=guidance_scale)
        assert torch.equal(alone[0], together[item])
    assert not any(torch.equal(a, b) for a, b in pairwise(together))
    again = draw(model, PROMPTS, range(5), guidance_scale=guidance_scale)
    assert torch.equal(together, again)


EARLY = [
    ("image/block_masked", "schedule.accept=threshold", "schedule.threshold=0.2"),
    ("image/block_masked", "schedule.accept=entropy_budget", "schedule.gamma=2.5"),
    ("image/maskgit", "schedule.accept=quota", "schedule.threshold=0.3"),
    ("image/block_masked", "schedule.accept=confident_prefix", "schedule.threshold=0.15"),
]


@pytest.mark.parametrize("setup", EARLY)
def test_rules_that_end_a_block_early_do_not_reach_into_other_items(tiny, setup):
    model = tiny.model(*setup, "schedule.steps=4", std=0.3)
    together, rows = traced(model, PROMPTS, range(5))
    lengths = []
    for item in range(5):
        alone, own_rows = traced(model, PROMPTS[item : item + 1], [item])
        assert torch.equal(alone[0], together[item])
        lengths.append(own_rows)
    assert rows < 4 * 4 if setup[0] == "image/block_masked" else rows <= 4
    assert len(set(lengths)) > 1 and rows >= max(lengths)


def traced(model, prompts, seeds):
    generators = [item_generator(seed, 0) for seed in seeds]
    rollout, rows = start(model, Request(prompts, generators)), 0
    with torch.no_grad():
        for event in rollout.events():
            rows += event.kind == "row"
    return picture_values(model, rollout.values), rows


SCRIPT = """
import hashlib, sys, torch
import importlib.util
spec = importlib.util.spec_from_file_location("shared", sys.argv[1])
shared = importlib.util.module_from_spec(spec); spec.loader.exec_module(shared)
from blockloom.core.sampling import item_generator
from blockloom.core.rollout import run
from blockloom.models.generate import Request, start
for name in sys.argv[2:]:
    model = shared.TinyModels().model(name)
    request = Request(["a red cat"], [item_generator(3, 0)], num_steps=3, guidance_scale=2.0)
    with torch.no_grad():
        values, _ = run(start(model, request))
    print(hashlib.sha256(values.numpy().tobytes()).hexdigest())
"""


def test_the_same_seed_in_another_process_is_bit_equal(tiny):
    command = [sys.executable, "-c", SCRIPT, sys.modules[type(tiny).__module__].__file__, *RECIPES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    here = []
    for name in RECIPES:
        request = Request(["a red cat"], [item_generator(3, 0)], num_steps=3, guidance_scale=2.0)
        with torch.no_grad():
            values, _ = run(start(tiny.model(name), request))
        here.append(hashlib.sha256(values.numpy().tobytes()).hexdigest())
    assert done.stdout.split() == here and len(set(here)) == len(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_given_cells_stay_bit_for_bit(tiny, name):
    model = tiny.model(name, std=0.3)
    cells = tiny.height * tiny.width
    rng = torch.Generator().manual_seed(5)
    if model.config.codebook_size:
        values = torch.randint(tiny.codes, (2, cells, 1), generator=rng)
    else:
        values = torch.randn(2, cells, tiny.channels, generator=rng)
    keep = (torch.arange(cells) % tiny.width < 2).expand(2, -1)  # the left half
    given = {"values": values, "is_known": keep, "guidance_scale": 2.0}
    drawn = draw(model, PROMPTS[:2], [0, 1], **given)
    assert torch.equal(drawn[keep], values[keep])
    assert not torch.equal(drawn[~keep], values[~keep])
    uncached = draw(model, PROMPTS[:2], [0, 1], **given, use_cache=False)
    assert torch.equal(uncached[keep], values[keep])
    if not drawn.is_floating_point():
        assert torch.equal(uncached, drawn)
    rest = draw(model, PROMPTS[:1], [0], values=values[:1], is_known=keep[:1], guidance_scale=2.0)
    assert torch.equal(rest[0], drawn[0])


TOKENS = ("cache.window=20",)  # tokens, and the tiny models have 16 in a frame
CACHED_VIDEOS = [
    *[
        (name, TOKENS if load_recipe(name).layout.shift else ())
        for name in VIDEOS
        if load_recipe(name).cache.exact
    ],
    # Both commit modes for one and two copies, sinks, other windows, keys rotated or not.
    ("video/diffusion_forcing", ("cache.write=fused", "cache.window=2")),
    ("video/diffusion_forcing", ("cache.sink=1", "cache.keys=unrotated")),
    ("video/far", ("cache.write=block", "cache.window=2", "cache.sink=1")),
    ("video/magi_ctf", ("cache.write=fused", "cache.sink=1")),
    ("video/magi_mtf", ("cache.write=fused",)),
    ("video/causal_lm", ("cache.window=18", "cache.sink=4", "cache.keys=unrotated")),
    ("video/teacher_forcing", ("cache.window=2", "cache.sink=1", "backbone.decay=8")),
    # Far history: bounded, beside sinks, in blocks of frames, committed alone.
    ("video/far_long", ("cache.far.blocks=2", "cache.write=separate")),
    ("video/teacher_forcing", ("cache.window=2", "cache.far.patch=4", "cache.sink=1")),
    ("video/magi_ctf", ("cache.window=2", "cache.far.patch=2")),
    ("video/masked", ("backbone.decay=8", "cache.write=fused")),
    # Views selected by pose, keys transformed at write or at read, actions beside the camera.
    ("video/causnvs", ("cache.keys=unrotated", "cache.nearest=1", "cache.sink=0")),
    ("video/causnvs", ("cache.write=fused", "condition.actions=19")),
    (
        "video/causnvs",
        (
            "layout.copies=2",
            "mask=block_diffusion",
            "cache.write=separate",
            "cache.context_level=0",
        ),
    ),
    # Context kept with noise, told of it or not.
    ("video/diffusion_forcing", ("cache.context_noise=0.2", "cache.context_level=0.3")),
    ("video/teacher_forcing", ("cache.context_noise=0.2", "cache.write=fused")),
]


def test_which_video_recipes_are_exact():
    approximate = {name for name in VIDEOS if not load_recipe(name).cache.exact}
    assert all(load_recipe(name).cache.write == "none" for name in approximate)
    assert {name for name, _ in CACHED_VIDEOS} == set(VIDEOS) - approximate
    assert all(load_recipe(n).system.differs and load_recipe(n).system.url for n in VIDEOS)


def told(recipe, items, frames):
    """Draw what is told about frames: numbers, and where cameras are told of, rigid motions."""
    if not recipe.condition.actions:
        return None
    rng = torch.Generator().manual_seed(0)
    numbers = torch.randn(items, frames, recipe.condition.actions, generator=rng)
    if recipe.condition.poses:
        turn, upper = torch.linalg.qr(torch.randn(items, frames, 3, 3, generator=rng))
        turn = turn * upper.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
        pose = torch.eye(4).repeat(items, frames, 1, 1)
        pose[..., :3, :3] = turn * torch.linalg.det(turn)[..., None, None].sign()
        pose[..., :3, 3] = 0.5 * torch.randn(items, frames, 3, generator=rng)
        numbers[..., -16:] = pose.flatten(-2)
    return numbers


def maps(recipe, items, frames):
    """Draw the structure of frames, for recipes that are guided by it."""
    condition = recipe.condition
    shape = (items, frames, 16, condition.structure_size**2)
    rng = torch.Generator().manual_seed(1)
    return None if condition.structure == "none" else torch.rand(shape, generator=rng)


@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize(("name", "overrides"), CACHED_VIDEOS)
def test_cached_frames_of_video_recipes_equal_the_masked_forward(tiny, name, overrides, guided):
    model = tiny.model(name, *overrides, dtype=torch.float64)
    recipe = model.recipe
    plan = plan_for(tiny, model)
    # More blocks than the window, so that the cache forgets some, or than rows select.
    assert recipe.cache.exact
    assert (recipe.cache.window or recipe.cache.nearest) < plan.num_blocks - 1
    decoder = tiny.decoder(model, PROMPTS[:2], guided)
    decoder.actions = told(recipe, 2, recipe.layout.frames)
    if decoder.actions is not None:
        decoder.actions = decoder.actions.double()
    with torch.no_grad():
        parity = compare(plan, decoder, tiny.contents(model, plan))
    assert parity.max_error < 1e-10
    assert 1.0 < parity.scale < 10 and parity.num_rows >= plan.num_slots


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_together_are_videos_alone_bit_for_bit(tiny, name):
    model = tiny.model(name)
    shown = {"actions": told(model.recipe, 3, 5), "structure": maps(model.recipe, 3, 5)}
    together = draw(model, PROMPTS[:3], range(3), frames=5, **shown)
    for item in range(3):
        own = slice(item, item + 1)
        its = {name: part if part is None else part[own] for name, part in shown.items()}
        alone = draw(model, PROMPTS[own], [item], frames=5, **its)
        assert torch.equal(alone[0], together[item])
    assert not any(torch.equal(a, b) for a, b in pairwise(together))
