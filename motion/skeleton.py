"""What a body is: named joints, who hangs on whom, bone lengths; and its forward kinematics.

The one convention of rotations in this room: **the rotation of joint j turns the bone that ENDS
at j**. With W the rotations against the rest pose in the world,

    position[j] = position[parent[j]] + W[j] offset[j],    W[j] = W[parent[j]] local[j],

and the root's local rotation is its world rotation. (BVH, glTF and SMPL name a turn after the
joint it happens at, so their turn of a joint is our turn of its children.) Ours is HumanML3D's;
it lets bones that leave one joint turn differently, as measured hips and collars do, and it gives
joints without children, such as wrists, a rotation that is seen.

What it does not know: clips, frames per second, files other than its own plain config.

Invariants: parents stand before their children and joint 0 is the only root.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float
from torch import Tensor

from ..core.errors import DataError, UsageError, check_known_keys, describe, nearest
from .rotations import inverse, multiply, rotate

MAX_JOINTS = 1000
_LISTS = ("hips", "shoulders", "feet", "ends")


@dataclass(frozen=True, eq=False)
class Skeleton:
    """A body at rest: Y up, right-handed, facing +Z with its left side at +X.

    Attributes:
        names: One per joint, all different.
        parents: Index of each joint's parent; -1 for joint 0, the root.
        offsets: float64 [joints, 3], metres from the parent in the rest pose; the root's is its
            place in the rest pose and takes no part in forward kinematics.
        hips: Names of the right and the left joint that turn with the root, or empty. They give
            the heading, and the root's own rotation where only its children's are known.
        shoulders: Names of a right and a left joint that also give the heading, or empty.
        feet: Names of the joints that touch the floor, left side first.
        ends: Names of joints that are only the end of a bone (BVH's End Site): they have no
            children, and writers give them no turn of their own.

    Raises:
        DataError: The parts do not describe one body; the first fault is named.
    """

    names: tuple[str, ...]
    parents: tuple[int, ...]
    offsets: Float[np.ndarray, "joints 3"]
    hips: tuple[str, ...] = ()
    shoulders: tuple[str, ...] = ()
    feet: tuple[str, ...] = ()
    ends: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the parts, copy the offsets and make them read-only."""
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "parents", tuple(int(parent) for parent in self.parents))
        for name in _LISTS:
            object.__setattr__(self, name, tuple(getattr(self, name)))
        _check(self)
        offsets = np.array(self.offsets, dtype=np.float64)
        if offsets.shape != (len(self.names), 3) or not np.isfinite(offsets).all():
            raise DataError(
                f"offsets {list(offsets.shape)} of a skeleton must be finite numbers "
                f"[{len(self.names)}, 3]"
            )
        offsets.flags.writeable = False
        object.__setattr__(self, "offsets", offsets)

    def __len__(self) -> int:
        """Return the number of joints."""
        return len(self.names)

    def __eq__(self, other: object) -> bool:
        """Compare by value."""
        return isinstance(other, Skeleton) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        """Agree with equality."""
        return hash((self.names, self.parents, self.offsets.tobytes()))

    def index(self, name: str) -> int:
        """Return a joint's number.

        Raises:
            UsageError: No joint has this name; the nearest name is given.
        """
        if name not in self.names:
            known = ", ".join(self.names[:30])
            raise UsageError(describe("joint name", name, known, nearest(name, self.names)))
        return self.names.index(name)

    def indices(self, names: Sequence[str]) -> list[int]:
        """Return the numbers of several joints, see `index`."""
        return [self.index(name) for name in names]

    def children(self, joint: int) -> list[int]:
        """Return the joints that hang on one joint, in order."""
        return [child for child, parent in enumerate(self.parents) if parent == joint]

    @cached_property
    def generations(self) -> list[tuple[Tensor, Tensor]]:
        """Joints by their distance from the root, which is left out; each int64 with the parents.

        They live on the CPU.
        """
        depth = [0] * len(self)
        for joint, parent in enumerate(self.parents):
            depth[joint] = 0 if parent < 0 else depth[parent] + 1
        return [
            (torch.tensor(group), torch.tensor([self.parents[joint] for joint in group]))
            for level in range(1, max(depth) + 1)
            if (group := [joint for joint, own in enumerate(depth) if own == level])
        ]

    def generations_on(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `generations` on a device."""
        for joints, parents in self.generations:
            yield joints.to(device), parents.to(device)

    def rest_joints(self) -> Float[np.ndarray, "joints 3"]:
        """Return the places of all joints in the rest pose, float64, metres."""
        places = self.offsets.copy()
        for joint, parent in enumerate(self.parents):
            if parent >= 0:
                places[joint] += places[parent]
        return places

    def with_offsets(self, offsets: Float[np.ndarray, "joints 3"]) -> "Skeleton":
        """Return the same joints with other bones."""
        return Skeleton(self.names, self.parents, offsets, *(getattr(self, k) for k in _LISTS))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data that `skeleton_from_dict` reads back to an equal skeleton."""
        joints = [
            {
                "name": name,
                "parent": None if parent < 0 else self.names[parent],
                "offset": [float(value) for value in offset],
            }
            for name, parent, offset in zip(self.names, self.parents, self.offsets, strict=True)
        ]
        lists = {key: list(getattr(self, key)) for key in _LISTS if getattr(self, key)}
        return {"joints": joints, **lists}


def _check(skeleton: Skeleton) -> None:
    names, parents = skeleton.names, skeleton.parents
    if not names or len(names) != len(parents) or len(names) > MAX_JOINTS:
        raise DataError(
            f"a skeleton has 1 to {MAX_JOINTS} joints with a parent each; "
            f"got {len(names)} names and {len(parents)} parents"
        )
    if len(set(names)) != len(names) or "" in names:
        twice = next(name for name in names if names.count(name) > 1 or not name)
        raise DataError(f"joint name {twice!r} of a skeleton is empty or stands there twice")
    for joint, parent in enumerate(parents):
        if not (-1 <= parent < joint) or (parent == -1) != (joint == 0):
            raise DataError(
                f"parent of joint {names[joint]!r} is number {parent}; joint 0 is the root with "
                f"parent -1, all others hang on a joint before them (0 to {max(joint - 1, 0)})"
            )
    for key in _LISTS:
        listed = getattr(skeleton, key)
        if bad := next((name for name in listed if name not in names), None):
            hint = nearest(bad, names)
            raise DataError(f"{key} of a skeleton names {bad!r}, no joint of it; nearest {hint!r}")
        if key in ("hips", "shoulders") and len(listed) not in (0, 2):
            raise DataError(f"{key} of a skeleton are a right and a left joint; got {list(listed)}")
    for name in skeleton.ends:
        if skeleton.children(names.index(name)):
            raise DataError(f"end {name!r} of a skeleton has joints that hang on it")


def skeleton_from_dict(data: Mapping[str, Any], source: str = "skeleton") -> Skeleton:
    """Build a skeleton from plain config data.

    Args:
        data: `joints`: list of {name, parent, offset}, parents first, parent null for the root;
            and the optional lists `hips`, `shoulders`, `feet`, `ends` of joint names.
        source: Where the data came from, for messages.

    Raises:
        DataError: It does not describe one body.
    """
    try:
        check_known_keys(source, data, ("joints", *_LISTS))
        joints = [dict(joint) for joint in data["joints"]]
        names = [str(joint["name"]) for joint in joints]
        for joint in joints:
            check_known_keys(f"{source} joint", joint, ("name", "parent", "offset"))
        offsets = np.array([joint["offset"] for joint in joints], dtype=np.float64)
        lists = {key: tuple(map(str, data.get(key, ()))) for key in _LISTS}
    except UsageError as error:
        raise DataError(error.message) from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{source}: a skeleton is `joints`, a list of name, parent and offset of three "
            f"numbers ({type(error).__name__}: {error})"
        ) from None
    parents = []
    for number, joint in enumerate(joints):
        parent = joint.get("parent")
        if parent is not None and str(parent) not in names[:number]:
            raise DataError(f"{source}: parent {parent!r} of {names[number]!r} is not before it")
        parents.append(-1 if parent is None else names.index(str(parent)))
    return Skeleton(tuple(names), tuple(parents), offsets, **lists)


def load_skeleton(name: str) -> Skeleton:
    """Load a skeleton that ships with the package, for instance "human22".

    Raises:
        UsageError: No such skeleton; the nearest name is given.
    """
    folder = resources.files("blockloom.configs") / "skeletons"
    known = sorted(item.name.removesuffix(".yaml") for item in folder.iterdir())
    if name not in known:
        raise UsageError(describe("skeleton", name, ", ".join(known), nearest(name, known)))
    text = (folder / f"{name}.yaml").read_text(encoding="utf-8")
    return skeleton_from_dict(yaml.safe_load(text), name)


HUMAN22 = load_skeleton("human22")
"""The 22 joints of SMPL and HumanML3D, with the mean bone lengths of six measured adults."""


def world_rotations(
    skeleton: Skeleton, local: Float[Tensor, "*batch joints 4"]
) -> Float[Tensor, "*batch joints 4"]:
    """Turn parent-relative rotations into rotations against the rest pose in the world."""
    world = local
    for joints, parents in skeleton.generations_on(world.device):
        turned = multiply(world.index_select(-2, parents), local.index_select(-2, joints))
        world = world.index_copy(-2, joints, turned)
    return world


def local_rotations(
    skeleton: Skeleton, world: Float[Tensor, "*batch joints 4"]
) -> Float[Tensor, "*batch joints 4"]:
    """Turn rotations in the world into parent-relative ones; inverse of `world_rotations`."""
    parents = torch.tensor(skeleton.parents[1:], dtype=torch.long, device=world.device)
    local = multiply(inverse(world[..., parents, :]), world[..., 1:, :])
    return torch.cat([world[..., :1, :], local], dim=-2)


def forward_kinematics(
    skeleton: Skeleton,
    rotations: Float[Tensor, "*batch joints 4"],
    root: Float[Tensor, "*batch 3"],
) -> Float[Tensor, "*batch joints 3"]:
    """Place the joints of parent-relative rotations; batched and differentiable.

    Args:
        skeleton: The body, whose bone lengths are kept.
        rotations: Unit quaternions (w, x, y, z); entry j turns the bone that ends at joint j
            against the bone that ends at its parent, entry 0 is the root's in the world.
        root: Place of joint 0, metres.

    Returns:
        Joint places in metres, dtype of the rotations.
    """
    world = world_rotations(skeleton, rotations)
    offsets = torch.as_tensor(skeleton.offsets.copy(), dtype=world.dtype, device=world.device)
    bones = rotate(world, offsets)
    places = torch.cat((root[..., None, :], bones[..., 1:, :]), dim=-2)
    for joints, parents in skeleton.generations_on(world.device):
        placed = places.index_select(-2, parents) + bones.index_select(-2, joints)
        places = places.index_copy(-2, joints, placed)
    return places
