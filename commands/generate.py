"""`blockloom generate`: pictures from a prompt, or again from a file's parameters.

Videos are made in `generate_video`, motions in `generate_motion`.
"""

from dataclasses import replace
from typing import Any

from ..core.errors import UsageError
from ..core.messages import explain
from ..pipelines.media import read_metadata, save_png
from ..pipelines.params import ImageParams, Record
from . import models, output
from .arguments import Generate, Sampling
from .output import refuse_flags

GROUP_SIZE = 8
VIDEO_FLAGS = ("prompts_per_block", "frames", "fps", "image", "video", "structure", "scale")
MOTION_FLAGS = ("segment_seconds", "seconds", "motion", "formats")
_SAME_NAME = (
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
    "height",
    "width",
    "negative_prompt",
    "style",
    "dtype",
)


def flag_settings(args: Sampling) -> dict[str, Any]:
    """Collect the sampling flags that were given, under their parameter names."""
    given = {name: getattr(args, name) for name in _SAME_NAME}
    given["num_inference_steps"] = args.steps
    return {name: value for name, value in given.items() if value is not None}


def run(args: Generate) -> int:
    """Draw, write, and print one path per picture.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    if args.kind == "video":
        from . import generate_video

        return generate_video.run(args)
    if args.kind == "motion":
        from . import generate_motion

        return generate_motion.run(args)
    refuse_flags(args, (*VIDEO_FLAGS, *MOTION_FLAGS), "generate image")
    target = output.plan(args.out, args.num)
    earlier = read_metadata(args.params_from) if args.params_from else None
    choice = models.choose(*named_model(args, earlier))
    models.check_makes(choice, "image")
    warn_when_different(choice, earlier)
    everything = _all_params(args, choice, earlier)
    models.check_model_limits(everything[0], choice)
    paths = [target.path(k, params) for k, params in enumerate(everything)]
    output.refuse_overwriting(
        zip(paths, (p.key(choice.weights_sha256) for p in everything), strict=True),
        overwrite=args.overwrite,
    )
    device = models.pick_device(args.device, everything[0].dtype)
    output.ensure_writable(target.folder)
    pipe = models.open_model(choice, device, everything[0].dtype)
    results = []
    for start in range(0, len(everything), GROUP_SIZE):
        group = everything[start : start + GROUP_SIZE]
        for k, image in enumerate(models.draw(pipe, group), start):
            record = choice.record(everything[k])
            digest = save_png(image, paths[k], None if args.no_metadata else record)
            results.append(report(paths[k], record, digest))
            if args.format == "text":
                output.say(str(paths[k]))
    if args.format == "json":
        output.emit_json(results)
    return 0


def report(path: Any, record: Record[Any], digest: str) -> dict[str, Any]:
    """Describe one finished output for `--format json`."""
    return {"path": str(path), "sha256": digest, **record.to_dict()}


def named_model(args: Sampling, earlier: Record[Any] | None) -> tuple[str | None, str | None]:
    """Return (model, recipe): the flags, or else what the earlier record names."""
    if args.model is None and args.recipe is None and earlier is not None:
        return earlier.params.model, None
    return args.model, args.recipe


def warn_when_different(choice: models.Choice, earlier: Record[Any] | None) -> None:
    """Say when a repeat cannot be bit for bit, because weights or versions differ."""
    if earlier is None:
        return
    now = choice.record(earlier.params)
    if earlier.weights_sha256 != now.weights_sha256:
        output.note("warning: other weights than those of the file; the picture will differ")
    elif earlier.versions != now.versions:
        changed = [k for k, v in now.versions.items() if earlier.versions.get(k) != v]
        output.note(f"warning: other versions of {', '.join(changed)}; bits may differ")


def _all_params(
    args: Generate, choice: models.Choice, earlier: Record[ImageParams] | None
) -> list[ImageParams]:
    settings = flag_settings(args)
    if earlier is not None:
        if earlier.params.region is not None:
            raise UsageError(
                explain(
                    "--params-from names an edited picture",
                    hint="blockloom edit image INPUT --params-from FILE",
                )
            )
        base = replace(earlier.params, model=choice.name, **settings)
        if args.prompt is not None:
            base = replace(base, prompt=args.prompt)
        if args.seed != -1:
            base = replace(base, seed=args.seed)
    elif args.prompt is None:
        raise UsageError(explain("no prompt given", hint='blockloom generate image "red apple"'))
    else:
        seed = output.pick_seed(args.seed)
        base = ImageParams(prompt=args.prompt, seed=seed, model=choice.name, **settings)
    return [replace(base, seed=(base.seed + k) % 2**64) for k in range(args.num)]
