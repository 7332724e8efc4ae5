"""Motions made for visitors: what can be asked for, poses as they come, changes, what is kept.

A motion is made in one thread and its poses are handed out the moment they are there. Finished
ones stay for a while, so that they can be changed, gone on with, or fetched as a file.

What it does not know: HTTP, browsers, cookies, or file formats (`motion_files`).
"""

import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..commands import models, values
from ..commands.motions import FPS
from ..core.errors import UsageError
from ..core.legality import frames_per_block
from ..core.messages import explain
from ..pipelines.params import MotionParams, Record
from . import libraries
from .kept import Kept
from .motion_files import FORMS, MAX_UPLOAD, read, write
from .motion_plan import MAX_SECONDS, STEP, Plan, Wish, about, cut_parts, params_of, planned
from .shelf import Shelf, takes_words

MAX_PARTS, MAX_FRAMES = 8, 2400
MAX_KEPT, MAX_OF_ONE, KEEP_SECONDS = 48, 8, 1800.0
MAX_MAKING_SECONDS = 300.0
MAX_GUIDANCE, MAX_TEMPERATURE = 20.0, 10.0
EXAMPLES = (
    ("walk",), ("dance",), ("jump",), ("swing a sword",), ("walk", "jump", "stand idle"),
)  # fmt: skip
"""What happens, part after part; words that the captions of most motion sets know."""


@dataclass
class Take:
    """One motion that was asked for, or opened from a file.

    Attributes:
        key: What its visitor names it by.
        visitor: Whose it is.
        choice: The model.
        wish: What is asked for; None for a motion that was opened.
        used: When it was last touched, in seconds of the clock.
        plan: How it is made; set while it is made.
        pieces: Joints and rotations so far.
        parts: What happens when, for the time line.
        given: A motion that was opened.
        is_stopped: Whether it should end, or ended early.
        is_over: Whether nothing more will come.
    """

    key: str
    visitor: str
    choice: models.Choice
    wish: Wish | None
    used: float
    plan: Plan | None = None
    pieces: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = field(default_factory=list)
    parts: list[dict[str, Any]] = field(default_factory=list)
    given: Any = None
    is_stopped: bool = False
    is_over: bool = False

    @property
    def frames(self) -> int:
        """Frames so far."""
        if self.given is not None:
            return len(self.given)
        return sum(len(joints) for joints, _ in self.pieces)

    def motion(self) -> Any:
        """Return what there is as a `Motion`.

        Raises:
            UsageError: Nothing of it was made.
        """
        from ..motion.clip import Motion

        if self.given is not None:
            return self.given
        if not self.pieces or self.plan is None:
            raise UsageError("nothing of this motion was made")
        joints, rotations = (np.concatenate(arrays) for arrays in zip(*self.pieces, strict=True))
        text = "; ".join(dict.fromkeys(part["text"] for part in self.parts if part["text"]))
        return Motion(joints, self.plan.skeleton, self.plan.fps, rotations, text)


class Motions:
    """All motions of one server."""

    def __init__(self, shelf: Shelf, clock: Callable[[], float] = time.monotonic) -> None:
        """Make none yet.

        Args:
            shelf: The models.
            clock: Seconds that only grow.
        """
        self._shelf, self._clock = shelf, clock
        self._kept: Kept[Take] = Kept("motion", MAX_KEPT, MAX_OF_ONE, KEEP_SECONDS, clock)

    def offers(self) -> list[dict[str, Any]]:
        """Describe the models that make motions from their small files, ready for JSON."""
        return [self._offer(name) for name in self._shelf.names_of("motion")]

    def _offer(self, name: str) -> dict[str, Any]:
        folder = self._shelf.choice(name, "motion").folder
        schedule = models.recipe_of(folder).get("schedule", {})
        seconds = _usual_seconds(models.layout_of(folder))
        return {
            "name": name, "title": self._shelf.label(name),
            "both": models.sees_the_end(folder), "words": takes_words(folder),
            "guidance": f"{schedule.get('guidance_scale', 1.0):g}",
            "temperature": f"{schedule.get('temperature', 1.0):g}",
            "seconds": seconds, "step": STEP, "unit": STEP * _together(folder),
            "parts": MAX_PARTS, "kept": MAX_OF_ONE - 2, "upload": MAX_UPLOAD,
            "examples": [_example(texts, seconds) for texts in EXAMPLES],
        }  # fmt: skip

    # -- asking ---------------------------------------------------------------------------------

    def order(self, visitor: str, asked: dict[str, Any]) -> Take:
        """Check a wish and note it; nothing is made yet.

        Args:
            visitor: Whose it is.
            asked: `model`, `seed`, `parts` (a list of `text` and `seconds`); may have `guidance`,
                `temperature`; and, to change a motion, its key as `base` with `span` (first frame
                made anew and the one after the last) or `from` (all frames from there on).

        Raises:
            UsageError: A value outside its range.
            Gone: The motion to change is not there.
            ModelError: No such model.
            ResourceError: Too many are being made for this visitor.
        """
        choice = self._shelf.choice(asked.get("model"), "motion")
        wish = Wish(
            *_parts(asked.get("parts")),
            seed=_number("seed", asked.get("seed", 0), 0, values.MAX_SEED, whole=True),
            guidance=_setting("guidance", asked.get("guidance"), MAX_GUIDANCE),
            temperature=_setting("temperature", asked.get("temperature"), MAX_TEMPERATURE),
        )
        if asked.get("base") is not None:
            wish = self._changing(visitor, wish, asked)
        return self._kept.add(Take(secrets.token_urlsafe(24), visitor, choice, wish, self._clock()))

    def _changing(self, visitor: str, wish: Wish, asked: dict[str, Any]) -> Wish:
        """Add to a wish what is changed and where."""
        base = self.find(visitor, asked["base"])
        if not base.is_over:
            raise UsageError("this motion is still being made; wait or stop it first")
        motion, span = base.motion(), asked.get("span")
        wish = replace(wish, base=motion, base_parts=tuple(base.parts))
        if span is None:
            start = _number("from", asked.get("from"), 1, len(motion), whole=True)
            return replace(wish, start=start)
        if not isinstance(span, list) or len(span) != 2:
            raise UsageError(explain("span", got="something else", allowed="two frames"))
        first, last = (_number("span", frame, 0, len(motion), whole=True) for frame in span)
        if last - first < STEP:
            least = STEP
            raise UsageError(explain("span", got=f"{first} to {last}", allowed=f"{least} frames"))
        return replace(wish, span=(first, last))

    def open(self, visitor: str, name: Any, content: bytes) -> Take:
        """Take in a BVH file.

        Args:
            visitor: Whose it is.
            name: The model it will be changed with.
            content: The file; it may hold anything.

        Raises:
            DataError: No BVH file of a body that we know.
            ModelError: No such model.
        """
        choice = self._shelf.choice(name, "motion")
        libraries.load()
        motion = read(content)
        take = Take(secrets.token_urlsafe(24), visitor, choice, None, self._clock())
        take.given, take.is_over = motion, True
        take.parts = [{"from": 0, "to": len(motion), "text": motion.text, "given": True}]
        return self._kept.add(take)

    def file(self, take: Take, form: Any) -> bytes:
        """Write a motion as a file, with its record inside if it is whole.

        Args:
            take: From `find`.
            form: One of `FORMS`.

        Raises:
            UsageError: No such form, nothing was made, or what writes it is not installed.
        """
        try:
            kind = values.one_of("form", FORMS)(str(form)[:30])
        except values.FlagError as error:
            raise UsageError(str(error)) from None
        libraries.load()
        return write(take.motion(), kind, record_of(take))

    def find(self, visitor: str, key: Any) -> Take:
        """Find a visitor's motion.

        Raises:
            Gone: It is not there, or somebody else's.
        """
        return self._kept.find(visitor, key)

    # -- making ---------------------------------------------------------------------------------

    def make(self, take: Take) -> Iterator[dict[str, Any] | NDArray[np.float32]]:
        """Make a motion, or show one that was opened.

        Args:
            take: From `order` or `open`.

        Yields:
            `about` first (fps, frames, the body, the parts, the first new frame), `row` after every
            row, joints float32 [frames, joints, 3] as soon as they are there, `done` at the end.

        Raises:
            UsageError: The model cannot do it.
        """
        began = time.monotonic()
        try:
            if take.given is not None:
                opened = take.given
                take.plan = Plan(opened.skeleton, opened.fps, len(opened), 0, take.parts, [])
                yield about(take.key, take.plan)
                yield opened.joints
            else:
                yield from self._made(take, began)
            take.parts = cut_parts(take.parts, take.frames)
            yield {"kind": "done", "whole": not take.is_stopped, "frames": take.frames,
                   "seconds": round(time.monotonic() - began, 1), "parts": take.parts}  # fmt: skip
        finally:
            take.is_over, take.used = True, self._clock()

    def _made(self, take: Take, began: float) -> Iterator[dict[str, Any] | NDArray[np.float32]]:
        assert take.wish is not None

        def should_stop() -> bool:
            return take.is_stopped or time.monotonic() - began > MAX_MAKING_SECONDS

        libraries.load()
        pipe = self._shelf.pipe(take.choice.name, "motion")
        take.plan = plan = planned(pipe, take.wish)
        if plan.frames > MAX_FRAMES:
            most = f"{MAX_FRAMES / plan.fps:g} s in all"
            raise UsageError(explain("length", got=f"{plan.frames / plan.fps:g} s", allowed=most))
        take.parts = plan.parts
        yield about(take.key, plan)
        block = rows = 0
        for call in plan.calls:
            if take.is_stopped:
                return
            for event in call.events(pipe, take.motion, should_stop):
                if event.kind == "row":
                    rows = rows + 1 if event.block == block else 1
                    block = event.block
                    yield {"kind": "row", "block": block, "of": event.of_blocks, "step": rows}
                elif event.kind == "decoded":
                    take.pieces.append((event.data["joints"][0], event.data["rotations"][0]))
                    yield take.pieces[-1][0]
                elif event.kind == "done":
                    # A stop ends what is still to come; of the last call only one that cut it.
                    is_early = take.is_stopped and call is not plan.calls[-1]
                    take.is_stopped = is_early or not event.data["is_complete"]


def record_of(take: Take) -> Record[MotionParams] | None:
    """Return what made a motion, or None for one that was opened, ended early, or failed."""
    if take.wish is None or take.plan is None or take.is_stopped or not take.is_over:
        return None
    if take.frames != take.plan.frames:
        return None
    return take.choice.record(params_of(take.plan, take.choice.name, take.motion()))


def _parts(given: Any) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Check what happens part after part; returns texts and seconds.

    Raises:
        UsageError: No list of parts, or one outside its range.
    """
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_PARTS:
        count = len(given) if isinstance(given, list) else type(given).__name__
        raise UsageError(explain("parts", got=str(count), allowed=f"1 to {MAX_PARTS}"))
    texts, seconds = [], []
    for part in given:
        if not isinstance(part, dict):
            raise UsageError(explain("part", got=type(part).__name__, allowed="text and seconds"))
        text = part.get("text", "")
        try:
            texts.append(values.prompt(text if isinstance(text, str) else "").strip())
        except values.FlagError as error:
            raise UsageError(str(error)) from None
        seconds.append(_number("seconds", part.get("seconds", 4), 0.2, MAX_SECONDS))
    if sum(seconds) > MAX_SECONDS:
        raise UsageError(
            explain("seconds in all", got=f"{sum(seconds):g}", allowed=f"at most {MAX_SECONDS:g}")
        )
    return tuple(texts), tuple(seconds)


def _number(name: str, given: Any, low: float, high: float, *, whole: bool = False) -> Any:
    text = str(given)[:30].strip()
    check: Any = values.whole(name, int(low), int(high)) if whole else values.real(name, low, high)
    try:
        return check(text)
    except values.FlagError as error:
        raise UsageError(str(error)) from None


def _setting(name: str, given: Any, most: float) -> float | None:
    return None if given is None else _number(name, given, 0.0, most)


def _usual_seconds(layout: dict[str, Any]) -> float:
    """Return how long the clips were that a model was trained on, 2 to 6 seconds."""
    frames = layout.get("frames")
    return min(max(frames * STEP / FPS, 2.0), 6.0) if isinstance(frames, int) else 4.0


def _together(folder: Path) -> int:
    """Return how many latent frames a model makes together, and keeps together of a base."""
    return frames_per_block(models.layout_of(folder).get("block", "")) or 1


def _example(texts: tuple[str, ...], seconds: float) -> dict[str, Any]:
    parts = [{"text": text, "seconds": seconds} for text in texts]
    return {"title": ", then ".join(texts), "parts": parts}
