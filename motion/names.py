"""What joints are called elsewhere: maps from foreign names to the 22 of `human22`.

A map is data, {foreign name: our name}; joints it leaves out have no counterpart. Names count
without the prefix some programs add ("mixamorig:", "Character1_"), in any letter case.

It does not know rotations or clips.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from .skeleton import HUMAN22, Skeleton


def _both(names: Mapping[str, str]) -> dict[str, str]:
    """Write `*` as Left/Right and `#` as left/right, L/l where `?`/`!` stand."""
    result = {}
    for foreign, ours in names.items():
        for side in ("left", "right"):
            long, short = side.capitalize(), side[0]
            name = foreign.replace("*", long).replace("?", short.upper()).replace("!", short)
            result[name] = ours.replace("#", side)
    return result


NAME_MAPS: dict[str, dict[str, str]] = {
    "human22": {name: name for name in HUMAN22.names},
    # CMU in the conversion for MotionBuilder: the chest bone is missing, so spine3 and the collars
    # have no counterpart.
    "cmu_motionbuilder": _both({
        "Hips": "pelvis", "*UpLeg": "#_hip", "*Leg": "#_knee", "*Foot": "#_ankle",
        "*ToeBase": "#_foot", "LHipJoint": "", "RHipJoint": "", "LowerBack": "",
        "Spine": "spine1", "Spine1": "spine2", "Neck": "", "Neck1": "neck", "Head": "head",
        "*Shoulder": "", "*Arm": "#_shoulder", "*ForeArm": "#_elbow", "*Hand": "#_wrist",
    }),
    # CMU in the conversion for 3ds Max, which is Character Studio's set of names.
    "cmu_3dsmax": _both({
        "Hips": "pelvis", "*Hip": "#_hip", "*Knee": "#_knee", "*Ankle": "#_ankle",
        "*Toe": "#_foot", "Chest": "spine1", "Chest2": "spine2", "Chest3": "spine3",
        "Neck": "neck", "Head": "head", "*Collar": "#_collar", "*Shoulder": "#_shoulder",
        "*Elbow": "#_elbow", "*Wrist": "#_wrist",
    }),
    "mixamo": _both({
        "Hips": "pelvis", "*UpLeg": "#_hip", "*Leg": "#_knee", "*Foot": "#_ankle",
        "*ToeBase": "#_foot", "Spine": "spine1", "Spine1": "spine2", "Spine2": "spine3",
        "Neck": "neck", "Head": "head", "*Shoulder": "#_collar", "*Arm": "#_shoulder",
        "*ForeArm": "#_elbow", "*Hand": "#_wrist",
    }),
    # Poser and Daz, which another conversion of CMU uses.
    "daz": _both({
        "hip": "pelvis", "!Thigh": "#_hip", "!Shin": "#_knee", "!Foot": "#_ankle",
        "abdomen": "spine1", "chest": "spine2", "neck": "neck", "head": "head",
        "!Collar": "#_collar", "!Shldr": "#_shoulder", "!ForeArm": "#_elbow", "!Hand": "#_wrist",
    }),
    "smpl": _both({
        "Pelvis": "pelvis", "?_Hip": "#_hip", "?_Knee": "#_knee", "?_Ankle": "#_ankle",
        "?_Foot": "#_foot", "Spine1": "spine1", "Spine2": "spine2", "Spine3": "spine3",
        "Neck": "neck", "Head": "head", "?_Collar": "#_collar", "?_Shoulder": "#_shoulder",
        "?_Elbow": "#_elbow", "?_Wrist": "#_wrist",
    }),
}  # fmt: skip
"""Known naming styles. A name that maps to "" only helps to tell the styles apart."""

_LEAST = 12
"""Joints that must be found before a style counts as recognised."""


def bare(name: str) -> str:
    """Return a joint's name without a program's prefix, in small letters."""
    return re.sub(r"^(.*:|mixamorig\d*_|character\d+_)", "", name.strip(), flags=re.I).lower()


def find_style(names: Iterable[str]) -> str | None:
    """Return the naming style most of whose names are there, or None where none fits."""
    known = {bare(name) for name in names}

    def found(style: str) -> tuple[int, float]:
        styled = {foreign.lower() for foreign in NAME_MAPS[style]}
        hits = len(styled & known)
        return hits, hits / len(styled)

    best = max(NAME_MAPS, key=found)
    return best if found(best)[0] >= _LEAST else None


def guess_map(skeleton: Skeleton) -> dict[str, str]:
    """Return {the skeleton's name: our name} of the style that fits; empty where none does."""
    style = find_style(skeleton.names)
    if style is None:
        return {}
    wanted = {foreign.lower(): ours for foreign, ours in NAME_MAPS[style].items() if ours}
    pairs = {name: wanted[bare(name)] for name in skeleton.names if bare(name) in wanted}
    return {name: ours for name, ours in pairs.items() if list(pairs.values()).count(ours) == 1}


def name_parts(skeleton: Skeleton) -> Skeleton:
    """Return the skeleton with hips, shoulders and feet filled in where its names tell them."""
    ours = {target: name for name, target in guess_map(skeleton).items()}

    def found(key: str) -> tuple[str, ...]:
        given: tuple[str, ...] = getattr(skeleton, key)
        if given:
            return given
        wanted = [ours.get(name) for name in getattr(HUMAN22, key)]
        there = tuple(name for name in wanted if name is not None)
        is_whole = len(there) == len(wanted) or (key == "feet" and len(there) == 2)
        return there if is_whole else ()

    return replace(skeleton, hips=found("hips"), shoulders=found("shoulders"), feet=found("feet"))
