"""Frechet distance against its closed form, and the two extractors by hand."""

import json
import sys

import numpy as np
import pytest
import torch

from blockloom.core.errors import ResourceError
from blockloom.training.frechet import (
    PIXEL_EXTRACTOR,
    TOKENIZER_EXTRACTOR,
    frechet_distance,
    pixel_features,
    tokenizer_features,
)


def _noise(count: int, seed: int, low: int = 0, high: int = 256) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(low, high, (count, 16, 16, 3), dtype=np.uint8)


class _Columns:
    """A latent tokenizer of known values: the mean red of each quarter."""

    value = "latent"
    grid = (2, 2)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        cells = torch.nn.functional.avg_pool2d(pixels[:, :1], 8)
        return cells.flatten(2).transpose(1, 2)


def test_closed_form_for_independent_features():
    pytest.importorskip("torchmetrics")
    # Features (x) and (2x + 3): distance = |mean shift|^2 + (sigma - 2 sigma)^2, one dimension.
    pictures = _noise(50, 0)

    def first(images: np.ndarray) -> np.ndarray:
        values = images[:, 0, 0, :1].astype(np.float64) / 255
        return values if images is pictures else 2 * values + 3

    got = frechet_distance(pictures, pictures.copy(), first, "first-pixel")
    x = pictures[:, 0, 0, 0].astype(np.float64) / 255
    want = (x.mean() + 3) ** 2 + x.var(ddof=1)
    assert got["frechet_distance"] == pytest.approx(want, rel=1e-9)
    assert got["extractor"] == "first-pixel" and got["num_features"] == 1
    assert not got["is_rank_deficient"]
    json.dumps(got, allow_nan=False)


def test_equal_sets_are_at_zero_and_small_sets_are_flagged():
    pytest.importorskip("torchmetrics")
    got = frechet_distance(_noise(20, 0), _noise(20, 0), pixel_features, PIXEL_EXTRACTOR)
    assert got["frechet_distance"] < 1e-6
    assert got["is_rank_deficient"] and got["num_features"] == 192


def test_tokenizer_features_are_mean_deviation_and_quarters():
    pictures = np.zeros((1, 16, 16, 3), np.uint8)
    pictures[0, :8, :8, 0] = 255
    got = tokenizer_features(_Columns())(pictures)
    want = [[-0.5, 0.75**0.5, 1.0, -1.0, -1.0, -1.0]]
    np.testing.assert_allclose(got, want, atol=1e-6)
    many = tokenizer_features(_Columns())(_noise(130, 3))
    last = tokenizer_features(_Columns())(_noise(130, 3)[129:])
    np.testing.assert_allclose(many[129:], last, atol=1e-12)
    assert TOKENIZER_EXTRACTOR == "blockloom-tokenizer-features"


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="at least 2 pictures a side, got 1 real and 5"):
        frechet_distance(_noise(1, 0), _noise(5, 0), pixel_features, PIXEL_EXTRACTOR)
    codes = type("Codes", (), {"value": "code", "grid": (1, 1)})()
    with pytest.raises(ValueError, match="Codes has codes but no lookup"):
        tokenizer_features(codes)
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(ResourceError, match="pip install torchmetrics"):
        frechet_distance(_noise(5, 0), _noise(5, 0), pixel_features, PIXEL_EXTRACTOR)
