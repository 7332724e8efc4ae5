"""Read one image file of unknown origin into RGB pixels, or say why not.

PNG, JPEG, WebP and GIF (first frame) are decoded with Pillow; other formats are not even tried.
Rotation tags are applied, transparency is laid on white, 16-bit, palette and CMYK images become
8-bit RGB. It does not know captions or data sets.
"""

import io
import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ..core.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif"})
MAX_FILE_BYTES = 64 * 2**20
MAX_PIXELS = 64_000_000


def read_image(
    source: Path | bytes, name: str | None = None, image_size: int | None = None
) -> NDArray[np.uint8]:
    """Decode an image.

    Args:
        source: File, or the bytes of one.
        name: What messages call it; the path when None.
        image_size: Side of the square to scale and centre-crop to; None keeps the size.

    Returns:
        uint8 [height, width, 3].

    Raises:
        DataError: Unreadable, of another format, too large, or cut short; the file is named.
    """
    name = name or str(source)
    content = _content(source, name)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large or odd files; size is judged below, oddities are harmless.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_size(image, name)
                picture = to_rgb(ImageOps.exif_transpose(image))
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"{name}: not an image of type {', '.join(FORMATS)}") from error
    # Pillow's decoders raise many types on hostile input; all mean the same to the user.
    except Exception as error:
        raise DataError(f"{name}: cannot be decoded ({type(error).__name__}: {error})") from error
    if image_size is not None:
        picture = ImageOps.fit(picture, (image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn any Pillow mode into RGB, transparency on white.

    Args:
        image: A loaded or lazily opened image.
    """
    if image.mode.startswith("I"):
        # 16-bit greys: convert() would clip at 255 instead of scaling.
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    return image.convert("RGB")


def _content(source: Path | bytes, name: str) -> bytes:
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > MAX_FILE_BYTES:
            raise DataError(f"{name}: {size} bytes; at most {MAX_FILE_BYTES} are read")
        return source if isinstance(source, bytes) else source.read_bytes()
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror or error})") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(f"{name}: {width}x{height} pixels; at most {MAX_PIXELS} in all are decoded")
