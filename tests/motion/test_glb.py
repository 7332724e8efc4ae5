"""GLB files: what a reader finds in them is the motion, whichever way a node is reached."""

import json
import math
import struct
import sys

import numpy as np
import pygltflib
import pytest
import torch

from blockloom.core.errors import DataError, UsageError
from blockloom.motion.clip import Motion, motion_from_rotations
from blockloom.motion.glb import EXTRAS_KEY, encode_glb
from blockloom.motion.look import bones_of, head_of, side_of
from blockloom.motion.skeleton import HUMAN22, Skeleton


def dance(frames=7, skeleton=HUMAN22, fps=20.0, seed=0):
    """Turn every bone at random while the root walks."""
    generator = torch.Generator().manual_seed(seed)
    turns = torch.randn(frames, len(skeleton), 4, generator=generator, dtype=torch.float64)
    turns = turns / turns.norm(dim=-1, keepdim=True)
    root = torch.randn(frames, 3, generator=generator, dtype=torch.float64).cumsum(0)
    return motion_from_rotations(skeleton, turns, root, fps, "dance")


def column(document, number):
    """Read an accessor as an array [count, parts]."""
    accessor = document.accessors[number]
    view = document.bufferViews[accessor.bufferView]
    kind = {5126: "<f4", 5123: "<u2"}[accessor.componentType]
    parts = {"SCALAR": 1, "VEC3": 3, "VEC4": 4}[accessor.type]
    start = (view.byteOffset or 0) + (accessor.byteOffset or 0)
    count = accessor.count * parts
    values = np.frombuffer(document.binary_blob(), kind, count, start).reshape(-1, parts)
    assert values.nbytes == view.byteLength
    assert np.array_equal(values.min(0), np.array(accessor.min, kind))
    assert np.array_equal(values.max(0), np.array(accessor.max, kind))
    return values


def matrix(translation, rotation, scale):
    """Build the 4 x 4 matrix of a node, as the glTF specification says: T R S."""
    x, y, z, w = rotation
    turn = np.array([
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ])  # fmt: skip
    result = np.eye(4)
    result[:3, :3] = turn * np.array(scale)
    result[:3, 3] = translation
    return result


def played(document, frame):
    """Return the world matrix of every node at a frame, from the animation alone."""
    channels = {}
    for channel in document.animations[0].channels:
        sampler = document.animations[0].samplers[channel.sampler]
        assert sampler.interpolation == "LINEAR"
        channels[channel.target.node, channel.target.path] = column(document, sampler.output)
    world, nodes = {}, document.nodes

    def visit(number, above):
        node = nodes[number]
        parts = {"translation": [0.0] * 3, "rotation": [0.0, 0.0, 0.0, 1.0], "scale": [1.0] * 3}
        for name in parts:
            parts[name] = getattr(node, name) or parts[name]
            if (number, name) in channels:
                parts[name] = channels[number, name][frame]
        world[number] = above @ matrix(*parts.values())
        for child in node.children or ():
            assert child not in world
            visit(child, world[number])

    for number in document.scenes[document.scene].nodes:
        visit(number, np.eye(4))
    assert len(world) == len(nodes)
    return world


def read(content):
    return pygltflib.GLTF2.load_from_bytes(content)


def test_playing_the_file_puts_every_joint_where_the_motion_has_it():
    motion = dance()
    document = read(encode_glb(motion, {"seed": 3}))
    names = {node.name: number for number, node in enumerate(document.nodes) if node.name}
    for frame in range(len(motion)):
        world = played(document, frame)
        places = [world[names[name]][:3, 3] for name in HUMAN22.names]
        assert np.abs(places - motion.joints[frame]).max() < 1e-5
    # Bones are as long as the skeleton's, and end at their joint.
    for parent, joint in bones_of(HUMAN22):
        turning = document.nodes[names[f"{HUMAN22.names[joint]} bone"]]
        shape = next(n for n in turning.children if document.nodes[n].mesh is not None)
        tip = world[shape] @ [0, 1, 0, 1]
        assert np.abs(tip[:3] - motion.joints[-1, joint]).max() < 1e-5
        assert np.abs(world[shape][:3, 3] - motion.joints[-1, parent]).max() < 1e-5


def test_rotations_are_the_motions_and_do_not_flip():
    motion = dance(frames=12)
    flipped = motion.rotations * np.where(np.arange(12) % 2, -1, 1)[:, None, None]
    motion = Motion(motion.joints, HUMAN22, 20.0, flipped)
    document = read(encode_glb(motion))
    animation = document.animations[0]
    assert len(animation.channels) == 23  # the root's way and 22 rotations
    for joint, channel in enumerate(animation.channels[1:]):
        turns = column(document, animation.samplers[channel.sampler].output)
        assert np.abs(np.linalg.norm(turns, axis=1) - 1).max() < 1e-6
        assert ((turns[1:] * turns[:-1]).sum(1) >= 0).all()
        same = (turns[:, [3, 0, 1, 2]] * motion.rotations[:, joint]).sum(1)
        assert np.abs(np.abs(same) - 1).max() < 1e-6
    times = column(document, animation.samplers[0].input)[:, 0]
    assert np.array_equal(times, (np.arange(12) / 20).astype(np.float32))
    slow = read(encode_glb(dance(frames=3, fps=12.5)))
    assert column(slow, slow.animations[0].samplers[0].input)[-1, 0] == np.float32(2 / 12.5)


def test_meshes_are_closed_to_the_eye_and_coloured_by_side():
    document = read(encode_glb(dance()))
    for mesh in document.meshes:
        for primitive in mesh.primitives:
            places = column(document, primitive.attributes.POSITION)
            normals = column(document, primitive.attributes.NORMAL)
            corners = column(document, primitive.indices)[:, 0].reshape(-1, 3)
            assert corners.max() < len(places) and len(places) == len(normals)
            assert np.abs(np.linalg.norm(normals, axis=1) - 1).max() < 1e-6
            a, b, c = (places[corners[:, k]] for k in range(3))
            facing = np.cross(b - a, c - a)
            solid = np.linalg.norm(facing, axis=1) > 1e-9
            # Counter-clockwise from outside: triangles face where their normals point.
            assert ((facing * normals[corners[:, 0]]).sum(1)[solid] > 0).all()
    named = {mesh.name for mesh in document.meshes}
    assert {"bone_left", "bone_right", "bone_middle", "ball_middle", "floor"} <= named
    colors = {m.name: m.pbrMetallicRoughness.baseColorFactor for m in document.materials}
    assert colors["left"][2] > colors["left"][0] and colors["right"][0] > colors["right"][2]
    assert "floor" not in {m.name for m in read(encode_glb(dance(), floor=False)).meshes}


def test_the_floor_lies_under_the_whole_path():
    motion = dance(frames=40)
    document = read(encode_glb(motion))
    (floor,) = (mesh for mesh in document.meshes if mesh.name == "floor")
    tiles = [column(document, part.attributes.POSITION) for part in floor.primitives]
    places = np.concatenate(tiles)
    low, high = motion.joints.min((0, 1)), motion.joints.max((0, 1))
    assert (places[:, [0, 2]].min(0) <= low[[0, 2]]).all()
    assert (places[:, [0, 2]].max(0) >= high[[0, 2]]).all()
    assert np.allclose(places[:, 1], low[1])
    far = motion.joints * np.float32([1000, 1, 1000])
    wide = read(encode_glb(Motion(far, HUMAN22, 20.0, motion.rotations)))
    assert sum(p.count for p in wide.accessors if p.type == "VEC3") < 5000


def test_the_record_stands_in_the_file_and_equal_motions_give_equal_bytes():
    record = {"prompt": "ein Mann läuft", "seed": 3, "versions": {"torch": "2.11"}}
    content = encode_glb(dance(), record)
    assert content == encode_glb(dance(), record) != encode_glb(dance(seed=1), record)
    magic, version, length = struct.unpack_from("<4sII", content)
    assert (magic, version, length) == (b"glTF", 2, len(content))
    size = struct.unpack_from("<I", content, 12)[0]
    document = json.loads(content[20 : 20 + size])
    assert document["asset"]["extras"] == {EXTRAS_KEY: record}
    assert "uri" not in document["buffers"][0]
    assert not read(encode_glb(dance())).asset.extras


def test_single_frames_and_bodies_of_any_shape():
    arm = Skeleton(
        ("base", "tip", "zero"), (-1, 0, 1), np.array([[0, 9, 0], [0, -1, 0], [0, 0, 0]])
    )
    motion = dance(frames=1, skeleton=arm)
    document = read(encode_glb(motion))
    world = played(document, 0)
    assert np.abs(world[1][:3, 3] - motion.joints[0, 1]).max() < 1e-5
    assert [node.name for node in document.nodes[:3]] == ["base", "tip", "zero"]
    assert head_of(arm) is None and bones_of(arm) == [(0, 1)]


def test_what_cannot_be_written_is_refused_in_one_line(monkeypatch):
    places = Motion(dance().joints, HUMAN22)
    with pytest.raises(DataError, match="places only"):
        encode_glb(places)
    monkeypatch.setitem(sys.modules, "pygltflib", None)
    with pytest.raises(UsageError, match=r"pip install 'blockloom\[motion\]'") as found:
        encode_glb(dance())
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("left_hip", "left"), ("RightUpLeg", "right"), ("lHip", "left"), ("R_Foot", "right"),
        ("hip.L", "left"), ("Bip01 R Thigh", "right"), ("lfemur", "left"), ("rwrist", "right"),
        ("mixamorig:LeftArm", "left"), ("spine1", "middle"), ("LowerBack", "middle"),
        ("root", "middle"), ("neck", "middle"), ("Leg", "middle"), ("RThumb", "right"),
    ],
)  # fmt: skip
def test_sides_are_read_from_names(name, side):
    assert side_of(name) == side


def test_heads_continue_the_neck():
    joint, radius = head_of(HUMAN22)
    assert HUMAN22.names[joint] == "head" and 0.05 < radius < 0.2
    assert math.isclose(radius, head_of(HUMAN22.with_offsets(HUMAN22.offsets * 2))[1] / 2)
