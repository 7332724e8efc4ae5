"""The tokenizer stage learns, stores averaged weights, and starts one tokenizer from another."""

import json

import numpy as np
import pytest
import torch

from blockloom.core.errors import ModelError
from blockloom.tokenizers.build import build_tokenizer, load_tokenizer
from blockloom.training.data import ImageDataset
from blockloom.training.loop import TrainConfig
from blockloom.training.runlog import RunLog
from blockloom.training.tokenizer_stage import (
    load_matching,
    mean_psnr,
    reconstruct,
    train_tokenizer,
)

NETWORK = {
    "image_size": 16,
    "patch": 2,
    "widths": (16, 32),
    "encoder_depths": (1, 1),
    "decoder_depths": (1, 1),
}


def squares(count: int, seed: int = 0) -> ImageDataset:
    """Draw coloured squares on coloured grounds."""
    generator = np.random.default_rng(seed)
    images = np.empty((count, 16, 16, 3), np.uint8)
    for image in images:
        image[:] = generator.integers(0, 256, 3)
        top, left = generator.integers(1, 7, 2)
        image[top : top + 8, left : left + 8] = generator.integers(0, 256, 3)
    return ImageDataset(images, [""] * count, ["train"] * count)


def config(steps: int) -> TrainConfig:
    return TrainConfig(
        num_steps=steps,
        batch_size=32,
        learning_rate=3e-3,
        warmup_steps=5,
        ema_decay=0.95,
        precision="fp32",
        progress=False,
    )


@pytest.mark.parametrize("kind", ["fsq", "sigma"])
def test_training_beats_the_mean_training_image(kind, tmp_path):
    torch.manual_seed(0)
    data, other = squares(96), squares(24, seed=1)
    tokenizer = build_tokenizer({"kind": kind, **NETWORK})
    report = train_tokenizer(tokenizer, data, config(60), tmp_path, held_out=other)
    stored = load_tokenizer(tmp_path / "final")
    error = ((other.images - data.images.mean(axis=0)) / 127.5).reshape(24, -1)
    baseline = float(np.mean(10 * np.log10(4 / (error**2).mean(axis=1))))
    assert report.step == 60
    assert mean_psnr(stored, other) > baseline + 2
    logged = RunLog(tmp_path / "log.jsonl").read()[-1]
    # The log measures before latents are standardised and rounded to float16.
    assert logged["eval_psnr"] == pytest.approx(mean_psnr(stored, other), abs=0.2)
    assert json.loads((tmp_path / "final" / "config.json").read_text())["image_size"] == 16


def test_stored_latents_are_standard(tmp_path):
    torch.manual_seed(0)
    data = squares(64)
    tokenizer = build_tokenizer({"kind": "sigma", "latent_channels": 8, **NETWORK})
    train_tokenizer(tokenizer, data, config(3), tmp_path)
    latents = load_tokenizer(tmp_path / "final").encode(data.pixels(torch.arange(64)))
    latents = latents.detach().flatten(0, 1)
    torch.testing.assert_close(latents.mean(0), torch.zeros(8), atol=0.02, rtol=0)
    torch.testing.assert_close(latents.std(0), torch.ones(8), atol=0.02, rtol=0)


def test_one_tokenizer_starts_from_another(tmp_path):
    torch.manual_seed(0)
    first = build_tokenizer({"kind": "fsq", "levels": (4, 4), "num_codebooks": 4, **NETWORK})
    first.save_pretrained(tmp_path)
    second = build_tokenizer({"kind": "sigma", "latent_channels": 6, **NETWORK})
    before = {name: value.clone() for name, value in second.state_dict().items()}
    copied = load_matching(second, tmp_path)
    own, theirs = second.state_dict(), first.state_dict()
    same = [n for n in own if n in theirs and theirs[n].shape == own[n].shape]
    assert copied == len(same)
    assert all(torch.equal(own[name], theirs[name]) for name in same)
    # 8 lattice axes against 6 channels: the two layers at the bottleneck do not fit.
    left = sorted(set(own) & set(theirs) - set(same))
    assert left == ["decoder.stem.weight", "encoder.head.bias", "encoder.head.weight"]
    assert all(torch.equal(own[name], before[name]) for name in left)


def test_nothing_to_start_from(tmp_path):
    tokenizer = build_tokenizer({"kind": "fsq", **NETWORK})
    with pytest.raises(ModelError, match="holds none of"):
        load_matching(tokenizer, tmp_path)


def test_reconstruct_in_parts_equals_at_once():
    torch.manual_seed(0)
    data = squares(5)
    tokenizer = build_tokenizer({"kind": "patch", "image_size": 16, "patch": 4})
    pixels = data.pixels(torch.arange(5))
    torch.testing.assert_close(reconstruct(tokenizer, data, 2), pixels)
    assert mean_psnr(tokenizer, data) > 100
