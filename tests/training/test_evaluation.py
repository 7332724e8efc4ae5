"""Evaluation on procedural pictures where every answer is known by hand."""

import json
import math

import numpy as np
import pytest

from blockloom.training.evaluation import (
    area_means,
    bootstrap_interval,
    psnr,
    retrieval,
    target_ranks,
    wilson_interval,
)


def _flat(*levels: int, side: int = 32) -> np.ndarray:
    return np.stack([np.full((side, side, 3), level, np.uint8) for level in levels])


def test_area_means_average_equal_cells():
    picture = np.zeros((1, 4, 4, 3), np.uint8)
    picture[0, :2, :2, 0] = 255
    picture[0, 0, 2, 2] = 51
    got = area_means(picture, 2).reshape(2, 2, 3)
    want = np.zeros((2, 2, 3))
    want[0, 0, 0], want[0, 1, 2] = 1.0, 0.05
    np.testing.assert_allclose(got, want, atol=1e-7)


def test_psnr_by_hand():
    got = psnr(_flat(100, 100), _flat(110, 100))
    first = 20 * math.log10(255 / 10)
    assert math.isclose(got["psnr_db"], (first + 100) / 2, rel_tol=1e-9)
    assert math.isclose(got["psnr_of_mean_error_db"], first + 10 * math.log10(2), rel_tol=1e-9)


def test_wilson_interval_known_values():
    low, high = wilson_interval(5, 10)
    assert math.isclose(low, 0.2366, abs_tol=1e-4) and math.isclose(high, 0.7634, abs_tol=1e-4)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0


def test_bootstrap_resamples_whole_clusters():
    values = np.array([1.0, 1.0, 0.0, 0.0] * 25)
    independent = bootstrap_interval(values, range(100))
    # One cluster is either all ones or all zeros: 2 clusters give the full range.
    clustered = bootstrap_interval(values, ["a", "a", "b", "b"] * 25)
    assert clustered == (0.0, 1.0)
    assert 0.35 < independent[0] < 0.45 and 0.55 < independent[1] < 0.65


def test_ranks_only_compete_inside_the_style_and_ties_count_against():
    gallery = _flat(0, 50, 100, 100, 0)
    styles = ["a", "a", "a", "a", "b"]
    ranks, sizes = target_ranks(_flat(60, 60, 60, 60), [1, 0, 2, 4], gallery, styles)
    assert ranks.tolist() == [1, 4, 3, 1]
    assert sizes.tolist() == [4, 4, 4, 1]


def test_retrieval_report():
    gallery = _flat(*range(0, 240, 12))  # 20 pictures
    generated = _flat(0, 13, 50, 12 * 13)
    got = retrieval(generated, [0, 1, 5, 1], gallery)
    # Ranks: 1, 1, 2 (50 is nearest to 48), 13.
    assert got["recall_at_1"] == 0.5 and got["recall_at_5"] == 0.75 and got["recall_at_10"] == 0.75
    assert (got["chance_at_1"], got["chance_at_5"], got["chance_at_10"]) == (0.05, 0.25, 0.5)
    assert got["recall_at_1_interval"] == list(wilson_interval(2, 4))
    assert got["descriptor"] == "rgb-16x16-area-mean-l2" and got["num_items"] == 4
    clustered = retrieval(generated, [0, 1, 5, 1], gallery, clusters=["x", "y", "y", "z"])
    assert clustered["interval"] == "cluster-bootstrap-95"
    json.dumps(clustered, allow_nan=False)


def test_perfect_and_size_independent():
    rng = np.random.default_rng(0)
    gallery = rng.integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    doubled = gallery.repeat(2, axis=1).repeat(2, axis=2)
    assert retrieval(doubled, range(12), gallery)["recall_at_1"] == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrieval(_flat(1, side=20), [0], _flat(1)), "20x20 do not split into 16x16"),
        (lambda: retrieval(_flat(1), [0, 1], _flat(1)), "1 generated pictures with 2 targets"),
        (lambda: retrieval(_flat(1), [3], _flat(1, 2)), r"target_index spans 3..3.*0..1"),
        (lambda: psnr(_flat(1), _flat(1, 2)), "differ in shape"),
        (lambda: psnr(_flat(1).astype(np.float32), _flat(1)), "must be uint8.*got float32"),
        (lambda: retrieval(_flat(1), [0], _flat(1), clusters=[1, 2]), "2 cluster labels for 1"),
    ],
)
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message):
        call()
