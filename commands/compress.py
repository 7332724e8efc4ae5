"""`blockloom compress`: a video in, a file of coded bits out.

What it does not know: how bits are coded (`pipelines.compression`).
"""

from pathlib import Path
from typing import TYPE_CHECKING

from ..core.errors import UsageError
from ..core.messages import explain
from ..pipelines.media import write_bytes
from . import clips, models, output
from .arguments import Compress

if TYPE_CHECKING:
    from ..pipelines.compression import VideoCompressor

EXTENSION = ".blmv"


def run(args: Compress) -> int:
    """Compress, write, and print the path.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    if args.input is None:
        raise UsageError(explain("no video given", hint="blockloom compress clip.mp4 --model ..."))
    choice = named_model(args.model)
    path = file_to_write(args.out, (EXTENSION,), overwrite=args.overwrite)
    from ..pipelines.bit_coding import import_constriction

    import_constriction()
    raw, fps = clips.read_start(args.input)
    from ..pipelines.clip_frames import fit_frames

    compressor = open_compressor(choice)
    height, width = compressor.tokenizer.frame_size
    if raw.shape[1:3] != (height, width):
        output.note(f"frames of {raw.shape[2]}x{raw.shape[1]} are resampled to {width}x{height}")
    frames = fit_frames(raw, (height, width))
    content = compressor.compress(frames, fps or clips.DEFAULT_FPS, args.source)
    write_bytes(path, content)
    if args.format == "json":
        pixels = len(frames) * height * width
        output.emit_json(
            {"path": str(path), "bytes": len(content), "frames": len(frames), "width": width,
             "height": height, "source": args.source,
             "bits_per_pixel": round(8 * len(content) / pixels, 5)}
        )  # fmt: skip
    else:
        output.say(str(path))
    return 0


def named_model(name: str | None) -> models.Choice:
    """Find the model that is named, without loading it.

    Raises:
        UsageError: None is named.
        ModelError: No such folder, or a model of pictures.
    """
    if name is None:
        raise UsageError(
            explain("no model given", hint="--model with a folder that blockloom train wrote")
        )
    choice = models.choose(name, None)
    models.check_makes(choice, "video")
    return choice


def open_compressor(choice: models.Choice) -> "VideoCompressor":
    """Load a model, on the CPU in float32, as a compressor.

    Raises:
        ModelError: It cannot be loaded, or cannot code a clip.
    """
    pipe = models.open_model(choice, models.pick_device("cpu"))
    from ..pipelines.compression import VideoCompressor

    return VideoCompressor(pipe.tokenizer, pipe.model, bytes.fromhex(choice.weights_sha256))


def file_to_write(out: str | None, extensions: tuple[str, ...], *, overwrite: bool) -> Path:
    """Check a file's name and place before any work.

    Args:
        out: `--out`.
        extensions: With the dot.
        overwrite: Whether the file may exist.

    Raises:
        UsageError: No name, another extension, or a file that exists.
        ResourceError: A folder that cannot be written.
    """
    if out is None or not out.strip() or "\0" in out:
        raise UsageError(explain("no --out given", hint=f"--out clip{extensions[0]}"))
    path = Path(out).expanduser()
    if path.suffix.lower() not in extensions:
        raise UsageError(explain("--out extension", got=path.suffix, allowed=", ".join(extensions)))
    path = output.folder(path.parent) / path.name
    if path.exists() and not overwrite:
        raise UsageError(explain("output exists", got=path.name, hint="--overwrite"))
    if path.is_dir():
        raise UsageError(explain("output name is a folder", got=path.name))
    output.ensure_writable(path.parent)
    return path
