"""Motions into files and back: BVH, GLB, MP4, GIF and npz, one record beside them all.

What it does not know: models, or which command asked.

Invariants: as in `media`: a file appears under its final name complete or not at all, the sidecar
last; equal motions and records give equal bytes; what is read is checked before it is believed.
"""

import hashlib
import json
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from ..core.errors import BlockloomError, DataError, UsageError, check_one_of
from ..core.messages import explain
from ..motion.bvh import read_bvh
from ..motion.bvh_motion import bvh_to_motion, motion_to_bvh
from ..motion.bvh_write import bvh_text
from ..motion.clip import Motion, check_length, resample, select_joints
from ..motion.figure import draw_frames
from ..motion.glb import EXTRAS_KEY, encode_glb
from ..motion.retarget import retarget
from ..motion.skeleton import HUMAN22, Skeleton
from .media import MAX_RECORD_BYTES, TEXT_KEY, _as_data_error, _check_regular, write_bytes
from .motion_input import FPS
from .params import Record, canonical_json
from .video_media import read_video_metadata, save_video

FORMATS = ("mp4", "gif", "bvh", "glb", "npz")
READABLE = (".bvh", ".npz")
FIGURE_SIZE = 384
MAX_INPUT_BYTES = 256 * 2**20
MAX_INPUT_FRAMES = 100_000
MAX_JOINTS = 1000


def save_motion(
    motion: Motion, paths: str | Path | Sequence[str | Path],
    metadata: Record[Any] | Mapping[str, Any] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write a motion under several names and, when there is a record, one sidecar for all.

    Args:
        motion: With rotations.
        paths: Final name, or several that differ in their endings only: .mp4, .gif, .bvh, .glb,
            .npz.
        metadata: The record, or a JSON object. MP4, GIF, GLB and npz carry it inside; BVH has no
            place for it. None writes none, and no sidecar.

    Returns:
        File name to sha256, in order.

    Raises:
        UsageError: An unknown ending, or a package that is not installed.
        ResourceError: A file cannot be written; no partial file is left.
    """
    targets = [Path(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if len({path.with_suffix("") for path in targets}) > 1:
        raise UsageError("files of one motion differ in their endings only")
    record = metadata.to_dict() if isinstance(metadata, Record) else metadata
    files = {}
    for path in targets:
        kind = path.suffix.lower()[1:]
        check_one_of("motion format", kind, FORMATS)
        if kind in ("mp4", "gif"):
            frames = draw_frames(motion, FIGURE_SIZE)
            files[path.name] = save_video(frames, path, record, fps=motion.fps, sidecar=False)
            continue
        content = _encoded(motion, kind, record)
        write_bytes(path, content)
        files[path.name] = hashlib.sha256(content).hexdigest()
    if record is not None and targets:
        first = targets[0]
        sidecar = dict(record) | {"file": first.name, "sha256": files[first.name], "files": files}
        text = json.dumps(sidecar, indent=2, sort_keys=True, allow_nan=False) + "\n"
        write_bytes(first.with_suffix(".json"), text.encode())
    return files


def _encoded(motion: Motion, kind: str, record: Mapping[str, Any] | None) -> bytes:
    if kind == "bvh":
        return bvh_text(motion_to_bvh(motion)).encode()
    if kind == "glb":
        return encode_glb(motion, record)
    return encode_npz(motion, record)


def encode_npz(motion: Motion, record: Mapping[str, Any] | None = None) -> bytes:
    """Turn a motion into the bytes of an .npz of plain arrays.

    Args:
        motion: The motion.
        record: Stored as JSON text in `record`; None leaves it empty.

    Returns:
        Arrays joints [frames, joints, 3], rotations [frames, joints, 4] (w, x, y, z; left out
        where there are none), fps, names, parents, offsets [joints, 3], text and record.
    """
    skeleton, buffer = motion.skeleton, BytesIO()
    arrays: dict[str, Any] = {
        "joints": motion.joints, "fps": np.float32(motion.fps),
        "names": np.array(skeleton.names), "parents": np.array(skeleton.parents, dtype=np.int32),
        "offsets": skeleton.offsets.astype(np.float32), "text": np.array(motion.text),
        "record": np.array("" if record is None else canonical_json({TEXT_KEY: dict(record)})),
    }  # fmt: skip
    if motion.rotations is not None:
        arrays["rotations"] = motion.rotations
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


# ---- reading ---------------------------------------------------------------------------------


def read_motion(path: str | Path) -> Motion:
    """Read a motion from an untrusted file and bring it to the 22 joints at 20 fps.

    Joints of that name are taken as they are; other bodies are retargeted by the style of their
    names. At 20 fps a motion of the 22 joints comes out as it was.

    Args:
        path: .bvh, or an .npz with at least the array `joints`.

    Raises:
        DataError: Missing, damaged, over a cap, of another kind, or with joints that nobody knows.
    """
    path = Path(path)
    if path.suffix.lower() not in READABLE:
        allowed = " or ".join(READABLE)
        raise DataError(explain("motion file", got=path.name, allowed=allowed))
    _check_regular(path, MAX_INPUT_BYTES)
    if path.suffix.lower() == ".bvh":
        motion = bvh_to_motion(read_bvh(path))
    else:
        motion = _from_npz(path)
    check_length(motion, FPS, MAX_INPUT_FRAMES, path.name)
    try:
        if abs(motion.fps - FPS) > 1e-6:
            motion = resample(motion, FPS)
        kept = _as_it_is(motion)
        return retarget(motion) if kept is None else kept
    except BlockloomError as error:
        raise DataError(f"{path.name}: {error}") from error


def _as_it_is(motion: Motion) -> Motion | None:
    """Return the 22 joints of a motion, or None where they are not there or hang otherwise."""
    if not set(HUMAN22.names) <= set(motion.skeleton.names):
        return None
    try:
        kept = select_joints(motion, HUMAN22.names)
    except UsageError:  # other joints stand between these
        return None
    if kept.skeleton.parents != HUMAN22.parents:
        return None
    return replace(kept, skeleton=HUMAN22.with_offsets(kept.skeleton.offsets))


def _from_npz(path: Path) -> Motion:
    """Read plain arrays, none of them pickled and none larger than it may be."""
    arrays = _arrays(path, {"joints", "rotations", "fps", "names", "parents", "offsets", "text"})
    if "joints" not in arrays:
        raise DataError(explain(f"{path.name} has no array joints", got=", ".join(arrays)))
    joints = arrays["joints"]
    if joints.dtype.kind not in "fiu" or joints.ndim != 3 or joints.shape[2] != 3:
        got = f"{joints.dtype} {list(joints.shape)}"
        raise DataError(explain(f"{path.name}: joints", got=got, allowed="[frames, joints, 3]"))
    if not np.isfinite(joints).all():
        frame = int(np.argwhere(~np.isfinite(joints).all(axis=(1, 2)))[0, 0])
        raise DataError(f"{path.name}: joints are not finite in frame {frame}")
    try:
        skeleton = _skeleton(arrays, joints)
        fps = float(arrays["fps"]) if "fps" in arrays else FPS
        text = str(arrays["text"]) if "text" in arrays else ""
        return Motion(joints, skeleton, fps, arrays.get("rotations"), text)
    except BlockloomError as error:
        raise DataError(f"{path.name}: {error}") from error
    except (TypeError, ValueError) as error:
        raise DataError(explain(f"{path.name}: {error}")) from error


def _skeleton(arrays: Mapping[str, Any], joints: np.ndarray) -> Skeleton:
    """Read the body, or take that of the 22 joints with the bones they show."""
    count = joints.shape[1]
    if "names" not in arrays and count == len(HUMAN22):
        names, parents = HUMAN22.names, HUMAN22.parents
    elif "names" in arrays and "parents" in arrays:
        names = tuple(str(name) for name in np.atleast_1d(arrays["names"]))
        parents = tuple(int(parent) for parent in np.atleast_1d(arrays["parents"]))
        if not len(names) == len(parents) == count:
            got = f"{len(names)} names and {len(parents)} parents"
            raise DataError(explain("names of joints", got=got, allowed=f"{count} of each"))
    else:
        raise DataError(f"{count} joints without names and parents; only 22 go without")
    if "offsets" in arrays:
        return Skeleton(names, parents, arrays["offsets"])
    offsets = HUMAN22.offsets.copy() if names == HUMAN22.names else np.zeros((count, 3))
    for joint, parent in enumerate(parents if joints.size else ()):
        if 0 <= parent < joint:
            bone = joints[:, joint] - joints[:, parent]
            length = np.linalg.norm(bone, axis=-1).mean()
            rest = offsets[joint] if offsets[joint].any() else bone[0]
            offsets[joint] = rest * length / max(float(np.linalg.norm(rest)), 1e-9)
    return Skeleton(names, parents, offsets)


def _arrays(path: Path, wanted: set[str]) -> dict[str, Any]:
    """Load some arrays of an archive after a look at what it holds."""
    _check_regular(path, MAX_INPUT_BYTES)
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        if len(sizes) > 64 or sum(sizes.values()) > 4 * MAX_INPUT_BYTES:
            raise DataError(
                explain(f"{path.name} unpacks to too much", got=str(sum(sizes.values())))
            )
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files if name in wanted}
    except BlockloomError:
        raise
    # Damaged archives raise many types; all mean the same to the user.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(explain(f"{path.name} is no archive of plain arrays: {reason}")) from error


def read_motion_metadata(path: str | Path) -> dict[str, Any]:
    """Read the record out of a motion's file or sidecar.

    Args:
        path: A file written by `save_motion`, or its .json; of a .bvh the sidecar is read.

    Raises:
        DataError: Not a regular file, too large, not readable, or without a record.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind == ".bvh":
        return _beside(path)
    if kind == ".glb":
        text = _glb_json(path)
    elif kind == ".npz":
        text = str(_arrays(path, {"record"}).get("record", ""))
    else:
        return read_video_metadata(path)
    try:
        told = json.loads(text)
        told = told["asset"]["extras"].get(EXTRAS_KEY) if kind == ".glb" else told[TEXT_KEY]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        told = None
    if not isinstance(told, dict):
        hint = "a file written with its record, or its sidecar .json"
        raise DataError(explain(f"{path.name} holds no blockloom parameters", hint=hint))
    return told


def _beside(path: Path) -> dict[str, Any]:
    """Read the sidecar of a .bvh and check that it tells of this file."""
    _check_regular(path, MAX_INPUT_BYTES)
    sidecar = path.with_suffix(".json")
    told = read_video_metadata(sidecar)
    with _as_data_error(path):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    files = told.get("files")
    if not isinstance(files, dict) or digest not in files.values():
        fault = f"{sidecar.name} tells of another {path.name} than this one"
        raise DataError(explain(fault, hint=f"{sidecar.name} itself"))
    return told


def _glb_json(path: Path) -> str:
    """Return the JSON part of a GLB, or nothing where it is none."""
    _check_regular(path, MAX_INPUT_BYTES)
    with path.open("rb") as stream:
        head = stream.read(20)
        if len(head) < 20 or head[:4] != b"glTF" or head[16:20] != b"JSON":
            return ""
        size = struct.unpack_from("<I", head, 12)[0]
        return stream.read(min(size, 16 * MAX_RECORD_BYTES)).decode("utf-8", "replace")
