"""Clips made by a formula: balls that fly, bounce and collide in a box, with captions and pushes.

They need no files. Motion is exact: between events every ball follows its parabola, and the times
of events (a ball meets a wall, or another ball) are roots of quadratics, so energy and momentum are
kept to rounding where nothing is pushed and nothing is lossy. It does not know models.

The box is 1 x 1, y grows downwards, times are seconds. Masses are areas of balls. A push acts on
the first ball at the moment of its frame: the action of frame t moves frame t to frame t + 1.

Invariant: a clip depends on (scene, seed, index) and the settings only, not on the size it is
drawn at or on other clips.
"""

import math
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from ..core.errors import check_count, check_one_of, check_range
from .clips import NO_ACTION, ClipDataset

COLORS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "yellow": (240, 220, 40),
    "cyan": (50, 210, 230),
}
GROUNDS = {"black": (0, 0, 0), "navy": (24, 24, 90), "white": (255, 255, 255)}
WALL_COLOR = (128, 128, 128)
SCENES = ("drift", "bounce", "fade", "collide", "juggle", "wall")
ACTIONS = ("none", "left", "right", "up")
PUSH = {"none": (0.0, 0.0), "left": (-0.5, 0.0), "right": (0.5, 0.0), "up": (0.0, -0.8)}
"""Change of the first ball's velocity by each action, in box sides per second."""
GRAVITY = 1.6
FADE = 0.7
"""Share of its speed across the floor that a ball of the scene "fade" keeps at a bounce."""
HELD_OUT_EVERY = 6
_REST = 0.05  # a lossy ball that hits the floor more slowly than this stays there
_MAX_SPEED = 3.0
_MAX_EVENTS = 10_000  # per step: far more than happen, so that no state can loop for ever


@dataclass
class World:
    """Balls in a box.

    Attributes:
        place: float64 [balls, 2], x and y of centres.
        speed: float64 [balls, 2].
        radius: float64 [balls].
        low: float64 [balls, 2], least x and y of the space each ball lives in.
        high: float64 [balls, 2], most x and y.
        gravity: Added to y speeds per second.
        keep: Share of the speed across a wall that is kept at a bounce, 1 = elastic.
        resting: bool [balls], True for balls lying on the floor: gravity no longer moves them.
    """

    place: NDArray[np.float64]
    speed: NDArray[np.float64]
    radius: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    gravity: float = 0.0
    keep: float = 1.0
    resting: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __post_init__(self) -> None:
        if not self.resting.size:
            self.resting = np.zeros(len(self.radius), dtype=bool)

    @property
    def mass(self) -> NDArray[np.float64]:
        """Mass of every ball: the square of its radius, float64 [balls]."""
        return self.radius**2

    def energy(self) -> float:
        """Return kinetic energy plus height times weight, 0 for balls at rest on the floor."""
        height = 1.0 - self.radius - self.place[:, 1]
        kinetic = 0.5 * (self.speed**2).sum(axis=1)
        return float((self.mass * (kinetic + self.gravity * height)).sum())

    def momentum(self) -> NDArray[np.float64]:
        """Return the sum of mass times velocity, float64 [2]."""
        return (self.mass[:, None] * self.speed).sum(axis=0)

    def push(self, change: tuple[float, float]) -> None:
        """Add to the first ball's velocity, at most up to a fixed speed.

        Args:
            change: In x and y, box sides per second.
        """
        self.speed[0] = np.clip(self.speed[0] + change, -_MAX_SPEED, _MAX_SPEED)
        if self.speed[0, 1] < 0:
            self.resting[0] = False

    def step(self, seconds: float) -> int:
        """Move on, through all events on the way.

        Args:
            seconds: How long.

        Returns:
            Number of events: bounces and collisions.
        """
        for count in range(_MAX_EVENTS):
            time, event = self._next_event()
            if time >= seconds:
                self._fly(seconds)
                return count
            self._fly(time)
            self._apply(event)
            seconds -= time
        raise ArithmeticError(f"more than {_MAX_EVENTS} events in one step")

    def _pull(self) -> NDArray[np.float64]:
        return np.where(self.resting, 0.0, self.gravity)

    def _fly(self, seconds: float) -> None:
        pull = self._pull()
        self.place += self.speed * seconds
        self.place[:, 1] += 0.5 * pull * seconds**2
        self.speed[:, 1] += pull * seconds

    def _next_event(self) -> tuple[float, tuple[int, ...]]:
        """Time to the next event, and (ball, axis, side) or (ball, ball)."""
        best: tuple[float, tuple[int, ...]] = (math.inf, ())
        pull = self._pull()
        for ball in range(len(self.radius)):
            for axis in (0, 1):
                pulled = float(pull[ball]) if axis else 0.0
                if axis and self.resting[ball]:
                    continue
                speed, radius = float(self.speed[ball, axis]), self.radius[ball]
                place = self.place[ball, axis]
                before = max(0.0, place - radius - self.low[ball, axis])
                after = max(0.0, self.high[ball, axis] - radius - place)
                best = min(best, (_time_up(before, speed, pulled), (ball, axis, 0)))
                best = min(best, (_time_down(after, speed, pulled), (ball, axis, 1)))
        for pair in combinations(range(len(self.radius)), 2):
            best = min(best, (self._time_to_meet(*pair), pair))
        return best

    def _time_to_meet(self, one: int, two: int) -> float:
        # Gravity acts on both alike, so that they approach in a straight line.
        apart = self.place[two] - self.place[one]
        closing = self.speed[two] - self.speed[one]
        b = float(apart @ closing)
        if b >= 0:
            return math.inf
        c = float(apart @ apart) - (self.radius[one] + self.radius[two]) ** 2
        root = b * b - float(closing @ closing) * c
        return max(0.0, c) / (-b + math.sqrt(root)) if root >= 0 else math.inf

    def _apply(self, event: tuple[int, ...]) -> None:
        if len(event) == 2:
            self._collide(*event)
            return
        ball, axis, _ = event
        self.speed[ball, axis] *= -self.keep
        on_floor = axis == 1 and event[2] == 1
        if on_floor and self.keep < 1 and abs(self.speed[ball, 1]) < _REST:
            self.speed[ball, 1] = 0.0
            self.resting[ball] = True

    def _collide(self, one: int, two: int) -> None:
        line = self.place[two] - self.place[one]
        line /= math.hypot(*line)
        mass = self.mass
        closing = float((self.speed[two] - self.speed[one]) @ line)
        impulse = 2 * closing * mass[one] * mass[two] / (mass[one] + mass[two])
        self.speed[one] += impulse / mass[one] * line
        self.speed[two] -= impulse / mass[two] * line


def _time_down(gap: float, speed: float, pull: float) -> float:
    """Time until a gap in the direction of the pull is closed."""
    root = math.sqrt(speed * speed + 2 * pull * gap)
    if speed > 0:
        return 2 * gap / (speed + root)  # the other form would subtract nearly equal numbers
    return (root - speed) / pull if pull > 0 else math.inf


def _time_up(gap: float, speed: float, pull: float) -> float:
    """Time until a gap against the direction of the pull is closed; never when it is too high."""
    square = speed * speed - 2 * pull * gap
    if speed >= 0 or square < 0:
        return math.inf
    return 2 * gap / (math.sqrt(square) - speed)


@dataclass(frozen=True)
class PhysicsClip:
    """One clip and the truth behind it.

    Attributes:
        frames: uint8 [frames, size, size, 3].
        caption: What happens, in words.
        actions: int64 [frames], ids into `ACTIONS`, -1 on the last frame; None without pushes.
        places: float64 [frames, balls, 2], centres in box sides.
        energies: float64 [frames].
    """

    frames: NDArray[np.uint8]
    caption: str
    actions: NDArray[np.int64] | None
    places: NDArray[np.float64]
    energies: NDArray[np.float64]


def physics_clip(
    scene: str,
    seed: int,
    index: int = 0,
    *,
    num_frames: int = 16,
    size: int = 32,
    fps: float = 10.0,
    pushes: bool = False,
    colors: tuple[str, str] | None = None,
) -> PhysicsClip:
    """Make one clip.

    Args:
        scene: "drift" (one ball, no gravity), "bounce" (one ball, gravity, elastic), "fade" (as
            bounce, but every bounce is lower), "collide" (two balls, no gravity), "juggle" (two
            balls, gravity), "wall" (two balls, a wall between them).
        seed: Seed of the data set, 0 or above.
        index: Number of the clip, 0 or above.
        num_frames: Frames, 1 or above.
        size: Side in pixels, 4 or above.
        fps: Frames per second, 0.1 to 1000.
        pushes: Push the first ball left, right or up at random frames, and record it.
        colors: (ball, ground) to use; None draws them.

    Raises:
        UsageError: A setting out of range.
    """
    check_one_of("scene", scene, SCENES)
    for name, value, low in (("seed", seed, 0), ("index", index, 0), ("num_frames", num_frames, 1)):
        check_count(name, value, low)
    check_count("size", size, 4)
    check_range("fps", fps, 0.1, 1000)
    rng = np.random.default_rng([SCENES.index(scene), seed, index])
    names = [list(COLORS)[i] for i in rng.permutation(len(COLORS))]
    ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
    if colors is not None:
        check_one_of("ball color", colors[0], tuple(COLORS))
        check_one_of("ground", colors[1], tuple(GROUNDS))
        ground = colors[1]
        names = [colors[0], *(name for name in names if name != colors[0])]
    world, wall = _scene(scene, rng)
    caption = _caption(scene, world, names, ground)
    actions = _draw_actions(rng, num_frames) if pushes else None
    places, energies = _run(world, num_frames, fps, actions)
    balls = [(COLORS[name], radius) for name, radius in zip(names, world.radius, strict=False)]
    frames = draw(places, balls, GROUNDS[ground], size, wall)
    return PhysicsClip(frames, caption, actions, places, energies)


def physics_clips(
    train: int = 512,
    held_out: int = 64,
    seed: int = 0,
    *,
    scenes: tuple[str, ...] = SCENES,
    num_frames: int = 16,
    size: int = 32,
    fps: float = 10.0,
    pushes: bool = False,
) -> ClipDataset:
    """Make a data set with the splits "train" and "held_out".

    Clips of "held_out" have a (scene, first ball's colour, ground) that no training clip has,
    though each of the three occurs in training.

    Args:
        train: Training clips.
        held_out: Other clips.
        seed: Seed of all clips.
        scenes: Which scenes, in turn.
        num_frames: Frames per clip.
        size: Side in pixels.
        fps: Frames per second.
        pushes: Record random pushes of the first ball as actions.

    Raises:
        UsageError: A setting out of range.
    """
    check_count("clips", train + held_out)
    unseen = held_out_kinds(scenes)
    seen = [kind for kind in _kinds(scenes) if kind not in unseen]
    clips = []
    for index in range(train + held_out):
        kinds, turn = (seen, index) if index < train else (unseen, index - train)
        scene, *colors = kinds[turn % len(kinds)]
        clips.append(
            physics_clip(
                scene,
                seed,
                index,
                num_frames=num_frames,
                size=size,
                fps=fps,
                pushes=pushes,
                colors=(colors[0], colors[1]),
            )
        )
    actions = [clip.actions for clip in clips if clip.actions is not None]
    return ClipDataset(
        np.concatenate([clip.frames for clip in clips]),
        np.arange(len(clips) + 1, dtype=np.int64) * num_frames,
        [clip.caption for clip in clips],
        ["train"] * train + ["held_out"] * held_out,
        fps,
        np.concatenate(actions) if actions else None,
        ACTIONS if actions else (),
    )


def held_out_kinds(scenes: tuple[str, ...] = SCENES) -> list[tuple[str, str, str]]:
    """Select the (scene, ball, ground) no training clip has: one of six, spread over all words.

    Args:
        scenes: Scenes in use.
    """
    kinds = _kinds(scenes)
    order = np.random.default_rng(0).permutation(len(kinds))
    return [kinds[i] for i in sorted(order[: len(kinds) // HELD_OUT_EVERY])]


def draw(
    places: NDArray[np.float64],
    balls: list[tuple[tuple[int, int, int], float]],
    ground: tuple[int, int, int],
    size: int,
    wall: tuple[float, float] | None = None,
) -> NDArray[np.uint8]:
    """Draw balls as smooth-edged discs.

    Args:
        places: float64 [frames, balls, 2], centres in box sides.
        balls: Colour and radius of every ball; later ones lie on top.
        ground: Colour of the box.
        size: Side in pixels.
        wall: From which to which x a grey wall stands, or None.

    Returns:
        uint8 [frames, size, size, 3].
    """
    line = np.arange(size) + 0.5
    picture = np.tile(np.array(ground, dtype=np.float64), (len(places), size, size, 1))
    if wall is not None:
        inside = np.minimum(line + 0.5, wall[1] * size) - np.maximum(line - 0.5, wall[0] * size)
        picture = _over(picture, np.clip(inside, 0, 1)[None, None, :], WALL_COLOR)
    for ball, (color, radius) in enumerate(balls):
        x, y = places[:, ball, 0, None, None] * size, places[:, ball, 1, None, None] * size
        distance = np.hypot(line[None, None, :] - x, line[None, :, None] - y) - radius * size
        picture = _over(picture, np.clip(0.5 - distance, 0.0, 1.0), color)
    return picture.round().astype(np.uint8)


def track(frames: NDArray[np.uint8], color: str, ground: str) -> NDArray[np.float64]:
    """Find a ball's centre in every frame: the mean place of what is coloured like it.

    Args:
        frames: uint8 [frames, size, size, 3].
        color: Name of the ball's colour.
        ground: Name of the box's colour.

    Returns:
        float64 [frames, 2], x and y in box sides; NaN where nothing has the colour.
    """
    base = np.array(GROUNDS[ground], dtype=np.float64)
    axis = np.array(COLORS[color], dtype=np.float64) - base
    change = frames.astype(np.float64) - base
    share = np.clip(change @ axis / (axis @ axis), 0.0, 1.0)
    # Edges mix ball and ground, so the ball's pixels lie on the line between the two colours.
    off_line = np.linalg.norm(change - share[..., None] * axis, axis=-1)
    share[off_line > 4 + 0.25 * np.linalg.norm(change, axis=-1)] = 0.0
    line = (np.arange(frames.shape[1]) + 0.5) / frames.shape[1]
    total = share.sum(axis=(1, 2))
    with np.errstate(invalid="ignore", divide="ignore"):
        x = (share * line[None, None, :]).sum(axis=(1, 2)) / total
        y = (share * line[None, :, None]).sum(axis=(1, 2)) / total
    return np.stack([x, y], axis=1)


def _over(
    picture: NDArray[np.float64], share: NDArray[np.float64], color: tuple[int, int, int]
) -> NDArray[np.float64]:
    share = share[..., None]
    return share * np.array(color, dtype=np.float64) + (1 - share) * picture


def _kinds(scenes: tuple[str, ...]) -> list[tuple[str, str, str]]:
    # Scenes change fastest, so that any run of clips has all of them.
    return [(scene, color, ground) for color in COLORS for ground in GROUNDS for scene in scenes]


def _scene(scene: str, rng: np.random.Generator) -> tuple[World, tuple[float, float] | None]:
    """Draw the balls of a scene, and the wall of "wall"."""
    count = 2 if scene in ("collide", "juggle", "wall") else 1
    radius = rng.uniform(0.09, 0.15, count)
    low, high = np.zeros((count, 2)), np.ones((count, 2))
    wall = None
    if scene == "wall":
        middle = rng.uniform(0.42, 0.58)
        wall = (middle - 0.03, middle + 0.03)
        high[0, 0], low[1, 0] = wall
    # Every ball starts in a third of its own, so that none overlap.
    span = np.linspace(0, 1, count + 1) if wall is None else np.array([0, middle, 1])
    left = np.maximum(span[:-1] + 0.01, low[:, 0]) + radius
    right = np.minimum(span[1:] - 0.01, high[:, 0]) - radius
    place = np.stack([rng.uniform(left, right), rng.uniform(radius, 0.6, count)], axis=1)
    angle = rng.uniform(0, 2 * math.pi, count)
    pace = rng.uniform(0.4, 0.9, count)
    speed = np.stack([np.cos(angle) * pace, np.sin(angle) * pace], axis=1)
    if scene == "collide":
        # They meet, and not at once: far apart, at nearly one height, heading for each other.
        reach = rng.uniform(0, 0.25 - radius)
        place[:, 0] = radius[0] + reach[0], 1 - radius[1] - reach[1]
        place[:, 1] = 0.5 + rng.uniform(-0.05, 0.05, count)
        speed = np.stack([pace * [1, -1], rng.uniform(-0.1, 0.1, count)], axis=1)
    gravity = 0.0 if scene in ("drift", "collide") else GRAVITY
    if gravity:
        speed[:, 1] *= 0.5
    keep = FADE if scene == "fade" else 1.0
    return World(place, speed, radius, low, high, gravity, keep), wall


def _caption(scene: str, world: World, names: list[str], ground: str) -> str:
    one, two = f"a {names[0]} ball", f"a {names[1]} ball"
    x, y = world.speed[0]
    heading = ("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up")
    side = "right" if x > 0 else "left"
    story = {
        "drift": f"{one} drifts {heading}",
        "bounce": f"{one} bounces to the {side}",
        "fade": f"{one} bounces to the {side}, lower each time",
        "collide": f"{one} and {two} collide",
        "juggle": f"{one} and {two} bounce together",
        "wall": f"{one} and {two} bounce beside a wall",
    }
    return f"{story[scene]} on {ground}"


def _draw_actions(rng: np.random.Generator, num_frames: int) -> NDArray[np.int64]:
    """Draw pushes: none at most frames, the others equally often; none after the last frame."""
    actions = rng.choice(len(ACTIONS), num_frames, p=[0.55, 0.15, 0.15, 0.15]).astype(np.int64)
    actions[-1] = NO_ACTION
    return actions


def _run(
    world: World, num_frames: int, fps: float, actions: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    places, energies = [], []
    for number in range(num_frames):
        places.append(world.place.copy())
        energies.append(world.energy())
        if number + 1 < num_frames:
            if actions is not None:
                world.push(PUSH[ACTIONS[actions[number]]])
            world.step(1 / fps)
    return np.stack(places), np.array(energies)
