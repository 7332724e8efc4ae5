"""What a caller says about a motion, checked and put in the form the models take.

Every refusal is one line that names the nearest legal value. It runs no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from ..core.errors import UsageError, check_range, describe
from ..motion.clip import Motion
from ..motion.features import human_features
from ..motion.ik import solve
from ..motion.skeleton import HUMAN22
from .video_checks import MAX_FRAMES, near_counts

FPS = 20.0
MAX_WHOLE_TOKENS = 4096
"""Tokens of a motion that is laid out whole: attention over more would not fit small machines."""


@dataclass(frozen=True)
class Given:
    """What is kept of a motion, and which of its frames a model is shown.

    Frames are counted from the first one the model sees; `before` stand ahead of it.

    Attributes:
        motion: The motion, with rotations.
        before: Frames that the model is not shown.
        left: Frames kept at the beginning, after `before`.
        right: First frame that is kept again, or None.
        frames: Frames that come out, after `before`.
    """

    motion: Motion
    before: int
    left: int
    right: int | None
    frames: int

    @property
    def seen(self) -> Motion:
        """The motion from the first frame the model sees on."""
        return self.motion.cut(self.before, len(self.motion))


def given_motions(motion: Any, items: int) -> list[Motion]:
    """Read the motions that others go on from.

    Args:
        motion: A `Motion`; joints [frames, 22, 3] in metres, or [items, frames, 22, 3]; or a list
            with one of these per item.
        items: How many motions are made.

    Returns:
        One for all, or one per item, all with rotations.

    Raises:
        UsageError: Another number, other joints or frames per second, or different lengths.
    """
    if isinstance(motion, Tensor):
        motion = motion.numpy(force=True)
    is_batch = isinstance(motion, np.ndarray) and motion.ndim == 4
    clips = list(motion) if isinstance(motion, list | tuple) or is_batch else [motion]
    if len(clips) not in (1, items):
        raise UsageError(describe("number of given motions", len(clips), f"1 or {items}"))
    read = [_as_motion(clip) for clip in clips]
    lengths = sorted({len(clip) for clip in read})
    if len(lengths) > 1:
        raise UsageError(describe("frames of given motions", lengths, "one length for all"))
    return read


def _as_motion(clip: Any) -> Motion:
    """Check one motion; joints alone get the body their bones have, and rotations by IK."""
    if not isinstance(clip, Motion):
        joints = np.asarray(clip)
        legal = f"a Motion, or numbers [frames, {len(HUMAN22)}, 3] in metres"
        shape = joints.shape
        if joints.dtype.kind not in "fiu" or len(shape) != 3 or shape[1:] != (len(HUMAN22), 3):
            got = type(clip).__name__ if joints.dtype == object else f"{joints.dtype} {shape}"
            raise UsageError(describe("motion", got, legal))
        if not len(joints) or not np.isfinite(joints).all():
            got = "numbers that are not finite" if len(joints) else "no frames"
            raise UsageError(describe("motion", got, legal))
        clip = Motion(joints.astype(np.float32), HUMAN22, FPS)
        clip = replace(clip, skeleton=HUMAN22.with_offsets(_bones(clip)))
    if clip.skeleton.names != HUMAN22.names:
        got = ", ".join(clip.skeleton.names[:4]) + " ..."
        legal = "the 22 joints of human22, in order (motion.retarget brings a motion there)"
        raise UsageError(describe("joints of motion", got, legal))
    if abs(clip.fps - FPS) > 1e-6:
        legal = f"{FPS:g} (motion.clip.resample brings a motion there)"
        raise UsageError(describe("fps of motion", clip.fps, legal, FPS))
    if clip.rotations is None:
        turned = solve(clip.skeleton, clip.tensors()[0])
        clip = replace(clip, rotations=turned.float().numpy())
    return clip


def _bones(motion: Motion) -> Float[np.ndarray, "joints 3"]:
    """Give the rest pose's bones the mean lengths that the joints show."""
    joints, offsets = motion.joints.astype(np.float64), HUMAN22.offsets.copy()
    for joint, parent in enumerate(HUMAN22.parents):
        if parent >= 0:
            length = np.linalg.norm(joints[:, joint] - joints[:, parent], axis=-1).mean()
            offsets[joint] *= length / np.linalg.norm(offsets[joint])
    return offsets


def lengthened(motion: Motion, frames: int) -> Motion:
    """Add frames behind a motion, so that `frames` of it have a next one.

    Args:
        motion: It is taken to go on for a frame as it went; then the body stays as it is.
        frames: How many.
    """
    joints = motion.joints
    step = joints[-1] - joints[-2] if len(joints) > 1 else np.zeros_like(joints[-1])
    rest = np.repeat((joints[-1] + step)[None], max(frames + 1 - len(joints), 1), axis=0)
    turned = motion.rotations
    if turned is not None:
        turned = np.concatenate([turned, np.repeat(turned[-1:], len(rest), axis=0)])
    return replace(motion, joints=np.concatenate([joints, rest]), rotations=turned)


def features_of(motion: Motion, frames: int) -> Float[Tensor, "frames features"]:
    """Describe a motion by as many feature frames as it is shown for; see `lengthened`."""
    return torch.from_numpy(human_features(lengthened(motion, frames)))[:frames].double()


def check_span(span: Any, frames: int) -> tuple[int, int]:
    """Check which frames are made anew.

    Args:
        span: First frame, and the frame after the last.
        frames: Of the motion.

    Raises:
        UsageError: Not two whole numbers inside the motion, in order.
    """
    legal = f"(start, end) with 0 <= start < end <= {frames}"
    is_pair = isinstance(span, Sequence) and not isinstance(span, str) and len(span) == 2
    whole = is_pair and all(isinstance(n, int) and not isinstance(n, bool) for n in span)
    if not whole or not 0 <= span[0] < span[1] <= frames:
        hint = None
        if whole:
            start = min(max(span[0], 0), frames - 1)
            hint = (start, min(max(span[1], start + 1), frames))
        raise UsageError(describe("span", span, legal, hint))
    return int(span[0]), int(span[1])


def frames_of(
    num_frames: int | None, seconds: float | None, tokenizer: Any, per_block: int, before: int
) -> int | None:
    """Return the number of frames that is asked for; seconds mean the nearest legal number.

    Raises:
        UsageError: Both, or seconds that are no length.
    """
    if seconds is None:
        return num_frames
    if num_frames is not None:
        raise UsageError("num_frames and seconds both give the length; pass one of them")
    check_range("seconds", seconds, 0, MAX_FRAMES / FPS, open_low=True)
    wanted = round(seconds * FPS) - before
    near = near_counts(tokenizer, per_block, max(wanted, 1))
    return before + min(near, key=lambda count: abs(count - wanted))


def segments_end(prompts: list[list[str]], times: Any, given: dict[str, Any]) -> float | None:
    """Return the length that is asked for: given seconds, or what segments add up to.

    Args:
        prompts: Texts per motion.
        times: As in `text_plan`.
        given: Settings with `seconds` and `motion`, whose own frames come first.
    """
    if times is None or given["seconds"] is not None:
        return given["seconds"]
    longest = max(sum(durations(texts, times)) for texts in prompts)
    if given["motion"] is None:
        return longest
    return longest + len(given_motions(given["motion"], len(prompts))[0]) / FPS


def durations(texts: list[str], times: Any) -> list[float]:
    """Return how long each text lasts, in seconds.

    Raises:
        UsageError: Another number of durations, or one that is not above 0.
    """
    each = list(times) if isinstance(times, list | tuple) else [times] * len(texts)
    if len(each) != len(texts):
        raise UsageError(describe("number of segment_seconds", len(each), str(len(texts))))
    for time in each:
        check_range("segment_seconds", time, 0, MAX_FRAMES / FPS, open_low=True)
    return each


def text_plan(
    prompts: list[list[str]], times: Any, frames_per_part: int, num_parts: int
) -> list[list[str]]:
    """Spread texts over the parts of a motion.

    Args:
        prompts: Texts per motion.
        times: How long each text lasts in seconds: one number, or one per text; None = one part.
        frames_per_part: Frames of a part.
        num_parts: Parts that are made; a last text that would end later is cut off.

    Raises:
        UsageError: As `durations`.
    """
    if times is None:
        return prompts
    planned = []
    for texts in prompts:
        ends = np.cumsum(durations(texts, times)) * FPS / frames_per_part
        parts: list[str] = []
        for text, end in zip(texts, ends, strict=True):
            last = len(parts)
            parts += [text] * max(round(float(end)) - last, 1)
        planned.append(parts[: max(num_parts, last + 1)])
    return planned
