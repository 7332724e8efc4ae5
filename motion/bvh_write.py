"""Text and files from `Bvh` objects.

It does not know metres, rotations or skeletons. BVH has no place for a prompt or a seed: whoever
saves a record puts it beside the file.

Invariants: six decimals, as other programs write; files are written whole or not at all.
"""

import io
import os
from pathlib import Path

import numpy as np

from .bvh import Bvh


def bvh_text(bvh: Bvh) -> str:
    """Return the text of a BVH file."""
    lines, depths = ["HIERARCHY"], {-1: -1}
    open_joints: list[int] = []
    for number, joint in enumerate(bvh.joints):
        while open_joints and open_joints[-1] != joint.parent:
            lines.append("\t" * depths[open_joints.pop()] + "}")
        depths[number] = depths[joint.parent] + 1
        indent = "\t" * depths[number]
        kind = "End Site" if joint.is_end else ("JOINT" if number else "ROOT") + f" {joint.name}"
        lines += [indent + kind, indent + "{"]
        lines.append(f"{indent}\tOFFSET " + " ".join(f"{value:.6f}" for value in joint.offset))
        if not joint.is_end:
            lines.append(
                f"{indent}\tCHANNELS {' '.join([str(len(joint.channels)), *joint.channels])}"
            )
        open_joints.append(number)
    lines += ["\t" * depths[number] + "}" for number in reversed(open_joints)]
    lines += ["MOTION", f"Frames: {len(bvh.values)}", f"Frame Time: {bvh.frame_time:.10g}"]
    rows = io.StringIO()
    np.savetxt(rows, bvh.values + 0.0, fmt="%.6f")
    return "\n".join(lines) + "\n" + rows.getvalue()


def write_bvh(path: str | Path, bvh: Bvh) -> None:
    """Write a BVH file; an interrupted call leaves the old file, or none.

    Raises:
        OSError: The place cannot be written.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".part")
    try:
        partial.write_text(bvh_text(bvh), encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
