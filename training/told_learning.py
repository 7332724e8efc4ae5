"""Learning checks of recipes that are told how others act: training, then drawn motion.

A check trains the recipe on clips made by rule, with the real loop, and draws the motion of
held-out clips with the recipe's own schedule, from what it is told alone: sounds
(`condition.aligned`), or what two people say and the other one does (`layout.given`). The error of
what it drew stands beside that of the best linear map from what was told, in this frame and those
around it, and of a pose that is held.

It knows no recipe by name.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from ..core.recipe import Recipe, frames_per_block
from ..core.recipe_sections import LearnsSpec
from ..core.sampling import item_generator
from ..models.generator import GenerativeModel
from ..models.video import VideoRequest, video_values
from ..tokenizers.video_build import build_video_tokenizer
from .clip_run import stage_of_clips
from .clip_stage import encode_clips, leading_actions
from .clips import ClipDataset
from .dialogue import dialogue_clips
from .learning import trained
from .run import initial_model
from .visemes import talking_clips

NUM_CLIPS, NUM_HELD_OUT = 192, 24
METRIC = "held-out squared error of drawn motion, in variances of the motion"
BEFORE = 12
"""Frames before its own that the linear map is told of, beside those of its block."""
RIDGE = 1.0
"""Added to the squares of everything that the linear map is told, in units of its variance."""
DRAWS = 8
"""Drawn motions whose mean is scored, where the recipe draws and does not answer."""


@dataclass(frozen=True)
class ToldReport:
    """What a learning check measured.

    Attributes:
        baseline: Error of the best linear map from what was told.
        value: Error of the trained recipe.
        still: Error of the mean pose, held.
        kept: Error of the last pose before a block, held through it; nan for blocks of one frame.
        frames: Frames of every drawn motion.
        draws: Draws whose mean is scored.
        budget: Steps, batch, seconds of training.
    """

    baseline: float
    value: float
    still: float
    kept: float
    frames: int
    draws: int
    budget: str

    def spec(self) -> LearnsSpec:
        """Shape the main figures as a recipe's `learns` section."""
        kept = f", true last pose kept through every block {self.kept:.3f}"
        return LearnsSpec(
            metric=METRIC,
            baseline=round(self.baseline, 3),
            baseline_name=f"best linear map from what is told, {BEFORE} frames before included",
            value=round(self.value, 3),
            budget=self.budget,
            drawn=f"{self.frames} frames from nothing but what is told"
            + (f", mean of {self.draws} draws" if self.draws > 1 else "")
            + f": {self.value:.3f} (mean pose held {self.still:.3f}"
            + (kept if self.kept == self.kept else "")
            + ")",
        )


def is_told(recipe: Recipe) -> bool:
    """Tell whether a motion recipe is told how others act, frame by frame, and has no codes.

    Args:
        recipe: Any recipe.
    """
    aligned = recipe.condition.aligned and recipe.head.kind != "categorical"
    return recipe.modality == "motion" and (recipe.layout.given > 0 or aligned)


def told_learning_check(
    recipe: Recipe,
    steps: int | None = None,
    seed: int = 0,
    *,
    clips: int = NUM_CLIPS,
    held_out: int = NUM_HELD_OUT,
    keep: dict[str, Any] | None = None,
) -> ToldReport:
    """Train a recipe that is told how others act, and measure it.

    Args:
        recipe: The recipe; its tokenizer must need no training, and fit `dialogue_clips` where
            tokens are given, else `talking_clips`.
        steps: Optimiser steps; None = the recipe's.
        seed: Seed of data, weights, batches and drawn motion.
        clips: Training clips.
        held_out: Clips measured on.
        keep: Filled with the parts of the check ("model", "tokenizer", "clips", "drawn").

    Returns:
        The figures.
    """
    made = dialogue_clips if recipe.layout.given else talking_clips
    data = made(clips, held_out, seed)
    tokenizer: Any = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    train, tests = data.only("train"), data.only("held_out")
    tokenizer.measure_features([rearrange(torch.from_numpy(train.frames), "n c -> 1 c n")])
    model = initial_model(recipe, tokenizer, seed)
    with tempfile.TemporaryDirectory() as folder:
        values = [encode_clips(tokenizer, part, Path(folder)) for part in (train, tests)]
    budget = trained(stage_of_clips(model, tokenizer, train, values[0]), steps, seed)
    names = sorted(set(data.captions))
    known, asked = (
        _told(model, part, v, names) for part, v in zip((train, tests), values, strict=True)
    )
    guess = LinearMap(model, *known[:2])
    drawn = draw_told(model, tests.captions, asked[2], seed)
    truth = asked[1]
    if keep is not None:
        keep |= {"model": model, "tokenizer": tokenizer, "clips": tests, "drawn": drawn}
    return ToldReport(
        baseline=_error(guess.predict(asked[0]), truth),
        value=_error(drawn, truth),
        still=_error(torch.zeros_like(truth), truth),
        kept=_error(_last_kept(truth, _block(model)), truth) if _block(model) > 1 else float("nan"),
        frames=truth.shape[1],
        draws=_draws(model),
        budget=budget,
    )


def _block(model: GenerativeModel) -> int:
    return frames_per_block(model.recipe.layout.block) or 1


def _draws(model: GenerativeModel) -> int:
    return 1 if model.recipe.head.kind == "regression" else DRAWS


def _error(guess: Tensor, truth: Tensor) -> float:
    return float((guess - truth).square().mean())


def _last_kept(truth: Float[Tensor, "clips frames numbers"], block: int) -> Tensor:
    """Hold, through every block, the true pose before it; the mean pose in the first."""
    before = F.pad(truth, (0, 0, 1, 0))[:, :-1:block]
    return before.repeat_interleave(block, 1)[:, : truth.shape[1]]


def _told(
    model: GenerativeModel, clips: ClipDataset, values: Float[Tensor, "frames cells channels"],
    names: list[str],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Split clips of one length into what a recipe is told, and the motion it is to draw.

    Returns:
        What it is told [clips, frames, numbers], a speaker's name as one number each; the motion
        [clips, frames, numbers], standardised; and the told tokens, or actions, as requests have
        them.
    """
    given, count = model.recipe.layout.given, len(clips)
    tokens = rearrange(values, "(b f) n c -> b f n c", b=count)
    motion = tokens[:, :, given:].flatten(2)
    if given:
        told = tokens[:, :, :given]
        return told.flatten(2), motion, told
    actions = leading_actions(clips, model.recipe.condition.actions)
    actions = rearrange(actions, "(b f) a -> b f a", b=count)
    who = F.one_hot(torch.tensor([names.index(c) for c in clips.captions]), len(names)).float()
    return torch.cat((actions, who[:, None].expand(-1, actions.shape[1], -1)), -1), motion, actions


class LinearMap:
    """The linear map from what is told to the motion with the least squared error.

    A frame's motion is read from what was told in all frames of its block and in `BEFORE` frames
    before the block: one map for every place in a block.
    """

    def __init__(
        self, model: GenerativeModel, told: Float[Tensor, "clips frames numbers"],
        motion: Float[Tensor, "clips frames numbers"],
    ) -> None:  # fmt: skip
        """Fit the map.

        Args:
            model: Its recipe says how long a block is.
            told: What is told in every frame.
            motion: Standardised motion.
        """
        self.block = _block(model)
        seen = self._seen(told).double()
        self.scale = seen.flatten(0, 1).std(0).clamp_min(1e-6)
        rows = (seen / self.scale).flatten(0, 1)
        rows = F.pad(rows, (0, 1), value=1.0)
        wanted = rearrange(motion, "b (t f) c -> (b t) (f c)", f=self.block).double()
        ridge = RIDGE * torch.eye(rows.shape[1], dtype=torch.float64)
        self.weight = torch.linalg.solve(rows.T @ rows + ridge, rows.T @ wanted)

    def _seen(self, told: Tensor) -> Float[Tensor, "clips blocks numbers"]:
        """List, for every block, what was told in it and before it."""
        wide = F.pad(told, (0, 0, BEFORE, 0))
        return wide.unfold(1, BEFORE + self.block, self.block).flatten(2)

    def predict(self, told: Float[Tensor, "clips frames numbers"]) -> Tensor:
        """Return the motion [clips, frames, numbers] that what is told stands for.

        Args:
            told: What is told in every frame; whole blocks.
        """
        rows = F.pad(self._seen(told).double() / self.scale, (0, 1), value=1.0)
        return rearrange(rows @ self.weight, "b t (f c) -> b (t f) c", f=self.block).float()


@torch.no_grad()
def draw_told(
    model: GenerativeModel, captions: list[str], asked: Tensor, seed: int
) -> Float[Tensor, "clips frames numbers"]:
    """Draw the motion of clips from what is told, block after block.

    Args:
        model: In eval mode.
        captions: One per clip.
        asked: The told tokens [clips, frames, given, channels], or the actions [clips, frames,
            actions].
        seed: Seed of all draws.

    Returns:
        The motion, standardised; where the recipe draws, the mean of `DRAWS` draws.
    """
    given, frames = model.recipe.layout.given, asked.shape[1]
    total = torch.zeros(())
    for draw in range(_draws(model)):
        request = VideoRequest(
            captions, [item_generator(seed + draw, item) for item in range(len(captions))], frames,
            actions=None if given else asked, told=asked if given else None,
        )  # fmt: skip
        total = total + video_values(model, request)[:, :, given:].flatten(2) / _draws(model)
    return total
