"""How much a cut shows: velocity jumps where redrawn or continued frames meet given ones.

For every held-out motion of at least 48 frames: a model that sees all frames redraws 16 in the
middle, others go on from the middle. The frames that are kept must come back as they were; at each
seam the largest change of a joint's velocity is held against the 95th percentile of real motion.

From the repository's root:
`python benchmarks/motion_seams.py FOLDER --data motion_text.npz --out report.json`
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blockloom.motion.clip import Motion
from blockloom.motion.features import features_to_motion
from blockloom.pipelines.motion import MotionPipeline
from blockloom.pipelines.motion_input import FPS
from blockloom.training.motion_archive import load_motions
from blockloom.training.motion_metrics import seam_jump, usual_jump, velocity_jumps

LEAST, MOST, REDRAWN = 48, 64, 16
NEAR = 6
"""Frames on both sides that count as around a seam: a jump must not have moved next to it."""
LINE = 1.5
"""A seam passes at this many times the usual jump."""


def edited(pipe: MotionPipeline, motion: Motion, text: str, seed: int) -> tuple[Any, list[int]]:
    """Redraw the middle of a motion, or its second half; return the joints and the seams.

    Raises:
        RuntimeError: A kept frame is not what it was.
    """
    count = min(len(motion) // 4 * 4, MOST)
    whole, middle = motion.cut(0, count), count // 8 * 4
    if pipe.can_infill:
        start, end = middle - REDRAWN // 2, middle + REDRAWN // 2
        made = pipe(text, motion=whole, span=(start, end), seed=seed).motions[0]
        kept, seams = np.r_[0:start, end:count], [start, end]
    else:
        made = pipe(text, motion=whole.cut(0, middle), num_frames=count, seed=seed).motions[0]
        kept, seams = np.r_[0:middle], [middle]
    if not np.array_equal(made.joints[kept], whole.joints[kept]):
        raise RuntimeError(f"{text}: frames that should be kept have changed")
    return made.joints, seams


def measured(pipe: MotionPipeline, motions: list[Motion], texts: list[str]) -> dict[str, Any]:
    """Measure every seam of every motion that is long enough, and the real motion there."""
    usual = usual_jump([motion.joints for motion in motions], FPS)
    seams, real, around = [], [], []
    long = [k for k, motion in enumerate(motions) if len(motion) >= LEAST]
    for k in long:
        joints, at = edited(pipe, motions[k], texts[k], seed=k)
        seams += [{"motion": k, "text": texts[k], "frame": f, "jump": seam_jump(joints, f, FPS)}
                  for f in at]  # fmt: skip
        real += [seam_jump(motions[k].joints, f, FPS) for f in at]
        inner = velocity_jumps(joints, FPS)
        around += [inner[max(0, f - NEAR) : f + NEAR].max() for f in at]
    jumps = np.array([seam["jump"] for seam in seams])
    return {
        "redraws": bool(pipe.can_infill), "motions": len(long), "seams": len(seams),
        "kept_frames_identical": True, "usual_jump_m_s": usual, "line": LINE,
        "within_line": float((jumps <= LINE * usual).mean()),
        "real_within_line": float((np.array(real) <= LINE * usual).mean()),
        "median_over_usual": float(np.median(jumps) / usual),
        "largest_over_usual": float(jumps.max() / usual),
        "around_within_line": float((np.array(around) <= LINE * usual).mean()),
        "around_median_over_usual": float(np.median(around) / usual),
        "largest": sorted(seams, key=lambda seam: -seam["jump"])[:5],
    }  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write the report; 0 when every seam passed."""
    parser = argparse.ArgumentParser(description="Velocity jumps where made frames meet given ones")
    parser.add_argument("models", nargs="+", help="stored models")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    clips = load_motions(args.data).only("test")
    motions = [features_to_motion(clips.clip(k)) for k in range(len(clips))]
    report = {}
    for model in args.models:
        pipe = MotionPipeline.from_pretrained(model)
        pipe.set_progress_bar_config(disable=True)
        report[model] = measured(pipe, motions, list(clips.captions))
        print(json.dumps({model: report[model]}, indent=1), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    return 0 if all(told["within_line"] == 1 for told in report.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
