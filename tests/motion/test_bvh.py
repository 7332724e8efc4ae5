"""BVH text to objects and back: what is accepted, what is refused and how."""

from pathlib import Path

import numpy as np
import pytest

from blockloom.core.errors import DataError
from blockloom.motion.bvh import Bvh, BvhJoint, parse_bvh, read_bvh
from blockloom.motion.bvh_write import bvh_text, write_bvh

GOOD = """HIERARCHY
ROOT Hips
{
	OFFSET 0.0 90.0 0.0
	CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation
	JOINT Chest
	{
		OFFSET 0.0 20.5 0.0
		CHANNELS 3 Yrotation Xrotation Zrotation
		End Site
		{
			OFFSET 0.0 30.0 1.0
		}
	}
	JOINT Tail
	{
		OFFSET 0.0 -1.0 -10.0
		CHANNELS 1 Xrotation
	}
}
MOTION
Frames: 2
Frame Time: 0.05
0 90 0 1 2 3 4 5 6 7
1e1 9.1E+1 -.5 10 20 30 -40 50 60 70
"""
JOINTS = (
    BvhJoint("Hips", -1, (0.0, 90.0, 0.0), ("Xposition", "Yposition", "Zposition", "Zrotation",
                                      "Xrotation", "Yrotation")),
    BvhJoint("Chest", 0, (0.0, 20.5, 0.0), ("Yrotation", "Xrotation", "Zrotation")),
    BvhJoint("", 1, (0.0, 30.0, 1.0), (), is_end=True),
    BvhJoint("Tail", 0, (0.0, -1.0, -10.0), ("Xrotation",)),
)  # fmt: skip
VALUES = [[0, 90, 0, 1, 2, 3, 4, 5, 6, 7], [10, 91, -0.5, 10, 20, 30, -40, 50, 60, 70]]


def check_good(bvh: Bvh) -> None:
    assert bvh.joints == JOINTS and bvh.frame_time == 0.05
    np.testing.assert_array_equal(bvh.values, VALUES)


def test_a_file_is_read_as_it_is() -> None:
    bvh = parse_bvh(GOOD)
    check_good(bvh)
    assert bvh.columns() == [slice(0, 6), slice(6, 9), slice(9, 9), slice(9, 10)]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: "\n\n " + text.replace("\t", "   ").replace("\n", "\n\n"),
        lambda text: text.replace(" ", "\t"),
        lambda text: text.replace("\n{", " {").replace("\n\t{", " {").replace("\n\t\t{", "{"),
        lambda text: text.lower().replace("hips", "Hips").replace("chest", "Chest")
        .replace("tail", "Tail"),
        lambda text: text.replace("\n", " ").replace("MOTION ", "\nMOTION\n")
        .replace(" Frame Time", "\nFrame Time").replace("0.05 ", "0.05\n").replace(" 1e1", "\n1e1"),
        lambda text: text.replace("Frames:", "Frames").replace("Frame Time:", "FrameTime :"),
        lambda text: text.replace("Frames: 2\nFrame Time: 0.05", "Frame Time: 0.05\nFrames: 2"),
        lambda text: text.rstrip("\n"),
    ],
)  # fmt: skip
def test_other_programs_spell_it_differently(change) -> None:
    check_good(parse_bvh(change(GOOD)))


@pytest.mark.parametrize("name", ["mixamorig:Left Arm", "Bip01 L Thigh", "hüfte", "a-b_c.01"])
def test_names_keep_spaces_colons_and_letters(name: str) -> None:
    bvh = parse_bvh(GOOD.replace("Chest", name))
    assert bvh.joints[1].name == name
    assert parse_bvh(bvh_text(bvh)).joints[1].name == name


def test_a_joint_may_have_no_channels_or_six_in_any_order() -> None:
    without = parse_bvh(
        GOOD.replace("CHANNELS 1 Xrotation", "").replace("6 7\n", "6\n").replace("60 70", "60")
    )
    assert without.joints[3].channels == () and without.values.shape == (2, 9)
    six = "CHANNELS 6 Zrotation Yposition Xrotation Xposition Yrotation Zposition"
    mixed = parse_bvh(
        GOOD.replace("CHANNELS 1 Xrotation", six).replace("6 7\n", "6 7 1 2 3 4 5\n")
        .replace("60 70", "60 70 1 2 3 4 5")
    )  # fmt: skip
    assert mixed.joints[3].channels[:2] == ("Zrotation", "Yposition")
    assert mixed.values.shape == (2, 15)


def test_text_to_object_to_text() -> None:
    once = bvh_text(parse_bvh(GOOD))
    assert bvh_text(parse_bvh(once)) == once
    generator = np.random.default_rng(0)
    wild = Bvh(JOINTS, generator.normal(size=(50, 10)) * 100, 1 / 120)
    back = parse_bvh(bvh_text(wild))
    assert back.joints == wild.joints
    assert abs(back.frame_time - wild.frame_time) < 1e-9
    assert np.abs(back.values - wild.values).max() < 1e-5


def test_files_are_written_whole_and_read_back(tmp_path: Path) -> None:
    place = tmp_path / "walk.bvh"
    write_bvh(place, parse_bvh(GOOD))
    check_good(read_bvh(place))
    assert [path.name for path in tmp_path.iterdir()] == ["walk.bvh"]
    place.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())  # a byte order mark
    check_good(read_bvh(place))
    place.write_bytes(GOOD.replace("Chest", "hüfte").encode("latin-1"))
    assert read_bvh(place).joints[1].name == "hüfte"


BROKEN = {
    "no hierarchy": ("HIERARCHY\n", "", "starts with HIERARCHY; this one with 'ROOT Hips'"),
    "empty": (GOOD, "  \n", "the file is empty"),
    "no root": (GOOD[10 : GOOD.index("MOTION")], "", "the hierarchy has no ROOT"),
    "brace missing": ("\t}\n\tJOINT Tail", "\tJOINT Tail", "1 '{' still open at MOTION"),
    "brace too many": ("}\nMOTION", "}\n}\nMOTION", "line 21: '}' closes nothing"),
    "no brace": ("Chest\n\t{", "Chest\n", "line 8: '{' must follow JOINT Chest; found 'OFFSET"),
    "brace alone": ("\t\tEnd Site\n", "", "line 10: '{' without ROOT, JOINT or End Site"),
    "count too high": ("CHANNELS 1 X", "CHANNELS 2 X", "'Tail' announces 2 channels and names 1"),
    "count too low": ("CHANNELS 3 Y", "CHANNELS 2 Y", "'Chest' announces 2 channels and names 3"),
    "count no number": ("CHANNELS 3 Y", "CHANNELS Y", "CHANNELS needs a count first; got 'Yrot"),
    "unknown channel": ("1 Xrotation", "1 Xrotaton", "unknown channel 'Xrotaton' of 'Tail'; nearest"
                        " Xrotation"),
    "position twice": ("6 Xposition Y", "6 Yposition Y", "'Hips' has a position channel twice"),
    "unknown word": ("OFFSET 0.0 20.5", "OFSET 0.0 20.5", "unknown word 'OFSET'; nearest OFFSET"),
    "offset short": ("OFFSET 0.0 20.5 0.0", "OFFSET 0.0 20.5", "OFFSET needs three numbers; got"),
    "offset no number": ("OFFSET 0.0 20.5", "OFFSET nan 20.5", "'nan' is no finite number"),
    "offset missing": ("\t\tOFFSET 0.0 20.5 0.0\n", "", "'Chest' has no OFFSET"),
    "offset of an end": ("\t\t\tOFFSET 0.0 30.0 1.0\n", "", "End Site of 'Chest' has no OFFSET"),
    "offset twice": ("\t\tOFFSET 0.0 -1.0 -10.0", "\t\tOFFSET 0 0 0\n\t\tOFFSET 0 0 0",
                     "'Tail' has two OFFSETs"),
    "two roots": ("JOINT Tail", "ROOT Tail", "line 15: a second ROOT, 'Tail'"),
    "two bodies": ("}\nMOTION", "}\nROOT B\n{\nOFFSET 0 0 0\n}\nMOTION", "line 21: a second ROOT"),
    "no name": ("JOINT Tail", "JOINT", "line 15: JOINT without a name"),
    "names twice": ("JOINT Tail", "JOINT Chest", "line 15: joint name 'Chest' stands there twice"),
    "child of an end": ("OFFSET 0.0 30.0 1.0", "OFFSET 0 0 0\nJOINT x\n{\nOFFSET 0 0 0\n}",
                        "an End Site has no joints"),
    "no motion": ("MOTION\n", "", "line 21: 'Frames:' without the line MOTION before it"),
    "cut in hierarchy": (GOOD[150:], "", "still open at the end of the file"),
    "cut after hierarchy": (GOOD[GOOD.index("MOTION") :], "", "no MOTION part"),
    "cut in a row": ("60 70\n", "", "frame 1 has 8 numbers; the hierarchy has 10 channels"),
    "row too long": ("5 6 7\n", "5 6 7 8\n", "line 24: frame 0 has 11 numbers"),
    "no frames line": ("Frames: 2\n", "", "'Frames:' must follow MOTION"),
    "no frame time": ("Frame Time: 0.05\n", "", "'Frame Time:' must follow MOTION"),
    "zero frames": ("Frames: 2", "Frames: 0", "line 22: Frames is '0'; needed 1 or more"),
    "frames no number": ("Frames: 2", "Frames: two", "Frames is 'two'"),
    "frame time zero": ("0.05", "0.0", "line 23: Frame Time is '0.0'; needed seconds"),
    "frame time negative": ("0.05", "-0.05", "Frame Time is '-0.05'"),
    "frame time nan": ("0.05", "nan", "Frame Time is 'nan'"),
    "too many announced": ("Frames: 2", "Frames: 3", "announces 3 frames but holds 2"),
    "too few announced": ("Frames: 2", "Frames: 1", "announces 1 frames but holds 2"),
    "huge count": ("Frames: 2", "Frames: " + "9" * 50, "frames but holds 2"),
    "word in a row": ("-40", "fast", "line 25: number 7 of frame 1 is 'fast', no finite number"),
    "nan in a row": ("-40", "NaN", "number 7 of frame 1 is 'NaN'"),
    "inf in a row": ("-40", "inf", "number 7 of frame 1 is 'inf'"),
    "comma decimals": ("-40", "-40,5", "number 7 of frame 1 is '-40,5'"),
    "absurdly large": ("-40", "1e308", "frame 1 is '1e308', no finite number up to 1e9"),
    "underscore": ("-40", "-4_0", "number 7 of frame 1 is '-4_0'"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_say_what_and_where_in_one_line(kind: str) -> None:
    old, new, message = BROKEN[kind]
    broken = GOOD.replace(old, new, 1)
    assert broken != GOOD
    with pytest.raises(DataError) as caught:
        parse_bvh(broken, "walk.bvh")
    text = caught.value.message
    assert message in text and text.startswith("walk.bvh") and "\n" not in text


def test_no_channels_at_all() -> None:
    lines = [line for line in GOOD.splitlines() if "CHANNELS" not in line]
    with pytest.raises(DataError, match="no joint has CHANNELS"):
        parse_bvh("\n".join(lines))


def test_absurd_depth_and_number_of_joints_end_quickly() -> None:
    deep = "HIERARCHY\nROOT r\n{\nOFFSET 0 0 0\n" + "".join(
        f"JOINT j{number}\n{{\nOFFSET 0 0 0\n" for number in range(1000)
    )
    with pytest.raises(DataError, match="nested deeper than 200"):
        parse_bvh(deep)
    wide = "HIERARCHY\nROOT r\n{\nOFFSET 0 0 0\n" + "".join(
        f"JOINT j{number}\n{{\nOFFSET 0 0 0\n}}\n" for number in range(5000)
    )
    with pytest.raises(DataError, match="more than 1000 joints"):
        parse_bvh(wide)


def test_what_is_no_text_file_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "walk.bvh"
    place.write_bytes(b"Kaydara FBX Binary  \x00\x1a\x00")
    with pytest.raises(DataError, match=r"walk.bvh: not a BVH file, it holds binary data"):
        read_bvh(place)
    with pytest.raises(DataError, match=r"gone.bvh: cannot be read"):
        read_bvh(tmp_path / "gone.bvh")
    with pytest.raises(DataError, match="cannot be read"):
        read_bvh(tmp_path)
    place.write_bytes(b"")
    with pytest.raises(DataError, match="empty"):
        read_bvh(place)
