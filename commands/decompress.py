"""`blockloom decompress`: a file of coded bits in, a video out.

What it does not know: how bits are coded (`pipelines.compression`), how videos are written.
"""

from pathlib import Path

from ..core.errors import DataError, UsageError
from ..core.messages import explain
from . import clips, output
from .arguments import Decompress
from .compress import file_to_write, named_model, open_compressor


def run(args: Decompress) -> int:
    """Decompress, write, and print the path.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    if args.input is None:
        raise UsageError(explain("no file given", hint="blockloom decompress clip.blmv --model .."))
    choice = named_model(args.model)
    path = file_to_write(args.out, clips.OUTPUTS, overwrite=args.overwrite)
    content = read_compressed(Path(args.input).expanduser())
    from ..pipelines.bit_coding import import_constriction
    from ..pipelines.compressed_file import CompressedClip

    import_constriction()
    CompressedClip.from_bytes(content)  # a damaged file is refused before weights load
    frames, fps = open_compressor(choice).decompress(content)
    from ..pipelines.video_media import save_video

    clips.sweep(path)
    sha256 = save_video(frames, path, fps=fps, scale=args.scale)
    if args.format == "json":
        output.emit_json({"path": str(path), "sha256": sha256, "frames": len(frames), "fps": fps})
    else:
        output.say(str(path))
    return 0


def read_compressed(path: Path) -> bytes:
    """Read a file of bounded size.

    Raises:
        DataError: Missing, not a regular file, too large, or unreadable.
    """
    from ..pipelines.compressed_file import MAX_FILE_BYTES

    if not path.is_file():
        raise DataError(explain("no such file", got=path.name))
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(explain(f"{path.name} is too large", allowed=f"{MAX_FILE_BYTES} bytes"))
        return path.read_bytes()
    except OSError as error:
        raise DataError(explain(f"cannot read {path.name}: {error.strerror}")) from error
