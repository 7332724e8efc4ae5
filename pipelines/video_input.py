"""Video files of unknown origin in: frames, or a clear word why not.

What it does not know: models, tensors, who made the file. PyAV (the extra `video`) is imported
where it is used.

Invariants: a file's header is never believed. Its kind is told by its first bytes; formats that can
name further files (playlists) are not tried; caps on bytes, pixels and frames hold while it is
decoded; and a file that decodes to fewer frames than it promises is refused, not shortened.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError, UsageError
from ..core.messages import explain
from .media import _check_regular

MAX_INPUT_BYTES = 256 * 2**20
MAX_INPUT_FRAMES = 4096
MAX_FRAME_PIXELS = 4096 * 4096
MAX_DECODED_BYTES = 2 * 2**30
MAX_STREAMS = 16
# Some builds of FFmpeg name a decoder after its library.
_READABLE = frozenset({"h264", "hevc", "mpeg4", "vp8", "vp9", "av1", "libdav1d", "gif"})


@dataclass(frozen=True)
class Video:
    """A decoded video.

    Attributes:
        frames: uint8 [frames, height, width, 3], RGB.
        fps: Frames per second, the average when the rate varies.
    """

    frames: NDArray[np.uint8]
    fps: float


def import_av() -> Any:
    """Import PyAV.

    Raises:
        UsageError: It is not installed; the message names the extra that brings it.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError(
            explain("video files need PyAV", hint="pip install 'blockloom[video]'")
        ) from error
    return av


def read_video(
    path: str | Path,
    max_frames: int = MAX_INPUT_FRAMES,
    *,
    max_bytes: int = MAX_INPUT_BYTES,
    max_pixels: int = MAX_FRAME_PIXELS,
) -> Video:
    """Read a video from an untrusted file.

    Args:
        path: MP4 or MOV, WebM or Matroska, or GIF.
        max_frames: More frames than this are refused, not cut off.
        max_bytes: Largest file.
        max_pixels: Most pixels per frame.

    Raises:
        DataError: Missing, not a regular file, of another kind, damaged, cut short, without
            frames, or over a cap.
        UsageError: PyAV is not installed.
    """
    path = Path(path)
    with opened(path, max_bytes) as container:
        stream = _video_stream(container, path, max_pixels)
        frames: list[NDArray[np.uint8]] = []
        times: list[float] = []
        for frame in container.decode(stream):
            if len(frames) == max_frames:
                raise DataError(explain(f"{path.name} is too long", allowed=f"{max_frames} frames"))
            _check_frame(frame, frames, path, max_pixels)
            picture = frame.to_ndarray(format="rgb24")
            turns = frame.rotation // 90 if frame.rotation % 90 == 0 else 0
            frames.append(np.ascontiguousarray(np.rot90(picture, turns)))
            times.append(math.nan if frame.time is None else frame.time)
        if not frames:
            raise DataError(explain(f"{path.name} holds no frames"))
        fps = _average_rate(times, stream)
        _check_complete(container, stream, times, 1 / fps, path)
        return Video(np.stack(frames), fps)


def _average_rate(times: list[float], stream: Any) -> float:
    """Frames per second; the stated rate is exact where the frames' times agree with it."""
    stated = float(stream.average_rate or 0)
    span = times[-1] - times[0]
    if len(times) < 2 or not span > 0:  # also when a time is not known
        return stated or 1.0
    measured = (len(times) - 1) / span
    return stated if abs(stated / measured - 1) < 0.02 else measured


def _check_complete(
    container: Any, stream: Any, times: list[float], step: float, path: Path
) -> None:
    """Compare what was decoded with what the header promised, in frames or in seconds."""
    if len(times) < stream.frames:
        got = f"{len(times)} of {stream.frames} frames"
        raise DataError(explain(f"{path.name} is cut short", got=got))
    promised = (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0
    if times[-1] + step < promised - 1.5 * step:
        got = f"{times[-1] + step:.3g} of {promised:.3g} s"
        raise DataError(explain(f"{path.name} is cut short", got=got))


@contextmanager
def opened(path: Path, max_bytes: int = MAX_INPUT_BYTES) -> Iterator[Any]:
    """Open a container for reading.

    Args:
        path: The file.
        max_bytes: Largest file.

    Yields:
        PyAV's input container.

    Raises:
        DataError: Whatever goes wrong here or inside the block.
        UsageError: PyAV is not installed.
    """
    av = import_av()
    _check_regular(path, max_bytes)
    try:
        with path.open("rb") as file:
            kind = _kind(file, path)
            # A file object and a named format: nothing in the file can make FFmpeg open another.
            with av.open(file, "r", format=kind, metadata_errors="replace") as container:
                yield container
    except (DataError, UsageError):
        raise
    # FFmpeg's decoders raise many types on hostile input; all mean the same to the user.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(explain(f"cannot decode {path.name}: {reason}")) from error


def _kind(file: Any, path: Path) -> str:
    head = file.read(16)
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 64))
    tail = file.read()
    file.seek(0)
    if head[4:8] == b"ftyp":
        return "mp4"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if head.startswith(b"GIF8"):
        if not tail.rstrip(b"\0").endswith(b";"):
            raise DataError(explain(f"{path.name} is cut short"))
        return "gif"
    raise DataError(
        explain(f"{path.name} is not a video of a known format", allowed="MP4, WebM or GIF")
    )


def _video_stream(container: Any, path: Path, max_pixels: int) -> Any:
    if len(container.streams) > MAX_STREAMS:
        got = f"{len(container.streams)} streams"
        raise DataError(explain(f"{path.name} is refused", got=got, allowed=f"up to {MAX_STREAMS}"))
    if not container.streams.video:
        raise DataError(explain(f"{path.name} holds no video"))
    stream = container.streams.video[0]
    context = stream.codec_context
    name = None if context is None else context.name
    if name not in _READABLE:
        raise DataError(
            explain(f"codec of {path.name}", got=str(name), allowed=", ".join(sorted(_READABLE)))
        )
    _check_pixels(context.width, context.height, path, max_pixels)
    context.thread_count = 1
    context.options = {"err_detect": "explode", "max_pixels": str(max_pixels)}
    return stream


def _check_pixels(width: int, height: int, path: Path, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise DataError(
            explain(
                f"{path.name} has too many pixels",
                got=f"{width} x {height}",
                allowed=f"at most {max_pixels}",
            )
        )


def _check_frame(frame: Any, frames: list[Any], path: Path, max_pixels: int) -> None:
    if frame.is_corrupt:
        raise DataError(explain(f"cannot decode {path.name}: frame {len(frames)} is damaged"))
    _check_pixels(frame.width, frame.height, path, max_pixels)
    if frame.width * frame.height * 3 * (len(frames) + 1) > MAX_DECODED_BYTES:
        most = f"{MAX_DECODED_BYTES} bytes when decoded"
        raise DataError(explain(f"{path.name} is too large", allowed=f"at most {most}"))
    if frames and frame.width * frame.height * 3 != frames[0].size:
        raise DataError(explain(f"{path.name}: the size changes at frame {len(frames)}"))
