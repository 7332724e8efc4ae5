"""The text-motion evaluator: it learns what texts say, and is the same wherever it is used."""

import numpy as np
import pytest
import torch
from tests.tiny_motion import TEXTS, tiny_features, tiny_joints, tiny_motions

from blockloom.core.errors import DataError, ModelError
from blockloom.motion.features import recover
from blockloom.motion.skeleton import HUMAN22
from blockloom.training.clips import ClipDataset
from blockloom.training.embedding_metrics import precision_hits
from blockloom.training.motion_augment import (
    FEATURES,
    GROUPS,
    at_tempo,
    augmented,
    frozen,
    mirrored,
    mirrored_text,
    spoiled,
)
from blockloom.training.text_motion import (
    NOTHING,
    SEEN,
    TextMotionEncoder,
    fingerprint,
    fitted,
    load_text_motion,
    padded,
    save_text_motion,
    train_text_motion,
)

SIZES = {"width": 32, "dim": 16, "buckets": 64}


@pytest.fixture(scope="module")
def clips() -> ClipDataset:
    return tiny_motions()


@pytest.fixture(scope="module")
def encoder(clips) -> TextMotionEncoder:
    return train_text_motion(clips.only("train"), 100, 20, source="rules", **SIZES)


def test_a_mirrored_motion_is_the_mirrored_joints():
    """Mirror the joints in space, and compare with what the mirrored features give."""
    features = torch.from_numpy(tiny_features(TEXTS[2], 24))
    features[:, 0] += 0.02  # it turns on the way
    features[:, 1] += 0.01  # and goes sideways
    swap = list(range(22))
    for number, name in enumerate(HUMAN22.names):
        other = name.replace("left", "R").replace("right", "left").replace("R", "right")
        swap[number] = HUMAN22.names.index(other)
    wanted = recover(features)[:, swap] * torch.tensor([-1.0, 1, 1])
    assert torch.allclose(recover(mirrored(features)), wanted, atol=1e-5)
    assert torch.equal(mirrored(mirrored(features)), features)


def test_mirrored_features_are_those_of_the_mirrored_text():
    left, right = (torch.from_numpy(tiny_features(text, 20, seed=3)) for text in TEXTS[2:4])
    assert mirrored_text(TEXTS[2]) == TEXTS[3]
    assert mirrored_text("the leftmost right hand") == "the rightmost left hand"
    assert mirrored_text("step Leftwards, left-handed") == "step Rightwards, right-handed"
    assert mirrored_text("be bright, copyright") == "be bright, copyright"
    for against in ("counterclockwise", "counter-clockwise", "counter clockwise", "anticlockwise",
                    "anti-clockwise"):  # fmt: skip
        assert mirrored_text(f"turn {against} once") == "turn clockwise once"
    assert mirrored_text("Left arm, then RIGHT") == "Right arm, then Left"
    assert mirrored_text("turn clockwise") == "turn counterclockwise"
    assert mirrored_text("Counterclockwise") == "Clockwise"
    assert torch.allclose(mirrored(left), right, atol=2e-3)
    assert not torch.allclose(left, right, atol=2e-3)


def test_mirrored_rotations_turn_the_other_way():
    """About y and z a turn changes its sense in a mirror across x = 0, about x it does not."""
    angle = torch.tensor(0.3)
    c, s, one, zero = angle.cos(), angle.sin(), torch.tensor(1.0), torch.tensor(0.0)
    about = {  # the first two columns of the matrix, and of its inverse
        "x": torch.stack([one, zero, zero, zero, c, s]),
        "y": torch.stack([c, zero, -s, zero, one, zero]),
        "z": torch.stack([c, s, zero, -s, c, zero]),
    }
    left, right = 1, 2  # the hips are the first two joints that have rotations
    for axis, six in about.items():
        features = torch.zeros(1, FEATURES)
        start = GROUPS[4].start
        features[0, start + 6 * (left - 1) : start + 6 * left] = six
        found = mirrored(features)[0, start + 6 * (right - 1) : start + 6 * right]
        back = six * torch.where(six.eq(s) | six.eq(-s), -1.0, 1.0)
        assert torch.allclose(found, six if axis == "x" else back), axis


def test_tempo_keeps_the_way_and_scales_the_steps():
    features = torch.from_numpy(tiny_features(TEXTS[0], 40))
    fast = at_tempo(features, 2.0)
    assert len(fast) == 20
    way = [float(recover(x)[-1, 0, 2] - recover(x)[0, 0, 2]) for x in (features, fast)]
    # A step short at the end: 39 steps of the slow one, 19 twice as long of the fast one.
    assert way[1] == pytest.approx(way[0] * 38 / 39, rel=1e-3)
    assert torch.equal(at_tempo(features, 1.0), features)


def test_augmenting_follows_the_generator_and_mirrors_texts_with_motions():
    motions = [torch.from_numpy(tiny_features(TEXTS[2], 30, seed)) for seed in range(12)]
    std = torch.ones(SEEN)
    runs = [
        augmented(motions, [TEXTS[2]] * 12, std, torch.Generator().manual_seed(4)) for _ in "ab"
    ]
    assert all(torch.equal(a, b) for a, b in zip(runs[0][0], runs[1][0], strict=True))
    pieces, told = runs[0]
    assert set(told) == {TEXTS[2], TEXTS[3]}
    for piece, text in zip(pieces, told, strict=True):
        place = recover(piece)[:, [20, 21], 1].std(0)  # the wrist that is raised moves more
        assert (place[0] > place[1]) == (text == TEXTS[2])
        assert 15 <= len(piece) <= 36


def test_spoiled_motions_stop_lose_their_order_or_tremble():
    motion = torch.from_numpy(tiny_features(TEXTS[0], 30))
    std = torch.full((SEEN,), 0.1)
    kinds = set()
    for seed in range(24):
        bad = spoiled(motion, std, torch.Generator().manual_seed(seed), 20.0)
        assert bad.shape == motion.shape and not torch.equal(bad, motion)
        if torch.equal(bad, bad[:1].expand_as(bad)):
            kinds.add("frozen")
            assert (recover(bad) - recover(bad)[:1]).abs().max() < 1e-6
        elif torch.equal(bad.sort(0).values, motion.sort(0).values):
            kinds.add("shuffled")
        else:
            kinds.add("noisy")
            assert 0.04 < float((bad - motion)[:, :SEEN].std()) < 0.16
    assert kinds == {"frozen", "shuffled", "noisy"}
    # Who stands still anyway cannot be frozen or shuffled: only noise spoils that.
    still = frozen(motion, 3)
    assert torch.equal(still[:, 3], motion[3, 3].expand(30))
    for seed in range(8):
        bad = spoiled(still, std, torch.Generator().manual_seed(seed), 20.0)
        assert float((bad - still)[:, :SEEN].std()) > 0.04


def test_it_tells_poses_from_motions(clips, encoder):
    """A frozen pose is nearer to "nothing" than to the text of the motion it was taken from."""
    held_out = clips.only("test")
    motions = [held_out.clip(i) for i in range(len(held_out))]
    stopped = [frozen(torch.from_numpy(motion), 10).numpy() for motion in motions]
    words, nothing = encoder.embed_texts(held_out.captions), encoder.embed_texts([NOTHING])
    for some, is_motion in ((motions, True), (stopped, False)):
        seen = encoder.embed(some)
        own = np.linalg.norm(seen - words, axis=1)
        assert ((own < np.linalg.norm(seen - nothing, axis=1)) == is_motion).mean() >= 0.75


def test_statistics_share_a_deviation_in_a_group():
    frames = np.zeros((4, FEATURES), np.float32)
    frames[:, 0] = [1, 3, 1, 3]
    frames[:, 1] = [0, 0, 4, 4]  # deviation 2, and 0 for its neighbour
    mean, std = fitted([frames[:2], frames[2:]])
    assert mean[:3].tolist() == [2.0, 2.0, 0.0] and len(mean) == len(std) == SEEN
    assert std[:3].tolist() == [1.0, 1.0, 1.0]
    assert std[3:].tolist() == pytest.approx([1e-3] * (SEEN - 3))  # nothing is divided by zero


def test_it_names_texts_of_motions_it_never_saw(clips, encoder):
    held_out = clips.only("test")
    vectors = encoder.embed([held_out.clip(i) for i in range(len(held_out))])
    texts = sorted(TEXTS)
    target = np.array([texts.index(caption) for caption in held_out.captions])
    hits = precision_hits(vectors, encoder.embed_texts(texts), target)
    assert hits[1].mean() >= 0.9 and hits[3].mean() == 1.0
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-6)
    # The same motions under wrong texts: nobody is right.
    wrong = precision_hits(vectors, encoder.embed_texts(texts), (target + 1) % len(texts))
    assert wrong[1].mean() <= 0.1


def test_a_vector_depends_on_nothing_beside_or_behind_the_motion(encoder):
    motions = [tiny_features(text, n) for text, n in zip(TEXTS, (9, 30, 17, 1, 24), strict=True)]
    together = encoder.embed(motions)
    alone = np.concatenate([encoder.embed([motion]) for motion in motions])
    assert together == pytest.approx(alone, abs=1e-5)
    features, lengths = padded([torch.from_numpy(motion) for motion in motions])
    dirty = features.clone()
    for row, length in enumerate(lengths.tolist()):
        dirty[row, length:] = 7.0
    with torch.no_grad():
        assert torch.equal(encoder.see(dirty, lengths), encoder.see(features, lengths))


def test_contacts_are_not_looked_at(encoder):
    motion = tiny_features(TEXTS[0], 20)
    other = motion.copy()
    other[:, SEEN:] = 1 - other[:, SEEN:]
    assert np.array_equal(encoder.embed([motion]), encoder.embed([other]))


def test_stored_and_loaded_it_is_the_same_and_says_what_it_is(clips, encoder, tmp_path):
    save_text_motion(encoder, tmp_path / "judge")
    loaded = load_text_motion(tmp_path / "judge")
    motion = [tiny_features(TEXTS[4], 20)]
    assert np.array_equal(loaded.embed(motion), encoder.embed(motion))
    assert loaded.name == encoder.name
    assert encoder.name == (
        f"blockloom text-motion evaluator, {encoder.weights_hash()}, trained on "
        "20 clips of 5 texts from rules"
    )
    train = clips.only("train")
    assert loaded.config.data == fingerprint(train) != fingerprint(clips)
    assert {file.suffix for file in (tmp_path / "judge").iterdir()} == {".json", ".safetensors"}
    with pytest.raises(ModelError, match="cannot load the text-motion evaluator nothing"):
        load_text_motion(tmp_path / "nothing")


def test_training_depends_on_the_seed_alone(clips):
    train = clips.only("train")
    state = torch.random.get_rng_state()
    hashes = [train_text_motion(train, 2, 8, seed, **SIZES).weights_hash() for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_what_it_cannot_learn_from_or_look_at_is_refused(clips, encoder):
    with pytest.raises(DataError, match="at least 2 different texts"):
        train_text_motion(clips.take([0, 1]), 1, **SIZES)
    pictures = ClipDataset(np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 2, 4]), ["a", "b"],
                           ["train"] * 2)  # fmt: skip
    with pytest.raises(DataError, match=r"needed \[frames, 263\]"):
        train_text_motion(pictures, 1, **SIZES)
    with pytest.raises(DataError, match="no motion"):
        encoder.embed([])
    broken = tiny_features(TEXTS[0], 9)
    broken[4, 100] = np.inf
    with pytest.raises(DataError, match="motion 1 holds numbers that are not finite"):
        encoder.embed([tiny_features(TEXTS[0], 9), broken])


def test_the_motions_of_these_tests_do_what_they_say():
    walk = tiny_joints(TEXTS[0], 40)
    assert walk[-1, 0, 2] - walk[0, 0, 2] > 1.5
    assert walk[..., 1].min() == pytest.approx(0.0, abs=1e-6)
