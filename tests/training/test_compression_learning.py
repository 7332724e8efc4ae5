"""Tokenizer and model learn physics: pictures come back, and each better guess costs fewer bits."""

from importlib import resources

import numpy as np
import pytest
import torch

from blockloom.core.recipe import load_recipe
from blockloom.pipelines.compression import VideoCompressor
from blockloom.tokenizers.video_build import build_video_tokenizer, load_video_tokenizer
from blockloom.training.clip_run import stage_of_clips, train_clip_tokenizer
from blockloom.training.clip_stage import PixelWindows, encode_clips
from blockloom.training.loop import TrainConfig, Trainer
from blockloom.training.physics import physics_clips
from blockloom.training.run import initial_model

RECIPE = resources.files("blockloom.configs") / "bundled" / "compression.yaml"
TOKENIZER = {"kind": "bsq_transformer", "frame_size": (16, 16), "patch": 4, "dim": 48, "heads": 2,
             "encoder_depth": 1, "decoder_depth": 2, "window": 3, "bits": 4,
             "num_codebooks": 2, "absolute_weight": 0.0, "square_weight": 4.0,
             "edge_weight": 0.0, "motion_weight": 0.0}  # fmt: skip
LOOP = {"precision": "fp32", "progress": False, "save_every": 10**6, "optimizer": "muon",
        "batch_size": 8, "ema_decay": 0.95, "warmup_steps": 10}  # fmt: skip


@pytest.mark.slow
def test_pictures_come_back_and_better_guesses_cost_fewer_bits(tmp_path):
    torch.manual_seed(0)
    data = physics_clips(96, 8, num_frames=12, size=16)
    tokenizer = build_video_tokenizer(TOKENIZER)
    config = TrainConfig(num_steps=400, learning_rate=5e-3, **LOOP)
    train_clip_tokenizer(tokenizer, data, config, tmp_path / "tokenizer", frames=4)
    tokenizer = load_video_tokenizer(tmp_path / "tokenizer" / "final")
    held_out = PixelWindows(data.only("held_out"), 12, 12)
    clips = held_out.pixels(torch.arange(8))
    with torch.no_grad():
        codes = tokenizer.encode(clips)
        error = float((tokenizer.decode(codes) - clips).square().mean())
    # The mean colour of every frame itself, which no tokenizer is told.
    mean_color = clips.mean(dim=(3, 4), keepdim=True)
    assert error < 0.5 * float((mean_color - clips).square().mean())

    recipe = load_recipe(str(RECIPE), ["backbone.dim=64", "backbone.layers=2", "backbone.heads=2"])
    model = initial_model(recipe, tokenizer, 0)
    train = data.only("train")
    values = encode_clips(tokenizer, train, tmp_path / "cache")
    stage = stage_of_clips(model, tokenizer, train, values)
    config = TrainConfig(num_steps=600, learning_rate=5e-3, **LOOP)
    trainer = Trainer(stage, config, tmp_path / "model")
    trainer.run()
    with trainer.averaged_weights():
        compressor = VideoCompressor(tokenizer, model, bytes(16))
    cost = {
        source: np.array([writer.ideal_bits for writer in compressor.write_many(codes, source)])
        for source in ("raw", "counts", "prior", "mixed")
    }
    total = {source: float(bits.sum()) for source, bits in cost.items()}
    assert total["raw"] == codes.numel() * 4
    assert total["prior"] < 0.9 * total["counts"] < 0.9 * total["raw"], total
    assert total["mixed"] < total["counts"], total
    payloads = [writer.content() for writer in compressor.write_many(codes[:2])]
    assert torch.equal(compressor.read_many(payloads, 12, "mixed"), codes[:2])
