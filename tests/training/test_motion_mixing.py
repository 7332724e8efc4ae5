"""Mixed motions have the legs of one clip and the arms of others, hung where arms hang."""

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError, UsageError
from blockloom.motion.features import human_features, layout_of, recover
from blockloom.motion.procedural import procedural_motion
from blockloom.motion.skeleton import HUMAN22
from blockloom.training.clips import ClipDataset
from blockloom.training.motion_mixing import PARTS, replace_part, with_mixtures

LAYOUT = layout_of(HUMAN22)
CHEST, HIP = HUMAN22.index("spine3"), HUMAN22.index("left_hip")


def made(caption, frames=31, seed=0):
    generator = torch.Generator().manual_seed(seed)
    motion = procedural_motion(caption, generator, frames)
    return torch.from_numpy(human_features(motion))


def test_an_arm_moves_as_in_the_other_motion_and_hangs_where_it_hung():
    walk, wave = made("a person walks forward"), made("a person waves with the left hand", seed=1)
    arm, anchor = PARTS[1]
    assert [HUMAN22.names[joint] for joint in arm] == [
        "left_collar", "left_shoulder", "left_elbow", "left_wrist"
    ] and anchor == CHEST  # fmt: skip
    mixed = replace_part(walk, wave, arm, anchor)
    others = [joint for joint in range(22) if joint not in arm]
    one, two = recover(walk), recover(mixed)
    assert torch.equal(one[:, others], two[:, others])
    local = wave[:, LAYOUT.places].unflatten(1, (-1, 3))
    given = local[:, [j - 1 for j in arm]] - local[:, CHEST - 1, None]
    found = mixed[:, LAYOUT.places].unflatten(1, (-1, 3))
    hung = found[:, [j - 1 for j in arm]] - found[:, CHEST - 1, None]
    torch.testing.assert_close(hung, given, atol=1e-6, rtol=0)
    turns = mixed[:, LAYOUT.rotations].unflatten(1, (-1, 6))
    assert torch.equal(turns[:, 17], wave[:, LAYOUT.rotations].unflatten(1, (-1, 6))[:, 17])
    # Ways agree with places: chest's own way and the arm's way against the chest.
    ways, own = (rows[:, LAYOUT.ways].unflatten(1, (-1, 3)) for rows in (mixed, wave))
    torch.testing.assert_close(
        ways[:, 20] - ways[:, CHEST], own[:, 20] - own[:, CHEST], atol=1e-6, rtol=0
    )


def test_a_part_of_a_motion_in_itself_changes_nothing():
    walk = made("a person runs forward")
    for joints, anchor in PARTS:
        torch.testing.assert_close(
            replace_part(walk, walk, joints, anchor), walk, atol=1e-6, rtol=0
        )


def dataset(*lengths):
    rows = [made("a person claps", n + 1, seed) for seed, n in enumerate(lengths)]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    texts = [str(i) for i in range(len(lengths))]
    return ClipDataset(torch.cat(rows).numpy(), offsets, texts, ["train"] * len(rows), 20.0)


def test_copies_are_added_behind_the_clips():
    clips = dataset(20, 12, 3)
    mixed = with_mixtures(clips, 2, torch.Generator().manual_seed(0))
    again = with_mixtures(clips, 2, torch.Generator().manual_seed(0))
    assert len(mixed) == 9 and np.array_equal(mixed.frames, again.frames)
    assert np.array_equal(mixed.frames[:35], clips.frames)
    assert mixed.captions == clips.captions * 3
    # A partner of 12 frames cuts one of 20 short; one of 3 is too short to take part.
    assert set(mixed.lengths[3:].tolist()) <= {20, 12, 3}
    legs = mixed.clip(3)[:, :4]
    assert np.array_equal(legs, clips.clip(0)[: len(legs), :4])
    with pytest.raises(UsageError, match="copies"):
        with_mixtures(clips, 0, torch.Generator())
    plain = ClipDataset(np.zeros((3, 2), np.float32), np.array([0, 3]), [""], ["train"])
    with pytest.raises(DataError, match="frames have 2 features; only the 263"):
        with_mixtures(plain, 1, torch.Generator())
    assert HIP in [joint for joint in range(22) if all(joint not in part for part, _ in PARTS)]
