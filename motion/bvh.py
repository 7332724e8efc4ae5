"""BVH files as they are: the joints with their channels, and one row of numbers per frame.

Accepted: any rotation order and any set of channels per joint (none too, and positions on any
joint), any number of End Sites per joint or none, names with spaces and colons, any spacing, line
ends and letter case, exponents, a whole hierarchy on one line. Refused, each with one line that
says where: everything that leaves open what the file means.

It does not know metres, rotations or skeletons; `bvh_motion.py` does.

Invariants: `parse_bvh(bvh_text(b))` equals b up to the six decimals written; a `Bvh` has one ROOT,
parents before children, and finite numbers.

Source: the format as described by Meredith and Maddock, "Motion Capture File Formats Explained"
(Sheffield, 2001), which is all the standard there is.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from jaxtyping import Float64

from ..core.errors import DataError, nearest

POSITIONS = ("Xposition", "Yposition", "Zposition")
ROTATIONS = ("Xrotation", "Yrotation", "Zrotation")
CHANNELS = {name.lower(): name for name in POSITIONS + ROTATIONS}
MAX_JOINTS = 1000
MAX_DEPTH = 200
MAX_BYTES = 256 * 2**20
MAX_NUMBER = 1e9


@dataclass(frozen=True)
class BvhJoint:
    """One ROOT, JOINT or End Site.

    Attributes:
        name: As written; "" for an End Site.
        parent: Index of the joint it hangs on, -1 for the ROOT.
        offset: Place in the parent in the rest pose, in the file's unit.
        channels: Names of its numbers in every row, in order, for instance "Zrotation".
        is_end: Whether it is an End Site.
    """

    name: str
    parent: int
    offset: tuple[float, float, float]
    channels: tuple[str, ...] = ()
    is_end: bool = False


@dataclass(frozen=True, eq=False)
class Bvh:
    """What a BVH file says.

    Attributes:
        joints: ROOT first, in the order of the file.
        values: float64 [frames, channels of all joints].
        frame_time: Seconds per frame.
    """

    joints: tuple[BvhJoint, ...]
    values: Float64[np.ndarray, "frames channels"]
    frame_time: float

    def columns(self) -> list[slice]:
        """Return where each joint's numbers lie in a row."""
        ends = np.cumsum([0, *(len(joint.channels) for joint in self.joints)]).tolist()
        return [slice(start, stop) for start, stop in pairwise(ends)]


def read_bvh(path: str | Path) -> Bvh:
    """Read a BVH file.

    Raises:
        DataError: Not there, no BVH, or broken; the line names the file and the place.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path.name}: {size} bytes; a BVH file has at most {MAX_BYTES}")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read ({error.strerror})") from None
    if b"\0" in data:
        raise DataError(f"{path.name}: not a BVH file, it holds binary data; BVH is plain text")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("latin-1")  # older programs write names in their own 8-bit alphabet
    return parse_bvh(text, path.name)


def parse_bvh(text: str, source: str = "BVH") -> Bvh:
    """Read the text of a BVH file.

    Args:
        text: The whole file.
        source: Name of the file, for messages.

    Raises:
        DataError: It is no BVH file or a broken one; the first fault is named.
    """
    lines = text.splitlines()
    first = next((number for number, line in enumerate(lines) if line.strip()), None)
    if first is None:
        raise DataError(f"{source}: the file is empty")
    if lines[first].split()[0].upper() != "HIERARCHY":
        shown = lines[first].strip()[:40]
        raise DataError(f"{source}: a BVH file starts with HIERARCHY; this one with {shown!r}")
    motion = next((n for n, line in enumerate(lines) if line.strip().upper() == "MOTION"), None)
    reader = _Hierarchy(source)
    for number, piece in _pieces(lines[first : motion if motion is not None else len(lines)]):
        reader.take(number + first, piece)
    joints = reader.finish(motion)
    if motion is None:
        raise DataError(f"{source}: no MOTION part; the file ends after the hierarchy")
    total = sum(len(joint.channels) for joint in joints)
    count, frame_time, start = _header(lines, motion, source)
    return Bvh(joints, _rows(lines, start, count, total, source), frame_time)


def _pieces(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield (line, text) with braces as pieces of their own, the word HIERARCHY left out."""
    for number, line in enumerate(lines):
        if number == 0:
            line = re.sub(r"^\s*hierarchy", "", line, flags=re.IGNORECASE)
        for piece in re.split(r"([{}])", line):
            if piece.strip():
                yield number, piece.strip()


class _Hierarchy:
    """Reads the hierarchy piece by piece; holds the joints so far and the open braces."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.joints: list[BvhJoint] = []
        self.has_offset: list[bool] = []
        self.open: list[int] = []
        self.waiting: str | None = None  # a joint was named and its "{" has not come yet
        self.line = 0

    def fault(self, what: str) -> DataError:
        return DataError(f"{self.source} line {self.line + 1}: {what}")

    def take(self, line: int, piece: str) -> None:
        """Read one piece: a brace, or words up to the next brace or line end."""
        self.line = line
        if piece == "{":
            if self.waiting is None:
                raise self.fault("'{' without ROOT, JOINT or End Site before it")
            self.open.append(len(self.joints) - 1)
            self.waiting = None
            if len(self.open) > MAX_DEPTH:
                raise self.fault(f"joints nested deeper than {MAX_DEPTH}")
        elif self.waiting is not None:
            raise self.fault(f"'{{' must follow {self.waiting}; found {piece[:40]!r}")
        elif piece == "}":
            if not self.open:
                raise self.fault("'}' closes nothing: braces are unbalanced")
            joint = self.open.pop()
            if not self.has_offset[joint]:
                raise self.fault(f"{self.called(joint)} has no OFFSET")
        else:
            while piece:
                piece = self.words(piece)

    def words(self, piece: str) -> str:
        """Read one statement and return what stands behind it."""
        word, rest = _split(piece)
        key = word.upper()
        if key in ("ROOT", "JOINT"):
            self.declare(key, rest)
            return ""
        if key == "END":
            self.declare("END", "")
            return ""
        if not self.open and key.startswith("FRAME"):
            raise self.fault(f"{word[:40]!r} without the line MOTION before it")
        if not self.open:
            raise self.fault(f"unknown word {word[:40]!r} outside all joints")
        if key == "OFFSET":
            return self.offset(rest)
        if key == "CHANNELS":
            return self.channels(rest)
        hint = nearest(word, ("ROOT", "JOINT", "End Site", "OFFSET", "CHANNELS"))
        raise self.fault(f"unknown word {word[:40]!r}" + (f"; nearest {hint}" if hint else ""))

    def declare(self, key: str, name: str) -> None:
        if key == "ROOT" and self.joints:
            raise self.fault(f"a second ROOT, {name[:60]!r}; one body per file can be read")
        if key != "ROOT" and not self.open:
            raise self.fault(f"{key} stands outside the ROOT's braces")
        if key != "END" and not name:
            raise self.fault(f"{key} without a name")
        if self.open and self.joints[self.open[-1]].is_end:
            raise self.fault("an End Site has no joints of its own")
        if name and any(joint.name == name for joint in self.joints):
            raise self.fault(f"joint name {name[:60]!r} stands there twice")
        if len(self.joints) >= MAX_JOINTS:
            raise self.fault(f"more than {MAX_JOINTS} joints")
        parent = self.open[-1] if self.open else -1
        self.joints.append(BvhJoint(name, parent, (0.0, 0.0, 0.0), (), key == "END"))
        self.has_offset.append(False)
        self.waiting = f"{key} {name}".strip() if key != "END" else "End Site"

    def offset(self, rest: str) -> str:
        joint, tokens = self.open[-1], rest.split()
        if self.has_offset[joint]:
            raise self.fault(f"{self.called(joint)} has two OFFSETs")
        if len(tokens) < 3:
            raise self.fault(f"OFFSET needs three numbers; got {rest[:40]!r}")
        numbers = [_number(token) for token in tokens[:3]]
        if bad := next((t for t, n in zip(tokens, numbers, strict=False) if n is None), None):
            raise self.fault(
                f"OFFSET of {self.called(joint)}: {bad[:40]!r} is no finite number up to 1e9"
            )
        x, y, z = (float(number or 0) for number in numbers)
        old = self.joints[joint]
        self.joints[joint] = BvhJoint(old.name, old.parent, (x, y, z), old.channels, old.is_end)
        self.has_offset[joint] = True
        return " ".join(tokens[3:])

    def channels(self, rest: str) -> str:
        joint, tokens = self.open[-1], rest.split()
        old = self.joints[joint]
        if old.is_end or old.channels:
            raise self.fault(f"{self.called(joint)} cannot have these CHANNELS: it is an End Site "
                             "or has some already")  # fmt: skip
        if not tokens or not tokens[0].isdecimal():
            raise self.fault(f"CHANNELS needs a count first; got {rest[:40]!r}")
        count = int(tokens[0][:6])
        names = [CHANNELS.get(token.lower()) for token in tokens[1 : 1 + count]]
        if None in names:
            bad = tokens[1 + names.index(None)]
            raise self.fault(
                f"unknown channel {bad[:40]!r} of {self.called(joint)}; "
                f"nearest {nearest(bad, CHANNELS.values()) or 'Xrotation'}"
            )
        more = len(tokens) - 1 if _names_channel(tokens[1 + count : 2 + count]) else len(names)
        if more != count or count > 6:
            raise self.fault(
                f"{self.called(joint)} announces {tokens[0][:20]} channels and names {more}; "
                "0 to 6 are possible"
            )
        found = tuple(name for name in names if name)
        if any(found.count(name) > 1 for name in POSITIONS):
            raise self.fault(f"{self.called(joint)} has a position channel twice")
        self.joints[joint] = BvhJoint(old.name, old.parent, old.offset, found)
        return " ".join(tokens[1 + count :])

    def called(self, joint: int) -> str:
        """Name a joint for a message."""
        item = self.joints[joint]
        return (
            f"the End Site of {self.joints[item.parent].name!r}"
            if item.is_end
            else repr(item.name[:60])
        )

    def finish(self, motion: int | None) -> tuple[BvhJoint, ...]:
        """Check that everything is closed."""
        place = "the end of the file" if motion is None else "MOTION"
        if self.open or self.waiting is not None:
            left = len(self.open) + (self.waiting is not None)
            raise DataError(
                f"{self.source}: {left} '{{' still open at {place}: braces are unbalanced or the "
                "file is cut off"
            )
        if not self.joints:
            raise DataError(f"{self.source}: the hierarchy has no ROOT")
        if not any(joint.channels for joint in self.joints):
            raise DataError(f"{self.source}: no joint has CHANNELS, so nothing can move")
        return tuple(self.joints)


def _split(piece: str) -> tuple[str, str]:
    parts = piece.split(None, 1)
    return parts[0], parts[1].strip() if len(parts) > 1 else ""


def _names_channel(tokens: list[str]) -> bool:
    return bool(tokens) and tokens[0].lower() in CHANNELS


def _number(token: str) -> float | None:
    """Return a number that is finite and no larger than any body, or None."""
    try:
        value = float(token)
    except ValueError:
        return None
    return value if abs(value) <= MAX_NUMBER and "_" not in token else None


def _header(lines: list[str], motion: int, source: str) -> tuple[int, float, int]:
    """Read `Frames:` and `Frame Time:`; return count, seconds and the first row's line."""
    found: dict[str, tuple[str, int]] = {}
    number = motion + 1
    patterns = {"Frame Time": r"\s*frame\s*time\s*:?(.*)", "Frames": r"\s*frames\s*:?(.*)"}
    while number < len(lines) and len(found) < 2:
        for key, pattern in patterns.items():
            match = re.fullmatch(pattern, lines[number], flags=re.IGNORECASE)
            if match and key not in found:
                found[key] = (match[1].strip(), number)
                break
        else:
            if lines[number].strip():
                break
        number += 1
    for key in ("Frames", "Frame Time"):
        if key not in found:
            raise DataError(f"{source} line {number + 1}: '{key}:' must follow MOTION")
    count, seconds = found["Frames"][0], _number(found["Frame Time"][0])
    if not count.isdecimal() or int(count[:20]) < 1:
        at = found["Frames"][1] + 1
        raise DataError(f"{source} line {at}: Frames is {count[:40]!r}; needed 1 or more")
    if seconds is None or not 1e-4 <= seconds <= 3600:
        at, shown = found["Frame Time"][1] + 1, found["Frame Time"][0][:40]
        raise DataError(
            f"{source} line {at}: Frame Time is {shown!r}; needed seconds, 0.0001 to 3600"
        )
    return int(count[:20]), seconds, number


def _rows(
    lines: list[str], start: int, count: int, total: int, source: str
) -> Float64[np.ndarray, "frames channels"]:
    """Read the rows of numbers."""
    body = [(number, line) for number, line in enumerate(lines[start:], start) if line.strip()]
    for frame, (number, line) in enumerate(body[:count]):
        found = len(line.split())
        if found != total:
            raise DataError(
                f"{source} line {number + 1}: frame {frame} has {found} numbers; the hierarchy "
                f"has {total} channels"
            )
    if len(body) != count:
        raise DataError(
            f"{source}: announces {count} frames but holds {len(body)}; the count is wrong or "
            "the file is cut off"
        )
    try:
        values = np.loadtxt([line for _, line in body], dtype=np.float64, ndmin=2, comments=None)
        is_bad = not (np.abs(values) <= MAX_NUMBER).all()
    except ValueError:
        is_bad = True
    if is_bad:
        for frame, (number, line) in enumerate(body):
            for column, token in enumerate(line.split()):
                if _number(token) is None:
                    raise DataError(
                        f"{source} line {number + 1}: number {column + 1} of frame {frame} is "
                        f"{token[:40]!r}, no finite number up to 1e9"
                    )
        raise DataError(f"{source}: the rows hold something that is no number")
    return values
