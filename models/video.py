"""A video's blocks one after another, by whichever of the two ways its recipe allows.

Recipes with a window go on for ever at constant memory (`LiveRollout`); all others lay out the
whole video as one request. Both drive the one decode loop; callers see the same few methods. It
does not know pixels.

Invariant: where both ways are open they give the same values, bit for bit; with sinks, as far as
the recipe's own length, past which only a rollout without end keeps them near.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..core.decoder import Event
from ..core.endless import EndlessPlan
from ..core.errors import UsageError
from ..core.plan import build_plan
from ..core.recipe import frames_per_block
from .generate import Request, empty_values, null_prompts, prompt_vectors, start
from .generator import GenerativeModel, ModelDecoder
from .live import LiveRollout


@dataclass
class VideoRequest:
    """What a video is made from.

    Attributes:
        prompts: One per item; `VideoBlocks.set_prompts` changes them on the way.
        generators: One CPU generator per item.
        frames: Latent frames, the given ones included.
        given: Values of the first latent frames [items, latents, cells, channels], or None.
        last: Values of the last latent frames, for models that see a whole video at once; or None.
        actions: What was done on the way to every latent frame; models with actions need it.
        structure: What every token is told of its frame's shape; models with structure need it.
        told: Tokens of every latent frame that the recipe is always given, its first ones.
        num_steps: Rows per block; None = the recipe's.
        guidance_scale: 1 = off; None = the recipe's.
        temperature: 0 = greedy; None = the recipe's.
    """

    prompts: Sequence[str]
    generators: Sequence[torch.Generator]
    frames: int
    given: Tensor | None = None
    last: Tensor | None = None
    actions: Float[Tensor, "items frames actions"] | None = None
    num_steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    structure: Float[Tensor, "items frames cells numbers"] | None = None
    told: Float[Tensor, "items frames given channels"] | None = None

    @property
    def num_given(self) -> int:
        """Latent frames that are given."""
        return 0 if self.given is None else self.given.shape[1]


def goes_on(model: GenerativeModel) -> bool:
    """Tell whether a model's videos may be of any length at constant memory."""
    if frames_per_block(model.recipe.layout.block) is None:
        return False
    if model.recipe.condition.structure != "none":  # a map for every frame is a length
        return False
    try:
        plan = build_plan(model.recipe, model.config.height, model.config.width)
        EndlessPlan(plan, rotated=model.recipe.cache.keys == "rotated")
    except UsageError:
        return False
    return True


def sees_the_end(model: GenerativeModel) -> bool:
    """Tell whether frames are made together or in any order, so a last frame can guide them."""
    return model.recipe.layout.block == "all" or model.recipe.layout.permute == "any"


def video_blocks(model: GenerativeModel, request: VideoRequest) -> "VideoBlocks":
    """Open a video; nothing runs yet.

    Args:
        model: A video model in eval mode.
        request: What to make. Given frames that fill no whole number of blocks are legal; the
            video is then laid out whole.

    Raises:
        UsageError: last frames for a model that makes frames one after another.
    """
    if request.last is not None and not sees_the_end(model):
        block = model.recipe.layout.block
        raise UsageError(
            f"a last frame is given, but recipe {model.recipe.name} makes frames in order "
            f"(layout.block = {block}) and cannot see it; leave it out"
        )
    per_block = frames_per_block(model.recipe.layout.block)
    if per_block is not None:
        is_whole = request.num_given % per_block == 0 and request.frames % per_block == 0
        if is_whole and goes_on(model):
            return LiveBlocks(model, request, per_block)
    together = request.frames if sees_the_end(model) else per_block or 1
    return WholeBlocks(model, request, together)


def video_values(
    model: GenerativeModel, request: VideoRequest
) -> Float[Tensor, "items frames cells channels"]:
    """Make a video to its end and return its values.

    Args:
        model: A video model in eval mode.
        request: What to make.
    """
    blocks, parts = video_blocks(model, request), []
    for part in range(blocks.num_parts):
        for _ in blocks.events(part):
            pass
        parts.append(blocks.values(part).clone())
    return torch.cat(parts, 1)


class VideoBlocks(ABC):
    """Parts 0, 1, 2, ... of a video, asked for in order.

    A part is a block of frames, or one frame where blocks are smaller than frames.

    Attributes:
        per_part: Latent frames of a part; the last may have fewer.
        num_parts: Parts of the video.
        first: The first part that is not wholly given.
    """

    def __init__(self, model: GenerativeModel, request: VideoRequest, per_part: int) -> None:
        """Note what is asked for.

        Args:
            model: A video model in eval mode.
            request: What to make.
            per_part: Latent frames of a part.
        """
        self.model, self.request, self.per_part = model, request, per_part
        self.num_parts = -(-request.frames // per_part)
        self.first = request.num_given // per_part

    @abstractmethod
    def events(self, part: int) -> Iterator[Event]:
        """Make a part, or take it in where it is given; yields rows and commits."""

    @abstractmethod
    def set_prompts(self, prompts: Sequence[str]) -> None:
        """Change the prompts of the parts to come."""

    @abstractmethod
    def _slots(self, part: int) -> Tensor:
        """Values of the part made last as the rollout holds them."""

    def values(self, part: int) -> Tensor:
        """Return the values of the part made last, [items, latent frames, cells, channels]."""
        cells = self.model.config.height * self.model.config.width
        return rearrange(self._slots(part), "b (f n) c -> b f n c", n=cells)


class LiveBlocks(VideoBlocks):
    """A video without end, cut off at its length."""

    def __init__(self, model: GenerativeModel, request: VideoRequest, per_part: int) -> None:
        super().__init__(model, request, per_part)
        self._live = LiveRollout(
            model, request.prompts, request.generators, num_steps=request.num_steps,
            guidance_scale=request.guidance_scale, temperature=request.temperature,
        )  # fmt: skip
        self._last = torch.zeros(0)

    def events(self, part: int) -> Iterator[Event]:
        """Make a block, or take it in where it is given; yields rows and commits."""
        frames = slice(part * self.per_part, (part + 1) * self.per_part)
        actions = None if self.request.actions is None else self.request.actions[:, frames]
        if part < self.first and self.request.given is not None:
            self._last = self.request.given[:, frames].flatten(1, 2)
            self._live.observe(self._last, actions)
            self._act()
            return
        source = self._live.plan.sources(self._live.block)
        told = None if self.request.told is None else self.request.told[:, frames]
        for event in self._live.events(actions, told):
            self._last = event.data["values"][:, source]
            yield replace(event, block=part, of_blocks=self.num_parts)
        self._act()

    def _act(self) -> None:
        """Draw what is done in the frame, where the model acts: that is a block of its own."""
        if self.model.action_head is not None:
            self._last = self._last.clone()
            self._live.step()

    def set_prompts(self, prompts: Sequence[str]) -> None:
        """Change the prompts of the blocks to come; what is cached stays as it was."""
        self._live.set_prompts(prompts)

    def _slots(self, part: int) -> Tensor:
        return self._last


class WholeBlocks(VideoBlocks):
    """A video laid out whole, as one request."""

    def __init__(self, model: GenerativeModel, request: VideoRequest, per_part: int) -> None:
        super().__init__(model, request, per_part)
        values, known = self._canvas()
        self._rollout = start(
            model,
            Request(
                request.prompts, request.generators, num_steps=request.num_steps,
                guidance_scale=request.guidance_scale, temperature=request.temperature,
                values=values, is_known=known, frames=request.frames, actions=request.actions,
                structure=request.structure,
            ),
        )  # fmt: skip
        self._events, self._finished = self._rollout.events(), set[int]()

    def _canvas(self) -> tuple[Tensor, Tensor]:
        values = empty_values(self.model, len(self.request.prompts), self.request.frames)
        known = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
        for given, is_last in ((self.request.given, False), (self.request.last, True)):
            if given is not None:
                slots = given.flatten(1, 2)
                count = slots.shape[1]
                place = slice(-count, None) if is_last else slice(0, count)
                values[:, place], known[:, place] = slots.to(values), True
        if self.request.told is not None:
            is_told = self.model.is_given(torch.arange(values.shape[1], device=values.device))
            self._check_told(self.request.told, values)
            values[:, is_told] = self.request.told.flatten(1, 2).to(values)
            known[:, is_told] = True
        return values, known

    def events(self, part: int) -> Iterator[Event]:
        """Make a part, or take it in where it is given; yields rows and commits.

        Schedules that work on several blocks at once run ahead into parts to come.
        """
        count = -(-self._rollout.plan.num_blocks // self.num_parts)
        blocks = set(range(part * count, (part + 1) * count))
        while not blocks <= self._finished:
            event = next(self._events)
            if event.kind == "commit":
                self._finished.add(event.block)
            yield event

    def _check_told(self, told: Tensor, values: Tensor) -> None:
        given = self.model.recipe.layout.given
        wanted = (len(values), self.request.frames, given, values.shape[-1])
        if tuple(told.shape) != wanted:
            raise UsageError(
                f"told tokens have shape {tuple(told.shape)}; this model takes {wanted}"
            )

    def set_prompts(self, prompts: Sequence[str]) -> None:
        """Change the prompts of the parts to come; what is cached stays as it was."""
        rollout, uncond = self._rollout, None
        if self.model.uses_prompt and rollout.scheduler.config.guidance_scale != 1.0:
            uncond = null_prompts(self.model, len(prompts))
        vectors = prompt_vectors(self.model, prompts)
        told, shown = (getattr(rollout.decoder, name, None) for name in ("actions", "structure"))
        rollout.decoder = ModelDecoder(self.model, vectors, uncond, actions=told, structure=shown)

    def _slots(self, part: int) -> Tensor:
        size = self.per_part * self.model.config.height * self.model.config.width
        return self._rollout.values[:, part * size : (part + 1) * size]
