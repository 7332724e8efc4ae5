"""The bundled models: small, documented with what was measured, and able to draw what is asked."""

import json

import numpy as np
import pytest
import torch

from blockloom.pipelines.image import ImagePipeline, to_pixels
from blockloom.pipelines.params import bundled_models

MODELS = ("blockloom/emoji", "blockloom/emoji-flow")
SIZE_LIMIT = 12_000_000  # bytes of fp16 weights


@pytest.fixture(scope="module", params=MODELS)
def pipe(request) -> ImagePipeline:
    pipe = ImagePipeline.from_pretrained(request.param)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_small_and_safe(name):
    folder = bundled_models()[name]
    weights = list(folder.rglob("*.safetensors"))
    assert len(weights) == 2
    assert sum(file.stat().st_size for file in weights) <= SIZE_LIMIT
    kinds = {file.suffix for file in folder.rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("name", MODELS)
def test_the_card_states_what_eval_measured(name):
    folder = bundled_models()[name]
    card = (folder / "README.md").read_text()
    measured = json.loads((folder / "eval.json").read_text())
    figures = [f"{measured['reconstruction_psnr_db']:.1f} dB"]
    for split in ("train", "test_comp", "test_name"):
        found = measured["prompt_retrieval"][split]["retrieval"]
        figures += [f"{found[f'recall_at_{k}']:.2f}" for k in (1, 10)]
    baselines = measured["prompt_retrieval"]["test_comp"]
    figures += [
        f"{baselines[kind]['recall_at_10']:.2f}"
        for kind in ("nearest_caption_baseline", "same_name_baseline")
    ]
    for figure in figures:
        assert figure in card, f"{figure} is measured but not in the card"
    for word in ("CC BY-SA 4.0", "Apache", "MIT", "CC BY 4.0", "OpenMoji", "CPU"):
        assert word in card


def share_of(pixels: torch.Tensor, colour: str) -> float:
    """Share of pixels whose strongest channel, by a clear step, is the colour's."""
    red, green, blue = pixels
    others = {"red": (green, blue), "green": (red, blue), "blue": (red, green)}[colour]
    own = {"red": red, "green": green, "blue": blue}[colour]
    return float(((own - torch.maximum(*others)) > 0.25).float().mean())


def test_hearts_have_the_colour_they_are_asked_for(pipe):
    colours = ("red", "green", "blue")
    prompts = [f"{colour} heart, twemoji style" for colour in colours]
    pictures = torch.stack([to_pixels(image, 64)[0] for image in pipe(prompts, seed=0).images])
    shares = np.array([[share_of(p, colour) for colour in colours] for p in pictures])
    assert (shares.argmax(1) == np.arange(3)).all(), shares.round(2)
    assert shares.diagonal().min() > 0.15


def test_different_words_and_seeds_give_different_pictures(pipe):
    one, other = pipe(["grinning face, noto style", "pizza, noto style"], seed=1).tokens
    assert not torch.equal(one, other)
    again = pipe("grinning face, noto style", seed=1).tokens[0]
    assert torch.equal(again, one)


def test_redrawing_the_right_half_keeps_the_left_bit_for_bit(pipe):
    start = pipe("red apple, noto style", seed=3)
    keep = np.zeros((64, 64), dtype=bool)
    keep[:, :32] = True
    edited = pipe("red apple, noto style", seed=4, image=start.images[0], keep=keep)
    given = pipe.tokenizer.encode(to_pixels(start.images[0], 64))[0]
    cells = torch.tensor([row * 4 + column for row in range(4) for column in range(2)])
    assert torch.equal(edited.tokens[0][cells], given[cells])
    rest = torch.tensor([c for c in range(16) if c not in cells.tolist()])
    assert not torch.equal(edited.tokens[0][rest], given[rest])


def test_streaming_ends_in_the_picture_of_the_plain_call(pipe):
    *_, last = pipe.stream("soccer ball, openmoji style", seed=5, preview=False)
    assert last.kind == "done" and last.data["is_complete"]
    assert torch.equal(last.data["tokens"], pipe("soccer ball, openmoji style", seed=5).tokens)


def test_cached_and_recomputed_pictures_agree(pipe):
    cached = pipe("cat face, fluent-flat style", seed=6)
    slow = pipe("cat face, fluent-flat style", seed=6, use_cache=False)
    if cached.tokens.is_floating_point():
        assert float((cached.tokens - slow.tokens).abs().max()) < 1e-4
    else:
        assert torch.equal(cached.tokens, slow.tokens)


def test_the_folder_says_how_it_was_made():
    for folder in bundled_models().values():
        recipe = json.loads((folder / "recipe.json").read_text())
        assert recipe["cache"]["exact"] is True
        assert "path" not in recipe["tokenizer"]
        tokenizer = recipe["tokenizer"]
        if recipe["modality"] == "motion":
            assert tokenizer["latent_channels"] == 64
        else:
            assert tokenizer.get("image", tokenizer)["image_size"] == 64
