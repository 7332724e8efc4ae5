"""Videos made for visitors: what can be asked for, frames as they come, the file at the end.

A video is made in one thread and its parts are handed out the moment they are decoded. Finished
ones stay for a while, so that they can be fetched as a file with its record.

What it does not know: HTTP, browsers or cookies.
"""

import secrets
import tempfile
import time
from base64 import b64decode
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..commands import clips, models, values
from ..core.errors import DataError, UsageError
from ..core.messages import explain
from ..pipelines.auto import num_actions
from ..pipelines.params import VideoParams
from ..pipelines.world_files import CONTROLS, Starts, read_controls
from . import libraries, world_saves
from .kept import Kept
from .shelf import Shelf, takes_words

MAX_FRAMES, MAX_BYTES = 240, 128 * 2**20
"""Frames of a video, and bytes of all its pixels."""
MAX_SECONDS = 300.0
MAX_KEPT, MAX_OF_ONE, KEEP_SECONDS = 24, 4, 900.0
WIDE = 384
"""Pixels that frames are enlarged to, about, with every pixel a square."""
_MAX_PICTURE = 2**20
_SIDES = 1024


@dataclass
class Film:
    """One video that was asked for.

    Attributes:
        key: What its visitor names it by.
        visitor: Whose it is.
        choice: The model.
        params: What decides its frames; completed while it is made.
        first: First frame, uint8 [height, width, 3] at any size, or None.
        used: When it was last touched, in seconds of the clock.
        parts: Its frames so far, uint8 [frames, height, width, 3] each.
        is_stopped: Whether it should end, or ended early.
        is_over: Whether nothing more will come.
    """

    key: str
    visitor: str
    choice: models.Choice
    params: VideoParams
    first: NDArray[np.uint8] | None
    used: float
    parts: list[NDArray[np.uint8]] = field(default_factory=list)
    is_stopped: bool = False
    is_over: bool = False


class Videos:
    """All videos of one server."""

    def __init__(self, shelf: Shelf, clock: Callable[[], float] = time.monotonic) -> None:
        """Make none yet.

        Args:
            shelf: The models.
            clock: Seconds that only grow.
        """
        self._shelf, self._clock = shelf, clock
        self._kept: Kept[Film] = Kept("video", MAX_KEPT, MAX_OF_ONE, KEEP_SECONDS, clock)

    def offers(self) -> list[dict[str, Any]]:
        """Describe the models that make videos from their small files; those of words first."""
        found = []
        for name in self._shelf.names_of("video"):
            folder, starts = self._shelf.choice(name, "video").folder, self.starts(name)
            found.append(
                {
                    "name": name, "title": self._shelf.label(name), "words": takes_words(folder),
                    "starts": 0 if starts is None else len(starts), "frames": _usual(folder),
                    "acts": num_actions(folder) > 0,
                }
            )  # fmt: skip
        return sorted(found, key=lambda offer: offer["acts"])

    def starts(self, name: Any) -> Starts | None:
        """Return frames that come with a model."""
        return self._shelf.starts(name, "video")

    def picture(self, name: Any, start: Any) -> bytes:
        """Return the last frame of a start as PNG.

        Raises:
            UsageError: No such start.
        """
        return world_saves.png(self._start(name, start))

    def _start(self, name: Any, start: Any) -> NDArray[np.uint8]:
        starts = self.starts(name)
        if starts is None:
            raise UsageError("no first frames come with this model")
        place = _whole("first frame", start, 0, len(starts) - 1)
        frame: NDArray[np.uint8] = starts.frames[place, -1]
        return frame

    # -- asking ---------------------------------------------------------------------------------

    def order(self, visitor: str, asked: dict[str, Any]) -> Film:
        """Check a wish and note it; nothing is made yet.

        Args:
            visitor: Whose it is.
            asked: `model`, `prompt`, `seed`, `frames` and, for the first frame, `start` (a number)
                or `picture` (base64 of a PNG or JPEG file).

        Raises:
            UsageError: A value outside its range.
            DataError: No picture.
            ModelError: No such model.
            ResourceError: Too many are being made for this visitor.
        """
        choice = self._shelf.choice(asked.get("model"), "video")
        prompt = asked.get("prompt", "")
        try:
            words = values.prompt(prompt if isinstance(prompt, str) else "").strip()
        except values.FlagError as error:
            raise UsageError(str(error)) from None
        seed = _whole("seed", asked.get("seed", 0), 0, values.MAX_SEED)
        count = _whole("frames", asked.get("frames", 16), 2, MAX_FRAMES)
        first = None
        if asked.get("picture") is not None:
            first = read_picture(asked["picture"])
        elif asked.get("start") is not None:
            first = self._start(choice.name, asked["start"])
        params = VideoParams(words, seed, choice.name, num_frames=count, fps=_fps(choice.folder))
        film = Film(secrets.token_urlsafe(24), visitor, choice, params, first, self._clock())
        return self._kept.add(film)

    def find(self, visitor: str, key: Any) -> Film:
        """Find a visitor's video.

        Raises:
            Gone: It is not there, or somebody else's.
        """
        return self._kept.find(visitor, key)

    # -- making ---------------------------------------------------------------------------------

    def make(self, film: Film) -> Iterator[dict[str, Any] | NDArray[np.uint8]]:
        """Make a video.

        Args:
            film: From `order`.

        Yields:
            `about` (fps, scale, number of frames, size) first, `row` after every row, frames uint8
            [frames, height, width, 3] as soon as they are decoded, and `done` at the end.

        Raises:
            UsageError: The model cannot do it.
        """
        try:
            libraries.load()
            pipe = as_video(self._shelf.pipe(film.choice.name, "video"))
            film.params = _completed(film, pipe)
            yield _about(film, pipe)
            yield from self._events(film, pipe)
        finally:
            film.is_over, film.used = True, self._clock()

    def _events(self, film: Film, pipe: Any) -> Iterator[dict[str, Any] | NDArray[np.uint8]]:
        began = time.monotonic()

        def should_stop() -> bool:
            return film.is_stopped or time.monotonic() - began > MAX_SECONDS

        settings = {"num_frames": film.params.num_frames, "seed": film.params.seed}
        for event in pipe.stream(
            film.params.prompt, image=film.first, should_stop=should_stop, **settings
        ):
            if event.kind == "row":
                yield {"kind": "row", "block": event.block, "of": event.of_blocks}
            elif event.kind == "decoded":
                frames = event.data["frames"][0]
                film.parts.append(frames)
                yield frames
            elif event.kind == "done":
                film.is_stopped = not event.data["is_complete"]
                seconds = round(time.monotonic() - began, 1)
                count = sum(map(len, film.parts))
                yield {"kind": "done", "whole": not film.is_stopped, "seconds": seconds,
                       "frames": count}  # fmt: skip

    def file(self, film: Film) -> bytes:
        """Write a video as MP4, with its record inside if it is whole.

        Raises:
            UsageError: Nothing of it was made, or no PyAV.
        """
        from ..pipelines.video_media import save_video

        if not film.parts:
            raise UsageError("nothing of this video was made")
        record = film.choice.record(film.params) if film.is_over and not film.is_stopped else None
        frames = np.concatenate(film.parts)
        with tempfile.TemporaryDirectory(prefix="blockloom-video-") as folder:
            path = Path(folder) / "video.mp4"
            fps, scale = film.params.fps or clips.DEFAULT_FPS, film.params.scale
            save_video(frames, path, record, fps=fps, scale=scale, pad=True)
            return path.read_bytes()


def as_video(pipe: Any) -> Any:
    """Return the pipeline of a video model as one that makes whole videos."""
    from ..pipelines.video import VideoPipeline

    return pipe if isinstance(pipe, VideoPipeline) else VideoPipeline(pipe.tokenizer, pipe.model)


def read_picture(text: Any) -> NDArray[np.uint8]:
    """Read a picture that a browser sent as base64.

    Returns:
        uint8 [height, width, 3].

    Raises:
        DataError: No PNG or JPEG, or too large.
    """
    wrong = DataError(explain("this is no picture", allowed="PNG or JPEG"))
    if not isinstance(text, str) or len(text) > _MAX_PICTURE:
        raise wrong
    try:
        content = b64decode(text, validate=True)
        with Image.open(BytesIO(content), formats=("PNG", "JPEG")) as image:
            if max(image.size) > _SIDES:
                raise DataError(explain("this picture is too large", allowed=f"{_SIDES} pixels"))
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, DataError):
            raise
        raise wrong from None


def _completed(film: Film, pipe: Any) -> VideoParams:
    """Fill in what only the loaded model tells: a legal number of frames, size and hashes."""
    from ..pipelines.video_checks import near_counts

    height, width = pipe.tokenizer.frame_size
    given = 0 if film.first is None else 1
    asked = film.params.num_frames or pipe.trained_frames
    count = near_counts(pipe.tokenizer, pipe.frames_per_block, max(asked, given + 1))[-1]
    if count * height * width * 3 > MAX_BYTES:
        most = MAX_BYTES // (height * width * 3)
        raise UsageError(explain("frames", got=count, allowed=f"at most {most} of this size"))
    digest = None
    if film.first is not None:
        digest = clips.digest(clips.at_model_size(film.first[None], pipe))
    scale = max(1, min(8, round(WIDE / width)))
    return replace(film.params, num_frames=count, given=given, input_sha256=digest, scale=scale)


def _about(film: Film, pipe: Any) -> dict[str, Any]:
    height, width = pipe.tokenizer.frame_size
    told = film.params
    return {"kind": "about", "key": film.key, "fps": told.fps, "height": height, "width": width,
            "frames": told.num_frames, "scale": told.scale}  # fmt: skip


def _whole(name: str, given: Any, low: int, high: int) -> int:
    try:
        return int(values.whole(name, low, high)(str(given)[:30].strip()))
    except values.FlagError as error:
        raise UsageError(str(error)) from None


def _usual(folder: Path) -> int:
    """Return how many (latent) frames the model was trained on."""
    count = models.layout_of(folder).get("frames")
    return min(max(count, 2), MAX_FRAMES) if isinstance(count, int) else 16


def _fps(folder: Path) -> float:
    if (folder / CONTROLS).is_file():
        return read_controls(folder, num_actions(folder)).fps
    return clips.DEFAULT_FPS
