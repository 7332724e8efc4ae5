"""Measure a video model on held-out clips: how near, how sharp, how steerable, how fast.

The model sees the frames that fill its window, then goes on for as many frames as asked, told what
was truly done; the same is measured on simple guesses and on the model when it is told nothing.
Everything is seeded, counted and ready for JSON. It knows no model by name.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import DataError
from ..models.generator import GenerativeModel
from .checkpoint import write_atomic
from .clip_captions import TRAIN_STEPS, can_be_asked, caption_scores, judge_of
from .clip_run import held_out_clips
from .clip_statistics import MOST_DB, byte_psnr, motion, sharpness
from .clips import ClipDataset
from .dreams import Beginnings, as_bytes, beginnings, dreamed, given_frames
from .driver import Driver, driven, driver_of, explained
from .endurance import SPEED_FRAMES, endurance, speed
from .pictures import SHEET_COLUMNS, sheet_png
from .steering import FRAMES, load_steering, real_turns, steered

HORIZONS = (1, 4, 16, 64)
"""Frames after the given ones at which frames are compared."""
CONTEXTS = 96
STEERED_CONTEXTS = 120
SHOWN = 4
"""Beginnings on the sheet."""


@dataclass(frozen=True)
class ClipSettings:
    """How much to measure.

    Attributes:
        num: Held-out beginnings, and captions per split; None = 96, all captions, and 120
            beginnings to be steered from.
        seed: Seed of all noise.
        steps: Rows per block; None = the recipe's.
        endurance: Frames of the long rollout; 0 = none.
        speed_frames: Frames timed; 0 = none.
        steer_frames: Frames drawn per direction.
        judge_steps: Training steps of the text-video encoder that judges captions.
    """

    num: int | None = None
    seed: int = 0
    steps: int | None = None
    endurance: int = 0
    speed_frames: int = SPEED_FRAMES
    steer_frames: int = FRAMES
    judge_steps: int = TRAIN_STEPS


@torch.no_grad()
def evaluate_clips(
    model: GenerativeModel, tokenizer: Any, clips: ClipDataset, folder: Path,
    settings: ClipSettings = ClipSettings(), sheet: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure everything a video model can be measured on.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        clips: Training clips, for the mean frame, and held-out ones.
        folder: The pipeline's folder; its `world.json` may say how to steer.
        settings: How much to measure.
        sheet: PNG to write: true above drawn frames, then left, straight, right, then the long
            rollout; None = none.

    Returns:
        JSON-ready numbers: horizons, also under a driver who looks where actions are numbers;
        `splits` with horizons of every held-out split and, for
        models that draw from captions alone, caption scores; steering where the world can be
        steered, endurance where asked for, speed.

    Raises:
        DataError: No held-out clip, or only too short ones.
        UsageError: A model that cannot go on for ever.
        ModelError: A `world.json` that does not fit.
    """
    held_out = held_out_clips(clips)
    if held_out is None:
        raise DataError("every clip is in the training split; eval needs others")
    width, given = model.recipe.condition.actions, given_frames(model, tokenizer)
    horizons = fitting_horizons(held_out, given)
    after = beginnings(held_out, width, given, horizons[-1], settings.num or CONTEXTS, tokenizer)
    told: dict[str, Any] = {"seed": settings.seed, "steps": settings.steps}
    driver = driver_of(clips)
    report, rows = _horizons(model, tokenizer, clips, after, horizons, told, driver)
    result: dict[str, Any] = {
        "held_out_clips": len(held_out),
        "given_frames": given,
        "steps": settings.steps or model.recipe.schedule.steps,
        "horizons": report,
    }
    splits = _by_split(model, tokenizer, clips, settings)
    if splits:
        result["splits"] = splits
    steering = load_steering(folder, width)
    if steering is not None:
        count = settings.num or STEERED_CONTEXTS
        starts = beginnings(held_out, width, given, 1, count, tokenizer)
        result["steering"], drawn = steered(
            model, tokenizer, starts, steering, frames=settings.steer_frames, **told
        )
        result["steering"]["estimator_on_real_frames"] = real_turns(held_out, steering)
        rows += _rows([drawn[name][:1] for name in ("left", "straight", "right")])
    if settings.endurance:
        for name, who in (("endurance", None), ("endurance_driven", driver)):
            if name == "endurance" or who is not None:
                result[name], strip = endurance(
                    model, tokenizer, after, settings.endurance, driver=who, **told
                )
                rows += _rows([part[None] for part in strip.split(SHEET_COLUMNS)])
    if settings.speed_frames:
        result["speed"] = speed(model, tokenizer, after, frames=settings.speed_frames, **told)
    if sheet is not None:
        write_atomic(sheet, sheet_png(rows))
    return result


def _by_split(
    model: GenerativeModel, tokenizer: Any, clips: ClipDataset, settings: ClipSettings
) -> dict[str, Any]:
    """Measure every held-out split by itself: horizons where there are several, and captions."""
    names = [name for name in dict.fromkeys(clips.split) if name != "train"]
    asks = can_be_asked(model, clips)
    encoder = judge_of(clips, settings.seed, settings.judge_steps) if asks else None
    width, given = model.recipe.condition.actions, given_frames(model, tokenizer)
    told: dict[str, Any] = {"seed": settings.seed, "steps": settings.steps}
    result: dict[str, Any] = {}
    for name in names:
        some = clips.only(name)
        entry: dict[str, Any] = {"clips": len(some)}
        if len(names) > 1 and _typical_length(some) > given:
            horizons = fitting_horizons(some, given)
            num = settings.num or CONTEXTS
            after = beginnings(some, width, given, horizons[-1], num, tokenizer)
            entry["horizons"], _ = _horizons(model, tokenizer, clips, after, horizons, told)
        if encoder is not None:
            entry["captions"] = caption_scores(
                model, tokenizer, clips, encoder, name, num=settings.num, **told
            )
        if len(entry) > 1:
            result[name] = entry
    return result


def fitting_horizons(clips: ClipDataset, given: int) -> list[int]:
    """Select the horizons that at least half of the clips are long enough for.

    Raises:
        DataError: Not even the first one.
    """
    length = _typical_length(clips)
    fitting = [h for h in HORIZONS if given + h <= length]
    if not fitting:
        raise DataError(
            f"half of the held-out clips have at most {length} frames; the model is given {given} "
            f"and {HORIZONS[0]} must follow"
        )
    return fitting


def _typical_length(clips: ClipDataset) -> int:
    """At least half of the clips have this many frames."""
    return int(torch.from_numpy(clips.lengths).float().quantile(0.5, interpolation="lower"))


def _horizons(
    model: GenerativeModel, tokenizer: Any, clips: ClipDataset, after: Beginnings,
    horizons: list[int], told: dict[str, Any], driver: Driver | None = None,
) -> tuple[dict[str, Any], list[Any]]:  # fmt: skip
    """Measure drawn frames and simple guesses against the true frames."""
    truth, ahead = after.future, horizons[-1]
    drawn = dreamed(model, tokenizer, after, ahead, **told)
    guesses = {
        "model": drawn,
        "copy_last_frame": after.last.expand_as(truth),
        "mean_training_frame": mean_frame(clips).expand_as(truth),
        "tokenizer_alone": _recoded(tokenizer, model, after),
    }
    if after.actions is not None:
        # One set of weights, trained with actions: not a model that was trained without.
        guesses["same_model_told_no_actions"] = dreamed(
            model, tokenizer, after, ahead, told=False, **told
        )
    if driver is not None and after.actions is not None:
        guesses["model_under_a_driver_who_looks"] = driven(
            model, tokenizer, after, ahead, driver, **told
        )
    real = (sharpness(truth).mean(0), motion(truth, after.last).mean(0))
    lines = {
        name: _line(frames, truth, after.last, real, horizons) for name, frames in guesses.items()
    }
    report: dict[str, Any] = {
        "contexts": len(after),
        "frames_ahead": horizons,
        "psnr": f"mean over contexts of dB per frame, peak 255, at most {MOST_DB:g} each",
        "sharpness_ratio": "mean absolute difference of neighbouring pixels, to true frames",
        "motion_ratio": "mean absolute difference to the frame before, to true frames",
    }
    if driver is not None:
        report["driver"] = {
            "what": "kernel regression from two frames to the action, plus what the recorded "
            "driver did beyond it",
            "explained_variance_of_each_number": explained(driver, held_out_clips(clips) or clips),
        }
    shown = [part[i : i + 1] for i in range(min(SHOWN, len(after))) for part in (truth, drawn)]
    return report | lines, _rows(shown)


def _line(
    frames: Tensor, truth: Tensor, last: Tensor, real: tuple[Tensor, Tensor], horizons: list[int]
) -> dict[str, Any]:
    """Report one way to guess the frames ahead."""
    at = torch.tensor(horizons) - 1
    psnr = byte_psnr(frames, truth)
    # The mean frame jumps once, away from the last given frame, and then stands still.
    ours = (sharpness(frames).mean(0), motion(frames, last).mean(0))
    error = psnr[:, at].std(0) / math.sqrt(max(len(psnr), 1)) if len(psnr) > 1 else None
    return {
        "psnr_db": _rounded(psnr.mean(0)[at]),
        "psnr_standard_error_db": None if error is None else _rounded(error),
        "sharpness_ratio": _rounded(ours[0][at] / real[0][at].clamp_min(1e-6)),
        "motion_ratio": _rounded(ours[1][at] / real[1][at].clamp_min(1e-6)),
        "over_all_frames": {
            "psnr_db": round(float(psnr.mean()), 4),
            "sharpness_ratio": round(float(ours[0].mean() / real[0].mean().clamp_min(1e-6)), 4),
            "motion_ratio": round(float(ours[1].mean() / real[1].mean().clamp_min(1e-6)), 4),
        },
    }


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 4) for value in values]


def mean_frame(clips: ClipDataset) -> Tensor:
    """Average all training frames, uint8 [1, 1, height, width, 3]."""
    total = torch.zeros(clips.frames.shape[1:], dtype=torch.float64)
    count = 0
    for index, split in enumerate(clips.split):
        if split == "train":
            clip = torch.from_numpy(clips.clip(index))
            total += clip.sum(0, dtype=torch.int64)
            count += len(clip)
    if not count:
        raise DataError("no clip is in split 'train'; the mean frame is taken from it")
    return (total / count).round().byte()[None, None]


def _recoded(tokenizer: Any, model: GenerativeModel, after: Beginnings) -> Tensor:
    """Encode and decode the true frames: no model of these tokens can be nearer."""
    parts = []
    for clip in after.frames.split(8):
        pixels = clip.to(model.device, model.dtype).permute(0, 4, 1, 2, 3) / 127.5 - 1
        parts.append(as_bytes(tokenizer.decode(tokenizer.encode(pixels)))[:, after.given :])
    return torch.cat(parts)


def _rows(paths: list[Tensor]) -> list[Any]:
    """Line up frames spread over each path [1, frames, height, width, 3] as a row of the sheet."""
    rows = []
    for path in paths:
        count = path.shape[1]
        most = min(SHEET_COLUMNS, count)
        index = torch.linspace(0, count - 1, most).round().long()
        shown = path[0, index]
        blank = shown.new_full((SHEET_COLUMNS - most, *shown.shape[1:]), 255)
        rows.append(torch.cat((*shown, *blank), 1).numpy())
    return rows
