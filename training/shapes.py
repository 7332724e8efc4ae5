"""Captioned pictures made by a formula: one coloured shape on a plain ground.

They need no files, cost milliseconds, and a model of a few hundred thousand weights can learn them
in seconds; so every recipe can be shown to learn. It does not know models or tokenizers.

Invariants: a picture depends on (prompt, seed, number) only; some pairs of shape and colours never
occur in the training split, though each of their words does.
"""

from itertools import product

import numpy as np

from .data import ImageDataset

COLORS = {"red": (255, 0, 0), "yellow": (255, 255, 0), "green": (0, 255, 0), "cyan": (0, 255, 255)}
GROUNDS = {"blue": (0, 0, 255), "magenta": (255, 0, 255), "black": (0, 0, 0), "white": (255,) * 3}
SHAPES = ("circle", "square", "triangle")
HELD_OUT_EVERY = 8
GRAIN = 6.0
"""Deviation of the pixel noise, in steps of 0..255: without it densities would be infinite."""


def shape_prompts() -> list[str]:
    """Name every shape in every colour on every ground, 48 prompts."""
    return [
        f"a {color} {shape} on {ground}"
        for shape, color, ground in product(SHAPES, COLORS, GROUNDS)
    ]


def held_out_prompts() -> list[str]:
    """Select the prompts no training picture has: one of eight, spread over all words."""
    prompts = shape_prompts()
    order = np.random.default_rng(0).permutation(len(prompts))
    return [prompts[i] for i in sorted(order[: len(prompts) // HELD_OUT_EVERY])]


def _coverage(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Share of each pixel inside the shape; x and y count pixels from its centre."""
    if shape == "circle":
        distance = np.hypot(x, y) - radius
    elif shape == "square":
        distance = np.maximum(abs(x), abs(y)) - 0.85 * radius
    else:
        sides = (2 * abs(x) - (y + radius)) / 5**0.5
        distance = np.maximum(y - 0.8 * radius, sides)
    return np.clip(0.5 - distance, 0.0, 1.0)


def draw_shapes(prompts: list[str], seed: int, size: int = 16) -> np.ndarray:
    """Draw one picture per prompt.

    Args:
        prompts: Texts as `shape_prompts` makes them.
        seed: Seed of place, size and grain.
        size: Side in pixels.

    Returns:
        uint8 [prompts, size, size, 3].
    """
    rng, count = np.random.default_rng(seed), len(prompts)
    offset = rng.uniform(-0.05, 0.05, (count, 2)) * size
    radius = rng.uniform(0.34, 0.40, count) * size
    pictures = [_picture(*place, size) for place in zip(prompts, offset, radius, strict=True)]
    noisy = np.stack(pictures) + rng.normal(0.0, GRAIN, (count, size, size, 3))
    return noisy.clip(0, 255).round().astype(np.uint8)


def _picture(prompt: str, offset: np.ndarray, radius: float, size: int) -> np.ndarray:
    """Draw one shape without grain: float [size, size, 3] in 0..255."""
    _, color, shape, _, ground = prompt.split()
    line = np.arange(size) + 0.5 - size / 2
    share = _coverage(shape, line[None] - offset[1], line[:, None] - offset[0], radius)[..., None]
    return share * np.array(COLORS[color]) + (1 - share) * np.array(GROUNDS[ground])


def nearest_prompts(pictures: np.ndarray) -> list[str]:
    """Name each picture by the closest clean picture (squared distance of RGB values).

    The gallery holds every prompt at nine places and two sizes.

    Args:
        pictures: uint8 [pictures, size, size, 3].
    """
    size = pictures.shape[1]
    places = list(product((-0.04, 0.0, 0.04), (-0.04, 0.0, 0.04), (0.35, 0.39)))
    gallery = np.stack([
        _picture(prompt, np.array(place[:2]) * size, place[2] * size, size)
        for prompt in shape_prompts()
        for place in places
    ]).reshape(-1, size * size * 3)  # fmt: skip
    flat = pictures.reshape(len(pictures), -1).astype(np.float64)
    distance = (gallery**2).sum(1) - 2 * flat @ gallery.T
    prompts = shape_prompts()
    return [prompts[i // len(places)] for i in distance.argmin(1)]


def shapes(train: int = 3072, held_out: int = 256, seed: int = 0, size: int = 16) -> ImageDataset:
    """Make a data set with the splits "train" and "held_out".

    Args:
        train: Training pictures, prompts taken in turn.
        held_out: Pictures of prompts that training lacks.
        seed: Seed of all pictures.
        size: Side in pixels.
    """
    unseen = held_out_prompts()
    seen = [prompt for prompt in shape_prompts() if prompt not in unseen]
    captions = [seen[i % len(seen)] for i in range(train)]
    captions += [unseen[i % len(unseen)] for i in range(held_out)]
    split = ["train"] * train + ["held_out"] * held_out
    return ImageDataset(draw_shapes(captions, seed + 1, size), captions, split)
