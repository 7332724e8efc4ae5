"""The numeric proof tells exact decodes from inexact ones, each by a clear margin.

Every wrong decode below is a mistake somebody could make; it is built here, out of the same parts,
because the library has no switch for it.
"""

from dataclasses import replace

import pytest
import torch

from blockloom.core.layout import Copy
from blockloom.core.lowering import DenseMask
from blockloom.core.masks import MaskTable
from blockloom.core.plan import build_plan
from blockloom.core.proof import Contents, compare, decode_forward, training_forward
from blockloom.core.rollout import Rollout
from blockloom.core.rules import rule
from blockloom.core.sampling import item_generator
from blockloom.models import layers

EXACT, WRONG = 1e-10, 1e-3
PROMPTS = ["a red cat", "blue dog"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def setup(tiny, name, *overrides):
    model = tiny.model(name, *overrides, dtype=torch.float64, std=0.3)
    plan = build_plan(model.recipe, tiny.height, tiny.width)
    decoder = tiny.decoder(model, PROMPTS)
    contents = tiny.contents(model, plan)
    right = compare(plan, decoder, contents)
    assert right.max_error < EXACT and right.scale > 1
    return model, plan, decoder, contents


def keyed(layout):
    return list(zip(layout.copy.tolist(), layout.order.tolist(), strict=True))


def worst(trained, passes):
    """Largest difference between the rows of some passes and the masked forward."""
    layout, states = trained
    place = {key: row for row, key in enumerate(keyed(layout))}
    error = 0.0
    for rows, hidden in passes:
        assert bool(hidden.isfinite().all())
        for at, key in enumerate(keyed(rows)):
            if key in place:
                error = max(error, float((hidden[:, at] - states[:, place[key]]).abs().max()))
    return error


def mixed(plan, other, decoder, contents):
    """Error of decoding by one plan a model that was trained by another."""
    trained = training_forward(plan, decoder, contents)
    return worst(trained, decode_forward(other, decoder, contents))


@pytest.mark.parametrize("name", ["image/block_masked", "image/acdit"])
def test_keeping_the_last_noisy_rows_instead_of_a_commit_pass(tiny, name):
    _, plan, decoder, contents = setup(tiny, name, "cache.write=separate")
    cache, passes = decoder.new_cache(plan, len(contents.values)), []
    for block in range(plan.num_blocks):
        rows = plan.noisy_rows(block)
        values, masked = contents.values[:, rows.source], contents.is_masked[:, rows.source]
        level = masked.float()
        if contents.noisy is not None:
            values, masked = contents.noisy[:, rows.source], torch.zeros_like(masked)
            level = torch.full_like(level, contents.level)
        view = cache.view(rows, keep=torch.arange(rows.num_tokens))
        lowered = plan.lowered(rows, view)
        passes.append((rows, decoder.forward(values, masked, rows, level, lowered, view)))
        cache.write(view)
        with pytest.raises(ValueError, match="only level 0 is final"):
            cache.commit()  # the cache would not have done it by itself
        cache.commit(copy=int(Copy.CLEAN), context_level=1.0)
    assert worst(training_forward(plan, decoder, contents), passes) > WRONG


def test_bidirectional_commit_of_a_causal_clean_stream(tiny):
    _, plan, decoder, contents = setup(tiny, "image/block_masked", "mask=nbdiff")
    assert mixed(plan, replace(plan, table=rule("block_diffusion")), decoder, contents) > WRONG


@pytest.mark.parametrize(
    "table",
    [
        {"C->C": "LE(block)", "N->C": "LE(block)", "N->N": "EQ(block)"},  # off by one
        {
            "C->C": "LE(block)",
            "C->N": "EQ(block)",
            "N->C": "LT(block)",
            "N->N": "EQ(block)",
        },  # leaky
        {"C->C": "ALL", "N->C": "LT(block)", "N->N": "EQ(block)"},  # clean rows see the future
        {"C->C": "LE(block)", "N->C": "LT(block)", "N->N": "LE(block)"},  # noise of other blocks
    ],
)
@pytest.mark.parametrize("write", ["separate", "fused"])
def test_tables_that_no_cache_can_serve(tiny, table, write):
    _, plan, decoder, contents = setup(tiny, "image/acdit", f"cache.write={write}")
    bad = replace(plan, table=MaskTable.parse(table))
    assert compare(bad, decoder, contents).max_error > WRONG


VIDEO = ("video/teacher_forcing", "condition.actions=0", "layout.frames=6")


@pytest.mark.parametrize("name", [("image/acdit",), VIDEO], ids=["rows", "frames"])
@pytest.mark.parametrize("write", ["separate", "fused"])
def test_evicting_one_block_early_and_windows_off_by_one(tiny, write, name):
    _, plan, decoder, contents = setup(tiny, *name, f"cache.write={write}", "cache.window=3")
    early = replace(plan, window=2)
    assert mixed(plan, early, decoder, contents) > WRONG
    for window in (2, 4):  # the own block forgotten, or counted twice
        other = replace(plan, window=window, table=rule("block_diffusion", window=window))
        assert mixed(plan, other, decoder, contents) > WRONG


def test_running_the_last_blocks_again_is_not_a_windowed_cache(tiny):
    """The receptive field of a windowed model grows with depth; a fresh window cuts it off."""
    _, plan, decoder, contents = setup(tiny, "image/block_masked", "cache.window=2")
    passes = []
    for block in range(plan.num_blocks):
        rollout = open_rollout(plan, decoder, contents, use_cache=False)
        rollout.is_known[:] = True
        rollout.is_known[:, plan.sources(block)] = ~contents.is_masked[:, plan.sources(block)]
        rollout.context = [plan.clean_rows(b) for b in range(max(0, block - 1), block)]
        rollout.record = lambda rows, hidden: passes.append((rows, hidden))
        rollout.predict_rows(block)
    trained = training_forward(plan, decoder, contents)
    assert worst(trained, passes[:2]) < EXACT  # nothing is cut off yet
    assert worst(trained, passes) > WRONG


def open_rollout(plan, decoder, contents, **how):
    return Rollout(
        plan, decoder, None, values=contents.values, is_known=~contents.is_masked,
        generators=[item_generator(0, k) for k in range(len(contents.values))], **how,
    )  # fmt: skip


def test_telling_clean_rows_the_noise_level(tiny, monkeypatch):
    """One modulation for both copies: clean rows then change with every level."""
    model, plan, _, contents = setup(tiny, "image/acdit", "cache.write=separate")
    plain = model.backbone._told

    def shared(run, level, prompt, actions):
        if run.copy != Copy.CLEAN or not run.is_data:
            return plain(run, level, prompt, actions)
        highest = level.max().expand_as(level)
        told = plain(run._replace(copy=int(Copy.NOISY)), highest, prompt, actions)
        return replace(told, copy=int(Copy.CLEAN), layers={})

    monkeypatch.setattr(model.backbone, "_told", shared)
    trained = training_forward(plan, tiny.decoder(model, PROMPTS), contents)
    passes = decode_forward(plan, tiny.decoder(model, PROMPTS), contents)
    assert worst(trained, passes) > WRONG


def test_keeping_a_bidirectional_models_past_after_a_reveal(tiny):
    _, plan, decoder, contents = setup(tiny, "image/maskgil")
    known = ~contents.is_masked
    rollout = open_rollout(plan, decoder, contents)
    rollout._flush()  # the prompt is static: keeping that is exact
    rows, cache = plan.noisy_rows(0), rollout.cache
    cache.rollback()
    keep = known[0].nonzero()[:, 0]
    values, level = contents.values, contents.is_masked.float()
    view = cache.view(rows, keep=keep)
    decoder.forward(values, contents.is_masked, rows, level, plan.lowered(rows, view), view)
    cache.write(view)
    cache.commit(context_level=1.0)
    # Reveal one more slot, then run only the rows that are not kept.
    after = contents.is_masked.clone()
    after[:, contents.is_masked[0].nonzero()[0, 0]] = False
    left = contents.is_masked[0].nonzero()[:, 0]
    fresh = rows.take(left)
    view = cache.view(fresh)
    hidden = decoder.forward(
        values[:, left], after[:, left], fresh, after[:, left].float(),
        plan.lowered(fresh, view), view,
    )  # fmt: skip
    right = training_forward(plan, decoder, Contents(values, after))
    assert worst(right, [(fresh, hidden)]) > WRONG


def test_masking_after_the_softmax(tiny, monkeypatch):
    """Hidden keys then still take part in the normalisation, so their number matters."""
    _, plan, decoder, contents = setup(tiny, "image/block_masked")

    def attend(query, key, value, lowered, *, bias=None):
        weight = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(-1)
        if isinstance(lowered, DenseMask):
            weight = weight * lowered.may_attend
        return weight @ value

    plan = replace(plan)  # no lowered masks remembered
    monkeypatch.setattr(
        plan, "lowered", lambda rows, view, poses: dense_lower(plan, rows, view), raising=False
    )
    monkeypatch.setattr(layers, "attend", attend)
    assert compare(plan, decoder, contents).max_error > WRONG


def dense_lower(plan, rows, view):
    from blockloom.core.lowering import lower

    return lower(plan.table, rows, rows if view is None else view.layout, backend="dense")


def test_splitting_a_bidirectional_prompt_across_two_prefill_passes(tiny):
    _, plan, decoder, contents = setup(tiny, "image/causalfusion")
    passes = []
    rollout = open_rollout(plan, decoder, contents)
    rollout.record = lambda rows, hidden: passes.append((rows, hidden))
    prompt = plan.prompt
    for part in (prompt.take(slice(0, 2)), prompt.take(slice(2, prompt.num_tokens))):
        rollout.pending = [part]
        rollout._flush()
    rollout.predict_rows(0, block_values=contents.noisy[:, plan.sources(0)], level=contents.level)
    assert worst(training_forward(plan, decoder, contents), passes) > WRONG


def test_a_nan_is_the_worst_error_of_all(tiny):
    _, plan, decoder, contents = setup(tiny, "image/block_masked")
    forward = decoder.forward

    def broken(*arguments):
        hidden = forward(*arguments)
        if arguments[-1] is not None:
            hidden[0, 0] = float("nan")
        return hidden

    decoder.forward = broken
    assert compare(plan, decoder, contents).max_error == float("inf")
