"""Words, or a motion and words, to moving bodies, piece by piece, as a diffusers pipeline.

`pipe(...)` collects what `pipe.stream(...)` hands out while it is made, so both give the same
joints. Models that make all frames together also redraw any part of a motion; models that make
them in order go on from its beginning. It knows neither masks nor schedules.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from torch import Tensor

from ..core.decoder import Event
from ..core.errors import ModelError, UsageError, check_one_of, describe
from ..models.generator import GenerativeModel
from ..models.video import VideoRequest, goes_on, sees_the_end, video_blocks
from ..motion.clip import Motion
from ..motion.features import HUMAN_SIZE
from ..motion.skeleton import HUMAN22, Skeleton
from .base import item_generators
from .blocks import BlockPipeline, Job, check_settings
from .motion_frames import Bodies, shown_values
from .motion_input import (
    FPS,
    MAX_WHOLE_TOKENS,
    Given,
    check_span,
    frames_of,
    given_motions,
    segments_end,
    text_plan,
)
from .video_checks import check_frames, check_numbers, near_counts, prompt_plan

OUTPUT_TYPES = ("motion", "np")
_COPIES = "num_motions_per_prompt"
_DEFAULTS: dict[str, Any] = {
    "motion": None, "num_frames": None, "seconds": None, "span": None, "segment_seconds": None,
    "num_inference_steps": None, "guidance_scale": None, "temperature": None, _COPIES: 1,
    "generator": None, "seed": None,
}  # fmt: skip


@dataclass
class MotionPipelineOutput(BaseOutput):
    """Result of a call.

    Attributes:
        motions: One `Motion` per item: joints [frames, joints, 3] in metres at 20 frames per
            second, rotations, the skeleton; given frames as they were given. Or joints
            [items, frames, joints, 3] for "np". Empty when nothing was finished.
        is_complete: False when the call was interrupted; what was finished until then is there.
    """

    motions: Any
    is_complete: bool = True


class MotionPipeline(BlockPipeline):
    """Makes motions of the human body with any motion recipe of the 263 features."""

    fps = FPS

    def __init__(self, tokenizer: Any, model: GenerativeModel) -> None:
        """Join a tokenizer of feature frames and a model; see `TokenPipeline`.

        Raises:
            ModelError: Their grids differ, or the features are not those of a human body.
        """
        super().__init__(tokenizer, model)
        size = getattr(tokenizer, "features", 0)
        if size != HUMAN_SIZE or model.recipe.condition.actions:
            raise ModelError(
                f"frames of this model hold {size or 'no'} features; a motion pipeline needs the "
                f"{HUMAN_SIZE} of a human body"
            )

    @property
    def skeleton(self) -> Skeleton:
        """The body that motions are made on, unless a given motion brings its own."""
        return HUMAN22

    @property
    def can_infill(self) -> bool:
        """Whether the model sees what comes after, so that a span in the middle can be redrawn."""
        return sees_the_end(self.model)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | list[list[str]] = "",
        num_frames: int | None = None,
        seconds: float | None = None,
        motion: Any = None,
        span: tuple[int, int] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_motions_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "motion",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        segment_seconds: float | list[float] | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> MotionPipelineOutput | tuple[Any, ...]:
        """Make motions.

        Args:
            prompt: What happens: one text; a list of texts, one per block of new frames (or per
                segment, see `segment_seconds`; the last goes on); or a list of such lists, one per
                motion. An empty text says nothing.
            num_frames: Frames in all, the given ones included, at 20 per second; None = as many as
                the model was trained on, or the next legal number above the given ones.
            seconds: Length in place of `num_frames`, rounded to the nearest legal number.
            motion: Motion to go on from or to change: a `Motion` of the 22 joints at 20 fps, or
                joints [frames, 22, 3]; several for several motions. Its frames come back as they
                are, but those of `span`.
            span: First frame that is made anew, and the frame after the last; None = the motion is
                gone on with. Only models that make all frames together see what comes after; others
                can redraw the end.
            num_inference_steps: Rows per block, 1..1000; None = the recipe's.
            guidance_scale: 1 = off, at most 100; None = the recipe's.
            num_motions_per_prompt: Motions per prompt, 1..64.
            generator: One for all, or one per motion; motion k depends on its own only.
            output_type: "motion", or "np" for joints alone.
            return_dict: False returns a tuple.
            callback_on_step_end: Called (pipe, index, level, tensors) after every row.
            callback_on_step_end_tensor_inputs: Names among latents, is_known.
            segment_seconds: How long each text of a list lasts: one number, or one per text.
            temperature: 0 = greedy, at most 100; None = the recipe's.
            seed: Used when no generator is given: motion k is item k of the seed.

        Returns:
            `motions` and `is_complete`.

        Raises:
            UsageError: a setting outside its range (a ValueError).
        """
        given = {name: value for name, value in locals().items() if name in _DEFAULTS}
        check_one_of("output_type", output_type, OUTPUT_TYPES)
        job = self._job(prompt, given)
        parts, is_complete = self._collected(
            job, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        motions = _finished(parts, output_type, job)
        if not return_dict:
            return (motions, is_complete)
        return MotionPipelineOutput(motions=motions, is_complete=is_complete)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[str] | list[list[str]] = "",
        *,
        should_stop: Callable[[], bool] = lambda: False,
        **settings: Any,
    ) -> Iterator[Event]:
        """Make motions and hand out their poses as soon as they are there.

        Args:
            prompt: As in `__call__`.
            should_stop: Asked after every row; True ends the stream with what is there.
            **settings: Any argument of `__call__` but output_type, return_dict and callbacks.

        Yields:
            Events: row and commit as the rollout reports them; `decoded` with `joints` (float32
            [motions, frames, joints, 3], metres, the next frames), `rotations` [motions, frames,
            joints, 4], `is_given` (they were given) and `parts` (blocks they finish); and `done`
            with `is_complete`. All frames together are those of `__call__`, bit for bit. Where the
            recipe has a window, memory does not grow.

        Raises:
            UsageError: unknown setting, or one outside its range.
        """
        job = self._job(prompt, check_settings(settings, _DEFAULTS))
        yield from self._events(job, should_stop)

    # -- the request ------------------------------------------------------------------------

    def _job(self, prompt: Any, given: dict[str, Any]) -> Job:
        """Check a call and open its rollout."""
        prompts = self._prompts(prompt, given)
        items = len(prompts)
        kept, frames = self._plan(self._with_length(prompts, given), items)
        latents = -(-frames // self.tokenizer.step_frames)
        self._check_size(latents)
        shown: Sequence[Tensor | None] = [None] * items
        first = last = None
        if kept is not None:
            shown, values = shown_values(self.tokenizer, kept, self.device, self.model.dtype)
            first, last = _around(values, kept[0], self.tokenizer.step_frames)
            shown, first, last = (_for_all(part, items) for part in (shown, first, last))
            kept = _for_all(kept, items)
        request = VideoRequest(
            [texts[0] for texts in prompts],
            item_generators(given["generator"], given["seed"], items),
            latents, first, last, num_steps=given["num_inference_steps"],
            guidance_scale=given["guidance_scale"], temperature=given["temperature"],
        )  # fmt: skip
        blocks = video_blocks(self.model, request)
        step = blocks.per_part * self.tokenizer.step_frames
        new = blocks.num_parts - blocks.first
        texts = text_plan(prompts, given["segment_seconds"], step, new)
        bodies = Bodies(self.tokenizer, kept or [None] * items, shown, first)
        return Job(blocks, texts, bodies)

    def planned_frames(self, prompt: Any = "", **settings: Any) -> int:
        """Return how many frames a call with these arguments gives, without making any.

        Args:
            prompt: As in `__call__`.
            **settings: As in `stream`.

        Raises:
            UsageError: as `__call__`.
        """
        given = check_settings(settings, _DEFAULTS)
        prompts = self._prompts(prompt, given)
        kept, frames = self._plan(self._with_length(prompts, given), len(prompts))
        return frames if kept is None else kept[0].before + kept[0].frames

    def _prompts(self, prompt: Any, given: dict[str, Any]) -> list[list[str]]:
        """Check numbers; return the texts of every motion, copies included."""
        check_numbers(given, _COPIES)
        return [texts for texts in prompt_plan(prompt) for _ in range(given[_COPIES])]

    def _with_length(self, prompts: list[list[str]], given: dict[str, Any]) -> dict[str, Any]:
        """Let segments say how long a motion is where nothing else does."""
        if given["num_frames"] is None and given["span"] is None:
            return given | {"seconds": segments_end(prompts, given["segment_seconds"], given)}
        return given

    def _plan(self, given: dict[str, Any], items: int) -> tuple[list[Given] | None, int]:
        """Decide which frames are kept, and how many come out of the model, kept ones included."""
        tokenizer, per_block = self.tokenizer, 1 if self.can_infill else self.frames_per_block
        if given["motion"] is None:
            if given["span"] is not None:
                raise UsageError("span says what to change of a motion; pass motion too")
            asked = frames_of(given["num_frames"], given["seconds"], tokenizer, per_block, 0)
            return None, self.count_frames(asked)
        motions = given_motions(given["motion"], items)
        length = len(motions[0])
        if given["span"] is not None:
            return self._changed(motions, given, length)
        used = length - length % (tokenizer.step_frames * per_block)
        used = used or length - length % tokenizer.step_frames
        if not used:
            legal = f"at least {tokenizer.step_frames} to go on from"
            raise UsageError(describe("frames of motion", length, legal))
        before = length - used
        # Frames that fill no block stay in front of those that are made, which come in blocks.
        rest = used % (tokenizer.step_frames * per_block)
        told = given["num_frames"], given["seconds"]
        asked = frames_of(*told, tokenizer, per_block, before + rest)
        frames = self._count_behind(asked, before, used, per_block)
        return [Given(motion, before, used, None, frames) for motion in motions], frames

    def _count_behind(self, asked: int | None, before: int, used: int, per_block: int) -> int:
        """Check a number of frames that given ones are part of; return it less `before`."""
        if asked is None:
            rest = used % (self.tokenizer.step_frames * per_block)
            wanted = max(self.trained_frames, used + 1) - rest
            return rest + near_counts(self.tokenizer, per_block, wanted)[-1]
        if isinstance(asked, int) and not isinstance(asked, bool):
            step = self.tokenizer.step_frames * per_block
            new = asked - before - used
            if new <= 0 or new % step:
                low = before + used + max(new // step, 1) * step
                tries = [low] if new < step else [low, low + step]
                form = f"the {before + used} given and {step}n more"
                hint = " or ".join(map(str, tries))
                raise UsageError(f"num_frames is {asked}; legal {form}; try {hint}")
            return asked - before
        check_frames("num_frames", self.tokenizer, per_block, asked)
        return asked

    def _changed(
        self, motions: list[Motion], given: dict[str, Any], length: int
    ) -> tuple[list[Given], int]:
        """Plan a motion of which a span is made anew."""
        asked = frames_of(given["num_frames"], given["seconds"], self.tokenizer, 1, 0)
        if asked not in (None, length):
            legal = f"the {length} of the motion"
            raise UsageError(describe("num_frames beside span", asked, legal, length))
        start, end = check_span(given["span"], length)
        step = self.tokenizer.step_frames
        if not self.can_infill:
            if end < length:
                raise UsageError(
                    f"span {start} to {end} has frames behind it, and recipe "
                    f"{self.model.recipe.name} makes frames in order and cannot see them; try "
                    f"span=({start}, {length}), or a model with layout.block = all or "
                    "layout.permute = any"
                )
            step *= self.frames_per_block
        right = end if end < length else None
        if not start and right is None:
            start_over = -(-length // step) * step
            raise UsageError(
                f"span 0 to {length} keeps nothing of the motion; leave motion and span out and "
                f"pass num_frames={start_over}"
            )
        frames = -(-length // step) * step
        return [Given(motion, 0, start, right, length) for motion in motions], frames

    def _check_size(self, latents: int) -> None:
        """Refuse what is laid out whole and would not fit.

        Raises:
            UsageError: Too many frames; the largest number is named.
        """
        if goes_on(self.model):
            return
        cells = int(np.prod(self.tokenizer.grid))
        most = MAX_WHOLE_TOKENS // cells
        if latents > most:
            step = self.tokenizer.step_frames
            raise UsageError(
                f"a motion of {latents * step} frames; recipe {self.model.recipe.name} lays a "
                f"motion out whole and takes at most {most * step}; try num_frames={most * step}"
            )


def _around(values: Tensor, kept: Given, step: int) -> tuple[Tensor | None, Tensor | None]:
    """Cut the values of what stands wholly before and behind the frames that are made."""
    before = kept.left // step
    first = values[:, :before] if before else None
    if kept.right is None:
        return first, None
    behind = -(-kept.right // step)
    return first, values[:, behind:] if behind < values.shape[1] else None


def _for_all(part: Any, items: int) -> Any:
    """Repeat what is given once for all items."""
    if part is None or len(part) == items:
        return part
    return part.expand(items, *part.shape[1:]) if isinstance(part, Tensor) else list(part) * items


def _finished(parts: list[dict[str, Any]], output_type: str, job: Job) -> Any:
    """Join the parts of a call's result."""
    if not parts:
        return []
    joints, rotations = (np.concatenate([p[k] for p in parts], 1) for k in ("joints", "rotations"))
    if output_type == "np":
        return joints
    assert isinstance(job.frames, Bodies)
    return [
        Motion(places, skeleton, FPS, turns, "; ".join(dict.fromkeys(texts)))
        for places, turns, skeleton, texts in zip(
            joints, rotations, job.frames.skeletons, job.prompts, strict=True
        )
    ]
