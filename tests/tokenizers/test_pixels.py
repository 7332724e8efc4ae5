"""Palette and patch tokenizers, checked on values worked out by hand."""

import pytest
import torch

from blockloom.tokenizers.base import join_patches, psnr, split_patches
from blockloom.tokenizers.losses import edge_loss, reconstruction_loss
from blockloom.tokenizers.pixels import PaletteTokenizer, PatchTokenizer


def test_palette_names_the_nearest_colour():
    tokenizer = PaletteTokenizer(image_size=4, patch=2)
    image = torch.full((1, 3, 4, 4), -1.0)
    image[0, 0, :2, 2:] = 1.0  # top right red
    image[0, :, 2:, :2] = 1.0  # bottom left white
    image[0, 2, 2:, 2:] = 0.5  # bottom right mostly blue
    assert tokenizer.encode(image)[0, :, 0].tolist() == [0, 1, 7, 4]


def test_palette_uses_the_mean_of_a_cell():
    tokenizer = PaletteTokenizer(image_size=2, patch=2, colors=[[0, 0, 0], [255, 255, 255]])
    image = torch.full((1, 3, 2, 2), -1.0)
    image[0, :, 0, 0] = 1.0
    assert tokenizer.encode(image).item() == 0
    image[0, :, 1, :] = 1.0
    assert tokenizer.encode(image).item() == 1


def test_palette_round_trip_of_every_code():
    tokenizer = PaletteTokenizer(image_size=8, patch=2)
    codes = torch.arange(16).remainder(8)[None, :, None]
    assert torch.equal(tokenizer.encode(tokenizer.decode(codes)), codes)


def test_patch_round_trip_and_order():
    tokenizer = PatchTokenizer(image_size=4, patch=2, mean=0.5, std=0.25)
    image = torch.linspace(-1, 1, 48).reshape(1, 3, 4, 4)
    latents = tokenizer.encode(image)
    expected = (torch.tensor([image[0, 0, 0, 2], image[0, 0, 0, 3]]) - 0.5) / 0.25
    assert torch.equal(latents[0, 1, :2], expected)
    torch.testing.assert_close(tokenizer.decode(latents), image)
    assert float(tokenizer.loss(image)[0]) == pytest.approx(0, abs=1e-12)


def test_patches_join_exactly():
    image = torch.rand(2, 3, 6, 4)
    assert torch.equal(join_patches(split_patches(image, 2), (3, 2), 2), image)
    with pytest.raises(ValueError, match=r"6x4.*patches of 4.*8x4"):
        split_patches(image, 4)


def test_psnr_closed_form():
    target = torch.zeros(1, 3, 2, 2)
    assert float(psnr(target + 0.2, target)) == pytest.approx(20.0, abs=1e-4)
    assert float(psnr(target, target)) > 100


def test_edge_loss_sees_slopes_not_offsets():
    target = torch.zeros(1, 1, 8, 8)
    assert float(edge_loss(target + 0.7, target)) == pytest.approx(0, abs=1e-6)
    step = target.clone()
    step[..., 4:] = 1
    # One of 7 horizontal differences is 1 at full size, one of 3 at half, one of 1 at quarter.
    assert float(edge_loss(step, target)) == pytest.approx((1 / 7 + 1 / 3 + 1) / 6)


def test_reconstruction_loss_weights_its_terms():
    target = torch.zeros(1, 3, 8, 8)
    total, metrics = reconstruction_loss(
        target + 0.5, target, absolute_weight=2.0, square_weight=4.0, edge_weight=8.0
    )
    assert float(total) == pytest.approx(2 * 0.5 + 4 * 0.25)
    assert metrics["psnr"] == pytest.approx(12.0412, abs=1e-3)
