"""One run: the pipeline's events as frames that can be shown.

What it does not know: browsers, queues, or who asked.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from ..commands.edit import keep_mask, region_box
from ..commands.models import call_settings
from ..pipelines.params import ImageParams

MIN_SECONDS_BETWEEN_FRAMES = 0.1
MAX_SECONDS = 300.0


@dataclass(frozen=True)
class Frame:
    """What can be shown at one moment.

    Attributes:
        images: The pictures so far, one per set of parameters; empty before the first row.
        done: Rows of the schedule that are done, over all blocks.
        total: Rows in all.
        line: The same in words.
        kind: drawing, done or stopped.
    """

    images: list[Image.Image]
    done: int
    total: int
    line: str
    kind: str = "drawing"


class _Progress:
    """Counts rows of the schedule: blocks times rows per block."""

    def __init__(self) -> None:
        self.done, self.total, self.place = 0, 1, ""

    def see(self, event: Any) -> None:
        rows, row = event.data["of_rows"], event.data["row"] + 1
        self.done, self.total = event.block * rows + row, event.of_blocks * rows
        self.place = f"block {event.block + 1} of {event.of_blocks}, step {row} of {rows}"


def draw(
    pipe: Any,
    pictures: Sequence[ImageParams],
    should_stop: Callable[[], bool],
    edited: Image.Image | None = None,
) -> Iterator[Frame]:
    """Draw pictures that share their settings, frame by frame.

    Args:
        pipe: A loaded pipeline.
        pictures: One entry per picture; all but the seeds are equal.
        should_stop: Asked before every row; True ends the run with what is there.
        edited: Picture of which `region` is redrawn.

    Yields:
        At most ten frames a second, then one of kind done or stopped.
    """
    from ..core.sampling import item_generator

    began, shown, progress = time.monotonic(), 0.0, _Progress()
    events = pipe.stream(
        [params.full_prompt for params in pictures],
        generator=[item_generator(params.seed, 0) for params in pictures],
        should_stop=lambda: should_stop() or time.monotonic() - began > MAX_SECONDS,
        **call_settings(pictures[0]),
        **_edit_settings(pipe, pictures[0], edited),
    )
    for event in events:
        now = time.monotonic()
        if event.kind == "row":
            progress.see(event)
        elif event.kind == "decoded" and now - shown >= MIN_SECONDS_BETWEEN_FRAMES:
            shown = now
            line = progress.place.capitalize()
            yield Frame(event.data["images"], progress.done, progress.total, line)
        elif event.kind == "done":
            yield _last(event, progress, now - began)


def _edit_settings(pipe: Any, params: ImageParams, edited: Image.Image | None) -> dict[str, Any]:
    if edited is None:
        return {}
    box = region_box(params.region or "", edited.width, edited.height)
    return {"image": edited, "keep": keep_mask(box, edited.size, pipe.tokenizer.image_size)}


def _last(event: Any, progress: _Progress, seconds: float) -> Frame:
    """Describe the end: whole pictures, or what a stop left."""
    images = event.data["images"]
    if event.data["is_complete"]:
        word = "1 picture" if len(images) == 1 else f"{len(images)} pictures"
        line = f"Done: {word} in {seconds:.1f} s"
        return Frame(images, progress.total, progress.total, line, "done")
    if not progress.done:
        return Frame([], 0, progress.total, "Stopped before the first step", "stopped")
    why = "Time is up" if seconds > MAX_SECONDS else "Stopped"
    line = f"{why} at {progress.place}; kept"
    return Frame(images, progress.done, progress.total, line, "stopped")
