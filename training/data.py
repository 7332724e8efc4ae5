"""Captioned images in memory, read from a folder, an .npz archive or a Parquet file.

Everything is checked on the way in, and messages name the file. It does not know tokenizers or
training. Invariant: nothing is unpickled, and no file outside the given folder is opened.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import DataError, UsageError
from .archive import read_arrays, write_arrays
from .images import SUFFIXES, read_image

logger = logging.getLogger(__name__)

MAX_CAPTION = 2000  # characters
# One broken file in a thousand is bad luck and is skipped; more is a broken data set.
MAX_BAD_RATIO = 0.001
_SPLIT_FOLDERS = {"train", "test", "validation", "val"}


@dataclass(frozen=True)
class ImageDataset:
    """Captioned images of one size.

    Attributes:
        images: uint8 [items, height, width, 3], RGB.
        captions: One text per item; may be empty texts.
        split: Split of every item, for instance "train".
    """

    images: NDArray[np.uint8]
    captions: list[str]
    split: list[str]

    def __post_init__(self) -> None:
        """Check shapes.

        Raises:
            DataError: No RGB images, or lists of another length.
        """
        shape = self.images.shape
        if self.images.dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
            raise DataError(
                f"images are {self.images.dtype} {list(shape)}; needed uint8 "
                "[items, height, width, 3]"
            )
        for name in ("captions", "split"):
            if len(getattr(self, name)) != shape[0]:
                raise DataError(f"{shape[0]} images but {len(getattr(self, name))} {name}")

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.captions)

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "ImageDataset":
        """Select items by number, in the order given."""
        index = np.asarray(indices, dtype=np.int64)
        texts = ([text[i] for i in index] for text in (self.captions, self.split))
        return ImageDataset(self.images[index], *texts)

    def only(self, split: str) -> "ImageDataset":
        """Select the items of one split.

        Raises:
            DataError: No item has it; the splits present are named.
        """
        chosen = [i for i, name in enumerate(self.split) if name == split]
        if not chosen:
            present = ", ".join(sorted(set(self.split))) or "none"
            raise DataError(f"no item is in split {split!r}; splits present: {present}")
        return self.take(chosen)

    def pixels(self, indices: Tensor) -> Tensor:
        """Return items as float32 [items, 3, height, width] in [-1, 1].

        Args:
            indices: int64 [items].
        """
        chosen = torch.from_numpy(self.images[indices.numpy()])
        return chosen.permute(0, 3, 1, 2).float() / 127.5 - 1


def load_images(path: Path | str, image_size: int | None = None) -> ImageDataset:
    """Load a data set: a folder, an .npz archive or a .parquet file.

    Args:
        path: Where it is.
        image_size: Side of the square every image is scaled and centre-cropped to; None when all
            have one size already.

    Raises:
        DataError: Missing, of another kind, empty, or damaged; the file is named.
        UsageError: A .parquet file and no pyarrow.
    """
    path = Path(path)
    if path.is_dir():
        return load_folder(path, image_size)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    loaders = {".npz": load_npz, ".parquet": load_parquet}
    if path.suffix.lower() not in loaders:
        raise DataError(f"{path}: unknown kind; allowed a folder, .npz or .parquet")
    return loaders[path.suffix.lower()](path, image_size)


def load_folder(folder: Path, image_size: int | None = None) -> ImageDataset:
    """Load a folder of images.

    With `metadata.jsonl`, each line names a `file_name`, its `text` and optionally its `split`.
    Without it, all images below the folder are taken; the caption of `a.png`
    is the text of `a.txt`, and a top folder called train, test, validation or val is the split.

    Args:
        folder: The folder.
        image_size: As in `load_images`.

    Raises:
        DataError: As in `load_images`.
    """
    metadata = folder / "metadata.jsonl"
    rows = _listed(folder, metadata) if metadata.is_file() else _found(folder)
    return _assemble(
        rows, lambda row: read_image(_inside(folder, row["file_name"]), None, image_size), folder
    )


def load_npz(path: Path | str, image_size: int | None = None) -> ImageDataset:
    """Load an archive.

    Arrays: `images` uint8 [items, height, width, 3] (or without the last axis, for greys);
    optionally `captions`, and `split` as texts or as numbers into `split_names`.

    Args:
        path: The file.
        image_size: Must match the archive's images when given.

    Raises:
        DataError: As in `load_images`.
    """
    path = Path(path)
    arrays = read_arrays(path, {"images", "captions", "split", "split_names"})
    if "images" not in arrays:
        raise DataError(f"{path}: has no array 'images'")
    images = arrays["images"]
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    num_items = images.shape[0] if images.ndim else 0
    if not num_items:
        raise DataError(f"{path}: holds no images")
    if image_size is not None and images.shape[1:3] != (image_size, image_size):
        raise DataError(
            f"{path}: images are {images.shape[2]}x{images.shape[1]}; asked for {image_size}"
        )
    captions = _texts(path, arrays, "captions", num_items, "")
    split = _texts(path, arrays, "split", num_items, "train")
    try:
        return ImageDataset(images, captions, split)
    except DataError as error:
        raise DataError(f"{path}: {error.message}") from error


def load_parquet(path: Path, image_size: int | None = None) -> ImageDataset:
    """Load a Parquet file with an `image` column (bytes, or a record with `bytes`) and a `text`.

    Args:
        path: The file.
        image_size: As in `load_images`.

    Raises:
        DataError: As in `load_images`.
        UsageError: pyarrow is not installed.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(
            f"{path}: reading Parquet needs pyarrow; pip install 'blockloom[train]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            present = [n for n in file.schema_arrow.names if n in _COLUMNS]
            rows = file.read(columns=present).to_pylist()
    except (ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from error
    if "image" not in present:
        raise DataError(f"{path}: has no column 'image'")
    for number, row in enumerate(rows):
        row["file_name"] = f"row {number}"
    return _assemble(rows, lambda row: read_image(*_cell(row, path), image_size), path)


_COLUMNS = {"image", "text", "caption", "split"}


def convert(
    source: Path | str, target: Path | str, *, image_size: int | None = None
) -> ImageDataset:
    """Load a data set and write it as one .npz archive that `load_images` reads.

    Args:
        source: A folder, .npz or .parquet.
        target: The .npz file to create or replace.
        image_size: As in `load_images`.

    Raises:
        DataError: As in `load_images`.
    """
    dataset = load_images(source, image_size)
    kinds = sorted(set(dataset.split))
    arrays = {
        "images": dataset.images,
        "captions": np.array(dataset.captions, dtype=np.str_),
        "split": np.array([kinds.index(name) for name in dataset.split], dtype=np.uint8),
        "split_names": np.array(kinds, dtype=np.str_),
    }
    write_arrays(Path(target), arrays)
    return dataset


def _texts(
    path: Path,
    arrays: dict[str, NDArray],
    key: str,
    num_items: int,
    default: str,
) -> list[str]:
    values, legend = arrays.get(key), arrays.get(f"{key}_names")
    if values is None:
        return [default] * num_items
    if values.shape != (num_items,):
        raise DataError(f"{path}: array {key!r} has shape {list(values.shape)}, not [{num_items}]")
    if values.dtype.kind == "U":
        return values.tolist()
    if legend is None or legend.dtype.kind != "U" or legend.ndim != 1:
        raise DataError(f"{path}: array {key!r} has numbers but no texts in '{key}_names'")
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= len(legend):
        raise DataError(f"{path}: array {key!r} is not in 0..{len(legend) - 1}")
    return legend[values].tolist()


def json_lines(file: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number (from 1) and the value of every line of a JSON-lines file; blank ones not.

    Raises:
        DataError: a file that cannot be read, or a line that is not JSON.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}, line {number}: not JSON ({error})") from error
        yield number, row


def _listed(folder: Path, metadata: Path) -> list[dict[str, Any]]:
    rows = []
    for number, row in json_lines(metadata):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise DataError(f"{metadata}, line {number}: needs an object with 'file_name'")
        rows.append(row)
    return rows


def _found(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            continue
        relative = file.relative_to(folder)
        row: dict[str, Any] = {"file_name": relative.as_posix(), "text": ""}
        caption = file.with_suffix(".txt")
        if caption.is_file():
            _inside(folder, relative.with_suffix(".txt").as_posix())
            row["text"] = _caption(caption)
        if len(relative.parts) > 1 and relative.parts[0] in _SPLIT_FOLDERS:
            row["split"] = relative.parts[0]
        rows.append(row)
    return rows


def _caption(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as handle:
            return handle.read(MAX_CAPTION + 2).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read as UTF-8 text ({error})") from error


def _inside(folder: Path, name: str) -> Path:
    try:
        file = (folder / name).resolve()
        inside = file.is_relative_to(folder.resolve())
    except (OSError, ValueError) as error:
        raise DataError(f"{name!r} in {folder}: not a usable file name") from error
    if not inside:
        raise DataError(f"{name!r} in {folder}: leads outside the folder")
    return file


def _cell(row: dict[str, Any], path: Path) -> tuple[bytes, str]:
    name, value = f"{path}, {row['file_name']}", row["image"]
    if isinstance(value, dict):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise DataError(f"{name}: column 'image' holds no bytes")
    return value, name


def _assemble(
    rows: Iterable[dict[str, Any]],
    read: Callable[[dict[str, Any]], NDArray[np.uint8]],
    source: Path,
) -> ImageDataset:
    images: list[NDArray[np.uint8]] = []
    kept: list[dict[str, Any]] = []
    bad: list[str] = []
    count = 0
    for row in rows:
        count += 1
        try:
            images.append(read(row))
            kept.append(_checked(row, source))
        except DataError as error:
            del images[len(kept) :]
            bad.append(error.message)
    if len(bad) > count * MAX_BAD_RATIO:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(f"{len(bad)} of {count} items are bad: {'; '.join(bad[:3])}{more}")
    for message in bad:
        logger.warning("item skipped: %s", message)
    if not kept:
        raise DataError(f"{source}: holds no images")
    _check_one_size(images, kept, source)
    captions, split = ([row[key] for row in kept] for key in ("text", "split"))
    return ImageDataset(np.stack(images), captions, split)


def _checked(row: dict[str, Any], source: Path) -> dict[str, str]:
    text = row.get("text", row.get("caption"))
    values = {"file_name": row["file_name"], "text": "" if text is None else text}
    values["split"] = "train" if row.get("split") is None else row["split"]
    for key, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"{source}, {row['file_name']}: {key} is {value!r}, not a text")
        if len(value) > MAX_CAPTION:
            raise DataError(
                f"{source}, {row['file_name']}: {key} is longer than {MAX_CAPTION} characters"
            )
    return values


def _check_one_size(
    images: list[NDArray[np.uint8]], rows: list[dict[str, Any]], source: Path
) -> None:
    for image, row in zip(images, rows, strict=True):
        if image.shape != images[0].shape:
            one, two = (f"{shape[1]}x{shape[0]}" for shape in (images[0].shape, image.shape))
            raise DataError(
                f"{source}: {rows[0]['file_name']} has {one} pixels but {row['file_name']} {two}; "
                "give an image size to scale all to"
            )
