"""Learning checks of control recipes: seconds of training on an arm that reaches for targets.

Held-out episodes are scored twice: by the recipe's own objective, against the best linear predictor
that knows the observation and the instruction; and by letting the model move the arm, beside the
expert it learned from, a linear policy, random torques and none. A recipe either has actions among
its tokens, or draws codes of torques and is told observations. It knows no recipe by name.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import UsageError
from ..core.recipe import Recipe
from ..core.recipe_sections import LearnsSpec
from ..core.stages import level_of
from ..models.generator import GenerativeModel
from .acting_learning import action_loss
from .clip_run import clip_model_stage
from .learning import trained
from .motion_run import trained_tokenizer
from .movers import ChunkMover, StreamMover
from .objective import ModelStage
from .reaching import (
    CHUNK_NOISE,
    NOISE,
    NUM_OBSERVED,
    NUM_TORQUES,
    TOLERANCE,
    UNRECORDED,
    ExpertMover,
    LinearMover,
    Mover,
    RandomMover,
    Recorded,
    chunked_clips,
    linear_features,
    reach,
    reaching_clips,
    record,
    seeds_of,
)
from .run import initial_model

NUM_EPISODES, NUM_HELD_OUT = 512, 128
NUM_CHUNKED = 2048
"""Training episodes of recipes of chunks, which have a row where others have four."""
TOKENIZER_STEPS = 200
LEVEL_DRAWS = 4
"""Times every held-out window is scored; each time draws which level of a chunk is predicted."""
EVAL_BATCH = 64


@dataclass(frozen=True)
class ControlReport:
    """What a learning check measured.

    Attributes:
        metric: What `value` and `baseline` are.
        baseline: The same of the best linear predictor, on the same rows.
        value: The same of the trained recipe.
        budget: Steps, batch, seconds of training.
        distances: Metres between tip and target at the end of every held-out episode, by who moved.
        imagined: Mean squared error of imagined observations and of the one before kept, where the
            model imagines any.
    """

    metric: str
    baseline: float
    value: float
    budget: str
    distances: dict[str, NDArray[np.float64]]
    imagined: tuple[float, float] | None = None

    def reached(self, name: str) -> float:
        """Return the share of targets that somebody reached."""
        return float((self.distances[name] < TOLERANCE).mean())

    def spec(self) -> LearnsSpec:
        """Shape the main figures as a recipe's `learns` section."""
        shares = ", ".join(
            f"{name} {100 * self.reached(name):.0f} %" for name in self.distances if name != "model"
        )
        dreams = ""
        if self.imagined is not None:
            dreams = (f"; squared error of imagined next observations {self.imagined[0]:.4f} "
                      f"(the one before kept {self.imagined[1]:.4f})")  # fmt: skip
        return LearnsSpec(
            metric=self.metric,
            baseline=round(self.baseline, 3),
            baseline_name="best linear predictor that knows observation and instruction",
            value=round(self.value, 3),
            budget=self.budget,
            drawn=f"acting: {100 * self.reached('model'):.0f} % of "
            f"{len(self.distances['model'])} targets reached ({shares}){dreams}",
        )


def controls(recipe: Recipe) -> bool:
    """Tell whether a recipe moves something.

    It acts by numbers, or draws codes of motion and is told what is observed.

    Args:
        recipe: Any recipe.
    """
    acts = recipe.acting is not None and recipe.acting.numbers > 0
    codes = recipe.modality == "motion" and recipe.head.kind == "categorical"
    return acts or (codes and recipe.condition.actions > 0)


def control_learning_check(
    recipe: Recipe, steps: int | None = None, seed: int = 0, *, episodes: int | None = None,
    held_out: int = NUM_HELD_OUT, tokenizer_steps: int = TOKENIZER_STEPS,
    keep: dict[str, Any] | None = None,
) -> ControlReport:  # fmt: skip
    """Train a control recipe on the reaching arm and measure it.

    Args:
        recipe: The recipe.
        steps: Optimiser steps; None = the recipe's.
        seed: Seed of episodes, weights, batches and actions.
        episodes: Training episodes; None = as many as the kind of recipe needs.
        held_out: Episodes measured on.
        tokenizer_steps: Optimiser steps of a tokenizer that learns.
        keep: Filled with the parts of the check ("model", "tokenizer", "tests").

    Returns:
        The figures.

    Raises:
        UsageError: A recipe that moves nothing, or something else than the arm.
    """
    require_arm(recipe)
    acts = recipe.acting is not None
    episodes = episodes or (NUM_EPISODES if acts else NUM_CHUNKED)
    clips = (reaching_clips if acts else chunked_clips)(episodes, held_out, seed)
    tokenizer = trained_tokenizer(
        recipe, clips, tokenizer_steps, seed, batch_size=32, learning_rate=3e-3
    )
    model = initial_model(recipe, tokenizer, seed)
    with tempfile.TemporaryDirectory() as folder:
        train, tests = (
            clip_model_stage(model, tokenizer, clips, Path(folder), split)
            for split in ("train", "held_out")
        )
    budget = trained(train, steps, seed)
    parts, ends = seeds_of(episodes, held_out, seed)
    noise = NOISE if acts else CHUNK_NOISE
    seen = record(parts[int(UNRECORDED * episodes) :] if acts else parts, noise)
    others = record(ends, noise)
    policy, mover = LinearMover(seen), (StreamMover if acts else ChunkMover)(model, tokenizer, seed)
    if acts:
        metric = "held-out negative log-likelihood of an action"
        losses = action_loss(tests, seed), linear_loss(policy, others, tests)
    else:
        metric = "held-out cross-entropy of a code"
        losses = code_loss(tests, seed), linear_code_loss(train, tests, seen, others)
    movers: dict[str, Mover] = {
        "model": mover, "expert": ExpertMover(), "linear policy": policy,
        "random torques": RandomMover(seed), "none": RandomMover(seed, 0.0),
    }  # fmt: skip
    report = ControlReport(
        metric, losses[1], losses[0],
        budget,
        {name: reach(ends, who) for name, who in movers.items()},
        imagined_errors(model, tokenizer, ends, seed) if acts else None,
    )  # fmt: skip
    if keep is not None:
        keep |= {"model": model, "tokenizer": tokenizer, "tests": tests}
    return report


def require_arm(recipe: Recipe) -> None:
    """Refuse recipes that do not move the arm.

    Raises:
        UsageError: It moves nothing, or has other torques or observations.
    """
    if not controls(recipe):
        raise UsageError(
            f"recipe {recipe.name} moves nothing; set acting.numbers = {NUM_TORQUES}, or "
            f"condition.actions = {NUM_OBSERVED} for codes of motion"
        )
    acting, told = recipe.acting, recipe.condition.actions
    if acting is not None and acting.numbers != NUM_TORQUES:
        raise UsageError(f"acting.numbers = {acting.numbers}; the arm takes {NUM_TORQUES}")
    if acting is None and told != NUM_OBSERVED:
        raise UsageError(f"condition.actions = {told}; the arm is observed by {NUM_OBSERVED}")


def imagined_errors(
    model: GenerativeModel, tokenizer: Any, seeds: list[int], seed: int
) -> tuple[float, float]:
    """Measure how far imagined next observations are off, and the ones before kept instead."""
    dreamer = StreamMover(model, tokenizer, seed, imagines=True)
    reach(seeds, dreamer)
    count, guess, kept = dreamer.imagined
    return float(guess / count), float(kept / count)


# -- losses -----------------------------------------------------------------------------------


def linear_loss(policy: LinearMover, episodes: Recorded, tests: ModelStage) -> float:
    """Measure the mean nats of an action under a linear policy, over the rows of the windows."""
    losses = np.pad(policy.loss(episodes), ((0, 0), (0, 1)), constant_values=np.nan)
    rows = tests.values.windows.rows(slice(None)).flatten().numpy()  # type: ignore[attr-defined]
    taken = losses.flatten()[rows[rows < losses.size]]
    return float(taken[~np.isnan(taken)].mean())


@torch.no_grad()
def code_loss(stage: ModelStage, seed: int) -> float:
    """Measure the cross-entropy of a code, in nats: lower levels and all chunks before are given.

    Args:
        stage: Held-out windows of codes.
        seed: Of which levels are predicted.

    Returns:
        The mean over levels.
    """
    levels = len(stage.recipe.schedule.levels)
    totals = torch.zeros(2, levels, dtype=torch.float64)
    batches = [part for part in torch.arange(stage.num_items).split(EVAL_BATCH)] * LEVEL_DRAWS
    for number, indices in enumerate(batches):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        plan, layout, lowered = stage.plan(generator)
        batch = stage.corrupt(stage.values[indices], plan, layout, generator)
        never = torch.zeros(len(indices), dtype=torch.bool)
        hidden = stage.hidden_states(indices, never, batch, layout, lowered)
        loss = stage.token_loss(hidden, batch, generator)
        level = level_of(layout.source[batch.loss_rows], levels)
        sums = torch.stack(((loss * batch.weight).sum(0), batch.weight.sum(0))).double().cpu()
        totals.index_add_(1, level.cpu(), sums)
    return float((totals[0] / totals[1]).mean())


def linear_code_loss(
    train: ModelStage, tests: ModelStage, seen: Recorded, others: Recorded
) -> float:
    """Fit a linear softmax of observation, instruction and lower codes; measure it in nats.

    Args:
        train: Windows of the clips it is fitted on.
        tests: Windows it is measured on.
        seen: Episodes of `train`.
        others: Episodes of `tests`.

    Returns:
        The mean cross-entropy of a code over levels, on the rows of the windows.
    """
    size = train.model.config.codebook_size
    tokens: Any = tests.values
    windows = tokens.windows.rows(slice(None)).flatten()
    parts = [_code_rows(train, seen), tuple(part[windows] for part in _code_rows(tests, others))]
    losses = []
    for level in range(parts[0][1].shape[1]):
        (inputs, codes), (held, wanted) = (
            (torch.cat((told, F.one_hot(codes[:, :level], size).float().flatten(1)), 1),
             codes[:, level])
            for told, codes in parts
        )  # fmt: skip
        guess = _softmax(inputs, codes, size)
        with torch.no_grad():
            losses.append(float(F.cross_entropy(guess(held), wanted)))
    return float(np.mean(losses))


def _code_rows(stage: ModelStage, episodes: Recorded) -> tuple[Tensor, Tensor]:
    """List what is told before every chunk of every clip, by instruction, and its codes."""
    tokens: Any = stage.values
    told: Any = stage.actions
    observed = told.rows.unflatten(0, (len(episodes.seeds), -1)).numpy()
    features = torch.from_numpy(linear_features(observed, episodes.wanted)).float()
    return features.flatten(0, 1), tokens.frames[..., 0]


def _softmax(inputs: Tensor, codes: Tensor, size: int) -> nn.Linear:
    """Fit a linear softmax by full steps of L-BFGS, with a little weight decay."""
    guess = nn.Linear(inputs.shape[1], size)
    nn.init.zeros_(guess.weight)
    nn.init.zeros_(guess.bias)
    optimiser = torch.optim.LBFGS(guess.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = F.cross_entropy(guess(inputs), codes) + 1e-4 * guess.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return guess
