"""Evaluation of drawn pictures: a perfect and a wrong painter get the numbers they deserve."""

import numpy as np
import pytest
from PIL import Image

from blockloom.training.data import ImageDataset
from blockloom.training.pictures import (
    chosen_items,
    contact_rows,
    evaluate_pictures,
    held_out_items,
    name_and_style,
)

STYLES = ("flat", "3d")


@pytest.fixture
def dataset() -> ImageDataset:
    rng = np.random.default_rng(0)
    names = [f"thing {i}" for i in range(12)]
    captions = [f"{name}, {style} style" for style in STYLES for name in names]
    images = rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8)
    split = ["test" if i in (1, 5, 18) else "train" for i in range(24)]
    return ImageDataset(images, captions, split)


def test_captions_split_at_the_last_comma():
    assert name_and_style("salt, and pepper, flat style") == ("salt, and pepper", "flat style")
    assert name_and_style("a red circle") == ("a red circle", "")


def test_a_perfect_painter_is_always_nearest_and_a_copyist_never(dataset, tmp_path):
    right = dict(zip(dataset.captions, dataset.images, strict=True))
    sheet = tmp_path / "sheet.png"
    report = evaluate_pictures(
        dataset, lambda p: np.stack([right[c] for c in p]), None, sheet=sheet
    )["prompt_retrieval"]
    assert set(report) == {"train", "test"}
    assert report["train"]["retrieval"]["recall_at_1"] == 1.0
    assert report["test"]["retrieval"]["recall_at_1"] == 1.0
    assert report["test"]["retrieval"]["mean_candidates"] == 12
    assert report["test"]["same_name_baseline"]["num_items"] == 3
    assert "nearest_caption_baseline" not in report["train"]
    with Image.open(sheet) as image:
        assert image.size == (12 * 16, 6 * 16 + 3 * 6)

    shifted = {c: dataset.images[(i + 1) % 24] for i, c in enumerate(dataset.captions)}
    wrong = evaluate_pictures(dataset, lambda p: np.stack([shifted[c] for c in p]), None)
    assert wrong["prompt_retrieval"]["train"]["retrieval"]["recall_at_1"] == 0.0


def test_items_are_chosen_by_the_seed(dataset):
    assert (
        chosen_items(dataset, "train", 5, 3).tolist()
        == chosen_items(dataset, "train", 5, 3).tolist()
    )
    assert len(set(map(tuple, (chosen_items(dataset, "train", 5, s) for s in range(6))))) > 1
    assert chosen_items(dataset, "test", None, 0).tolist() == [1, 5, 18]
    assert held_out_items(dataset).captions == [dataset.captions[i] for i in (1, 5, 18)]


def test_a_row_of_drawings_stands_under_its_originals(dataset):
    rows = contact_rows(dataset.images[:5], dataset.images[5:10], seed=0)
    assert len(rows) == 2
    order = np.random.default_rng(0).permutation(5)
    assert (rows[0][:, :16] == dataset.images[order[0]]).all()
    assert (rows[1][:, :16] == dataset.images[5 + order[0]]).all()
    assert (rows[0][:, 5 * 16 :] == 255).all()
