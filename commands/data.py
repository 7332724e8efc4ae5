"""`blockloom data convert`: any readable data set into one .npz."""

from pathlib import Path

from ..core.errors import UsageError
from ..core.messages import explain
from . import output
from .arguments import Data
from .train import existing_data


def run(args: Data) -> int:
    """Convert and say how many pictures or motions were kept.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    source = existing_data(args.source)
    if args.out is None:
        raise UsageError(explain("--out is missing", allowed="an .npz file", hint="--out set.npz"))
    out = Path(args.out).expanduser()
    if out.suffix.lower() != ".npz":
        raise UsageError(explain("--out extension", got=out.suffix, allowed=".npz"))
    if out.exists() and not args.overwrite:
        raise UsageError(explain("--out exists", got=out.name, hint="--overwrite"))
    output.ensure_writable(output.folder(out.parent))
    from ..training.motion_archive import convert_motions, holds_motion

    if holds_motion(source):
        if args.size is not None:
            raise UsageError(explain("--size with motion", hint="leave --size out"))
        motions = convert_motions(source, out, mirror=args.mirror)
        report = {"path": str(out), "num_motions": len(motions), "num_frames": len(motions.frames)}
        if args.format == "json":
            output.emit_json(report)
        else:
            output.say(f"{out}: {len(motions)} motions, {len(motions.frames)} frames")
        return 0
    if args.mirror:
        raise UsageError(explain("--mirror with pictures", allowed="motion", hint="leave it out"))
    from ..training.data import convert

    num_images = len(convert(source, out, image_size=args.size))
    if args.format == "json":
        output.emit_json({"path": str(out), "num_images": num_images})
    else:
        output.say(f"{out}: {num_images} pictures")
    return 0
