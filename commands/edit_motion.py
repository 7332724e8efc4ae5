"""`blockloom edit motion`: redraw a span of a motion, go on with it, or fill in between its ends.

What it does not know: how poses are made or files written (`motions`, `generate_motion`).
"""

from dataclasses import replace
from typing import Any

from ..core.errors import DataError, UsageError
from ..core.messages import explain
from ..pipelines.params import MotionParams, Record
from . import clips, models, motions, output
from .arguments import Edit
from .edit_video import check_sees_the_end
from .generate import named_model, warn_when_different
from .generate_motion import REFUSED, base_params, read_given
from .values import MAX_FRAMES

END_FRAMES = 4
"""Frames at each end that `--between` keeps: what the shortest step of a tokenizer holds."""


def run(args: Edit) -> int:
    """Make, write, and print one path per file.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    output.refuse_flags(args, (*REFUSED, "region"), "edit motion")
    if args.input is None:
        raise UsageError(
            explain("no input motion given", hint="blockloom edit motion in.bvh --span 2.0-4.0")
        )
    wishes = (args.span, args.continue_frames, args.between_frames)
    earlier = motions.earlier_record(args.params_from)
    if sum(wish is not None for wish in wishes) != 1 and not (earlier and not any(wishes)):
        allowed = "one of --span START-END, --continue N and --between N"
        raise UsageError(explain("say what to do", allowed=allowed))
    place = motions.plan(args.out, 1, args.formats)
    motion = read_given(args.input)
    choice = clips.choose(*named_model(args, earlier), motions.DEFAULT_MODEL, "motion")
    warn_when_different(choice, earlier)
    motion, changes = _asked(args, motion, choice, earlier)
    base = base_params(args, choice, earlier)
    if args.prompt is not None:
        base = replace(base, prompts=None, segment_seconds=None)
    device = models.pick_device(args.device, base.dtype)
    output.ensure_writable(place.target.folder)
    pipe = models.open_model(choice, device, base.dtype)
    sha256 = motions.digest(motion)
    if earlier is not None and earlier.params.input_sha256 not in (None, sha256):
        output.note("warning: another input than that of the file; the motion will differ")
    params = replace(base, input_sha256=sha256, given=len(motion), **changes)
    motions.make_all(args, pipe, choice, place, [params], motion)
    return 0


def _asked(
    args: Edit, motion: Any, choice: models.Choice, earlier: Record[MotionParams] | None
) -> tuple[Any, dict[str, Any]]:
    """Turn the flags into the motion that is given, its new length and the span to redraw."""
    if args.span is not None:
        start, end = span_frames(args.span, len(motion))
        if end < len(motion):
            hint = f"--span {start / motions.FPS:g}-{len(motion) / motions.FPS:g}"
            check_sees_the_end(choice, "--span", hint)
        return motion, {"num_frames": None, "span": [start, end]}
    if args.continue_frames is not None:
        return motion, {"num_frames": len(motion) + args.continue_frames, "span": None}
    if args.between_frames is not None:
        check_sees_the_end(choice)
        return between(motion, args.between_frames)
    assert earlier is not None
    if earlier.params.span is None and earlier.params.num_frames is None:
        raise DataError(explain("the record names neither a span nor a length", hint="--span"))
    return as_recorded(motion, earlier.params), {}


def as_recorded(motion: Any, params: MotionParams) -> Any:
    """Return what a record was made from: the input, or, of `--between`, the input made wider.

    Args:
        motion: The input.
        params: Of the record.
    """
    start, end = params.span or (0, 0)
    is_same = params.input_sha256 in (None, motions.digest(motion))
    is_wide = start == END_FRAMES and params.given == end + END_FRAMES
    if is_same or not is_wide or not 0 < end - start <= MAX_FRAMES or len(motion) < 2 * END_FRAMES:
        return motion
    wider, _ = between(motion, end - start)
    return wider if motions.digest(wider) == params.input_sha256 else motion


def span_frames(span: str, frames: int) -> tuple[int, int]:
    """Turn a span in seconds into frames.

    Args:
        span: START-END, of the form that the flag's parser lets pass.
        frames: Of the motion.

    Returns:
        First frame that is made anew, and the frame after the last.

    Raises:
        UsageError: It leaves the motion, or holds no frame.
    """
    start, end = (round(float(part) * motions.FPS) for part in span.split("-"))
    if not 0 <= start < end <= frames:
        low = min(start, frames - 1)
        high = min(max(end, low + 1), frames)
        allowed = f"inside 0-{frames / motions.FPS:g}, one frame (0.05 s) or more"
        hint = f"{low / motions.FPS:g}-{high / motions.FPS:g}"
        raise UsageError(explain("--span leaves the motion", got=span, allowed=allowed, hint=hint))
    return start, end


def between(motion: Any, count: int) -> tuple[Any, dict[str, Any]]:
    """Keep a few frames at both ends of a motion and make room for new ones between them.

    Raises:
        UsageError: Too short a motion.
    """
    import numpy as np

    if len(motion) < 2 * END_FRAMES:
        allowed = f"at least {2 * END_FRAMES} frames"
        raise UsageError(
            explain("--between keeps both ends", got=f"{len(motion)} frames", allowed=allowed)
        )
    index = np.array([*range(END_FRAMES), *[END_FRAMES - 1] * count,
                      *range(len(motion) - END_FRAMES, len(motion))])  # fmt: skip
    joints = motion.joints[index]
    # What stands there is made anew, but how fast the last kept frame goes is read from it.
    joints[END_FRAMES : END_FRAMES + count] += joints[END_FRAMES - 1] - joints[END_FRAMES - 2]
    wider = replace(motion, joints=joints, rotations=motion.rotations[index])
    return wider, {"num_frames": None, "span": [END_FRAMES, END_FRAMES + count]}
