"""Caption scores: an encoder that learns what captions say, and a judge whose sums are known."""

import json

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError
from blockloom.core.recipe import load_recipe
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.clip_captions import Judge, can_be_asked, caption_scores, judge_of
from blockloom.training.clip_evaluation import ClipSettings, evaluate_clips
from blockloom.training.clips import ClipDataset
from blockloom.training.dreams import drawn_from_text
from blockloom.training.run import initial_model
from blockloom.training.text_video import (
    MOMENTS,
    SIDE,
    TextVideoEncoder,
    augmented,
    contrastive,
    fewest_parts,
    moments,
    parts_of,
    shrunk,
    train_text_video,
)

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 220)}
SETTINGS = (
    "modality=video", "layout.kind=frames", "layout.block=frame", "layout.frames=4",
    "cache.window=3", "backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16",
    "text.buckets=32", "text.words=6", "schedule.steps=1", "corruption.kind=flow",
    "head.objective=velocity", "schedule.update=euler", "schedule.guidance_scale=1.5",
    "tokenizer={kind: frames, image: {kind: patch, image_size: 16, patch: 8}}",
)  # fmt: skip


def square(colour: str, way: str, theme: str, start: int) -> np.ndarray:
    """A square of one colour that moves left or right over a dark or light ground, 20 frames."""
    frames = np.full((20, 16, 16, 3), 30 if theme == "dark" else 230, np.uint8)
    for time in range(20):
        place = (start + (time // 2) * (1 if way == "right" else -1)) % 12
        frames[time, 5:10, place : place + 5] = COLOURS[colour]
    return frames


@pytest.fixture(scope="module")
def clips() -> ClipDataset:
    """Three colours, two ways, two themes; one theme of the red squares is held out."""
    rows = [(c, w, t) for c in COLOURS for w in ("left", "right") for t in ("dark", "light")]
    frames = np.concatenate([square(*row, start=i) for i, row in enumerate(rows)])
    captions = [f"a {c} square, {w}, {t} ground" for c, w, t in rows]
    split = ["test_comp" if row[0] == "red" and row[2] == "dark" else "train" for row in rows]
    return ClipDataset(frames, np.arange(13) * 20, captions, split)


@pytest.fixture(scope="module")
def encoder(clips) -> TextVideoEncoder:
    return judge_of(clips, steps=60)


@pytest.fixture(scope="module")
def parts():
    recipe = load_recipe("image/acdit", list(SETTINGS))
    tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    model = initial_model(recipe, tokenizer, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # heads start at zero; frames should move
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval(), tokenizer


def test_moments_are_every_second_frame_and_the_last_is_held():
    frames = torch.arange(30, dtype=torch.uint8)[:, None, None, None].expand(30, 4, 4, 3)
    assert moments(frames, 3)[:, 0, 0, 0].tolist() == [3, 5, 7, 9, 11, 13, 15, 17]
    assert moments(frames[:6])[:, 0, 0, 0].tolist() == [0, 2, 4, 5, 5, 5, 5, 5]
    small = shrunk(moments(frames)[None])
    assert small.shape == (1, MOMENTS, 3, SIDE, SIDE)
    assert small[0, 1].unique().tolist() == pytest.approx([2 / 127.5 - 1])


def test_equal_captions_share_the_right_answer():
    vectors = torch.eye(3)[[0, 0, 1]]
    captions = ["a", "a", "b"]
    # Scores 10 where right, 0 elsewhere: two right answers of one half each, or one of one.
    twice = -np.log(np.exp(10) / (2 * np.exp(10) + 1))
    once = -np.log(np.exp(10) / (np.exp(10) + 2))
    loss = contrastive(vectors, vectors, captions)
    assert float(loss) == pytest.approx((2 * twice + once) / 3, rel=1e-4)


def test_augmenting_keeps_shape_follows_the_generator_and_changes_every_piece():
    pixels = torch.rand((4, MOMENTS, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1))
    one, two = (augmented(pixels, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two) and one.shape == pixels.shape
    assert ((one - pixels).abs().amax((1, 2, 3, 4)) > 0.05).all()


def test_parts_are_what_commas_separate():
    assert parts_of("a fox, walk , dark, wet", 3) == ["a fox", "walk", "dark, wet"]
    assert parts_of("a fox", 2) == ["a fox", ""]
    assert fewest_parts(["a, b, c", "a, b"]) == 2


def test_the_encoder_names_the_parts_of_captions(clips, encoder):
    """Every part of clips it was trained on, and the ground of clips it was not."""
    for some, parts in ((clips.only("train"), (0, 1, 2)), (clips.only("test_comp"), (2,))):
        pieces = torch.stack([moments(torch.from_numpy(some.clip(i))) for i in range(len(some))])
        for part in parts:
            texts = sorted({parts_of(c, 3)[part] for c in clips.captions})
            with torch.no_grad():
                told = encoder.read(texts)
                found = (encoder.see(shrunk(pieces))[:, part] @ told.T).argmax(1).tolist()
            right = [
                texts[i] == parts_of(c, 3)[part] for i, c in zip(found, some.captions, strict=True)
            ]
            assert np.mean(right) >= 0.9
    assert told.norm(dim=1).tolist() == pytest.approx([1.0] * 2, abs=1e-5)
    with pytest.raises(DataError, match="at least 2 different captions"):
        train_text_video(clips.take([0, 0]), 1)


class Reader:
    """Reads the parts of known captions as unit vectors of their own."""

    num_parts = 2
    known = ("a cat", "a dog", "run", "sit")

    def read(self, texts):
        return torch.eye(4)[[self.known.index(text) for text in texts]]

    def read_captions(self, captions):
        return torch.stack([self.read(parts_of(caption, 2)) for caption in captions])


def test_a_judge_counts_ranks_and_parts():
    candidates = ["a cat, run", "a cat, sit", "a dog, run"]
    judge = Judge(Reader(), ["a cat, run", "a dog, run"], candidates, candidates)
    cat, dog, run, sit = torch.eye(4)
    # The first is right; of the second's two pieces one is right, one shows the sitting cat.
    sure = torch.stack((cat + 0.5 * dog, run))[None]
    split = torch.stack((torch.stack((dog, run)), torch.stack((cat, sit))))
    report = judge.report([sure, split])
    assert report["recall_at_1"] == pytest.approx(0.75)
    assert report["recall_at_5"] == 1.0 and report["num_items"] == 2
    assert report["part_1_right"]["share"] == pytest.approx(0.75)
    assert report["part_2_right"]["share"] == pytest.approx(0.75)
    assert report["part_1_right"]["interval"] == [0.5, 1.0]
    chance = judge.chance()
    assert chance["recall_at_1"] == pytest.approx(1 / 3) and chance["recall_at_5"] == 1.0
    assert chance["part_1_right"] == chance["part_2_right"] == 0.5


def test_clips_from_captions_alone_do_not_depend_on_their_neighbours(parts):
    told = ["a red square, left, dark ground", "a blue square", "a green square, right"]
    together = drawn_from_text(*parts, told, 5, seed=3)
    assert together.shape == (3, 5, 16, 16, 3) and together.dtype == torch.uint8
    assert torch.equal(together, drawn_from_text(*parts, told, 5, seed=3, batch_size=2))
    assert not torch.equal(together, drawn_from_text(*parts, told, 5, seed=4))
    assert not torch.equal(together[0], drawn_from_text(*parts, ["", *told[1:]], 5, seed=3)[0])


def test_scores_of_a_split_stand_beside_real_clips_and_the_nearest_caption(clips, encoder, parts):
    model, tokenizer = parts
    assert can_be_asked(model, clips) and not can_be_asked(model, clips.take([0, 0]))
    scores = caption_scores(model, tokenizer, clips, encoder, "test_comp")
    json.dumps(scores, allow_nan=False)
    assert scores["candidates"] == 2 and scores["evaluator"] == "own-text-video-contrastive"
    real, near = scores["real_clips"], scores["nearest_training_caption"]
    assert real["num_items"] == 2 and real["part_3_right"]["share"] == 1.0
    # The nearest training caption is the same square, the same way, over the other ground.
    assert near["part_1_right"]["share"] == 1.0 and near["part_3_right"]["share"] == 0.0
    assert 0 < near["mean_similarity"] < 1
    assert scores["chance"]["part_1_right"] == pytest.approx(1 / 3)
    assert scores["chance"]["recall_at_1"] == 0.5 and scores["model"]["recall_at_5"] == 1.0


def test_eval_reports_every_held_out_split(clips, parts, tmp_path):
    more = ClipDataset(
        clips.frames, clips.offsets, clips.captions,
        ["test_action" if "blue" in c and "left" in c else s
         for c, s in zip(clips.captions, clips.split, strict=True)],
    )  # fmt: skip
    settings = ClipSettings(num=2, speed_frames=0, judge_steps=2)
    report = evaluate_clips(*parts, more, tmp_path, settings)
    assert set(report["splits"]) == {"test_comp", "test_action"}
    for entry in report["splits"].values():
        assert entry["clips"] == 2 and entry["horizons"]["contexts"] == 2
        assert {"model", "copy_last_frame", "mean_training_frame"} <= set(entry["horizons"])
        assert entry["captions"]["model"]["num_items"] == 2
    one = evaluate_clips(*parts, clips, tmp_path, settings)
    assert "horizons" not in one["splits"]["test_comp"]
