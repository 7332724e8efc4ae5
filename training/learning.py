"""Learning checks: does a recipe, trained for seconds, beat a predictor that only knows positions?

A check trains the recipe on procedural pictures with the real loop and scores held-out pictures,
whose prompts never occur in training, twice: by the recipe's own objective against a closed-form
baseline, and by drawing pictures with the recipe's own schedule and naming them.

It knows no recipe by name.
"""

import copy
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.recipe import Recipe
from ..core.recipe_sections import LearnsSpec
from ..models.generator import GenerativeModel
from ..models.heads import CategoricalHead, DiffusionHead, GaussianMixtureHead, ShortcutHead
from ..tokenizers.build import build_tokenizer
from .data import ImageDataset
from .loop import Trainer
from .objective import Batch, ModelStage
from .predictors import CodeTable, SlotGaussians
from .predictors import Path as NoisePath
from .run import draw, initial_model, train_config
from .shapes import nearest_prompts, shape_prompts, shapes

EVAL_BATCH = 64
NUM_PICTURES = 48
"""Pictures drawn: eight of each held-out prompt."""


@dataclass(frozen=True)
class LearnsReport:
    """What a learning check measured.

    Attributes:
        metric: What `value` and `baseline` are.
        baseline: Loss of the best predictor that only knows positions.
        baseline_name: Which predictor that is.
        value: Loss of the trained recipe on the same rows.
        budget: Steps, batch, seconds of training.
        named: Share of pictures drawn for held-out prompts that are nearest to their own prompt.
        chance: Share that guessing reaches.
        ceiling: Share that held-out pictures reach after the tokenizer.
    """

    metric: str
    baseline: float
    baseline_name: str
    value: float
    budget: str
    named: float
    chance: float
    ceiling: float

    def spec(self) -> LearnsSpec:
        """Shape the main figures as a recipe's `learns` section."""
        return LearnsSpec(
            metric=self.metric,
            baseline=round(self.baseline, 3),
            baseline_name=self.baseline_name,
            value=round(self.value, 3),
            budget=self.budget,
            drawn=self.drawn_words(),
        )

    def drawn_words(self) -> str:
        """Say what share of what was drawn shows its prompt."""
        return (
            f"{self.named:.0%} of {NUM_PICTURES} pictures of unseen prompts are nearest to "
            f"their prompt (chance {self.chance:.0%}, real pictures {self.ceiling:.0%})"
        )


def learning_check(
    recipe: Recipe,
    steps: int | None = None,
    seed: int = 0,
    *,
    pictures: int = NUM_PICTURES,
    keep: dict[str, Any] | None = None,
) -> LearnsReport:
    """Train a recipe on shapes and measure it.

    Args:
        recipe: The recipe; its tokenizer must need no training.
        steps: Optimiser steps; None = the recipe's.
        seed: Seed of data, weights, batches and drawn pictures.
        pictures: Pictures to draw; 0 skips drawing (`named` is then nan).
        keep: Filled with the parts of the check ("model", "tokenizer", "prompts", "pictures").

    Returns:
        The figures.
    """
    tokenizer: Any = build_tokenizer(dict(recipe.tokenizer)).eval()
    data = shapes(seed=seed, size=tokenizer.config["image_size"])
    model = initial_model(recipe, tokenizer, seed)
    train = _stage(model, tokenizer, data.only("train"))
    held_out = data.only("held_out")
    budget = trained(train, steps, seed, optimizer="adamw")
    value, baseline = held_out_losses(train, _stage(model, tokenizer, held_out), seed)
    prompts = (held_out.captions * pictures)[:pictures]
    drawn = draw(model, tokenizer, prompts, seed).numpy() if pictures else None
    if keep is not None:
        keep |= {"model": model, "tokenizer": tokenizer, "prompts": prompts, "pictures": drawn}
    metric, baseline_name = describe(model)
    return LearnsReport(
        metric=metric,
        baseline=baseline,
        baseline_name=baseline_name,
        value=value,
        budget=budget,
        named=float("nan") if drawn is None else share_named(drawn, prompts),
        chance=1 / len(shape_prompts()),
        ceiling=_ceiling(tokenizer, held_out),
    )


def trained(stage: ModelStage, steps: int | None, seed: int, **changes: Any) -> str:
    """Train a stage as learning checks do: by the recipe's settings, in single precision.

    Args:
        stage: Its model is left in eval mode.
        steps: Optimiser steps; None = the recipe's.
        seed: Seed of batches and noise.
        **changes: Further settings of the loop.

    Returns:
        What it cost: steps, batch, seconds of this process.
    """
    config = train_config(
        stage.recipe, steps, seed=seed, ema_decay=0.0, precision="fp32", progress=False,
        save_every=10**6, **changes,
    )  # fmt: skip
    before = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(stage, config, Path(folder)).run()
    seconds = time.process_time() - before
    stage.model.eval()
    return f"{config.num_steps} steps x {config.batch_size}, {seconds:.0f} s of one CPU core"


def describe(model: GenerativeModel) -> tuple[str, str]:
    """Name the metric and the baseline that fit a head."""
    head = model.head
    if isinstance(head, CategoricalHead):
        return "held-out nats per predicted token", "code frequencies per position"
    if isinstance(head, GaussianMixtureHead):
        return "held-out nats per channel", "one full-covariance Gaussian per position"
    wanted = getattr(head, "objective", getattr(head, "prediction", "velocity"))
    what = "noise" if wanted == "eps" else "velocity"
    return f"held-out squared error of the {what}", "best linear denoiser per position"


def _stage(model: GenerativeModel, tokenizer: Any, items: ImageDataset) -> ModelStage:
    with torch.no_grad():
        values = tokenizer.encode(items.pixels(torch.arange(len(items))))
    ids = model.text_encoder.tokenize(items.captions)
    return ModelStage(model, values, ids, items.captions)


def _ceiling(tokenizer: Any, items: ImageDataset) -> float:
    pixels = tokenizer.decode(tokenizer.encode(items.pixels(torch.arange(len(items)))))
    pictures = ((pixels.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    return share_named(pictures, items.captions)


def share_named(pictures: np.ndarray, prompts: list[str]) -> float:
    """Return the share of pictures that are nearest to their own prompt, in [0, 1]."""
    found = nearest_prompts(pictures)
    return float(np.mean([a == b for a, b in zip(found, prompts, strict=True)]))


@torch.no_grad()
def held_out_losses(train: ModelStage, held_out: ModelStage, seed: int) -> tuple[float, float]:
    """Score the model and its baseline on the same rows, with the weights of the objective.

    Rows whose token the model can see are left out even if the recipe trains on them, smoothing of
    labels is left out, and prompts are never dropped.

    Returns:
        Mean loss of the model and of the baseline.
    """
    model = held_out.model
    head = model.head
    baseline: CodeTable | SlotGaussians = (
        CodeTable(train.values, head.vocab_size)
        if isinstance(head, CategoricalHead)
        else SlotGaussians(train.values)
    )
    sums = torch.zeros(3, dtype=torch.float64)
    for number, indices in enumerate(torch.arange(held_out.num_items).split(EVAL_BATCH)):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        plan, layout, lowered = held_out.plan(generator)
        batch = held_out.corrupt(held_out.values[indices], plan, layout, generator)
        never = torch.zeros(len(indices), dtype=torch.bool)
        hidden = held_out.hidden_states(indices, never, batch, layout, lowered)
        slots = plan.content.source if plan.shift else layout.source[batch.loss_rows]
        weight = batch.weight
        if held_out.recipe.corruption.kind == "mask":
            weight = weight * batch.is_masked[:, batch.loss_rows]
        losses = _losses(held_out, baseline, hidden, batch, slots, generator)
        sums += torch.stack([*((loss * weight).sum() for loss in losses), weight.sum()]).double()
    return float(sums[0] / sums[2]), float(sums[1] / sums[2])


def _losses(
    stage: ModelStage,
    baseline: CodeTable | SlotGaussians,
    hidden: Tensor,
    batch: Batch,
    slots: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Loss per row of the model and of the baseline, [batch, rows] each."""
    head, target = stage.model.head, batch.target
    if isinstance(baseline, CodeTable):
        assert isinstance(head, CategoricalHead)
        return head.loss(hidden, target, label_smoothing=0.0), baseline.loss(target, slots)
    if isinstance(head, GaussianMixtureHead):
        channels = target.shape[-1]
        return head.loss(hidden, target) / channels, baseline.density_loss(target, slots) / channels
    if isinstance(head, DiffusionHead | ShortcutHead):
        head = copy.copy(head)
        if isinstance(head, ShortcutHead):
            head.bootstrap = 0.0  # the target of the self-consistent share is the model itself
        own = head.loss(hidden, target, generator)
        return own, noised_loss(head, partial(_linear, baseline, slots), target, generator)
    sample = batch.values[:, batch.loss_rows]
    level = batch.level[:, batch.loss_rows, None]
    one, zero = torch.ones_like(level), torch.zeros_like(level)
    path = NoisePath(
        stage.scheduler.add_noise(one, zero, level),
        stage.scheduler.add_noise(zero, one, level),
        stage.scheduler.target(one, zero),
        stage.scheduler.target(zero, one),
    )
    predicted = baseline.predict(sample, path, slots)
    return head.loss(hidden, target, generator), (predicted - target).square().mean(-1)


def _linear(baseline: SlotGaussians, slots: Tensor, sample: Tensor, path: NoisePath) -> Tensor:
    return baseline.predict(sample, path, slots)


Predictor = Callable[[Tensor, NoisePath], Tensor]
"""From noisy rows [batch, rows, channels] and how they were mixed to the expected target."""


def noised_loss(
    head: DiffusionHead | ShortcutHead,
    predict: Predictor,
    clean: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Error of a denoiser, over as many draws of level and noise as a per-token head takes.

    Args:
        head: Whose path from data to noise is taken.
        predict: The denoiser.
        clean: True latents [batch, rows, channels].
        generator: Source of levels and noise.

    Returns:
        Mean squared error per row, [batch, rows].
    """
    total = torch.zeros(clean.shape[:2])
    for _ in range(head.draws):
        level = torch.rand(clean.shape[:2], generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        one, zero = torch.ones_like(level)[..., None], torch.zeros_like(level)[..., None]
        if isinstance(head, ShortcutHead):
            level = ((level * 128).floor() + 1)[..., None] / 128
            path = NoisePath(1 - level, level, -one, one)
        else:
            signal, _, clean_share = head.corrupt(one, zero, level)
            share, _, noise_share = head.corrupt(zero, one, level)
            path = NoisePath(signal, share, clean_share, noise_share)
        sample = path.signal * clean + path.noise * noise
        target = path.clean_share * clean + path.noise_share * noise
        total += (predict(sample, path) - target).square().mean(-1)
    return total / head.draws
