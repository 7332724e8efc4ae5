from functools import cache

import numpy as np
import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.motion.clip import Motion, fk_error
from blockloom.motion.features import headings, human_features
from blockloom.motion.procedural import (
    CAPTIONS,
    MAX_FRAMES,
    MIN_FRAMES,
    procedural_motion,
    procedural_motions,
)
from blockloom.motion.skeleton import HUMAN22

TOES = HUMAN22.indices(("left_foot", "right_foot"))


@cache
def make(caption: str) -> Motion:
    """Make one clip of a caption, once; nobody changes it."""
    return procedural_motion(caption, torch.Generator().manual_seed(0), 100)


@pytest.mark.parametrize("caption", CAPTIONS)
def test_clips_are_bodies_on_the_floor_that_move_smoothly(caption: str) -> None:
    motion = make(caption)
    assert motion.text == caption and motion.skeleton == HUMAN22 and motion.fps == 20
    assert fk_error(motion)[1] < 0.01
    assert abs(float(motion.joints[..., 1].min())) < 0.02
    speed = np.linalg.norm(np.diff(motion.joints, axis=0), axis=-1) * 20
    assert 0.005 < speed.max() < 8  # metres per second
    jerk = np.linalg.norm(np.diff(motion.joints, n=3, axis=0), axis=-1)
    assert jerk.max() < 0.35  # metres per frame^3: no frame jumps
    lengths = np.linalg.norm(motion.joints[:, 4] - motion.joints[:, 1], axis=-1)
    np.testing.assert_allclose(lengths, 0.4112, atol=1e-4)


# The feet of jumping jacks slide apart on purpose.
@pytest.mark.parametrize("caption", [name for name in CAPTIONS if "jacks" not in name])
def test_a_standing_toe_stays_where_it_is(caption: str) -> None:
    toes = make(caption).joints[:, TOES]
    is_down = (toes[1:, :, 1] < 0.004) & (toes[:-1, :, 1] < 0.004)
    slide = np.linalg.norm(np.diff(toes[..., [0, 2]], axis=0), axis=-1)
    assert is_down.mean() > (0.02 if "runs" in caption else 0.1)
    assert np.median(slide[is_down]) < 0.002 and slide[is_down].mean() < 0.012  # metres per frame


def test_equal_generators_give_equal_clips_and_others_do_not() -> None:
    for caption in CAPTIONS[:3]:
        first, again, other = (
            procedural_motion(caption, torch.Generator().manual_seed(seed), 100)
            for seed in (3, 3, 4)
        )
        np.testing.assert_array_equal(first.joints, again.joints)
        assert np.abs(first.joints - other.joints).max() > 0.05


def test_lengths_and_captions_in_turn() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = procedural_motions(60, generator)
    assert [clip.text for clip in clips[:25]] == list(CAPTIONS)
    lengths = {len(clip) for clip in clips}
    assert min(lengths) >= MIN_FRAMES and max(lengths) <= MAX_FRAMES and len(lengths) > 20
    two = procedural_motions(4, generator, CAPTIONS[:2], frames=40)
    assert [(clip.text, len(clip)) for clip in two] == [(name, 40) for name in CAPTIONS[:2]] * 2


def test_the_words_mean_what_is_seen() -> None:
    def way(caption: str) -> np.ndarray:
        """Distance travelled to the body's left, up and forward, in metres."""
        motion = make(caption)
        heading = float(headings(motion, 0.0)[0])
        x, y, z = motion.joints[-1, 0] - motion.joints[0, 0]
        return np.array([x * np.cos(heading) - z * np.sin(heading), y,
                         x * np.sin(heading) + z * np.cos(heading)])  # fmt: skip

    def side_heights(caption: str, joint: str) -> tuple[float, float]:
        places = make(caption).joints
        return tuple(
            float(places[:, HUMAN22.index(f"{side}_{joint}"), 1].max())
            for side in ("left", "right")
        )

    slow, normal, fast = (
        way(f"a person walks forward{how}")[2] for how in (" slowly", "", " fast")
    )
    run = way("a person runs forward")[2]
    assert 2 < slow < 0.7 * normal < 0.7 * fast < 0.7 * run
    assert way("a person walks backward")[2] < -2
    assert (
        way("a person steps to the left")[0] > 1.5 and way("a person steps to the right")[0] < -1.5
    )
    assert way("a person jumps forward")[2] > 1
    assert abs(way("a person waves with the left hand")).max() < 0.05
    for caption, sign in (("left", 1), ("right", -1)):
        turned = headings(make(f"a person turns around to the {caption}"), 0.0)
        assert float(turned[-1] - turned[0]) * sign == pytest.approx(np.pi, abs=0.2)
        turned = headings(make(f"a person walks in a circle to the {caption}"), 0.0)
        assert float(turned[-1] - turned[0]) * sign > 3
    left, right = side_heights("a person waves with the left hand", "wrist")
    assert left > 1.4 > 1.1 > right
    left, right = side_heights("a person kicks with the right foot", "ankle")
    assert right > 0.5 > 0.1 > left
    assert make("a person squats").joints[:, 0, 1].min() < 0.65
    assert make("a person jumps up").joints[:, TOES, 1].min(axis=1).max() > 0.15
    head = HUMAN22.index("head")
    assert make("a person bows").joints[:, head, 1].min() < 1.3
    for wrist in side_heights("a person raises both arms", "wrist"):
        assert wrist > 1.8
    claps = make("a person claps").joints
    gap = np.linalg.norm(claps[:, 20] - claps[:, 21], axis=-1)
    assert gap.min() < 0.25 and gap.max() > 0.38


def test_captions_can_be_told_apart_from_features() -> None:
    generator = torch.Generator().manual_seed(0)
    clips = procedural_motions(4 * len(CAPTIONS), generator)
    rows = []
    for clip in clips:
        features = human_features(clip)[:, :67]
        rows.append(np.concatenate([features.mean(0), features.std(0)]))
    table = np.stack(rows)
    table = (table - table.mean(0)) / (table.std(0) + 1e-3)
    known, asked = table[: 3 * len(CAPTIONS)], table[3 * len(CAPTIONS) :]
    nearest = np.linalg.norm(asked[:, None] - known[None], axis=-1).argmin(1)
    hits = [clips[a + len(known)].text == clips[k].text for a, k in enumerate(nearest)]
    assert np.mean(hits) >= 0.9


def test_what_cannot_be_made_is_refused() -> None:
    generator = torch.Generator()
    with pytest.raises(UsageError, match=r"'a person walk forward'.*try 'a person walks forward'"):
        procedural_motion("a person walk forward", generator)
    with pytest.raises(UsageError, match="frames"):
        procedural_motion(CAPTIONS[0], generator, 1)
    with pytest.raises(UsageError, match="count"):
        procedural_motions(0, generator)
    with pytest.raises(UsageError, match="captions"):
        procedural_motions(3, generator, ())
