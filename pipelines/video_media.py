"""Clips into files: MP4, WebM and GIF with their record inside, and contact sheets.

What it does not know: models, tensors, or which command asked. Frames are uint8 arrays
[frames, height, width, 3] here. PyAV (the extra `video`) is imported where it is used.

Invariants: as in `media`: a file appears under its final name complete or not at all, and equal
frames and records give equal bytes.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.errors import DataError, ResourceError, UsageError, check_count, check_range
from ..core.messages import explain
from .media import MAX_RECORD_BYTES, TEXT_KEY, _check_regular, _fsync_folder, write_bytes
from .params import Record, canonical_json
from .video_input import import_av, opened

EXTENSIONS = (".mp4", ".webm", ".gif")
# Best first; the second is for builds of FFmpeg without x264, and no browser plays it.
_ENCODERS = {"mp4": ("libx264", "mpeg4"), "webm": ("libvpx-vp9",), "gif": ("gif",)}
_OPTIONS = {
    "libx264": {"crf": "15", "preset": "medium"},
    "mpeg4": {"qmin": "1", "qmax": "3", "b": "8000000"},
    "libvpx-vp9": {"crf": "18", "b": "0", "deadline": "good", "cpu-used": "3"},
    "gif": {},
}
_BT709 = 1
_MAX_GIF_FPS = 50

Metadata = Record[Any] | Mapping[str, Any]


def video_codecs() -> dict[str, str]:
    """Return, for each of mp4, webm and gif, the encoder that this PyAV has; none is left out."""
    av = import_av()
    found = {}
    for kind, names in _ENCODERS.items():
        for name in names:
            try:
                av.codec.Codec(name, "w")
            except ValueError:  # PyAV's way to say that a codec is not there
                continue
            found[kind] = name
            break
    return found


def save_video(
    frames: Iterable[NDArray[np.uint8] | Image.Image],
    path: str | Path,
    metadata: Metadata | None = None,
    *,
    fps: float,
    in_file: bool = True,
    sidecar: bool = True,
    scale: int = 1,
    pad: bool = False,
) -> str:
    """Write a video and, when there is a record, its sidecar `.json` with the file's hash.

    MP4 is H.264 (MPEG-4 part 2 where FFmpeg lacks x264), its index in front so that it plays while
    it loads; WebM is VP9; GIF has its own palette in every frame and loops. MP4 and WebM halve the
    resolution of colour, which shows on coloured edges of small pictures; `scale` makes that less.

    Args:
        frames: uint8 arrays [height, width, 3] or pictures, all of one size, or an array of them.
            Taken one by one; may be a generator.
        path: Final name, ending in .mp4, .webm or .gif.
        metadata: The record, or a JSON object; None writes neither comment nor sidecar.
        fps: Frames per second, 0.1 to 240, in GIF at most 50.
        in_file: False keeps the record out of the video and writes the sidecar only.
        sidecar: False writes no sidecar; the caller has one for several files.
        scale: Every pixel becomes a square of this many pixels, 1 to 64.
        pad: MP4 only: repeat the last row or column of frames of odd size instead of refusing.

    Returns:
        sha256 of the video file.

    Raises:
        UsageError: A bad name, rate, size or frame, no frames, or no encoder.
        ResourceError: The file cannot be written; no partial file is left.
    """
    path = Path(path)
    kind = path.suffix.lower()[1:]
    if f".{kind}" not in EXTENSIONS:
        raise UsageError(
            explain("output extension", got=path.suffix, allowed=", ".join(EXTENSIONS))
        )
    check_range("fps", fps, 0.1, _MAX_GIF_FPS if kind == "gif" else 240)
    check_count("scale", scale, 1, 64)
    record = None if metadata is None else _as_dict(metadata)
    comment = canonical_json({TEXT_KEY: record}) if record is not None and in_file else None
    sized = _sized(frames, scale, even=kind == "mp4", pad=pad)
    if kind == "gif":
        digest = _save_gif(sized, path, fps, comment)
    else:
        digest = _save_container(sized, path, kind, fps, comment)
    if record is not None and sidecar:
        told = record | {"file": path.name, "sha256": digest}
        text = json.dumps(told, indent=2, sort_keys=True, allow_nan=False) + "\n"
        write_bytes(path.with_suffix(".json"), text.encode())
    return digest


def read_video_metadata(path: str | Path) -> dict[str, Any]:
    """Read the record out of a video or a sidecar.

    Args:
        path: A file written by `save_video`, or its .json.

    Raises:
        DataError: Not a regular file, too large, not readable, or without a record.
    """
    path = Path(path)
    if path.suffix.lower() == ".json":
        _check_regular(path, MAX_RECORD_BYTES)
        return _parsed(path, path.read_bytes(), is_sidecar=True)
    with opened(path) as container:
        tags = {key.lower(): value for key, value in container.metadata.items()}
    text: str | bytes | None = tags.get("comment")
    if text is None and path.suffix.lower() == ".gif":
        text = _gif_comment(path)
    if text is None or len(text) > MAX_RECORD_BYTES:
        raise _no_record(path)
    return _parsed(path, text, is_sidecar=False)


def frame_strip(
    frames: NDArray[np.uint8],
    *,
    max_frames: int = 16,
    columns: int = 8,
    scale: int = 1,
    gap: int = 2,
) -> Image.Image:
    """Draw a contact sheet: frames of a clip in reading order on white.

    Args:
        frames: uint8 [frames, height, width, 3].
        max_frames: At most this many are shown, evenly spread from the first to the last.
        columns: Pictures per row.
        scale: Every pixel becomes a square of this many pixels.
        gap: White pixels around every picture.

    Raises:
        UsageError: No frames, or a bad setting.
    """
    for name, value in (("max_frames", max_frames), ("columns", columns), ("scale", scale)):
        check_count(name, value)
    check_count("gap", gap, 0)
    shown = [_as_frame(frames[i], None) for i in spread(len(frames), max_frames)]
    if not shown:
        raise UsageError(explain("no frames to draw", allowed="at least 1"))
    height, width = (side * scale for side in shown[0].shape[:2])
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    size = (gap + columns * (width + gap), gap + rows * (height + gap))
    sheet = Image.new("RGB", size, "white")
    for number, picture in enumerate(shown):
        row, column = divmod(number, columns)
        place = (gap + column * (width + gap), gap + row * (height + gap))
        sheet.paste(Image.fromarray(_enlarged(picture, scale)), place)
    return sheet


def spread(count: int, most: int) -> list[int]:
    """Choose at most `most` of `count` numbers, evenly, with the first and the last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / max(most - 1, 1)) for i in range(most)]


# ---- writing ---------------------------------------------------------------------------------


def _as_dict(metadata: Metadata) -> dict[str, Any]:
    return metadata.to_dict() if isinstance(metadata, Record) else dict(metadata)


def _as_frame(frame: Any, shape: tuple[int, ...] | None) -> NDArray[np.uint8]:
    """Check one frame: RGB, uint8, of the first frame's shape."""
    if isinstance(frame, Image.Image):
        frame = np.asarray(frame.convert("RGB"))
    is_picture = isinstance(frame, np.ndarray) and frame.ndim == 3 and frame.shape[2] == 3
    if not is_picture or frame.dtype != np.uint8 or 0 in frame.shape:
        kind = (
            f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame)
        )
        allowed = "uint8 [height, width, 3] or a picture"
        raise UsageError(explain("a frame is not a picture", got=str(kind), allowed=allowed))
    if shape is not None and frame.shape != shape:
        one, two = (f"{s[1]}x{s[0]}" for s in (shape, frame.shape))
        raise UsageError(explain("frames differ in size", got=two, allowed=one))
    return frame


def _enlarged(frame: NDArray[np.uint8], scale: int) -> NDArray[np.uint8]:
    return frame if scale == 1 else frame.repeat(scale, axis=0).repeat(scale, axis=1)


def _sized(
    frames: Iterable[Any], scale: int, *, even: bool, pad: bool
) -> Iterator[NDArray[np.uint8]]:
    """Yield checked, enlarged frames of a size that the format takes; at least one."""
    shape = None
    for item in frames:
        frame = _as_frame(item, shape)
        shape = frame.shape
        frame = _enlarged(frame, scale)
        odd = [side % 2 if even else 0 for side in frame.shape[:2]]
        if any(odd) and not pad:
            height, width = frame.shape[:2]
            raise UsageError(
                explain(
                    "size of an MP4",
                    got=f"{width}x{height}",
                    allowed="even width and height",
                    hint=f"{width + odd[1]}x{height + odd[0]} (pad=True), or scale={2 * scale}",
                )
            )
        yield np.pad(frame, ((0, odd[0]), (0, odd[1]), (0, 0)), mode="edge") if any(odd) else frame
    if shape is None:
        raise UsageError(explain("no frames to write", allowed="at least 1"))


def _rate(fps: float) -> Fraction:
    return Fraction(fps).limit_denominator(1001)


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """Yield the name of a partial file that becomes `path` when the block ends well."""
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as stream:
            os.fsync(stream.fileno())
        part.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ResourceError(explain(f"cannot write {path.name}: {reason}")) from error
    finally:
        part.unlink(missing_ok=True)


def _encoder(kind: str) -> str:
    codecs = video_codecs()
    if kind not in codecs:
        names = " or ".join(_ENCODERS[kind])
        raise UsageError(
            explain(f"this PyAV cannot write {kind}", allowed=", ".join(codecs), hint=names)
        )
    return codecs[kind]


def _add_stream(
    container: Any, codec: str, shape: tuple[int, ...], rate: Fraction, options: Mapping[str, str]
) -> Any:
    stream = container.add_stream(codec, rate=rate)
    stream.height, stream.width = shape[:2]
    stream.pix_fmt = "pal8" if codec == "gif" else "yuv420p"
    context = stream.codec_context
    context.time_base = 1 / rate
    context.options = dict(options)
    # A fixed number of threads: the bytes must not depend on the machine.
    context.thread_count = 1 if shape[0] * shape[1] <= 2**17 else 4
    if codec != "gif":
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = 1  # 16 to 235, what players expect
    return stream


def _yuv(av: Any, frame: NDArray[np.uint8], number: int, rate: Fraction) -> Any:
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    picture = rgb.reformat(format="yuv420p", dst_colorspace="ITU709")
    picture.pts, picture.time_base = number, 1 / rate
    return picture


def _save_container(
    frames: Iterator[NDArray[np.uint8]], path: Path, kind: str, fps: float, comment: str | None
) -> str:
    av, codec, rate = import_av(), _encoder(kind), _rate(fps)
    options = {"fflags": "+bitexact"} | ({"movflags": "+faststart"} if kind == "mp4" else {})
    first = next(frames)  # a bad frame is found before any file is made
    with _whole_file(path) as part:
        with av.open(f"file:{part.resolve()}", "w", format=kind, options=options) as container:
            if comment is not None:
                container.metadata["comment"] = comment
            gop = {"g": str(max(1, round(2 * fps)))}  # players can seek to every second second
            stream = _add_stream(container, codec, first.shape, rate, _OPTIONS[codec] | gop)
            container.mux(stream.encode(_yuv(av, first, 0, rate)))
            for number, frame in enumerate(frames, 1):
                container.mux(stream.encode(_yuv(av, frame, number, rate)))
            container.mux(stream.encode())
        with part.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _save_gif(
    frames: Iterator[NDArray[np.uint8]], path: Path, fps: float, comment: str | None
) -> str:
    av, rate, buffer = import_av(), _rate(fps), BytesIO()
    options = {"fflags": "+bitexact", "loop": "0"}
    with av.open(buffer, "w", format="gif", options=options) as container:
        stream = None
        for number, frame in enumerate(frames):
            stream = stream or _add_stream(container, _encoder("gif"), frame.shape, rate, {})
            picture = av.VideoFrame.from_ndarray(_palette(frame), format="pal8")
            picture.pts, picture.time_base = number, 1 / rate
            container.mux(stream.encode(picture))
        container.mux(stream.encode() if stream else ())
    content = buffer.getvalue()
    if comment is not None:
        place = 13 + (3 << (content[10] & 7) + 1 if content[10] & 0x80 else 0)
        content = content[:place] + _comment_block(comment.encode()) + content[place:]
    write_bytes(path, content)
    return hashlib.sha256(content).hexdigest()


def _palette(frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Reduce a frame to 256 colours of its own: indices [height, width], ARGB palette [256, 4]."""
    reduced = Image.fromarray(frame).quantize(256, dither=Image.Dither.NONE)
    colors = np.array(reduced.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    palette = np.full((256, 4), 255, dtype=np.uint8)
    palette[: len(colors), 1:] = colors
    return np.asarray(reduced), palette


def _comment_block(text: bytes) -> bytes:
    pieces = [text[i : i + 255] for i in range(0, len(text), 255)]
    return b"\x21\xfe" + b"".join(bytes([len(p)]) + p for p in pieces) + b"\0"


# ---- records ---------------------------------------------------------------------------------


def _gif_comment(path: Path) -> bytes | None:
    with Image.open(path, formats=("GIF",)) as image:
        return image.info.get("comment")


def _no_record(path: Path) -> DataError:
    hint = "a video written with its record, or its sidecar .json"
    return DataError(explain(f"{path.name} holds no blockloom parameters", hint=hint))


def _parsed(path: Path, text: str | bytes, *, is_sidecar: bool) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not is_sidecar:
            raise _no_record(path) from error
        raise DataError(explain(f"{path.name}: the record is not JSON")) from error
    record = value if is_sidecar or not isinstance(value, dict) else value.get(TEXT_KEY)
    if not isinstance(record, dict):
        raise _no_record(path)
    return record
