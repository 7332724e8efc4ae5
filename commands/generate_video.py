"""`blockloom generate video`: a video from words, a first frame or a first clip.

What it does not know: how frames are made or files written (`clips`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError, UsageError
from ..core.messages import explain
from ..pipelines.params import Record, VideoParams
from . import clips, models, output, values
from .arguments import Generate, Sampling
from .generate import MOTION_FLAGS, named_model, warn_when_different
from .prompts import check_file, decoded, raw_lines

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_MODEL = "blockloom/clips"
PICTURE_FLAGS = ("height", "width", "top_k", "top_p", "negative_prompt", "style")


@dataclass(frozen=True)
class Start:
    """What a video begins and ends with, at the model's size.

    Attributes:
        frames: Frames the model is given, uint8 [frames, height, width, 3], or None.
        before: Frames of the input that stand before those in the file.
        last: Given last frame [1, height, width, 3], or None.
        fps: Frames per second of the input, or None.
        structure: A clip whose structure guides all frames, or None.
    """

    frames: "NDArray[np.uint8] | None" = None
    before: "NDArray[np.uint8] | None" = None
    last: "NDArray[np.uint8] | None" = None
    fps: float | None = None
    structure: "NDArray[np.uint8] | None" = None


def run(args: Generate) -> int:
    """Make, write, and print one path per video.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    output.refuse_flags(args, (*PICTURE_FLAGS, *MOTION_FLAGS), "generate video")
    if args.image is not None and args.video is not None:
        raise UsageError(explain("--image and --video both give first frames", hint="one of them"))
    prompts = block_prompts(args)
    place = clips.target(args.out, args.num)
    given = args.image or args.video
    raw = clips.read_start(given) if given else None
    earlier = clips.earlier_record(args.params_from)
    choice = clips.choose(*named_model(args, earlier), DEFAULT_MODEL)
    warn_when_different(choice, earlier)
    base = base_params(args, choice, earlier, raw[1] if raw else None)
    if prompts is not None:
        base = replace(base, prompt=prompts[0], prompts=prompts)
    elif args.prompt is not None:
        base = replace(base, prompts=None)
    if args.frames is not None:
        base = replace(base, num_frames=args.frames)
    if earlier is not None and earlier.params.input_sha256 and raw is None:
        raise UsageError(
            explain(
                "--params-from names a video with given first frames", hint="--image or --video"
            )
        )
    guide = clips.read_start(args.structure)[0] if args.structure else None
    if guide is not None and base.num_frames is None:
        base = replace(base, num_frames=len(guide))
    if earlier is not None and earlier.params.structure_sha256 and guide is None:
        raise UsageError(
            explain("--params-from names a video guided by structure", hint="--structure")
        )
    clips.check_fps(base.fps or clips.DEFAULT_FPS, place)
    device = models.pick_device(args.device, base.dtype)
    output.ensure_writable(place.folder)
    pipe = clips.open_video(choice, device, base.dtype)
    clips.check_size(pipe, place, base.scale)
    start = Start()
    if raw is not None:
        start = Start(clips.usable_start(clips.at_model_size(raw[0], pipe), pipe))
    if guide is not None:
        start = replace(start, structure=clips.at_model_size(guide, pipe))
    everything = [replace(base, seed=(base.seed + k) % 2**64) for k in range(args.num)]
    make_all(args, pipe, choice, place, [described(p, pipe, start) for p in everything], start)
    return 0


def block_prompts(args: Generate) -> list[str] | None:
    """Read the prompts of blocks, one per line; blank lines say nothing is told.

    Raises:
        UsageError: A prompt beside them.
        DataError: An empty or unreadable file, or a line that is no prompt.
    """
    if args.prompts_per_block is None:
        return None
    if args.prompt is not None:
        raise UsageError(explain("a prompt beside --prompts-per-block", hint="one of them"))
    path = Path(args.prompts_per_block)
    check_file(path)
    lines = [decoded(path, number, raw) for number, raw in raw_lines(path)]
    if not lines:
        raise DataError(explain(f"{path.name} holds no prompts", allowed="one per line"))
    for number, text in enumerate(lines, 1):
        try:
            values.checked_text(f"{path.name} line {number}", text)
        except values.FlagError as error:
            raise DataError(str(error)) from error
    return lines


def base_params(
    args: Sampling, choice: models.Choice, earlier: Record[VideoParams] | None, fps: float | None
) -> VideoParams:
    """Join the flags with the record of an earlier video.

    Args:
        args: Flags of `generate`, `edit` or `play`.
        choice: The model.
        earlier: What `--params-from` names.
        fps: Frames per second of the input.

    Raises:
        UsageError: The record is that of a played world.
    """
    flags: Any = args
    settings = clips.number_for(
        {}, num_inference_steps=flags.steps, guidance_scale=flags.guidance_scale,
        temperature=getattr(flags, "temperature", None), dtype=flags.dtype, fps=flags.fps,
        prompt=flags.prompt, scale=None if flags.scale == 1 else flags.scale,
    )  # fmt: skip
    if earlier is not None:
        if earlier.params.actions_sha256 is not None:
            raise UsageError(
                explain("--params-from names a played world", hint="blockloom play with its script")
            )
        seed = earlier.params.seed if flags.seed == -1 else flags.seed
        return replace(earlier.params, model=choice.name, seed=seed, **settings)
    plain: dict[str, Any] = {"prompt": "", "fps": fps or clips.DEFAULT_FPS}
    plain |= settings
    return VideoParams(seed=output.pick_seed(flags.seed), model=choice.name, **plain)


def described(params: VideoParams, pipe: Any, start: Start) -> VideoParams:
    """Add to the parameters what the frames given by files are, and how many frames come out.

    Raises:
        UsageError: A number of frames that is not legal.
    """
    given = 0 if start.frames is None else len(start.frames)
    before = 0 if start.before is None else len(start.before)
    asked = None if params.num_frames is None else params.num_frames - before
    total = pipe.count_frames(asked, given) + before
    return replace(
        params, num_frames=total, given=given + before,
        input_sha256=None if start.frames is None else clips.digest(start.frames),
        last_sha256=None if start.last is None else clips.digest(start.last),
        structure_sha256=None if start.structure is None else clips.digest(start.structure),
    )  # fmt: skip


def make_all(
    args: Any, pipe: Any, choice: models.Choice, place: output.Target,
    everything: list[VideoParams], start: Start,
) -> None:  # fmt: skip
    """Make the videos one after another; each is written while it is made.

    Raises:
        UsageError: A file would be lost, or the pipeline refused a setting.
    """
    paths = [place.path(k, params) for k, params in enumerate(everything)]
    keys = [params.key(choice.weights_sha256) for params in everything]
    output.refuse_overwriting(zip(paths, keys, strict=True), overwrite=args.overwrite)
    reports = []
    for path, params in zip(paths, everything, strict=True):
        frames = made_frames(pipe, params, start)
        reports.append(clips.write(frames, path, params, choice, with_record=not args.no_metadata))
    clips.announce(args, reports)


def made_frames(pipe: Any, params: VideoParams, start: Start) -> "Iterator[NDArray[np.uint8]]":
    """Yield the frames of one video as they are made, with a bar on a terminal.

    Args:
        pipe: A `VideoPipeline`.
        params: Complete parameters.
        start: What they say is given.
    """
    from ..core.sampling import item_generator

    before = 0 if start.before is None else len(start.before)
    settings = clips.number_for(
        {}, video=start.frames, num_inference_steps=params.num_inference_steps,
        guidance_scale=params.guidance_scale, temperature=params.temperature,
        last_image=None if start.last is None else start.last[0], structure=start.structure,
    )  # fmt: skip
    if params.num_frames is None:
        raise DataError(explain("the record names no number of frames", hint="--frames"))
    events = pipe.stream(
        params.prompts or params.prompt, num_frames=params.num_frames - before,
        generator=item_generator(params.seed, 0), **settings,
    )  # fmt: skip
    yield from () if start.before is None else start.before
    with pipe.progress_bar(total=params.num_frames - before) as bar:
        for event in events:
            if event.kind == "decoded":
                yield from event.data["frames"][0]
                bar.update(event.data["frames"].shape[1])
