"""History a model wrote itself, blocks that start below noise, and distribution matching."""

import pytest
import torch

from blockloom.core.errors import ModelError, UsageError
from blockloom.core.recipe import load_recipe
from blockloom.core.rollout import Rollout, run
from blockloom.core.schedulers.flow import FlowEuler
from blockloom.models.generator import ModelDecoder
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.clip_run import stage_of_clips
from blockloom.training.clip_stage import encode_clips
from blockloom.training.distill import DistillStage, bidirectional
from blockloom.training.history import history_generators, history_level, resampled
from blockloom.training.physics import physics_clips
from blockloom.training.run import give_teacher, initial_model

TINY = ["backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16",
        "text.buckets=32", "text.words=3", "schedule.update=renoise"]  # fmt: skip
DISTILL = ["distill.init_steps=3", "distill.critic_steps=2"]


def stage_of(tmp_path, *settings):
    recipe = load_recipe("video/teacher_forcing", [*TINY, *settings])
    tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    clips = physics_clips(4, 1, 0, num_frames=8, size=8, pushes=True).only("train")
    model = initial_model(recipe, tokenizer, 0)
    with torch.no_grad():
        for parameter in model.parameters():  # heads start at zero: nothing would move
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(7)))
    return stage_of_clips(model, tokenizer, clips, encode_clips(tokenizer, clips, tmp_path))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def redraw(stage, level, use_cache=True):
    indices = torch.arange(2)
    plan, _, _ = stage.plan(seeded())
    values = stage.values[indices]
    known = torch.zeros(values.shape[:2], dtype=torch.bool)
    decoder = ModelDecoder(
        stage.model, stage._prompt(indices, known[:, 0]), actions=stage._actions(indices)
    )
    with torch.no_grad():
        drawn, _ = run(
            Rollout(
                plan, decoder, FlowEuler(num_steps=1), values=values, is_known=known,
                generators=history_generators(2, seeded(5)), start_level=level, use_cache=use_cache,
            )
        )  # fmt: skip
    return values, drawn


def test_blocks_that_start_low_stay_near_what_was_given(tmp_path):
    stage = stage_of(tmp_path)
    stage.model.eval()
    errors = []
    for level in (0.01, 0.3, 1.0):
        values, drawn = redraw(stage, level)
        _, slow = redraw(stage, level, use_cache=False)
        assert torch.allclose(drawn, slow, atol=2e-5)
        errors.append(float((drawn - values).abs().mean()))
    assert errors[0] < 0.05 < errors[1] < errors[2]
    with pytest.raises(ValueError, match="start_level"):
        redraw(stage, 0.0)


def test_redrawn_history_replaces_the_clean_rows_only(tmp_path):
    stage = stage_of(tmp_path, "corruption.resample=1.0")
    indices, never = torch.arange(2), torch.zeros(2, dtype=torch.bool)
    plan, layout, _ = stage.plan(seeded())
    values = stage.values[indices]
    batch = stage.corrupt(values, plan, layout, seeded(1))
    before = batch.values.clone()
    stage.rewrite_history(batch, values, indices, never, seeded(2))
    noisy = layout.copy == 1
    assert torch.equal(batch.values[:, noisy], before[:, noisy])
    generator = seeded(2)
    torch.rand((), generator=generator)
    level = history_level(0.6, generator)
    wanted = resampled(
        stage.model, plan, values, stage._prompt(indices, never), stage._actions(indices), level,
        history_generators(2, generator),
    )  # fmt: skip
    assert torch.equal(batch.values[:, ~noisy], wanted[:, layout.source[~noisy]])
    loss, _ = stage.loss(indices, seeded(3), 0)
    again, _ = stage.loss(indices, seeded(3), 0)
    assert float(loss.detach()) == float(again.detach())
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in stage.model.head.parameters())


@pytest.mark.parametrize("far", [(), ("cache.window=2", "cache.far.patch=2")])
def test_frames_with_gradients_are_the_frames_of_the_cached_rollout(tmp_path, far):
    stage = stage_of(tmp_path, *DISTILL, *far)
    assert isinstance(stage, DistillStage)
    stage.modules().eval()
    indices = torch.arange(2)
    for seed in range(4):  # both exits of the two rows occur
        drawn = stage._drawn(indices, seeded(seed))
        again = stage._redrawn(drawn, seeded(seed))
        assert again.requires_grad and torch.allclose(again, drawn.clean, atol=2e-5)
    levels = {stage._drawn(indices, seeded(seed)).level for seed in range(8)}
    assert levels == {row.level for row in stage.scheduler.rows()}


def test_who_moves_depends_on_the_step(tmp_path):
    stage = stage_of(tmp_path, *DISTILL)
    parts = stage.modules()

    def moved(step):
        parts.zero_grad(set_to_none=True)
        loss, _ = stage.loss(torch.arange(2), seeded(step), step)
        loss.backward()
        assert bool(loss.isfinite())
        return {
            name
            for name, part in parts.items()
            if any(p.grad is not None for p in part.parameters())
        }

    assert moved(0) == moved(2) == {"student", "teacher"}
    assert moved(3) == moved(4) == {"critic"}
    for ours, its in zip(parts["critic"].parameters(), parts["teacher"].parameters(), strict=True):
        assert torch.equal(ours, its)
    assert moved(5) == {"student"} and moved(6) == {"critic"}


def adversarial_stage(tmp_path):
    stage = stage_of(tmp_path, *DISTILL, "distill.adversarial=0.5")
    assert isinstance(stage, DistillStage)
    return stage


def test_the_judge_learns_beside_the_critic_and_moves_the_student_alone(tmp_path):
    stage, indices = adversarial_stage(tmp_path), torch.arange(2)
    parts, names = stage.modules(), []
    with torch.no_grad():
        stage.judge.weight.normal_(generator=seeded(3))
    for step in (0, 3, 5):
        parts.zero_grad(set_to_none=True)
        stage.loss(indices, seeded(step), step)[0].backward()
        names.append(
            {n for n, part in parts.items() if any(p.grad is not None for p in part.parameters())}
        )
    assert names == [{"student", "teacher"}, {"critic", "judge"}, {"student"}]
    assert all(p.requires_grad for p in stage.critic.model.parameters())
    # Its term is what the student's loss has more than without it.
    loss, metrics = stage.loss(indices, seeded(5), 5)
    plain = stage_of(tmp_path, *DISTILL)
    plain.modules().load_state_dict(
        {k: v for k, v in parts.state_dict().items() if not k.startswith("judge.")}
    )
    bare, _ = plain.loss(indices, seeded(5), 5)
    assert float((loss - bare).detach()) == pytest.approx(
        0.5 * metrics["adversarial_loss"], rel=1e-4
    )


def test_a_judge_that_knows_nothing_pulls_nowhere(tmp_path):
    stage, indices = adversarial_stage(tmp_path), torch.arange(2)
    _, metrics = stage.loss(indices, seeded(3), 3)
    assert metrics["judge_loss"] == pytest.approx(0.6931, abs=1e-3)
    drawn = stage._drawn(indices, seeded(5))
    frames = stage._redrawn(drawn, seeded(5))
    verdict = stage._verdict(frames, indices, seeded(1))
    assert not bool(torch.autograd.grad(verdict.sum(), frames, allow_unused=True)[0].any())


def test_the_judge_comes_to_tell_data_from_drawn_frames(tmp_path):
    stage, indices = adversarial_stage(tmp_path), torch.arange(4)
    stage.loss(indices, seeded(3), 3)  # the critic starts as its teacher
    parameters = [*stage.critic.model.parameters(), *stage.judge.parameters()]
    optimizer = torch.optim.Adam(parameters, 3e-3)
    first = last = 0.0
    for step in range(30):
        optimizer.zero_grad()
        loss, metrics = stage._critic_loss(stage._drawn(indices, seeded(step)), seeded(step))
        loss.backward()
        optimizer.step()
        first, last = (first or metrics["judge_loss"]), metrics["judge_loss"]
    assert last < 0.8 * first
    with torch.no_grad():
        drawn = stage._drawn(indices, seeded(99))
        own, data = (
            stage._verdict(values, indices, seeded(1)).mean()
            for values in (drawn.clean, stage.values[indices])
        )
    assert float(data) > float(own)


def test_on_the_datas_history_no_rollout_runs(tmp_path):
    stage = stage_of(tmp_path, *DISTILL, "distill.history=data")
    drawn = stage._drawn(torch.arange(2), seeded(1))
    assert torch.equal(drawn.clean, stage.values[torch.arange(2)])
    _, alike = stage.loss(torch.arange(2), seeded(1), 5)
    assert alike["student_step"] == 0.0  # the critic is still its teacher's copy
    with torch.no_grad():
        for parameter in stage.critic.model.head.parameters():
            parameter.add_(0.1)
    loss, metrics = stage.loss(torch.arange(2), seeded(1), 5)
    assert bool(loss.isfinite()) and metrics["student_step"] > 0.01


def test_the_teacher_sees_everything_at_one_level():
    recipe = load_recipe("video/teacher_forcing", [*TINY, *DISTILL])
    twin = bidirectional(recipe)
    assert (twin.layout.copies, twin.layout.block, twin.mask) == (1, "all", "bidirectional")
    assert twin.corruption.per == "sample" and twin.distill is None and twin.cache.window is None


STREAMS = [*DISTILL, "distill.given=3", "distill.horizon=6", "train.batch_size=2"]


def test_videos_go_on_from_step_to_step_and_start_anew_at_their_horizon(tmp_path):
    stage = stage_of(tmp_path, *STREAMS)
    stage.modules().eval()
    windows, streams = stage.values.windows, stage.streams
    assert (streams.advance, streams.given_slots) == (2, 3 * stage.values.shape[1] // 5)
    first = torch.tensor([0, len(windows) - 1])  # the second clip is over after this window
    one = stage._drawn(first, seeded(1))
    assert torch.equal(one.items, first)
    truth = stage.values[first]
    assert torch.equal(one.clean[:, : streams.given_slots], truth[:, : streams.given_slots])
    assert not torch.equal(one.clean[:, streams.given_slots :], truth[:, streams.given_slots :])
    fresh = torch.tensor([1, 1])
    two = stage._drawn(fresh, seeded(2))
    assert two.items.tolist() == [2, 1] and streams.ages.tolist() == [4, 2]
    own = one.clean[0, -streams.given_slots :]
    assert torch.equal(two.clean[0, : streams.given_slots], own)
    assert not torch.equal(own, truth[0, -len(own) :])
    assert stage.values[fresh][1, : streams.given_slots].equal(two.clean[1, : streams.given_slots])
    stage._drawn(fresh, seeded(3))
    stage._drawn(fresh, seeded(4))
    # 8 frames a clip: windows 0 and 2 fit, so neither video ever got as old as its horizon.
    assert int(streams.ages.max()) <= 6
    with pytest.raises(ValueError, match=r"train\.batch_size"):
        stage._drawn(torch.arange(3), seeded(5))


def test_a_horizon_ends_videos_that_the_clip_would_let_go_on(tmp_path):
    stage = stage_of(tmp_path, *STREAMS, "distill.horizon=2")
    for seed in range(3):
        drawn = stage._drawn(torch.tensor([0, 1]), seeded(seed))
        assert drawn.items.tolist() == [0, 1]


def test_given_frames_carry_no_gradient_and_drawn_ones_are_the_rollouts(tmp_path):
    stage = stage_of(tmp_path, *STREAMS)
    stage.modules().eval()
    given = stage.given_slots
    for seed in range(4):
        drawn = stage._drawn(torch.tensor([0, 1]), seeded(seed))
        again = stage._redrawn(drawn, seeded(seed))
        assert torch.allclose(again[:, given:], drawn.clean[:, given:], atol=2e-5)
    stage.critic.model.load_state_dict(stage.teacher.model.state_dict())
    _, metrics = stage._student_loss(drawn, seeded(9))
    assert metrics["student_step"] == 0.0


def test_a_resumed_stage_goes_on_from_the_same_frames(tmp_path):
    stage, twin = stage_of(tmp_path, *STREAMS), stage_of(tmp_path, *STREAMS)
    stage.modules().eval()
    twin.modules().eval()
    stage._drawn(torch.tensor([0, 1]), seeded(1))
    twin.modules().load_state_dict(stage.modules().state_dict())
    ours, its = (s._drawn(torch.tensor([3, 3]), seeded(2)) for s in (stage, twin))
    assert torch.equal(ours.items, its.items) and torch.equal(ours.clean, its.clean)


def test_the_datas_loss_is_added_to_the_students(tmp_path):
    plain = stage_of(tmp_path, *DISTILL)
    more = stage_of(tmp_path, *DISTILL, "distill.data_weight=2.0")
    for stage in (plain, more):
        stage.loss(torch.arange(2), seeded(0), 3)  # the critic starts as the teacher's copy
    indices = torch.arange(2)
    alone, _ = plain.loss(indices, seeded(4), 5)
    both, metrics = more.loss(indices, seeded(4), 5)
    assert float((both - alone).detach()) == pytest.approx(2 * metrics["token_loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill.given=9"], r"distill\.given = 9 must be .* try 4"),
        (["distill.horizon=8"], r"distill\.horizon = 8 needs distill\.given"),
        (["distill.method=consistency", "distill.adversarial=1"], r"set distill\.adversarial to 0"),
        (
            ["distill.given=2", "distill.horizon=8", "distill.history=data"],
            r"needs distill\.given and distill\.history",
        ),
    ],
)
def test_settings_of_own_videos_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ModelError, match=message):
        load_recipe("video/teacher_forcing", [*TINY, *DISTILL, *settings])


def test_no_teacher_and_no_step_to_train_one_is_refused(tmp_path):
    stage = stage_of(tmp_path, "distill.init_steps=0")
    with pytest.raises(UsageError, match=r"distill\.teacher"):
        give_teacher(stage, stage.recipe)
