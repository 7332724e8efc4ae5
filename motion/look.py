"""How a figure looks, wherever it is drawn: the side a joint is on, colours, thickness of bones.

It knows skeletons, not motions, files or pictures.
"""

import re
from typing import Literal

import numpy as np

from .skeleton import Skeleton

Side = Literal["left", "right", "middle"]
COLORS: dict[Side, tuple[int, int, int]] = {
    "left": (38, 112, 186), "right": (226, 122, 32), "middle": (74, 82, 96),
}  # fmt: skip
"""sRGB; blue and orange stay apart for colour-blind eyes and in grey."""

_WORDS = re.compile(r"[A-Z](?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+")
_PARTS = (
    "hip thigh upleg femur leg knee shin tibia ankle foot toe toes collar clavicle shoulder arm "
    "humerus elbow forearm radius wrist hand fingers thumb"
).split()
_HEAD_RATIO = 0.07
_LEAST_BONE = 1e-3


def side_of(name: str) -> Side:
    """Tell from its name which side of the body a joint is on.

    Args:
        name: In any of the usual styles: "left_hip", "LeftUpLeg", "lHip", "hip.L", "lfemur".
    """
    sides: dict[str, Side] = {"l": "left", "r": "right"}
    for word in (word.lower() for word in _WORDS.findall(name)):
        for letter, side in sides.items():
            rest = word.removeprefix(letter)
            if word == letter or word.startswith(side):
                return side
            if rest != word and any(rest.startswith(part) for part in _PARTS):
                return side
    return "middle"


def height_of(skeleton: Skeleton) -> float:
    """Measure how tall a skeleton stands at rest, metres (at least 1 cm)."""
    extent = np.ptp(skeleton.rest_joints(), axis=0)
    return max(float(extent[1]), 0.5 * float(extent.max()), 0.01)


def bones_of(skeleton: Skeleton) -> list[tuple[int, int]]:
    """List the bones that have a length, as (parent, child)."""
    lengths = np.linalg.norm(skeleton.offsets, axis=1)
    return [
        (parent, joint)
        for joint, parent in enumerate(skeleton.parents)
        if parent >= 0 and lengths[joint] > _LEAST_BONE
    ]


def bone_radius(skeleton: Skeleton, joint: int, height: float) -> float:
    """Choose how thick the bone that ends at a joint is drawn, metres.

    Args:
        skeleton: The skeleton.
        joint: The joint at the bone's end.
        height: From `height_of`; fingers of a tall figure must not look like arms.
    """
    length = float(np.linalg.norm(skeleton.offsets[joint]))
    is_trunk = side_of(skeleton.names[joint]) == "middle" and length > 0.03 * height
    return min(max(0.16 * length, (0.026 if is_trunk else 0.008) * height), 0.036 * height)


def head_of(skeleton: Skeleton) -> tuple[int, float] | None:
    """Find the head: its joint, and the radius of the ball that continues the bone ending there.

    Returns:
        None for a skeleton without a joint called head, or whose head is not the end of a bone.
    """
    found = [j for j, name in enumerate(skeleton.names) if "head" in name.lower()]
    if not found or found[0] not in {child for _, child in bones_of(skeleton)}:
        return None
    return found[0], _HEAD_RATIO * height_of(skeleton)
