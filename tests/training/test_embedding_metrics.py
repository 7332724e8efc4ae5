"""Metrics of vectors against values worked out by hand."""

import itertools
import math

import numpy as np
import pytest

from blockloom.core.errors import DataError
from blockloom.training.embedding_metrics import (
    distances,
    diversity,
    jackknife_interval,
    matched_distances,
    multimodality,
    precision_hits,
    ratio_interval,
    with_interval,
)
from blockloom.training.frechet import frechet_of_features


def test_r_precision_among_all_texts_counts_ranks():
    texts = np.array([[0.0], [1.0], [2.0], [3.0]])
    items = np.array([[0.1], [1.2], [0.9], [9.0]])
    hits = precision_hits(items, texts, np.array([0, 2, 2, 0]), pool=4)  # ranks 1, 2, 3, 4
    assert hits[1].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert hits[2].tolist() == [1.0, 1.0, 0.0, 0.0]
    assert hits[3].tolist() == [1.0, 1.0, 1.0, 0.0]


def test_r_precision_expects_over_all_pools():
    """Against the plain count over every pool of three of six texts."""
    rng = np.random.default_rng(3)
    texts, items = rng.normal(size=(6, 2)), rng.normal(size=(5, 2))
    target = np.array([0, 5, 2, 2, 4])
    hits = precision_hits(items, texts, target, pool=3)
    far = distances(items, texts)
    for k in (1, 2, 3):
        for row, right in enumerate(target):
            others = [t for t in range(6) if t != right]
            found = [
                sum(far[row, t] <= far[row, right] for t in pool) < k
                for pool in itertools.combinations(others, 2)
            ]
            assert hits[k][row] == pytest.approx(np.mean(found))
    assert hits[3].tolist() == [1.0] * 5


def test_r_precision_of_permuted_texts_is_chance_and_ties_count_against():
    texts = np.eye(8)
    every = [
        precision_hits(texts, texts, np.roll(np.arange(8), shift)) for shift in range(8)
    ]  # every text as target of every motion once
    for k in (1, 2, 3):
        # The right one wins alone in one of eight; else all seven others tie or are nearer.
        assert np.mean([hits[k] for hits in every]) == pytest.approx(1 / 8)
    rng = np.random.default_rng(0)
    items, words = rng.normal(size=(4000, 3)), rng.normal(size=(8, 3))
    hits = precision_hits(items, words, rng.integers(8, size=4000))
    for k in (1, 2, 3):
        assert hits[k].mean() == pytest.approx(k / 8, abs=0.03)


def test_r_precision_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="1 targets for 2 items"):
        precision_hits(np.eye(2), np.eye(2), np.array([0]))
    with pytest.raises(DataError, match=r"targets 0\.\.2 of 2 texts"):
        precision_hits(np.eye(2), np.eye(2), np.array([0, 2]))


def test_distances_of_pairs_by_hand():
    items = np.array([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
    texts = np.array([[0.0, 1.0], [3.0, 0.0]])
    assert matched_distances(items, texts, np.array([0, 1, 0])) == pytest.approx([1.0, 4.0, 3.0])
    assert diversity(items) == pytest.approx((5 + 4 + 3) / 3)
    assert diversity(items[:1]) is None
    groups = [items, np.array([[1.0, 1.0], [1.0, 3.0]])]
    assert multimodality(groups) == pytest.approx([4.0, 2.0])
    with pytest.raises(DataError, match="group 1 has 1 item"):
        multimodality([items, items[:1]])


def test_frechet_distance_of_known_gaussians():
    """Two sets of exact mean and covariance: diagonal, so the trace term has a closed form."""
    pytest.importorskip("torchmetrics")
    base = np.array(list(itertools.product((-1.0, 1.0), repeat=2)))  # covariance 4/3 I (n - 1)
    one, two = base * [1.0, 2.0], base * [3.0, 1.0] + [4.0, -2.0]
    wanted = 16 + 4 + 4 / 3 * ((3 - 1) ** 2 + (2 - 1) ** 2)
    result = frechet_of_features(one, two, "by hand")
    assert result["frechet_distance"] == pytest.approx(wanted)
    assert result["extractor"] == "by hand" and not result["is_rank_deficient"]
    assert frechet_of_features(one, one, "x")["frechet_distance"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="at least 2 items"):
        frechet_of_features(one[:1], two, "x")
    with pytest.raises(DataError, match="equally many"):
        frechet_of_features(one[:, :1], two, "x")


def test_intervals_resample_whole_texts():
    values = np.array([1.0, 1.0, 0.0, 0.0])
    two = with_interval(values, ["a", "a", "b", "b"])
    assert two == {"value": 0.5, "interval": [0.0, 1.0], "n": 4}
    assert with_interval(values, ["a"] * 4)["interval"] == [0.5, 0.5]


def test_a_ratio_is_paired():
    base = np.array([1.0, 2.0, 4.0, 8.0])
    ratio = ratio_interval(base * 0.8, base, list("abcd"))
    assert ratio["value"] == pytest.approx(0.8)
    assert ratio["interval"] == pytest.approx([0.8, 0.8])  # the same in every resample
    assert ratio_interval(base, base * 0, list("abcd"))["value"] is None


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    low, high = jackknife_interval(lambda kept: float(values[kept].mean()), list("abcd"))
    half = 1.959963984540054 * values.std(ddof=1) / math.sqrt(4)
    assert (low, high) == pytest.approx((max(0.0, 4 - half), 4 + half))
    assert jackknife_interval(lambda kept: 1.0, ["a", "a"]) is None
