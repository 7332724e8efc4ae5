"""Saved pipelines load again, whichever tokenizer they hold."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blockloom.core.recipe import load_recipe
from blockloom.models.generator import GenerativeModel
from blockloom.pipelines.auto import AutoPipeline
from blockloom.pipelines.image import ImagePipeline
from blockloom.pipelines.motion import MotionPipeline
from blockloom.pipelines.params import bundled_models
from blockloom.pipelines.video import VideoPipeline
from blockloom.pipelines.world import WorldPipeline
from blockloom.tokenizers.build import TOKENIZERS, build_tokenizer

LAST_BIT = 1e-6
MOVES = 0.05
"""Metres of spread over time of some joint: a body that stands still has none."""
SIZES = ["backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16"]


@pytest.mark.parametrize("kind", sorted(TOKENIZERS))
def test_diffusers_can_tell_how_to_load_the_class(kind: str) -> None:
    assert hasattr(sys.modules[TOKENIZERS[kind].__module__], "ModelMixin")


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("image/maskgit", {"kind": "fsq", "image_size": 16, "widths": [16, 16, 16]}),
        ("image/acdit", {"kind": "kl", "image_size": 16, "widths": [16, 16, 16]}),
    ],
)
def test_round_trip_draws_the_same(recipe: str, settings: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer: Any = build_tokenizer(settings)
    model = GenerativeModel(
        load_recipe(recipe, SIZES).model_dump(mode="json"),
        *tokenizer.grid,
        num_codebooks=max(tokenizer.num_codebooks, 1),
        codebook_size=tokenizer.codebook_size,
        latent_channels=tokenizer.latent_channels,
    )
    pipe = ImagePipeline(tokenizer.eval(), model.eval())
    pipe.save_pretrained(tmp_path / "saved")
    again = AutoPipeline.from_pretrained(str(tmp_path / "saved"))
    for one in (pipe, again):
        one.set_progress_bar_config(disable=True)
    one, two = (p("x", seed=3, num_inference_steps=2, output_type="np") for p in (pipe, again))
    assert torch.equal(one.tokens, two.tokens)
    # Loaded weights lie elsewhere in memory; kernels may round the last bit differently there.
    np.testing.assert_allclose(one.images, two.images, atol=LAST_BIT)


@pytest.mark.parametrize("name", bundled_models())
def test_bundled_models_load_and_draw_from_words(name: str) -> None:
    pipe = AutoPipeline.from_pretrained(name)
    pipe.set_progress_bar_config(disable=True)
    if isinstance(pipe, MotionPipeline):
        joints = pipe("walk", seed=1, seconds=0.8).motions[0].joints
        assert joints.shape == (16, 22, 3) and joints.std(0).max() > MOVES
        return
    if isinstance(pipe, WorldPipeline):
        picture = pipe.start(seed=1).step([0.0, 0.0, 0.0])[0]
    elif isinstance(pipe, VideoPipeline):
        picture = pipe("a fox, walk, dark background", seed=1, num_frames=1).frames[0][0]
    else:
        picture = pipe("red apple, noto style", seed=1, output_type="np").images[0]
    assert picture.shape == (64, 64, 3) and picture.std() > 0.05
