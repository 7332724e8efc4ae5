"""Pictures in and out of files: PNG with its record inside, sidecar JSON, guarded reading.

What it does not know: models, tensors, or which command asked. A picture is a Pillow image here.

Invariants: a file appears under its final name complete or not at all (`.part` in the same
folder, fsync, rename, fsync of the folder); names never hold the raw prompt; input pictures
pass an allow-list of formats and caps on bytes and pixels before a decoder sees them.
"""

import hashlib
import json
import os
import stat
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from ..core.errors import BlockloomError, DataError, ResourceError, UsageError
from ..core.messages import explain
from .params import ImageParams, Record, canonical_json, read_record

TEXT_KEY = "blockloom"
MAX_INPUT_BYTES = 20 * 2**20
MAX_INPUT_PIXELS = 4096 * 4096
MAX_RECORD_BYTES = 2**20
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Device names that Windows refuses as file names, whatever the extension.
_RESERVED = {"con", "prn", "aux", "nul"} | {f"{d}{i}" for d in ("com", "lpt") for i in range(10)}


def slug(text: str, max_length: int = 40) -> str:
    """Turn any text into a short name that every file system accepts.

    Letters are reduced to ASCII, the rest becomes single hyphens. When that loses anything but
    case and spaces, eight digits of the text's sha256 keep different texts apart.

    Args:
        text: A prompt or an item id; may hold anything.
        max_length: Longest result in characters, at least 16.

    Returns:
        Characters a-z, 0-9 and hyphen; never empty, never a reserved device name.
    """
    folded = unicodedata.normalize("NFKD", text[:4096]).encode("ascii", "ignore").decode().lower()
    words = "".join(c if c.isalnum() else " " for c in folded).split()
    name = "-".join(words)
    is_plain = text.lower() == " ".join(words) or text.lower() == name
    if is_plain and name and len(name) <= max_length and name not in _RESERVED:
        return name
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    stem = name[: max_length - 9].strip("-")
    return f"{stem}-{digest}" if stem else digest


def file_name(index: int, text: str, seed: int, extension: str = "png") -> str:
    """Name one output: `{index:05d}-{slug}-{seed}.{ext}`.

    Args:
        index: Position in the run, from 0.
        text: Prompt or id the slug is made from.
        seed: Seed of the picture.
        extension: Without the dot.
    """
    return f"{index:05d}-{slug(text)}-{seed}.{extension}"


@contextmanager
def _as_resource_error(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            explain(f"cannot write {path.name}: {error.strerror or error}")
        ) from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that a crash leaves either the old state or the whole new file.

    Args:
        path: Final name; its folder must exist.
        content: All bytes.

    Raises:
        ResourceError: Disk full, folder not writable, or another write failure; nothing is left.
    """
    part = path.with_name(f".{path.name[:100]}.{os.getpid()}.part")
    with _as_resource_error(path):
        try:
            with part.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        _fsync_folder(path.parent)


def _fsync_folder(folder: Path) -> None:
    if os.name != "posix":  # Windows has no handle on folders to flush.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def encode_png(image: Image.Image, record: Record[Any] | None = None) -> bytes:
    """Encode a picture as PNG; equal pictures and records give equal bytes.

    Args:
        image: Any mode that Pillow can turn into RGB.
        record: Written as text chunk `blockloom` (JSON); None writes no text at all.

    Returns:
        The file's bytes.
    """
    info = PngImagePlugin.PngInfo()
    if record is not None:
        info.add_text(TEXT_KEY, canonical_json(record.to_dict()))
    buffer = BytesIO()
    # A fresh copy carries no EXIF, GPS or colour profile of an input picture.
    clean = Image.frombytes("RGB", image.size, image.convert("RGB").tobytes())
    clean.save(buffer, format="PNG", pnginfo=info, compress_level=6)
    return buffer.getvalue()


def save_png(
    image: Image.Image,
    path: str | Path,
    metadata: Record[Any] | None = None,
    *,
    in_file: bool = True,
) -> str:
    """Write a PNG and, when there is a record, its sidecar `.json` with the file's hash.

    Args:
        image: The picture.
        path: Final name, ending in .png.
        metadata: The record; None writes neither text chunk nor sidecar.
        in_file: False keeps the record out of the PNG and writes the sidecar only.

    Returns:
        sha256 of the PNG file.

    Raises:
        UsageError: The name does not end in .png.
        ResourceError: The file cannot be written; no partial file is left.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UsageError(explain("output extension", got=path.suffix, allowed=".png"))
    content = encode_png(image, metadata if in_file else None)
    digest = hashlib.sha256(content).hexdigest()
    write_bytes(path, content)
    if metadata is not None:
        sidecar = metadata.to_dict() | {"file": path.name, "sha256": digest}
        text = json.dumps(sidecar, indent=2, sort_keys=True, allow_nan=False) + "\n"
        write_bytes(path.with_suffix(".json"), text.encode())
    return digest


def is_done(path: Path, key: str) -> bool:
    """Say whether a finished output with this key stands under this name.

    Args:
        path: Name of the PNG.
        key: `ImageParams.key` that is expected.

    Returns:
        True only when file and sidecar exist, and the sidecar names this key and the file's actual
        sha256 (in `files` where one sidecar stands for several files).
    """
    try:
        sidecar = json.loads(path.with_suffix(".json").read_bytes())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return False
    if not isinstance(sidecar, dict) or sidecar.get("key") != key:
        return False
    files = sidecar.get("files")
    told = files.get(path.name) if isinstance(files, dict) else sidecar.get("sha256")
    return bool(told == digest)


def read_metadata(path: str | Path) -> Record[ImageParams]:
    """Read the record out of a PNG or a sidecar.

    Args:
        path: A .png written by `save_png`, or its .json.

    Raises:
        DataError: Not a regular file, too large, not readable, or without a record.
    """
    path = Path(path)
    _check_regular(path, MAX_INPUT_BYTES)
    if path.suffix.lower() == ".json":
        text: Any = _read_all(path, MAX_RECORD_BYTES)
    else:
        with _open_image(path) as image:
            text = getattr(image, "text", {}).get(TEXT_KEY)
    if text is None:
        raise DataError(
            explain(
                f"{path.name} holds no blockloom parameters",
                hint="a PNG written without --no-metadata, or its sidecar .json",
            ),
        )
    try:
        return read_record(json.loads(text), ImageParams, path.name)
    except (ValueError, RecursionError) as error:
        if isinstance(error, BlockloomError):
            raise
        raise DataError(explain(f"{path.name}: the record is not JSON")) from error


def read_image(path: str | Path) -> Image.Image:
    """Read a picture from an untrusted file as upright RGB, transparency on white.

    Args:
        path: PNG, JPEG, WEBP, GIF (first frame) or BMP; at most 20 MiB and 4096 x 4096 pixels.

    Returns:
        RGB image without any metadata of the file.

    Raises:
        DataError: Missing, not a regular file, refused format, over a cap, or damaged.
    """
    path = Path(path)
    _check_regular(path, MAX_INPUT_BYTES)
    with _open_image(path) as image, _as_data_error(path):
        return _to_rgb(ImageOps.exif_transpose(image))


def _check_regular(path: Path, max_bytes: int) -> None:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "bad name"
        raise DataError(explain(f"cannot read {path.name}: {reason}")) from error
    # A FIFO or a device would hang or never end, so the kind is checked before opening.
    if not stat.S_ISREG(status.st_mode):
        raise DataError(explain(f"{path.name or path} is not a regular file"))
    if status.st_size > max_bytes:
        raise DataError(
            explain(
                f"{path.name} is too large",
                got=f"{status.st_size} bytes",
                allowed=f"at most {max_bytes} bytes",
            ),
        )


def _read_all(path: Path, max_bytes: int) -> str:
    _check_regular(path, max_bytes)
    with _as_data_error(path):
        return path.read_text(encoding="utf-8")


@contextmanager
def _as_data_error(path: Path) -> Iterator[None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns on damaged EXIF; the pixels still count.
            yield
    except BlockloomError:
        raise
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, KeyError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            explain(f"cannot decode {path.name}: {first_line.replace(str(path), path.name)}"),
        ) from error


@contextmanager
def _open_image(path: Path) -> Iterator[Image.Image]:
    """Open, check the header's size, and load the pixels, all before anyone else looks."""
    with _as_data_error(path):
        try:
            image = Image.open(path, formats=READABLE_FORMATS)
        except Image.DecompressionBombError as error:
            raise DataError(
                explain(f"{path.name} has too many pixels", allowed=f"at most {MAX_INPUT_PIXELS}"),
            ) from error
        except UnidentifiedImageError as error:
            raise DataError(
                explain(
                    f"{path.name} is not a picture of a known format",
                    allowed=", ".join(READABLE_FORMATS),
                ),
            ) from error
    with image:
        width, height = image.size
        if width * height > MAX_INPUT_PIXELS:
            raise DataError(
                explain(
                    f"{path.name} has too many pixels",
                    got=f"{width} x {height}",
                    allowed=f"at most {MAX_INPUT_PIXELS}",
                ),
            )
        with _as_data_error(path):
            image.load()
        yield image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # 16-bit grey would be clipped, not scaled, by Pillow's own conversion.
        image = image.convert("F").point(lambda value: value * (1 / 257)).convert("L")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    rgb = image.convert("RGB")
    return Image.frombytes("RGB", rgb.size, rgb.tobytes())


def pixels_sha256(image: Image.Image) -> str:
    """Hash a picture's size and RGB bytes, whatever file it came from."""
    header = f"{image.width}x{image.height}:".encode()
    return hashlib.sha256(header + image.convert("RGB").tobytes()).hexdigest()
