"""Training on clips end to end: stages, resume, the pipeline folder; and what is refused."""

import json
import shutil

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError, UsageError
from blockloom.core.recipe import load_recipe
from blockloom.core.sampling import item_generator
from blockloom.models.live import LiveRollout
from blockloom.tokenizers.video_build import build_video_tokenizer, load_video_tokenizer
from blockloom.training.clip_archive import save_clip_archive
from blockloom.training.clip_run import (
    clip_model_stage,
    clip_psnr,
    frame_psnr,
    held_out_clips,
    load_clip_data,
)
from blockloom.training.clip_stage import PixelWindows
from blockloom.training.clips import ClipDataset
from blockloom.training.physics import physics_clips
from blockloom.training.run import build_model, load_pipeline_parts, train
from blockloom.training.selfcheck import mask_self_check

TINY = [
    "modality=video", "layout.kind=frames", "layout.block=frame", "layout.frames=3",
    "cache.window=2", "backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16",
    "text.words=3", "train.batch_size=4", "train.warmup=0",
]  # fmt: skip
PATCH = "tokenizer={kind: frames, image: {kind: patch, image_size: 8, patch: 4}}"
PALETTE = "tokenizer={kind: frames, image: {kind: palette, image_size: 8, patch: 4}}"
LIGHT = (
    "tokenizer={kind: frames, image: {kind: light, image_size: 16, stride: 8, patch: 4, width: 8,"
    " latent_channels: 3}, train: {num_steps: 3, batch_size: 8}}"
)
CAUSAL = (
    "tokenizer={kind: video_kl, frame_size: [8, 8], spatial_stride: 4, temporal_stride: 2,"
    " widths: [8, 8, 16], encoder_depths: [1, 1, 1], decoder_depths: [1, 1, 1],"
    " latent_channels: 3, train: {num_steps: 1, batch_size: 2, frames: 5}}"
)


def tiny_recipe(tokenizer=PATCH, *overrides, name="image/acdit"):
    return load_recipe(name, [*TINY, tokenizer, *overrides])


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Five clips of 8 x 8 pixels with pushes; one of them is held out."""
    path = tmp_path_factory.mktemp("clips") / "clips.npz"
    save_clip_archive(physics_clips(4, 1, num_frames=5, size=8, pushes=True), path)
    return path


@pytest.mark.parametrize(
    ("tokenizer", "name", "actions"),
    [(PATCH, "image/acdit", 4), (PALETTE, "image/block_masked", 4), (CAUSAL, "image/acdit", 8)],
)
def test_a_run_leaves_a_folder_whose_model_goes_on(archive, tmp_path, tokenizer, name, actions):
    recipe = tiny_recipe(tokenizer, f"condition.actions={actions}", name=name)
    report = train(recipe, archive, tmp_path / "run", steps=2, progress=False)
    assert report["model"]["step"] == 2 and report["model"]["skipped"] == 0
    model, loaded = load_pipeline_parts(tmp_path / "run" / "final")
    assert model.recipe.modality == "video" and model.recipe.condition.actions == actions
    index = json.loads((tmp_path / "run" / "final" / "model_index.json").read_text())
    assert index["_class_name"] == "WorldPipeline"
    with torch.no_grad():
        live = LiveRollout(model, ["a red ball"], [item_generator(0, 0)], num_steps=1)
        values = torch.cat([live.step(torch.zeros(1, 1, actions)) for _ in range(3)])
        pixels = loaded.decode(values[None])
    stride = loaded.temporal_stride
    assert pixels.shape == (1, 3, 1 + 2 * stride, 8, 8) and bool(pixels.isfinite().all())


def test_a_run_that_is_cut_off_goes_on_to_the_same_weights(archive, tmp_path):
    recipe = tiny_recipe(PATCH, "condition.actions=4", "train.save_every=2", "train.steps=4")
    whole = train(recipe, archive, tmp_path / "one", progress=False)
    half = tmp_path / "two"
    train(recipe, archive, half, progress=False)
    # As if the run had been killed after the checkpoint of step 2.
    (newest,) = (half / "model" / "checkpoints").glob("*4")
    shutil.rmtree(newest)
    train(recipe, archive, half, resume=True, progress=False)
    one, _ = load_pipeline_parts(tmp_path / "one" / "final")
    two, _ = load_pipeline_parts(half / "final")
    assert whole["model"]["step"] == 4
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name])


def test_the_tokenizer_is_trained_measured_and_stored(tmp_path):
    path = tmp_path / "clips.npz"
    save_clip_archive(physics_clips(4, 1, num_frames=5, size=16), path)
    recipe = tiny_recipe(LIGHT)
    report = train(recipe, path, tmp_path / "run", stage="tokenizer", progress=False)
    assert report["tokenizer"]["step"] == 3
    tokenizer = load_video_tokenizer(tmp_path / "run" / "tokenizer" / "final")
    clips = load_clip_data(recipe, path, tokenizer)
    train_clips = clips.only("train")
    frames = PixelWindows(train_clips, 1).pixels(torch.arange(20))
    with torch.no_grad():
        values = tokenizer.encode(frames).flatten(0, 2)
    # fp16 weights: the measured latents have mean 0 and deviation 1 up to their rounding.
    assert values.mean(0).abs().max() < 0.02 and (values.std(0) - 1).abs().max() < 0.03
    held_out = PixelWindows(held_out_clips(clips), 1)
    assert report["tokenizer"]["held_out_psnr_db"] == pytest.approx(
        clip_psnr(tokenizer, held_out), abs=0.05
    )
    # The model stage finds it and trains no tokenizer.
    again = train(recipe, path, tmp_path / "run", stage="model", steps=1, progress=False)
    assert "tokenizer" not in again and again["model"]["step"] == 1


def test_items_are_windows_and_the_mask_is_checked_on_them(archive, tmp_path):
    recipe = tiny_recipe(PATCH, "condition.actions=4")
    tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    clips = load_clip_data(recipe, archive, tokenizer)
    model = build_model(recipe, tokenizer)
    stage = clip_model_stage(model, tokenizer, clips, tmp_path)
    assert stage.num_items == 4 * 3 and stage.values.shape == (12, 12, 48)
    item = torch.tensor([4])  # the second window of the second clip
    pixels = clips.window(torch.tensor([1]), 4).pixels()[:, :, 1:]
    torch.testing.assert_close(stage.values[item], tokenizer.encode(pixels).flatten(1, 2))
    led = torch.eye(4)[clips.clip_actions(1)[:3]]
    assert torch.equal(stage.actions[item][0], led)
    ids = model.text_encoder.tokenize(clips.captions[1:2])
    assert torch.equal(stage.prompt_ids[item], ids)
    # Two copies of three frames of four cells; the first clean frame is hidden from none but few.
    assert mask_self_check(stage, torch.Generator().manual_seed(0)) >= 4
    # An untrained head predicts no noise: the loss is its variance.
    loss, _ = stage.loss(torch.arange(12), torch.Generator().manual_seed(0), 0)
    assert float(loss.detach()) == pytest.approx(1.0, rel=0.1)


def test_each_split_is_encoded_from_its_own_clips(tmp_path):
    recipe = tiny_recipe(PATCH)
    tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    clips = physics_clips(4, 2, seed=0, num_frames=4, size=8)
    model = build_model(recipe, tokenizer)
    for split, count in (("train", 4), ("held_out", 2)):
        stage = clip_model_stage(model, tokenizer, clips, tmp_path, split)
        assert len(stage.values) == 2 * count  # windows of three of four frames
        first = clips.only(split).window(torch.tensor([0]), 3).pixels()
        item = stage.values[torch.tensor([0])]
        torch.testing.assert_close(item, tokenizer.encode(first).flatten(1, 2))
        ids = model.text_encoder.tokenize(clips.only(split).captions[:1])
        assert torch.equal(stage.prompt_ids[torch.tensor([0])], ids)


def test_clips_that_do_not_fit_the_recipe_are_refused(archive, tmp_path):
    tokenizer = build_video_tokenizer(dict(tiny_recipe().tokenizer)).eval()
    with pytest.raises(DataError, match=r"are 4 ids; set condition\.actions to 4"):
        load_clip_data(tiny_recipe(PATCH, "condition.actions=3"), archive, tokenizer)
    with pytest.raises(DataError, match=r"set layout\.frames to 5 or less"):
        train(tiny_recipe(PATCH, "layout.frames=6"), archive, tmp_path / "run", progress=False)
    wide = ClipDataset(np.zeros((5, 8, 12, 3), np.uint8), np.array([0, 5]), ["a"], ["train"])
    save_clip_archive(wide, tmp_path / "wide.npz")
    with pytest.raises(DataError, match="12x8"):
        load_clip_data(tiny_recipe(), tmp_path / "wide.npz", tokenizer)
    (tmp_path / "data.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="unknown kind"):
        load_clip_data(tiny_recipe(), tmp_path / "data.parquet", tokenizer)


def test_modalities_without_training_are_refused(archive, tmp_path):
    recipe = tiny_recipe().model_copy(update={"modality": "audio"})
    with pytest.raises(UsageError, match="modality 'audio'; allowed image, video"):
        train(recipe, archive, tmp_path, progress=False)


def test_decibels_are_of_every_frame():
    target = torch.zeros(1, 3, 2, 4, 4)
    pixels = target.clone()
    pixels[:, :, 1] = 0.2
    assert frame_psnr(pixels, target)[0].tolist() == pytest.approx([126.0, 20.0], abs=0.1)
