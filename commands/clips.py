"""What the video commands share: where videos go, what they start with, which model makes them.

What it does not know: flags' texts, or how frames are made. Top-level imports are light; NumPy,
PyAV and torch arrive where they are used.

Invariants: a file name, rate or codec that cannot be written is refused before weights load; a
video stands under its name whole or not at all.
"""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError, UsageError
from ..core.messages import explain
from ..pipelines.params import Record, VideoParams, bundled_models, read_record
from . import models, output

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_FPS = 8.0
MAX_GIF_FPS = 50.0
OUTPUTS = (".mp4", ".webm", ".gif")
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def target(out: str | None, num: int) -> output.Target:
    """Decide where videos go, and refuse what this machine cannot write.

    Args:
        out: The flag's text; None means the default folder.
        num: Number of videos.

    Raises:
        UsageError: An unknown extension, no encoder for it, a file for several videos, or a file
            where a folder is needed and the reverse.
    """
    place = output.plan(out, num, OUTPUTS)
    from ..pipelines.video_media import video_codecs

    kind = place.path(0, VideoParams("", 0, "")).suffix[1:].lower()
    codecs = video_codecs()
    if kind not in codecs:
        raise UsageError(explain(f"this PyAV cannot write {kind}", allowed=", ".join(codecs)))
    return place


def check_fps(fps: float, place: output.Target) -> None:
    """Refuse a rate that a GIF cannot have.

    Raises:
        UsageError: More than 50 frames per second.
    """
    is_gif = place.file is not None and place.file.suffix.lower() == ".gif"
    if is_gif and fps > MAX_GIF_FPS:
        raise UsageError(
            explain("--fps of a GIF", got=f"{fps:g}", allowed=f"up to {MAX_GIF_FPS:g}", hint="50")
        )


def choose(
    name: str | None, recipe: str | None, default: str, wanted: str = "video"
) -> models.Choice:
    """Find the model that the flags name, and refuse one that makes something else.

    Args:
        name: `--model`.
        recipe: `--recipe`.
        default: Bundled name that is used when neither is given.
        wanted: What it should make: video or motion.

    Raises:
        UsageError: No model named and the bundled one is not installed.
        ModelError: As `models.choose`, and for models that make something else.
    """
    if name is None and recipe is None:
        if default not in bundled_models():
            raise UsageError(
                explain("no model given", allowed=f"a folder of a trained {wanted} model",
                        hint="--model FOLDER")
            )  # fmt: skip
        name = default
    choice = models.choose(name, recipe)
    models.check_makes(choice, wanted)
    return choice


def open_video(choice: models.Choice, device: Any, dtype: str, *, world: bool = False) -> Any:
    """Load a video model as the pipeline that is wanted.

    Args:
        choice: What `choose` found.
        device: Where to put it.
        dtype: Number format of the weights.
        world: True for a `WorldPipeline`, else a `VideoPipeline`.
    """
    pipe = models.open_model(choice, device, dtype)
    from ..pipelines.video import VideoPipeline
    from ..pipelines.world import WorldPipeline

    wanted: Any = WorldPipeline if world else VideoPipeline
    if type(pipe) is wanted:
        return pipe
    other = wanted(pipe.tokenizer, pipe.model).to(device)
    other.set_progress_bar_config(**pipe._progress_bar_config)
    return other


def check_size(pipe: Any, place: output.Target, scale: int) -> None:
    """Refuse a frame size that an MP4 cannot have, before anything is made.

    Raises:
        UsageError: An odd width or height.
    """
    height, width = (side * scale for side in pipe.tokenizer.frame_size)
    is_mp4 = place.path(0, VideoParams("", 0, "")).suffix.lower() == ".mp4"
    if is_mp4 and (height % 2 or width % 2):
        raise UsageError(
            explain("size of an MP4", got=f"{width}x{height}", allowed="even width and height",
                    hint=f"--scale {2 * scale}, or --out with .gif or .webm")
        )  # fmt: skip


def read_start(path: str) -> "tuple[NDArray[np.uint8], float | None]":
    """Read what a video starts with.

    Args:
        path: A picture (one frame) or a video.

    Returns:
        Frames uint8 [frames, height, width, 3], and the video's frames per second.

    Raises:
        DataError: Missing, damaged, over a cap, or of another kind.
    """
    import numpy as np

    from ..pipelines.media import read_image
    from ..pipelines.video_input import read_video

    if Path(path).suffix.lower() in PICTURES:
        return np.asarray(read_image(path))[None], None
    video = read_video(path)
    return video.frames, video.fps


def at_model_size(frames: "NDArray[np.uint8]", pipe: Any) -> "NDArray[np.uint8]":
    """Resample frames to a model's size."""
    from ..pipelines.clip_frames import fit_frames

    return fit_frames(frames, tuple(pipe.tokenizer.frame_size))


def usable_start(frames: "NDArray[np.uint8]", pipe: Any, per_block: int = 1) -> "NDArray[np.uint8]":
    """Leave out the first frames of a clip that a model cannot take: some take 4n + 1 only.

    Args:
        frames: uint8 [frames, height, width, 3].
        pipe: A video pipeline.
        per_block: Latent frames whose multiple is needed.

    Returns:
        The last frames; usually all.

    Raises:
        DataError: Too few frames.
    """
    from ..pipelines.video_checks import near_counts

    near = [n for n in near_counts(pipe.tokenizer, per_block, len(frames)) if n <= len(frames)]
    if not near:
        least = near_counts(pipe.tokenizer, per_block, 1)[-1]
        raise DataError(explain("too few frames to start from", got=str(len(frames)),
                                allowed=f"at least {least}"))  # fmt: skip
    if near[-1] < len(frames):
        output.note(f"the model starts from the last {near[-1]} of {len(frames)} frames")
    return frames[len(frames) - near[-1] :]


def digest(frames: "NDArray[np.uint8]") -> str:
    """Hash frames, whatever file they came from."""
    header = "x".join(map(str, frames.shape)) + ":"
    return hashlib.sha256(header.encode() + frames.tobytes()).hexdigest()


def file_digest(path: Path) -> str:
    """Hash a file.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(explain(f"cannot read {path.name}: {error.strerror}")) from error


def earlier_record(path: str | None) -> Record[VideoParams] | None:
    """Read the record of a video that should be made again.

    Args:
        path: `--params-from`.

    Raises:
        DataError: Not readable, or the record of something else.
    """
    if path is None:
        return None
    from ..pipelines.video_media import read_video_metadata

    return read_record(read_video_metadata(path), VideoParams, Path(path).name)


def number_for(values: dict[str, Any], **given: Any) -> dict[str, Any]:
    """Add the settings that were given to others; None leaves one out."""
    return values | {name: value for name, value in given.items() if value is not None}


def write(
    frames: Iterable[Any], path: Path, params: VideoParams, choice: models.Choice,
    *, with_record: bool,
) -> dict[str, Any]:  # fmt: skip
    """Write one video and describe it.

    Args:
        frames: uint8 [height, width, 3] each; taken one by one as they are made.
        path: Final name.
        params: What decided them.
        choice: The model.
        with_record: Put the record into the video and beside it.

    Returns:
        The report for `--format json`.
    """
    from ..pipelines.video_media import save_video

    sweep(path)
    record = choice.record(params)
    sha256 = save_video(
        frames, path, record if with_record else None, fps=params.fps or DEFAULT_FPS,
        scale=params.scale,
    )  # fmt: skip
    return {"path": str(path), "sha256": sha256, **record.to_dict()}


def sweep(path: Path) -> None:
    """Remove unfinished files of this name whose writers are gone (killed, or power lost)."""
    pattern = re.compile(re.escape(f".{path.name[:100]}.") + r"(\d+)\.part")
    for file in path.parent.iterdir() if path.parent.is_dir() else ():
        match = pattern.fullmatch(file.name)
        if match and not _is_running(int(match[1])):
            file.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def announce(args: Any, reports: list[dict[str, Any]]) -> None:
    """Print what was written, in the form the flags ask for."""
    if args.format == "json":
        output.emit_json(reports)
        return
    for report in reports:
        output.say(report["path"])


def action_numbers(choice: models.Choice) -> int:
    """Return how many numbers an action of a model is made of, before its weights load."""
    from ..pipelines.auto import num_actions

    return num_actions(choice.folder)
