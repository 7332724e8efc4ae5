"""Dialogues made by rule: turns, nods after phrases, mouths that follow voices, smiles returned."""

import numpy as np
import pytest

from blockloom.core.errors import UsageError
from blockloom.training.dialogue import (
    MOTION,
    NOD_DELAY,
    SMILE_DELAY,
    STREAMS,
    dialogue,
    dialogue_clips,
)

MOUTH, NOD, SMILE, TURN = (MOTION.index(name) for name in ("mouth", "nod", "smile", "turn"))


def test_people_take_turns_and_only_who_talks_is_heard():
    talk = dialogue(0, 0, 600)
    assert not bool((talk.talks[0] & talk.talks[1]).any())
    assert 0.25 < talk.talks[0].mean() < 0.75
    assert not talk.voices[0][~talk.talks[0]].any() and talk.voices[0][talk.talks[0]].any()


def test_mouths_follow_the_own_voice_and_not_the_other():
    talk = dialogue(1, 0, 600)
    for me in range(2):
        open_mouth = talk.motions[me, :, MOUTH]
        vowel = [voice[:, 0] * voice[:, 2] for voice in talk.voices]
        assert np.corrcoef(open_mouth, vowel[me])[0, 1] > 0.9
        assert np.corrcoef(open_mouth, vowel[1 - me])[0, 1] < 0.0


def test_a_listener_nods_after_a_phrase_of_the_other():
    raised, before = [], []
    for index in range(20):
        talk = dialogue(2, index, 400)
        loud = talk.voices[0][:, 0] > 0
        for end in np.flatnonzero(loud[:-2] & ~loud[1:-1] & ~loud[2:]):
            if end + 12 < 400 and not talk.talks[1, end - 8 : end + 12].any() and end > 8:
                raised.append(
                    talk.motions[1, end + NOD_DELAY + 1 : end + NOD_DELAY + 3, NOD].mean()
                )
                before.append(talk.motions[1, end - 1 : end + 1, NOD].mean())
    assert len(raised) > 20
    assert np.mean(raised) > 0.15 and abs(np.mean(before)) < 0.03


def test_smiles_come_back_after_a_moment():
    at_once, later = [], []
    for index in range(10):
        mine, other = dialogue(3, index, 600).motions[:, :, SMILE]
        starts = np.flatnonzero((mine[1:-20] > 0.3) & (mine[:-21] < 0.1) & (other[1:-20] < 0.1)) + 1
        at_once += [other[start + 1] for start in starts]
        later += [other[start + SMILE_DELAY + 4] for start in starts]
    assert len(later) > 30
    assert np.mean(at_once) < 0.1 and np.mean(later) > 0.5


def test_a_set_of_dialogues_holds_both_people_side_by_side():
    data = dialogue_clips(3, 2, 4, num_frames=50)
    assert data.frames.shape == (250, sum(STREAMS)) and data.frames.dtype == np.float32
    assert data.split == ["train"] * 3 + ["held_out"] * 2 and data.fps == 10.0
    talk = dialogue(4, 3, 50)
    clip = data.clip(3)
    assert np.allclose(clip[:, :4], talk.voices[0]) and np.allclose(clip[:, 14:], talk.motions[1])
    assert np.array_equal(data.frames, dialogue_clips(3, 2, 4, num_frames=50).frames)
    with pytest.raises(UsageError):
        dialogue_clips(1, 0)
