"""Videos: frames as blocks, actions, and rollouts that go on for ever at constant memory."""

import pytest
import torch

from blockloom.core.endless import EndlessPlan
from blockloom.core.errors import ModelError, UsageError
from blockloom.core.plan import build_plan
from blockloom.core.proof import compare
from blockloom.core.recipe import frames_per_block
from blockloom.core.rollout import run
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start
from blockloom.models.live import LiveRollout

VIDEO = ("modality=video", "layout.kind=frames", "layout.block=frame", "layout.frames=6")
WINDOWED = (*VIDEO, "cache.window=3")
FORCING = ("layout.copies=1", "cache.write=block", "mask=block_causal")
CASES = [
    ("image/acdit", ()),
    ("image/acdit", ("condition.actions=3",)),
    ("image/acdit", ("cache.write=separate", "condition.actions=3", "schedule.guidance_scale=1.0")),
    ("image/acdit", ("layout.block=frames:2",)),
    ("image/acdit", FORCING),
    ("image/acdit", (*FORCING, "condition.actions=3", "schedule.guidance_scale=2.0")),
    ("image/block_masked", ()),
    ("image/block_masked", ("cache.write=fused", "condition.actions=2", "cache.keys=unrotated")),
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def actions_for(model, frames, items=2, seed=0):
    width = model.recipe.condition.actions
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(items, frames, width, generator=rng) if width else None


def generators(items=2):
    return [item_generator(7, k) for k in range(items)]


@pytest.mark.parametrize(
    ("name", "extra"),
    [*CASES, ("image/acdit", ("cache.window=2", "cache.sink=1", "condition.actions=3"))],
)
def test_cached_frames_equal_the_masked_training_forward(tiny, name, extra):
    model = tiny.model(name, *WINDOWED, *extra, dtype=torch.float64, std=0.3)
    plan = build_plan(model.recipe, 4, 4)
    decoder = tiny.decoder(model, ["a red cat", "sun"], guided=True)
    if model.recipe.condition.actions:
        decoder.actions = actions_for(model, 6).double()
    parity = compare(plan, decoder, tiny.contents(model, plan))
    assert parity.max_error < 1e-10 and parity.num_rows >= 96 and parity.scale > 0.1


def test_a_window_trained_without_is_not_exact(tiny):
    unwindowed = "mask={C->C: LE(block), N->C: LT(block), N->N: EQ(block)}"
    with pytest.raises(ModelError, match=r"cache\.exact = true is disproved"):
        tiny.recipe("image/acdit", *WINDOWED, unwindowed)


def test_actions_reach_their_own_frame_and_later_ones_only(tiny):
    model = tiny.model("image/acdit", *VIDEO, "condition.actions=3", std=0.3)
    first = actions_for(model, 6)
    second = first.clone()
    second[:, 3] += 1.0
    pictures = []
    for actions in (first, second):
        request = Request(["a", "b"], generators(), num_steps=2, actions=actions)
        pictures.append(run(start(model, request))[0].unflatten(1, (6, 16)))
    same = [torch.equal(pictures[0][:, f], pictures[1][:, f]) for f in range(6)]
    assert same == [True, True, True, False, False, False]


@pytest.mark.parametrize(("name", "extra"), CASES)
def test_a_live_rollout_gives_the_bits_of_one_long_request(tiny, name, extra):
    model = tiny.model(name, *WINDOWED, *extra, std=0.3)
    per_block, total = frames_per_block(model.recipe.layout.block), 12
    actions = actions_for(model, total)
    request = Request(["cat", "sun"], generators(), num_steps=2, frames=total, actions=actions)
    whole, _ = run(start(model, request))
    live = LiveRollout(model, ["cat", "sun"], generators(), num_steps=2)
    parts = []
    for first in range(0, total, per_block):
        told = None if actions is None else actions[:, first : first + per_block]
        parts.append(live.step(told))
    assert torch.equal(torch.cat(parts, 1), whole)
    slow, _ = run(start(model, Request(
        ["cat", "sun"], generators(), num_steps=2, frames=total, actions=actions, use_cache=False
    )))  # fmt: skip
    difference = (slow - whole).abs().max()
    assert difference <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("write", ["fused", "separate"])
def test_given_frames_become_context(tiny, write):
    model = tiny.model(
        "image/acdit", *WINDOWED, "condition.actions=3", f"cache.write={write}", std=0.3
    )
    actions = actions_for(model, 8)
    given = torch.randn(2, 4, 16, tiny.channels, generator=torch.Generator().manual_seed(1))
    values = torch.zeros(2, 8 * 16, tiny.channels)
    values[:, : 4 * 16] = given.flatten(1, 2)
    known = torch.zeros(2, 8 * 16, dtype=torch.bool)
    known[:, : 4 * 16] = True
    whole, _ = run(start(model, Request(
        ["cat", "sun"], generators(), num_steps=2, frames=8, actions=actions, values=values,
        is_known=known,
    )))  # fmt: skip
    live = LiveRollout(model, ["cat", "sun"], generators(), num_steps=2)
    for frame in range(4):
        live.observe(given[:, frame], actions[:, frame : frame + 1])
    later = [live.step(actions[:, f : f + 1]) for f in range(4, 8)]
    # Given blocks draw no random numbers in either, so the streams agree.
    assert torch.equal(torch.cat(later, 1), whole[:, 4 * 16 :])


@pytest.mark.parametrize("write", [("cache.write=fused",), ("cache.write=separate",), FORCING])
def test_a_snapshot_goes_on_bit_for_bit(tiny, write):
    model = tiny.model("image/acdit", *WINDOWED, "condition.actions=3", *write, std=0.3)
    actions = actions_for(model, 12)
    live = LiveRollout(model, ["cat", "sun"], generators(), num_steps=2)
    for frame in range(7):
        live.step(actions[:, frame : frame + 1])
    state = live.snapshot()
    went_on = [live.step(actions[:, f : f + 1]) for f in range(7, 12)]
    other = LiveRollout(model, ["cat", "sun"], generators()[::-1], num_steps=2)
    other.restore(state)
    assert other.block == 7
    again = [other.step(actions[:, f : f + 1]) for f in range(7, 12)]
    assert torch.equal(torch.cat(again), torch.cat(went_on))
    alone = LiveRollout(model, ["cat"], generators(1), num_steps=2)
    with pytest.raises(UsageError, match="snapshot does not fit"):
        alone.restore(state)


def test_memory_and_layouts_stay_bounded(tiny):
    model = tiny.model("image/acdit", *WINDOWED, std=0.3)
    live = LiveRollout(model, ["cat"], generators(1), num_steps=1)
    live.step()
    slots = live._rollout.cache.capacity
    for _ in range(70):
        live.step()
    cache = live._rollout.cache
    assert cache.capacity == slots == 4 * 16 and int(cache.written[0]) <= slots
    assert len(live.plan._memo) <= 80 and len(cache.log) == 0
    assert not live._rollout.context and len(live._rollout.pending) == 1
    assert live.plan.noisy_rows(live.block).position[0, 0] == live.block == 71


def test_changed_prompts_show_in_the_frames_to_come(tiny):
    model = tiny.model("image/acdit", *WINDOWED, std=0.3)
    frames = []
    for switch in (False, True):
        live = LiveRollout(model, ["cat"], generators(1), num_steps=2)
        parts = [live.step(), live.step()]
        if switch:
            live.set_prompts(["blue dog"])
        frames.append([*parts, live.step()])
    same = [torch.equal(a, b) for a, b in zip(*frames, strict=True)]
    assert same == [True, True, False]


SINK = (*VIDEO, "cache.window=2", "cache.sink=1", "cache.keys=unrotated")


def test_with_a_sink_it_goes_on_and_its_first_frames_are_the_requests(tiny):
    model = tiny.model("image/acdit", *SINK, std=0.3)
    live = LiveRollout(model, ["cat", "sun"], generators(), num_steps=2)
    frames = [live.step() for _ in range(9)]
    whole, _ = run(start(model, Request(["cat", "sun"], generators(), num_steps=2)))
    for number, frame in enumerate(whole.unflatten(1, (6, 16)).unbind(1)):
        assert torch.equal(frame, frames[number])
    again = LiveRollout(model, ["cat", "sun"], generators(), num_steps=2)
    for _ in range(7):
        again.step()
    state = again.snapshot()
    other = LiveRollout(model, ["cat", "sun"], generators(), num_steps=2)
    other.restore(state)
    assert torch.equal(other.step(), frames[7]) and torch.equal(other.step(), frames[8])


def test_far_past_its_length_a_sink_is_as_far_away_as_at_its_end(tiny):
    """One layer: what a frame reads is its window and the sink, each at its distance."""
    model = tiny.model("image/acdit", *SINK, "backbone.layers=1", std=0.3)
    rng = torch.Generator().manual_seed(0)
    given = torch.randn(1, 20, 16, tiny.channels, generator=rng)
    live = LiveRollout(model, ["cat"], generators(1), num_steps=2)
    for frame in given.unbind(1):
        live.observe(frame)
    short = LiveRollout(model, ["cat"], generators(1), num_steps=2)
    for frame in given[:, [0, 1, 2, 3, 19]].unbind(1):
        short.observe(frame)
    far, near = live.step(), short.step()
    assert torch.allclose(far, near, atol=1e-4)
    # The sink matters: with another first frame the same step differs.
    other = LiveRollout(model, ["cat"], generators(1), num_steps=2)
    other.observe(given[:, 7])
    for frame in given[:, [1, 2, 3, 19]].unbind(1):
        other.observe(frame)
    assert (other.step() - near).abs().max() > 1e-2


def test_what_is_refused_or_begun_again_moves_no_sink_twice(tiny):
    model = tiny.model("image/acdit", *SINK, std=0.3)
    given = torch.randn(9, 2, 16, tiny.channels, generator=torch.Generator().manual_seed(0))
    plain, odd = (LiveRollout(model, ["cat", "sun"], generators(), num_steps=2) for _ in range(2))
    for frame in given:
        plain.observe(frame)
        with pytest.raises(UsageError, match="given frames have shape"):
            odd.observe(frame[:, :5])
        next(odd.events())  # begun, and given up
        odd._rollout.generators = generators()
        odd.observe(frame)
    places = [live._rollout.cache.layout.position for live in (plain, odd)]
    length = int(plain._rollout.cache.written[0])
    assert torch.equal(places[0][:, :length], places[1][:, :length])


def test_sinks_need_keys_that_are_rotated_when_read(tiny):
    model = tiny.model("image/acdit", *SINK, "cache.keys=rotated")
    with pytest.raises(UsageError, match=r'set cache\.keys to "unrotated"'):
        LiveRollout(model, ["cat"], generators(1))


def test_what_cannot_go_on_is_refused(tiny):
    for extra, match in (
        ((), "needs cache.window"),
        (("cache.window=2", "layout.block=frames:4"), "blocks of one size"),
    ):
        recipe = tiny.recipe("image/acdit", *VIDEO, *extra)
        with pytest.raises(UsageError, match=match):
            EndlessPlan(build_plan(recipe, 4, 4))
    model = tiny.model("image/acdit", *WINDOWED, "condition.actions=3")
    live = LiveRollout(model, ["cat"], generators(1))
    with pytest.raises(UsageError, match=r"takes \(1, 1, 3\) per step"):
        live.step()
    with pytest.raises(UsageError, match=r"legal \(1, 16, 5\)"):
        live.observe(torch.zeros(1, 16, 4), torch.zeros(1, 1, 3))
    with pytest.raises(UsageError, match="one row per frame; got None"):
        start(model, Request(["cat"], generators(1)))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("layout.kind=frames",), 'set "frame", "frames:N", "token" or "all"'),
        (("layout.block=frame",), 'set "all", "row" or "token"'),
        (("layout.frames=4",), r'layout.frames = 4 needs layout.kind = "frames"'),
        (("condition.actions=2",), "set condition.actions to 0"),
        (("modality=video",), 'set "frames"'),
        (("cache.write=block",), 'set "separate"'),
        (("layout.copies=1", "cache.write=none"), 'or cache.write = "block"'),
    ],
)
def test_illegal_video_settings_name_what_to_set(tiny, overrides, match):
    with pytest.raises(ModelError, match=match):
        tiny.recipe("image/acdit", *overrides)
