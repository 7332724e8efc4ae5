"""Captioned motion from files: .npz sets and folders of BVH, brought to one body and one rate.

Read are

- a folder of BVH files: `jump.bvh` with its caption in `jump.txt`, or captions of all files in
  `captions.jsonl` (or `metadata.jsonl`): `file_name`, `text` and optionally `split` a line; without
  them the folders `train`, `test` and so on name the split
- a motion .npz: `joints` [frames, joints, 3] in metres with `offsets` [clips + 1]; optionally
  `fps`, `text` (or `captions`), `split`, `joint_names` and `parents` (else the 22 joints), and with
  `rest_joints` [bodies, joints, 3] and `skeleton_id` [clips] also `bone_quat` [frames, joints, 4]:
  the turn (w, x, y, z) of the bone that ends at a joint against the rest pose, in the world
- an .npz of feature frames, as `save_clip_archive` writes it

Every clip goes to the 22 joints (motion/retarget.py), to 20 frames per second, onto the floor, and
then into HumanML3D's 263 features (motion/features.py). It does not know models.

Invariant: no file outside a given folder is opened.
"""

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.errors import DataError
from ..motion.bvh import read_bvh
from ..motion.bvh_motion import bvh_to_motion
from ..motion.clip import Motion, check_length, resample
from ..motion.features import HUMAN_SIZE, human_features
from ..motion.names import name_parts
from ..motion.retarget import retarget
from ..motion.rotations import unit
from ..motion.skeleton import HUMAN22, Skeleton, local_rotations
from .archive import read_arrays
from .clip_archive import load_clip_archive, save_clip_archive
from .clips import ClipDataset, check_offsets
from .data import _SPLIT_FOLDERS, _caption, _checked, _inside, _listed, _texts
from .motion_augment import mirrored, mirrored_text

logger = logging.getLogger(__name__)

FPS = 20.0
"""Frames per second of all motion features."""
MAX_FRAMES = 2_000_000
"""Frames of a set in all: 2 GB of features."""
MOST_BAD = 0.1
"""Share of clips that may be left out: motion sets are small, and bodies and makes are many."""
_LISTS = ("captions.jsonl", "metadata.jsonl")
_ARRAYS = {
    "joints", "bone_quat", "offsets", "text", "captions", "split", "split_names", "skeleton_id",
    "rest_joints", "joint_names", "parents", "fps",
}  # fmt: skip


@dataclass(frozen=True)
class NamedMotion:
    """A clip with its caption (`motion.text`), and where it came from.

    Attributes:
        name: For messages.
        motion: Any body, any rate; or why it could not be read.
        split: Such as "train".
    """

    name: str
    motion: Motion | DataError
    split: str


def load_motions(path: Path | str, *, mirror: bool = False) -> ClipDataset:
    """Load motion as feature frames.

    Args:
        path: Folder of BVH files, motion .npz, or .npz of feature frames.
        mirror: Add every training clip a second time with left and right swapped, in its caption
            too.

    Raises:
        DataError: Missing, of another kind, empty, or damaged; the file and clip are named.
    """
    path = Path(path)
    if path.is_dir():
        dataset = as_features(read_motion_folder(path), str(path))
    elif not path.is_file():
        raise DataError(f"{path}: no such file or folder")
    elif path.suffix.lower() != ".npz":
        raise DataError(f"{path}: unknown kind; allowed a folder of .bvh files or .npz")
    elif holds_motion(path):
        dataset = as_features(read_motion_archive(path), str(path))
    else:
        dataset = load_clip_archive(path)
        if not dataset.num_features:
            raise DataError(f"{path}: holds pictures; needed 'joints', or 'frames' of features")
    return with_mirror(dataset) if mirror else dataset


def convert_motions(source: Path | str, target: Path | str, *, mirror: bool = False) -> ClipDataset:
    """Load motion and write it as one .npz of feature frames that `load_motions` reads.

    Args:
        source: As in `load_motions`.
        target: The .npz file to create or replace.
        mirror: As in `load_motions`.

    Raises:
        DataError: As in `load_motions`.
    """
    dataset = load_motions(source, mirror=mirror)
    save_clip_archive(dataset, target)
    return dataset


def holds_motion(path: Path | str) -> bool:
    """Tell whether a folder holds BVH files, or an .npz joints."""
    path = Path(path)
    if path.is_dir():
        return any(True for _ in _bvh_files(path))
    is_archive = path.suffix.lower() == ".npz" and path.is_file()
    return is_archive and "joints" in read_arrays(path, {"joints"})


def as_features(motions: Iterable[NamedMotion], source: str) -> ClipDataset:
    """Bring motions to the 22 joints, 20 frames per second and the floor, and describe them.

    Args:
        motions: At least one that is two frames long or more at 20 frames per second.
        source: Where they came from, for messages.

    Raises:
        DataError: None is left, or more than a tenth cannot be used.
    """
    rows: list[NDArray[np.float32]] = []
    texts: list[str] = []
    split: list[str] = []
    bad: list[str] = []
    for item in motions:
        try:
            if isinstance(item.motion, DataError):
                raise item.motion
            rows.append(motion_row(item.motion))
        except DataError as error:
            reason = error.message.removeprefix(Path(item.name).name).lstrip(": ")
            bad.append(f"{item.name}: {reason}")
            continue
        texts.append(item.motion.text)
        split.append(item.split)
    if len(bad) > (len(rows) + len(bad)) * MOST_BAD:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{source}: {len(bad)} of {len(rows) + len(bad)} clips are bad: "
            f"{'; '.join(bad[:3])}{more}"
        )
    for message in bad:
        logger.warning("clip skipped: %s", message)
    if not rows:
        raise DataError(f"{source}: holds no motion")
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return ClipDataset(np.concatenate(rows), offsets, texts, split, FPS)


def motion_row(motion: Motion) -> NDArray[np.float32]:
    """Describe one motion of any body and rate by 263 features at 20 frames per second.

    Raises:
        DataError: A body whose joints fit no known style, fewer than two frames, or a rate so low
            that it would grow beyond measure.
    """
    check_length(motion, FPS)
    return human_features(resample(retarget(motion, HUMAN22), FPS).on_floor())


def with_mirror(dataset: ClipDataset) -> ClipDataset:
    """Add every training clip a second time with left and right swapped, in its caption too.

    Args:
        dataset: Clips of the 263 features.

    Raises:
        DataError: Other features.
    """
    if dataset.num_features != HUMAN_SIZE:
        raise DataError(
            f"frames have {dataset.num_features} features; only the {HUMAN_SIZE} of the 22 joints "
            "can be mirrored"
        )
    if dataset.actions is not None:
        raise DataError("clips with actions cannot be mirrored; leave mirror out")
    index = [i for i, name in enumerate(dataset.split) if name == "train"]
    if not index:
        return dataset
    chosen = dataset.take(index)
    frames = mirrored(torch.from_numpy(chosen.frames)).numpy()
    return ClipDataset(
        np.concatenate([dataset.frames, frames]),
        np.concatenate([dataset.offsets, chosen.offsets[1:] + dataset.offsets[-1]]),
        dataset.captions + [mirrored_text(text) for text in chosen.captions],
        dataset.split + chosen.split,
        dataset.fps,
    )


def read_motion_folder(folder: Path) -> Iterator[NamedMotion]:
    """Read a folder of BVH files, one at a time.

    Args:
        folder: The folder.

    Raises:
        DataError: No BVH file, a list that cannot be read, or a name that leads outside.
    """
    listed = next((folder / name for name in _LISTS if (folder / name).is_file()), None)
    rows = list(_found(folder)) if listed is None else _listed(folder, listed)
    if not rows:
        raise DataError(f"{folder}: holds no .bvh files")
    for row in rows:
        texts = _checked(row, folder)
        file = _inside(folder, row["file_name"])
        motion: Motion | DataError
        try:
            motion = bvh_to_motion(read_bvh(file), text=texts["text"])
        except DataError as error:
            motion = error
        yield NamedMotion(row["file_name"], motion, texts["split"])


def read_motion_archive(path: Path) -> Iterator[NamedMotion]:
    """Read a motion .npz, one clip at a time; the arrays are told at the top of this file.

    Args:
        path: The .npz file.

    Raises:
        DataError: Arrays that are missing or do not fit each other; file and array are named.
    """
    arrays = read_arrays(path, _ARRAYS)
    try:
        offsets = _checked_offsets(arrays)
        bodies = _bodies(arrays)
        rate = _rate(arrays)
        body_of = _body_of(arrays, len(offsets) - 1, len(bodies))
    except DataError as error:
        raise DataError(f"{path}: {error.message}") from error
    key = "text" if "text" in arrays else "captions"
    texts = _texts(path, arrays, key, len(offsets) - 1, "")
    split = _texts(path, arrays, "split", len(offsets) - 1, "train")
    turns = arrays.get("bone_quat")
    for clip, (start, stop) in enumerate(pairwise(offsets)):
        body = bodies[body_of[clip]]
        joints = arrays["joints"][start:stop].astype(np.float32)
        motion: Motion | DataError
        try:
            local = None if turns is None else _local(body, turns[start:stop])
            motion = Motion(joints, body, rate, local, texts[clip])
            # Without a rest pose, bones have the lengths they have in this clip.
            motion = motion if "rest_joints" in arrays else _measured(motion)
        except DataError as error:
            motion = error
        yield NamedMotion(f"clip {clip}", motion, split[clip])


def _bvh_files(folder: Path) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() == ".bvh" and file.is_file():
            yield file


def _found(folder: Path) -> Iterator[dict[str, Any]]:
    for file in _bvh_files(folder):
        relative = file.relative_to(folder)
        row: dict[str, Any] = {"file_name": relative.as_posix(), "text": ""}
        caption = file.with_suffix(".txt")
        if caption.is_file():
            _inside(folder, relative.with_suffix(".txt").as_posix())
            row["text"] = _caption(caption)
        if len(relative.parts) > 1 and relative.parts[0] in _SPLIT_FOLDERS:
            row["split"] = relative.parts[0]
        yield row


def _checked_offsets(arrays: dict[str, NDArray]) -> NDArray[np.int64]:
    joints = arrays["joints"]
    if joints.dtype.kind != "f" or joints.ndim != 3 or joints.shape[2] != 3:
        raise DataError(
            f"array 'joints' is {joints.dtype} {list(joints.shape)}; needed floats "
            "[frames, joints, 3]"
        )
    if len(joints) > MAX_FRAMES:
        raise DataError(f"holds {len(joints)} frames; at most {MAX_FRAMES} are read")
    if "offsets" not in arrays:
        raise DataError("has no array 'offsets'")
    check_offsets(arrays["offsets"], len(joints))
    turns = arrays.get("bone_quat")
    if turns is not None and turns.shape != (*joints.shape[:2], 4):
        raise DataError(
            f"array 'bone_quat' is {list(turns.shape)}; needed [{len(joints)}, {joints.shape[1]}, "
            "4] like 'joints'"
        )
    if turns is not None and "rest_joints" not in arrays:
        raise DataError("has 'bone_quat' but no 'rest_joints' that they turn")
    return arrays["offsets"].astype(np.int64)


def _bodies(arrays: dict[str, NDArray]) -> list[Skeleton]:
    """Build the skeletons of an archive; the 22 joints where it names none."""
    names, parents = HUMAN22.names, HUMAN22.parents
    if "joint_names" in arrays:
        if arrays["joint_names"].dtype.kind != "U" or "parents" not in arrays:
            raise DataError("array 'joint_names' is not texts, or there is no array 'parents'")
        names = tuple(map(str, arrays["joint_names"].ravel()))
        parents = tuple(int(parent) for parent in arrays["parents"].ravel())
    if arrays["joints"].shape[1] != len(names):
        raise DataError(f"'joints' has {arrays['joints'].shape[1]} joints, and {len(names)} names")
    is_human = names == HUMAN22.names and parents == HUMAN22.parents
    rest = arrays.get("rest_joints")
    if rest is None:
        if not is_human:
            raise DataError("has joints other than the 22 of HumanML3D and no 'rest_joints'")
        return [HUMAN22]
    if rest.dtype.kind != "f" or rest.ndim != 3 or rest.shape[1:] != (len(names), 3):
        raise DataError(
            f"array 'rest_joints' is {rest.dtype} {list(rest.shape)}; needed floats "
            f"[bodies, {len(names)}, 3]"
        )
    bones = rest.astype(np.float64)
    bones[:, 1:] -= rest[:, np.clip(parents[1:], 0, len(names) - 1)]
    if is_human:
        return [HUMAN22.with_offsets(part) for part in bones]
    return [name_parts(Skeleton(names, parents, part)) for part in bones]


def _body_of(arrays: dict[str, NDArray], clips: int, bodies: int) -> NDArray[np.int64]:
    number = arrays.get("skeleton_id", np.zeros(clips, np.int64))
    if number.shape != (clips,) or number.dtype.kind not in "iu":
        raise DataError(f"array 'skeleton_id' is {number.dtype} {list(number.shape)}")
    if clips and not 0 <= number.min() <= number.max() < bodies:
        raise DataError(f"array 'skeleton_id' is not in 0..{bodies - 1}")
    return number.astype(np.int64)


def _rate(arrays: dict[str, NDArray]) -> float:
    value = arrays.get("fps", np.array([FPS]))
    if value.size != 1 or value.dtype.kind not in "iuf" or not float(value.reshape(-1)[0]) > 0:
        raise DataError(f"array 'fps' is {value.dtype} {list(value.shape)}; needed one number > 0")
    return float(value.reshape(-1)[0])


def _local(body: Skeleton, turns: NDArray) -> NDArray[np.float32]:
    """Turn rotations of bones in the world into parent-relative ones."""
    world = torch.from_numpy(turns.astype(np.float64))
    if not bool(world.isfinite().all()) or float(world.norm(dim=-1).min()) < 0.5:
        raise DataError("a rotation in 'bone_quat' is no unit quaternion")
    return local_rotations(body, unit(world)).numpy().astype(np.float32)


def _measured(motion: Motion) -> Motion:
    """Give a body the bone lengths its joints have on average."""
    parents = list(motion.skeleton.parents[1:])
    lengths = np.linalg.norm(motion.joints[:, 1:] - motion.joints[:, parents], axis=-1).mean(0)
    offsets = motion.skeleton.offsets.copy()
    known = np.linalg.norm(offsets[1:], axis=-1)
    offsets[1:] *= (lengths / known.clip(1e-9))[:, None]
    return replace(motion, skeleton=motion.skeleton.with_offsets(offsets))
