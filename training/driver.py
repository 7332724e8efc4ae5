"""A driver who looks: what to do, from the frames on the screen, cloned from recordings.

Recorded actions fit the road they were recorded on. In a dream the road bends elsewhere, so whoever
repeats a recording leaves it, as anybody who drove blind would. A driver who sees the dreamt road
shows what the dream is like to play. Kernel ridge regression, by random features, from two small
frames to the action is enough where the scene is simple, and has a closed form.

What a recorded driver did beyond what the cloned one would have done on the true frames (noise, and
whatever is not linear) is added to what the clone does in the dream: on the true road the two then
drive exactly alike.

It does not know models; `driven` drives one.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional

from ..core.errors import DataError
from .clips import ClipDataset
from .dreams import BATCH, Beginnings, Dream

SIDE = 16
"""Frames are averaged to at most this many pixels a side before they are looked at."""
COMPONENTS, FEATURES, SCALE = 32, 1500, 0.3
"""Principal components of two frames; random cosines of them; how fast these turn."""
RIDGE = 1e-3
"""Weight of the penalty."""


@dataclass(frozen=True)
class Driver:
    """A map from two frames to an action.

    Attributes:
        mean: [pixels], of two small frames.
        basis: [pixels, components], to components of unit variance on average.
        turns: [components, features] and [features]: frequencies and phases of the cosines.
        weights: [features + components + 1, numbers], the last row a constant.
        low: Least value of every number in the recordings.
        high: Largest value.
    """

    mean: Float[Tensor, " pixels"]
    basis: Float[Tensor, "pixels components"]
    turns: tuple[Tensor, Tensor]
    weights: Float[Tensor, "inputs numbers"]
    low: Float[Tensor, " numbers"]
    high: Float[Tensor, " numbers"]

    def __call__(
        self, frames: UInt8[Tensor, "items 2 height width 3"]
    ) -> Float[Tensor, "items numbers"]:
        """Say what to do after the second of two frames, within what the recordings did.

        Args:
            frames: The frame before, and the one on the screen.
        """
        return self.said(_small(frames)).float().clamp(self.low, self.high)

    def said(self, small: Float[Tensor, "items pixels"]) -> Float[Tensor, "items numbers"]:
        """Say what to do after two small frames, unlimited."""
        return _inputs((small - self.mean) @ self.basis, self.turns) @ self.weights


def _small(frames: Tensor) -> Tensor:
    """Average two frames to few pixels, [items, pixels] around 0."""
    pixels = rearrange(frames, "b t h w c -> (b t) c h w").double() / 255 - 0.5
    height, width = (min(SIDE, size) for size in frames.shape[2:4])
    small = functional.adaptive_avg_pool2d(pixels, (height, width))
    return rearrange(small, "(b t) c h w -> b (t c h w)", b=len(frames))


def _inputs(seen: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Random cosines of components (Rahimi and Recht, NeurIPS 2007), these, and a constant."""
    waves = (seen @ turns[0] + turns[1]).cos() * math.sqrt(2 / turns[0].shape[1])
    straight = SCALE * seen / math.sqrt(seen.shape[1])
    return torch.cat((waves, straight, seen.new_ones(len(seen), 1)), 1)


def _pairs(clips: ClipDataset) -> tuple[Tensor, Tensor]:
    """Every frame with the one before it, and what was done then."""
    assert clips.actions is not None
    rows = np.arange(len(clips.frames))
    has_both = np.ones(len(rows), dtype=bool)
    has_both[clips.offsets[:-1]] = has_both[clips.offsets[1:] - 1] = False
    has_both &= np.isfinite(clips.actions).all(1)  # what was not recorded teaches nothing
    rows = rows[has_both]
    if not len(rows):
        raise DataError("no action between two frames was recorded; a driver needs some")
    parts = [
        _small(torch.from_numpy(clips.frames[np.stack((part - 1, part), 1)]))
        for part in np.array_split(rows, -(-len(rows) // 2048))
    ]
    return torch.cat(parts), torch.from_numpy(clips.actions[rows]).double()


def clone_driver(clips: ClipDataset) -> Driver:
    """Fit a driver to recordings; the random features have a seed of their own.

    Args:
        clips: Recordings with actions that are numbers.

    Raises:
        DataError: No actions, actions that are ids or that nobody recorded, or no clip of three
            frames.
    """
    if clips.actions is None or clips.actions.dtype.kind != "f":
        raise DataError("a driver is cloned from actions that are numbers; these clips have none")
    if clips.lengths.max() < 3:
        raise DataError(f"the longest clip has {clips.lengths.max()} frames; a driver needs 3")
    small, done = _pairs(clips)
    mean = small.mean(0)
    centred = small - mean
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(centred))
    count = min(COMPONENTS, len(variance))
    spread = variance[-count:].mean().clamp_min(1e-12).sqrt()
    basis = axes[:, -count:] / spread
    rng = torch.Generator().manual_seed(0)
    frequency = torch.randn(count, FEATURES, generator=rng, dtype=torch.float64)
    frequency = frequency * SCALE / math.sqrt(count)
    phase = 2 * math.pi * torch.rand(FEATURES, generator=rng, dtype=torch.float64)
    inputs = _inputs(centred @ basis, (frequency, phase))
    gram = inputs.T @ inputs / len(inputs)
    penalty = RIDGE / FEATURES * torch.eye(len(gram), dtype=torch.float64)
    penalty[-1, -1] = 1e-12  # the constant is free
    weights = torch.linalg.solve(gram + penalty, inputs.T @ done / len(inputs))
    low, high = done.amin(0).float(), done.amax(0).float()
    return Driver(mean, basis, (frequency, phase), weights, low, high)


def driver_of(clips: ClipDataset) -> Driver | None:
    """Clone a driver from the training split; None without recorded actions that are numbers."""
    if clips.actions is None or clips.actions.dtype.kind != "f":
        return None
    train = clips.only("train")
    knows = train.actions is not None and np.isfinite(train.actions).all(1).any()
    return clone_driver(train) if knows and train.lengths.max() >= 3 else None


def explained(driver: Driver, clips: ClipDataset) -> list[float | None]:
    """Measure the share of each number's variance that a driver explains; None where it has none.

    Args:
        driver: The driver.
        clips: Recordings it was not fitted to.
    """
    small, done = _pairs(clips)
    said = driver.said(small).clamp(driver.low.double(), driver.high.double())
    spread = done.var(0, correction=0)
    share = 1 - (said - done).square().mean(0) / spread.clamp_min(1e-12)
    return [
        round(value, 4) if wide > 1e-9 else None
        for value, wide in zip(share.tolist(), spread.tolist(), strict=True)
    ]


def habits(driver: Driver, after: Beginnings) -> Float[Tensor, "items frames numbers"]:
    """Return what the recorded driver did beyond the cloned one, for every frame after the given.

    Args:
        driver: The clone.
        after: Beginnings with the true frames and actions that followed.

    Raises:
        DataError: Beginnings without actions.
    """
    if after.actions is None:
        raise DataError("beginnings without actions cannot be driven")
    before = torch.cat((after.frames[:, :1], after.frames), 1)
    parts = []
    for frame in range(after.given, after.frames.shape[1]):
        seen = before[:, frame - 1 : frame + 1]  # one frame in front: these led to `frame`
        parts.append(after.actions[:, frame] - driver(seen))
    return torch.stack(parts, 1)


def steered_by(
    driver: Driver, seen: Tensor, beyond: Float[Tensor, "*items numbers"], frames: int
) -> Float[Tensor, "items frames numbers"]:
    """Decide what leads to the frames of the next block: the clone's action and a habit.

    Args:
        driver: The clone.
        seen: The last frames, one or two of them.
        beyond: From `habits`, what is added.
        frames: Frames of the block; all get the same.
    """
    two = torch.cat((seen[:, :1], seen), 1)[:, -2:]
    action = (driver(two) + beyond).clamp(driver.low, driver.high)
    return action[:, None].expand(-1, frames, -1)


def driven(
    model: Any, tokenizer: Any, after: Beginnings, ahead: int, driver: Driver, *, seed: int = 0,
    steps: int | None = None, batch_size: int = BATCH,
) -> UInt8[Tensor, "items ahead height width 3"]:  # fmt: skip
    """Draw frames after beginnings while a driver looks at them and steers.

    Args:
        model: As for `Dream`.
        tokenizer: As for `Dream`.
        after: The beginnings.
        ahead: Frames to draw.
        driver: Who steers.
        seed: Seed of all noise.
        steps: Rows per block; None = the recipe's.
        batch_size: Beginnings at once; changes no picture.
    """
    parts = []
    for first in range(0, len(after), batch_size):
        some = after.take(slice(first, first + batch_size))
        dream = Dream(model, tokenizer, some, seed=seed, steps=steps)
        beyond, seen, drawn = habits(driver, some), some.frames[:, : some.given], []
        for start in range(0, ahead, dream.per_block):
            extra = beyond[:, start % beyond.shape[1] :][:, :1]
            action = steered_by(driver, seen, extra[:, 0], dream.per_block)
            drawn.append(dream.step(action))
            seen = torch.cat((seen, drawn[-1]), 1)[:, -2:]
        parts.append(torch.cat(drawn, 1)[:, :ahead])
    return torch.cat(parts)
