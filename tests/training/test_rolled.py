"""Learning from own answers: gradients through the decode loop are those without a cache."""

import pytest
import torch

from blockloom.core.plan import build_plan
from blockloom.core.rollout import Rollout, run
from blockloom.core.sampling import item_generator
from blockloom.core.schedule import scheduler_of
from blockloom.models.generator import ModelDecoder
from blockloom.training.objective import ModelStage
from blockloom.training.rolled import rolled_out, rollout_loss

FRAMES = 9
SETTINGS = (f"layout.frames={FRAMES}", "cache.window=4", "backbone.period=3")


def parts(tiny, *settings):
    model = tiny.fresh_model("motion/faceformer", *SETTINGS, *settings, dtype=torch.float64)
    rng = torch.Generator().manual_seed(0)
    actions = torch.randn(3, FRAMES, model.recipe.condition.actions, generator=rng).double()
    ids = model.text_encoder.tokenize(["speaker ada", "speaker ben", "speaker cho"])
    return model, build_plan(model.recipe, 1, 1), ids, actions


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def prepared(model, ids):
    return model.prepare(model.embed_prompts(ids, torch.zeros(len(ids), dtype=torch.bool)))


def drawn_without_a_cache(model, plan, ids, actions):
    """Draw with every pass a full forward, which autograd follows without any help of ours."""
    rollout = Rollout(
        plan, ModelDecoder(model, prepared(model, ids), actions=actions),
        scheduler_of(model.recipe), values=torch.zeros(3, FRAMES, tiny_channels(model)).double(),
        is_known=torch.zeros(3, FRAMES, dtype=torch.bool),
        generators=[item_generator(0, item) for item in range(3)], use_cache=False,
    )  # fmt: skip
    return run(rollout)[0]


def tiny_channels(model):
    return model.config.latent_channels


def test_gradients_through_the_cache_are_those_without_one(tiny):
    model, plan, ids, actions = parts(tiny)
    torch.set_default_dtype(torch.float64)
    try:
        rng = torch.Generator().manual_seed(1)
        cached = rolled_out(model, plan, 3, prepared(model, ids), actions, rng)
        whole = drawn_without_a_cache(model, plan, ids, actions)
    finally:
        torch.set_default_dtype(torch.float32)
    assert float((cached - whole).detach().abs().max()) < 1e-10
    ours, slow = (gradients(model, drawn.square().mean()) for drawn in (cached, whole))
    assert ours.keys() == slow.keys() and len(ours) > 20
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, slow[name], rtol=1e-8, atol=1e-12)
    detached = ModelDecoder(model, prepared(model, ids), actions=actions)
    rollout = Rollout(
        plan, detached, scheduler_of(model.recipe), values=torch.zeros_like(whole).detach(),
        is_known=torch.zeros(3, FRAMES, dtype=torch.bool),
        generators=[item_generator(0, item) for item in range(3)],
    )  # fmt: skip
    cut = gradients(model, run(rollout)[0].square().mean())
    name = "backbone.layers.0.attention.to_qkv.weight"
    assert float((cut[name] - ours[name]).abs().max()) > 1e-4  # what the cache keeps has a say


def test_the_last_answer_moves_with_the_first_sound(tiny):
    model, plan, ids, actions = parts(tiny)
    actions = actions.float().requires_grad_()
    model = model.float()
    rng = torch.Generator().manual_seed(1)
    drawn = rolled_out(model, plan, 3, prepared(model, ids), actions, rng)
    (gradient,) = torch.autograd.grad(drawn[:, 6].sum(), actions)
    # Answers carry the first frame on beyond the window of four rows; later sounds are unknown.
    assert bool((gradient[:, 0].abs().sum(-1) > 0).all())
    assert not bool(gradient[:, 7:].any())


def test_the_stage_takes_its_loss_from_what_the_model_draws(tiny):
    model, plan, ids, actions = parts(tiny)
    model, actions = model.float(), actions.float()
    values = torch.randn(
        3, FRAMES, tiny_channels(model), generator=torch.Generator().manual_seed(2)
    )
    stage = ModelStage(model, values, ids, ["a", "b", "c"], actions)
    order = torch.arange(3)
    loss, metrics = stage.loss(order, torch.Generator().manual_seed(3), 0)
    with torch.no_grad():
        drawn = rolled_out(
            model, plan, 3, prepared(model, ids), actions, torch.Generator().manual_seed(3)
        )
        again, _ = rollout_loss(
            model, plan, values, prepared(model, ids), actions, torch.Generator().manual_seed(3)
        )
    assert float(loss.detach()) == pytest.approx(float((drawn - values).square().mean()), rel=1e-5)
    assert float(again) == pytest.approx(metrics["token_loss"], rel=1e-5)


def test_a_model_that_starts_at_zero_answers_zero(tiny):
    model, plan, ids, actions = parts(tiny)
    torch.nn.init.zeros_(model.head.out.weight)
    torch.nn.init.zeros_(model.head.out.bias)
    model = model.float()
    with torch.no_grad():
        drawn = rolled_out(
            model, plan, 3, prepared(model, ids), actions.float(), torch.Generator().manual_seed(0)
        )
    assert not bool(drawn.any())
