"""Copying baselines on pictures and captions whose answers are known by hand."""

import json
import math

import numpy as np
import pytest

from blockloom.training.baselines import (
    caption_baseline,
    copied_retrieval,
    nearest_captions,
    same_name_baseline,
)


def _flat(*levels: int, side: int = 16) -> np.ndarray:
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


CAPTIONS = ["cat, noto style", "cat, flat style", "dog, noto style", "owl, flat style"]


def test_nearest_caption_prefers_the_rare_name_to_the_style():
    found = nearest_captions(["cat, round style", "owl, noto style", "emu"], CAPTIONS)
    assert [numbers.tolist() for _, numbers in found] == [[0, 1], [3], [0, 1, 2, 3]]
    assert found[2][0] == 0.0
    assert math.isclose(nearest_captions(["dog, noto style"], CAPTIONS)[0][0], 1.0)


def test_caption_similarity_by_hand():
    # Weights: cat log(5/3), noto log(5/3), style log(5/5) = 0; unseen "round" log 5.
    shared = math.log(5 / 3) ** 2
    query = math.sqrt(shared + math.log(5) ** 2)
    want = shared / (query * math.sqrt(2 * shared))
    assert math.isclose(nearest_captions(["cat, round style"], CAPTIONS)[0][0], want)


def test_caption_baseline_averages_over_ties():
    gallery = _flat(10, 200, 90, 30)
    train_images = _flat(10, 200, 0, 100)
    queries = ["cat, round style", "owl, noto style"]
    got = caption_baseline(queries, [0, 2], CAPTIONS, train_images, gallery)
    # "cat" ties between 10 (right) and 200 (rank 4); "owl" shows 100, nearest to 90.
    assert got["recall_at_1"] == 0.75 and got["recall_at_5"] == 1.0
    assert got["mean_sources"] == 1.5 and got["num_items"] == 2
    assert got["chance_at_1"] == 0.25
    json.dumps(got, allow_nan=False)


def test_copies_average_or_take_the_best():
    gallery, targets = _flat(10, 200, 90, 30), [0, 2]
    sources = [np.array([0, 1]), np.array([3])]
    shown = _flat(12, 250, 0, 95)
    mean = copied_retrieval(sources, shown, targets, gallery)
    best = copied_retrieval(sources, shown, targets, gallery, pick="best")
    assert mean["recall_at_1"] == 0.75 and best["recall_at_1"] == 1.0
    assert mean["mean_sources"] == 1.5 and best["pick"] == "best"


def test_same_name_uses_only_training_pictures_of_the_name():
    # Pictures: cat in styles a, b, c (a is held out); dog in styles a and b.
    gallery = _flat(100, 110, 250, 240, 0)
    styles, names = ["a", "b", "c", "a", "b"], ["cat", "cat", "cat", "dog", "dog"]
    trained = [False, True, True, True, True]
    got = same_name_baseline([0], gallery, styles, names, trained)
    # Copy of b (110) is nearest to 100; copy of c (250) is nearest to the dog (240).
    assert got["recall_at_1"] == 0.5 and got["mean_sources"] == 2.0
    assert got["mean_candidates"] == 2.0 and got["interval"] == "cluster-bootstrap-95"
    best = same_name_baseline([0], gallery, styles, names, trained, pick="best")
    assert best["recall_at_1"] == 1.0
    json.dumps(got, allow_nan=False)


def test_errors_name_what_is_wrong():
    one = _flat(1)
    with pytest.raises(ValueError, match="no captions to search"):
        nearest_captions(["a"], [])
    with pytest.raises(ValueError, match="item 1 has no picture to copy"):
        copied_retrieval([np.array([0]), np.array([], int)], one, [0, 0], one)
    with pytest.raises(ValueError, match="1 lists of sources for 2 targets"):
        copied_retrieval([np.array([0])], one, [0, 0], one)
    with pytest.raises(ValueError, match="item 0 has no picture to copy"):
        same_name_baseline([0], one, ["a"], ["cat"], [False])
    with pytest.raises(ValueError, match="pick"):
        copied_retrieval([np.array([0])], one, [0], one, pick="worst")
    with pytest.raises(ValueError, match="2 captions with 1 pictures"):
        caption_baseline(["a"], [0], ["a", "b"], one, one)
