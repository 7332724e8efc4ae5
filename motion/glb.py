"""Motion into GLB: a figure of simple meshes that plays in any glTF viewer.

A glTF node turns what hangs on it, a `Motion` turns the bone that ends at a joint. So every bone is
a node of its own at the joint where it begins, with the joint's rotation, and the joint is a node
at the bone's end: "left_knee bone" turns, "left_knee" is where the knee is. The root has both in
one node, and a translation channel. It knows no files: bytes come out.

Invariants: rotations of bone nodes are those of the motion; equal motions and records give equal
bytes.

Source: Khronos Group, glTF 2.0 specification, sections 3.6 (accessors), 3.11 (animations) and 4.4
(GLB). Differs: bones are not skinned, so that a viewer without skins shows them.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import UsageError
from .clip import Motion, known_rotations
from .look import COLORS, Side, bone_radius, bones_of, head_of, height_of, side_of
from .rotations import align_signs
from .skeleton import Skeleton

EXTRAS_KEY = "blockloom"
_FLOAT, _SHORT = 5126, 5123
_VERTICES, _INDICES = 34962, 34963
_TILE = 0.5
_MAX_TILES = 24
_FLOOR = {"floor": (226, 229, 234), "floor_dark": (205, 210, 218)}
# Along a bone of length 1: how far, and how thick (1 = the bone's radius).
_PROFILE = ((0.0, 0.45), (0.10, 0.85), (0.28, 1.0), (0.65, 0.8), (0.92, 0.55), (1.0, 0.4))


def import_pygltflib() -> Any:
    """Import pygltflib.

    Raises:
        UsageError: It is not installed; the message names the extra that brings it.
    """
    try:
        import pygltflib
    except ImportError as error:
        raise UsageError("GLB files need pygltflib; try pip install 'blockloom[motion]'") from error
    return pygltflib


def encode_glb(
    motion: Motion, record: Mapping[str, Any] | None = None, *, floor: bool = True
) -> bytes:
    """Turn a motion into the bytes of a GLB file.

    Args:
        motion: With rotations, at least one frame.
        record: Plain JSON values that go into `asset.extras`; None = none.
        floor: Lay tiles under the whole path, by which viewers frame all of it.

    Returns:
        One self-contained file: linear interpolation, frame k at k / fps seconds.

    Raises:
        UsageError: pygltflib is not installed.
        DataError: A motion without rotations.
    """
    library = import_pygltflib()
    rotations = _checked_rotations(motion)
    root = motion.joints[:, 0].astype(np.float32)
    scene = _Scene(library)
    turning = _add_figure(scene, motion.skeleton, rotations, root)
    if floor:
        _add_floor(scene, motion.joints)
    _add_animation(scene, turning, motion.fps, rotations, root)
    asset = library.Asset(generator="blockloom", version="2.0")
    if record is not None:
        asset.extras = {EXTRAS_KEY: dict(record)}
    return scene.encode(asset)


def _checked_rotations(motion: Motion) -> NDArray[np.float32]:
    """Return unit rotations [frames, joints, 4] in glTF's order x, y, z, w, without sign flips."""
    # Neighbours on opposite sides of the sphere would make some viewers turn the long way round.
    turned = align_signs(known_rotations(motion))
    return turned[..., [1, 2, 3, 0]].numpy().astype(np.float32)


class _Scene:
    """A glTF document under construction: one buffer, and what points into it."""

    def __init__(self, library: Any) -> None:
        self.library, self.document = library, library.GLTF2()
        self._bytes = bytearray()
        self._materials: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, int, int]] = {}
        self._meshes: dict[tuple[str, Side], int] = {}

    def node(self, **settings: Any) -> int:
        """Add a node and return its number."""
        self.document.nodes.append(self.library.Node(**settings))
        return len(self.document.nodes) - 1

    def accessor(self, values: NDArray[Any], kind: str, target: int | None = None) -> int:
        """Append an array [count, parts] or [count] to the buffer and return its accessor."""
        library, values = self.library, np.ascontiguousarray(values)
        table = values.reshape(len(values), -1)
        view = library.BufferView(
            buffer=0, byteOffset=len(self._bytes), byteLength=values.nbytes, target=target
        )
        self.document.bufferViews.append(view)
        self.document.accessors.append(
            library.Accessor(
                bufferView=len(self.document.bufferViews) - 1, count=len(values), type=kind,
                componentType=_SHORT if values.dtype == np.uint16 else _FLOAT,
                min=table.min(0).tolist(), max=table.max(0).tolist(),
            )
        )  # fmt: skip
        self._bytes += values.tobytes() + b"\0" * (-values.nbytes % 4)
        return len(self.document.accessors) - 1

    def material(self, name: str, color: tuple[int, int, int]) -> int:
        """Add a matt material once; glTF wants linear light where colours are sRGB."""
        if name not in self._materials:
            linear = [_linear(part / 255) for part in color]
            shine = self.library.PbrMetallicRoughness(
                baseColorFactor=[*linear, 1.0], metallicFactor=0.0, roughnessFactor=0.75
            )
            self.document.materials.append(
                self.library.Material(name=name, pbrMetallicRoughness=shine, alphaCutoff=None)
            )
            self._materials[name] = len(self.document.materials) - 1
        return self._materials[name]

    def primitive(self, shape: tuple[int, int, int], material: int) -> Any:
        """Join places, normals and triangles with a material."""
        attributes = self.library.Attributes(POSITION=shape[0], NORMAL=shape[1])
        return self.library.Primitive(attributes=attributes, indices=shape[2], material=material)

    def surface(
        self, places: NDArray[Any], normals: NDArray[Any], triangles: NDArray[Any]
    ) -> tuple[int, int, int]:
        """Add places and normals [points, 3] and triangles [count, 3]."""
        return (
            self.accessor(places.astype(np.float32), "VEC3", _VERTICES),
            self.accessor(normals.astype(np.float32), "VEC3", _VERTICES),
            self.accessor(triangles.astype(np.uint16).reshape(-1), "SCALAR", _INDICES),
        )

    def mesh(self, shape: str, side: Side) -> int:
        """Return a bone or ball in the colour of a side; all of them share their points."""
        if (shape, side) not in self._meshes:
            if shape not in self._shapes:
                self._shapes[shape] = self.surface(*(_lathe() if shape == "bone" else _ball()))
            color = self.material(side, COLORS[side])
            primitive = self.primitive(self._shapes[shape], color)
            self.document.meshes.append(
                self.library.Mesh(name=f"{shape}_{side}", primitives=[primitive])
            )
            self._meshes[shape, side] = len(self.document.meshes) - 1
        return self._meshes[shape, side]

    def encode(self, asset: Any) -> bytes:
        """Close the document."""
        library, document = self.library, self.document
        tops = set(range(len(document.nodes)))
        tops -= {child for node in document.nodes for child in node.children or ()}
        document.scenes = [library.Scene(nodes=sorted(tops))]
        document.scene, document.asset = 0, asset
        document.buffers = [library.Buffer(byteLength=len(self._bytes))]
        document.set_binary_blob(bytes(self._bytes))
        return b"".join(document.save_to_bytes())


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4


def _add_figure(
    scene: _Scene, skeleton: Skeleton, rotations: NDArray[np.float32], root: NDArray[np.float32]
) -> list[int]:
    """Add joints, bones and the meshes that hang on them; return the node that turns each joint."""
    height, shown = height_of(skeleton), {joint for _, joint in bones_of(skeleton)}
    first = rotations[0].tolist()
    for joint, name in enumerate(skeleton.names):
        place = root[0] if joint == 0 else skeleton.offsets[joint]
        scene.node(name=name, translation=[float(x) for x in place], children=[])
    nodes, turning = scene.document.nodes, [0]
    nodes[0].rotation = first[0]
    for joint, parent in enumerate(skeleton.parents[1:], 1):
        name, side = skeleton.names[joint], side_of(skeleton.names[joint])
        bone = scene.node(name=f"{name} bone", rotation=first[joint], children=[joint])
        nodes[parent].children.append(bone)
        turning.append(bone)
        if joint not in shown:
            continue
        radius, offset = bone_radius(skeleton, joint, height), skeleton.offsets[joint]
        length = float(np.linalg.norm(offset))
        shape = {"rotation": _turn_up_to(offset / length), "scale": [radius, length, radius]}
        nodes[bone].children.append(scene.node(mesh=scene.mesh("bone", side), **shape))
        ball = scene.node(mesh=scene.mesh("ball", side), scale=[0.75 * radius] * 3)
        nodes[joint].children.append(ball)
    if (head := head_of(skeleton)) is not None:
        joint, radius = head
        up = skeleton.offsets[joint] / np.linalg.norm(skeleton.offsets[joint])
        shape = {
            "translation": (radius * up).tolist(),
            "scale": [0.9 * radius, radius, 0.9 * radius],
        }
        nodes[joint].children.append(scene.node(mesh=scene.mesh("ball", "middle"), **shape))
    for node in nodes:
        node.children = node.children or None  # an empty list is not legal
    return turning


def _turn_up_to(direction: NDArray[np.float64]) -> list[float]:
    """Return the shortest rotation (x, y, z, w) that turns +Y to a unit direction."""
    x, y, z = direction
    if y < -1 + 1e-9:
        return [1.0, 0.0, 0.0, 0.0]
    turn = np.array([z, 0.0, -x, 1.0 + y])
    return [float(part) for part in turn / np.linalg.norm(turn)]


def _lathe(sides: int = 10) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Make a bone from (0, 0, 0) to (0, 1, 0) of radius 1, open at the ends, where balls sit."""
    angles = np.arange(sides) * (2 * math.pi / sides)
    ring = np.stack([np.cos(angles), np.zeros(sides), np.sin(angles)], axis=1)
    along, thick = np.array(_PROFILE).T
    places = ring * thick[:, None, None] + np.array([0.0, 1.0, 0.0]) * along[:, None, None]
    slopes = -np.gradient(thick, along)
    normals = ring + np.array([0.0, 1.0, 0.0]) * slopes[:, None, None]
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    return places.reshape(-1, 3), normals.reshape(-1, 3), _bands(len(along), sides)


def _ball(rings: int = 9, sides: int = 12) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Make a ball of radius 1 around the origin."""
    down = np.linspace(0, math.pi, rings)
    around = np.arange(sides) * (2 * math.pi / sides)
    places = np.stack(
        [
            np.outer(np.sin(down), np.cos(around)),
            -np.outer(np.cos(down), np.ones(sides)),
            np.outer(np.sin(down), np.sin(around)),
        ],
        axis=-1,
    ).reshape(-1, 3)
    return places, places, _bands(rings, sides)


def _bands(rings: int, sides: int) -> NDArray[np.int64]:
    """Cut the bands between rings into triangles that face outward, [count, 3]."""
    low = (np.arange(rings - 1) * sides)[:, None] + np.arange(sides)
    near = (np.arange(rings - 1) * sides)[:, None] + (np.arange(sides) + 1) % sides
    corners = np.stack([low, low + sides, near, near, low + sides, near + sides], axis=-1)
    return corners.reshape(-1, 3)


def _add_floor(scene: _Scene, joints: NDArray[np.float32]) -> None:
    """Add tiles of two greys under the path, with a rim."""
    ground = joints[..., [0, 2]].reshape(-1, 2).astype(np.float64)
    low, high = ground.min(0) - _TILE, ground.max(0) + _TILE
    tile = _TILE * 2 ** max(0, math.ceil(math.log2((high - low).max() / _TILE / _MAX_TILES)))
    first, last = np.floor(low / tile).astype(int), np.ceil(high / tile).astype(int)
    height = float(joints[..., 1].min())
    primitives = []
    for number, (name, color) in enumerate(_FLOOR.items()):
        corners = [
            (x + i, z + j)
            for x in range(first[0], last[0])
            for z in range(first[1], last[1])
            if (x + z) % 2 == number
            for i, j in ((0, 0), (0, 1), (1, 0), (1, 1))
        ]
        if not corners:
            continue
        flat = np.array(corners, dtype=np.float64) * tile
        places = np.stack([flat[:, 0], np.full(len(flat), height), flat[:, 1]], axis=1)
        normals = np.tile([0.0, 1.0, 0.0], (len(flat), 1))
        triangles = (
            np.array([[0, 1, 2], [2, 1, 3]])[None] + 4 * np.arange(len(flat) // 4)[:, None, None]
        )
        shape = scene.surface(places, normals, triangles)
        primitives.append(scene.primitive(shape, scene.material(name, color)))
    scene.document.meshes.append(scene.library.Mesh(name="floor", primitives=primitives))
    scene.node(name="floor", mesh=len(scene.document.meshes) - 1)


def _add_animation(
    scene: _Scene, turning: list[int], fps: float, rotations: NDArray[np.float32],
    root: NDArray[np.float32],
) -> None:  # fmt: skip
    """Add one animation: the root's way and every joint's rotation."""
    library, animation = scene.library, scene.library.Animation(name="motion")
    seconds = np.arange(len(root), dtype=np.float64) / fps
    times = scene.accessor(seconds.astype(np.float32), "SCALAR")

    def channel(node: int, path: str, values: NDArray[np.float32], kind: str) -> None:
        sampler = library.AnimationSampler(
            input=times, output=scene.accessor(values, kind), interpolation="LINEAR"
        )
        animation.samplers.append(sampler)
        target = library.AnimationChannelTarget(node=node, path=path)
        number = len(animation.samplers) - 1
        animation.channels.append(library.AnimationChannel(sampler=number, target=target))

    channel(turning[0], "translation", root, "VEC3")
    for joint, node in enumerate(turning):
        channel(node, "rotation", rotations[:, joint], "VEC4")
    scene.document.animations = [animation]
