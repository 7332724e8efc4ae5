import dataclasses

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError, UsageError
from blockloom.motion.clip import Motion, fk_error, motion_from_rotations, motion_world_rotations
from blockloom.motion.names import NAME_MAPS, find_style, guess_map, name_parts
from blockloom.motion.procedural import procedural_motion
from blockloom.motion.retarget import retarget
from blockloom.motion.rotations import about_axis, angle_of, identity, inverse, multiply
from blockloom.motion.skeleton import HUMAN22, Skeleton, local_rotations


@pytest.fixture
def kick() -> Motion:
    return procedural_motion(
        "a person kicks with the left foot", torch.Generator().manual_seed(0), 50
    )


def directions(motion: Motion) -> np.ndarray:
    parents = list(motion.skeleton.parents[1:])
    bones = motion.joints[:, 1:] - motion.joints[:, parents]
    return bones / np.linalg.norm(bones, axis=-1, keepdims=True)


def renamed(motion: Motion, names: dict[str, str]) -> Motion:
    """The same clip with foreign names, {ours: foreign}."""
    old = motion.skeleton
    skeleton = Skeleton(tuple(names[name] for name in old.names), old.parents, old.offsets)
    return dataclasses.replace(motion, skeleton=skeleton)


def test_to_the_same_body_nothing_changes(kick: Motion) -> None:
    same = retarget(kick)
    np.testing.assert_allclose(same.joints, kick.joints, atol=1e-6)
    np.testing.assert_allclose(np.abs((same.rotations * kick.rotations).sum(-1)), 1, atol=1e-6)
    assert same.text == kick.text and same.fps == kick.fps


def test_to_a_child_every_bone_points_the_same_way(kick: Motion) -> None:
    sizes = np.linspace(0.6, 0.8, 22)[:, None]  # not all bones are smaller by the same
    child = HUMAN22.with_offsets(HUMAN22.offsets * sizes)
    small = retarget(kick, child)
    assert fk_error(small)[1] < 0.01
    np.testing.assert_allclose(directions(small), directions(kick), atol=1e-5)
    leg = [*HUMAN22.indices(("left_hip", "left_knee", "left_ankle", "left_foot"))]
    lengths = [np.linalg.norm(body.offsets[leg], axis=-1).sum() for body in (child, HUMAN22)]
    ratio = lengths[0] / lengths[1]
    np.testing.assert_allclose(small.joints[:, 0], kick.joints[:, 0] * ratio, rtol=0.03)
    back = retarget(small)
    np.testing.assert_allclose(back.joints, kick.joints, atol=1e-5)


def test_another_rest_pose_changes_the_rotations_and_not_the_motion(kick: Motion) -> None:
    # The same body described with its arms down, as other programs do.
    turns = identity(22, like=torch.zeros(1, dtype=torch.float64)).clone()
    for name, sign in (("left", -1.0), ("right", 1.0)):
        for joint in ("elbow", "wrist"):
            angle = torch.tensor(sign * 1.5, dtype=torch.float64)
            turns[HUMAN22.index(f"{name}_{joint}")] = about_axis("Z", angle)
    down = motion_from_rotations(HUMAN22, local_rotations(HUMAN22, turns)[None], torch.zeros(1, 3))
    rest = down.joints[0].astype(float)
    offsets = HUMAN22.offsets.copy()
    offsets[1:] = rest[1:] - rest[list(HUMAN22.parents[1:])]
    other = retarget(kick, HUMAN22.with_offsets(offsets))
    np.testing.assert_allclose(other.joints, kick.joints, atol=1e-5)
    elbow = HUMAN22.index("left_elbow")
    assert np.abs((other.rotations * kick.rotations).sum(-1))[:, elbow].max() < 0.9
    np.testing.assert_allclose(retarget(other).joints, kick.joints, atol=1e-5)


def test_a_rest_pose_that_faces_elsewhere_keeps_twist(kick: Motion) -> None:
    quarter = about_axis("Y", torch.tensor(1.5708, dtype=torch.float64))
    offsets = np.stack([HUMAN22.offsets[:, 2], HUMAN22.offsets[:, 1], -HUMAN22.offsets[:, 0]], -1)
    sideways = HUMAN22.with_offsets(offsets)  # faces +X at rest
    other = retarget(kick, sideways)
    np.testing.assert_allclose(other.joints, kick.joints, atol=1e-5)
    back = retarget(other)
    turned = multiply(inverse(motion_world_rotations(back)), motion_world_rotations(kick))
    assert float(torch.rad2deg(angle_of(turned)).max()) < 0.1
    undone = multiply(motion_world_rotations(other), quarter)
    turned = multiply(inverse(undone), motion_world_rotations(kick))
    assert float(torch.rad2deg(angle_of(turned)).max()) < 0.1


@pytest.mark.parametrize("style", ["mixamo", "cmu_3dsmax", "smpl"])
@pytest.mark.parametrize("prefix", ["", "mixamorig:", "Character1_"])
def test_known_styles_are_recognised_by_name(kick: Motion, style: str, prefix: str) -> None:
    names = {ours: prefix + foreign for foreign, ours in NAME_MAPS[style].items()}
    foreign = renamed(kick, names)
    assert find_style(foreign.skeleton.names) == style
    np.testing.assert_allclose(retarget(foreign).joints, kick.joints, atol=1e-5)
    named = name_parts(foreign.skeleton)
    assert named.hips == (names["right_hip"], names["left_hip"])
    assert named.feet == tuple(names[name] for name in HUMAN22.feet)


# Name, parent, and the joint of the 22 at whose place it is; * is Left/Right, # left/right, ! L/R.
CMU = """
Hips - pelvis
!HipJoint Hips pelvis
*UpLeg !HipJoint #_hip
*Leg *UpLeg #_knee
*Foot *Leg #_ankle
*ToeBase *Foot #_foot
LowerBack Hips pelvis
Spine LowerBack spine1
Spine1 Spine spine2
Neck Spine1 spine2
Neck1 Neck neck
Head Neck1 head
*Shoulder Spine1 spine2
*Arm *Shoulder #_shoulder
*ForeArm *Arm #_elbow
*Hand *ForeArm #_wrist
"""


def cmu(kick: Motion) -> Motion:
    """The clip on CMU's MotionBuilder skeleton: no chest bone, joints of length 0 at the hips."""
    tree: list[list[str]] = []
    for line in CMU.split("\n")[1:-1]:
        for side in ("Left", "Right"):
            words = line.replace("*", side).replace("#", side.lower()).replace("!", side[0]).split()
            tree += [words] if words not in tree else []
    names = [name for name, _, _ in tree]
    parents = [-1 if parent == "-" else names.index(parent) for _, parent, _ in tree]
    at = [HUMAN22.index(ours) for _, _, ours in tree]
    offsets = HUMAN22.rest_joints()[at]
    offsets[1:] -= offsets[parents[1:]]
    return Motion(kick.joints[:, at], Skeleton(tuple(names), tuple(parents), offsets))


def test_cmu_without_its_chest_bone(kick: Motion) -> None:
    there = cmu(kick)
    assert find_style(there.skeleton.names) == "cmu_motionbuilder"
    back = retarget(there)  # the rotations come from inverse kinematics
    assert fk_error(back)[1] < 0.01
    for name, limit in (
        ("left_knee", 1e-4), ("right_ankle", 1e-4), ("left_foot", 1e-4), ("spine2", 1e-4),
        ("head", 0.02), ("left_wrist", 0.02), ("right_elbow", 0.02),
    ):  # fmt: skip
        index = HUMAN22.index(name)
        apart = np.linalg.norm(back.joints[:, index] - kick.joints[:, index], axis=-1)
        assert apart.max() < limit, name


def test_a_map_may_leave_joints_out(kick: Motion) -> None:
    names = {name: name for name in HUMAN22.names if "spine" not in name and "collar" not in name}
    part = retarget(kick, names=names)
    assert fk_error(part)[1] < 0.01
    for name in ("left_knee", "right_foot", "left_ankle"):
        index = HUMAN22.index(name)
        np.testing.assert_allclose(part.joints[:, index], kick.joints[:, index], atol=1e-5)
    spine = part.joints[:, HUMAN22.index("neck")] - part.joints[:, 0]
    true = kick.joints[:, HUMAN22.index("neck")] - kick.joints[:, 0]
    cosine = (spine * true).sum(-1) / np.linalg.norm(spine, axis=-1) / np.linalg.norm(true, axis=-1)
    assert np.degrees(np.arccos(cosine.min())) < 0.1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"left_nee": "left_knee"}, "'left_nee' is not in the motion; nearest 'left_knee'"),
        ({"neck": "Left Knee"}, "'Left Knee' is not in the new body; nearest 'left_knee'"),
        ({"neck": "head", "head": "head"}, "'head' of the new body is given twice"),
        ({"neck": "head"}, "no joint is mapped to 'pelvis'"),
    ],
)  # fmt: skip
def test_unknown_joints_are_one_clear_line(kick: Motion, names: dict, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        retarget(kick, names=names)
    assert message in caught.value.message and "\n" not in caught.value.message


def test_unknown_styles_are_refused(kick: Motion) -> None:
    odd = renamed(kick, {name: f"bone{number}" for number, name in enumerate(HUMAN22.names)})
    assert guess_map(odd.skeleton) == {} and find_style(odd.skeleton.names) is None
    with pytest.raises(DataError, match=r"fit no known style .*mixamo"):
        retarget(odd)


def test_all_maps_lead_to_the_22_joints_and_to_each_once() -> None:
    assert {"human22", "cmu_motionbuilder", "cmu_3dsmax", "mixamo"} <= set(NAME_MAPS)
    for style, names in NAME_MAPS.items():
        targets = [ours for ours in names.values() if ours]
        assert set(targets) <= set(HUMAN22.names) and len(set(targets)) == len(targets), style
        assert "pelvis" in targets and len(targets) >= 17, style
