"""Motion files that a tiny text blows up: refused before memory is taken."""

from pathlib import Path

import numpy as np
import pytest

from blockloom.core.errors import DataError
from blockloom.motion.skeleton import HUMAN22
from blockloom.pipelines import motion_media
from blockloom.pipelines.motion_media import MAX_INPUT_FRAMES, read_motion

REST = HUMAN22.rest_joints().astype(np.float32)
CHAIN = 1000


def slow_bvh(frames: int) -> str:
    """A root and one bone that stand for an hour per frame."""
    head = "HIERARCHY\nROOT pelvis\n{\nOFFSET 0 0 0\nCHANNELS 3 Xposition Yposition Zposition\n"
    bone = "JOINT spine1\n{\nOFFSET 0 1 0\n}\n}\n"
    return f"{head}{bone}MOTION\nFrames: {frames}\nFrame Time: 3600\n" + "0 0 0\n" * frames


@pytest.fixture
def never_resampled(monkeypatch: pytest.MonkeyPatch) -> None:
    def resample(*_: object) -> None:
        raise AssertionError("resampled before the check")

    monkeypatch.setattr(motion_media, "resample", resample)


def refused(path: Path) -> str:
    with pytest.raises(DataError) as found:
        read_motion(path)
    assert "\n" not in found.value.message
    return found.value.message


@pytest.mark.usefixtures("never_resampled")
def test_slow_motions_that_would_grow_too_long_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.bvh"
    path.write_text(slow_bvh(40))
    assert refused(path) == (
        "a.bvh is too long; got 40 frames at 0.000277778 fps, 2808001 at 20; allowed 100000"
    )
    path = tmp_path / "a.npz"
    for fps in (1e-3, 1e-300, 5e-324):
        np.savez(path, joints=np.stack([REST] * 6), fps=np.float64(fps))
        assert "a.npz is too long; got 6 frames at" in refused(path), fps
    # A body of many joints may grow less far.
    names = [f"bone{k}" for k in range(CHAIN)]
    places, parents = np.zeros((2, CHAIN, 3), np.float32), np.arange(CHAIN) - 1
    np.savez(path, joints=places, fps=1e-3, names=names, parents=parents)
    assert "2 frames at 0.001 fps, 20001 at 20; allowed 10000" in refused(path)


def test_single_poses_and_slow_motions_of_a_legal_length_are_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", joints=REST[None], fps=1e-6)
    assert len(read_motion(tmp_path / "a.npz")) == 1
    np.savez(tmp_path / "b.npz", joints=np.stack([REST] * 3), fps=0.02)
    assert len(read_motion(tmp_path / "b.npz")) == 2001


def test_names_that_are_not_as_many_as_joints_are_refused(tmp_path: Path) -> None:
    names, parents = [*HUMAN22.names, "tail"], [*HUMAN22.parents, 0]
    joints = np.broadcast_to(REST, (5, 22, 3))
    np.savez(tmp_path / "odd.npz", joints=joints, names=names, parents=parents)
    with pytest.raises(DataError, match="23 names and 23 parents"):
        read_motion(tmp_path / "odd.npz")


def test_the_cap_of_frames_holds_as_it_did(tmp_path: Path) -> None:
    joints = np.broadcast_to(REST, (MAX_INPUT_FRAMES + 1, 22, 3))
    np.savez_compressed(tmp_path / "a.npz", joints=joints)
    message = refused(tmp_path / "a.npz")
    assert message == "a.npz is too long; got 100001 frames; allowed 100000"
