"""New motions from parts of others: the legs of one, the back of a second, arms of two more.

A small set shows few poses; bodies whose parts move independently show many. What such a body does
makes no sense as a whole, so this is for tokenizers, which look at what can be seen, and not for
models of what people do. The order of the 263 features is told in motion/features.py.
"""

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import DataError, check_count
from ..motion.features import HUMAN_SIZE, layout_of
from ..motion.skeleton import HUMAN22
from .clips import ClipDataset

_LAYOUT = layout_of(HUMAN22)


def _behind(*names: str) -> list[int]:
    """Return joints and all that hang on them."""
    found = set(HUMAN22.indices(names))
    for joint, parent in enumerate(HUMAN22.parents):
        if parent in found:
            found.add(joint)
    return sorted(found)


PARTS: tuple[tuple[list[int], int], ...] = (
    (_behind("spine1"), 0),
    (_behind("left_collar"), HUMAN22.index("spine3")),
    (_behind("right_collar"), HUMAN22.index("spine3")),
)
"""Joints that are taken from another motion, and the joint they are moved along with; in order."""
SHORTEST = 8
"""Frames of a mixed motion at the least."""


def replace_part(
    features: Float[Tensor, "frames features"],
    other: Float[Tensor, "frames features"],
    joints: list[int],
    anchor: int,
) -> Float[Tensor, "frames features"]:
    """Give some joints the pose they have in another motion, hung where they hung before.

    Args:
        features: The 263 features of a motion.
        other: Those of another, as long.
        joints: Joints that are replaced, none of them the root.
        anchor: Joint that keeps its place; places and ways of the others are taken relative to it.

    Returns:
        New features. Turn, way and height of the root and the contacts stay.
    """
    mixed = features.clone()
    own, given = (_places(rows) for rows in (features, other))
    mixed_places = own.clone()
    mixed_places[:, joints] = own[:, anchor, None] + given[:, joints] - given[:, anchor, None]
    mixed[:, _LAYOUT.places] = mixed_places[:, 1:].flatten(1)
    own, given = (rows[:, _LAYOUT.ways].unflatten(1, (-1, 3)) for rows in (features, other))
    ways = own.clone()
    ways[:, joints] = own[:, anchor, None] + given[:, joints] - given[:, anchor, None]
    mixed[:, _LAYOUT.ways] = ways.flatten(1)
    turns = mixed[:, _LAYOUT.rotations].unflatten(1, (-1, 6))
    rows = [joint - 1 for joint in joints]
    turns[:, rows] = other[:, _LAYOUT.rotations].unflatten(1, (-1, 6))[:, rows]
    return mixed


def _places(features: Float[Tensor, "frames features"]) -> Float[Tensor, "frames joints 3"]:
    """Return the places of all joints, the root's among them."""
    root = torch.zeros_like(features[:, :3])
    root[:, 1] = features[:, 3]
    return torch.cat((root[:, None], features[:, _LAYOUT.places].unflatten(1, (-1, 3))), dim=1)


def with_mixtures(dataset: ClipDataset, copies: int, generator: torch.Generator) -> ClipDataset:
    """Add mixed motions to clips: legs and way come from one clip, the other parts from others.

    Args:
        dataset: Clips of the 263 features.
        copies: Mixed motions per clip.
        generator: CPU generator of which clips are mixed and where they start.

    Raises:
        UsageError: Fewer than one copy.
        DataError: Other features.
    """
    check_count("copies", copies)
    if dataset.num_features != HUMAN_SIZE:
        raise DataError(
            f"frames have {dataset.num_features} features; only the {HUMAN_SIZE} of the 22 joints "
            "can be mixed"
        )
    rows: list[NDArray[np.float32]] = [dataset.frames.astype(np.float32, copy=False)]
    for clip in list(range(len(dataset))) * copies:
        mixed = torch.from_numpy(dataset.clip(clip))
        for joints, anchor in PARTS:
            mixed = _mixed(mixed, dataset, joints, anchor, generator)
        rows.append(mixed.numpy())
    ends = np.cumsum([len(part) for part in rows[1:]]) + len(dataset.frames)
    offsets = np.concatenate([dataset.offsets, ends]).astype(np.int64)
    texts = (dataset.captions * (1 + copies), dataset.split * (1 + copies))
    return ClipDataset(np.concatenate(rows), offsets, *texts, dataset.fps)


def _mixed(
    features: Tensor, dataset: ClipDataset, joints: list[int], anchor: int,
    generator: torch.Generator,
) -> Tensor:  # fmt: skip
    draw, place = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
    other = torch.from_numpy(dataset.clip(int(draw * len(dataset))))
    # A shorter partner shortens the motion, but not to nothing.
    length = min(len(features), max(len(other), min(SHORTEST, len(features))))
    if len(other) < length:
        return features
    start = int(place * (len(other) - length + 1))
    return replace_part(features[:length], other[start : start + length], joints, anchor)
