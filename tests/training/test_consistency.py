"""Consistency distillation: tangents, their normalisation per frame, and a closed-form case."""

from types import SimpleNamespace

import pytest
import torch

from blockloom.core.errors import ModelError, UsageError
from blockloom.core.recipe import load_recipe
from blockloom.core.trigflow import LAST, clean_from_circular
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.clip_run import stage_of_clips
from blockloom.training.clip_stage import encode_clips
from blockloom.training.consistency import ConsistencyStage, end_gaps, normalised, tangent
from blockloom.training.loop import TrainConfig, Trainer
from blockloom.training.optim import learning_rate_at
from blockloom.training.physics import physics_clips
from blockloom.training.run import initial_model, train_config

TINY = ["backbone.dim=32", "backbone.layers=2", "backbone.heads=2", "text.dim=16",
        "text.buckets=32", "text.words=3", "distill.init_steps=3"]  # fmt: skip
MEAN, STD = 0.7, 0.4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- closed form: data that is Gaussian -------------------------------------------------------


def spread(time):
    return (STD**2 * time.cos() ** 2 + time.sin() ** 2).sqrt()


def exact_end(sample, time):
    """Where the path through a sample ends: the same quantile of the data."""
    return MEAN + STD * (sample - MEAN * time.cos()) / spread(time)


def exact_drift(sample, time):
    """Expected cos(t) noise - sin(t) clean of a sample."""
    cos, sin = time.cos(), time.sin()
    rest = (sample - MEAN * cos) / spread(time) ** 2
    return cos * sin * rest - sin * (MEAN + STD**2 * cos * rest)


def exact_student(sample, time):
    return (time.cos() * sample - exact_end(sample, time)) / time.sin()


def gaussian_samples():
    rng = seeded()
    time = torch.rand(4, 6, 1, generator=rng, dtype=torch.float64) * (LAST - 0.1) + 0.05
    clean, noise = (torch.randn(4, 6, 3, generator=rng, dtype=torch.float64) for _ in range(2))
    return time.cos() * (MEAN + STD * clean) + time.sin() * noise, time


def test_the_exact_student_of_gaussian_data_has_no_tangent():
    sample, time = gaussian_samples()
    drift = exact_drift(sample, time)
    value, g = tangent(exact_student, sample, time, drift)
    assert torch.allclose(value, exact_student(sample, time)) and g.abs().max() < 1e-12
    end = clean_from_circular(sample, value, time)
    assert torch.allclose(end, exact_end(sample, time), atol=1e-12)
    # The drift itself, a student that only takes the teacher's direction, is not consistent.
    _, wrong = tangent(exact_drift, sample, time, drift)
    assert wrong.abs().max() > 0.05


def test_the_tangent_is_the_derivative_of_the_named_end_along_the_path():
    sample, time = gaussian_samples()
    drift = exact_drift(sample, time)

    def student(x, t):
        return (x * 1.3 + t).tanh() + 0.2 * x * t

    _, g = tangent(student, sample, time, drift)
    step = 1e-6

    def end(h):
        x, t = sample + h * drift, time + h
        return clean_from_circular(x, student(x, t), t)

    slope = (end(step) - end(-step)) / (2 * step)
    assert torch.allclose(g, time.cos() * slope, atol=1e-8)
    # Without its share the tangent only draws F to the teacher's direction.
    _, begun = tangent(student, sample, time, drift, share=0.0)
    assert torch.allclose(begun, -(time.cos() ** 2) * (student(sample, time) - drift))


def test_training_on_the_tangent_finds_the_exact_student():
    """Gradient descent along normalised tangents, on a table of quantiles instead of a network."""
    time = torch.linspace(0.1, 1.4, 14, dtype=torch.float64)[:, None, None].repeat(1, 200, 1)
    noise = torch.randn(14, 200, 1, generator=seeded(), dtype=torch.float64)
    sample = MEAN * time.cos() + spread(time) * noise
    scale = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    powers = torch.arange(6)

    def student(x, t):
        return (scale[0] * t**powers).sum(-1, keepdim=True) * x + (scale[1] * t**powers).sum(
            -1, keepdim=True
        )

    optimiser = torch.optim.Adam([scale], lr=0.02)
    errors = []
    for step in range(1500):
        drift = exact_drift(sample, time)
        value, g = tangent(student, sample, time, drift, share=min(1.0, step / 200))
        loss = (student(sample, time) - value - g).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in (0, 1499):
            end = clean_from_circular(sample, student(sample, time).detach(), time)
            errors.append(float((end - exact_end(sample, time)).square().mean().sqrt()))
    assert errors[1] < 0.03 < 0.3 < errors[0]


# -- per frame --------------------------------------------------------------------------------


def test_tangents_are_normalised_frame_by_frame():
    frame = torch.tensor([0, 0, 1, 1, 2])
    g = torch.randn(2, 5, 3, generator=seeded(), dtype=torch.float64)
    own = normalised(g, frame, 0.1)
    norm = g[0, 2:4].square().sum().sqrt()
    assert torch.allclose(own[0, 2:4], g[0, 2:4] / (norm + 0.1), atol=1e-15)
    louder = g.clone()
    louder[1, frame == 1] *= 1e6
    other = normalised(louder, frame, 0.1)
    assert torch.equal(other[:, frame != 1], own[:, frame != 1])
    assert torch.equal(other[0], own[0])
    assert float(other[1, frame == 1].square().sum().sqrt()) == pytest.approx(1.0, abs=1e-6)
    assert not bool(normalised(torch.zeros_like(g), frame, 0.1).any())


# -- the stage --------------------------------------------------------------------------------


def stage_of(tmp_path, *settings, dtype=torch.float32):
    recipe = load_recipe("video/nfd_plus", [*TINY, *settings])
    tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    clips = physics_clips(4, 1, 0, num_frames=8, size=8, pushes=True).only("train")
    model = initial_model(recipe, tokenizer, 0)
    with torch.no_grad():
        for parameter in model.parameters():  # heads start at zero: nothing would move
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=seeded(7)))
            parameter.data = parameter.data.to(dtype)
    values = encode_clips(tokenizer, clips, tmp_path).to(dtype)
    stage = stage_of_clips(model, tokenizer, clips, values)
    assert isinstance(stage, ConsistencyStage)
    return stage


def field_of(stage):
    """The student's F with samples, times and drifts of one batch."""
    indices, never = torch.arange(2), torch.zeros(2, dtype=torch.bool)
    plan, layout, _ = stage.plan(seeded())
    batch = stage.corrupt(stage.values[indices], plan, layout, seeded(1))
    field = stage._field(stage, indices, never, batch, layout)
    shape = batch.values[:, batch.loss_rows].shape
    sample, drift = (torch.randn(shape, generator=seeded(s)).to(batch.values) for s in (2, 3))
    time = torch.rand(*shape[:2], 1, generator=seeded(4)).to(batch.values) + 0.2
    return batch, layout, field, sample, time, drift


@pytest.mark.parametrize("copies", [1, 2])
def test_forward_derivatives_of_the_network_are_finite_differences(tmp_path, copies):
    two = ["layout.copies=2", "mask=block_diffusion", "cache.write=separate",
           "cache.context_level=0"]  # fmt: skip
    stage = stage_of(tmp_path, *(two if copies == 2 else []), dtype=torch.float64)
    _, _, field, sample, time, drift = field_of(stage)
    value, g = tangent(field, sample, time, drift)
    assert torch.allclose(value, field(sample, time).detach(), atol=1e-12)  # fused attention
    cos, sin = time.cos(), time.sin()
    speed, step = cos * sin, 1e-6
    ends = [field(sample + h * speed * drift, time + h * speed).detach() for h in (step, -step)]
    change = (ends[0] - ends[1]) / (2 * step)
    wanted = -(cos**2) * (value - drift) - (cos * sin * sample + change)
    # Levels enter by sinusoids of up to 1000 radians, so third derivatives are large.
    assert (g - wanted).abs().max() < 1e-6 * wanted.abs().max()
    assert change.abs().max() > 0.1


def test_rows_that_stand_still_have_no_tangent_and_move_nobody(tmp_path):
    stage = stage_of(tmp_path, dtype=torch.float64)
    _, layout, field, sample, time, drift = field_of(stage)
    moves = torch.ones_like(time)
    moves[:, layout.block < 2] = 0.0
    _, g = tangent(field, sample, time, drift, moves=moves)
    assert not bool(g[:, layout.block < 2].any()) and bool((g[:, layout.block >= 2] != 0).all())
    _, other = tangent(field, sample, time, drift + 5.0 * (1 - moves), moves=moves)
    assert torch.equal(other[:, layout.block >= 2], g[:, layout.block >= 2])


def test_learning_first_then_a_teacher_that_stands_still(tmp_path):
    stage = stage_of(tmp_path, "distill.tangent_warmup=2")
    parts = stage.modules()

    def moved(step):
        parts.zero_grad(set_to_none=True)
        loss, metrics = stage.loss(torch.arange(2), seeded(step), step)
        loss.backward()
        assert bool(loss.isfinite())
        names = {
            name
            for name, part in parts.items()
            if any(p.grad is not None for p in part.parameters())
        }
        return names, metrics

    assert moved(0) == ({"student"}, pytest.approx({"token_loss": moved(0)[1]["token_loss"]}))
    with torch.no_grad():
        for parameter in stage.model.parameters():
            parameter.mul_(1.01)
    names, metrics = moved(3)
    assert names == {"student"} and metrics["tangent"] > 1e-3
    for ours, its in zip(parts["student"].parameters(), parts["teacher"].parameters(), strict=True):
        assert torch.equal(ours, its)
    with torch.no_grad():
        next(iter(stage.model.head.parameters())).add_(1.0)
    before = [p.clone() for p in parts["teacher"].parameters()]
    assert moved(4)[0] == {"student"}
    assert all(torch.equal(a, b) for a, b in zip(before, parts["teacher"].parameters(),
                                                strict=True))  # fmt: skip


def test_the_loss_is_the_squared_step_along_the_tangent(tmp_path):
    stage = stage_of(tmp_path, "distill.tangent_floor=1e-5", "condition.drop=0.0")
    loss, _ = stage.loss(torch.arange(2), seeded(9), 3)
    # F moves by g / (||g|| + c): by one unit per frame of 16 rows and 12 channels.
    assert float(loss.detach()) == pytest.approx(1 / (16 * 12), rel=0.01)
    again, _ = stage.loss(torch.arange(2), seeded(9), 3)
    assert float(again.detach()) == float(loss.detach())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["distill.teacher=folder"], "set distill.init_steps to 0"),
        (["head.objective=eps", "corruption.kind=ddpm"], "needs corruption.kind"),
        (["distill.method=dmd"], "needs layout.copies = 2"),
    ],
)
def test_recipes_that_cannot_be_distilled_so_are_refused(settings, words):
    with pytest.raises(ModelError, match=words):
        load_recipe("video/nfd_plus", settings)


# -- what is measured -------------------------------------------------------------------------


def test_the_gap_to_the_end_of_the_path_is_the_teachers_own_for_its_copy(tmp_path):
    stage = stage_of(tmp_path)
    stage.modules().eval()
    student, teacher = end_gaps(stage, 0)
    assert student == teacher > 1e-4
    # A field that does not change along the path names its end at once.
    with torch.no_grad():
        for model in (stage.model, stage.teacher.model):
            for parameter in model.head.parameters():
                parameter.zero_()
        stage.model.head.out.bias.add_(0.5)
    student, teacher = end_gaps(stage, 0)
    assert teacher == pytest.approx(0.0, abs=1e-10) and student == pytest.approx(0.25, rel=1e-5)


def test_the_second_part_of_a_run_has_a_rate_of_its_own():
    recipe = load_recipe("video/nfd_plus", [*TINY, "distill.lr=0.01", "train.lr=1.0",
                                            "train.warmup=2"])  # fmt: skip
    config = train_config(recipe, 9)
    assert (config.late_from, config.late_learning_rate) == (3, 0.01)
    rates = [Trainer._rate(SimpleNamespace(config=config, step=step)) for step in range(9)]
    alone = [learning_rate_at(k, peak=0.01, num_steps=6, warmup_steps=2) for k in range(6)]
    assert rates[3:] == pytest.approx(alone)
    assert rates[:3] == pytest.approx(
        [learning_rate_at(k, peak=1.0, num_steps=3, warmup_steps=2) for k in range(3)]
    )
    whole = train_config(load_recipe("video/nfd_plus", ["distill.lr=null"]), None)
    assert whole.late_from is None
    with pytest.raises(UsageError, match="late_learning_rate"):
        TrainConfig(num_steps=4, batch_size=1, late_from=2)
