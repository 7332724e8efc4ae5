"""Talking mouths made by rule: what is heard in every frame, and where the points of the lips are.

A sentence is a chain of phoneme-like units with a place in time. Every unit pulls the mouth towards
a shape of its own, the more the nearer it is; where the pulls of neighbours overlap they blend, so
that a unit looks different among different neighbours (coarticulation). Speakers differ in how far
they open, round and spread their lips and in how lazily they follow. It needs no files and does not
know models.

Lengths are in centimetres from the mouth at rest: x to the right, y up, z ahead. What is heard is
one vector per frame, with a little of the frames around it as an encoder of speech would give, kept
as what led to that frame, as actions are (`ClipDataset.actions`).

Invariant: a clip depends on (seed, index) and the settings only, not on other clips.

Source: the dominance functions of Cohen and Massaro, Modeling Coarticulation in Synthetic Visual
Speech (1993). Differs: one dominance per unit and not per unit and parameter.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import check_count
from .clips import ClipDataset

FPS = 30.0
NUM_SOUNDS = 12
"""Numbers of what is heard in a frame."""
NUM_POINTS = 8
"""Points around the lips; a face has three numbers for each."""


@dataclass(frozen=True)
class Unit:
    """A phoneme-like unit.

    Attributes:
        shape: Jaw opening, lip rounding, lip spreading and lip closure, each in 0 to 1.
        dominance: Pull on the mouth in the middle of the unit.
        loudness: Of its sound, in 0 to 1.
    """

    shape: tuple[float, float, float, float]
    dominance: float
    loudness: float


UNITS = {
    "rest": Unit((0.0, 0.0, 0.0, 0.2), 0.5, 0.0),
    "a": Unit((1.0, 0.0, 0.2, 0.0), 1.0, 1.0),
    "e": Unit((0.5, 0.0, 0.8, 0.0), 0.8, 0.9),
    "i": Unit((0.2, 0.0, 1.0, 0.0), 0.8, 0.8),
    "o": Unit((0.6, 0.8, 0.0, 0.0), 1.0, 0.9),
    "u": Unit((0.2, 1.0, 0.0, 0.0), 1.2, 0.8),
    "m": Unit((0.0, 0.1, 0.1, 1.0), 2.5, 0.4),
    "f": Unit((0.1, 0.0, 0.3, 0.6), 2.0, 0.3),
    "s": Unit((0.1, 0.1, 0.6, 0.0), 0.7, 0.4),
    "k": Unit((0.3, 0.1, 0.2, 0.0), 0.2, 0.3),
}
NAMES = tuple(UNITS)


@dataclass(frozen=True)
class Speaker:
    """How one speaker moves.

    Attributes:
        reach: Scale of each part of a shape.
        lean: How much higher the right corner of the mouth is drawn, in -1 to 1.
        follow: Share of the way to the wanted shape that is gone in a frame, in (0, 1].
    """

    reach: tuple[float, float, float, float]
    lean: float
    follow: float


SPEAKERS = {
    "ada": Speaker((1.0, 1.0, 1.0, 1.0), 0.0, 0.7),
    "ben": Speaker((0.5, 0.8, 0.5, 0.9), 0.4, 0.4),
    "cho": Speaker((1.4, 0.6, 1.3, 1.0), -0.3, 0.9),
    "dev": Speaker((0.8, 1.5, 0.4, 0.8), 0.2, 0.55),
}


def _angles() -> NDArray[np.float64]:
    return (np.arange(NUM_POINTS, dtype=np.float64) + 0.5) * (2 * math.pi / NUM_POINTS)


def lip_points(shape: NDArray[np.float64], lean: float = 0.0) -> NDArray[np.float64]:
    """Place the points of the lips for a mouth of some shape.

    Args:
        shape: Jaw opening, rounding, spreading and closure [frames, 4].
        lean: How much higher the right corner is drawn.

    Returns:
        Offsets from the mouth at rest [frames, points, 3], centimetres.
    """
    jaw, rounding, spreading, closure = (part[:, None] for part in shape.T)
    x, y = np.cos(_angles()), np.sin(_angles())
    across = (0.6 * spreading - 0.7 * rounding) * x
    upper, lower = np.clip(y, 0, None), np.clip(-y, 0, None)
    gap = np.clip(jaw - closure, 0, None)  # closed lips stay closed, whatever the jaw does
    up = 0.4 * gap * upper - 1.6 * gap * lower - 0.3 * closure * (upper - lower)
    up = up + lean * spreading * np.clip(x, 0, None)
    ahead = 0.5 * rounding + 0.2 * closure - 0.1 * gap * lower
    return np.stack(np.broadcast_arrays(across, up, ahead), -1)


def unit_sounds() -> NDArray[np.float64]:
    """Return what every unit sounds like [units, NUM_SOUNDS]: a fixed direction, as loud as it."""
    directions = np.random.default_rng(20211210).normal(size=(len(NAMES), NUM_SOUNDS))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return directions * np.array([UNITS[name].loudness for name in NAMES])[:, None]


@dataclass(frozen=True)
class TalkingClip:
    """One sentence.

    Attributes:
        points: float64 [frames, NUM_POINTS, 3], centimetres.
        sounds: float64 [frames, NUM_SOUNDS].
        speaker: Name of the speaker.
        units: Names of the units spoken, and the frame each is in the middle of.
    """

    points: NDArray[np.float64]
    sounds: NDArray[np.float64]
    speaker: str
    units: tuple[tuple[str, float], ...]


def talking_clip(seed: int, index: int, num_frames: int) -> TalkingClip:
    """Speak one sentence.

    Args:
        seed: Seed of the set.
        index: Number of the clip in it.
        num_frames: Frames, 30 a second.
    """
    check_count("frames", num_frames)
    rng = np.random.default_rng([seed, index, 4])
    speaker = list(SPEAKERS)[index % len(SPEAKERS)]
    units: list[tuple[str, float]] = [("rest", 0.0)]
    time = rng.uniform(2, 5)
    while time < num_frames + 6:
        name = NAMES[rng.integers(0 if rng.random() < 0.3 else 1, len(NAMES))]
        units.append((name, float(time)))
        time += rng.uniform(2.5, 6)
    middles = np.array([middle for _, middle in units])
    which = np.array([NAMES.index(name) for name, _ in units])
    frame = np.arange(num_frames, dtype=np.float64)
    distance = np.abs(frame[:, None] - middles)
    power = np.array([UNITS[NAMES[k]].dominance for k in which]) * np.exp(-0.45 * distance)
    shapes = np.array([UNITS[NAMES[k]].shape for k in which])
    wanted = power @ shapes / power.sum(1, keepdims=True)
    how = SPEAKERS[speaker]
    shape = _followed(wanted * np.array(how.reach), how.follow)
    heard = np.exp(-0.5 * (distance / 1.8) ** 2) @ unit_sounds()[which]
    heard += 0.03 * rng.normal(size=heard.shape)
    heard[0] = 0.0  # nothing leads to the first frame
    return TalkingClip(lip_points(shape, how.lean), heard, speaker, tuple(units))


def _followed(wanted: NDArray[np.float64], follow: float) -> NDArray[np.float64]:
    """Let a mouth follow the wanted shapes, a share of the way in every frame."""
    shape, now = np.empty_like(wanted), wanted[0]
    for frame, goal in enumerate(wanted):
        now = now + follow * (goal - now)
        shape[frame] = now
    return shape


def talking_clips(clips: int, held_out: int, seed: int = 0, *, num_frames: int = 80) -> ClipDataset:
    """Make a set of sentences, captioned with their speaker.

    Args:
        clips: Number of training sentences ("train").
        held_out: Number of other sentences of the same speakers ("held_out").
        seed: Seed of the set.
        num_frames: Frames of every clip, 30 a second.

    Returns:
        Clips whose frames are lip points (24 numbers, centimetres) and whose actions are what is
        heard on the way to the next frame.
    """
    check_count("clips", clips)
    check_count("held_out", held_out)
    made = [talking_clip(seed, index, num_frames) for index in range(clips + held_out)]
    sounds = np.stack([clip.sounds for clip in made])
    led = np.concatenate((sounds[:, 1:], np.zeros_like(sounds[:, :1])), 1)
    return ClipDataset(
        np.concatenate([clip.points.reshape(num_frames, -1) for clip in made]).astype(np.float32),
        np.arange(len(made) + 1) * num_frames,
        [f"speaker {clip.speaker}" for clip in made],
        ["train"] * clips + ["held_out"] * held_out,
        FPS,
        led.reshape(-1, NUM_SOUNDS).astype(np.float32),
    )
