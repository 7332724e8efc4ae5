"""BVH to motions and back: twenty files of different make, and an independent reader.

The files are written here by a writer of their own, with places worked out by plain matrices, so
neither our reader nor our writer is checked against itself alone.
"""

import dataclasses
import logging
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError, UsageError
from blockloom.motion.bvh import parse_bvh
from blockloom.motion.bvh_motion import bvh_to_motion, guess_scale, motion_to_bvh
from blockloom.motion.bvh_write import bvh_text, write_bvh
from blockloom.motion.clip import Motion, fk_error, motion_from_rotations, select_joints
from blockloom.motion.procedural import procedural_motion
from blockloom.motion.rotations import unit
from blockloom.motion.skeleton import HUMAN22, Skeleton

FRAMES = 24
MILLIMETRE = 1e-3

# Name, parent, offset in centimetres; ends follow the last joints.
HUMAN = [
    ("Hips", None, (0, 95, 0)), ("LeftUpLeg", "Hips", (9, -8, 1)),
    ("LeftLeg", "LeftUpLeg", (1, -41, 0)), ("LeftFoot", "LeftLeg", (0, -40, -1)),
    ("LeftToeBase", "LeftFoot", (1, -6, 13)), ("RightUpLeg", "Hips", (-9, -8, 1)),
    ("RightLeg", "RightUpLeg", (-1, -41, 0)), ("RightFoot", "RightLeg", (0, -40, -1)),
    ("RightToeBase", "RightFoot", (-1, -6, 13)), ("Spine", "Hips", (0, 12, -1)),
    ("Spine1", "Spine", (0, 14, 0)), ("Spine2", "Spine1", (0, 14, 1)),
    ("Neck", "Spine2", (0, 16, 0)), ("Head", "Neck", (0, 9, 2)),
    ("LeftShoulder", "Spine2", (4, 10, 0)), ("LeftArm", "LeftShoulder", (13, 1, -1)),
    ("LeftForeArm", "LeftArm", (27, 0, 0)), ("LeftHand", "LeftForeArm", (24, 0, 1)),
    ("RightShoulder", "Spine2", (-4, 10, 0)), ("RightArm", "RightShoulder", (-13, 1, -1)),
    ("RightForeArm", "RightArm", (-27, 0, 0)), ("RightHand", "RightForeArm", (-24, 0, 1)),
]  # fmt: skip
MAX_NAMES = dict(
    zip(
        [name for name, _, _ in HUMAN],
        ["Hips", "LeftHip", "LeftKnee", "LeftAnkle", "LeftToe", "RightHip", "RightKnee",
         "RightAnkle", "RightToe", "Chest", "Chest2", "Chest3", "Neck", "Head", "LeftCollar",
         "LeftShoulder", "LeftElbow", "LeftWrist", "RightCollar", "RightShoulder", "RightElbow",
         "RightWrist"],
        strict=True,
    )
)  # fmt: skip


@dataclass(frozen=True)
class Make:
    """How one program writes BVH.

    Attributes:
        order: Rotation order, of all joints, or cycled through the joints.
        moved: Which joints have position channels: root, all, some, none.
        stretch: How far positions of joints other than the root leave their offsets, centimetres.
        per_cm: Units of the file per centimetre.
        ends: End Sites: all, none, two per last joint.
        number: How a number is written.
    """

    order: tuple[str, ...] = ("ZXY",)
    moved: str = "root"
    stretch: float = 0.0
    per_cm: float = 1.0
    ends: str = "all"
    number: str = "%.6f"
    names: dict[str, str] = field(default_factory=dict)
    prefix: str = ""
    indent: str = "\t"
    eol: str = "\n"
    still: tuple[str, ...] = ()
    positions_last: bool = False
    spine: int = 0
    upper: bool = False
    one_line: bool = False
    frame_time: str = "0.0333333"


TWENTY = {
    "plain": Make(),
    "cmu motionbuilder": Make(("ZYX",), per_cm=0.1772, frame_time=".0083333"),
    "cmu 3ds max": Make(("ZXY",), names=MAX_NAMES, per_cm=0.1772, ends="all"),
    "mixamo": Make(("ZXY",), prefix="mixamorig:", moved="all", number="%.4f"),
    "blender": Make(("XYZ",), moved="all", per_cm=0.01, indent="  ", number="%.8f"),
    "motionbuilder, all move": Make(("ZYX",), moved="all", stretch=1.5),
    "some move": Make(("YXZ",), moved="some", stretch=0.8),
    "no translation at all": Make(("YZX",), moved="none"),
    "positions last": Make(("XZY",), moved="all", positions_last=True),
    "every joint another order": Make(("XYZ", "XZY", "YXZ", "YZX", "ZXY", "ZYX")),
    "one or two axes": Make(("Z", "XY", "ZXY", "YX"), moved="root"),
    "no end sites": Make(ends="none"),
    "two end sites": Make(ends="two"),
    "inches": Make(per_cm=1 / 2.54, number="%.7f"),
    "metres, exponents": Make(per_cm=0.01, number="%.9e"),
    "spaces, windows line ends": Make(indent="    ", eol="\r\n", number="%10.5f"),
    "old mac line ends, big letters": Make(upper=True, eol="\r"),
    "joints without channels": Make(still=("Spine1", "LeftShoulder", "Head")),
    "a spine of forty": Make(spine=40, ends="two"),
    "all on one line, names with spaces": Make(one_line=True, prefix="Bip 01 "),
}


def matrix(axis: str, degrees: np.ndarray) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    zero, one = np.zeros_like(c), np.ones_like(c)
    rows = {
        "X": [[one, zero, zero], [zero, c, -s], [zero, s, c]],
        "Y": [[c, zero, s], [zero, one, zero], [-s, zero, c]],
        "Z": [[c, -s, zero], [s, c, zero], [zero, zero, one]],
    }[axis]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def smooth(rng: np.random.Generator, *shape: int, size: float) -> np.ndarray:
    """Random curves [FRAMES, *shape]."""
    time = np.linspace(0, 2 * np.pi, FRAMES).reshape(-1, *[1] * len(shape))
    phase, speed = rng.uniform(0, 6, shape), rng.uniform(0.3, 1.5, shape)
    return size * np.sin(speed * time + phase)


def write(make: Make, seed: int) -> tuple[str, dict[str, np.ndarray]]:
    """Return a file's text and the joints' places in metres, by name."""
    rng = np.random.default_rng(seed)
    body = list(HUMAN)
    for number in range(make.spine):
        body.append((f"S{number}", "Spine2" if not number else f"S{number - 1}", (0, 1, 0.2)))
    called = {name: make.prefix + make.names.get(name, name) for name, _, _ in body}
    text: list[str] = ["HIERARCHY"]
    columns: list[np.ndarray] = []
    turns: dict[str, np.ndarray] = {}
    places: dict[str, np.ndarray] = {}

    def show(values) -> str:
        return " ".join((make.number % value).strip() for value in values)

    def visit(number: int, depth: int) -> None:
        name, parent, offset = body[number]
        children = [k for k, (_, up, _) in enumerate(body) if up == name]
        pad = make.indent * depth
        order = make.order[number % len(make.order)]
        moves = make.moved == "all" or (make.moved == "some" and number % 3 == 1)
        moves = make.moved != "none" and (moves or parent is None)
        if name in make.still:
            order, moves = "", False
        angles = smooth(rng, len(order), size=170.0 if parent is None else 70.0)
        shift = np.array(offset, dtype=float) * np.ones((FRAMES, 1))
        if moves:
            shift = shift + smooth(rng, 3, size=80.0 if parent is None else make.stretch)
        places_named = ["Xposition", "Yposition", "Zposition"] if moves else []
        turns_named = [f"{axis}rotation" for axis in order]
        both = [(places_named, shift * make.per_cm), (turns_named, angles)]
        both = both[::-1] if make.positions_last else both
        names = [channel for part, _ in both for channel in part]
        columns.extend(values for part, values in both if part)
        if make.upper:
            names = [channel.upper() for channel in names]
        text.append(f"{pad}{'ROOT' if parent is None else 'JOINT'} {called[name]}")
        text.append(f"{pad}{{")
        text.append(f"{pad}{make.indent}OFFSET {show(np.array(offset) * make.per_cm)}")
        if name not in make.still:
            text.append(f"{pad}{make.indent}CHANNELS {len(names)} {' '.join(names)}")
        turn = np.eye(3) * np.ones((FRAMES, 1, 1))
        for axis, values in zip(order, angles.T, strict=True):
            turn = turn @ matrix(axis, values)
        if parent is None:
            turns[name], places[called[name]] = turn, shift / 100
        else:
            turns[name] = turns[parent] @ turn
            bone = np.einsum("fij,fj->fi", turns[parent], shift / 100)
            places[called[name]] = places[called[parent]] + bone
        for child in children:
            visit(child, depth + 1)
        if not children:
            for _ in range({"all": 1, "none": 0, "two": 2}[make.ends]):
                end = f"{pad}{make.indent}"
                tip = show(np.array([1.0, 5, 2]) * make.per_cm)
                text.extend([f"{end}End Site", end + "{", f"{end}{make.indent}OFFSET {tip}"])
                text.append(end + "}")
        text.append(f"{pad}}}")

    visit(0, 0)
    if make.one_line:
        text = [text[0] + " " + " ".join(line.strip() for line in text[1:])]
    rows = np.concatenate(columns, axis=1)
    text += ["MOTION", f"Frames: {FRAMES}", f"Frame Time: {make.frame_time}"]
    text += [show(row) for row in rows]
    return make.eol.join(text) + make.eol, places


@cache
def file_of(kind: str, seed: int) -> tuple[str, dict[str, np.ndarray]]:
    """Return one of the twenty as `write` does, written once; nobody changes it."""
    return write(TWENTY[kind], seed)


def named(motion: Motion) -> dict[str, np.ndarray]:
    return {name: motion.joints[:, k] for k, name in enumerate(motion.skeleton.names)}


def apart(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Largest distance of joints both have, metres."""
    shared = set(first) & set(second)
    assert len(shared) >= 22
    return max(float(np.linalg.norm(first[n] - second[n], axis=-1).max()) for n in shared)


def test_they_are_twenty() -> None:
    assert len({file_of(kind, 0)[0] for kind in TWENTY}) == 20


@pytest.mark.parametrize("kind", TWENTY)
def test_bvh_to_joints_to_bvh_to_joints(kind: str) -> None:
    make = TWENTY[kind]
    text, truth = file_of(kind, list(TWENTY).index(kind))
    # Reading agrees with plain matrices, in the unit the file is in.
    motion = bvh_to_motion(parse_bvh(text), scale=0.01 / make.per_cm)
    assert apart(named(motion), truth) < 0.05 * MILLIMETRE
    assert set(truth) <= set(motion.skeleton.names)
    # And survives our writer, in another order and unit.
    for order, scale in (("ZXY", 0.01), ("XYZ", 1.0)):
        again = bvh_to_motion(parse_bvh(bvh_text(motion_to_bvh(motion, order, scale))), scale)
        assert apart(named(again), named(motion)) < MILLIMETRE
        assert apart(named(again), truth) < MILLIMETRE
        assert abs(again.fps - motion.fps) < 1e-6


@pytest.mark.parametrize("kind", TWENTY)
def test_text_survives_to_five_digits(kind: str) -> None:
    bvh = parse_bvh(file_of(kind, list(TWENTY).index(kind))[0])
    back = parse_bvh(bvh_text(bvh))
    assert [joint.name for joint in back.joints] == [joint.name for joint in bvh.joints]
    assert [joint.channels for joint in back.joints] == [joint.channels for joint in bvh.joints]
    offsets = [np.array([joint.offset for joint in item.joints]) for item in (bvh, back)]
    assert np.abs(offsets[0] - offsets[1]).max() < 1e-5
    assert np.abs(back.values - bvh.values).max() < 1e-5
    assert back.frame_time == pytest.approx(bvh.frame_time, abs=1e-9)


@pytest.mark.parametrize("kind", TWENTY)
def test_units_are_guessed_from_the_body(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    make = TWENTY[kind]
    bvh = parse_bvh(file_of(kind, 0)[0])
    assert guess_scale(bvh)[0] == pytest.approx(0.01 / make.per_cm, rel=1e-3)
    with caplog.at_level(logging.INFO, logger="blockloom.motion.bvh_motion"):
        motion = bvh_to_motion(bvh)
    assert f"BVH units taken as {guess_scale(bvh)[1]}" in caplog.text
    height = motion.skeleton.rest_joints()[:, 1]
    assert 1.4 < height.max() - height.min() < 2.1


def test_a_body_of_no_human_size_is_taken_as_centimetres() -> None:
    bvh = parse_bvh(write(Make(per_cm=40.0), seed=0)[0])
    assert guess_scale(bvh) == (0.01, "centimetres (assumed)")


def test_rotations_keep_bones_stiff_and_stretching_is_told() -> None:
    stiff = bvh_to_motion(parse_bvh(write(TWENTY["plain"], 1)[0]), 0.01)
    assert fk_error(stiff)[1] < 0.01
    text, truth = write(TWENTY["motionbuilder, all move"], 1)
    loose = bvh_to_motion(parse_bvh(text), 0.01)
    assert fk_error(loose)[1] > 5  # the joints are exact all the same
    assert apart(named(loose), truth) < 0.05 * MILLIMETRE
    written = motion_to_bvh(loose)
    assert len(written.joints[1].channels) == 6
    only_root = motion_to_bvh(loose, stretch_mm=1000.0)
    assert {len(joint.channels) for joint in only_root.joints[1:]} == {0, 3}


def test_positions_that_are_all_zero_are_added_to_the_offsets() -> None:
    text, truth = write(Make(moved="all"), 3)
    bvh = parse_bvh(text)
    values = bvh.values.copy()
    for joint, column in list(zip(bvh.joints, bvh.columns(), strict=True))[1:]:
        if joint.channels:
            values[:, column.start : column.start + 3] = 0
    motion = bvh_to_motion(dataclasses.replace(bvh, values=values), 0.01)
    assert apart(named(motion), truth) < 0.05 * MILLIMETRE


def test_end_sites_become_joints_or_not() -> None:
    bvh = parse_bvh(write(TWENTY["two end sites"], 0)[0])
    with_ends, without = bvh_to_motion(bvh, 0.01), bvh_to_motion(bvh, 0.01, keep_ends=False)
    assert with_ends.skeleton.ends[:2] == ("LeftToeBase_end", "LeftToeBase_end2")
    assert len(with_ends.skeleton) == 22 + 10 and len(without.skeleton) == 22
    # The turn of a last joint is that of its end.
    again = motion_to_bvh(with_ends)
    assert sum(joint.is_end for joint in again.joints) == 10
    assert not any("_end" in joint.name for joint in again.joints)


@pytest.mark.parametrize(
    ("written", "fps"),
    [("0.0333333", 30), ("0.0333", 30), ("0.0083333", 120), ("0.05", 20), ("0.0417", 24),
     ("0.041708", 1 / 0.041708), ("0.03", 1 / 0.03), ("1", 1)],
)  # fmt: skip
def test_frames_per_second_are_whole_where_the_digits_allow(written: str, fps: float) -> None:
    bvh = parse_bvh(write(Make(frame_time=written), 0)[0])
    assert bvh_to_motion(bvh, 0.01).fps == pytest.approx(fps, rel=1e-9)


def wild_human() -> Motion:
    """A clip in which bones that leave one joint all turn differently."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(FRAMES + 12, 22, 4, generator=generator, dtype=torch.float64)
    rotations = unit(noise.unfold(0, 12, 1).mean(-1))[:FRAMES]
    root = torch.randn(FRAMES, 3, generator=generator).double()
    return motion_from_rotations(HUMAN22, rotations, root)


def test_bones_that_turn_differently_get_pivots_which_vanish_on_reading() -> None:
    motion = wild_human()
    bvh = motion_to_bvh(motion)
    pivots = [joint.name for joint in bvh.joints if joint.name.endswith("_pivot")]
    assert "spine3_left_collar_pivot" in pivots and "pelvis_left_hip_pivot" in pivots
    back = select_joints(bvh_to_motion(bvh, 0.01, keep_ends=False), HUMAN22.names)
    assert back.skeleton.parents == HUMAN22.parents and back.skeleton.feet == HUMAN22.feet
    np.testing.assert_allclose(back.skeleton.offsets, HUMAN22.offsets, atol=1e-9)
    np.testing.assert_allclose(back.joints, motion.joints, atol=1e-5)
    same = np.abs((back.rotations * motion.rotations).sum(-1))
    np.testing.assert_allclose(same, 1, atol=1e-6)


def test_no_pivots_where_bones_turn_together() -> None:
    walk = procedural_motion("a person walks forward", torch.Generator().manual_seed(0), 40)
    names = [joint.name for joint in motion_to_bvh(walk).joints]
    assert [name for name in names if "pivot" in name] == [
        "pelvis_spine1_pivot", "spine3_left_collar_pivot", "spine3_right_collar_pivot",
    ]  # fmt: skip


def test_channels_do_not_jump() -> None:
    turning = procedural_motion(
        "a person walks in a circle to the left", torch.Generator().manual_seed(0), 200
    )
    bvh = motion_to_bvh(turning)
    yaw = bvh.values[:, 3:6]
    assert np.ptp(yaw, axis=0).max() > 360  # more than a whole turn, without a step back
    assert np.abs(np.diff(bvh.values[:, 3:], axis=0)).max() < 90


def test_the_lock_in_every_joint() -> None:
    quarter = [math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0]  # about X, the middle axis of ZXY
    rotations = np.tile(np.float32(quarter), (3, 22, 1))
    motion = motion_from_rotations(HUMAN22, torch.from_numpy(rotations), torch.zeros(3, 3))
    back = select_joints(bvh_to_motion(motion_to_bvh(motion), 0.01, keep_ends=False), HUMAN22.names)
    np.testing.assert_allclose(back.joints, motion.joints, atol=1e-5)


def test_one_joint_and_one_frame() -> None:
    point = Skeleton(("a",), (-1,), np.array([[0, 1.0, 0]]))
    still = Motion(np.ones((1, 1, 3)), point, rotations=np.float32([[[1, 0, 0, 0]]]))
    back = bvh_to_motion(parse_bvh(bvh_text(motion_to_bvh(still))), 0.01, keep_ends=False)
    np.testing.assert_allclose(back.joints, 1, atol=1e-6)


def test_what_cannot_be_written_is_refused() -> None:
    walk = procedural_motion("a person walks forward", torch.Generator().manual_seed(0), 40)
    with pytest.raises(DataError, match="places only"):
        motion_to_bvh(dataclasses.replace(walk, rotations=None))
    with pytest.raises(UsageError, match="three different axes"):
        motion_to_bvh(walk, "ZXZ")
    with pytest.raises(UsageError, match="scale"):
        motion_to_bvh(walk, scale=0.0)
    with pytest.raises(UsageError, match="scale"):
        bvh_to_motion(motion_to_bvh(walk), scale=-1.0)
    names = ("a\nb", *HUMAN22.names[1:])
    bad = Skeleton(names, HUMAN22.parents, HUMAN22.offsets)
    with pytest.raises(DataError, match="cannot stand in a BVH file"):
        motion_to_bvh(dataclasses.replace(walk, skeleton=bad))


@pytest.mark.filterwarnings("ignore:Importing PyGLM:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", ["walk", "wild", "loose", "forty"])
def test_an_independent_reader_finds_the_joints_where_they_are(kind: str, tmp_path: Path) -> None:
    import bvhio  # from the extra `test`; imported here because its import warns

    if kind == "walk":
        motion = procedural_motion("a person kicks with the left foot", torch.Generator(), 40)
    elif kind == "wild":
        motion = wild_human()
    else:
        make = {"loose": "motionbuilder, all move", "forty": "a spine of forty"}[kind]
        motion = bvh_to_motion(parse_bvh(write(TWENTY[make], 0)[0]), 0.01)
    write_bvh(tmp_path / "a.bvh", motion_to_bvh(motion))
    root = bvhio.readAsHierarchy(str(tmp_path / "a.bvh"))
    layout = {joint.Name: joint for joint, _, _ in root.layout()}
    wanted = [name for name in motion.skeleton.names if name not in motion.skeleton.ends]
    assert set(wanted) <= set(layout)
    for frame in (0, 7, FRAMES - 1):
        root.loadPose(frame)
        for name in wanted:
            place = np.array(layout[name].PositionWorld) * 0.01
            index = motion.skeleton.index(name)
            assert np.abs(place - motion.joints[frame, index]).max() < MILLIMETRE, name


def test_values_of_a_bvh_object_are_untouched() -> None:
    bvh = parse_bvh(write(TWENTY["plain"], 0)[0])
    before = bvh.values.copy()
    bvh_to_motion(bvh)
    bvh_text(bvh)
    np.testing.assert_array_equal(bvh.values, before)
