"""What a recipe looks like: its layout, mask, schedule and cache log as plain data.

Nothing here runs a model. Where the order depends on the model, seeded random scores stand in, so
that the plan can be looked at before anything is trained.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attention import Lowered
from .cache import CacheView, KVCache
from .decoder import Draw
from .errors import UsageError
from .grouping import PerLayer, regroup
from .layout import Layout
from .plan import DecodePlan, build_plan, grid_of
from .recipe import Recipe
from .rollout import Rollout
from .sampling import TokenStats, item_generator, per_item_rand
from .schedule import scheduler_of
from .schedulers.base import Row


class RandomDecoder:
    """Stands in for a model: no layers, seeded random confidence."""

    def __init__(self, per_level: bool) -> None:
        self._per_level = per_level

    @property
    def per_level(self) -> bool:
        """Whether the recipe denoises blocks (then values are zeros of one channel)."""
        return self._per_level

    @property
    def poses(self) -> Tensor | None:
        """None: all views alike."""
        return None

    def new_cache(self, plan: DecodePlan, batch: int) -> KVCache:
        """Make a cache that keeps attributes and the log only."""
        return KVCache(
            num_layers=0, batch=batch, capacity=plan.capacity(), num_kv_heads=1, head_dim=2,
            num_axes=plan.content.num_axes,
        )  # fmt: skip

    def forward(
        self, values: Tensor, is_masked: Tensor, layout: Layout, level: Tensor,
        lowered: Lowered | PerLayer, view: CacheView | None,
    ) -> Tensor:  # fmt: skip
        """Return zeros of the right shape."""
        return torch.zeros(values.shape[0], layout.num_tokens, 1)

    def draw(
        self, hidden: Tensor, row: Row, generators: Sequence[torch.Generator], source: Tensor
    ) -> Draw:
        """Draw code 0 everywhere with random confidence."""
        batch, count = hidden.shape[:2]
        score = per_item_rand((count,), generators)
        entropy = -torch.log(score.clamp_min(1e-6))
        return Draw(torch.zeros(batch, count, 1).long(), TokenStats(score, score, score, entropy))

    def predict(self, hidden: Tensor, row: Row) -> Tensor:
        """Predict nothing."""
        return torch.zeros_like(hidden)


def plan_of(recipe: Recipe, length: int) -> DecodePlan:
    """Lay out a recipe for `length` tokens on the most square grid.

    A video gets as many frames as divide the tokens, at most those it trains on.

    Raises:
        UsageError: tokens that fill no frames of the recipe's levels or patches.
    """
    if recipe.layout.kind != "frames":
        return build_plan(recipe, *grid_of(length))
    acts = recipe.acting is not None  # one token of every frame is what is done in it
    if width := frame_tokens(recipe):
        if length % (width + acts):
            near = max(length // (width + acts), 1) * (width + acts)
            raise UsageError(
                f"length = {length} fills no frames of {width + acts} tokens; try {near}"
            )
        return build_plan(recipe, 1, width, frames=length // (width + acts))
    side = 1 if recipe.cache.far is None else recipe.cache.far.patch
    if length % side**2:
        near = max(length // side**2, 1) * side**2
        raise UsageError(
            f"length = {length} fills no frames of {side}x{side} patches (cache.far.patch); "
            f"try {near}"
        )
    fitting = [f for f in range(1, recipe.layout.frames + 1) if length % (f * side**2) == 0]
    frames = max(f for f in fitting if f == 1 or length // f > acts)
    height, width = grid_of(length // frames // side**2 - acts)
    return build_plan(recipe, height * side, width * side, frames=frames)


def frame_tokens(recipe: Recipe) -> int | None:
    """Return the tokens of a frame where a recipe says so: its levels, or one for a vector."""
    if recipe.schedule.levels:
        return len(recipe.schedule.levels)
    if recipe.acting is not None and recipe.acting.numbers:
        return 1
    return None


def layout_records(recipe: Recipe, length: int) -> list[dict[str, Any]]:
    """List every row of the training layout as plain numbers, as the first layer groups them."""
    return _first_layer(plan_of(recipe, length), recipe).records()


def _first_layer(plan: DecodePlan, recipe: Recipe) -> Layout:
    layout = plan.training_layout()
    if recipe.layout.kind != "frames" or plan.groups[0] == "site":
        return layout
    return regroup(layout, plan.groups[0], plan.height, plan.width)


def mask_matrix(recipe: Recipe, length: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Return the boolean matrix [queries, keys] of the training layout and its row records.

    True = the query may attend the key. Where layers take groupings in turn, the first one's.
    """
    plan = plan_of(recipe, length)
    layout = _first_layer(plan, recipe)
    seen = plan.table.visible(layout, layout, routes=plan.routes(layout))
    return seen.numpy(), layout.records()


def _random_rollout(recipe: Recipe, length: int, seed: int) -> Rollout:
    plan = plan_of(recipe, length)
    per_level = recipe.head.kind == "patch"
    values = torch.zeros(1, plan.num_slots, 1)
    return Rollout(
        plan, RandomDecoder(per_level), scheduler_of(recipe),
        values=values if per_level else values.long(),
        is_known=torch.zeros(1, plan.num_slots, dtype=torch.bool),
        generators=[item_generator(seed, 0)],
    )  # fmt: skip


def schedule_rows(recipe: Recipe, length: int, seed: int = 0) -> list[dict[str, Any]]:
    """List the rows of a decode: what is predicted, accepted (in the order taken), at which level.

    Positions are data slots (raster index in picture recipes).
    """
    rollout, rows = _random_rollout(recipe, length, seed), []
    for event in rollout.events():
        if event.kind != "row":
            continue
        data = event.data
        source, accepted = data["sources"], data["accepted"][0]
        if data["score"] is not None:
            first = data["score"][0].argsort(descending=True, stable=True)
            taken = source[first[accepted[first]]]
        else:  # a denoised block appears at once, in generation order
            taken = source[accepted]
        rows.append(
            {
                "block": event.block,
                "row": data["row"],
                "predicted": source[data["predicted"][0]].tolist(),
                "accepted": taken.tolist(),
                "level": data["level"],
                "level_next": data["level_next"],
                "guidance": data["guidance"],
                "temperature": data["temperature"],
            }
        )
    return rows


def cache_log(recipe: Recipe, length: int) -> list[dict[str, Any]]:
    """List every write, commit and evict of a decode; [] when the recipe keeps no cache."""
    rollout = _random_rollout(recipe, length, seed=0)
    for _ in rollout.events():
        pass
    return [] if rollout.cache is None else rollout.cache.log
