"""Words, a first frame or a first clip to video, block by block, as a diffusers pipeline.

`pipe(...)` collects what `pipe.stream(...)` hands out while it is made, so both give the same
frames. It knows neither masks nor schedules.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..core.errors import UsageError, check_one_of, describe
from ..core.recipe import frames_per_block
from ..core.rollout import Event
from ..models.video import VideoBlocks, VideoRequest, sees_the_end, video_blocks
from ..tokenizers.video_base import StreamState
from .base import CallPipeline, item_generators
from .clip_frames import to_clip, to_frames
from .video_checks import (
    check_frames,
    check_numbers,
    first_frames,
    near_counts,
    prompt_plan,
    told_actions,
)

OUTPUT_TYPES = ("np", "pil")
_CALLBACK_TENSORS = ("latents", "is_known")
_DEFAULTS: dict[str, Any] = {
    "image": None, "video": None, "last_image": None, "num_frames": None, "actions": None,
    "num_inference_steps": None, "guidance_scale": None, "temperature": None,
    "num_videos_per_prompt": 1, "generator": None, "seed": None,
}  # fmt: skip


@dataclass
class VideoPipelineOutput(BaseOutput):
    """Result of a call.

    Attributes:
        frames: uint8 [videos, frames, height, width, 3], or lists of pictures for "pil". Given
            frames stand first, as they were given (at the model's size).
        is_complete: False when the call was interrupted; the frames finished until then are there.
    """

    frames: Any
    is_complete: bool = True


@dataclass
class _Job:
    """A checked request: what runs, what is told when, and what stands at the ends."""

    blocks: VideoBlocks
    prompts: list[list[str]]
    given: NDArray[np.uint8] | None
    last: NDArray[np.uint8] | None
    values: Tensor | None


class VideoPipeline(CallPipeline):
    """Makes videos with any video recipe."""

    _callback_tensor_inputs: ClassVar[list[str]] = list(_CALLBACK_TENSORS)

    @property
    def frames_per_block(self) -> int:
        """Latent frames the model makes together; 1 for models that make single tokens, or all."""
        return frames_per_block(self.model.recipe.layout.block) or 1

    @property
    def trained_frames(self) -> int:
        """Frames of the clips the model was trained on."""
        return self.tokenizer.num_frames(self.model.recipe.layout.frames)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | list[list[str]] = "",
        image: Any = None,
        video: Any = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        actions: Any = None,
        temperature: float | None = None,
        seed: int | None = None,
        last_image: Any = None,
    ) -> VideoPipelineOutput | tuple[Any, ...]:
        """Make videos.

        Args:
            prompt: What happens: one text; a list of texts, one per block of new frames (the last
                goes on when there are more blocks); or a list of such lists, one per video. An
                empty text says nothing.
            image: First frame; a list has one per video. Resampled to the model's size.
            video: First frames to go on from, uint8 [frames, height, width, 3] or a list of
                pictures; a 5-D array has one clip per video. Resampled to the model's size.
            num_frames: Frames in all, the given ones included; None = as many as the model was
                trained on, or the next legal number above the given ones.
            num_inference_steps: Rows per block, 1..1000; None = the recipe's.
            guidance_scale: 1 = off, at most 100; None = the recipe's.
            num_videos_per_prompt: Videos per prompt, 1..64.
            generator: One for all, or one per video; video k depends on its own only.
            output_type: "np" (uint8) or "pil".
            return_dict: False returns a tuple.
            callback_on_step_end: Called (pipe, index, level, tensors) after every row.
            callback_on_step_end_tensor_inputs: Names among latents, is_known.
            actions: What is done on the way to every latent frame, for models that take actions:
                numbers, or the number of the one that is 1. Those of given frames may be left out.
            temperature: 0 = greedy, at most 100; None = the recipe's.
            seed: Used when no generator is given: video k is item k of the seed.
            last_image: Last frame, for models that make all frames together (layout.block "all").

        Returns:
            `frames` and `is_complete`.

        Raises:
            UsageError: a setting outside its range (a ValueError).
        """
        given = {name: value for name, value in locals().items() if name in _DEFAULTS}
        check_one_of("output_type", output_type, OUTPUT_TYPES)
        wanted = callback_on_step_end_tensor_inputs
        for name in wanted:
            check_one_of("callback_on_step_end_tensor_inputs", name, _CALLBACK_TENSORS)
        job, index, parts, is_complete = self._job(prompt, given), 0, [], True
        with self.progress_bar(total=job.blocks.num_parts) as bar:
            for event in self._events(job, lambda: False):
                if event.kind == "row" and callback_on_step_end is not None:
                    tensors = {"latents": event.data["values"], "is_known": event.data["is_known"]}
                    told = {name: tensors[name] for name in wanted}
                    callback_on_step_end(self, index, event.data["level"], told)
                    index += 1
                if event.kind == "decoded":
                    parts.append(event.data["frames"])
                    bar.update(event.data["parts"])
                if event.kind == "done":
                    is_complete = event.data["is_complete"]
        frames = _finished(parts, output_type, len(job.prompts), self.tokenizer.frame_size)
        if not return_dict:
            return (frames, is_complete)
        return VideoPipelineOutput(frames=frames, is_complete=is_complete)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[str] | list[list[str]] = "",
        *,
        should_stop: Callable[[], bool] = lambda: False,
        **settings: Any,
    ) -> Iterator[Event]:
        """Make videos and hand out their frames as soon as they are there.

        Args:
            prompt: As in `__call__`.
            should_stop: Asked after every row; True ends the stream with what is there.
            **settings: Any argument of `__call__` but output_type, return_dict and callbacks.

        Yields:
            Events: row and commit as the rollout reports them; `decoded` with `frames` (the next
            frames, uint8 [videos, frames, height, width, 3]), `is_given` (they were given) and
            `parts` (blocks they finish); and `done` with `is_complete`. All frames together are
            those of `__call__`, bit for bit.

        Raises:
            UsageError: unknown setting, or one outside its range.
        """
        unknown = sorted(set(settings) - set(_DEFAULTS))
        if unknown:
            raise UsageError(describe("stream setting", unknown[0], ", ".join(_DEFAULTS)))
        yield from self._events(self._job(prompt, _DEFAULTS | settings), should_stop)

    # -- the request ------------------------------------------------------------------------

    def _job(self, prompt: Any, given: dict[str, Any]) -> _Job:
        """Check a call and open its rollout."""
        check_numbers(given)
        copies, size = given["num_videos_per_prompt"], tuple(self.tokenizer.frame_size)
        prompts = [texts for texts in prompt_plan(prompt) for _ in range(copies)]
        videos = len(prompts)
        clips = first_frames(given["image"], given["video"], videos, size)
        last = first_frames(given["last_image"], None, videos, size)
        before = 0 if clips is None else clips[0].shape[0]
        frames = self.count_frames(given["num_frames"], before)
        if last is not None and self.tokenizer.temporal_stride != 1:
            raise UsageError("a last frame needs a tokenizer of single frames; leave it out")
        values = self._encoded(clips, videos)
        latents = self.tokenizer.num_latents(frames)
        known = 0 if values is None else values.shape[1]
        width = self.model.recipe.condition.actions
        request = VideoRequest(
            [texts[0] for texts in prompts],
            item_generators(given["generator"], given["seed"], videos),
            latents, values, self._encoded(last, videos),
            told_actions(given["actions"], videos, latents, known, width),
            given["num_inference_steps"], given["guidance_scale"], given["temperature"],
        )  # fmt: skip
        blocks = video_blocks(self.model, request)
        most, new = max(map(len, prompts)), blocks.num_parts - blocks.first
        if most > new:
            raise UsageError(describe("number of prompts", most, f"at most {new}", new))
        self._interrupted = False
        return _Job(blocks, prompts, _stacked(clips, videos), _stacked(last, videos), values)

    def count_frames(self, asked: int | None, before: int = 0) -> int:
        """Check the number of frames of a video, or choose one.

        Args:
            asked: Frames in all; None = as many as the model was trained on, or the next legal
                number above the given ones.
            before: Frames that are given.

        Returns:
            The number.

        Raises:
            UsageError: Not legal; the message names the nearest legal numbers.
        """
        per_block = 1 if sees_the_end(self.model) else self.frames_per_block
        if before:
            check_frames("number of given frames", self.tokenizer, 1, before)
        if asked is not None:
            check_frames("num_frames", self.tokenizer, per_block, asked, before)
            return asked
        return near_counts(self.tokenizer, per_block, max(self.trained_frames, before + 1))[-1]

    def _encoded(self, clips: list[NDArray[np.uint8]] | None, videos: int) -> Tensor | None:
        """Encode given frames, [videos, latent frames, cells, channels]."""
        if clips is None:
            return None
        device, dtype = self.device, self.model.dtype
        values = [self.tokenizer.encode(to_clip(clip).to(device, dtype)) for clip in clips]
        return torch.cat(values if len(values) == videos else values * videos)

    # -- the loop ---------------------------------------------------------------------------

    def _events(self, job: _Job, should_stop: Callable[[], bool]) -> Iterator[Event]:
        """Run the blocks; decode each as soon as it is there."""
        blocks, state = job.blocks, None
        if job.given is not None and job.values is not None:
            _, state = self.tokenizer.decode_chunk(job.values)
            yield self._decoded(blocks, 0, job.given, is_given=True, parts=blocks.first)
        skipped = blocks.request.num_given - blocks.first * blocks.per_part
        for part in range(blocks.num_parts):
            self._tell(job, part)
            for event in blocks.events(part):
                yield event
                if event.kind == "row" and (self._interrupted or should_stop()):
                    yield self._done(blocks, part, is_complete=False)
                    return
            if part >= blocks.first:
                values = blocks.values(part)[:, skipped if part == blocks.first else 0 :]
                frames, state = self._decode(values, state)
                if job.last is not None and part == blocks.num_parts - 1:
                    frames[:, -1:] = job.last
                yield self._decoded(blocks, part, frames, is_given=False, parts=1)
        yield self._done(blocks, blocks.num_parts - 1, is_complete=True)

    def _tell(self, job: _Job, part: int) -> None:
        """Change the prompts where a block begins that has others than the one before."""
        place = part - job.blocks.first
        if place > 0 and any(place < len(texts) for texts in job.prompts):
            job.blocks.set_prompts([texts[min(place, len(texts) - 1)] for texts in job.prompts])

    def _decode(
        self, values: Tensor, state: StreamState | None
    ) -> tuple[NDArray[np.uint8], StreamState]:
        pixels, state = self.tokenizer.decode_chunk(values, state)
        return to_frames(pixels), state

    def _decoded(self, blocks: VideoBlocks, part: int, frames: Any, **data: Any) -> Event:
        return Event("decoded", f"part_{part}", part, blocks.num_parts, {"frames": frames} | data)

    def _done(self, blocks: VideoBlocks, part: int, **data: Any) -> Event:
        return Event("done", "done", part, blocks.num_parts, data)


def _stacked(clips: list[NDArray[np.uint8]] | None, videos: int) -> NDArray[np.uint8] | None:
    """Put given frames side by side, one clip per video."""
    if clips is None:
        return None
    return np.stack(clips if len(clips) == videos else clips * videos)


def _finished(
    parts: list[NDArray[np.uint8]], output_type: str, videos: int, size: tuple[int, int]
) -> Any:
    """Join the parts of a call's result."""
    nothing = np.zeros((videos, 0, *size, 3), np.uint8)
    frames = np.concatenate([nothing, *parts], axis=1)
    if output_type == "np":
        return frames
    return [[Image.fromarray(frame) for frame in video] for video in frames]
