"""How fast a video model draws, and whether it can go on for ever.

Both draw one world, frame after frame, as somebody who plays would see it: model and decoder, one
item. Frames are looked at as they come and not kept, so that memory that grows is the model's.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.errors import check_count
from ..models.generator import GenerativeModel
from .clip_statistics import contrast, motion, sharpness
from .dreams import Beginnings, Dream
from .driver import Driver, habits, steered_by

SPEED_FRAMES, WARM_UP = 500, 16
TAIL = 512
"""Frames at the end that are compared with real ones, and frames before memory is looked at."""
STRIP = 32
"""Frames kept for looking at."""


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def speed(
    model: GenerativeModel, tokenizer: Any, after: Beginnings, *, frames: int = SPEED_FRAMES,
    seed: int = 0, steps: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Time single frames, model and decoder, with all threads in use and with one.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        after: Where to start; the first one is used.
        frames: Frames timed, after some that are not.
        seed: Seed of the noise.
        steps: Rows per block; None = the recipe's.

    Returns:
        Median, least and 90 % milliseconds per frame and frames per second, per thread count.
    """
    check_count("frames", frames)
    report: dict[str, Any] = {"frames": frames, "warm_up": WARM_UP, "by_threads": []}
    for count in sorted({torch.get_num_threads(), 1}, reverse=True):
        with _threads(count):
            dream = Dream(model, tokenizer, after.take(slice(0, 1)), seed=seed, steps=steps)
            script = _script(after, dream.per_block)
            for _ in range(WARM_UP):
                dream.step(next(script))
            taken: list[float] = []
            while len(taken) * dream.per_block < frames:
                taken.append(_timed(dream, next(script))[1] / dream.per_block)
        milliseconds = torch.tensor(taken, dtype=torch.float64) * 1e3
        median = float(milliseconds.median())
        report["by_threads"].append(
            {
                "threads": count,
                "median_ms_per_frame": median,
                "least_ms_per_frame": float(milliseconds.min()),
                "p90_ms_per_frame": float(milliseconds.quantile(0.9)),
                "frames_per_second": 1e3 / median,
            }
        )
    return report


def _timed(dream: Dream, actions: Tensor | None) -> tuple[Tensor, float]:
    before = time.perf_counter()
    frames = dream.step(actions)
    return frames, time.perf_counter() - before


def _script(after: Beginnings, per_block: int) -> Iterator[Tensor | None]:
    """Yield what to do for ever: the true actions of one beginning after another."""
    if after.actions is None:
        while True:
            yield None
    rows = after.actions[:, after.given :].flatten(0, 1)
    place = 0
    while True:
        index = (place + torch.arange(per_block)) % len(rows)
        yield rows[index][None]
        place += per_block


def resident_bytes() -> int | None:
    """Return the memory of this process that is in use now; None where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None


def endurance(
    model: GenerativeModel, tokenizer: Any, after: Beginnings, frames: int, *, seed: int = 0,
    steps: int | None = None, driver: Driver | None = None,
) -> tuple[dict[str, Any], Tensor]:  # fmt: skip
    """Draw one world for a long time under actions that real drivers took.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        after: Where to start (the first one); the true actions of all, one after another, are the
            script, and their true frames what the end is compared with.
        frames: Frames to draw, at least 2.
        seed: Seed of the noise.
        steps: Rows per block; None = the recipe's.
        driver: Looks at the dream and steers, with what the recorded drivers did beyond it; None =
            the actions are repeated blindly.

    Returns:
        The report, and frames spread evenly over the way, uint8 [shown, height, width, 3].
    """
    check_count("endurance", frames, 2)
    dream = Dream(model, tokenizer, after.take(slice(0, 1)), seed=seed, steps=steps)
    script, last = _script(after, dream.per_block), after.last[:1]
    beyond = None if driver is None else habits(driver, after).flatten(0, 1)
    seen = after.frames[:1, max(after.given - 2, 0) : after.given]
    blocks = max(2, frames // dream.per_block)
    # Touched now, so that writing to them later does not look like memory that grows.
    table, seconds = torch.ones(blocks, 3), torch.ones(blocks, dtype=torch.float64)
    kept = sorted({round(i * (blocks - 1) / (STRIP - 1)) for i in range(STRIP)})
    strip = last.new_full((len(kept), *last.shape[2:]), 1)
    settle = min(TAIL, blocks // 4)
    settled, state = resident_bytes(), dream.num_bytes
    for block in range(blocks):
        actions = next(script)
        if driver is not None and beyond is not None:
            extra = beyond[block * dream.per_block % len(beyond)]
            actions = steered_by(driver, seen, extra, dream.per_block)
        drawn, seconds[block] = _timed(dream, actions)
        seen = torch.cat((seen, drawn), 1)[:, -2:]
        measured = (sharpness(drawn), motion(drawn, last), contrast(drawn))
        table[block] = torch.stack([m.mean() for m in measured])
        last = drawn[:, -1:]
        if block in kept:
            strip[kept.index(block)] = drawn[0, -1]
        if block == settle:
            settled, state = resident_bytes(), dream.num_bytes
    now = resident_bytes()
    report = {
        "frames": blocks * dream.per_block,
        "threads": torch.get_num_threads(),
        "time": _time_report(seconds / dream.per_block),
        "memory": {
            "since_frame": settle * dream.per_block,
            "resident_growth_bytes": None if now is None or settled is None else now - settled,
            "state_bytes": state,
            "state_growth_bytes": dream.num_bytes - state,
        },
        "collapse": collapse(table, after, max(1, min(TAIL // dream.per_block, blocks // 2))),
    }
    return report, strip


def _time_report(seconds: Tensor) -> dict[str, Any]:
    """Fit how time per frame grows with the number of frames, on medians of 16 equal parts."""
    parts = [part.median() * 1e3 for part in seconds.tensor_split(min(16, len(seconds)))]
    medians = torch.stack(parts)
    middle = (torch.arange(len(parts)) + 0.5).log()
    centred = middle - middle.mean()
    slope = float((centred * medians.log()).sum() / centred.square().sum())
    return {
        "median_ms_per_frame": float(seconds.median() * 1e3),
        "log_log_slope": slope,
        "last_part_to_first": float(medians[-1] / medians[0]),
        "median_ms_by_part": [round(float(m), 3) for m in medians],
    }


def collapse(table: Tensor, after: Beginnings, tail: int) -> dict[str, Any]:
    """Compare the last frames with real ones: 1 = as sharp, as lively, as rich in contrast.

    Args:
        table: Sharpness, motion and contrast of every block [blocks, 3].
        after: Holds the real frames.
        tail: Blocks at the end.

    Returns:
        Ratios of means to those of real frames, for the end and for the worst stretch that long.
    """
    real = torch.stack(
        [
            sharpness(after.future).mean(),
            motion(after.future, after.last).mean(),
            contrast(after.future).mean(),
        ]
    )
    stretches = torch.stack([part.mean(0) for part in table.split(tail) if len(part) == tail])
    ratios = stretches / real.clamp_min(1e-6)
    end = table[-tail:].mean(0) / real.clamp_min(1e-6)
    names = ("sharpness", "motion", "contrast")
    return {
        "statistic": "mean over the last blocks as a ratio to real held-out frames",
        "blocks": tail,
        "at_end": {name: float(value) for name, value in zip(names, end, strict=True)},
        "least_stretch": dict(zip(names, ratios.amin(0).tolist(), strict=True)),
        "most_stretch": dict(zip(names, ratios.amax(0).tolist(), strict=True)),
    }
