"""`blockloom generate motion`: a moving body from words, or from words and a motion to go on from.

What it does not know: how poses are made or files written (`motions`).
"""

from dataclasses import replace
from typing import Any

from ..core.errors import UsageError
from ..core.messages import explain
from ..pipelines.params import MotionParams, Record
from . import clips, models, motions, output
from .arguments import Generate, Sampling
from .generate import named_model, warn_when_different
from .generate_video import PICTURE_FLAGS, block_prompts

REFUSED = (*PICTURE_FLAGS, "fps", "scale")


def run(args: Generate) -> int:
    """Make, write, and print one path per file.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    output.refuse_flags(args, (*REFUSED, "image", "video", "structure"), "generate motion")
    if args.frames is not None and args.seconds is not None:
        raise UsageError(explain("--frames and --seconds both give the length", hint="one of them"))
    if args.segment_seconds is not None and args.prompts_per_block is None:
        hint = "--prompts-per-block FILE"
        raise UsageError(explain("--segment-seconds says how long each prompt lasts", hint=hint))
    prompts = block_prompts(args)
    place = motions.plan(args.out, args.num, args.formats)
    earlier = motions.earlier_record(args.params_from)
    given = read_given(args.motion)
    _check_earlier(earlier, given)
    choice = clips.choose(*named_model(args, earlier), motions.DEFAULT_MODEL, "motion")
    warn_when_different(choice, earlier)
    base = base_params(args, choice, earlier)
    if prompts is not None:
        base = replace(
            base, prompt=prompts[0], prompts=prompts, segment_seconds=args.segment_seconds
        )
    elif args.prompt is not None:
        base = replace(base, prompts=None, segment_seconds=None)
    device = models.pick_device(args.device, base.dtype)
    output.ensure_writable(place.target.folder)
    pipe = models.open_model(choice, device, base.dtype)
    base = replace(base, **_length(args, pipe, base, given))
    everything = [replace(base, seed=(base.seed + k) % 2**64) for k in range(args.num)]
    motions.make_all(args, pipe, choice, place, everything, given)
    return 0


def read_given(path: str | None) -> Any:
    """Read the motion to go on from; None where there is none.

    Raises:
        DataError: It cannot be read.
    """
    if path is None:
        return None
    from ..pipelines.motion_media import read_motion

    return read_motion(path)


def _check_earlier(earlier: Record[MotionParams] | None, given: Any) -> None:
    """Refuse to repeat what needs an input that is not there."""
    if earlier is None:
        return
    if earlier.params.span is not None:
        hint = "blockloom edit motion INPUT --params-from FILE"
        raise UsageError(explain("--params-from names an edited motion", hint=hint))
    if earlier.params.input_sha256 and given is None:
        raise UsageError(
            explain("--params-from names a motion that goes on from another", hint="--motion FILE")
        )


def base_params(
    args: Sampling, choice: models.Choice, earlier: Record[MotionParams] | None
) -> MotionParams:
    """Join the flags with the record of an earlier motion."""
    flags: Any = args
    settings = clips.number_for(
        {}, num_inference_steps=flags.steps, guidance_scale=flags.guidance_scale,
        temperature=flags.temperature, dtype=flags.dtype, prompt=flags.prompt,
    )  # fmt: skip
    if earlier is not None:
        seed = earlier.params.seed if flags.seed == -1 else flags.seed
        return replace(earlier.params, model=choice.name, seed=seed, **settings)
    plain: dict[str, Any] = {"prompt": ""} | settings
    return MotionParams(seed=output.pick_seed(flags.seed), model=choice.name, **plain)


def _length(args: Generate, pipe: Any, base: MotionParams, given: Any) -> dict[str, Any]:
    """Decide the number of frames, and describe what is given.

    Raises:
        UsageError: A number that is not legal; the nearest legal ones are named.
    """
    asked = args.frames
    if asked is None and args.seconds is None and args.segment_seconds is None:
        asked = base.num_frames
    texts = base.prompts or base.prompt
    frames = pipe.planned_frames(
        texts, num_frames=asked, seconds=args.seconds, motion=given,
        segment_seconds=args.segment_seconds,
    )  # fmt: skip
    sha256 = None if given is None else motions.digest(given)
    return {
        "num_frames": frames, "given": 0 if given is None else len(given), "input_sha256": sha256,
    }  # fmt: skip
