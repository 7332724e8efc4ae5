"""Motions as they leave for a browser (BVH, GLB, MP4, npz) and files that come from one.

What comes in may hold anything: it is cut to a length and brought to the body and the frame rate
of the models, or refused in one line. It knows no visitors.
"""

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from ..pipelines.params import MotionParams, Record

if TYPE_CHECKING:
    from ..motion.clip import Motion

FORMS = ("bvh", "glb", "mp4", "npz")
MEDIA = {
    "bvh": "text/plain; charset=utf-8", "glb": "model/gltf-binary", "mp4": "video/mp4",
    "npz": "application/octet-stream",
}  # fmt: skip
MAX_UPLOAD = 8 * 2**20
"""Bytes of a BVH file that a visitor opens."""
MAX_READ_FRAMES = 1200


def read(content: bytes) -> "Motion":
    """Read a BVH file that a browser sent.

    Args:
        content: The file; it may hold anything.

    Returns:
        A motion of the 22 joints with rotations at 20 frames per second, its first minute at most,
        on the floor. Joints of these names keep their bones; other bodies are retargeted.

    Raises:
        DataError: No BVH, or no body that we know.
    """
    from ..pipelines.motion_media import read_motion

    with tempfile.TemporaryDirectory(prefix="blockloom-motion-") as folder:
        path = Path(folder) / "motion.bvh"
        path.write_bytes(content)
        motion = read_motion(path)
    return motion.cut(0, min(len(motion), MAX_READ_FRAMES)).on_floor()


def write(motion: "Motion", form: str, record: Record[MotionParams] | None) -> bytes:
    """Write a motion as a file.

    Args:
        motion: With rotations.
        form: One of `FORMS`.
        record: What made it, or None; BVH has no place for it.

    Raises:
        UsageError: What is needed to write it is not installed.
    """
    from ..pipelines.motion_media import save_motion

    with tempfile.TemporaryDirectory(prefix="blockloom-motion-") as folder:
        path = Path(folder) / f"motion.{form}"
        save_motion(motion, [path], record)
        return path.read_bytes()
