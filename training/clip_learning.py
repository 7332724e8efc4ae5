"""Learning checks of video recipes: seconds of training against closed-form predictors of a frame.

A check trains the recipe on balls under exact physics, some of them pushed, with the real loop. It
scores held-out clips, whose scene and colours never occur together in training, twice: by the
recipe's own objective against a baseline that knows the frame before, and by going on from given
frames with the recipe's own schedule, in decibels against the true frames.

It knows no recipe by name.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.layout import Layout
from ..core.plan import DecodePlan
from ..core.poses import nearest_blocks, poses_of
from ..core.recipe import Recipe, frames_per_block
from ..core.recipe_sections import LearnsSpec
from ..core.rollout import run
from ..core.sampling import item_generator
from ..core.schedulers.base import flow_noise
from ..models.generate import Request, empty_values, start
from ..models.generator import GenerativeModel
from ..models.heads import CategoricalHead, DiffusionHead, PatchHead
from ..tokenizers.structure import structure_map, structure_tokens
from ..tokenizers.video_build import build_video_tokenizer
from .clip_predictors import FrameCodes, FrameGaussians, NextFrameCodes, NextFrameGaussians
from .clip_run import clip_model_stage, frame_psnr
from .clip_stage import ClipTokens, latent_offsets, leading_actions
from .clip_statistics import MOST_DB
from .clips import ClipDataset
from .consistency import END_METRIC, ConsistencyStage, end_gaps
from .learning import describe, noised_loss, trained
from .objective import Batch, ModelStage
from .orbits import orbit_clips
from .physics import physics_clips
from .predictors import Path as NoisePath
from .run import initial_model

NUM_CLIPS, NUM_HELD_OUT = 512, 48
NUM_FRAMES = 12
"""Frames of a clip, ten a second."""
NUM_GIVEN, NUM_DRAWN = 4, 4
"""Frames a rollout is given, and frames it then draws."""
EVAL_BATCH = 64


@dataclass(frozen=True)
class ClipReport:
    """What a learning check measured.

    Attributes:
        metric: What `value` and `baseline` are.
        baseline: The same of a closed-form predictor that knows the frame before, or of a teacher.
        baseline_name: Which predictor that is.
        value: The same of the trained recipe, on the same rows.
        budget: Steps, batch, seconds of training.
        drawn_db: Mean PSNR of frames drawn after given ones.
        copy_db: Mean PSNR of a given frame, after the tokenizer, in their place.
        mean_db: Mean PSNR of the mean of the given frames in their place.
        ceiling_db: Mean PSNR of the true frames after the tokenizer.
        kept: Which given frame `copy_db` is about.
    """

    metric: str
    baseline: float
    baseline_name: str
    value: float
    budget: str
    drawn_db: float
    copy_db: float
    mean_db: float
    ceiling_db: float
    kept: str = "last frame"

    def spec(self) -> LearnsSpec:
        """Shape the main figures as a recipe's `learns` section."""
        # A tokenizer that loses nothing has no ceiling worth naming.
        ceiling = f", tokenizer {self.ceiling_db:.1f}" if self.ceiling_db < 60 else ""
        return LearnsSpec(
            metric=self.metric,
            baseline=round(self.baseline, 3),
            baseline_name=self.baseline_name,
            value=round(self.value, 3),
            budget=self.budget,
            drawn=f"{NUM_DRAWN} frames after {NUM_GIVEN} given ones: {self.drawn_db:.1f} dB "
            f"({self.kept} kept {self.copy_db:.1f}, mean frame kept {self.mean_db:.1f}{ceiling})",
        )


def clip_learning_check(
    recipe: Recipe,
    steps: int | None = None,
    seed: int = 0,
    *,
    clips: int = NUM_CLIPS,
    held_out: int = NUM_HELD_OUT,
    draw: bool = True,
    keep: dict[str, Any] | None = None,
) -> ClipReport:
    """Train a video recipe on physics and measure it.

    Args:
        recipe: The recipe; its tokenizer must need no training and have frames of one latent each.
        steps: Optimiser steps; None = the recipe's.
        seed: Seed of data, weights, batches and drawn frames.
        clips: Training clips.
        held_out: Clips measured on.
        draw: Whether to draw frames; without, the decibels are nan.
        keep: Filled with the parts of the check ("model", "tokenizer", "frames").

    Returns:
        The figures.

    Raises:
        UsageError: A recipe with actions of another width than physics has, or a tokenizer whose
            latent frames hold several pixel frames.
    """
    tokenizer: Any = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    if tokenizer.temporal_stride != 1:
        raise UsageError(
            f"the check draws frame after frame; temporal stride {tokenizer.temporal_stride}, try 1"
        )
    data = _scenes(recipe, clips, held_out, seed, tokenizer.frame_size[0])
    model = initial_model(recipe, tokenizer, seed)
    with tempfile.TemporaryDirectory() as folder:
        train, tests = (
            clip_model_stage(model, tokenizer, data, Path(folder), split)
            for split in ("train", "held_out")
        )
    budget = trained(train, steps, seed)
    metric, name, (value, baseline) = _measured(train, tests, seed)
    decibels = (float("nan"),) * 4
    if draw:
        decibels = _rollout_psnr(model, tokenizer, data.only("held_out"), seed, keep)
    if keep is not None:
        keep |= {"model": model, "tokenizer": tokenizer}
    return ClipReport(
        metric,
        baseline,
        name,
        value,
        budget,
        *decibels,
        kept="nearest view" if recipe.condition.poses else "last frame",
    )


def _scenes(recipe: Recipe, clips: int, held_out: int, seed: int, size: int) -> ClipDataset:
    """Make clips of what the recipe is told about: cameras that go round, or balls and pushes."""
    if recipe.condition.poses:
        return orbit_clips(clips, held_out, seed, num_views=NUM_FRAMES, size=size)
    return physics_clips(
        clips, held_out, seed, num_frames=NUM_FRAMES, size=size,
        pushes=recipe.condition.actions > 0,
    )  # fmt: skip


# -- losses -----------------------------------------------------------------------------------


def _measured(
    train: ModelStage, held_out: ModelStage, seed: int
) -> tuple[str, str, tuple[float, float]]:
    """Name what is measured and the baseline, and measure both.

    A consistent student answers with the end of a path and not with the mean over all ends, so it
    is measured by what it was taught: where its teacher's paths end.
    """
    if isinstance(train, ConsistencyStage) and isinstance(held_out, ConsistencyStage):
        held_out.teacher.model.load_state_dict(train.teacher.model.state_dict())
        return END_METRIC, "the teacher's own guess in one row", end_gaps(held_out, seed)
    guess = baseline_of(train)
    losses = held_out_losses(train, held_out, seed, guess)
    return describe(train.model)[0], guess.name, losses


Baseline = FrameCodes | NextFrameCodes | FrameGaussians | NextFrameGaussians


def baseline_of(train: ModelStage) -> Baseline:
    """Fit the baseline of a recipe: it knows the frame before where the recipe sees it clean."""
    head, tokens = train.model.head, _tokens(train)
    plan = train.plan(torch.Generator())[0]
    knows_past = plan.keeps_blocks and plan.order == "raster"
    if isinstance(head, CategoricalHead):
        return (NextFrameCodes if knows_past else FrameCodes)(tokens, head.vocab_size)
    if not knows_past:
        return FrameGaussians(tokens)
    return NextFrameGaussians(tokens, _nearest_view(train, slice(None)))


def _nearest_view(stage: ModelStage, indices: Tensor | slice) -> Tensor | None:
    """Find the earlier view of its window that every view is nearest to; None without cameras."""
    if not stage.recipe.condition.poses or stage.actions is None:
        return None
    return nearest_blocks(poses_of(stage.actions[indices]), 1).int().argmax(-1)


@torch.no_grad()
def held_out_losses(
    train: ModelStage, held_out: ModelStage, seed: int, baseline: Baseline | None = None
) -> tuple[float, float]:
    """Score the model and its baseline on the same rows, with the weights of the objective.

    Rows whose token the model can see are left out, and prompts are never dropped. Recipes with one
    copy that keep finished blocks are scored as they decode: all before a block is context.

    Args:
        train: What the baseline is fitted on.
        held_out: What both are scored on.
        seed: Seed of the corruption.
        baseline: From `baseline_of`; None = fit it here.

    Returns:
        Mean loss of the model and of the baseline.
    """
    baseline = baseline_of(train) if baseline is None else baseline
    sums = torch.zeros(3, dtype=torch.float64)
    for number, indices in enumerate(torch.arange(held_out.num_items).split(EVAL_BATCH)):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        plan, layout, lowered = held_out.plan(generator)
        values = held_out.values[indices]
        batch = held_out.corrupt(values, plan, layout, generator)
        never = torch.zeros(len(indices), dtype=torch.bool)
        slots = plan.content.source if plan.shift else layout.source[batch.loss_rows]
        for part in _as_decoded(batch, values, plan, layout, generator):
            hidden = held_out.hidden_states(indices, never, part, layout, lowered)
            weight = part.weight
            if held_out.recipe.corruption.kind == "mask":
                weight = weight * part.is_masked[:, part.loss_rows]
            near = _nearest_view(held_out, indices)
            losses = _losses(held_out, baseline, hidden, part, values, slots, generator, near)
            totals = [*((loss * weight).sum() for loss in losses), weight.sum()]
            sums += torch.stack(totals).double()
    return float(sums[0] / sums[2]), float(sums[1] / sums[2])


def _as_decoded(
    batch: Batch, values: Tensor, plan: DecodePlan, layout: Layout, generator: torch.Generator
) -> Iterator[Batch]:
    """Split a batch of a recipe with one kept copy into one per block, its past kept as context."""
    if not plan.keeps_only_copy:
        yield batch
        return
    clean = values[:, layout.source.clamp_min(0)]
    if plan.context_noise:
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        clean = flow_noise(clean, noise, plan.context_noise)
    for block in range(plan.num_blocks):
        past = layout.block < block
        scored = layout.block[batch.loss_rows] == block
        yield replace(
            batch,
            values=torch.where(past[:, None], clean, batch.values),
            is_masked=batch.is_masked & ~past,
            level=batch.level.masked_fill(past, plan.context_level),
            weight=batch.weight * scored,
        )


def _tokens(stage: ModelStage) -> ClipTokens:
    tokens: Any = stage.values
    assert isinstance(tokens, ClipTokens)
    return tokens


def _losses(
    stage: ModelStage,
    baseline: Baseline,
    hidden: Tensor,
    batch: Batch,
    values: Tensor,
    slots: Tensor,
    generator: torch.Generator,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss per row of the model and of the baseline, [batch, rows] each."""
    head, target = stage.model.head, batch.target
    if isinstance(baseline, FrameCodes | NextFrameCodes):
        assert isinstance(head, CategoricalHead)
        return head.loss(hidden, target, label_smoothing=0.0), baseline.loss(values, target, slots)
    own = head.loss(hidden, target, generator)
    if isinstance(head, DiffusionHead):

        def linear(sample: Tensor, path: NoisePath) -> Tensor:
            return baseline.predict(values, sample, path, slots)

        return own, noised_loss(head, linear, target, generator)
    assert isinstance(head, PatchHead)
    level = batch.level[:, batch.loss_rows, None]
    one, zero = torch.ones_like(level), torch.zeros_like(level)
    path = NoisePath(
        stage.scheduler.add_noise(one, zero, level),
        stage.scheduler.add_noise(zero, one, level),
        stage.scheduler.target(one, zero),
        stage.scheduler.target(zero, one),
    )
    sample = batch.values[:, batch.loss_rows]
    if before is None or not isinstance(baseline, NextFrameGaussians):
        predicted = baseline.predict(values, sample, path, slots)
    else:
        predicted = baseline.predict(values, sample, path, slots, before)
    return own, (predicted - target).square().mean(-1)


# -- rollouts ---------------------------------------------------------------------------------


@torch.no_grad()
def go_on(
    model: GenerativeModel,
    values: Tensor,
    prompts: list[str],
    actions: Tensor | None,
    num_drawn: int,
    seed: int,
    structure: Tensor | None = None,
) -> Tensor:
    """Draw the frames after given ones, block by block, each from what came before it.

    Args:
        model: A video model whose cache has a window, in eval mode.
        values: Given frames [items, frames, cells, channels].
        prompts: One per item.
        actions: What led to every frame, given and drawn [items, frames, actions]; None without.
        num_drawn: Frames to draw.
        seed: Seed of all items.
        structure: What tokens of every frame are told of its shape [items, frames, cells, numbers];
            None without.

    Returns:
        Values of the drawn frames [items, num_drawn, cells, channels].

    Raises:
        UsageError: Numbers of frames that blocks do not fill.
    """
    items, given, cells = values.shape[:3]
    size = frames_per_block(model.recipe.layout.block) or 1
    if given % size or num_drawn % size:
        raise UsageError(f"{given} given and {num_drawn} drawn frames in blocks of {size}")
    canvas = empty_values(model, items, given + num_drawn)
    canvas[:, : given * cells] = values.flatten(1, 2)
    known = torch.zeros(canvas.shape[:2], dtype=torch.bool)
    known[:, : given * cells] = True
    generators = [item_generator(seed, i) for i in range(items)]
    request = Request(
        prompts, generators, values=canvas, is_known=known, frames=given + num_drawn,
        actions=actions, structure=structure,
    )  # fmt: skip
    drawn, _ = run(start(model, request))
    return drawn.unflatten(1, (given + num_drawn, cells))[:, given:]


def nearest_given(poses: Tensor) -> Tensor:
    """Find the given view nearest to every drawn one: indices [items, NUM_DRAWN].

    Args:
        poses: Cameras of the given and the drawn views [items, views, 4, 4].
    """
    rows = [
        nearest_blocks(torch.cat((poses[:, :NUM_GIVEN], poses[:, view : view + 1]), 1), 1)[:, -1]
        for view in range(NUM_GIVEN, NUM_GIVEN + NUM_DRAWN)
    ]
    return torch.stack(rows, 1).int().argmax(-1)


@torch.no_grad()
def _rollout_psnr(
    model: GenerativeModel,
    tokenizer: Any,
    clips: ClipDataset,
    seed: int,
    keep: dict[str, Any] | None,
) -> tuple[float, float, float, float]:
    """Mean PSNR in dB of drawn frames, a given frame kept, the given ones' mean, the tokenizer.

    The frame kept is the last given one; with cameras, for every view the nearest given one.
    """
    count = NUM_GIVEN + NUM_DRAWN
    pixels = clips.window(torch.arange(len(clips)), count).pixels()
    values = tokenizer.encode(pixels)
    width, actions = model.recipe.condition.actions, None
    if width:
        led = leading_actions(clips, width, tokenizer)
        start = latent_offsets(clips, tokenizer)[:-1]
        actions = led[start[:, None] + torch.arange(count)]
    condition, shown = model.recipe.condition, None
    if condition.structure != "none":
        maps = structure_map(condition.structure, pixels)
        shown = structure_tokens(maps, tokenizer, condition.structure_size)
    given_values = values[:, :NUM_GIVEN]
    drawn = go_on(model, given_values, clips.captions, actions, NUM_DRAWN, seed, shown)
    decoded = tokenizer.decode(torch.cat((values[:, :NUM_GIVEN], drawn), 1))
    if keep is not None:
        keep |= {"frames": decoded, "true_frames": pixels}
    truth, given = pixels[:, :, NUM_GIVEN:], pixels[:, :, :NUM_GIVEN]
    kept = decoded[:, :, NUM_GIVEN - 1 : NUM_GIVEN].expand_as(truth)
    if model.recipe.condition.poses and actions is not None:
        near = nearest_given(poses_of(actions))
        kept = decoded.gather(2, near[:, None, :, None, None].expand_as(truth))
    guesses = (
        decoded[:, :, NUM_GIVEN:],
        kept,
        given.mean(2, keepdim=True).expand_as(truth),
        tokenizer.decode(values)[:, :, NUM_GIVEN:],
    )
    drawn_db, copy_db, mean_db, ceiling_db = (
        float(frame_psnr(guess, truth).clamp_max(MOST_DB).mean()) for guess in guesses
    )
    return drawn_db, copy_db, mean_db, ceiling_db
