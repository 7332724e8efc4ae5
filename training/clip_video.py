"""Decode one video file of unknown origin into RGB frames, or say why not.

MP4 (and MOV), WebM (and Matroska) and GIF are read with PyAV, told apart by their first bytes;
playlists and other formats that can name further files are not even tried. It does not know
captions, actions or data sets.

Invariants: nothing in a header is believed: frames are counted and measured as they are decoded,
and a file that decodes to fewer frames than it promises is refused, not shortened.
"""

import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ..core.errors import DataError, UsageError

SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".webm", ".mkv", ".gif"})
MAX_FILE_BYTES = 2 * 2**30
MAX_FRAME_PIXELS = 4096 * 4096
MAX_CLIP_BYTES = 4 * 2**30
MAX_STREAMS = 16
_CODECS = frozenset({"h264", "hevc", "mpeg4", "vp8", "vp9", "av1", "libdav1d", "gif"})
# Frames may come this much earlier or later than an even clock before the rate counts as variable:
# GIF times are whole hundredths of a second, so 15 frames per second are 7, 7, 6, 7 ...
_JITTER = 0.35


def read_video_clip(
    path: Path,
    *,
    image_size: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> tuple[NDArray[np.uint8], float]:
    """Decode a video.

    Args:
        path: The file.
        image_size: Side of the square to scale and centre-crop to; None keeps the size.
        fps: Frames per second to resample to, taking the nearest frame in time; None keeps all.
        max_frames: Keep at most this many frames from the start; None keeps all.

    Returns:
        uint8 [frames, height, width, 3], and frames per second.

    Raises:
        DataError: Unreadable, cut short, no frames, too large, of another format, or of variable
            frame rate without `fps`; the file is named.
        UsageError: PyAV is not installed.
    """
    av = import_av(path)
    try:
        with path.open("rb") as file:
            kind = _kind(file, path)
            with av.open(file, mode="r", format=kind, metadata_errors="replace") as container:
                return _decode(container, path, image_size, fps, max_frames)
    except (DataError, UsageError):
        raise
    # FFmpeg's decoders raise many types on hostile input; all mean the same to the user.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"{path}: cannot be decoded ({reason})") from error


def import_av(path: Path) -> Any:
    """Import PyAV, or say which extra brings it.

    Args:
        path: The file that needs it, for the message.

    Raises:
        UsageError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise UsageError(
            f"{path}: reading video needs PyAV; pip install 'blockloom[video]'"
        ) from error
    return av


def nearest_in_time(times: NDArray[np.float64], fps: float) -> NDArray[np.int64]:
    """Choose frames for an even clock.

    Args:
        times: Seconds, rising, the first frame's time first.
        fps: Frames per second wanted.

    Returns:
        int64 numbers of frames: entry k is the one nearest in time to k / fps after the first.
    """
    times = times - times[0]
    step = times[-1] / (len(times) - 1) if len(times) > 1 else 1 / fps
    count = max(1, math.floor((times[-1] + step) * fps + 1e-6))
    wanted = np.arange(count) / fps
    later = np.searchsorted(times, wanted).clip(0, len(times) - 1)
    earlier = np.maximum(later - 1, 0)
    # Ties go to the earlier frame, whatever rounding the clock's origin brings.
    is_nearer = abs(times[earlier] - wanted) <= abs(times[later] - wanted) + 1e-6
    return np.where(is_nearer, earlier, later)


def _kind(file: Any, path: Path) -> str:
    """Name FFmpeg's reader from the first bytes; leave the file at its start."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path}: not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise DataError(f"{path}: {status.st_size} bytes; at most {MAX_FILE_BYTES} are read")
    head = file.read(16)
    if head.startswith(b"GIF8"):
        file.seek(max(0, status.st_size - 64))
        if not file.read().rstrip(b"\0").endswith(b";"):
            raise DataError(f"{path}: is cut short")
    file.seek(0)
    if head[4:8] == b"ftyp":
        return "mp4"
    if head.startswith(b"\x1aE\xdf\xa3"):
        return "matroska"
    if head.startswith(b"GIF8"):
        return "gif"
    raise DataError(f"{path}: not a video of type MP4, WebM or GIF")


def _decode(
    container: Any, path: Path, image_size: int | None, fps: float | None, max_frames: int | None
) -> tuple[NDArray[np.uint8], float]:
    stream = _video_stream(container, path)
    frames: list[NDArray[np.uint8]] = []
    times: list[float] = []
    is_cut, size = False, 0
    for picture, time in _pictures(container, stream, path):
        if max_frames is not None:
            known = len(frames) if fps is None or not times else (time - times[0]) * fps - 1
            if known >= max_frames:
                is_cut = True
                break
        if image_size is not None:
            box = (image_size, image_size)
            fitted = ImageOps.fit(Image.fromarray(picture), box, Image.Resampling.LANCZOS)
            picture = np.asarray(fitted)
        size += picture.nbytes
        if size > MAX_CLIP_BYTES:
            raise DataError(
                f"{path}: decodes to more than {MAX_CLIP_BYTES} bytes; give an image size or "
                "a number of frames"
            )
        frames.append(picture)
        times.append(time)
    if not frames:
        raise DataError(f"{path}: holds no frames")
    clock = np.array(times)
    if not is_cut:
        _check_complete(container, stream, clock, path)
    if fps is None:
        return np.stack(frames), _rate(clock, stream, path)
    if not (clock[-1] - clock[0]) * fps < MAX_CLIP_BYTES / frames[0].nbytes:
        raise DataError(f"{path}: lasts {clock[-1] - clock[0]:.3g} s, too long for {fps:g} fps")
    chosen = nearest_in_time(clock, fps)[:max_frames]
    return np.stack([frames[i] for i in chosen]), fps


def _check_complete(container: Any, stream: Any, times: NDArray[np.float64], path: Path) -> None:
    """Compare what was decoded with what the header promised, in frames or in seconds."""
    if len(times) < stream.frames:
        raise DataError(f"{path}: is cut short: {len(times)} of {stream.frames} frames")
    promised = (container.duration or 0) / 1e6 if len(container.streams) == 1 else 0.0
    step = np.diff(times).mean() if len(times) > 1 else 1 / float(stream.average_rate or 1)
    if times[-1] + step < promised - 1.5 * step:
        raise DataError(f"{path}: is cut short: {times[-1] + step:.3g} of {promised:.3g} seconds")


def _video_stream(container: Any, path: Path) -> Any:
    if len(container.streams) > MAX_STREAMS:
        raise DataError(f"{path}: {len(container.streams)} streams; at most {MAX_STREAMS} are read")
    if not container.streams.video:
        raise DataError(f"{path}: holds no video")
    stream = container.streams.video[0]
    codec = stream.codec_context
    if codec is None or codec.name not in _CODECS:
        name = None if codec is None else codec.name
        raise DataError(f"{path}: codec {name}; read are {', '.join(sorted(_CODECS))}")
    if codec.width * codec.height > MAX_FRAME_PIXELS:
        raise DataError(
            f"{path}: frames of {codec.width}x{codec.height} pixels; at most {MAX_FRAME_PIXELS} "
            "in all are decoded"
        )
    codec.thread_count = 1
    codec.options = {"err_detect": "explode", "max_pixels": str(MAX_FRAME_PIXELS)}
    return stream


def _pictures(container: Any, stream: Any, path: Path) -> Iterator[tuple[NDArray[np.uint8], float]]:
    """Yield (uint8 [height, width, 3], seconds) of every frame, all of one size."""
    shape = None
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise DataError(f"{path}: frame {number} is damaged")
        if frame.width * frame.height > MAX_FRAME_PIXELS:
            raise DataError(f"{path}: frame {number} has {frame.width}x{frame.height} pixels")
        picture = frame.to_ndarray(format="rgb24")
        if frame.rotation % 90 == 0 and frame.rotation:
            picture = np.rot90(picture, frame.rotation // 90)
        if shape is not None and picture.shape != shape:
            raise DataError(f"{path}: the size changes at frame {number}")
        shape = picture.shape
        yield np.ascontiguousarray(picture), math.nan if frame.time is None else frame.time


def _rate(times: NDArray[np.float64], stream: Any, path: Path) -> float:
    """Frames per second of an even clock."""
    if len(times) == 1 or not np.isfinite(times).all():
        return float(stream.average_rate or stream.guessed_rate or 0) or 1.0
    steps = np.diff(times)
    mean = (times[-1] - times[0]) / len(steps)
    if mean <= 0 or abs(steps - mean).max() > _JITTER * mean:
        raise DataError(
            f"{path}: the frame rate varies (steps of {steps.min():.3g} to {steps.max():.3g} s); "
            "give fps to resample"
        )
    # The stated rate is exact where it agrees; times in a file are rounded to its clock.
    stated = float(stream.average_rate or 0)
    return stated if stated and abs(stated * mean - 1) < 0.02 else float(1 / mean)
