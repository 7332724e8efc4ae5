"""`blockloom edit video`: go on with a clip, or make the frames between its first and last.

What it does not know: how frames are made or files written (`clips`, `generate_video`).
"""

from dataclasses import replace
from typing import Any

from ..core.errors import UsageError
from ..core.messages import explain
from . import clips, models, output
from .arguments import Edit
from .generate import named_model, warn_when_different
from .generate_video import (
    DEFAULT_MODEL,
    PICTURE_FLAGS,
    Start,
    base_params,
    described,
    make_all,
)


def run(args: Edit) -> int:
    """Make, write, and print the path.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    output.refuse_flags(args, (*PICTURE_FLAGS, "region", "span", "formats"), "edit video")
    if args.input is None:
        raise UsageError(
            explain("no input video given", hint="blockloom edit video in.mp4 --continue 16")
        )
    if (args.continue_frames is None) == (args.between_frames is None):
        raise UsageError(explain("say what to do", allowed="--continue N or --between N"))
    place = clips.target(args.out, 1)
    raw, fps = clips.read_start(args.input)
    if args.between_frames is not None and len(raw) < 2:
        raise UsageError(explain("--between needs a clip of two frames", got=str(len(raw))))
    earlier = clips.earlier_record(args.params_from)
    choice = clips.choose(*named_model(args, earlier), DEFAULT_MODEL)
    if args.between_frames is not None:
        check_sees_the_end(choice)
    warn_when_different(choice, earlier)
    base = base_params(args, choice, earlier, fps)
    clips.check_fps(base.fps or clips.DEFAULT_FPS, place)
    device = models.pick_device(args.device, base.dtype)
    output.ensure_writable(place.folder)
    pipe = clips.open_video(choice, device, base.dtype)
    clips.check_size(pipe, place, base.scale)
    start = start_of(args, clips.at_model_size(raw, pipe), pipe)
    new = args.continue_frames or (args.between_frames or 0) + 1
    kept = sum(len(part) for part in (start.before, start.frames) if part is not None)
    params = described(replace(base, num_frames=kept + new), pipe, start)
    make_all(args, pipe, choice, place, [params], start)
    return 0


def start_of(args: Edit, frames: Any, pipe: Any) -> Start:
    """Split a clip into what is kept and what the model is given."""
    if args.between_frames is not None:
        return Start(frames[:1], last=frames[-1:])
    used = clips.usable_start(frames, pipe)
    before = frames[: len(frames) - len(used)]
    return Start(used, before=before if len(before) else None)


def check_sees_the_end(
    choice: models.Choice, flag: str = "--between", hint: str = "--continue N"
) -> None:
    """Refuse a model that makes frames in order, before its weights load.

    Args:
        choice: The model.
        flag: What asks for frames behind the new ones.
        hint: What to ask for instead.

    Raises:
        UsageError: It cannot see the last frame.
    """
    if models.sees_the_end(choice.folder):
        return
    ways = "layout.block = all or layout.permute = any"
    raise UsageError(
        explain(
            f"{flag}: model {choice.name} makes frames in order and cannot see the last one",
            got=f"layout.block = {models.layout_of(choice.folder).get('block')}",
            allowed=f"a model that makes all frames together ({ways})",
            hint=hint,
        )
    )
