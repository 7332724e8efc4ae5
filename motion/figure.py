"""Motion as pictures: a figure of round sticks on a tiled floor, for videos and strips.

Pillow draws, larger than wanted, and shrinks (antialiasing). It knows no files and no models.

Invariant: equal motions and settings give equal pixels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ..core.errors import check_count, check_one_of
from .clip import Motion
from .look import COLORS, bone_radius, bones_of, head_of, height_of, side_of
from .skeleton import Skeleton

View = Literal["auto", "follow", "whole"]
VIEWS = ("auto", "follow", "whole")
MIN_SIZE, MAX_SIZE = 32, 2048
_SKY, _GRID, _SHADOW, _TRAIL = (247, 248, 250), (208, 213, 221), (214, 218, 224), (176, 184, 196)
_YAW, _PITCH, _HALF_FIELD = 0.6, 0.22, math.radians(17)
_CELL, _REACH = 0.5, 3.5  # metres: grid cells, and how far the floor is drawn
_FILL = 0.78  # part of the picture's height that a standing figure fills


@dataclass(frozen=True)
class Camera:
    """Where a frame is seen from, and how places become pixels.

    Attributes:
        target: Place in the middle of the picture, metres [3].
        distance: Metres from the target.
        size: Width and height in pixels.
    """

    target: NDArray[np.float64]
    distance: float
    size: tuple[int, int]

    def project(self, places: NDArray[np.floating]) -> NDArray[np.float64]:
        """Turn places [..., 3] in metres into (x, y, depth) in pixels and metres."""
        sin, cos = math.sin(_YAW), math.cos(_YAW)
        low, high = math.sin(_PITCH), math.cos(_PITCH)
        right = np.array([cos, 0.0, -sin])
        toward = np.array([sin * high, low, cos * high])  # from the target to the eye
        up = np.cross(toward, right)
        local = np.asarray(places, dtype=np.float64) - self.target
        depth = np.maximum(self.distance - local @ toward, 0.05)
        scale = self.pixels_per_metre / depth
        width, height = self.size
        return np.stack(
            [width / 2 + scale * (local @ right), height / 2 - scale * (local @ up), depth], axis=-1
        )

    @property
    def pixels_per_metre(self) -> float:
        """Pixels of a metre at a depth of one metre."""
        return self.size[1] / 2 / math.tan(_HALF_FIELD)


def draw_frames(
    motion: Motion, size: int = 256, *, width: int | None = None, view: View = "auto"
) -> Iterator[NDArray[np.uint8]]:
    """Draw every frame of a motion.

    Args:
        motion: At least one frame; rotations are not needed.
        size: Height of the pictures in pixels, 32 to 2048.
        width: Width; None = the height.
        view: "follow" moves the camera along, smoothly; "whole" shows the whole path from one
            place; "auto" follows who goes far.

    Yields:
        uint8 [height, width, 3], one by one.

    Raises:
        UsageError: A bad setting.
    """
    joints, cameras, scale = _prepared(motion, size, width, view)
    painter = _Painter(motion.skeleton, joints, scale)
    for number, camera in enumerate(cameras):
        yield np.asarray(painter.paint(number, camera).reduce(scale))


def draw_strip(motion: Motion, poses: int = 8, size: int = 256) -> Image.Image:
    """Draw poses side by side, evenly spread from the first frame to the last.

    Args:
        motion: As in `draw_frames`.
        poses: At most this many, 1 to 64.
        size: Height of the strip in pixels.

    Raises:
        UsageError: A bad setting.
    """
    check_count("poses", poses, 1, 64)
    panel = max(MIN_SIZE, round(0.62 * size))
    joints, cameras, scale = _prepared(motion, size, panel, "follow")
    count = min(poses, len(joints))
    painter = _Painter(motion.skeleton, joints, scale)
    strip = Image.new("RGB", (count * panel, size), _SKY)
    for place in range(count):
        number = round(place * (len(joints) - 1) / max(count - 1, 1))
        strip.paste(painter.paint(number, cameras[number]).reduce(scale), (place * panel, 0))
    return strip


def _prepared(
    motion: Motion, size: int, width: int | None, view: str
) -> tuple[NDArray[np.float64], list[Camera], int]:
    """Check a request; return joints, one camera per frame, and the enlargement."""
    check_count("size", size, MIN_SIZE, MAX_SIZE)
    width = size if width is None else width
    check_count("width", width, MIN_SIZE, MAX_SIZE)
    check_one_of("view", view, VIEWS)
    joints = motion.joints.astype(np.float64)
    scale = 3 if size <= 320 else 2
    figure = height_of(motion.skeleton)
    if view == "auto":
        path = np.ptp(joints[:, 0][:, [0, 2]], axis=0).max()
        view = "follow" if path > 1.2 * figure else "whole"
    seen = joints
    if (crown := _crown(motion.skeleton, joints)) is not None:
        seen = np.concatenate([joints, crown[0][:, None] + [0.0, crown[1], 0.0]], axis=1)
    cameras = _cameras(seen, figure, motion.fps, view, (width * scale, size * scale))
    return joints, cameras, scale


def _crown(
    skeleton: Skeleton, joints: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float] | None:
    """Return the middle of the head's ball in every frame [frames, 3], and its radius."""
    head = head_of(skeleton)
    if head is None:
        return None
    joint, radius = head
    up = joints[:, joint] - joints[:, skeleton.parents[joint]]
    up /= np.maximum(np.linalg.norm(up, axis=-1, keepdims=True), 1e-9)
    return joints[:, joint] + radius * up, radius


def _cameras(
    joints: NDArray[np.float64], figure: float, fps: float, view: str, size: tuple[int, int]
) -> list[Camera]:
    """Place one camera per frame: on a smoothed path, or one that sees all."""
    ground = float(joints[..., 1].min())
    reach = float(joints[..., 1].max()) - ground
    tall = max(figure, reach)
    near = tall / _FILL / 2 / math.tan(_HALF_FIELD)
    if view == "follow":
        path = _smoothed(joints[:, 0], fps)
        path[:, 1] = ground + 0.5 * tall
        # Limbs that leave a narrow picture: step back until every frame fits.
        return _stepped_back(joints, path, near, size)
    low, high = joints.reshape(-1, 3).min(0), joints.reshape(-1, 3).max(0)
    middle = np.array([(low[0] + high[0]) / 2, ground + 0.5 * tall, (low[2] + high[2]) / 2])
    return _stepped_back(joints, np.tile(middle, (len(joints), 1)), near, size)


def _stepped_back(
    joints: NDArray[np.float64], targets: NDArray[np.float64], distance: float,
    size: tuple[int, int],
) -> list[Camera]:  # fmt: skip
    """Go back from the targets until all joints are inside the picture, with a margin."""
    middle = np.array(size) / 2
    every = max(1, len(joints) // 200)
    for _ in range(40):
        worst = max(
            np.abs((Camera(target, distance, size).project(frame)[:, :2] - middle) / middle).max()
            for frame, target in zip(joints[::every], targets[::every], strict=True)
        )
        if worst <= 0.9:
            break
        distance *= 1.08
    return [Camera(target, distance, size) for target in targets]


def _smoothed(path: NDArray[np.float64], fps: float) -> NDArray[np.float64]:
    """Smooth a path [frames, 3] with a Gaussian of half a second; beyond its ends it goes on."""
    spread = max(0.5 * fps, 1e-3)
    half = min(math.ceil(3 * spread), 600)
    weights = np.exp(-0.5 * (np.arange(-half, half + 1) / spread) ** 2)
    weights /= weights.sum()
    padded = np.pad(path, ((half, half), (0, 0)), mode="reflect", reflect_type="odd")
    return np.stack([np.convolve(padded[:, axis], weights, "valid") for axis in range(3)], axis=1)


class _Painter:
    """Draws single frames, enlarged."""

    def __init__(self, skeleton: Skeleton, joints: NDArray[np.float64], scale: int) -> None:
        self.joints, self.scale = joints, scale
        height = height_of(skeleton)
        self.bones = [
            (a, b, bone_radius(skeleton, b, height), COLORS[side_of(skeleton.names[b])])
            for a, b in bones_of(skeleton)
        ]
        self.crown = _crown(skeleton, joints)
        self.ground = float(joints[..., 1].min()) - 0.015 * height
        self.trail = joints[:, 0] * [1, 0, 1] + [0, self.ground, 0]

    def paint(self, number: int, camera: Camera) -> Image.Image:
        """Draw one frame."""
        picture = Image.new("RGB", camera.size, _SKY)
        draw = ImageDraw.Draw(picture)
        self._floor(draw, camera)
        self._line(draw, camera.project(self.trail[: number + 1]), _TRAIL, 1.5 * self.scale)
        joints = self.joints[number]
        flat = joints * [1, 0, 1] + [0, self.ground, 0]
        shadow, places = camera.project(flat), camera.project(joints)
        for a, b, radius, _ in self.bones:
            self._stick(draw, shadow[a], shadow[b], radius, _SHADOW, camera)
        depths = {id(bone): places[bone[0], 2] + places[bone[1], 2] for bone in self.bones}
        head = self._head(number, camera)
        for bone in sorted(self.bones, key=lambda bone: -depths[id(bone)]):
            if head is not None and depths[id(bone)] < 2 * head[0][2]:
                self._ball(draw, *head)
                head = None
            a, b, radius, color = bone
            self._stick(draw, places[a], places[b], radius + 0.006, _SKY, camera, is_rim=True)
            self._stick(draw, places[a], places[b], radius, color, camera)
        if head is not None:
            self._ball(draw, *head)
        return picture

    def _head(self, number: int, camera: Camera) -> tuple[NDArray[np.float64], float] | None:
        """Return the middle of the head in the picture and its radius in pixels."""
        if self.crown is None:
            return None
        middle = camera.project(self.crown[0][number])
        return middle, self.crown[1] * camera.pixels_per_metre / middle[2]

    def _ball(self, draw: Any, middle: NDArray[np.float64], radius: float) -> None:
        rim = radius + 1.5 * self.scale
        for color, size in ((_SKY, rim), (COLORS["middle"], radius)):
            x, y = middle[:2]
            draw.ellipse((x - size, y - size, x + size, y + size), fill=color)

    def _stick(
        self, draw: Any, one: NDArray[np.float64], two: NDArray[np.float64], radius: float,
        color: tuple[int, int, int], camera: Camera, *, is_rim: bool = False,
    ) -> None:  # fmt: skip
        """Draw a bone as a line with round ends; a rim has none, it would cut the next bone."""
        thick = 2 * radius * camera.pixels_per_metre / (0.5 * (one[2] + two[2]))
        thick = max(thick, 1.5 * self.scale)
        draw.line((*one[:2], *two[:2]), fill=color, width=max(1, round(thick)))
        for x, y in () if is_rim else (one[:2], two[:2]):
            draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=color)

    def _line(
        self, draw: Any, places: NDArray[np.float64], color: tuple[int, int, int], width: float
    ) -> None:
        if len(places) > 1:
            draw.line([(x, y) for x, y, _ in places], fill=color, width=max(1, round(width)))

    def _floor(self, draw: Any, camera: Camera) -> None:
        """Draw the grid around the target; it fades into the distance."""
        x, z = (_CELL * round(float(camera.target[axis]) / _CELL) for axis in (0, 2))
        steps = np.arange(-_REACH, _REACH + _CELL / 2, _CELL)
        for along in (False, True):
            first, second = np.meshgrid(steps, steps, indexing="ij")
            across, run = (second, first) if along else (first, second)
            places = np.stack([x + across, np.full_like(across, self.ground), z + run], axis=-1)
            away = np.hypot(x + across - camera.target[0], z + run - camera.target[2])
            dots = camera.project(places)
            starts, ends, fade = dots[:-1], dots[1:], (away[:-1] + away[1:]) / 2
            for start, end, far in zip(
                starts.reshape(-1, 3), ends.reshape(-1, 3), fade.reshape(-1), strict=True
            ):
                part = max(0.0, 1 - (far / _REACH) ** 2)
                if part > 0.02:
                    color = tuple(
                        round(s + part * (g - s)) for s, g in zip(_SKY, _GRID, strict=True)
                    )
                    draw.line((*start[:2], *end[:2]), fill=color, width=self.scale)
