"""A simulated arm that reaches for targets: what control recipes learn from and are judged by.

A planar arm of two rods is driven by torques at its shoulder and elbow, twenty times a second. Two
coloured targets lie within reach; the instruction names one. The expert solves the inverse
kinematics and pulls the arm there with a computed torque. Many arms move side by side.

It needs no download and does not know models.

Invariant: a seed gives the same arm, targets and noise, whatever other arms move beside it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..core.errors import check_count
from .clips import ClipDataset

FPS = 20.0
NUM_STEPS = 40
"""Torques of an episode, two seconds of them."""
SUBSTEPS = 5
LENGTH, MASS, DAMPING = 0.5, 1.0, 0.2
"""Of a rod: metres, kilograms; newton metre seconds of a joint."""
MOST_TORQUE = 3.0
"""Newton metres at action 1."""
EXPERT_MOST = 0.7
"""Largest action of the expert: what it adds as noise then rarely meets the motors' limit."""
COLORS = ("red", "blue")
NUM_OBSERVED, NUM_TORQUES = 12, 2
TOLERANCE = 0.05
"""Metres between tip and target within which a target counts as reached."""
NOISE = 0.1
"""Deviation of what the recorded expert adds to its torques, so that data shows recoveries."""
CHUNK_NOISE = 0.02
"""The same where torques become codes, which would otherwise tell of little but the noise."""
PUSHES, PUSH = 0.1, 1.0
"""Share of the recorded steps that begin with a push, and the deviation of what it adds to the
joints' speeds, in radians per second: data shows more places than the straight ways."""
UNRECORDED = 0.25
"""Share of training episodes of which only the observations were recorded."""
CHUNK = 4
"""Torques of a chunk."""
_STIFFNESS, _BRAKE = 12.0, 7.0  # per second squared and per second: critically damped
_PACE = 5.0  # joint speeds are observed in units of 5 rad/s

Numbers = NDArray[np.float64]
Observed = NDArray[np.float32]


class Arms:
    """Arms side by side, one per seed, at rest when they begin.

    Attributes:
        instructions: What is to be done, one per arm.
        wanted: Number of the wanted target of every arm.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        """Place arms and targets.

        Args:
            seeds: One per arm.
        """
        streams = [np.random.default_rng(seed) for seed in seeds]
        low, high = np.array([-1.2, 0.3]), np.array([1.2, 2.4])
        places = np.stack([stream.uniform(low, high, (3, 2)) for stream in streams])
        self.wanted = np.array([int(stream.integers(len(COLORS))) for stream in streams])
        self._angles, self._speeds = places[:, 0].copy(), np.zeros((len(places), 2))
        self._targets = tip_of(places[:, 1:])
        self.instructions = [f"reach the {COLORS[color]} target" for color in self.wanted]

    def observe(self) -> Observed:
        """Return sines and cosines of the joints, their speeds, the tip, and both targets.

        Returns:
            float32 [arms, 12]; the tip in metres from the shoulder, targets in metres from the tip.
        """
        tip = tip_of(self._angles)
        targets = (self._targets - tip[:, None]).reshape(-1, 4)
        parts = [np.sin(self._angles), np.cos(self._angles), self._speeds / _PACE, tip, targets]
        return np.concatenate(parts, axis=1).astype(np.float32)

    def expert(self) -> Observed:
        """Return the torques of the expert, float32 [arms, 2], at most 0.7.

        A computed torque: the mass matrix times the acceleration of a critically damped spring
        between the joints and those of the wanted target, plus what cancels inertia and friction.
        """
        error = joints_of(self._wanted_places()) - self._angles
        pull = _STIFFNESS * error - _BRAKE * self._speeds
        mass = mass_matrix(self._angles[:, 1])
        torque = (mass * pull[:, None]).sum(-1) + own_forces(self._angles[:, 1], self._speeds)
        return np.clip(torque / MOST_TORQUE, -EXPERT_MOST, EXPERT_MOST).astype(np.float32)

    def step(self, actions: NDArray[np.floating]) -> None:
        """Apply torques for a twentieth of a second.

        Args:
            actions: [arms, 2]; clipped to [-1, 1], which is `MOST_TORQUE`.
        """
        torque = MOST_TORQUE * np.clip(actions.astype(np.float64), -1, 1)
        span = 1 / (FPS * SUBSTEPS)
        for _ in range(SUBSTEPS):
            force = torque - own_forces(self._angles[:, 1], self._speeds)
            self._speeds = self._speeds + span * solve(mass_matrix(self._angles[:, 1]), force)
            self._angles = self._angles + span * self._speeds

    def push(self, speeds: Numbers) -> None:
        """Add to the joints' speeds [arms, 2], in radians per second."""
        self._speeds = self._speeds + speeds

    def distances(self) -> Numbers:
        """Return the metres between every tip and its wanted target."""
        return np.linalg.norm(tip_of(self._angles) - self._wanted_places(), axis=-1)

    def energies(self) -> Numbers:
        """Return the kinetic energy of every arm in joules."""
        turned = (mass_matrix(self._angles[:, 1]) * self._speeds[:, None]).sum(-1)
        return 0.5 * (self._speeds * turned).sum(-1)

    def _wanted_places(self) -> Numbers:
        return self._targets[np.arange(len(self.wanted)), self.wanted]


# -- mechanics --------------------------------------------------------------------------------


def tip_of(angles: Numbers) -> Numbers:
    """Compute where the tip is.

    Args:
        angles: [..., 2] of the shoulder, and of the elbow against the upper arm, in radians.

    Returns:
        [..., 2], metres from the shoulder.
    """
    first, both = angles[..., 0], angles[..., 0] + angles[..., 1]
    return LENGTH * np.stack((np.cos(first) + np.cos(both), np.sin(first) + np.sin(both)), -1)


def joints_of(places: Numbers) -> Numbers:
    """Compute the joints that bring the tip to places within reach; the elbow bends to the left.

    Args:
        places: [..., 2], metres from the shoulder.
    """
    reach = (places**2).sum(-1)
    elbow = np.arccos(np.clip(reach / (2 * LENGTH**2) - 1, -1, 1))
    shoulder = np.arctan2(places[..., 1], places[..., 0]) - elbow / 2
    return np.stack((shoulder, elbow), -1)


def mass_matrix(elbow: Numbers) -> Numbers:
    """Compute the mass matrix [arms, 2, 2] of two uniform rods (Spong, Robot Modeling, ch. 6)."""
    inertia = MASS * LENGTH**2
    bent = 0.5 * inertia * np.cos(elbow)
    fore = np.full_like(elbow, inertia / 3)
    both = 5 / 3 * inertia + 2 * bent
    return np.stack((np.stack((both, fore + bent), -1), np.stack((fore + bent, fore), -1)), -2)


def own_forces(elbow: Numbers, speeds: Numbers) -> Numbers:
    """Compute the torques [arms, 2] of inertia and friction, which the motors have to overcome."""
    swing = 0.5 * MASS * LENGTH**2 * np.sin(elbow)
    first, second = speeds[:, 0], speeds[:, 1]
    inertial = np.stack((-swing * second * (2 * first + second), swing * first**2), -1)
    return inertial + DAMPING * speeds


def solve(matrix: Numbers, vector: Numbers) -> Numbers:
    """Solve 2 x 2 systems [arms, 2, 2] by Cramer's rule, each on its own."""
    a, b, c, d = (matrix[:, i, j] for i in range(2) for j in range(2))
    x, y = vector[:, 0], vector[:, 1]
    return np.stack((d * x - b * y, a * y - c * x), -1) / (a * d - b * c)[:, None]


# -- episodes ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """Episodes of the expert, who adds noise to its torques and is pushed now and then.

    Attributes:
        seeds: One per episode.
        instructions: One per episode.
        wanted: Number of the wanted target.
        observed: float32 [episodes, steps + 1, 12].
        torques: float32 [episodes, steps, 2], as they were applied.
    """

    seeds: list[int]
    instructions: list[str]
    wanted: NDArray[np.int64]
    observed: Observed
    torques: Observed


def record(seeds: Sequence[int], noise: float = NOISE, steps: int = NUM_STEPS) -> Recorded:
    """Record the expert.

    Args:
        seeds: One per episode.
        noise: Deviation of what is added to every torque.
        steps: Torques of an episode.
    """
    arms = Arms(seeds)
    streams = [np.random.default_rng((seed, 1)) for seed in seeds]
    shaken, pushes = (np.stack([s.standard_normal((steps, 2)) for s in streams]) for _ in range(2))
    pushed = np.stack([stream.random(steps) < PUSHES for stream in streams])
    observed, torques = [arms.observe()], []
    for step in range(steps):
        wanted = arms.expert() + noise * shaken[:, step]
        torques.append(np.clip(wanted, -1, 1).astype(np.float32))
        arms.step(torques[-1])
        arms.push(PUSH * pushes[:, step] * pushed[:, step, None])
        observed.append(arms.observe())
    return Recorded(
        list(seeds), arms.instructions, arms.wanted, np.stack(observed, 1), np.stack(torques, 1)
    )


def seeds_of(train: int, held_out: int, seed: int) -> tuple[list[int], list[int]]:
    """Number training and held-out episodes, which differ in where everything lies."""
    check_count("train", train)
    check_count("held_out", held_out)
    first = seed * 1_000_003
    return [*range(first, first + train)], [*range(first + train, first + train + held_out)]


def reaching_clips(
    train: int, held_out: int, seed: int, unrecorded: float = UNRECORDED
) -> ClipDataset:
    """Record observations as frames and torques as what is done in them.

    Args:
        train: Training episodes.
        held_out: Episodes to measure on; all of their torques are recorded.
        seed: Of the first episode; further ones count up.
        unrecorded: Share of training episodes without torques.

    Returns:
        Clips of `NUM_STEPS` + 1 frames of 12 numbers, split "train" or "held_out".
    """
    episodes = record([s for part in seeds_of(train, held_out, seed) for s in part])
    torques = np.pad(episodes.torques, ((0, 0), (0, 1), (0, 0)))
    torques[: math.floor(unrecorded * train)] = np.nan
    return _clips(episodes.observed, torques, episodes.instructions, train)


def chunked_clips(train: int, held_out: int, seed: int) -> ClipDataset:
    """Record torques as frames and, as what is told on the way to them, the observations.

    Every clip begins with a chunk of rest, so that the first torques have an observation before
    them too: the arm hangs still until then.

    Args:
        train: Training episodes.
        held_out: Episodes to measure on.
        seed: Of the first episode; further ones count up.

    Returns:
        Clips of `CHUNK` + `NUM_STEPS` frames of two numbers, split "train" or "held_out".
    """
    numbers = [s for part in seeds_of(train, held_out, seed) for s in part]
    episodes = record(numbers, CHUNK_NOISE)
    torques = np.pad(episodes.torques, ((0, 0), (CHUNK, 0), (0, 0)))
    observed = np.zeros((*torques.shape[:2], NUM_OBSERVED), np.float32)
    observed[:, CHUNK - 1 : -1] = episodes.observed[:, :-1]
    return _clips(torques, observed, episodes.instructions, train)


def _clips(frames: Observed, actions: Observed, captions: list[str], train: int) -> ClipDataset:
    count, length = frames.shape[:2]
    return ClipDataset(
        np.ascontiguousarray(frames.reshape(count * length, -1)),
        np.arange(count + 1, dtype=np.int64) * length,
        captions,
        ["train"] * train + ["held_out"] * (count - train),
        fps=FPS,
        actions=np.ascontiguousarray(actions.reshape(count * length, -1)),
    )


# -- who moves the arms -----------------------------------------------------------------------


class Mover(Protocol):
    """Somebody who moves a batch of arms in step."""

    def begin(self, arms: Arms) -> None:
        """Begin new episodes; reads instructions, never the arms' state."""
        ...

    def act(self, observed: Observed) -> NDArray[np.floating]:
        """Say which torques [arms, 2] follow observations [arms, 12]."""
        ...


def reach(seeds: Sequence[int], mover: Mover, steps: int = NUM_STEPS) -> Numbers:
    """Let somebody move arms to the end.

    Args:
        seeds: One per arm.
        mover: Who moves them.
        steps: Torques of an episode.

    Returns:
        Metres between every tip and its wanted target at the end.
    """
    arms = Arms(seeds)
    mover.begin(arms)
    for _ in range(steps):
        arms.step(mover.act(arms.observe()))
    return arms.distances()


class ExpertMover:
    """The expert without noise; it alone looks at the arms themselves."""

    def begin(self, arms: Arms) -> None:
        """Look at the arms."""
        self._arms = arms

    def act(self, observed: Observed) -> Observed:
        """Ask the expert."""
        return self._arms.expert()


class RandomMover:
    """Torques drawn evenly from [-1, 1] times `size`; 0 leaves the arms alone."""

    def __init__(self, seed: int, size: float = 1.0) -> None:
        """Take a seed for all episodes."""
        self._stream, self._size = np.random.default_rng(seed), size

    def begin(self, arms: Arms) -> None:
        """Nothing is remembered."""

    def act(self, observed: Observed) -> NDArray[np.floating]:
        """Draw."""
        return self._size * self._stream.uniform(-1, 1, (len(observed), NUM_TORQUES))


class LinearMover:
    """The linear policy of least squares; it has a map of its own for either instruction."""

    def __init__(self, episodes: Recorded) -> None:
        """Fit.

        Args:
            episodes: Recorded episodes.
        """
        rows = linear_features(episodes.observed[:, :-1], episodes.wanted)
        flat = rows.reshape(-1, rows.shape[-1])
        torques = episodes.torques.reshape(-1, NUM_TORQUES).astype(np.float64)
        self.weights = np.linalg.lstsq(flat, torques, rcond=None)[0]
        self.deviation = (torques - flat @ self.weights).std(0)

    def begin(self, arms: Arms) -> None:
        """Read the instructions."""
        self._wanted = arms.wanted

    def act(self, observed: Observed) -> Numbers:
        """Map."""
        return linear_features(observed[:, None], self._wanted)[:, 0] @ self.weights

    def loss(self, episodes: Recorded) -> Numbers:
        """Return the nats [episodes, steps] of torques under a Gaussian around the policy."""
        means = linear_features(episodes.observed[:, :-1], episodes.wanted) @ self.weights
        away = (episodes.torques - means) / self.deviation
        norm = np.log(self.deviation) + 0.5 * math.log(2 * math.pi)
        return (0.5 * away**2 + norm).sum(-1)


def linear_features(observed: Observed, wanted: NDArray[np.int64]) -> Numbers:
    """Put an observation, and a one, into the half that belongs to its instruction.

    Args:
        observed: [episodes, steps, 12].
        wanted: Number of the wanted target of every episode.

    Returns:
        [episodes, steps, 26].
    """
    rows = np.concatenate((observed, np.ones((*observed.shape[:2], 1))), -1)
    chosen = np.eye(len(COLORS))[wanted]
    return (chosen[:, None, :, None] * rows[:, :, None]).reshape(*rows.shape[:2], -1)
