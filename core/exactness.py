"""Refuses `cache.exact: true` unless the checker proves it for the recipe's own layouts.

It lays a recipe out at a size with at least four blocks, reads its commit policy and conditioning,
and asks core/closure.py. It runs no network; that a proven recipe is exact in numbers is what
core/proof.py shows.
"""

from collections.abc import Iterator
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from .closure import check_exact
from .errors import ModelError
from .grouping import regroup
from .plan import DecodePlan, build_plan, mask_table
from .recipe import Recipe, frames_per_block
from .rules import RULES

MIN_BLOCKS = 4
NUM_DRAWS = 3
"""How many random orders and splits are checked for recipes that train on them."""


def require_exact(recipe: Recipe) -> None:
    """Check that the mask exists, and that `cache.exact` holds where it is claimed.

    Args:
        recipe: A recipe whose sections are legal on their own.

    Raises:
        ModelError: unknown mask rule, the first reason why the cached decode is not exact, or a
            claim that training shows the kept context where it does not.
    """
    _require_mask(recipe)
    if recipe.cache.matched and keeps_blocks(recipe) and not context_is_trained(recipe):
        raise ModelError(
            f"{recipe.name}: cache.matched = true is disproved: training shows no finished context "
            "as it is kept; set cache.matched to false, layout.copies to 2, or corruption.clean"
        )
    if not recipe.cache.exact:
        return
    found = next(iter(violations(recipe)), None)
    if found is not None:
        raise ModelError(
            f"{recipe.name}: cache.exact = true is disproved: {found}; set cache.exact to false, "
            "or repair the mask"
        )


def context_is_trained(recipe: Recipe) -> bool:
    """Whether training shows finished blocks as decoding keeps them: whole, and as noisy as that.

    An exact cache computes what the masked forward computes; that the model ever met such inputs is
    another matter. One copy meets them only where blocks stay clean now and then, or where context
    is kept at a level, and told it, that training draws for any block.
    """
    layout, corruption, cache = recipe.layout, recipe.corruption, recipe.cache
    drawn = corruption.kind == "flow" and corruption.per == "block"
    drawn &= cache.context_noise > 0 and cache.context_noise == cache.context_level
    return layout.copies == 2 or layout.shift == 1 or corruption.clean > 0 or drawn


def keeps_blocks(recipe: Recipe) -> bool:
    """Whether anything but a prompt is kept."""
    return recipe.cache.write not in ("none", "prefix")


def _require_mask(recipe: Recipe) -> None:
    if isinstance(recipe.mask, str) and recipe.mask not in RULES:
        near = get_close_matches(recipe.mask, RULES, 1, 0.0)[0]
        raise ModelError(f"{recipe.name}: unknown mask rule {recipe.mask!r}; nearest: {near}")
    try:
        mask_table(recipe)
    except ValueError as error:
        asked = [name for name in ("far", "window") if getattr(recipe.cache, name) is not None]
        advice = f"; leave cache.{asked[0]} out" if asked else ""
        raise ModelError(f"{recipe.name}: mask: {error}{advice}") from None


def violations(recipe: Recipe) -> list[str]:
    """List why a cached decode of a recipe differs from its masked training forward; [] = exact."""
    if recipe.cache.write == "none":
        return ['nothing is cached with cache.write = "none"']
    try:
        return [text for plan in _plans(recipe) for text in plan_violations(recipe, plan)]
    except ValueError as error:
        return [str(error)]


def plan_violations(recipe: Recipe, plan: DecodePlan) -> list[str]:
    """List the violations of one laid-out plan."""
    if plan.write == "prefix" and plan.copies == 1:
        return _prefix_violations(plan)
    commit = {"prefix": "separate"}.get(plan.write, plan.write)
    # Riding with the next block or not: one copy sees what its table shows either way.
    commit = "block" if plan.keeps_only_copy else commit
    rolls = plan.matrix == "rolling"
    together: dict[str, Any] = {"unit": "group", "window_unit": "group"} if rolls else {}
    found = []
    for group in plan.groups:
        layout = plan.training_layout()
        if recipe.layout.kind == "frames" and group != "site":
            layout = regroup(layout, group, plan.height, plan.width)
        for poses in _cameras(plan):
            report = check_exact(
                plan.table,
                layout,
                commit=commit,
                window=plan.window,
                cache_per_branch=not condition_free_clean(recipe, plan),
                routes=plan.routes(layout, poses),
                far=plan.far_window,
                **together,
            )
            found += report.violations
    return found


def _cameras(plan: DecodePlan) -> Iterator[Tensor | None]:
    """Draw poses for masks that select by them; one None for all others."""
    if not plan.table.route_names():
        yield None
        return
    for seed in range(NUM_DRAWS):
        poses = torch.eye(4).repeat(plan.num_blocks, 1, 1)
        places = torch.randn(plan.num_blocks, 3, generator=torch.Generator().manual_seed(seed))
        poses[:, :3, 3] = places
        yield poses


def condition_free_clean(recipe: Recipe, plan: DecodePlan) -> bool:
    """Whether clean rows are told no prompt, so that guidance branches share one cache."""
    condition = recipe.condition
    told = (condition.adaln or condition.cross) and "clean" in condition.modulate
    told |= plan.keeps_only_copy  # the kept rows are the noisy ones
    return not told and not plan.num_prompt_rows


def _prefix_violations(plan: DecodePlan) -> list[str]:
    """Only prompt rows are kept: they must not depend on anything that changes later."""
    rows = plan.num_prompt_rows
    if not rows:
        return ['cache.write = "prefix" keeps prompt rows, but the recipe has none']
    layout = plan.training_layout()
    seen = plan.table.visible(layout, layout)[:rows, rows:]
    if not bool(seen.any()):
        return []
    pairs = int(seen.sum())
    return [f"(static) prompt rows see {pairs} generated rows, whose content changes row by row"]


def _plans(recipe: Recipe) -> Iterator[DecodePlan]:
    """Lay the recipe out: the fixed partition, and some of the random ones it trains on."""
    layout = recipe.layout
    if layout.kind == "frames":
        together = frames_per_block(layout.block) or 1
        side = recipe.cache.far.patch if recipe.cache.far else 1
        plan = build_plan(recipe, side, 2 * side, frames=together * _num_blocks(recipe))
        # Blocks in flight train together in sets that start anywhere.
        for offset in range(plan.flight if plan.matrix == "rolling" else 1):
            yield replace(plan, offset=offset)
        if layout.permute != "none":
            yield from _drawn_plans(recipe, 1, 2, plan.num_blocks * together)
        return
    height, width = _grid_for(recipe)
    yield build_plan(recipe, height, width)
    if layout.permute != "none" or layout.split == "random":
        yield from _drawn_plans(recipe, height, width)
    if layout.spans:
        middle = layout.text_tokens + height * width // 2
        yield build_plan(recipe, height, width, span=(layout.text_tokens + 1, middle))


def _drawn_plans(
    recipe: Recipe, height: int, width: int, frames: int | None = None
) -> Iterator[DecodePlan]:
    """Lay the recipe out in some of the random orders and splits it trains on."""
    for seed in range(NUM_DRAWS):
        generator = torch.Generator().manual_seed(seed)
        yield build_plan(recipe, height, width, generator=generator, frames=frames)


def _num_blocks(recipe: Recipe) -> int:
    """At least four blocks, and enough of them to evict and to fly."""
    return max(
        MIN_BLOCKS,
        (recipe.cache.window or 0) + recipe.cache.sink + _far_blocks(recipe) + 2,
        2 * recipe.schedule.flight + 2,
    )


def _far_blocks(recipe: Recipe) -> int:
    """Coarse blocks behind the window: as many as are kept, or some."""
    far = recipe.cache.far
    return 0 if far is None else MIN_BLOCKS if far.blocks is None else far.blocks


def _grid_for(recipe: Recipe) -> tuple[int, int]:
    """Choose a grid with enough blocks."""
    blocks = _num_blocks(recipe)
    block = recipe.layout.block
    if isinstance(block, int):
        return blocks, block
    if block.startswith("tile:"):
        height, width = (int(part) for part in block.removeprefix("tile:").split("x"))
        return 2 * height, -(-blocks // 2) * width
    return blocks, MIN_BLOCKS
