"""How rollouts of several models change the longer they go on, side by side.

Each model goes on from the same held-out beginnings, for several times the length it was trained
at. Every line of the table is one model at one time; near 1 is good for the ratios, and a method
that drifts moves away from 1.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..core.errors import DataError, UsageError, check_count
from .clip_run import held_out_clips
from .clip_statistics import byte_psnr, contrast, motion, sharpness
from .clips import ClipDataset
from .dreams import Beginnings, beginnings, dreamed, given_frames
from .run import load_pipeline_parts

TIMES = 4
"""Training lengths that are drawn."""
CONTEXTS = 24
AROUND = 2
"""Frames on either side of a time that its numbers are means of."""


@torch.no_grad()
def drift_table(
    folders: Sequence[Path], clips: ClipDataset, *, times: int = TIMES, num: int = CONTEXTS,
    seed: int = 0, steps: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Roll every model out and measure its frames against time.

    Args:
        folders: Pipeline folders of video models that were trained at one length.
        clips: Clips with held-out ones.
        times: Training lengths to draw.
        num: Held-out beginnings.
        seed: Seed of the noise; the same beginnings and noise for all models.
        steps: Rows per block; None = each recipe's.

    Returns:
        JSON-ready: the setting, and per model its lines. PSNR is None where no true frame is known.

    Raises:
        UsageError: No model, or models of different training lengths.
        DataError: No held-out clip, or only too short ones.
    """
    check_count("times", times)
    held_out = held_out_clips(clips)
    if held_out is None:
        raise DataError("every clip is in the training split; a drift table needs others")
    parts = [(Path(folder), *load_pipeline_parts(Path(folder))) for folder in folders]
    lengths = sorted({model.recipe.layout.frames for _, model, _ in parts})
    if len(lengths) != 1:
        raise UsageError(f"models were trained at {lengths} frames; compare those of one length")
    given = max(given_frames(model, tokenizer) for _, model, tokenizer in parts)
    drawn_frames = times * lengths[0]
    known = min(drawn_frames, int(held_out.lengths.max()) - given)
    report: dict[str, Any] = {
        "trained_frames": lengths[0],
        "drawn_frames": drawn_frames,
        "frames_with_truth": known,
        "models": {},
    }
    for folder, model, tokenizer in parts:
        width = model.recipe.condition.actions
        after = beginnings(held_out, width, given, known, num, tokenizer)
        script = None
        if after.actions is not None:  # beyond the clip's end its actions are done once more
            rows = given + torch.arange(drawn_frames) % known
            script = after.actions[:, rows]
        drawn = dreamed(
            model, tokenizer, after, drawn_frames, actions=script, seed=seed, steps=steps
        )
        report["contexts"] = len(after)
        report["models"][folder.parent.name if folder.name == "final" else folder.name] = {
            "recipe": model.recipe.name,
            "steps": steps or model.recipe.schedule.steps,
            "lines": _lines(drawn, after, lengths[0], times),
        }
    return report


def _lines(drawn: torch.Tensor, after: Beginnings, length: int, times: int) -> list[dict[str, Any]]:
    """Measure frames around half a training length, one, two, and so on up to the last."""
    truth = after.future
    known = truth.shape[1]
    # A mean over all true frames: single times of a few clips would wobble by themselves.
    real = (sharpness(truth).mean(), motion(truth, after.last).mean(), contrast(truth).mean())
    ours = (sharpness(drawn), motion(drawn, after.last), contrast(drawn))
    psnr = byte_psnr(drawn[:, :known], truth)
    marks = sorted({1, max(1, length // 2), *(length * turn for turn in range(1, times + 1))})
    lines = []
    for mark in marks:
        low, high = max(0, mark - 1 - AROUND), min(drawn.shape[1], mark + AROUND)
        if mark == 1:
            low, high = 0, 1
        line: dict[str, Any] = {"frame": mark}
        line["psnr_db"] = float(psnr[:, low:high].mean()) if high <= known else None
        for name, values, right in zip(
            ("sharpness_ratio", "motion_ratio", "contrast_ratio"), ours, real, strict=True
        ):
            line[name] = float(values[:, low:high].mean() / right.clamp_min(1e-6))
        lines.append(line)
    return lines


def drift_markdown(report: dict[str, Any]) -> str:
    """Write a drift table as Markdown: a row per model, a column per time, three tables."""
    names = {
        "psnr_db": "Decibels to the true frame (higher is nearer)",
        "sharpness_ratio": "Sharpness, to true frames (1 = as sharp)",
        "motion_ratio": "Motion, to true frames (1 = as lively)",
        "contrast_ratio": "Contrast, to true frames (1 = as rich)",
    }
    parts = []
    for key, title in names.items():
        rows = [
            (name, [line[key] for line in entry["lines"]])
            for name, entry in report["models"].items()
        ]
        marks = [line["frame"] for line in next(iter(report["models"].values()))["lines"]]
        head = " | ".join(["", *(f"frame {mark}" for mark in marks)])
        cells = [
            f"| {name} | " + " | ".join("" if v is None else f"{v:.2f}" for v in values) + " |"
            for name, values in rows
        ]
        rule = "|---" * (len(marks) + 1) + "|"
        parts.append("\n".join([f"{title}\n", f"| {head.strip()} |", rule, *cells]))
    about = (
        f"{report['contexts']} held-out beginnings; trained at {report['trained_frames']} frames, "
        f"drawn for {report['drawn_frames']}; means over the frames around each time."
    )
    return "\n\n".join([*parts, about]) + "\n"
