"""Does a world go where it is steered?

A world that can be steered says so in `world.json` beside its weights: which action means left,
right and straight on, and where in the picture the steered one is. From the same held-out
beginnings, with the same noise, the model goes on under each of the three; turn angles between
the frames it draws are then measured as in `turning`, and the same measure is tried on real
frames first.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import ModelError
from ..models.generator import GenerativeModel
from .clip_stage import leading_actions
from .clips import ClipDataset
from .dreams import Beginnings, dreamed
from .evaluation import wilson_interval
from .turning import PIVOT, turn_angles

FILE = "world.json"
CLEAR = 0.2
"""Steers nearer to straight (of 1 = all the way) say nothing about the way the world turns."""
STRAIGHT = 0.05
LAGS = range(5)
FRAMES = 16
"""Frames drawn per beginning and direction."""
FIRST = 3
"""Turns are summed from this transition on: a wheel acts one to two frames late."""
LAST = 4
"""Transitions at the end whose mean is "still at the end"."""
STRAIGHT_BOUND = 1.0
"""Degrees per frame up to which a path counts as straight, on average over its end."""


@dataclass(frozen=True)
class Steering:
    """What a world's actions mean to a driver.

    Attributes:
        left: Action that steers all the way to the left.
        right: Action that steers all the way to the right.
        straight: Action that goes straight on.
        pivot: x and y of what is steered, in shares of the picture.
    """

    left: tuple[float, ...]
    right: tuple[float, ...]
    straight: tuple[float, ...]
    pivot: tuple[float, float] = PIVOT

    def amount(self, actions: Tensor) -> Tensor:
        """Return how far actions [..., numbers] steer: -1 = left, 0 = straight, 1 = right."""
        axis = (torch.tensor(self.right) - torch.tensor(self.left)) / 2
        return (actions - torch.tensor(self.straight)) @ axis / (axis @ axis)


def load_steering(folder: Path | str, width: int) -> Steering | None:
    """Read what a pipeline folder says about steering; None when it says nothing.

    Args:
        folder: Pipeline folder.
        width: Numbers per action of its model.

    Raises:
        ModelError: A `world.json` that cannot be read or does not fit the model.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        told = json.loads(path.read_text())
        if not isinstance(told, dict):
            raise ValueError("it holds no object")
        if "steering" not in told:
            return None
        if not isinstance(told["steering"], dict):
            raise ValueError("steering holds no object")
        told = dict(told["steering"])
        parts = {name: _numbers(told.pop(name), width) for name in ("left", "right", "straight")}
        pivot = _numbers(told.pop("pivot", PIVOT), 2)
        if told:
            raise ValueError(f"unknown keys {', '.join(sorted(told))}")
        if parts["left"] == parts["right"]:
            raise ValueError("left and right are the same action")
        if not all(0 <= share <= 1 for share in pivot):
            raise ValueError(f"pivot {list(pivot)}; allowed shares of the picture, 0 to 1")
    except (OSError, KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"steering.{error.args[0]}" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{FILE}: {reason}; needed left, right, straight as actions") from error
    return Steering(**parts, pivot=(pivot[0], pivot[1]))


def _numbers(values: Any, width: int) -> tuple[float, ...]:
    numbers = tuple(float(value) for value in values)
    if len(numbers) != width or not all(abs(number) < 1e6 for number in numbers):
        raise ValueError(f"{list(numbers)} is not {width} finite numbers")
    return numbers


def real_turns(clips: ClipDataset, steering: Steering) -> dict[str, Any]:
    """Try the estimator on real frames: does it see the way the wheel was turned?

    A pair of frames t, t + 1 is clear when the actions of t - 1 and t - 2 both steer the same way,
    each beyond `CLEAR`, and calm when both are within `STRAIGHT`.

    Args:
        clips: Real clips with actions.
        steering: What the actions mean.

    Returns:
        Share of clear pairs with the right sign, degrees of calm pairs, and per lag how steer and
        turn go together (lag 0: the action between the two frames).
    """
    frames = torch.from_numpy(clips.frames)
    rows = torch.ones(len(frames), dtype=torch.bool)
    rows[torch.from_numpy(clips.offsets[1:]) - 1] = False
    first = rows.nonzero()[:, 0]
    turns = turn_angles(frames[first], frames[first + 1], steering.pivot)
    ends = torch.from_numpy(clips.offsets)
    time = first - ends[torch.searchsorted(ends, first, right=True) - 1]
    kept = time >= max(LAGS)
    first, turns = first[kept], turns[kept]
    led_by = steering.amount(leading_actions(clips, len(steering.left)))
    steers = torch.stack([led_by[first + 1 - lag] for lag in LAGS])
    causes = steers[1:3]
    clear = (causes > CLEAR).all(0) | (causes < -CLEAR).all(0)
    calm = (causes.abs() < STRAIGHT).all(0)
    right = (causes[0] * turns > 0)[clear]
    report: dict[str, Any] = {"pairs": len(turns), "clear_steer": CLEAR} | _share(
        "right_sign", int(right.sum()), len(right)
    )
    report["clear_median_degrees"] = _median(turns[clear].abs())
    report["calm_pairs"] = int(calm.sum())
    report["calm_median_degrees"] = _median(turns[calm].abs())
    report["calm_p95_degrees"] = float(turns[calm].abs().quantile(0.95)) if calm.any() else None
    report["by_lag"] = [_lag_report(lag, steers[lag], turns) for lag in LAGS]
    return report


def _lag_report(lag: int, steer: Tensor, turns: Tensor) -> dict[str, Any]:
    clear = steer.abs() > CLEAR
    both = torch.stack((steer, turns)).double()
    both = both - both.mean(1, keepdim=True)
    scale = float(both.norm(dim=1).prod())
    return {
        "frames_late": lag,
        "correlation": float(both[0] @ both[1]) / scale if scale else 0.0,
        "right_sign": float((steer * turns > 0)[clear].float().mean()) if clear.any() else None,
        "pairs": int(clear.sum()),
    }


def _median(values: Tensor) -> float | None:
    return float(values.median()) if len(values) else None


def _share(name: str, hits: int, trials: int) -> dict[str, Any]:
    """Report a proportion with its 95 % interval; none without trials."""
    if not trials:
        return {name: None, f"{name}_of": 0}
    interval = list(wilson_interval(hits, trials))
    return {name: hits / trials, f"{name}_of": trials, f"{name}_interval": interval}


def steered(
    model: GenerativeModel, tokenizer: Any, after: Beginnings, steering: Steering, *,
    frames: int = FRAMES, seed: int = 0, steps: int | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:  # fmt: skip
    """Steer left, right and straight on from the same beginnings and the same noise.

    Args:
        model: A video model with actions, in eval mode.
        tokenizer: Its tokenizer.
        after: Held-out beginnings.
        steering: What the actions mean.
        frames: Frames drawn per direction.
        seed: Seed of the noise.
        steps: Rows per block; None = the recipe's.

    Returns:
        The report, and the drawn frames uint8 [items, frames, height, width, 3] per direction.
    """
    drawn, turns = {}, {}
    for name in ("left", "straight", "right"):
        action = torch.tensor(getattr(steering, name)).expand(len(after), frames, -1)
        drawn[name] = dreamed(
            model, tokenizer, after, frames, actions=action, seed=seed, steps=steps
        )
        turns[name] = path_turns(after.last, drawn[name], steering.pivot)
    return steer_report(turns), drawn


def path_turns(last: Tensor, frames: Tensor, pivot: tuple[float, float] = PIVOT) -> Tensor:
    """Measure the turn at every transition of some paths, in degrees [items, frames].

    Args:
        last: uint8 [items, 1, height, width, 3], the frame before the first.
        frames: uint8 [items, frames, height, width, 3].
        pivot: As for `turn_angles`.
    """
    path = torch.cat((last, frames), 1)
    before, after = path[:, :-1].flatten(0, 1), path[:, 1:].flatten(0, 1)
    return turn_angles(before, after, pivot).unflatten(0, frames.shape[:2])


def steer_report(turns: dict[str, Tensor]) -> dict[str, Any]:
    """Say what paths that were steered left, straight and right did.

    Args:
        turns: Degrees per transition [items, transitions] for "left", "straight", "right".
    """
    contexts, transitions = turns["left"].shape
    summed = {name: turn[:, FIRST - 1 :].sum(1) for name, turn in turns.items()}
    end = {name: turn[:, -LAST:].mean(1) for name, turn in turns.items()}
    report: dict[str, Any] = {
        "contexts": contexts,
        "frames": transitions,
        "summed_from_transition": FIRST,
        "end_transitions": min(LAST, transitions),
    }
    for name, sign in (("left", -1), ("right", 1)):
        hits = int((sign * summed[name] > 0).sum())
        report[name] = _share("right_sign", hits, contexts) | {
            "degrees_per_frame": float(turns[name][:, FIRST - 1 :].mean()),
            "degrees_per_frame_at_end": float(end[name].mean()),
            "degrees_by_transition": [round(float(d), 3) for d in turns[name].mean(0)],
        }
    paired = int((summed["right"] > summed["left"]).sum())
    report["right_of_left"] = _share("share", paired, contexts)
    inside = int((end["straight"].abs() <= STRAIGHT_BOUND).sum())
    report["straight"] = _share("within_bound", inside, contexts) | {
        "bound_degrees_per_frame": STRAIGHT_BOUND,
        "mean_degrees_per_frame_at_end": float(end["straight"].mean()),
        "median_absolute_degrees_per_frame_at_end": float(end["straight"].abs().median()),
        "p95_absolute_degrees_per_frame_at_end": float(end["straight"].abs().quantile(0.95)),
        "degrees_by_transition": [round(float(d), 3) for d in turns["straight"].mean(0)],
    }
    return report
