"""Clips in and out of .npz archives.

Layouts that are read: `frames` uint8 [frames, height, width, 3] with `offsets` [clips + 1], or
uint8 [clips, frames, height, width, 3] where all clips are equally long. Feature frames (poses,
observations) are floats [frames, features] with `offsets`. Beside them, all optional:

- texts: `captions`, `caption`, `mission` or `text`, one per clip
- split: `split` (texts, or numbers into `split_names`) or `is_test` (bool)
- `fps` (one number), `action_names`
- `actions`: per frame, shaped like the frames: ids, or vectors of floats

Actions in a file mean: taken AFTER their frame was seen, so that the action of frame t moves frame
t to frame t + 1. Sets recorded as "observe, act, observe" have this order already:

| set | actions | last frame of a clip |
|---|---|---|
| BabyAI (`mission`, `split`, no `fps`) | 7 ids | -1 in the file |
| LunarLander (`is_test`) | 4 ids | -1 in the file |
| CarRacing (equally long clips, `is_test`) | 3 floats | its result is not there: read as none |
| Mesh2Motion (`caption`, `split`) | none | |

With CarRacing the wheel is slow: a steer at t shows from frame t + 1 on, and most at t + 2, t + 3.
"""

from pathlib import Path

import numpy as np
from einops import reduce
from numpy.typing import NDArray

from ..core.errors import DataError
from .archive import read_arrays, write_arrays
from .clips import DEFAULT_FPS, ClipDataset, align_actions, check_offsets
from .data import _texts

_TEXT_KEYS = ("captions", "caption", "mission", "text")
_NAMES = {"frames", "offsets", "actions", "action_names", "split", "split_names", "is_test", "fps"}
_CHUNK = 512  # frames scaled at once, so that float copies stay small


def load_clip_archive(
    path: Path | str, image_size: int | None = None, *, fps: float | None = None
) -> ClipDataset:
    """Load an archive of clips.

    Args:
        path: The .npz file.
        image_size: Side to shrink square frames to by averaging whole pixels; must divide theirs.
        fps: Frames per second to state instead of the archive's; the frames stay as they are.

    Raises:
        DataError: Not an archive of clips, or parts that do not fit; file and fault are named.
    """
    path = Path(path)
    arrays = read_arrays(path, _NAMES | set(_TEXT_KEYS))
    try:
        frames, offsets = _frames(arrays)
        names = _action_names(arrays)
        actions = _actions(arrays, offsets, len(names))
        if image_size is not None:
            if frames.ndim != 4:
                raise DataError(f"image size {image_size}, but frames have no height and width")
            frames = shrink(frames, image_size)
        rate = _fps(arrays) if fps is None else fps
    except DataError as error:
        raise DataError(f"{path}: {error.message}") from error
    num_clips = len(offsets) - 1
    key = next((key for key in _TEXT_KEYS if key in arrays), "captions")
    captions = _texts(path, arrays, key, num_clips, "")
    split = _split(path, arrays, num_clips)
    try:
        return ClipDataset(frames, offsets, captions, split, rate, actions, names)
    except DataError as error:
        raise DataError(f"{path}: {error.message}") from error


def save_clip_archive(dataset: ClipDataset, path: Path | str) -> None:
    """Write clips as one archive that `load_clip_archive` reads back unchanged.

    Args:
        dataset: The clips.
        path: The .npz file to create or replace, whole or not at all.
    """
    kinds = sorted(set(dataset.split))
    arrays: dict[str, NDArray] = {
        "frames": dataset.frames,
        "offsets": dataset.offsets,
        "captions": np.array(dataset.captions, dtype=np.str_),
        "split": np.array([kinds.index(name) for name in dataset.split], dtype=np.int32),
        "split_names": np.array(kinds, dtype=np.str_),
        "fps": np.array([dataset.fps], dtype=np.float64),
    }
    if dataset.actions is not None:
        arrays["actions"] = dataset.actions
        if dataset.action_names:
            arrays["action_names"] = np.array(dataset.action_names, dtype=np.str_)
    write_arrays(Path(path), arrays)


def shrink(frames: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Shrink square frames by averaging blocks of whole pixels.

    Args:
        frames: uint8 [frames, side, side, 3].
        size: New side in pixels.

    Returns:
        uint8 [frames, size, size, 3], rounded to the nearest level.

    Raises:
        DataError: Frames are not square, or `size` does not divide their side.
    """
    height, width = frames.shape[1:3]
    if height == width == size:
        return frames
    if height != width or size < 1 or height % size:
        legal = [side for side in range(height, 0, -1) if height % side == 0]
        close = min(legal, key=lambda side: abs(side - size))
        hint = f"; try {close}" if height == width else ""
        raise DataError(
            f"frames are {width}x{height}; image size {size} must divide both sides{hint}"
        )
    factor = height // size
    small = np.empty((len(frames), size, size, 3), dtype=np.uint8)
    for start in range(0, len(frames), _CHUNK):
        chunk = frames[start : start + _CHUNK].astype(np.float32)
        mean = reduce(chunk, "t (h a) (w b) c -> t h w c", "mean", a=factor, b=factor)
        small[start : start + _CHUNK] = np.rint(mean)
    return small


def _frames(arrays: dict[str, NDArray]) -> tuple[NDArray, NDArray[np.int64]]:
    if "frames" not in arrays:
        raise DataError("has no array 'frames'")
    frames = arrays["frames"]
    if frames.dtype.kind == "f":
        frames = frames.astype(np.float32)
    if frames.ndim == 5:
        if "offsets" in arrays:
            raise DataError("frames have 5 axes, one clip each, and yet there are 'offsets'")
        clips, length = frames.shape[:2]
        if not clips or not length:
            raise DataError(f"holds {clips} clips of {length} frames")
        offsets = np.arange(clips + 1, dtype=np.int64) * length
        return frames.reshape(clips * length, *frames.shape[2:]), offsets
    if "offsets" not in arrays:
        raise DataError(f"frames have {frames.ndim} axes and there is no array 'offsets'")
    check_offsets(arrays["offsets"], len(frames) if frames.ndim else 0)
    return frames, arrays["offsets"].astype(np.int64)


def _actions(
    arrays: dict[str, NDArray], offsets: NDArray[np.int64], num_names: int
) -> NDArray | None:
    if "actions" not in arrays:
        return None
    actions = arrays["actions"]
    if arrays["frames"].ndim == 5:
        clips, length = arrays["frames"].shape[:2]
        if actions.shape[:2] not in ((clips, length), (clips, length - 1)):
            raise DataError(
                f"actions are {list(actions.shape)}; needed [{clips}, {length}] like the frames"
            )
        actions = actions.reshape(-1, *actions.shape[2:])
    return align_actions(actions, offsets, num_names)


def _action_names(arrays: dict[str, NDArray]) -> tuple[str, ...]:
    names = arrays.get("action_names")
    if names is None:
        return ()
    if names.dtype.kind != "U" or names.ndim != 1:
        raise DataError("array 'action_names' is not a row of texts")
    return tuple(names.tolist())


def _fps(arrays: dict[str, NDArray]) -> float:
    if "fps" not in arrays:
        return DEFAULT_FPS
    value = arrays["fps"]
    if value.size != 1 or value.dtype.kind not in "iuf":
        raise DataError(f"array 'fps' is {value.dtype} {list(value.shape)}; needed one number")
    return float(value.reshape(-1)[0])


def _split(path: Path, arrays: dict[str, NDArray], num_clips: int) -> list[str]:
    is_test = arrays.get("is_test")
    if "split" in arrays or is_test is None:
        return _texts(path, arrays, "split", num_clips, "train")
    if is_test.dtype.kind != "b" or is_test.shape != (num_clips,):
        raise DataError(
            f"{path}: array 'is_test' is {is_test.dtype} {list(is_test.shape)}; "
            f"needed bool [{num_clips}]"
        )
    return ["test" if flag else "train" for flag in is_test]
