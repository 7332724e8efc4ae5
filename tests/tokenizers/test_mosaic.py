"""A mosaic: pictures of cells are picked from data, and images made of them come back exactly."""

import pytest
import torch
from einops import rearrange

from blockloom.core.errors import DataError
from blockloom.tokenizers.build import build_tokenizer
from blockloom.tokenizers.mosaic import MosaicTokenizer


def cells_and_images(kinds=5, images=12, side=4, cell=3, seed=0):
    """Draw byte pictures of cells, and images laid out with them."""
    rng = torch.Generator().manual_seed(seed)
    cells = torch.randint(256, (kinds, 3, cell, cell), generator=rng).float() / 127.5 - 1
    which = torch.randint(kinds, (images, side, side), generator=rng)
    pixels = cells[which].permute(0, 3, 1, 4, 2, 5).reshape(images, 3, side * cell, side * cell)
    return cells, which, pixels


def test_images_made_of_few_cells_come_back_exactly():
    _, which, pixels = cells_and_images()
    mosaic = MosaicTokenizer(12, 3, merge=2, codebook_size=5, border=0)
    assert mosaic.fit(pixels.split(5)) == 5
    assert (mosaic.grid, mosaic.num_tokens, mosaic.num_codebooks) == ((2, 2), 4, 4)
    codes = mosaic.encode(pixels)
    assert codes.shape == (12, 4, 4) and len(codes.unique()) == 5
    assert torch.allclose(mosaic.decode(codes), pixels, atol=1e-6)
    # A token holds the codes of its own four cells, in raster order: one name per kind of cell.
    expected = rearrange(which, "b (h m) (w n) -> b (h w) (m n)", m=2, n=2)
    names = set(zip(expected.flatten().tolist(), codes.flatten().tolist(), strict=True))
    assert len(names) == 5


def test_what_is_not_compared_does_not_split_a_picture():
    _, _, pixels = cells_and_images(kinds=3, cell=5)
    noisy = pixels.clone().unflatten(2, (4, 5)).unflatten(4, (4, 5))
    noisy[:, :, :, 0] = noisy[:, :, :, 0] * 0.5  # the upper edge of cells bleeds
    noisy = noisy.flatten(4, 5).flatten(2, 3)
    mosaic = MosaicTokenizer(20, 5, merge=1, codebook_size=8, border=1)
    assert mosaic.fit([pixels, noisy]) == 3
    assert torch.equal(mosaic.encode(pixels), mosaic.encode(noisy))


def test_a_margin_has_no_tokens_and_comes_back():
    _, _, pixels = cells_and_images()
    framed = torch.full((12, 3, 16, 16), -0.5)
    framed[:, :, 2:14, 2:14] = pixels
    mosaic = MosaicTokenizer(16, 3, merge=2, codebook_size=5, border=0, margin=2)
    assert mosaic.fit([framed]) == 5 and mosaic.num_tokens == 4
    assert torch.allclose(mosaic.decode(mosaic.encode(framed)), framed, atol=1e-6)
    error, metrics = mosaic.loss(framed)
    assert float(error.detach()) < 1e-10 and metrics["mse"] == float(error.detach())


def test_more_pictures_than_there_are_repeat_the_most_frequent():
    _, which, pixels = cells_and_images(kinds=3)
    mosaic = MosaicTokenizer(12, 3, merge=1, codebook_size=6, border=0)
    assert mosaic.fit([pixels]) == 3
    assert torch.equal(mosaic.pictures[3:], mosaic.pictures[:1].expand(3, -1, -1, -1))
    most = int(torch.bincount(which.flatten()).argmax())
    assert (mosaic.encode(pixels)[which.flatten(1) == most] == 0).all()


def test_fitting_is_repeatable_and_needs_images():
    _, _, pixels = cells_and_images()
    first, second = (MosaicTokenizer(12, 3, merge=2, codebook_size=4) for _ in range(2))
    first.fit([pixels])
    second.fit(pixels.split(3))
    assert torch.equal(first.pictures, second.pictures)
    with pytest.raises(DataError, match="no images to pick"):
        first.fit([])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_size": 30}, "nearest 32"),
        ({"codebook_size": 1}, "codebook_size is 1"),
        ({"border": 4}, "0 to 3"),
        ({"margin": 4}, "nearest"),
        ({"image_size": 64, "cells": 8}, "no setting 'cells'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        build_tokenizer({"kind": "mosaic", **settings})
    with pytest.raises(ValueError, match=r"\b8\b|12"):
        MosaicTokenizer(8, 4, merge=1).encode(torch.zeros(1, 3, 12, 12))
