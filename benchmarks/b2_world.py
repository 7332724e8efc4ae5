"""B2: a world's frames one after another, with the rolling cache and by recomputing the past.

Also how the time of a frame grows with the frames before it (a rolling window: not at all), and
what dreaming ahead saves a player, as a function of how often actions repeat.
"""

import math
import statistics
import time

import torch
from common import Row, Timing, build_model, in_turns, report_row, require_equal

from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start
from blockloom.models.generator import GenerativeModel
from blockloom.models.live import LiveRollout

SLOPE_LINE = 0.05  # design: time per frame flat on a CPU
HEIGHT, WIDTH, CHANNELS, WINDOW = 6, 8, 16, 8
SETTINGS = [
    "layout.frames=8", f"cache.window={WINDOW}", "backbone.dim=128", "backbone.layers=3",
    "backbone.heads=4", "condition.actions=3",
]  # fmt: skip


def _whole(model: GenerativeModel, frames: int, *, use_cache: bool) -> torch.Tensor:
    actions = torch.zeros(1, frames, 3)
    request = Request(
        [""], [item_generator(0, 0)], frames=frames, actions=actions, use_cache=use_cache
    )
    rollout = start(model, request)
    for _ in rollout.events():
        pass
    return rollout.values


def run(device: torch.device, *, frames: int = 24, long: int = 256, repeats: int = 3) -> list[Row]:
    """Measure cached against recomputed frames, and the slope of a frame's time."""
    model = build_model(
        "video/teacher_forcing", SETTINGS, HEIGHT, WIDTH, latent_channels=CHANNELS, device=device
    )
    shape = {
        "dim": 128, "layers": 3, "tokens_per_frame": HEIGHT * WIDTH, "window": WINDOW,
        "frames": frames, "steps": model.recipe.schedule.steps,
    }  # fmt: skip
    with torch.inference_mode():
        cached, recomputed = (_whole(model, frames, use_cache=flag) for flag in (True, False))
        # The two sides sum in another order: equal to the last bits, not bit for bit.
        require_equal((cached - recomputed).abs() < 1e-3, torch.ones_like(cached).bool(), "B2")
        timing = in_turns(
            lambda: _whole(model, frames, use_cache=True),
            lambda: _whole(model, frames, use_cache=False),
            repeats=repeats,
            device=device,
        )
        seconds = frame_times(model, long)
    first = report_row(
        "B2", "frames of a world, rolling cache", "our own recompute of the past", timing,
        shape=shape, pass_line=None, device=device,
    )  # fmt: skip
    slope = log_slope(seconds[2 * WINDOW :])
    notes = {"slope": slope, "line": SLOPE_LINE, "frames": long}
    notes["milliseconds_per_frame"] = 1e3 * statistics.median(seconds[WINDOW:])
    return [first, _plain_row("B2-flat", "slope of a frame's time", slope, device, shape, notes)]


def frame_times(model: GenerativeModel, frames: int) -> list[float]:
    """Measure every frame of one long rollout, in seconds of process time."""
    live = LiveRollout(model, [""], [item_generator(0, 0)])
    nothing = torch.zeros(1, 1, 3)
    seconds = []
    for _ in range(frames):
        before = time.process_time()
        live.step(nothing)
        seconds.append(time.process_time() - before)
    return seconds


def log_slope(seconds: list[float], parts: int = 6) -> float:
    """Fit log(median time) against log(frame number), over equal parts of the rollout."""
    size = len(seconds) // parts
    pieces = [seconds[i * size : (i + 1) * size] for i in range(parts)]
    points = [
        (math.log((i + 0.5) * size), math.log(statistics.median(piece)))
        for i, piece in enumerate(pieces)
    ]
    mean_x, mean_y = (statistics.mean(p[axis] for p in points) for axis in (0, 1))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def _plain_row(
    name: str, what: str, value: float, device: torch.device, shape: dict, notes: dict
) -> Row:
    """A row that is no ratio: the value stands in `notes`, a flat line passes."""
    flat = Timing([1.0], [1.0], [1.0], [1.0], "process time")
    row = report_row(name, what, "-", flat, shape=shape, pass_line=None, device=device, **notes)
    row.passed = abs(value) <= SLOPE_LINE
    return row
