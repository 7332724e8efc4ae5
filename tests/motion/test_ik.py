import numpy as np
import pytest
import torch
from torch import Tensor

from blockloom.motion import ik
from blockloom.motion.clip import distance_mm, motion_world_rotations
from blockloom.motion.procedural import CAPTIONS, procedural_motion
from blockloom.motion.rotations import about_axis, angle_of, inverse, multiply, unit
from blockloom.motion.skeleton import HUMAN22, Skeleton, forward_kinematics, world_rotations


def error_of(skeleton: Skeleton, joints: Tensor, rotations: Tensor) -> tuple[float, float]:
    """Return mean and largest distance that forward kinematics leaves, millimetres."""
    return distance_mm(forward_kinematics(skeleton, rotations, joints[:, 0]), joints)


@pytest.mark.parametrize("caption", CAPTIONS[::4])
def test_forward_kinematics_of_the_result_gives_the_places(caption: str) -> None:
    motion = procedural_motion(caption, torch.Generator().manual_seed(0), 60)
    joints, _ = motion.tensors()
    mean, largest = error_of(HUMAN22, joints, ik.solve(HUMAN22, joints))
    assert 0 <= mean <= largest < 0.01  # millimetres; float32 places


def test_bones_of_other_lengths_point_the_right_way() -> None:
    motion = procedural_motion("a person squats", torch.Generator().manual_seed(0), 30)
    joints, _ = motion.tensors()
    taller = HUMAN22.with_offsets(HUMAN22.offsets * 1.1)
    rotations = ik.solve(taller, joints)
    placed = forward_kinematics(taller, rotations, joints[:, 0])
    for child, parent in ((4, 1), (20, 18), (15, 12)):
        seen, made = joints[:, child] - joints[:, parent], placed[:, child] - placed[:, parent]
        torch.testing.assert_close(unit(made), unit(seen), rtol=0, atol=1e-6)
    assert distance_mm(placed, joints)[1] > 50


def test_pelvis_and_chest_turn_as_they_were_turned() -> None:
    motion = procedural_motion(
        "a person punches with the left hand", torch.Generator().manual_seed(0), 40
    )
    joints, _ = motion.tensors()
    found = world_rotations(HUMAN22, ik.solve(HUMAN22, joints))
    true = motion_world_rotations(motion)
    apart = torch.rad2deg(angle_of(multiply(inverse(true), found)))
    # Several bones leave these, so their twist can be seen from places.
    for name in ("pelvis", "spine3", "left_collar", "right_collar"):
        assert float(apart[:, HUMAN22.index(name)].max()) < 8, name
    assert float(apart[:, HUMAN22.index("spine3")].mean()) < 4


def test_a_reference_gives_the_twist() -> None:
    motion = procedural_motion("a person claps", torch.Generator().manual_seed(0), 40)
    joints, rotations = motion.tensors()
    rough = multiply(rotations, about_axis("X", torch.full((40, 22), 0.05).double()))
    kept = world_rotations(HUMAN22, ik.solve(HUMAN22, joints, reference=rough))
    free = world_rotations(HUMAN22, ik.solve(HUMAN22, joints))
    true = motion_world_rotations(motion)
    wrist = HUMAN22.index("left_elbow")  # rolls about itself, which places do not show
    apart = [
        float(torch.rad2deg(angle_of(multiply(inverse(true), world)))[:, wrist].mean())
        for world in (kept, free)
    ]
    assert apart[0] < 5 < 12 < apart[1]
    assert error_of(HUMAN22, joints, ik.solve(HUMAN22, joints, reference=rotations))[1] < 0.01


def test_no_frame_depends_on_later_ones_and_twist_is_smooth() -> None:
    motion = procedural_motion("a person does jumping jacks", torch.Generator().manual_seed(0), 80)
    joints, _ = motion.tensors()
    whole = ik.solve(HUMAN22, joints)
    assert torch.equal(ik.solve(HUMAN22, joints[:33]), whole[:33])
    world = world_rotations(HUMAN22, whole)
    steps = torch.rad2deg(angle_of(multiply(inverse(world[1:]), world[:-1])))
    true = motion_world_rotations(motion)
    limit = torch.rad2deg(angle_of(multiply(inverse(true[1:]), true[:-1]))).max()
    assert float(steps.max()) < 1.5 * float(limit)


def test_a_bone_that_passes_the_opposite_of_rest_does_not_jump() -> None:
    stick = Skeleton(("a", "b", "c"), (-1, 0, 1), np.array([[0, 0, 0], [1.0, 0, 0], [1.0, 0, 0]]))
    angle = torch.linspace(2.6, 3.7, 45, dtype=torch.float64)
    bone = torch.stack([angle.cos(), angle.sin(), 0.02 * torch.ones_like(angle)], dim=-1)
    first = torch.tensor([1.0, 0, 0], dtype=torch.float64).expand(45, 3)
    joints = torch.stack([torch.zeros(45, 3).double(), first, first + unit(bone)], dim=1)
    rotations = ik.solve(stick, joints)
    steps = torch.rad2deg(angle_of(multiply(inverse(rotations[1:, 2]), rotations[:-1, 2])))
    assert float(steps.max()) < 3  # the bone itself turns 1.4 degrees a frame
    assert error_of(stick, joints, rotations)[1] < 1e-6


def test_single_joints_and_single_bones() -> None:
    point = Skeleton(("a",), (-1,), np.zeros((1, 3)))
    still = ik.solve(point, torch.zeros(3, 1, 3, dtype=torch.float64))
    torch.testing.assert_close(still[:, 0, 0], torch.ones(3, dtype=torch.float64))
