"""Balanced epochs: rare kinds come more often, every item of a kind equally often."""

import numpy as np
import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.recipe import load_recipe
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.balance import balanced_order
from blockloom.training.clip_run import stage_of_clips
from blockloom.training.clip_stage import encode_clips
from blockloom.training.clips import ClipDataset
from blockloom.training.run import initial_model

CAPTIONS = ["a human, walk"] * 5 + ["a human, run"] * 4 + ["a bird, flap"] + ["a fox"] * 4


def test_shares_follow_the_square_root_of_the_counts():
    order = balanced_order(CAPTIONS, "subject")
    # 9 humans once, 1 bird sqrt(9 / 1) = 3 times, 4 foxes 1.5 times each.
    assert order.tolist() == [*range(9), 9, 9, 9, 10, 11, 11, 12, 13, 13]


def test_whole_captions_are_kinds_of_their_own():
    order = balanced_order(["x, a"] * 4 + ["x, b"], "caption")
    assert order.tolist() == [0, 1, 2, 3, 4, 4]
    assert balanced_order(["x, a"] * 4 + ["x, b"], "subject").tolist() == [0, 1, 2, 3, 4]


def test_nothing_to_balance_is_no_order_and_another_word_is_refused():
    assert balanced_order(CAPTIONS, "none") is None
    with pytest.raises(UsageError, match=r"train.balance.*none, caption, subject"):
        balanced_order(CAPTIONS, "subjects")


def test_windows_of_rare_clips_come_more_often(tmp_path):
    settings = [
        "modality=video", "layout.kind=frames", "layout.block=frame", "layout.frames=2",
        "cache.window=2", "backbone.dim=32", "backbone.layers=1", "backbone.heads=2",
        "corruption.kind=flow", "head.objective=velocity", "schedule.update=euler",
        "tokenizer={kind: frames, image: {kind: patch, image_size: 8, patch: 4}}",
        "train.balance=subject",
    ]  # fmt: skip
    recipe = load_recipe("image/acdit", settings)
    tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    offsets = np.array([0, 9, 18, 20])  # 8 windows, 8 windows, 1 window
    frames = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    names = ["a human, walk", "a human, run", "a bird, flap"]
    clips = ClipDataset(frames, offsets, names, ["train"] * 3)
    values = encode_clips(tokenizer, clips, tmp_path)
    model = initial_model(recipe, tokenizer, 0)
    stage = stage_of_clips(model, tokenizer, clips, values)
    assert stage.num_items == 16 + 4
    last = torch.tensor([15, 16, 19])
    assert torch.equal(stage.values[last][1], values[18:20].flatten(0, 1))
    assert torch.equal(stage.values[last][1], stage.values[last][2])
    ids = model.text_encoder.tokenize(names)
    assert torch.equal(stage.prompt_ids[last], ids[torch.tensor([1, 2, 2])])
