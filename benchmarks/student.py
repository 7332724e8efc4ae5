"""A few-step student beside its many-step teacher: how near, how sharp, how fast.

All models go on from the same held-out beginnings with the same noise and actions. Single frames
are timed as a player would see them (model and decoder, one world), the models in turns.

From the repository's root:
`python benchmarks/student.py --data video_carracing.npz STUDENT:2 TEACHER:16 --out report.json`
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from blockloom.training.clip_folder import load_clips
from blockloom.training.clip_run import held_out_clips
from blockloom.training.clip_statistics import byte_psnr, motion, sharpness
from blockloom.training.dreams import Beginnings, Dream, beginnings, dreamed, given_frames
from blockloom.training.run import load_pipeline_parts

AT = (1, 4, 16)
"""Frames ahead that are compared."""
WARM_UP, TIMED = 8, 60


def quality(model: Any, tokenizer: Any, after: Beginnings, steps: int) -> dict[str, Any]:
    """Compare drawn frames with the true ones."""
    drawn, truth = dreamed(model, tokenizer, after, max(AT), steps=steps), after.future
    at = torch.tensor(AT) - 1
    psnr = byte_psnr(drawn, truth)[:, at]
    sharp = sharpness(drawn).mean(0)[at] / sharpness(truth).mean(0)[at]
    lively = motion(drawn, after.last).mean(0)[at] / motion(truth, after.last).mean(0)[at]
    return {
        "psnr_db": [round(v, 3) for v in psnr.mean(0).tolist()],
        "psnr_standard_error_db": [round(v, 3) for v in (psnr.std(0) / len(psnr) ** 0.5).tolist()],
        "sharpness_ratio": [round(v, 4) for v in sharp.tolist()],
        "motion_ratio": [round(v, 4) for v in lively.tolist()],
    }


def timed(parts: list[tuple[Any, Any, int]], after: Beginnings) -> list[float]:
    """Median milliseconds of a frame for every model, taken in turns."""
    first = after.take(slice(0, 1))
    dreams = [Dream(model, tokenizer, first, steps=steps) for model, tokenizer, steps in parts]
    taken: list[list[float]] = [[] for _ in dreams]
    led = None if first.actions is None else first.actions[:, first.given : first.given + 1]
    for turn in range(WARM_UP + TIMED):
        for dream, times in zip(dreams, taken, strict=True):
            before = time.perf_counter()
            dream.step(None if led is None else led.expand(-1, dream.per_block, -1))
            if turn >= WARM_UP:
                times.append((time.perf_counter() - before) / dream.per_block)
    return [1e3 * statistics.median(times) for times in taken]


def main(argv: list[str] | None = None) -> None:
    """Compare pipelines and write JSON."""
    parser = argparse.ArgumentParser(description="A few-step student beside its teacher")
    parser.add_argument("models", nargs="+", help="FOLDER:ROWS, the student first")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--num", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    named = [text.rsplit(":", 1) for text in args.models]
    parts = [(*load_pipeline_parts(Path(folder)), int(steps)) for folder, steps in named]
    model, tokenizer, _ = parts[0]
    clips = held_out_clips(load_clips(args.data, tokenizer.frame_size[0]))
    if clips is None:
        parser.error(f"{args.data}: every clip is in the training split")
    width, given = model.recipe.condition.actions, given_frames(model, tokenizer)
    after = beginnings(clips, width, given, max(AT), args.num, tokenizer)
    rows = []
    for (folder, steps), part, ms in zip(named, parts, timed(parts, after), strict=True):
        row = {"model": folder, "rows": int(steps), "ms_per_frame": round(ms, 2)}
        rows.append(row | quality(*part[:2], after, part[2]))
        print(json.dumps(rows[-1]), flush=True)
    report = {"contexts": len(after), "frames_ahead": AT, "threads": args.threads, "rows": rows}
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
