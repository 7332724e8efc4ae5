"""Clips from a folder: video files, and folders of numbered pictures; and `load_clips` for all.

    clips/                      or            clips/
      metadata.jsonl                            train/jump.mp4   train/jump.txt
      jump.mp4                                  train/run/1.png  train/run/2.png ... train/run.txt
      run/1.png  run/2.png ...                  test/...

`metadata.jsonl` has one object a line: `file_name` (of a video or a folder of pictures), `text` and
optionally `split` and `fps`. Without it, every video and every folder that holds pictures is a
clip. Actions of `jump.mp4` stand in `jump.actions.npy` or `jump.actions.jsonl` (one id or list of
numbers a line), those of the folder `run` in `run/actions.npy` or `run/actions.jsonl`: one per
frame, or one fewer; the action of frame t moves frame t to frame t + 1.

Invariant: no file outside the given folder is opened.
"""

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from ..core.errors import DataError, check_count, check_range
from .clip_archive import load_clip_archive, save_clip_archive
from .clip_video import SUFFIXES, nearest_in_time, read_video_clip
from .clips import DEFAULT_FPS, ClipDataset, align_actions
from .data import _SPLIT_FOLDERS, MAX_BAD_RATIO, _caption, _checked, _inside, _listed, json_lines
from .images import read_image

logger = logging.getLogger(__name__)

FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
MAX_TOTAL_BYTES = 16 * 2**30
MAX_ACTION_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Clip:
    name: str
    frames: NDArray[np.uint8]
    fps: float
    text: str
    split: str
    actions: NDArray | None


def load_clips(
    path: Path | str,
    image_size: int | None = None,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
) -> ClipDataset:
    """Load clips from a folder or an .npz archive.

    Args:
        path: Where they are.
        image_size: Side of square frames in pixels; None when all have one size already. Folders
            scale and crop to it, archives average whole pixels.
        fps: Frames per second to resample to; archives only change the stated rate. None keeps the
            rate, which must then be the same in all clips.
        max_frames: Keep at most this many frames of each clip; None keeps all.

    Raises:
        DataError: Missing, of another kind, empty, or damaged; the file is named.
        UsageError: A bad setting, or a video file and no PyAV.
    """
    path = Path(path)
    if image_size is not None:
        check_count("image_size", image_size)
    if fps is not None:
        check_range("fps", fps, 0.1, 1000)
    if max_frames is not None:
        check_count("max_frames", max_frames)
    if path.is_dir():
        return load_clip_folder(path, image_size, fps=fps, max_frames=max_frames)
    if not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix.lower() != ".npz":
        raise DataError(f"{path}: unknown kind; allowed a folder of clips or .npz")
    dataset = load_clip_archive(path, image_size, fps=fps)
    return dataset if max_frames is None else cut_short(dataset, max_frames)


def convert_clips(
    source: Path | str,
    target: Path | str,
    *,
    image_size: int | None = None,
    fps: float | None = None,
    max_frames: int | None = None,
) -> ClipDataset:
    """Load clips and write them as one .npz archive that `load_clips` reads.

    Args:
        source: A folder or .npz.
        target: The .npz file to create or replace.
        image_size: As in `load_clips`.
        fps: As in `load_clips`.
        max_frames: As in `load_clips`.

    Raises:
        DataError: As in `load_clips`.
    """
    dataset = load_clips(source, image_size, fps=fps, max_frames=max_frames)
    save_clip_archive(dataset, target)
    return dataset


def cut_short(dataset: ClipDataset, max_frames: int) -> ClipDataset:
    """Keep at most `max_frames` frames of every clip, from its start.

    Args:
        dataset: The clips.
        max_frames: At least 1.
    """
    lengths = np.minimum(dataset.lengths, max_frames)
    pieces = zip(dataset.offsets[:-1], lengths, strict=True)
    rows = np.concatenate([np.arange(start, start + length) for start, length in pieces])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    actions = dataset.actions
    if actions is not None:
        actions = align_actions(actions[rows], offsets, len(dataset.action_names))
    texts = (dataset.captions, dataset.split)
    return ClipDataset(
        dataset.frames[rows], offsets, *texts, dataset.fps, actions, dataset.action_names
    )


def load_clip_folder(
    folder: Path,
    image_size: int | None = None,
    *,
    fps: float | None = None,
    max_frames: int | None = None,
) -> ClipDataset:
    """Load a folder of videos and of folders of pictures.

    Args:
        folder: The folder.
        image_size: As in `load_clips`.
        fps: As in `load_clips`; also the rate of picture folders whose metadata name none.
        max_frames: As in `load_clips`.

    Raises:
        DataError: As in `load_clips`.
    """
    metadata = folder / "metadata.jsonl"
    rows = _listed(folder, metadata) if metadata.is_file() else list(_found(folder))
    clips: list[_Clip] = []
    bad: list[str] = []
    size = 0
    for row in rows:
        try:
            clip = _read(folder, row, image_size, fps, max_frames)
        except DataError as error:
            bad.append(error.message)
            continue
        clips.append(clip)
        size += clip.frames.nbytes
        if size > MAX_TOTAL_BYTES:
            raise DataError(
                f"{folder}: clips decode to more than {MAX_TOTAL_BYTES} bytes; give an image size "
                "or a number of frames"
            )
    if len(bad) > len(rows) * MAX_BAD_RATIO:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(f"{len(bad)} of {len(rows)} clips are bad: {'; '.join(bad[:3])}{more}")
    for message in bad:
        logger.warning("clip skipped: %s", message)
    return _joined(clips, folder)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which `frame2` comes before `frame10`.

    Args:
        name: A file name.
    """
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p]


def _found(folder: Path) -> Iterable[dict[str, Any]]:
    """Find clips: videos, and folders that hold pictures themselves."""
    for place in sorted([folder, *folder.rglob("*")]):
        is_video = place.suffix.lower() in SUFFIXES and place.is_file()
        if not is_video and not (place.is_dir() and _pictures_in(place)):
            continue
        relative = place.relative_to(folder)
        row: dict[str, Any] = {"file_name": relative.as_posix(), "text": ""}
        caption = place.with_suffix(".txt") if is_video else place.with_name(place.name + ".txt")
        if place != folder and caption.is_file():
            _inside(folder, caption.relative_to(folder).as_posix())
            row["text"] = _caption(caption)
        if len(relative.parts) > 1 and relative.parts[0] in _SPLIT_FOLDERS:
            row["split"] = relative.parts[0]
        yield row


def _pictures_in(place: Path) -> list[Path]:
    found = [p for p in place.iterdir() if p.suffix.lower() in FRAME_SUFFIXES and p.is_file()]
    return sorted(found, key=lambda file: natural_key(file.name))


def _read(
    folder: Path,
    row: dict[str, Any],
    image_size: int | None,
    fps: float | None,
    max_frames: int | None,
) -> _Clip:
    texts = _checked(row, folder)
    place = _inside(folder, row["file_name"])
    is_folder = place.is_dir()
    stem = place / "actions" if is_folder else place.with_suffix(".actions")
    actions = _read_actions(folder, stem)
    # Actions are counted against all frames, so nothing may be left out before they are aligned.
    every = actions is not None
    if is_folder:
        frames, rate = _read_pictures(folder, place, row, image_size, fps, not every)
    else:
        frames, rate = read_video_clip(
            place,
            image_size=image_size,
            fps=None if every else fps,
            max_frames=None if every else max_frames,
        )
    if actions is not None:
        if fps is not None and abs(rate / fps - 1) > 0.01:
            raise DataError(
                f"{place}: a clip with actions cannot be resampled from {rate:g} to {fps:g} "
                "frames per second"
            )
        try:
            actions = align_actions(actions, np.array([0, len(frames)]))[:max_frames]
        except DataError as error:
            raise DataError(f"{place}: {error.message}") from error
    kept = frames[:max_frames]
    return _Clip(row["file_name"], kept, rate, texts["text"], texts["split"], actions)


def _read_pictures(
    folder: Path,
    place: Path,
    row: dict[str, Any],
    image_size: int | None,
    fps: float | None,
    may_resample: bool,
) -> tuple[NDArray[np.uint8], float]:
    """Read a folder of pictures: frames and their rate."""
    files = _pictures_in(place)
    if not files:
        raise DataError(f"{place}: holds no frames")
    stated = row.get("fps", fps if fps is not None else DEFAULT_FPS)
    is_number = isinstance(stated, int | float) and not isinstance(stated, bool)
    if not is_number or not 0 < stated < 10_000:
        raise DataError(f"{place}: fps is {stated!r}; allowed a number above 0")
    images = []
    for file in files:
        inside = _inside(folder, file.relative_to(folder.resolve()).as_posix())
        images.append(read_image(inside, None, image_size))
        if images[-1].shape != images[0].shape:
            one, two = (f"{i.shape[1]}x{i.shape[0]}" for i in (images[0], images[-1]))
            raise DataError(f"{place}: {files[0].name} has {one} pixels but {file.name} {two}")
    frames = np.stack(images)
    if fps is None or not may_resample or abs(stated / fps - 1) < 1e-3:
        return frames, float(stated)
    return frames[nearest_in_time(np.arange(len(frames)) / stated, fps)], fps


def _read_actions(folder: Path, stem: Path) -> NDArray | None:
    """Read STEM.npy or STEM.jsonl, if there is one."""
    for suffix, read in ((".npy", _read_npy), (".jsonl", _read_jsonl)):
        file = stem.with_name(stem.name + suffix)
        if file.exists():
            inside = _inside(folder, file.relative_to(folder.resolve()).as_posix())
            if not inside.is_file() or inside.stat().st_size > MAX_ACTION_BYTES:
                raise DataError(f"{file}: not a file of at most {MAX_ACTION_BYTES} bytes")
            return read(inside)
    return None


def _read_npy(file: Path) -> NDArray:
    try:
        with file.open("rb") as handle:
            version = npy.read_magic(handle)
            readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
            shape, _, dtype = readers[version](handle)
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            # A header may promise more than the file holds, to make the reader allocate it.
            if dtype.hasobject or size > file.stat().st_size:
                raise DataError(f"{file}: holds objects, or less than its header says")
            handle.seek(0)
            return np.load(handle, allow_pickle=False)
    except (ValueError, KeyError, OSError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: not a readable .npy file ({error})") from error


def _read_jsonl(file: Path) -> NDArray:
    rows: list[Any] = []
    for number, row in json_lines(file):
        parts = row if isinstance(row, list) else [row]
        if not parts or not all(type(part) in (int, float) for part in parts):
            raise DataError(f"{file}, line {number}: needed a number or a list of numbers")
        if rows and isinstance(row, list) != isinstance(rows[0], list):
            raise DataError(f"{file}, line {number}: ids and lists are mixed")
        if rows and isinstance(row, list) and len(row) != len(rows[0]):
            raise DataError(f"{file}, line {number}: {len(row)} numbers, before {len(rows[0])}")
        rows.append(row)
    try:
        is_vector = bool(rows) and isinstance(rows[0], list)
        return np.array(rows, dtype=np.float32) if is_vector else np.array(rows)
    except (ValueError, OverflowError) as error:
        raise DataError(f"{file}: numbers out of range ({error})") from error


def _joined(clips: list[_Clip], folder: Path) -> ClipDataset:
    if not clips:
        raise DataError(f"{folder}: holds no clips")
    first = clips[0]
    for clip in clips:
        one, two = first.frames.shape[1:], clip.frames.shape[1:]
        if one != two:
            raise DataError(
                f"{folder}: {first.name} has {one[1]}x{one[0]} pixels but {clip.name} "
                f"{two[1]}x{two[0]}; give an image size to scale all to"
            )
        if abs(clip.fps / first.fps - 1) > 0.01:
            raise DataError(
                f"{folder}: {first.name} has {first.fps:g} frames per second but {clip.name} "
                f"{clip.fps:g}; give fps to resample all to"
            )
        if (clip.actions is None) != (first.actions is None):
            lacks, has = (clip, first) if clip.actions is None else (first, clip)
            raise DataError(f"{folder}: {has.name} has actions but {lacks.name} has none")
        if clip.actions is not None and first.actions is not None:
            if clip.actions.shape[1:] != first.actions.shape[1:]:
                raise DataError(f"{folder}: {first.name} and {clip.name} have unlike actions")
    offsets = np.concatenate([[0], np.cumsum([len(clip.frames) for clip in clips])])
    actions = None
    if first.actions is not None:
        actions = np.concatenate([clip.actions for clip in clips if clip.actions is not None])
        actions = align_actions(actions, offsets)
    return ClipDataset(
        np.concatenate([clip.frames for clip in clips]),
        offsets.astype(np.int64),
        [clip.text for clip in clips],
        [clip.split for clip in clips],
        first.fps,
        actions,
    )
