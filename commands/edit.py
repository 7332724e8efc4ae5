"""`blockloom edit`: redraw a region of a picture from a prompt, keep the rest.

Videos are edited in `edit_video`, motions in `edit_motion`.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from ..core.errors import UsageError
from ..core.messages import explain
from ..pipelines.media import pixels_sha256, read_image, read_metadata, save_png
from ..pipelines.params import ImageParams, Record
from . import models, output
from .arguments import Edit
from .generate import flag_settings, named_model, report, warn_when_different

if TYPE_CHECKING:
    import numpy as np

VIDEO_FLAGS = ("continue_frames", "between_frames", "fps", "scale", "span", "formats")


def run(args: Edit) -> int:
    """Redraw, write, and print the path.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    if args.kind == "video":
        from . import edit_video

        return edit_video.run(args)
    if args.kind == "motion":
        from . import edit_motion

        return edit_motion.run(args)
    output.refuse_flags(args, VIDEO_FLAGS, "edit image")
    target = output.plan(args.out, 1)
    if args.input is None:
        raise UsageError(
            explain("no input picture given", hint="blockloom edit image cat.png --prompt cat")
        )
    image = read_image(args.input)
    earlier = read_metadata(args.params_from) if args.params_from else None
    choice = models.choose(*named_model(args, earlier))
    models.check_makes(choice, "image")
    warn_when_different(choice, earlier)
    params = _params(args, choice, earlier, pixels_sha256(image))
    models.check_model_limits(params, choice)
    box = region_box(params.region or "", image.width, image.height)
    path = target.path(0, params)
    output.refuse_overwriting([(path, params.key(choice.weights_sha256))], overwrite=args.overwrite)
    device = models.pick_device(args.device, params.dtype)
    output.ensure_writable(target.folder)
    pipe = models.open_model(choice, device, params.dtype)
    keep = keep_mask(box, image.size, pipe.tokenizer.image_size)
    drawn = models.draw(pipe, [params], image=image, keep=keep)[0]
    record = choice.record(params)
    digest = save_png(drawn, path, None if args.no_metadata else record)
    if args.format == "json":
        output.emit_json([report(path, record, digest)])
    else:
        output.say(str(path))
    return 0


def _params(
    args: Edit, choice: models.Choice, earlier: Record[ImageParams] | None, input_sha256: str
) -> ImageParams:
    settings = flag_settings(args)
    if earlier is None:
        if args.prompt is None:
            raise UsageError(explain("no --prompt given", hint='--prompt "red apple"'))
        if args.region is None:
            raise UsageError(
                explain("no --region given", allowed="left, right, top, bottom or x0,y0,x1,y1")
            )
        seed = output.pick_seed(args.seed)
        base = ImageParams(
            prompt=args.prompt, seed=seed, model=choice.name, region=args.region, **settings
        )
        return replace(base, input_sha256=input_sha256)
    if earlier.params.region is None:
        raise UsageError(
            explain(
                "--params-from names a picture that was not edited",
                hint="blockloom generate image --params-from FILE",
            )
        )
    if earlier.params.input_sha256 != input_sha256:
        output.note("warning: another input picture than that of the file; the result will differ")
    base = replace(earlier.params, model=choice.name, input_sha256=input_sha256, **settings)
    return replace(
        base,
        prompt=base.prompt if args.prompt is None else args.prompt,
        region=base.region if args.region is None else args.region,
        seed=base.seed if args.seed == -1 else args.seed,
    )


def region_box(region: str, width: int, height: int) -> tuple[int, int, int, int]:
    """Turn a region into a pixel box.

    Args:
        region: left, right, top, bottom, or x0,y0,x1,y1 (x1 and y1 not included).
        width: Width of the input in pixels.
        height: Height of the input in pixels.

    Returns:
        (x0, y0, x1, y1) inside the picture.

    Raises:
        UsageError: A box that leaves the picture; the message gives the nearest legal box.
    """
    halves = {
        "left": (0, 0, width // 2, height),
        "right": (width // 2, 0, width, height),
        "top": (0, 0, width, height // 2),
        "bottom": (0, height // 2, width, height),
    }
    if region in halves:
        return halves[region]
    x0, y0, x1, y1 = (int(part) for part in region.split(","))
    if x1 > width or y1 > height:
        x0, y0 = min(x0, width - 1), min(y0, height - 1)
        raise UsageError(
            explain(
                "--region leaves the picture",
                got=region,
                allowed=f"boxes inside 0,0,{width},{height}",
                hint=f"{x0},{y0},{min(x1, width)},{min(y1, height)}",
            )
        )
    return x0, y0, x1, y1


def keep_mask(
    box: tuple[int, int, int, int], image_size: tuple[int, int], model_size: int
) -> "np.ndarray":
    """Say which pixels of the model's square picture stay.

    Args:
        box: (x0, y0, x1, y1) to redraw, in pixels of the input.
        image_size: (width, height) of the input.
        model_size: Side of the model's picture in pixels; the input is resampled to it.

    Returns:
        Boolean array [model_size, model_size], True = keep; the box grows to whole pixels.
    """
    import numpy as np

    (x0, y0, x1, y1), (width, height) = box, image_size
    keep = np.ones((model_size, model_size), dtype=bool)
    rows = slice(y0 * model_size // height, -(-y1 * model_size // height))
    columns = slice(x0 * model_size // width, -(-x1 * model_size // width))
    keep[rows, columns] = False
    return keep
