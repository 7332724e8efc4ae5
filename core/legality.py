"""Which choices of a recipe do not go together, and what to set instead.

Every message is one line that names the setting, its value and the nearest legal value. It does not
know how a recipe is read, nor what an exact cache is (core/exactness.py).
"""

import re
from difflib import get_close_matches
from typing import TYPE_CHECKING

MOST_ROWS = 1000
"""Most rows of a level."""
POSE_NUMBERS = 16
"""Numbers of a camera's pose: its 4 x 4 matrix, row by row."""

if TYPE_CHECKING:
    from .recipe import Recipe
    from .recipe_sections import LayoutSpec


def combination_errors(recipe: "Recipe") -> list[str]:
    """Return the illegal combinations of a recipe, each with what to set instead."""
    layout, cache, head, corruption = recipe.layout, recipe.cache, recipe.head, recipe.corruption
    errors = []
    if layout.shift == 1 and layout.block != "token":
        errors.append(f'layout.block = {layout.block!r} with layout.shift = 1; set "token"')
    if layout.shift == 1 and layout.copies == 2:
        errors.append("layout.copies = 2 with layout.shift = 1; set copies to 1")
    if cache.write == "separate" and layout.copies == 1:
        errors.append('cache.write = "separate" needs layout.copies = 2; set "block" or "none"')
    if cache.write == "token" and layout.shift == 0:
        errors.append('cache.write = "token" needs layout.shift = 1; set "none" or "separate"')
    if cache.write == "block" and (layout.copies == 2 or layout.shift == 1):
        errors.append(
            f'cache.write = "block" with layout.copies = {layout.copies} and layout.shift = '
            f'{layout.shift}; set "{"separate" if layout.copies == 2 else "token"}"'
        )
    if layout.shift == 1 and cache.write not in ("token", "none"):
        errors.append(f'cache.write = "{cache.write}" with layout.shift = 1; set "token"')
    if (head.kind == "patch") != (corruption.kind in ("flow", "ddpm")):
        wanted = "flow" if head.kind == "patch" else "mask"
        errors.append(
            f'corruption.kind = "{corruption.kind}" does not fit head.kind = "{head.kind}"; '
            f'set corruption.kind to "{wanted}"'
        )
    if head.kind == "patch" and recipe.backbone.level == "none":
        errors.append('backbone.level = "none" with head.kind = "patch"; set "adaln"')
    if head.kind == "shortcut" and head.steps & (head.steps - 1):
        near = 1 << (head.steps.bit_length() - 1)
        errors.append(f"head.steps = {head.steps} must be a power of two; try {near}")
    if corruption.resample and (layout.copies == 1 or head.kind != "patch"):
        errors.append(
            f"corruption.resample = {corruption.resample:g} needs layout.copies = 2 and "
            'head.kind = "patch"; set corruption.resample to 0'
        )
    errors += _distill_errors(recipe)
    if recipe.backbone.route and (cache.window is not None or cache.write in ("token", "prefix")):
        errors.append(
            f"backbone.route = {recipe.backbone.route} chooses among all finished blocks, so none "
            "may be dropped: leave cache.window out, and cache.write must keep blocks; or set "
            "backbone.route to 0"
        )
    if corruption.clean and layout.copies == 2:
        errors.append(
            f"corruption.clean = {corruption.clean:g} needs layout.copies = 1; "
            "set corruption.clean to 0"
        )
    if corruption.share < 1 and (
        layout.copies == 1 or corruption.per == "flight" or corruption.weight == "segment"
    ):
        errors.append(
            f"corruption.share = {corruption.share:g} needs layout.copies = 2, and neither "
            'per = "flight" nor weight = "segment"; set corruption.share to 1'
        )
    errors += _order_errors(recipe) + _structure_errors(recipe)
    if layout.split == "random" and layout.copies != 2:
        errors.append('layout.split = "random" needs layout.copies = 2; set "fixed"')
    alone = layout.copies == 1 and cache.write not in ("block", "fused")
    alone &= recipe.schedule.matrix == "autoregressive"
    if head.kind == "patch" and alone and layout.block != "all":
        errors.append(
            f'layout.block = {layout.block!r} with head.kind = "patch" needs layout.copies = 2 or '
            'cache.write = "block" or "fused", or a schedule.matrix with several blocks in flight; '
            'set layout.block to "all", or one of them'
        )
    if cache.window is not None and cache.write in ("none", "prefix"):
        errors.append(
            f'cache.window = {cache.window} with cache.write = "{cache.write}" evicts nothing; '
            'set cache.write to "separate", "fused", "block" or "token", or leave the window out'
        )
    if cache.sink and cache.window is None and cache.nearest is None:
        errors.append(f"cache.sink = {cache.sink} needs cache.window; set cache.sink to 0")
    errors += _pose_errors(recipe)
    errors += _video_errors(recipe) + _flight_errors(recipe) + _context_errors(recipe)
    errors += _acting_errors(recipe) + _stage_errors(recipe) + _far_errors(recipe)
    errors += _given_errors(recipe) + _answer_errors(recipe)
    if (layout.kind == "stream") != (layout.text_tokens > 0):
        errors.append("layout.text_tokens must be > 0 exactly when layout.kind is stream; try 32")
    return errors


def _context_errors(recipe: "Recipe") -> list[str]:
    """What context that is kept with noise needs."""
    cache, errors = recipe.cache, []
    if recipe.corruption.context and recipe.layout.copies == 1 and recipe.head.kind == "patch":
        errors.append(
            f"corruption.context = {recipe.corruption.context:g} of noisy latents needs "
            "layout.copies = 2; set corruption.context to 0"
        )
    latents = recipe.head.kind != "categorical" and recipe.corruption.kind != "ddpm"
    keeps = cache.write in ("separate", "block", "fused")
    if cache.context_noise and not (latents and keeps):
        errors.append(
            f"cache.context_noise = {cache.context_noise:g} needs latents on straight paths and "
            'cache.write = "separate", "block" or "fused"; set cache.context_noise to 0'
        )
    told = recipe.layout.copies == 1 and recipe.backbone.level != "none"
    if cache.context_level and not (keeps and told):
        errors.append(
            f"cache.context_level = {cache.context_level:g} needs layout.copies = 1, "
            'backbone.level and cache.write = "block" or "fused"; set cache.context_level to 0'
        )
    return errors


def _structure_errors(recipe: "Recipe") -> list[str]:
    """What structure maps beside the frames need."""
    structure, layout = recipe.condition.structure, recipe.layout
    if structure == "none":
        return []
    errors = []
    if layout.kind != "frames" or layout.shift or recipe.acting is not None:
        errors.append(
            f'condition.structure = "{structure}" needs layout.kind = "frames", layout.shift = 0 '
            'and no acting; set condition.structure to "none"'
        )
    if recipe.distill is not None or recipe.corruption.resample:
        errors.append(
            f'condition.structure = "{structure}" with distill or corruption.resample, whose own '
            'videos have no map; set condition.structure to "none"'
        )
    return errors


def _order_errors(recipe: "Recipe") -> list[str]:
    """What an order of their own, and rows that know whether they are known, need."""
    layout, errors = recipe.layout, []
    masks = recipe.corruption.kind == "mask" and not recipe.schedule.levels
    alone = layout.copies == 1 and layout.block == "all" and not layout.shift
    if layout.relabel and not (masks and alone and layout.permute == "any"):
        errors.append(
            'layout.relabel needs corruption.kind = "mask", one copy, layout.block = "all" and '
            'layout.permute = "any"; set layout.relabel to false'
        )
    if layout.permute == "any" and (layout.shift or recipe.cache.window is not None):
        errors.append(
            f'layout.permute = "any" with layout.shift = {layout.shift} and cache.window = '
            f"{recipe.cache.window}, which count in raster order; set 0 and null"
        )
    if recipe.condition.order and not (masks and layout.permute == "any"):
        errors.append(
            'condition.order needs corruption.kind = "mask" and layout.permute = "any"; '
            "set condition.order to false"
        )
    return errors


def _given_errors(recipe: "Recipe") -> list[str]:
    """What frames need some of whose tokens are always given."""
    layout = recipe.layout
    if not layout.given:
        return []
    errors, kind = [], recipe.corruption.kind
    if layout.kind != "frames" or layout.block == "token" or kind != "mask":
        errors.append(
            f'layout.given = {layout.given} needs layout.kind = "frames" in blocks of whole frames '
            f'and corruption.kind = "mask"; got {layout.kind!r}, {layout.block!r} and {kind!r}; '
            "set layout.given to 0"
        )
    if recipe.acting is not None or recipe.schedule.levels or layout.permute != "none":
        errors.append(
            f"layout.given = {layout.given} beside acting, schedule.levels or layout.permute, "
            "which predict or order every token; set layout.given to 0"
        )
    return errors


def _answer_errors(recipe: "Recipe") -> list[str]:
    """What aligned numbers, periods and learning from own answers need."""
    backbone, condition, layout = recipe.backbone, recipe.condition, recipe.layout
    errors = []
    if condition.aligned and (not condition.actions or condition.poses or condition.prefix):
        errors.append(
            f"condition.aligned with condition.actions = {condition.actions} needs actions, and "
            "neither poses nor prefix, whose rows have no frame; set condition.aligned to false"
        )
    periodic = backbone.position == "periodic"
    if backbone.period > 1 and not (periodic or backbone.decay):
        errors.append(
            f"backbone.period = {backbone.period} is read by nothing; set backbone.decay or "
            'backbone.position = "periodic", or backbone.period to 1'
        )
    if periodic and backbone.period == 1:
        errors.append(
            'backbone.position = "periodic" with backbone.period = 1 makes all places alike; '
            "try backbone.period = 30"
        )
    if recipe.corruption.rollout and (recipe.head.kind != "regression" or not layout.shift):
        errors.append(
            f'corruption.rollout with head.kind = "{recipe.head.kind}" and layout.shift = '
            f'{layout.shift} needs "regression", which alone is differentiable, and 1; '
            "set corruption.rollout to false"
        )
    if recipe.corruption.rollout and (recipe.distill is not None or recipe.train.pad):
        errors.append(
            "corruption.rollout beside distill or train.pad; set corruption.rollout to false"
        )
    return errors


def _stage_errors(recipe: "Recipe") -> list[str]:
    """What levels that are filled in turn need."""
    levels, errors = recipe.schedule.levels, []
    if (recipe.corruption.per == "stage") != bool(levels):
        wanted = "stage" if levels else "sample"
        errors.append(
            f'corruption.per = "{recipe.corruption.per}" with schedule.levels = {list(levels)}; '
            f'set corruption.per to "{wanted}"'
        )
    if any(not 1 <= rows <= MOST_ROWS for rows in levels):
        errors.append(
            f"schedule.levels = {list(levels)} grants every level 1..{MOST_ROWS} rows; "
            f"try {[min(max(rows, 1), MOST_ROWS) for rows in levels]}"
        )
    layout, kind = recipe.layout, recipe.corruption.kind
    if levels and (layout.kind != "frames" or layout.block == "token" or kind != "mask"):
        errors.append(
            f'schedule.levels needs layout.kind = "frames" in blocks of whole frames and '
            f'corruption.kind = "mask"; got {layout.kind!r}, {layout.block!r} and {kind!r}'
        )
    return errors


def _far_errors(recipe: "Recipe") -> list[str]:
    """What far history at a coarser scale needs."""
    layout, cache, errors = recipe.layout, recipe.cache, []
    if cache.far is None:
        return []
    if layout.copies == 1 or frames_per_block(layout.block) is None:
        errors.append(
            f"cache.far with layout.copies = {layout.copies} and layout.block = {layout.block!r} "
            'needs 2 copies and blocks of whole frames ("frame", "frames:N"); leave cache.far out'
        )
    if cache.window is None:
        errors.append("cache.far keeps what leaves the window; set cache.window, or leave far out")
    if recipe.acting is not None or layout.groups not in (("site",), ("block",)):
        errors.append(
            f"cache.far with layout.group = {layout.group!r} and "
            f"acting {'set' if recipe.acting else 'unset'} has rows that are no tokens of either; "
            "leave cache.far out"
        )
    return errors


def _acting_errors(recipe: "Recipe") -> list[str]:
    """What actions among the tokens need."""
    acting, layout, errors = recipe.acting, recipe.layout, []
    if acting is None:
        return []
    if layout.kind != "frames" or layout.block != "frame" or layout.groups != ("site",):
        errors.append(
            f'acting needs layout.kind = "frames", block = "frame" and group = "site"; got '
            f"{layout.kind!r}, {layout.block!r} and {layout.group!r}"
        )
    if recipe.cache.window is None or recipe.cache.sink:
        errors.append(
            f"acting goes on for ever: cache.window = {recipe.cache.window} and cache.sink = "
            f"{recipe.cache.sink}; set window to {2 * layout.frames}, two per frame, and sink to 0"
        )
    if recipe.condition.actions:
        errors.append(
            f"condition.actions = {recipe.condition.actions} tells what acting predicts; set 0"
        )
    if (acting.codes > 0) == (acting.numbers > 0):
        errors.append(
            f"acting.codes = {acting.codes} and acting.numbers = {acting.numbers}; exactly one is "
            "above 0; try codes = 7"
        )
    for name, head in (("head", recipe.head), ("acting.head", acting.head)):
        if head.kind == "patch":
            errors.append(f'{name}.kind = "patch" with acting; set "diffusion" or "categorical"')
    if (acting.head.kind == "categorical") != (acting.codes > 0):
        wanted = "categorical" if acting.codes else "diffusion"
        errors.append(
            f'acting.head.kind = "{acting.head.kind}" with acting.codes = {acting.codes}; '
            f'set "{wanted}"'
        )
    if acting.numbers and recipe.head.kind == "categorical":
        errors.append(
            f"acting.numbers = {acting.numbers} beside frames that are codes; set acting.codes, or "
            'head.kind to "diffusion"'
        )
    if not acting.weight and not acting.frame_weight:
        errors.append("acting.weight = 0 and acting.frame_weight = 0 learn nothing; set one to 1")
    return errors


def _distill_errors(recipe: "Recipe") -> list[str]:
    """What teachers, and the student's own videos, need."""
    spec, errors = recipe.distill, []
    if spec is None:
        return []
    is_flow = recipe.head.kind == "patch" and recipe.head.objective == "velocity"
    if spec.method == "dmd" and (recipe.layout.copies == 1 or not is_flow):
        errors.append(
            'distill needs layout.copies = 2 and head.objective = "velocity"; leave distill out'
        )
    if spec.method == "consistency" and spec.adversarial:
        errors.append(
            f"distill.adversarial = {spec.adversarial:g} judges by the critic of "
            'distill.method = "dmd"; set distill.adversarial to 0'
        )
    if spec.method == "consistency":
        if not is_flow or recipe.corruption.kind != "flow":
            errors.append(
                f'distill.method = "consistency" with head.kind = "{recipe.head.kind}" needs '
                'corruption.kind = "flow" and head.objective = "velocity"; leave distill out'
            )
        if recipe.layout.kind != "frames":
            errors.append('distill.method = "consistency" needs layout.kind = "frames"')
        if spec.teacher is not None and spec.init_steps:
            errors.append(
                f"distill.teacher beside distill.init_steps = {spec.init_steps}: the teacher of "
                "a consistent student is the model at init_steps; set distill.init_steps to 0"
            )
    frames, per_block = recipe.layout.frames, frames_per_block(recipe.layout.block) or 1
    if spec.given and (spec.given >= frames or spec.given % per_block):
        near = max(frames - per_block, 0) // per_block * per_block
        errors.append(
            f"distill.given = {spec.given} must be whole blocks and fewer than layout.frames = "
            f"{frames}; try {min(near, max(spec.given // per_block, 1) * per_block)}"
        )
    if spec.horizon and (not spec.given or spec.history == "data"):
        errors.append(
            f'distill.horizon = {spec.horizon} needs distill.given and distill.history = "own"; '
            "set distill.horizon to 0"
        )
    return errors


def _pose_errors(recipe: "Recipe") -> list[str]:
    """What cameras beside the frames need."""
    cache, condition, layout = recipe.cache, recipe.condition, recipe.layout
    errors = []
    if condition.poses and (condition.actions < POSE_NUMBERS or layout.block != "frame"):
        errors.append(
            f"condition.poses with condition.actions = {condition.actions} and layout.block = "
            f'{layout.block!r} needs 16 actions or more and "frame"; set condition.poses to false'
        )
    if condition.poses != (recipe.backbone.position == "pose"):
        wanted = "pose" if condition.poses else "rope"
        errors.append(
            f'backbone.position = "{recipe.backbone.position}" with condition.poses = '
            f'{str(condition.poses).lower()}; set backbone.position to "{wanted}"'
        )
    if recipe.backbone.position == "pose" and recipe.backbone.dim // recipe.backbone.heads % 4:
        errors.append(
            f'backbone.position = "pose" with {recipe.backbone.dim // recipe.backbone.heads} '
            "channels per head, which must be a multiple of 4; change backbone.heads"
        )
    if cache.nearest is not None and (not condition.poses or cache.window is not None):
        errors.append(
            f"cache.nearest = {cache.nearest} needs condition.poses and no cache.window, which "
            "would forget what a later view is near to; set cache.nearest to null"
        )
    return errors


def frames_per_block(block: int | str) -> int | None:
    """Read a video's `layout.block`: "frame" = 1, "frames:N" = N; None where it is neither."""
    if block == "frame":
        return 1
    name, _, count = str(block).partition(":")
    return int(count) if name == "frames" and count.isdecimal() and int(count) else None


def window_of(group: str) -> tuple[int, int, int, bool] | None:
    """Read a `layout.group` "window:TxHxW[:shifted]" as sizes and shift; None where it is none."""
    match = re.fullmatch(r"window:([1-9]\d*)x([1-9]\d*)x([1-9]\d*)(:shifted)?", group)
    return match and (int(match[1]), int(match[2]), int(match[3]), match[4] is not None)


def _flight_errors(recipe: "Recipe") -> list[str]:
    """What several blocks in flight together need."""
    schedule, layout, errors = recipe.schedule, recipe.layout, []
    matrix, rolls = schedule.matrix, schedule.matrix == "rolling"
    if matrix != "autoregressive" and recipe.head.kind != "patch":
        errors.append(
            f'schedule.matrix = "{matrix}" with head.kind = "{recipe.head.kind}"; '
            'set "autoregressive"'
        )
    if matrix != "autoregressive" and schedule.update in ("dpm", "unipc"):
        errors.append(
            f'schedule.update = "{schedule.update}" keeps a history of one block, and '
            f'schedule.matrix = "{matrix}" has several in flight; set schedule.update to "euler"'
        )
    if layout.copies == 2 and matrix not in ("autoregressive", "rolling"):
        errors.append(f'schedule.matrix = "{matrix}" needs layout.copies = 1; set "rolling"')
    if rolls and (layout.copies == 1 or layout.groups != ("block",)):
        errors.append('schedule.matrix = "rolling" needs layout.copies = 2, layout.group = block')
    if matrix in ("pyramid", "trapezoid") and schedule.delay > schedule.steps:
        errors.append(
            f"schedule.delay = {schedule.delay} is more than schedule.steps = {schedule.steps}; "
            f"try {schedule.steps}"
        )
    if rolls and schedule.steps % schedule.flight:
        errors.append(
            f"schedule.steps = {schedule.steps} must be a multiple of schedule.flight = "
            f"{schedule.flight}; try {-(-schedule.steps // schedule.flight) * schedule.flight}"
        )
    if (recipe.corruption.per == "flight") != rolls:
        wanted = "flight" if rolls else "block"
        errors.append(
            f'corruption.per = "{recipe.corruption.per}" with schedule.matrix = "{matrix}"; '
            f'set corruption.per to "{wanted}"'
        )
    return errors


def _group_errors(layout: "LayoutSpec") -> list[str]:
    odd = [g for g in layout.groups if g not in ("site", "frame", "block") and not window_of(g)]
    if odd or not layout.groups:
        near = get_close_matches(str(odd[:1]), ["site", "frame", "block", "window:2x2x2"], 1, 0.0)
        return [f"layout.group = {layout.group!r}; nearest legal value {near[0]!r}"]
    if layout.groups != ("site",) and layout.kind != "frames":
        return [f'layout.group = {layout.group!r} needs layout.kind = "frames"; set "site"']
    if "block" in layout.groups and len(layout.groups) > 1:
        return [f'layout.group = {layout.group!r}: "block" stands alone; set "block"']
    return []


def _video_errors(recipe: "Recipe") -> list[str]:
    layout = recipe.layout
    is_video, in_frames = layout.kind == "frames", frames_per_block(layout.block) is not None
    errors = []
    if in_frames != is_video and not (is_video and layout.block in ("token", "all")):
        wanted = '"frame", "frames:N", "token"' if is_video else '"all", "row"'
        wanted += ' or "all"' if is_video else ' or "token"'
        errors.append(
            f'layout.block = {layout.block!r} with layout.kind = "{layout.kind}"; set {wanted}'
        )
    errors += _group_errors(layout)
    if layout.frames > 1 and not is_video:
        errors.append(f'layout.frames = {layout.frames} needs layout.kind = "frames"; set 1')
    if recipe.condition.actions and not is_video:
        errors.append('condition.actions needs layout.kind = "frames"; set condition.actions to 0')
    if recipe.train.mirror and recipe.modality != "motion":
        errors.append(f'train.mirror with modality = "{recipe.modality}"; set train.mirror = false')
    if recipe.train.wordings and recipe.modality != "motion":
        errors.append(f'train.wordings with modality = "{recipe.modality}"; set train.wordings = 0')
    if recipe.train.synonyms and not recipe.train.wordings:
        errors.append("train.synonyms with train.wordings = 0; set train.wordings to 1 or more")
    in_time = recipe.modality in ("video", "motion")
    if in_time != is_video:
        kind = "frames" if in_time else "grid"
        errors.append(
            f'layout.kind = "{layout.kind}" with modality = "{recipe.modality}"; set "{kind}"'
        )
    return errors
