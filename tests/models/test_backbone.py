"""The backbone: gradient cones, numeric details, and bits that do not depend on the batch."""

import pytest
import torch

from blockloom.core.attention import lower
from blockloom.core.layout import Copy
from blockloom.core.layouts import frames, prefix
from blockloom.core.plan import build_plan
from blockloom.core.proof import compare
from blockloom.models.backbone import BlockTransformer
from blockloom.models.generate import prompt_vectors
from blockloom.models.layers import distance_bias
from blockloom.models.prompts import repeat_prompt

SINGLE = ("layout.copies=1", "cache.write=none", "cache.exact=false", "layout.block=row")
CONES = [
    ("image/block_masked",),
    ("image/acdit",),
    ("image/block_masked", "mask=nbdiff"),
    ("image/llamagen",),
    ("image/block_masked", "mask=block_causal", *SINGLE),
]


def training_pass(tiny, model, plan, items=1):
    contents = tiny.contents(model, plan, items)
    layout = plan.training_layout()
    source = layout.source.clamp_min(0)
    masked = contents.is_masked[:, source] & (layout.copy == Copy.NOISY)
    level = torch.where(layout.copy == Copy.NOISY, 0.5, 0.0).expand(items, -1).to(model.dtype)
    return layout, contents.values[:, source], masked, level


@pytest.mark.parametrize("setup", CONES)
def test_gradients_stay_inside_the_visibility_cone(tiny, setup, monkeypatch):
    """The loss of a block reaches what its rows can see through any number of layers; no more."""
    model = tiny.model(*setup, dtype=torch.float64, std=0.3)
    plan = build_plan(model.recipe, tiny.height, tiny.width)
    layout, values, masked, level = training_pass(tiny, model, plan)
    with torch.no_grad():
        prompt = prompt_vectors(model, ["a red cat"])
        rows = model.backbone._rows(values, masked, layout, prompt)
    rows = rows.detach().requires_grad_()
    monkeypatch.setattr(model.backbone, "_rows", lambda *_: rows)
    lowered = lower(plan.table, layout, layout, backend="dense")
    hidden = model.backbone(values, masked, layout, level, prompt, lowered)
    reach = plan.table.visible(layout, layout)
    reach = (reach.double() @ reach.double() + reach.double()) > 0  # two layers
    weight = torch.randn(hidden.shape[-1], dtype=torch.float64)
    predicts = layout.copy == (Copy.CLEAN if plan.shift else Copy.NOISY)
    for block in range(0, plan.num_blocks - plan.shift, 1 + 4 * plan.shift):
        chosen = (layout.block == block) & predicts
        (gradient,) = torch.autograd.grad(
            (hidden[:, chosen] @ weight).sum(), rows, retain_graph=True
        )
        touched = gradient[0].abs().sum(-1) > 0
        assert torch.equal(touched, reach[chosen].any(0))
        later = layout.block > block
        assert not bool(gradient[0, later].any())  # exactly zero, not small
        earlier = (layout.block < block) & (
            layout.copy == (Copy.CLEAN if plan.copies == 2 else layout.copy)
        )
        assert bool(touched[earlier].all())


@torch.no_grad()
def test_a_common_noise_level_is_worked_out_once_and_read_as_if_told_row_by_row(tiny):
    model = tiny.model("image/acdit", dtype=torch.float64, std=0.3)
    plan = build_plan(model.recipe, tiny.height, tiny.width)
    layout, values, masked, level = training_pass(tiny, model, plan, items=2)
    lowered = lower(plan.table, layout, layout, backend="dense")
    prompt = prompt_vectors(model, ["a red cat", "blue dog"])

    def run(level, items=slice(None)):
        own = prompt_vectors(model, ["a red cat", "blue dog"][items])
        given = prompt if items == slice(None) else own
        return model.backbone(values[items], masked[items], layout, level, given, lowered)

    plain = run(level)
    kinds = len(prompt.memo)  # clean rows are told no level
    once = run(level[0])
    assert len(prompt.memo) == kinds + 1
    torch.testing.assert_close(once, plain, rtol=0, atol=1e-12)
    assert torch.equal(run(level[0]), once) and len(prompt.memo) == kinds + 1
    assert torch.equal(run(level[0], slice(1, 2)), once[1:])  # whoever else is in the batch
    lower_noise = torch.where(level[0] > 0, 0.25, 0.0).to(level)
    assert not torch.equal(run(lower_noise), once) and len(prompt.memo) == kinds + 2
    mixed = level[0].clone()
    mixed[-1] = 0.25
    run(mixed)
    assert len(prompt.memo) == kinds + 2  # rows at several levels are told row by row


def test_rotated_and_unrotated_keys_give_the_same_states(tiny):
    errors = []
    for keys in ("rotated", "unrotated"):
        model = tiny.model("image/acdit", f"cache.keys={keys}", dtype=torch.float64, std=0.3)
        plan = build_plan(model.recipe, 4, 4)
        decoder = tiny.decoder(model, ["a red cat", "blue dog"], True)
        assert decoder.new_cache(plan, 2).rotated == (keys == "rotated")
        with torch.no_grad():
            errors.append(compare(plan, decoder, tiny.contents(model, plan)).max_error)
    assert max(errors) < 1e-12


def test_gradient_checkpointing_changes_no_gradient(tiny):
    def gradients(on):
        model = tiny.fresh_model("image/block_masked", dtype=torch.float64, std=0.3).train()
        model.backbone.gradient_checkpointing = on
        plan = build_plan(model.recipe, 4, 4)
        layout, values, masked, level = training_pass(tiny, model, plan, 2)
        prompt = prompt_vectors(model, ["a red cat", "blue dog"])
        hidden = model.backbone(values, masked, layout, level, prompt, None)
        hidden.square().sum().backward()
        return [p.grad for p in model.backbone.parameters()]

    for a, b in zip(gradients(False), gradients(True), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("dim", [40, 48, 64])
def test_hidden_states_of_an_item_do_not_depend_on_the_batch(tiny, dim):
    """Widths off the vector size are where kernels treat the last numbers differently."""
    setup = ("image/acdit", f"backbone.dim={dim}", "condition.cross=true")
    model = tiny.model(*setup, std=0.3)
    plan = build_plan(model.recipe, 4, 4)
    layout, values, masked, level = training_pass(tiny, model, plan, 5)
    prompts = ["a red cat", "blue dog", "sun", "a very large green tree", ""]
    lowered = lower(plan.table, layout, layout)
    with torch.no_grad():
        together = model.backbone(
            values, masked, layout, level, prompt_vectors(model, prompts), lowered
        )
        for item in range(5):
            one = slice(item, item + 1)
            prompt = prompt_vectors(model, prompts[one])
            alone = model.backbone(values[one], masked[one], layout, level[one], prompt, lowered)
            assert torch.equal(alone[0], together[item])
    assert (together[0] - together[1]).abs().max() > 1e-3


def test_clean_rows_are_told_neither_level_nor_prompt(tiny):
    model = tiny.model("image/acdit", std=0.3)
    plan = build_plan(model.recipe, 4, 4)
    layout, values, masked, level = training_pass(tiny, model, plan)
    lowered = lower(plan.table, layout, layout)

    def states(words, at):
        with torch.no_grad():
            prompt = prompt_vectors(model, [words])
            return model.backbone(values, masked, layout, level * at, prompt, lowered)[0]

    is_clean = layout.copy == Copy.CLEAN
    first, second, third = states("cat", 1.0), states("dog", 1.0), states("cat", 0.3)
    for other in (second, third):
        assert torch.equal(first[is_clean], other[is_clean])
        assert (first[~is_clean] - other[~is_clean]).abs().max() > 1e-3


def test_absent_words_and_empty_prompts_are_finite_and_distinct(tiny):
    for setup in (("image/llamagen",), ("image/maskgit", "condition.cross=true")):
        model = tiny.model(*setup, std=0.3)
        with torch.no_grad():
            empty, words = (prompt_vectors(model, [p]) for p in ("", "cat"))
        for a, b in ((empty.prefix, words.prefix), (empty.pooled, words.pooled)):
            if a is not None:
                assert bool(a.isfinite().all()) and not torch.equal(a, b)
        if empty.cross is not None:
            assert bool(empty.cross_valid.any(-1).all())


def test_repeated_prompts_stand_next_to_each_other(tiny):
    model = tiny.model("image/acdit", "condition.cross=true")
    with torch.no_grad():
        prompt = prompt_vectors(model, ["a", "b"])
    again = repeat_prompt(prompt, 2)
    assert torch.equal(again.pooled[0], again.pooled[1])
    assert torch.equal(again.pooled[::2], prompt.pooled)
    assert torch.equal(again.cross[1][0][1::2], prompt.cross[1][0])


def test_scores_fall_with_the_distance_between_frames():
    keys = prefix(frames(4, 1, 2), 1)
    bias = distance_bias(keys.take(slice(5, 6)), keys, 2, decay=8.0)
    assert bias.shape == (1, 2, 1, 9)
    # Frame 2 looks at the prompt, then at two rows of each frame; slopes 8 / 2^4 and 8 / 2^8.
    gap = torch.tensor([0.0, 2, 2, 1, 1, 0, 0, 1, 1])
    assert torch.equal(bias[0, 0, 0], -0.5 * gap) and torch.equal(bias[0, 1, 0], -gap / 32)
    batched = distance_bias(keys.take(slice(5, 6)), keys.expand(3), 2, decay=8.0)
    assert batched.shape == (3, 2, 1, 9) and torch.equal(batched[2], bias[0])


def test_decay_turns_far_frames_off(tiny):
    states = {}
    for decay in (0, 100):
        model = tiny.model("video/far", f"backbone.decay={decay}", "condition.actions=0", std=0.3)
        plan = build_plan(model.recipe, 4, 4)
        layout, prompt = plan.training_layout(), model.unprompted(1)
        values = torch.randn(1, 80, tiny.channels, generator=torch.Generator().manual_seed(0))
        other = values.clone()
        other[:, :48] += 1.0
        lowered, hidden = plan.lower(layout, layout), layout.level[None] > 1
        with torch.no_grad():
            a, b = (
                model.backbone(v, hidden, layout, layout.level[None], prompt, lowered)
                for v in (values, other)
            )
        states[decay] = float((a - b)[:, 64:].abs().max())
    assert states[0] > 1e-2  # frame 4 reads frames 2 and 3, and they earlier ones
    assert states[100] < 0.5 * states[0]


def test_routed_rows_read_fewer_blocks_and_all_of_them_where_few_are_past(tiny):
    states = {}
    for route in (0, 1, 4):
        settings = (f"backbone.route={route}", "cache.window=null", "condition.actions=0")
        model = tiny.model("video/teacher_forcing", *settings, std=0.3)
        plan = build_plan(model.recipe, 4, 4)
        layout, prompt = plan.training_layout(), model.unprompted(1)
        rng = torch.Generator().manual_seed(0)
        rows = torch.randn(1, layout.num_tokens, tiny.channels, generator=rng)
        lowered, hidden = plan.lower(layout, layout), layout.level[None] > 1
        with torch.no_grad():
            states[route] = model.backbone(
                rows, hidden, layout, layout.level[None], prompt, lowered
            )[0]
    late = layout.block >= 2
    assert torch.allclose(states[4], states[0], atol=1e-6)
    assert torch.allclose(states[1][~late], states[0][~late], atol=1e-6)
    assert (states[1] - states[0])[late].abs().amax(-1).min() > 1e-4


def test_batched_layouts_are_refused():
    model = BlockTransformer(dim=16, num_layers=1, num_heads=2, num_sources=4).eval()
    from blockloom.core.layouts import flat

    layout = flat(4).expand(2)
    zeros = torch.zeros(2, 4, 1, dtype=torch.long)
    with pytest.raises(ValueError, match="one layout for the batch"):
        model(zeros, zeros[..., 0].bool(), layout, torch.zeros(2, 4), None)
