"""One request: prompts and given tokens in, a rollout out.

Pipelines and evaluation both start here. It joins a model, a plan and a scheduler; it does not
decode pixels and does not run the loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..core.errors import UsageError
from ..core.plan import NUM_SENTINELS, DecodePlan, build_plan
from ..core.poses import require_poses
from ..core.rollout import Rollout
from ..core.schedule import scheduler_of
from .generator import TEXT_CODES, GenerativeModel, ModelDecoder, structure_width
from .prompts import PreparedPrompt


@dataclass
class Request:
    """What a user asks for.

    Attributes:
        prompts: One per item.
        generators: One CPU generator per item.
        negative_prompts: One per item, or None for the learned empty prompt.
        num_steps: Rows per block; None = the recipe's.
        guidance_scale: 1 = off; None = the recipe's.
        temperature: 0 = greedy; None = the recipe's.
        top_k: Codes kept; None = the recipe's.
        top_p: Nucleus mass; None = the recipe's.
        values: Given tokens [items, cells, ...]; anything where not known.
        is_known: Which cells are given [items, cells]; None = none.
        use_cache: False recomputes the past in every pass (the slow twin).
        should_stop: Asked before every row.
        frames: Latent frames of a video; None = as many as the recipe trains on.
        actions: What was done on the way to every frame; models with actions need it.
        structure: What every token is told of its frame's shape; models with structure need it.
    """

    prompts: Sequence[str]
    generators: Sequence[torch.Generator]
    negative_prompts: Sequence[str] | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    values: Tensor | None = None
    is_known: Bool[Tensor, "items cells"] | None = None
    use_cache: bool = True
    should_stop: Callable[[], bool] = field(default=lambda: False)
    frames: int | None = None
    actions: Float[Tensor, "items frames actions"] | None = None
    structure: Float[Tensor, "items frames cells numbers"] | None = None


@torch.no_grad()
def prompt_vectors(model: GenerativeModel, prompts: Sequence[str]) -> PreparedPrompt:
    """Encode and project prompts; models whose captions are tokens get their start row."""
    if not model.uses_prompt:
        return model.unprompted(len(prompts))
    ids = model.text_encoder.tokenize(list(prompts)).to(model.device)
    never = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    return model.prepare(model.embed_prompts(ids, never))


@torch.no_grad()
def null_prompts(model: GenerativeModel, items: int) -> PreparedPrompt:
    """Project the learned empty prompt, which guidance steers away from, once per item."""
    return model.prepare(model.text_encoder.null(items, model.recipe.text.words))


def empty_values(model: GenerativeModel, items: int, frames: int | None = None) -> Tensor:
    """Make the canvas of a request: zeros in every cell of every frame."""
    config = model.config
    cells = model.slots_per_frame * (frames or model.recipe.layout.frames)
    if config.codebook_size:
        shape = (items, cells, config.num_codebooks)
        return torch.zeros(shape, dtype=torch.long, device=model.device)
    shape = (items, cells, config.latent_channels)
    return torch.zeros(shape, dtype=model.dtype, device=model.device)


@torch.no_grad()
def start(model: GenerativeModel, request: Request) -> Rollout:
    """Set up the rollout of a request.

    Args:
        model: In eval mode.
        request: What to draw.

    Returns:
        A rollout whose slots are the model's data slots; `picture_values` reads the cells.
    """
    items = len(request.prompts)
    scheduler = scheduler_of(
        model.recipe, guidance_scale=request.guidance_scale, temperature=request.temperature
    )
    actions, structure = checked_actions(model, request), checked_structure(model, request)
    values = request.values
    values = empty_values(model, items, request.frames) if values is None else values
    known = request.is_known
    if known is None:
        known = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
    _require_told(model, known)
    span = None
    if model.recipe.layout.kind == "stream":
        values, known, span = _stream_canvas(model, request, values, known)
    plan = _plan(model, span, request.frames, _first(model, known), remember=request.use_cache)
    uncond = None
    if model.uses_prompt and scheduler.config.guidance_scale != 1.0:
        negative = request.negative_prompts
        uncond = null_prompts(model, items) if negative is None else prompt_vectors(model, negative)
    decoder = ModelDecoder(
        model,
        prompt_vectors(model, request.prompts),
        uncond,
        top_k=request.top_k,
        top_p=request.top_p,
        actions=actions,
        structure=structure,
    )
    return Rollout(
        plan,
        decoder,
        scheduler,
        values=values,
        is_known=known,
        generators=request.generators,
        num_steps=request.num_steps,
        use_cache=request.use_cache,
        should_stop=request.should_stop,
    )


_PLANS: WeakKeyDictionary[GenerativeModel, dict[Any, DecodePlan]] = WeakKeyDictionary()


def checked_actions(model: GenerativeModel, request: Request) -> Tensor | None:
    """Check a request's actions against its frames and the model.

    Raises:
        UsageError: missing, unwanted, or of another shape.
    """
    wanted = model.recipe.condition.actions
    if request.actions is None and not wanted:
        return None
    frames = request.frames or model.recipe.layout.frames
    shape = (len(request.prompts), frames, wanted)
    got = None if request.actions is None else tuple(request.actions.shape)
    if not wanted:
        raise UsageError(f"actions {got}: recipe {model.recipe.name} takes none; leave them out")
    if got != shape or request.actions is None:
        raise UsageError(f"actions must be numbers of shape {shape}, one row per frame; got {got}")
    if model.recipe.condition.poses:
        require_poses(request.actions)
    return request.actions.to(model.device)


def _require_told(model: GenerativeModel, known: Tensor) -> None:
    """Refuse requests without the tokens that a recipe is always given.

    Raises:
        UsageError: some are missing.
    """
    given = model.is_given(torch.arange(known.shape[1], device=known.device))
    missing = int((~known[:, given]).sum())
    if missing:
        raise UsageError(
            f"recipe {model.recipe.name} is given the first {model.recipe.layout.given} tokens of "
            f"every frame, and {missing} of this request's are not known; give all of them"
        )


def _first(model: GenerativeModel, known: Tensor) -> tuple[int, ...]:
    """List the slots that come first where the order is free: those that are given."""
    if model.recipe.layout.permute != "any":
        return ()
    return tuple(known[0].nonzero()[:, 0].tolist())


def checked_structure(model: GenerativeModel, request: Request) -> Tensor | None:
    """Check a request's structure maps against its frames and the model.

    Returns:
        [items, slots, numbers], or None for models without.

    Raises:
        UsageError: missing, unwanted, or of another shape.
    """
    width, config = structure_width(model.recipe), model.config
    name = model.recipe.name
    if not width:
        if request.structure is not None:
            raise UsageError(f"recipe {name} takes no structure; leave it out")
        return None
    frames = request.frames or model.recipe.layout.frames
    shape = (len(request.prompts), frames, config.height * config.width, width)
    got = None if request.structure is None else tuple(request.structure.shape)
    if got != shape or request.structure is None:
        raise UsageError(
            f"recipe {name} is guided by structure of shape {shape}, a map per frame; got {got}"
        )
    return request.structure.flatten(1, 2).to(model.device)


def _plan(
    model: GenerativeModel, span: tuple[int, int] | None, frames: int | None,
    first: tuple[int, ...], *, remember: bool,
) -> DecodePlan:  # fmt: skip
    """Lay out a request; cached rollouts of one model share their plan and its lowered masks.

    Without a cache every pass has a layout of its own, as long as the past: not worth keeping.
    """
    height, width = model.config.height, model.config.width
    order = torch.tensor(first) if first else None
    if not remember:
        return build_plan(model.recipe, height, width, span=span, frames=frames, first=order)
    known = _PLANS.setdefault(model, {})
    plan = known.get((span, frames, first))
    if plan is None:
        plan = build_plan(model.recipe, height, width, span=span, frames=frames, first=order)
        if span is not None or frames is not None or first:
            known.clear()  # one user's span or length; the next request brings another
        known[span, frames, first] = plan
    return plan


def _stream_canvas(
    model: GenerativeModel, request: Request, cells: Tensor, known: Tensor
) -> tuple[Tensor, Tensor, tuple[int, int] | None]:
    """Spell prompts into the stream; a partly known picture moves its unknown span to the end."""
    text, size = model.recipe.layout.text_tokens, model.config.codebook_size
    spelled = caption_codes(request.prompts, text, size).to(cells.device)[..., None]
    values = torch.cat((spelled, cells), 1)
    given = torch.cat((torch.ones_like(spelled[..., 0], dtype=torch.bool), known), 1)
    open_slots = (~given).any(0).nonzero()[:, 0]
    trailing = len(open_slots) == 0 or bool((~given)[:, int(open_slots[0]) :].all())
    if trailing or not model.recipe.layout.spans:
        return values, given, None
    span = (int(open_slots[0]), int(open_slots[-1]) + 1)
    first = size + TEXT_CODES
    marks = torch.arange(first, first + NUM_SENTINELS, device=cells.device)
    marks = marks.expand(len(cells), -1)[..., None]
    values = torch.cat((values, marks), 1)
    return values, torch.cat((given, torch.ones_like(marks[..., 0], dtype=torch.bool)), 1), span


def caption_codes(captions: Sequence[str], length: int, offset: int) -> Tensor:
    """Spell captions as ids of a joint vocabulary: offset + ASCII code, offset = padding.

    Characters outside ASCII become "?"; longer captions are cut at `length`.

    Returns:
        int64 [captions, length].
    """
    table = torch.full((len(captions), length), offset)
    for row, caption in zip(table, captions, strict=True):
        spelled = caption.encode("ascii", "replace")[:length]
        row[: len(spelled)] = torch.tensor(list(spelled), dtype=torch.long) + offset
    return table


def spell_back(codes: Tensor, offset: int) -> list[str]:
    """Read captions back from ids of a joint vocabulary, padding dropped."""
    return [
        "".join(chr(c - offset) for c in row if c > offset and c - offset < TEXT_CODES)
        for row in codes.tolist()
    ]


def picture_values(model: GenerativeModel, slots: Tensor) -> Tensor:
    """Cut the cells of the picture (of all frames), in raster order, out of the rollout's slots."""
    first = model.recipe.layout.text_tokens
    if model.recipe.layout.kind == "frames":
        return slots
    return slots[:, first : first + model.config.height * model.config.width]


@torch.no_grad()
def caption(
    model: GenerativeModel, cells: Tensor, generators: Sequence[torch.Generator], **settings: Any
) -> list[str]:
    """Write captions for given pictures (stream recipes only): the text span moves to the end.

    Args:
        model: A model whose captions are tokens.
        cells: Codes [items, cells, 1].
        generators: One CPU generator per item.
        **settings: Further fields of `Request`.

    Raises:
        ValueError: the model's captions are not tokens.
    """
    layout, size = model.recipe.layout, model.config.codebook_size
    if layout.kind != "stream":
        raise ValueError(f"recipe {model.recipe.name} has no caption tokens; try image/cm3")
    items, text = len(cells), layout.text_tokens
    request = Request([""] * items, generators, **settings)
    decoder = ModelDecoder(model, model.unprompted(items), top_k=request.top_k, top_p=request.top_p)
    plan = build_plan(model.recipe, model.config.height, model.config.width, span=(0, text))
    first = size + TEXT_CODES
    marks = torch.arange(first, first + NUM_SENTINELS, device=cells.device).expand(items, -1)
    blank = torch.full((items, text, 1), size, device=cells.device)
    values = torch.cat((blank, cells, marks[..., None]), 1)
    known = torch.ones(values.shape[:2], dtype=torch.bool, device=cells.device)
    known[:, :text] = False
    scheduler = scheduler_of(model.recipe, temperature=request.temperature)
    rollout = Rollout(
        plan, decoder, scheduler, values=values, is_known=known, generators=list(generators)
    )
    for _ in rollout.events():
        pass
    return spell_back(rollout.values[:, :text, 0], size)
