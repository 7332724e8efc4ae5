"""From a visitor's wish to calls of the motion pipeline, and what a player must know beforehand.

Models that make frames in order get all parts of a wish in one call; models that make all frames
together make part after part, each going on from those before. It knows no visitors and no files.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..commands import motions, values
from ..core.errors import UsageError
from ..core.messages import explain
from ..pipelines.params import MotionParams

if TYPE_CHECKING:
    from ..motion.clip import Motion
    from ..motion.skeleton import Skeleton

MAX_SECONDS = 60.0
"""Longest wish."""
STEP = 4
"""Frames that the page lets visitors choose together: those of a latent frame, mostly."""


@dataclass(frozen=True)
class Wish:
    """What is asked for, checked as far as it can be without a model.

    Attributes:
        texts: What happens, part after part.
        seconds: How long each part lasts.
        seed: Of the first call; further calls have the next numbers.
        guidance: 1 = off; None = the recipe's.
        temperature: 0 = greedy; None = the recipe's.
        base: The motion that is changed or gone on with, or None.
        base_parts: What happens in it.
        start: First frame that is not kept of the base, where it is gone on with.
        span: Frames of the base that are made anew, first and the one after the last.
    """

    texts: tuple[str, ...]
    seconds: tuple[float, ...]
    seed: int
    guidance: float | None = None
    temperature: float | None = None
    base: "Motion | None" = None
    base_parts: tuple[dict[str, Any], ...] = ()
    start: int | None = None
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class Call:
    """One call of the pipeline.

    Attributes:
        prompts: One for all, or one per block of new frames.
        settings: Further arguments.
        motion: What is kept of, unless it is what was made before.
        goes_on: It goes on from what the calls before it made.
    """

    prompts: tuple[str, ...]
    settings: dict[str, Any]
    motion: "Motion | None" = None
    goes_on: bool = False

    def events(
        self, pipe: Any, made: "Callable[[], Motion]", should_stop: Callable[[], bool]
    ) -> Iterator[Any]:
        """Run the call and hand on its events, but not the frames that calls before it made.

        Args:
            pipe: A `MotionPipeline`.
            made: Gives what the calls before it made.
            should_stop: Asked after every row.
        """
        motion = made() if self.goes_on else self.motion
        prompt = self.prompts[0] if len(self.prompts) == 1 else list(self.prompts)
        for event in pipe.stream(prompt, motion=motion, should_stop=should_stop, **self.settings):
            if not (self.goes_on and event.kind == "decoded" and event.data["is_given"]):
                yield event


@dataclass(frozen=True)
class Plan:
    """How a wish is made.

    Attributes:
        skeleton: The body.
        fps: Frames per second.
        frames: How many come out.
        first: The first new one.
        parts: What happens when: `from`, `to` (frames), `text`, `given` (it was there before).
        calls: What is called, one after the other.
    """

    skeleton: "Skeleton"
    fps: float
    frames: int
    first: int
    parts: list[dict[str, Any]]
    calls: list[Call]


def planned(pipe: Any, wish: Wish) -> Plan:
    """Plan a wish for a loaded model.

    Args:
        pipe: A `MotionPipeline`.
        wish: The wish.

    Raises:
        UsageError: A motion that is too short to go on from, or a span that keeps nothing.
    """
    skeleton = pipe.skeleton if wish.base is None else wish.base.skeleton
    settings = {"guidance_scale": wish.guidance, "temperature": wish.temperature}
    if wish.base is not None and wish.span is not None:
        frames, (start, end) = len(wish.base), wish.span
        if not start and end == frames:
            raise UsageError("the span is the whole motion; press Make for another one")
        parts = around(wish.base_parts, wish.span, [_part(start, end, wish.texts[0])])
        call = Call(wish.texts[:1], settings | {"seed": wish.seed, "span": wish.span}, wish.base)
        return Plan(skeleton, pipe.fps, frames, start, parts, [call])
    unit = pipe.tokenizer.step_frames * (1 if pipe.can_infill else pipe.frames_per_block)
    kept = None
    if wish.base is not None:
        kept = wish.base.cut(0, _whole_start(wish, unit, pipe.fps))
    first = 0 if kept is None else len(kept)
    marks = [first + unit * mark for mark in _marks(wish.seconds, pipe.fps / unit)]
    new = [
        _part(start, end, text)
        for text, start, end in zip(wish.texts, marks[:-1], marks[1:], strict=True)
    ]
    parts = around(wish.base_parts, (first, marks[-1]), new, is_end=True)
    if pipe.can_infill:
        ways = [settings | {"seed": (wish.seed + k) % (values.MAX_SEED + 1), "num_frames": end}
                for k, end in enumerate(marks[1:])]  # fmt: skip
        calls = [
            Call((text,), way, None if k else kept, goes_on=k > 0)
            for k, (text, way) in enumerate(zip(wish.texts, ways, strict=True))
        ]
    else:
        blocks = np.diff(marks) // unit
        prompts = [text for text, n in zip(wish.texts, blocks, strict=True) for _ in range(n)]
        told = settings | {"seed": wish.seed, "num_frames": marks[-1]}
        calls = [Call(wish.texts if len(wish.texts) == 1 else tuple(prompts), told, kept)]
    return Plan(skeleton, pipe.fps, marks[-1], first, parts, calls)


def _whole_start(wish: Wish, unit: int, fps: float) -> int:
    """Return how many frames of the base are kept: whole steps of the model."""
    assert wish.base is not None
    start = (wish.start or len(wish.base)) // unit * unit or unit
    if start > len(wish.base):
        got, least = f"{len(wish.base) / fps:g} s", f"at least {unit / fps:g} s"
        raise UsageError(explain("motion to go on from", got=got, allowed=least))
    return start


def _marks(seconds: Sequence[float], units_per_second: float) -> list[int]:
    """Return where parts begin and the last ends, in steps of the model; each has one at least."""
    marks, end = [0], 0.0
    for length in seconds:
        end += length
        marks.append(max(marks[-1] + 1, round(end * units_per_second)))
    return marks


def _part(start: int, end: int, text: str, *, is_given: bool = False) -> dict[str, Any]:
    return {"from": start, "to": end, "text": text, "given": is_given}


def around(
    old: Sequence[dict[str, Any]], span: tuple[int, int], new: Sequence[dict[str, Any]],
    *, is_end: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """Put new parts in the place of a span of old ones, which count as given from then on.

    Args:
        old: Parts.
        span: First frame that is new, and the one after the last.
        new: Parts that fill the span.
        is_end: Nothing old comes after the span.
    """
    start, end = span
    left = cut_parts(old, start)
    right = [] if is_end else [part | {"from": max(part["from"], end)} for part in old]
    kept = [[part | {"given": True} for part in side if part["from"] < part["to"]]
            for side in (left, right)]  # fmt: skip
    return [*kept[0], *new, *kept[1]]


def cut_parts(parts: Sequence[dict[str, Any]], frames: int) -> list[dict[str, Any]]:
    """Return the parts of a motion that ends after some frames."""
    return [p | {"to": min(p["to"], frames)} for p in parts if p["from"] < frames]


def params_of(plan: Plan, model: str, made: "Motion") -> MotionParams:
    """Return what decides a motion: the last call, and what it was given.

    Args:
        plan: How it was made.
        model: The model's name.
        made: The whole motion.
    """
    call = plan.calls[-1]
    given = made.cut(0, plan.parts[-1]["from"]) if call.goes_on else call.motion
    told, span = call.settings, call.settings.get("span")
    return MotionParams(
        call.prompts[0], told["seed"], model,
        prompts=list(call.prompts) if len(call.prompts) > 1 else None,
        num_frames=told.get("num_frames"), span=None if span is None else list(span),
        given=0 if given is None else len(given),
        input_sha256=None if given is None else motions.digest(given),
        guidance_scale=told["guidance_scale"], temperature=told["temperature"],
    )  # fmt: skip


def about(key: str, plan: Plan) -> dict[str, Any]:
    """Tell a player what it must know before the first frame."""
    return {
        "kind": "about", "key": key, "fps": plan.fps, "frames": plan.frames, "from": plan.first,
        "parts": plan.parts, "body": body_of(plan.skeleton),
    }  # fmt: skip


def body_of(skeleton: "Skeleton") -> dict[str, Any]:
    """Describe a skeleton to a player: its bones, how thick they are, on which side."""
    from ..motion.look import bone_radius, bones_of, head_of, height_of, side_of

    height, head = height_of(skeleton), head_of(skeleton)
    bones = [
        {"joint": joint, "parent": parent, "side": side_of(skeleton.names[joint]),
         "radius": round(bone_radius(skeleton, joint, height), 4)}
        for parent, joint in bones_of(skeleton)
    ]  # fmt: skip
    return {
        "parents": list(skeleton.parents), "bones": bones, "height": round(height, 4),
        "head": None if head is None else head[0], "headRadius": 0 if head is None else head[1],
    }  # fmt: skip
