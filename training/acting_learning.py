"""Learning check of recipes that act: seconds of training on a grid world made on the spot.

Held-out episodes ask for goals that were never asked for in training where they stand. They are
scored twice: by the action loss of the recipe's own objective, against the best predictor that
knows where the agent stands but not what it is told; and by letting the model act, beside a random
player. It knows no recipe by name.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import UsageError
from ..core.recipe import Recipe
from ..core.recipe_sections import LearnsSpec
from ..tokenizers.video_build import build_video_tokenizer
from .acting import Frames, ModelPlayer, Played, RandomPlayer, Room, play, rate
from .clip_run import clip_model_stage
from .clips import ClipDataset
from .gridworld import CELL, MOVES, SIDE, GridWorld, grid_episodes
from .learning import trained
from .objective import ModelStage
from .predictors import SMOOTHING
from .run import initial_model

NUM_EPISODES, NUM_HELD_OUT = 1024, 128
EVAL_BATCH = 64


@dataclass(frozen=True)
class ActingReport:
    """What a learning check measured.

    Attributes:
        baseline: Loss of the predictor that knows the agent's place only, in nats.
        value: Loss of the trained recipe's actions on the same rows, in nats.
        budget: Steps, batch, seconds of training.
        played: How held-out episodes ended when the model acted.
        random: How they ended for a random player.
        imagined: Counts of `ModelPlayer.imagined`.
    """

    baseline: float
    value: float
    budget: str
    played: Played
    random: Played
    imagined: np.ndarray

    def spec(self) -> LearnsSpec:
        """Shape the main figures as a recipe's `learns` section."""
        won, luck = (rate(played)["success_rate"] for played in (self.played, self.random))
        frames = self.imagined[1] / self.imagined[1, 0]
        return LearnsSpec(
            metric="held-out cross-entropy of an action",
            baseline=round(self.baseline, 3),
            baseline_name="best predictor that knows the agent's place",
            value=round(self.value, 3),
            budget=self.budget,
            drawn=f"acting: {100 * won:.0f} % of {len(self.played.success)} instructions followed "
            f"(random player {100 * luck:.0f} %); {100 * frames[1]:.0f} % of imagined next frames "
            f"right (frame before kept {100 * frames[2]:.0f} %)",
        )


def acting_learning_check(
    recipe: Recipe, steps: int | None = None, seed: int = 0, *, episodes: int = NUM_EPISODES,
    held_out: int = NUM_HELD_OUT,
) -> ActingReport:  # fmt: skip
    """Train a recipe that acts on the grid world and measure it.

    Args:
        recipe: The recipe; its tokenizer must need no training and take frames of the grid world.
        steps: Optimiser steps; None = the recipe's.
        seed: Seed of rooms, weights, batches and actions.
        episodes: Training episodes.
        held_out: Episodes measured on.

    Returns:
        The figures.

    Raises:
        UsageError: A recipe that does not act, or by other actions than the grid world has.
    """
    codes = 0 if recipe.acting is None else recipe.acting.codes
    if codes != len(MOVES):
        raise UsageError(f"acting.codes = {codes}; the grid world takes {len(MOVES)}")
    tokenizer: Any = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    clips, seeds = grid_episodes(episodes, held_out, seed)
    model = initial_model(recipe, tokenizer, seed)
    with tempfile.TemporaryDirectory() as folder:
        train, tests = (
            clip_model_stage(model, tokenizer, clips, Path(folder), split)
            for split in ("train", "held_out")
        )
    budget = trained(train, steps, seed)
    tests_seeds = [s for s, split in zip(seeds, clips.split, strict=True) if split == "held_out"]
    player = ModelPlayer(model, tokenizer, seed, imagines=True)
    return ActingReport(
        place_loss(clips),
        action_loss(tests, seed),
        budget,
        play(tests_seeds, begin_room, player),
        play(tests_seeds, begin_room, RandomPlayer([1.0] * len(MOVES), seed)),
        player.imagined,
    )


def begin_room(number: int) -> tuple[Room, Frames]:
    """Begin the episode of a seed."""
    room = GridWorld()
    return room, room.reset(number)


@torch.no_grad()
def action_loss(stage: ModelStage, seed: int) -> float:
    """Measure the mean cross-entropy of known actions, in nats; every frame before is given.

    Args:
        stage: Held-out episodes.
        seed: Seed of the frames' corruption, which actions do not see.
    """
    total = torch.zeros(2, dtype=torch.float64)
    for number, indices in enumerate(torch.arange(stage.num_items).split(EVAL_BATCH)):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        plan, layout, lowered = stage.plan(generator)
        batch = stage.corrupt(stage.values[indices], plan, layout, generator)
        never = torch.zeros(len(indices), dtype=torch.bool)
        hidden = stage.hidden_states(indices, never, batch, layout, lowered)
        loss, weight = stage.role_losses(hidden, batch, layout, generator)[1]
        total += torch.stack(((loss * weight).sum(), weight.sum())).double()
    return float(total[0] / total[1])


def place_loss(clips: ClipDataset) -> float:
    """Measure the best predictor of actions that knows the agent's place, fitted on training clips.

    Args:
        clips: Episodes of the grid world, split "train" and "held_out".
    """
    (places, done), (other_places, other_done) = (
        _places(clips.only(split)) for split in ("train", "held_out")
    )
    count = torch.full((SIDE**2, len(MOVES)), SMOOTHING)
    count.index_put_((places, done), torch.ones(len(done)), accumulate=True)
    table = (count / count.sum(1, keepdim=True)).log()
    return -float(table[other_places, other_done].mean())


def _places(clips: ClipDataset) -> tuple[Tensor, Tensor]:
    """Find the agent's cell in every frame with an action, and the action."""
    assert clips.actions is not None
    cells = clips.frames[:, ::CELL, ::CELL].reshape(len(clips.frames), -1, 3)
    known = clips.actions >= 0
    place = (cells == 255).all(-1).argmax(1)
    return torch.from_numpy(place[known]), torch.from_numpy(clips.actions[known].astype(np.int64))
