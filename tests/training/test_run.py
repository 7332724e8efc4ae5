"""Runs end to end: the latent cache, the pipeline folder, and going on from a trained model."""

import json

import numpy as np
import pytest
import torch

from blockloom.core.errors import ModelError
from blockloom.core.recipe import load_recipe
from blockloom.pipelines.image import ImagePipeline
from blockloom.tokenizers.build import build_tokenizer
from blockloom.training.data import ImageDataset
from blockloom.training.run import (
    build_model,
    encoded,
    load_pipeline_parts,
    needs_training,
    save_pipeline,
    start_from,
    train,
)

TINY = ["backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16", "text.words=3"]


@pytest.fixture
def tokenizer():
    return build_tokenizer({"kind": "palette", "image_size": 16, "patch": 4}).eval()


@pytest.fixture
def dataset() -> ImageDataset:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
    return ImageDataset(images, [f"thing {i}" for i in range(6)], ["train"] * 6)


def tiny_recipe(*overrides: str):
    tokenizer = "tokenizer={kind: palette, image_size: 16, patch: 4}"
    return load_recipe("image/block_masked", [*TINY, tokenizer, *overrides])


def test_the_latent_cache_is_read_back_and_belongs_to_its_data(tokenizer, dataset, tmp_path):
    first = encoded(tokenizer, dataset, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    assert torch.equal(encoded(tokenizer, dataset, tmp_path), first)
    assert file.stat().st_mtime_ns == written
    assert torch.equal(first, tokenizer.encode(dataset.pixels(torch.arange(6))))
    other = ImageDataset(255 - dataset.images, dataset.captions, dataset.split)
    assert not torch.equal(encoded(tokenizer, other, tmp_path), first)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_going_on_from_a_trained_model_copies_its_weights(tokenizer, tmp_path):
    trained = build_model(tiny_recipe(), tokenizer)
    save_pipeline(tmp_path, trained, tokenizer)
    fresh = build_model(tiny_recipe(), tokenizer)
    assert not torch.equal(fresh.backbone.mask_row, trained.backbone.mask_row)
    start_from(fresh, tmp_path)
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(tensor, trained.state_dict()[name].half().float())


def test_going_on_from_another_shape_is_refused(tokenizer, tmp_path):
    save_pipeline(tmp_path, build_model(tiny_recipe(), tokenizer), tokenizer)
    with pytest.raises(ModelError, match="does not fit"):
        start_from(build_model(tiny_recipe("backbone.dim=48"), tokenizer), tmp_path)


def test_a_run_leaves_a_folder_that_draws_and_names_no_machine_path(dataset, tmp_path):
    np.savez(
        tmp_path / "data.npz", images=dataset.images, captions=np.array(dataset.captions),
        split=np.zeros(6, np.uint8), split_names=np.array(["train"]),
    )  # fmt: skip
    steps = ["train.batch_size=2", "train.warmup=0"]
    first = train(
        tiny_recipe(*steps), tmp_path / "data.npz", tmp_path / "one", steps=2, progress=False
    )
    go_on = f"train.init_from={first['out']}"
    again = train(
        tiny_recipe(*steps, go_on), tmp_path / "data.npz", tmp_path / "two", steps=1, progress=False
    )
    model, tokenizer = load_pipeline_parts(tmp_path / "two" / "final")
    assert not needs_training(tokenizer)
    assert model.recipe.train.init_from is None
    for file in (tmp_path / "two" / "final").rglob("*.json"):
        assert str(tmp_path) not in json.dumps(json.loads(file.read_text()))
    pipe = ImagePipeline.from_pretrained(again["out"])
    pipe.set_progress_bar_config(disable=True)
    assert pipe("thing 1", seed=0).is_complete
