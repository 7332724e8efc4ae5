"""Views of still scenes from a camera that goes round them, with captions and poses.

They need no files. A scene is a few coloured balls and boxes on a ground plane under a plain sky,
drawn by casting rays: every pixel is the mean of a few of them. It does not know models.

Lengths are in units of the camera's distance from the middle of the scene, x and y lie on the
ground, z is up. A camera looks along its own +z, its x points right and its y down. The pose of a
view is camera-to-world as seen from the clip's first camera, so that the first view's is the
identity; it is kept as what led to that view, as actions are (`ClipDataset.actions`).

Invariant: a clip depends on (seed, index) and the settings only, not on the size it is drawn at or
on other clips.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import check_count
from .clips import ClipDataset
from .physics import COLORS, GROUNDS, HELD_OUT_EVERY

SHAPES = ("ball", "box")
SKY = (120, 160, 220)
LIGHT = np.array([0.4, -0.3, 0.866])
SHADE = 0.45
"""Share of its colour that a surface keeps where no light falls."""
FIELD_OF_VIEW = math.radians(55)
SAMPLES = 3
"""Rays per pixel and axis."""
ARC = (math.radians(90), math.radians(150))
"""Least and largest arc that the views of a clip are spread over."""


@dataclass(frozen=True)
class Thing:
    """A ball or a box that stands on the ground.

    Attributes:
        shape: Of `SHAPES`.
        place: Middle of its footprint, x and y.
        size: Radius of the ball, half the side of the box.
        turn: Angle of the box about its upright axis, in radians.
        color: Name of its colour.
    """

    shape: str
    place: tuple[float, float]
    size: float
    turn: float
    color: str


@dataclass(frozen=True)
class OrbitClip:
    """Views of one scene and the truth behind them.

    Attributes:
        frames: uint8 [views, size, size, 3].
        caption: What stands there, in words.
        poses: float64 [views, 4, 4], camera-to-world as seen from the first camera.
        things: What stands there.
    """

    frames: NDArray[np.uint8]
    caption: str
    poses: NDArray[np.float64]
    things: tuple[Thing, ...]


def camera(angle: float, height: float) -> NDArray[np.float64]:
    """Place a camera on the unit sphere, looking at the middle.

    Args:
        angle: About the upright axis, in radians.
        height: Elevation, in radians, below a right angle.

    Returns:
        float64 [4, 4], camera-to-world.
    """
    place = np.array(
        [math.cos(height) * math.cos(angle), math.cos(height) * math.sin(angle), math.sin(height)]
    )
    ahead = -place
    right = np.array([-math.sin(angle), math.cos(angle), 0.0])
    down = np.cross(ahead, right)
    pose = np.eye(4)
    pose[:3, 0], pose[:3, 1], pose[:3, 2], pose[:3, 3] = right, down, ahead, place
    return pose


def draw(
    things: tuple[Thing, ...], ground: str, pose: NDArray[np.float64], size: int
) -> NDArray[np.uint8]:
    """Draw one view.

    Args:
        things: What stands on the ground.
        ground: Name of the ground's colour.
        pose: float64 [4, 4], camera-to-world.
        size: Side in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    count = size * SAMPLES
    line = ((np.arange(count) + 0.5) / count * 2 - 1) * math.tan(FIELD_OF_VIEW / 2)
    x, y = np.meshgrid(line, line)
    rays = np.stack([x, y, np.ones_like(x)], -1) @ pose[:3, :3].T
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    start = pose[:3, 3]
    color = np.broadcast_to(np.array(SKY, dtype=np.float64), rays.shape).copy()
    nearest = np.full(rays.shape[:2], np.inf)
    with np.errstate(divide="ignore", invalid="ignore"):
        floor = np.where(rays[..., 2] < 0, -start[2] / rays[..., 2], np.inf)
    hits = [(floor, np.broadcast_to(np.array([0.0, 0.0, 1.0]), rays.shape), GROUNDS[ground])]
    for thing in things:
        meet = _meet_ball if thing.shape == "ball" else _meet_box
        hits.append((*meet(thing, start, rays), COLORS[thing.color]))
    for distance, normal, paint in hits:
        is_front = distance < nearest
        light = SHADE + (1 - SHADE) * np.clip(normal @ LIGHT, 0, 1)
        color = np.where(is_front[..., None], light[..., None] * np.array(paint), color)
        nearest = np.where(is_front, distance, nearest)
    mean = color.reshape(size, SAMPLES, size, SAMPLES, 3).mean(axis=(1, 3))
    return mean.round().astype(np.uint8)


def _meet_ball(
    thing: Thing, start: NDArray[np.float64], rays: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance along every ray to a ball, infinite where it is missed, and normals there."""
    middle = np.array([*thing.place, thing.size])
    apart = start - middle
    b = rays @ apart
    root = b * b - (apart @ apart - thing.size**2)
    distance = np.where(root > 0, -b - np.sqrt(np.maximum(root, 0)), np.inf)
    distance = np.where(distance > 0, distance, np.inf)
    place = np.where(np.isfinite(distance), distance, 0)[..., None] * rays + apart
    return distance, place / thing.size


def _meet_box(
    thing: Thing, start: NDArray[np.float64], rays: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distance along every ray to a box, infinite where it is missed, and normals there."""
    c, s = math.cos(thing.turn), math.sin(thing.turn)
    turn = np.array([[c, s, 0], [-s, c, 0], [0, 0, 1.0]])  # world to box
    from_box = turn @ (start - np.array([*thing.place, thing.size]))
    along = rays @ turn.T
    along = np.where(np.abs(along) < 1e-12, 1e-12, along)
    one, two = (-thing.size - from_box) / along, (thing.size - from_box) / along
    enter, leave = np.minimum(one, two), np.maximum(one, two)
    axis = enter.argmax(-1)
    distance = enter.max(-1)
    is_met = (distance < leave.min(-1)) & (distance > 0)
    normal = np.eye(3)[axis] * -np.sign(np.take_along_axis(along, axis[..., None], -1))
    return np.where(is_met, distance, np.inf), normal @ turn


def orbit_clip(
    seed: int,
    index: int = 0,
    *,
    num_views: int = 12,
    size: int = 32,
    kind: tuple[str, str, str] | None = None,
) -> OrbitClip:
    """Make the views of one scene, spread over an arc and in random order.

    Args:
        seed: Seed of the data set, 0 or above.
        index: Number of the clip, 0 or above.
        num_views: Views, 1 or above.
        size: Side in pixels, 4 or above.
        kind: (shape and colour of the first thing, ground) to use; None draws them.

    Raises:
        UsageError: A setting out of range.
    """
    for name, value, low in (("seed", seed, 0), ("index", index, 0), ("num_views", num_views, 1)):
        check_count(name, value, low)
    check_count("size", size, 4)
    rng = np.random.default_rng([7, seed, index])
    shapes = [str(name) for name in rng.choice(SHAPES, 3)]
    colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))]
    ground = list(GROUNDS)[rng.integers(len(GROUNDS))]
    if kind is not None:
        shapes[0], ground = kind[0], kind[2]
        colors = [kind[1], *(color for color in colors if color != kind[1])]
    count = int(rng.integers(1, 4))
    first = rng.uniform(0, 2 * math.pi)
    things = []
    for number in range(count):  # a third of the round each, so that none overlap
        around = first + 2 * math.pi * number / 3 + rng.uniform(-0.3, 0.3)
        far = rng.uniform(0.22, 0.3)
        place = (far * math.cos(around), far * math.sin(around))
        half = float(rng.uniform(0.1, 0.14))
        turn = float(rng.uniform(0, math.pi / 2))
        things.append(Thing(shapes[number], place, half, turn, colors[number]))
    arc, begin = rng.uniform(*ARC), rng.uniform(0, 2 * math.pi)
    height = rng.uniform(math.radians(25), math.radians(40))
    angles = begin + arc * rng.permutation(num_views) / max(num_views - 1, 1)
    world = [camera(float(angle), float(height)) for angle in angles]
    frames = np.stack([draw(tuple(things), ground, pose, size) for pose in world])
    poses = np.stack([np.linalg.inv(world[0]) @ pose for pose in world])
    named = [f"a {thing.color} {thing.shape}" for thing in things]
    caption = f"{' and '.join(named)} on {ground}"
    return OrbitClip(frames, caption, poses, tuple(things))


def orbit_clips(
    train: int = 512,
    held_out: int = 48,
    seed: int = 0,
    *,
    num_views: int = 12,
    size: int = 32,
) -> ClipDataset:
    """Make a data set with the splits "train" and "held_out", poses as actions.

    Clips of "held_out" have a (shape, colour, ground) of their first thing that no training clip
    has, though each of the three occurs in training.

    Args:
        train: Training clips.
        held_out: Other clips.
        seed: Seed of all clips.
        num_views: Views per clip.
        size: Side in pixels.

    Raises:
        UsageError: A setting out of range.
    """
    check_count("clips", train + held_out)
    kinds = [(shape, color, ground) for color in COLORS for ground in GROUNDS for shape in SHAPES]
    order = np.random.default_rng(0).permutation(len(kinds))
    unseen = [kinds[i] for i in sorted(order[: len(kinds) // HELD_OUT_EVERY])]
    seen = [kind for kind in kinds if kind not in unseen]
    clips = []
    for index in range(train + held_out):
        among, number = (seen, index) if index < train else (unseen, index - train)
        kind = among[number % len(among)]
        clips.append(orbit_clip(seed, index, num_views=num_views, size=size, kind=kind))
    actions = np.zeros((len(clips), num_views, 16), dtype=np.float32)
    for row, clip in zip(actions, clips, strict=True):
        row[:-1] = clip.poses[1:].reshape(num_views - 1, 16)
    return ClipDataset(
        np.concatenate([clip.frames for clip in clips]),
        np.arange(len(clips) + 1, dtype=np.int64) * num_views,
        [clip.caption for clip in clips],
        ["train"] * train + ["held_out"] * held_out,
        1.0,
        actions.reshape(-1, 16),
    )
