"""Tokens that are given: turns of two people, rows that feed back, rollouts without end."""

import pytest
import torch

from blockloom.core.errors import ModelError, UsageError
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start
from blockloom.models.video import VideoRequest, WholeBlocks, goes_on, video_blocks
from blockloom.training.objective import ModelStage

TURNS = ("layout.block=frames:25", "layout.frames=50")
SHORT = ("layout.block=frames:3", "layout.frames=9", "cache.window=2")


def told_request(model, frames, seed=0, items=2):
    rng = torch.Generator().manual_seed(seed)
    shape = (items, frames, model.recipe.layout.given, model.config.latent_channels)
    told = torch.randn(shape, generator=rng)
    generators = [item_generator(0, item) for item in range(items)]
    return VideoRequest([""] * items, generators, frames, told=told)


def drawn(blocks):
    parts = []
    with torch.no_grad():
        for part in range(blocks.num_parts):
            for _ in blocks.events(part):
                pass
            parts.append(blocks.values(part).clone())
    return torch.cat(parts, 1)


def test_a_turn_of_25_frames_leaves_23_17_9_and_0_masked(tiny):
    model = tiny.model("motion/timar", *TURNS)
    slots = 50 * model.slots_per_frame
    given = model.is_given(torch.arange(slots)).expand(1, -1)
    values = torch.randn(1, slots, tiny.channels, generator=torch.Generator().manual_seed(0))
    request = Request([""], [item_generator(0, 0)], values=values, is_known=given, num_steps=4)
    rollout, left, seen = start(model, request), [], []
    forward = rollout.decoder.forward

    def spy(values, is_masked, layout, *rest):
        if bool((layout.level >= 1).any()):
            seen.append(int(is_masked.sum()))
        return forward(values, is_masked, layout, *rest)

    rollout.decoder.forward = spy
    with torch.no_grad():
        for event in rollout.events():
            if event.kind == "row":
                left.append(int((~rollout.is_known[:, event.data["sources"]]).sum()))
    assert left == [23, 17, 9, 0] * 2
    # What a row reveals is fed back: the next row sees fewer masked rows.
    assert seen == [25, 23, 17, 9] * 2
    assert torch.equal(rollout.values[:, given[0]], values[:, given[0]])


def test_what_is_given_is_kept_and_has_a_say(tiny):
    model = tiny.model("motion/timar", *SHORT, std=0.3)
    request = told_request(model, 9)
    first = drawn(video_blocks(model, request))
    assert torch.equal(first[:, :, :3], request.told)
    changed = told_request(model, 9)
    changed.told[:, 4:] += 1.0
    second = drawn(video_blocks(model, changed))
    # Turns are three frames: the first does not know what is said in the second.
    assert torch.equal(first[:, :3, 3], second[:, :3, 3])
    assert not torch.equal(first[:, 3, 3], second[:, 3, 3])  # but frame 3 shares a turn with 4


def test_turns_without_end_are_those_of_one_long_request(tiny):
    model = tiny.model("motion/timar", *SHORT)
    assert goes_on(model)
    live = drawn(video_blocks(model, told_request(model, 24)))
    assert torch.equal(live, drawn(WholeBlocks(model, told_request(model, 24), 3)))


def test_memory_does_not_grow_with_the_dialogue(tiny):
    model = tiny.model("motion/timar", *SHORT)
    sizes = []
    for frames in (12, 150):
        blocks = video_blocks(model, told_request(model, frames, items=1))
        assert bool(torch.isfinite(drawn(blocks)).all())
        rollout = blocks._live._rollout
        sizes.append((rollout.cache.capacity, rollout.values.shape, int(rollout.cache.written[0])))
    assert sizes[0] == sizes[1]


def test_requests_without_what_is_given_are_refused(tiny):
    model = tiny.model("motion/timar", *SHORT)
    with pytest.raises(UsageError, match="is given the first 3 tokens of every frame, and 54"):
        start(model, Request(["", ""], [item_generator(0, k) for k in range(2)]))
    for make in (video_blocks, lambda m, r: WholeBlocks(m, r, 3)):
        request = told_request(model, 9)
        request.told = request.told[:, :, :2]
        with pytest.raises(UsageError, match="told tokens have shape"):
            drawn(make(model, request))
    with pytest.raises(ModelError, match=r"layout.given = 4, but a frame .* has 4 tokens"):
        tiny.fresh_model("motion/timar", "layout.given=4")


def test_training_hides_and_scores_the_open_tokens_only(tiny):
    model = tiny.fresh_model("motion/timar", "layout.block=frames:20", "layout.frames=40")
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(4, 160, tiny.channels, generator=rng)
    ids = model.text_encoder.tokenize([""] * 4)
    stage = ModelStage(model, values, ids, [""] * 4)
    plan, layout, _ = stage.plan(rng)
    batch = stage.corrupt(values, plan, layout, rng)
    given = model.is_given(layout.source)
    assert not bool(batch.is_masked[:, given].any())
    scored = layout.source[batch.loss_rows]
    assert len(scored) == 40 and not bool(model.is_given(scored).any())
    hidden = batch.is_masked[:, batch.loss_rows]
    assert torch.equal(batch.weight > 0, hidden)
    # Per turn an exact share of 0.7 to 1 of the motion is hidden, and shares differ.
    counts = hidden.unflatten(1, (2, 20)).sum(-1)
    assert bool((counts >= 14).all()) and len(counts.unique()) > 1
    assert torch.equal(batch.target, values[:, scored])
