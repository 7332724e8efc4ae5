"""Changes of HumanML3D features: those that keep what a motion shows, and those that spoil it.

The order of the 263 features is told in motion/features.py. It knows nothing of models, and of
texts the words "left" and "right".
"""

import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from ..motion.features import layout_of
from ..motion.skeleton import HUMAN22

JOINTS = len(HUMAN22)
_LAYOUT = layout_of(HUMAN22)
FEATURES = _LAYOUT.size
GROUPS = (
    slice(0, 1), slice(1, 3), slice(3, 4), _LAYOUT.places, _LAYOUT.rotations, _LAYOUT.ways,
)  # fmt: skip
"""Features that share a deviation: turn, way of the root, height, and the body's; no contacts."""
LEFT_RIGHT = ((1, 2), (4, 5), (7, 8), (10, 11), (13, 14), (16, 17), (18, 19), (20, 21))
"""Joints that change places in a mirror."""
SHORTEST = 8
"""Frames of a piece at the least, where the clip has them."""
LONGEST = 100
"""Frames of a piece at the most: long clips would make everything else wait."""
STILL = 0.1
"""Mean speed of the joints, m/s, below which a clip may as well stand still."""
KINDS = ("frozen", "shuffled", "noisy")
SIDES = {"left": "right", "right": "left"}
_TURNED = re.compile(
    r"\b(?:(left|right)(wards?|most)?|((?:counter|anti)[- ]?)?clockwise)\b", re.IGNORECASE
)


@lru_cache(maxsize=1)
def _mirror() -> tuple[Int[Tensor, " features"], Float[Tensor, " features"]]:
    """Return which feature each one comes from, and with which sign, in the mirror x -> -x.

    A rotation R becomes M R M with M = diag(-1, 1, 1): entries with exactly one x change sign. The
    six numbers are the first two columns of R, one after the other.
    """
    joint = torch.arange(JOINTS)
    for left, right in LEFT_RIGHT:
        joint[left], joint[right] = right, left
    source, sign = torch.arange(FEATURES), torch.ones(FEATURES)
    sign[:2] = -1  # the turn about y, and the root's way along x
    flip = torch.tensor([-1.0, 1, 1])
    for place, first, signs in (
        (_LAYOUT.places, 1, flip),
        (_LAYOUT.rotations, 1, torch.cat((-flip, flip))),
        (_LAYOUT.ways, 0, flip),
    ):
        rows = (joint[first:, None] - first) * len(signs) + torch.arange(len(signs))
        source[place] = place.start + rows.flatten()
        sign[place] = signs.repeat(JOINTS - first)
    # Two feet of the left side, then two of the right.
    source[_LAYOUT.contacts] = _LAYOUT.contacts.start + torch.tensor([2, 3, 0, 1])
    return source, sign


def mirrored(features: Float[Tensor, "frames features"]) -> Float[Tensor, "frames features"]:
    """Swap left and right: what is seen in a mirror across the plane x = 0.

    Args:
        features: Raw HumanML3D features [frames, 263].
    """
    source, sign = _mirror()
    return features[:, source.to(features.device)] * sign.to(features)


def mirrored_text(text: str) -> str:
    """Swap the words "left" and "right", and the ways of a clock, whatever their case."""

    def swapped(found: re.Match[str]) -> str:
        side, ending, against = found.groups()
        if side is not None:
            word = SIDES[side.lower()] + (ending or "").lower()
        else:
            word = "counterclockwise" if against is None else "clockwise"
        return word.capitalize() if found.group()[0].isupper() else word

    return _TURNED.sub(swapped, text)


def at_tempo(
    features: Float[Tensor, "frames features"], rate: float
) -> Float[Tensor, "new_frames features"]:
    """Play a motion faster or slower: frames in between are mixed, velocities are scaled.

    Args:
        features: Raw HumanML3D features.
        rate: Frames of the old motion per frame of the new one.
    """
    count = max(1, round(len(features) / rate))
    flat = rearrange(features, "t c -> 1 c t")
    mixed = F.interpolate(flat, size=count, mode="linear", align_corners=True)
    mixed = rearrange(mixed, "1 c t -> t c")
    scale = torch.ones(FEATURES)
    scale[:3] = scale[_LAYOUT.ways] = len(features) / count
    return mixed * scale.to(mixed)


def augmented(
    motions: Sequence[Float[Tensor, "frames features"]],
    texts: Sequence[str],
    std: Float[Tensor, " seen"],
    generator: torch.Generator,
) -> tuple[list[Float[Tensor, "frames features"]], list[str]]:
    """Cut pieces, change their tempo, mirror half of them with their texts, blur some, add noise.

    What is judged later was drawn, not recorded: a little noise must not make a motion a stranger.

    Args:
        motions: Raw HumanML3D features.
        texts: One per motion.
        std: Deviation of the features that get noise, from the first on.
        generator: Source of randomness.
    """
    draws = torch.rand((len(motions), 5), generator=generator).tolist()
    pieces, told = [], []
    for motion, text, (size, place, tempo, side, dirt) in zip(motions, texts, draws, strict=True):
        length = max(min(SHORTEST, len(motion)), round((0.6 + 0.4 * size) * len(motion)))
        length = min(length, LONGEST)
        start = int(place * (len(motion) - length + 1))
        piece = at_tempo(motion[start : start + length], 0.85 + 0.3 * tempo)
        if side < 0.5:
            piece, text = mirrored(piece), mirrored_text(text)
        noise = torch.randn((len(piece), len(std)), generator=generator)
        piece = piece.clone()
        piece[:, : len(std)] += 0.1 * dirt * std * noise
        pieces.append(piece)
        told.append(text)
    return pieces, told


def spoiled(
    motion: Float[Tensor, "frames features"],
    std: Float[Tensor, " seen"],
    generator: torch.Generator,
    fps: float,
) -> Float[Tensor, "frames features"]:
    """Make of a motion what no body does: it stops dead, its frames are shuffled, or it trembles.

    Shown as motions of no text, they keep an encoder from naming single poses. A clip that hardly
    moves is not frozen, since that would change nothing.

    Args:
        motion: Raw HumanML3D features.
        std: Deviation of the features that get noise, from the first on.
        generator: Source of randomness.
        fps: Frames per second.
    """
    draw, place, size = torch.rand(3, generator=generator).tolist()
    ways = motion[:, _LAYOUT.ways].unflatten(1, (-1, 3))
    is_still = float(ways.norm(dim=-1).mean()) * fps < STILL
    kind = KINDS[-1] if is_still else KINDS[int(draw * len(KINDS))]
    if kind == "frozen":
        return frozen(motion, int(place * len(motion)))
    if kind == "shuffled":
        return motion[torch.randperm(len(motion), generator=generator)]
    noise = torch.randn((len(motion), len(std)), generator=generator)
    changed = motion.clone()
    changed[:, : len(std)] += (0.5 + size) * std * noise
    return changed


def frozen(
    motion: Float[Tensor, "frames features"], frame: int
) -> Float[Tensor, "frames features"]:
    """Hold one frame for the length of a motion; nothing turns, goes or moves.

    Args:
        motion: Raw HumanML3D features.
        frame: Number of the frame.
    """
    held = motion[frame].clone()
    held[:3] = 0
    held[_LAYOUT.ways] = 0
    return held.expand(len(motion), -1).clone()
