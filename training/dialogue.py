"""Two people who talk to each other, made by rule: what is heard of each, and how they move.

They take turns. Who talks opens the mouth with the vowels of the own voice, nods with its stresses,
smiles where a phrase begins high and looks aside; who listens looks at the other, nods a moment
after every phrase of the other ends, and smiles back a little after a smile. So one person's motion
follows from both voices and from the other's motion, with delays, and not linearly. It needs no
files and does not know models.

Invariant: a dialogue depends on (seed, index) and the settings only, not on other dialogues.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import check_count
from .clips import ClipDataset

FPS = 10.0
VOICE = ("loudness", "pitch", "vowel openness", "vowel frontness")
"""What is heard of a person in a frame."""
MOTION = ("nod", "turn", "tilt", "mouth", "smile", "brows")
"""How a person moves: head angles in radians, the others in 0 to 1."""
STREAMS = (len(VOICE), len(MOTION), len(VOICE), len(MOTION))
"""Numbers of a frame, in their order: the user's voice and motion, the agent's voice and motion."""
NOD_DELAY, SMILE_DELAY = 3, 5
"""Frames from the end of a phrase to the nod, and from a smile to the smile back."""
NOD_LENGTH, SMILE_LENGTH = 6, 8
HIGH = 0.85
"""Pitch at which a phrase begins high; phrases begin at 0.6 to 1 and fall."""


@dataclass(frozen=True)
class Dialogue:
    """One dialogue.

    Attributes:
        voices: float64 [2, frames, 4], the user's and the agent's.
        motions: float64 [2, frames, 6].
        talks: bool [2, frames], who has the turn.
    """

    voices: NDArray[np.float64]
    motions: NDArray[np.float64]
    talks: NDArray[np.bool_]


def dialogue(seed: int, index: int, num_frames: int) -> Dialogue:
    """Let two people talk.

    Args:
        seed: Seed of the set.
        index: Number of the dialogue in it.
        num_frames: Frames, 10 a second.
    """
    check_count("frames", num_frames)
    rng = np.random.default_rng([seed, index, 3])
    talks = _turns(num_frames, rng)
    voices = np.stack([_voice(talks[person], rng) for person in range(2)])
    smiles = np.stack([_own_smiles(voice) for voice in voices])
    motions = np.stack(
        [
            _motion(voices[me], voices[1 - me], talks[me], smiles[me], smiles[1 - me], rng)
            for me in range(2)
        ]
    )
    return Dialogue(voices, motions, talks)


def _turns(num_frames: int, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Draw who talks when: turns of 1.5 to 4 seconds with a short pause between them."""
    talks = np.zeros((2, num_frames), dtype=bool)
    start, person = 0, int(rng.integers(2))
    while start < num_frames:
        stop = start + int(rng.integers(15, 40))
        talks[person, start:stop] = True
        start, person = stop + int(rng.integers(2, 5)), 1 - person
    return talks


def _voice(talks: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float64]:
    """Speak while talking: syllables of two or three frames in phrases with gaps between them."""
    voice = np.zeros((len(talks), len(VOICE)))
    frame = 0
    while frame < len(talks):
        phrase, pitch = int(rng.integers(3, 7)), rng.uniform(0.6, 1.0)
        for _ in range(phrase):
            length = int(rng.integers(2, 4))
            sound = (rng.uniform(0.5, 1.0), pitch, rng.uniform(), rng.uniform(-1, 1))
            voice[frame : frame + length] = sound
            voice[frame : frame + 1, 0] *= 0.6
            frame, pitch = frame + length, pitch * 0.85  # phrases fall
        frame += int(rng.integers(3, 6))
    return voice * talks[:, None]


def _own_smiles(voice: NDArray[np.float64]) -> NDArray[np.float64]:
    """Smile for a while where the own phrase begins high."""
    high, smile = voice[:, 1] > HIGH, np.zeros(len(voice))
    for start in np.flatnonzero(high & ~np.concatenate(([False], high[:-1]))):
        smile[start : start + SMILE_LENGTH] = 1.0
    return smile


def _delayed(x: NDArray[np.float64], frames: int) -> NDArray[np.float64]:
    return np.concatenate((np.zeros(min(frames, len(x))), x[: max(len(x) - frames, 0)]))


def _smoothed(x: NDArray[np.float64], follow: float) -> NDArray[np.float64]:
    out, now = np.empty_like(x), 0.0
    for frame, goal in enumerate(x):
        now += follow * (goal - now)
        out[frame] = now
    return out


def _phrase_ends(loudness: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mark the second silent frame after speech."""
    loud = loudness > 0
    ends = np.zeros(len(loud))
    ends[2:] = loud[:-2] & ~loud[1:-1] & ~loud[2:]
    return ends


def _motion(
    own: NDArray[np.float64], other: NDArray[np.float64], talks: NDArray[np.bool_],
    smile: NDArray[np.float64], other_smile: NDArray[np.float64], rng: np.random.Generator,
) -> NDArray[np.float64]:  # fmt: skip
    """Move one person by the own voice, the other's voice and the other's smiles."""
    mouth = _smoothed(own[:, 0] * own[:, 2], 0.8)
    stress = own[:, 0] * (own[:, 1] > 0.6)
    triggers = _delayed(_phrase_ends(other[:, 0]) * ~talks, NOD_DELAY - 2)
    beat = np.sin(2 * np.pi * np.arange(NOD_LENGTH) / NOD_LENGTH)
    nods = np.convolve(triggers, beat)[: len(mouth)]
    nod = 0.25 * nods + 0.15 * _smoothed(stress, 0.6)
    turn = _smoothed(np.where(talks, 0.3, -0.05), 0.3)
    tilt = 0.2 * _smoothed(own[:, 3] * own[:, 0], 0.4)
    answer = _delayed(other_smile, SMILE_DELAY)
    smiling = _smoothed(np.maximum(smile, 0.8 * answer), 0.4)
    brows = _smoothed(np.maximum(stress, 0.5 * (nods > 0)), 0.5)
    motion = np.stack((nod, turn, tilt, mouth, smiling, brows), -1)
    return motion + 0.01 * rng.normal(size=motion.shape)


def dialogue_clips(
    clips: int, held_out: int, seed: int = 0, *, num_frames: int = 120
) -> ClipDataset:
    """Make a set of dialogues without captions.

    Args:
        clips: Number of training dialogues ("train").
        held_out: Number of other dialogues ("held_out").
        seed: Seed of the set.
        num_frames: Frames of every dialogue, 10 a second.

    Returns:
        Clips whose frames are `STREAMS`: the user's voice and motion, the agent's voice and motion.
    """
    check_count("clips", clips)
    check_count("held_out", held_out)
    made = [dialogue(seed, index, num_frames) for index in range(clips + held_out)]
    frames = [
        np.concatenate((talk.voices[0], talk.motions[0], talk.voices[1], talk.motions[1]), -1)
        for talk in made
    ]
    return ClipDataset(
        np.concatenate(frames).astype(np.float32),
        np.arange(len(made) + 1) * num_frames,
        [""] * len(made),
        ["train"] * clips + ["held_out"] * held_out,
        FPS,
    )
