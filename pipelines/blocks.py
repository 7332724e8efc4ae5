"""What pipelines of clips share: the request as blocks, prompts that change, one loop of events.

A pipeline of videos or motions says what is given and how values become frames (`Frames`); the
loop here makes the parts one after the other and hands out each as soon as it is there. It knows
neither pixels nor joints, neither masks nor schedules.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ..core.decoder import Event
from ..core.errors import UsageError, check_one_of, describe
from ..core.recipe import frames_per_block
from ..models.video import VideoBlocks, sees_the_end
from .base import CallPipeline
from .video_checks import check_frames, near_counts

CALLBACK_TENSORS = ("latents", "is_known")


class Frames(ABC):
    """How the values of one request become what its caller sees; remembers where it is."""

    @abstractmethod
    def given(self) -> dict[str, Any] | None:
        """Return the data of the event that hands out the frames that are given, if there are."""

    @abstractmethod
    def made(self, values: Tensor, *, is_last: bool) -> dict[str, Any]:
        """Turn the next values into the data of the event that hands them out.

        Args:
            values: Of new latent frames [items, latent frames, cells, channels], in order.
            is_last: Nothing comes after them.
        """


@dataclass
class Job:
    """A checked request: what runs, what is told when, and how its values become frames.

    Attributes:
        blocks: The parts to make.
        prompts: Texts per item, one per new part; the last goes on.
        frames: Turns values into frames.
    """

    blocks: VideoBlocks
    prompts: list[list[str]]
    frames: Frames

    def __post_init__(self) -> None:
        """Refuse prompts for parts that are not made."""
        most, new = max(map(len, self.prompts)), self.blocks.num_parts - self.blocks.first
        if most > new:
            raise UsageError(describe("number of prompts", most, f"at most {new}", new))


class BlockPipeline(CallPipeline):
    """A pipeline whose clips are made part after part."""

    _callback_tensor_inputs: ClassVar[list[str]] = list(CALLBACK_TENSORS)

    @property
    def frames_per_block(self) -> int:
        """Latent frames the model makes together; 1 for models that make single tokens, or all."""
        return frames_per_block(self.model.recipe.layout.block) or 1

    @property
    def trained_frames(self) -> int:
        """Frames of the clips the model was trained on."""
        return self.tokenizer.num_frames(self.model.recipe.layout.frames)

    def count_frames(self, asked: int | None, before: int = 0) -> int:
        """Check the number of frames of a clip, or choose one.

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

    def _collected(
        self, job: Job, callback: Callable[..., Any] | None, wanted: Sequence[str]
    ) -> tuple[list[dict[str, Any]], bool]:
        """Run a job to its end.

        Args:
            job: The job.
            callback: Called (pipe, index, level, tensors) after every row.
            wanted: Names of the tensors it is given.

        Returns:
            The data of all events that hand out frames, and whether the job was not interrupted.
        """
        for name in wanted:
            check_one_of("callback_on_step_end_tensor_inputs", name, CALLBACK_TENSORS)
        index, parts, is_complete = 0, [], True
        with self.progress_bar(total=job.blocks.num_parts) as bar:
            for event in self._events(job, lambda: False):
                if event.kind == "row" and callback is not None:
                    tensors = {"latents": event.data["values"], "is_known": event.data["is_known"]}
                    told = {name: tensors[name] for name in wanted}
                    callback(self, index, event.data["level"], told)
                    index += 1
                if event.kind == "decoded":
                    parts.append(event.data)
                    bar.update(event.data["parts"])
                if event.kind == "done":
                    is_complete = event.data["is_complete"]
        return parts, is_complete

    def _events(self, job: Job, should_stop: Callable[[], bool]) -> Iterator[Event]:
        """Run the blocks; decode each as soon as it is there."""
        blocks = job.blocks
        self._interrupted = False
        given = job.frames.given()
        if given is not None:
            yield self._decoded(blocks, 0, given, is_given=True, parts=blocks.first)
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
                made = job.frames.made(values, is_last=part == blocks.num_parts - 1)
                yield self._decoded(blocks, part, made, is_given=False, parts=1)
        yield self._done(blocks, blocks.num_parts - 1, is_complete=True)

    def _tell(self, job: Job, part: int) -> None:
        """Change the prompts where a block begins that has others than the one before."""
        place = part - job.blocks.first
        if place > 0 and any(place < len(texts) for texts in job.prompts):
            job.blocks.set_prompts([texts[min(place, len(texts) - 1)] for texts in job.prompts])

    def _decoded(self, blocks: VideoBlocks, part: int, made: dict[str, Any], **data: Any) -> Event:
        return Event("decoded", f"part_{part}", part, blocks.num_parts, made | data)

    def _done(self, blocks: VideoBlocks, part: int, **data: Any) -> Event:
        return Event("done", "done", part, blocks.num_parts, data)


def check_settings(given: dict[str, Any], legal: dict[str, Any]) -> dict[str, Any]:
    """Join the settings of a stream with the defaults.

    Raises:
        UsageError: An unknown setting.
    """
    unknown = sorted(set(given) - set(legal))
    if unknown:
        raise UsageError(describe("stream setting", unknown[0], ", ".join(legal)))
    return legal | given
