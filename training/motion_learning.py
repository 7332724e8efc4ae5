"""Learning checks of text-to-motion recipes: a minute of training on motions made by a formula.

A check trains a small tokenizer of the recipe's kind and then the recipe, with the real loop. It
scores held-out motions by the recipe's own objective against a closed-form predictor, and draws a
motion for every held-out caption with the recipe's own schedule: a drawn motion shows its caption
when, of all captions, the training motions of its own are nearest to it.

It knows no recipe by name.
"""

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.recipe import Recipe
from ..motion.procedural import procedural_motions
from .clip_learning import baseline_of, held_out_losses
from .clip_run import clip_model_stage
from .clips import ClipDataset
from .learning import LearnsReport, describe, trained
from .motion_archive import NamedMotion, as_features
from .motion_drawing import drawn_motions, most_frames, recoded_motions
from .motion_run import trained_tokenizer
from .run import initial_model

NUM_MOTIONS, NUM_HELD_OUT = 200, 50
TOKENIZER_STEPS = 150


@dataclass(frozen=True)
class MotionReport(LearnsReport):
    """What a learning check measured; `ceiling` is about real motions through the tokenizer.

    Attributes:
        drawn: Number of motions drawn.
    """

    drawn: int = 0

    def drawn_words(self) -> str:
        """Say what share of drawn motions shows its caption."""
        return (
            f"{self.named:.0%} of {self.drawn} drawn motions are nearest to their caption "
            f"(chance {self.chance:.0%}, real motions through the tokenizer {self.ceiling:.0%})"
        )


def motion_learning_check(
    recipe: Recipe,
    steps: int | None = None,
    seed: int = 0,
    *,
    tokenizer_steps: int = TOKENIZER_STEPS,
    motions: int = NUM_MOTIONS,
    held_out: int = NUM_HELD_OUT,
    draw: bool = True,
    keep: dict[str, Any] | None = None,
) -> MotionReport:
    """Train a text-to-motion recipe on motions made by a formula and measure it.

    Args:
        recipe: The recipe; its frames are poses in HumanML3D's order.
        steps: Optimiser steps; None = the recipe's.
        seed: Seed of data, weights, batches and drawn motions.
        tokenizer_steps: Steps of its tokenizer.
        motions: Training motions.
        held_out: Motions measured on.
        draw: Whether to draw; without, the shares are nan.
        keep: Filled with the parts of the check ("model", "tokenizer", "motions").

    Returns:
        The figures.
    """
    # Clips are long enough, and a closed-form predictor has no idea of what nobody knows.
    whole = {"train": recipe.train.model_copy(update={"pad": False})}
    recipe = recipe.model_copy(update=whole)
    data = procedural_clips(motions, held_out, seed)
    tokenizer = trained_tokenizer(recipe, data, tokenizer_steps, seed)
    model = initial_model(recipe, tokenizer, seed)
    with tempfile.TemporaryDirectory() as folder:
        train, tests = (
            clip_model_stage(model, tokenizer, data, Path(folder), split)
            for split in ("train", "test")
        )
    budget = trained(train, steps, seed)
    guess = baseline_of(train)
    value, baseline = held_out_losses(train, tests, seed, guess)
    shares = (float("nan"),) * 3
    if draw:
        shares = _shown(model, tokenizer, data, seed, keep)
    if keep is not None:
        keep |= {"model": model, "tokenizer": tokenizer}
    return MotionReport(
        describe(model)[0], baseline, guess.name, value, budget, *shares, drawn=held_out
    )


@lru_cache(maxsize=2)
def procedural_clips(motions: int, held_out: int, seed: int) -> ClipDataset:
    """Make captioned clips of the 263 features by a formula, all captions equally often.

    Args:
        motions: Clips in split "train".
        held_out: Clips in split "test": the same captions, drawn anew.
        seed: Seed of all differences between clips.
    """
    generator = torch.Generator().manual_seed(seed)
    named = [
        NamedMotion(f"{split} {number}", motion, split)
        for split, count in (("train", motions), ("test", held_out))
        for number, motion in enumerate(procedural_motions(count, generator))
    ]
    return as_features(named, "procedural motions")


def _shown(
    model: Any, tokenizer: Any, data: ClipDataset, seed: int, keep: dict[str, Any] | None
) -> tuple[float, float, float]:
    """Share of drawn motions nearest to their caption, of guesses, and of recoded real ones."""
    train, others = data.only("train"), data.only("test")
    longest = most_frames(model, tokenizer) or int(others.lengths.max())
    step = tokenizer.step_frames
    lengths = [min(int(n), longest) // step * step for n in others.lengths]
    drawn = drawn_motions(model, tokenizer, others.captions, lengths, seed=seed)
    real = [others.clip(i)[:n].astype(np.float32) for i, n in enumerate(lengths)]
    if keep is not None:
        keep |= {"motions": drawn, "captions": others.captions}
    names = sorted(set(train.captions))
    traits = _Traits(tokenizer)
    centres = traits.centres(train, names)
    truth = np.array([names.index(text) for text in others.captions])
    shares = [
        float((traits.nearest(some, centres) == truth).mean())
        for some in (drawn, recoded_motions(tokenizer, real))
    ]
    return shares[0], 1 / len(names), shares[1]


class _Traits:
    """Describes motions of any length: mean and deviation over time of standardised features."""

    def __init__(self, tokenizer: Any) -> None:
        self.mean = tokenizer.feature_mean[:, 0].double().numpy()
        self.std = tokenizer.feature_std[:, 0].double().numpy()

    def of(self, motion: NDArray[np.float32]) -> NDArray[np.float64]:
        rows = (motion.astype(np.float64) - self.mean) / self.std
        return np.concatenate([rows.mean(0), rows.std(0)])

    def centres(self, train: ClipDataset, names: list[str]) -> NDArray[np.float64]:
        """Mean traits of every caption's training motions."""
        traits = np.stack([self.of(train.clip(i)) for i in range(len(train))])
        captions = np.array(train.captions)
        return np.stack([traits[captions == name].mean(0) for name in names])

    def nearest(
        self, motions: list[NDArray[np.float32]], centres: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Number of the caption whose traits are nearest to each motion's."""
        traits = np.stack([self.of(motion) for motion in motions])
        return np.square(traits[:, None] - centres[None]).sum(-1).argmin(1)
