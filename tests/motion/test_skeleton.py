import math

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError, UsageError
from blockloom.motion.rotations import about_axis, identity, multiply, rotate, unit
from blockloom.motion.skeleton import (
    HUMAN22,
    Skeleton,
    forward_kinematics,
    load_skeleton,
    local_rotations,
    skeleton_from_dict,
    world_rotations,
)

CHAIN = {
    "joints": [
        {"name": "root", "parent": None, "offset": [0, 1, 0]},
        {"name": "a", "parent": "root", "offset": [1, 0, 0]},
        {"name": "b", "parent": "a", "offset": [1, 0, 0]},
        {"name": "c", "parent": "root", "offset": [0, 0, 1]},
    ],
    "ends": ["b"],
}


def test_human22_is_the_humanml3d_body() -> None:
    assert HUMAN22.names[:4] == ("pelvis", "left_hip", "right_hip", "spine1")
    assert HUMAN22.parents == (
        -1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19,
    )  # fmt: skip
    assert HUMAN22.indices(HUMAN22.feet) == [7, 10, 8, 11]
    assert HUMAN22.indices(HUMAN22.hips) == [2, 1]
    assert HUMAN22.indices(HUMAN22.shoulders) == [17, 16]
    rest = HUMAN22.rest_joints()
    assert rest[:, 1].min() == pytest.approx(0, abs=1e-9)
    assert rest[HUMAN22.index("left_wrist"), 0] > 0.6 > 0 > rest[HUMAN22.index("right_wrist"), 0]
    mirrored = [HUMAN22.index(name.replace("left", "right")) for name in HUMAN22.names]
    left = [number for number, name in enumerate(HUMAN22.names) if "left" in name]
    flipped = rest[[mirrored[number] for number in left]] * [-1, 1, 1]
    np.testing.assert_allclose(rest[left], flipped, atol=1e-9)
    legs = np.linalg.norm(HUMAN22.offsets[[1, 4, 7, 10]], axis=-1).sum()
    assert legs == pytest.approx(1.13, abs=0.02)


def test_forward_kinematics_turns_the_bone_that_ends_at_a_joint() -> None:
    body = skeleton_from_dict(CHAIN)
    quarter = about_axis("Z", torch.tensor(math.pi / 2, dtype=torch.float64))
    rotations = identity(4, like=quarter).clone()
    rotations[1] = quarter
    root = torch.tensor([5.0, 0, 0], dtype=torch.float64)
    joints = forward_kinematics(body, rotations, root)
    # Joint 1's turn moves joint 1 itself and what hangs on it, not its sibling.
    expected = torch.tensor([[5.0, 0, 0], [5, 1, 0], [5, 2, 0], [5, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(joints, expected, rtol=0, atol=1e-12)
    rotations[2] = quarter
    joints = forward_kinematics(body, rotations, root)
    torch.testing.assert_close(joints[2], expected.new_tensor([4, 1, 0]), rtol=0, atol=1e-12)


def test_rest_pose_and_world_rotations() -> None:
    generator = torch.Generator().manual_seed(0)
    rotations = unit(torch.randn(7, 22, 4, generator=generator, dtype=torch.float64))
    world = world_rotations(HUMAN22, rotations)
    torch.testing.assert_close(local_rotations(HUMAN22, world), rotations, rtol=0, atol=1e-12)
    rest = torch.from_numpy(HUMAN22.rest_joints())
    still = forward_kinematics(HUMAN22, identity(22, like=rest), rest[0])
    torch.testing.assert_close(still, rest, rtol=0, atol=1e-12)


def test_generations_at_once_equal_joint_by_joint() -> None:
    generator = torch.Generator().manual_seed(1)
    rotations = unit(torch.randn(5, 22, 4, generator=generator, dtype=torch.float64))
    root = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    offsets = torch.from_numpy(HUMAN22.offsets.copy())
    world, places = [rotations[:, 0]], [root]
    for joint in range(1, 22):
        parent = HUMAN22.parents[joint]
        world.append(multiply(world[parent], rotations[:, joint]))
        places.append(places[parent] + rotate(world[joint], offsets[joint]))
    for fast, slow in (
        (world_rotations(HUMAN22, rotations), world),
        (forward_kinematics(HUMAN22, rotations, root), places),
    ):
        torch.testing.assert_close(fast, torch.stack(slow, dim=1), rtol=0, atol=1e-14)
    assert sorted(int(joint) for group, _ in HUMAN22.generations for joint in group) == [
        *range(1, 22)
    ]
    alone = skeleton_from_dict({"joints": [{"name": "hips", "parent": None, "offset": [0, 1, 0]}]})
    assert alone.generations == []


def test_batches_equal_singles_and_gradients_flow() -> None:
    generator = torch.Generator().manual_seed(0)
    rotations = unit(torch.randn(2, 3, 22, 4, generator=generator)).requires_grad_()
    root = torch.randn(2, 3, 3, generator=generator)
    joints = forward_kinematics(HUMAN22, rotations, root)
    alone = forward_kinematics(HUMAN22, rotations[1, 2], root[1, 2])
    assert torch.equal(joints[1, 2], alone)
    joints[..., HUMAN22.index("left_wrist"), :].sum().backward()
    moved = rotations.grad.abs().sum(dim=(0, 1, 3)) > 0
    chain = {"pelvis", "spine1", "spine2", "spine3", "left_collar", "left_shoulder",
             "left_elbow", "left_wrist"}  # fmt: skip
    assert {name for name, used in zip(HUMAN22.names, moved, strict=True) if used} == chain


def test_config_round_trip_and_equality() -> None:
    body = skeleton_from_dict(CHAIN)
    again = skeleton_from_dict(body.to_dict())
    assert again == body and hash(again) == hash(body)
    assert body.ends == ("b",) and body.children(0) == [1, 3]
    assert body.with_offsets(body.offsets * 2) != body
    assert load_skeleton("human22") == HUMAN22
    with pytest.raises(ValueError, match="read-only"):
        body.offsets[0] = 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parent": "d"}, "parent 'd' of 'c' is not before it"),
        ({"parent": None}, "joint 0 is the root"),
        ({"name": "root"}, "'root'.*twice"),
        ({"name": ""}, "'' of a skeleton is empty"),
        ({"offset": [1, 2]}, "offset of three numbers"),
        ({"offset": [0, float("nan"), 0]}, "finite"),
        ({"lenght": 1}, "'lenght'"),
    ],
)
def test_broken_configs_say_what_is_wrong(change: dict, message: str) -> None:
    joints = [dict(joint) for joint in CHAIN["joints"]]
    joints[3] |= change
    with pytest.raises(DataError, match=message):
        skeleton_from_dict({"joints": joints})


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"feet": ["d"]}, "feet of a skeleton names 'd'"),
        ({"hips": ["a"]}, "right and a left"),
        ({"ends": ["a"]}, "end 'a'.*hang on it"),
    ],
)
def test_broken_lists_say_what_is_wrong(lists: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        skeleton_from_dict({"joints": CHAIN["joints"], **lists})


def test_no_joints_and_unknown_names() -> None:
    with pytest.raises(DataError, match="1 to 1000 joints"):
        Skeleton((), (), np.zeros((0, 3)))
    with pytest.raises(UsageError, match=r"'left_hipp'.*try 'left_hip'"):
        HUMAN22.index("left_hipp")
    with pytest.raises(UsageError, match=r"'human21'.*try 'human22'"):
        load_skeleton("human21")
