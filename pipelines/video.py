"""Words, a first frame or a first clip to video, block by block, as a diffusers pipeline.

`pipe(...)` collects what `pipe.stream(...)` hands out while it is made, so both give the same
frames. It knows neither masks nor schedules.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ..core.decoder import Event
from ..core.errors import UsageError, check_one_of, describe
from ..models.video import VideoRequest, video_blocks
from ..tokenizers.structure import structure_tokens
from ..tokenizers.video_base import StreamState
from .base import item_generators
from .blocks import BlockPipeline, Frames, Job, check_settings
from .clip_frames import to_clip, to_frames
from .video_checks import (
    check_numbers,
    first_frames,
    prompt_plan,
    structure_maps,
    told_actions,
)

OUTPUT_TYPES = ("np", "pil")
_DEFAULTS: dict[str, Any] = {
    "image": None, "video": None, "last_image": None, "num_frames": None, "actions": None,
    "structure": None,
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


class _Pixels(Frames):
    """Decodes values chunk by chunk; given frames stand as they were given."""

    def __init__(
        self, tokenizer: Any, given: NDArray[np.uint8] | None, last: NDArray[np.uint8] | None,
        values: Tensor | None,
    ) -> None:  # fmt: skip
        self._tokenizer, self._given, self._last, self._values = tokenizer, given, last, values
        self._state: StreamState | None = None

    def given(self) -> dict[str, Any] | None:
        """Hand out the given frames; the decoder takes them in as its past."""
        if self._given is None or self._values is None:
            return None
        _, self._state = self._tokenizer.decode_chunk(self._values)
        return {"frames": self._given}

    def made(self, values: Tensor, *, is_last: bool) -> dict[str, Any]:
        """Decode; a given last frame replaces the last."""
        pixels, self._state = self._tokenizer.decode_chunk(values, self._state)
        frames = to_frames(pixels)
        if self._last is not None and is_last:
            frames[:, -1:] = self._last
        return {"frames": frames}


class VideoPipeline(BlockPipeline):
    """Makes videos with any video recipe."""

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
        structure: Any = None,
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
            structure: What every frame, the given ones included, looks like, for models that are
                guided by it: a clip as for `video`, of which the model's map is taken, or maps in
                [0, 1], float [frames, height, width]. Their number is that of the video's frames.

        Returns:
            `frames` and `is_complete`.

        Raises:
            UsageError: a setting outside its range (a ValueError).
        """
        given = {name: value for name, value in locals().items() if name in _DEFAULTS}
        check_one_of("output_type", output_type, OUTPUT_TYPES)
        job = self._job(prompt, given)
        parts, is_complete = self._collected(
            job, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        frames = _finished(
            [part["frames"] for part in parts],
            output_type,
            len(job.prompts),
            self.tokenizer.frame_size,
        )
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
        job = self._job(prompt, check_settings(settings, _DEFAULTS))
        yield from self._events(job, should_stop)

    # -- the request ------------------------------------------------------------------------

    def _job(self, prompt: Any, given: dict[str, Any]) -> Job:
        """Check a call and open its rollout."""
        check_numbers(given)
        copies, size = given["num_videos_per_prompt"], tuple(self.tokenizer.frame_size)
        prompts = [texts for texts in prompt_plan(prompt) for _ in range(copies)]
        videos = len(prompts)
        clips = first_frames(given["image"], given["video"], videos, size)
        last = first_frames(given["last_image"], None, videos, size)
        before = 0 if clips is None else clips[0].shape[0]
        kind = self.model.recipe.condition.structure
        maps = structure_maps(given["structure"], videos, kind, size)
        asked = given["num_frames"]
        asked = maps.shape[1] if asked is None and maps is not None else asked
        frames = self.count_frames(asked, before)
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
            self._shown(maps, frames),
        )  # fmt: skip
        blocks = video_blocks(self.model, request)
        stacked = _stacked(clips, videos), _stacked(last, videos)
        return Job(blocks, prompts, _Pixels(self.tokenizer, *stacked, values))

    def _shown(self, maps: Tensor | None, frames: int) -> Tensor | None:
        """Cut structure maps into what tokens are told."""
        if maps is None:
            return None
        if maps.shape[1] != frames:
            raise UsageError(describe("number of structure maps", maps.shape[1], str(frames)))
        size = self.model.recipe.condition.structure_size
        return structure_tokens(maps.to(self.device, self.model.dtype), self.tokenizer, size)

    def _encoded(self, clips: list[NDArray[np.uint8]] | None, videos: int) -> Tensor | None:
        """Encode given frames, [videos, latent frames, cells, channels]."""
        if clips is None:
            return None
        device, dtype = self.device, self.model.dtype
        values = [self.tokenizer.encode(to_clip(clip).to(device, dtype)) for clip in clips]
        return torch.cat(values if len(values) == videos else values * videos)


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
