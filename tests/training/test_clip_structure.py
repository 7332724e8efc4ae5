"""Structure of encoded clips: a window has the maps of its frames, and training uses them."""

import pytest
import torch

from blockloom.core.recipe import load_recipe
from blockloom.tokenizers.structure import structure_map, structure_tokens
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.clip_learning import clip_learning_check
from blockloom.training.clip_run import stage_of_clips
from blockloom.training.clip_stage import ClipTokens, encode_clips, latent_offsets
from blockloom.training.clip_structure import ClipStructure, clip_structure
from blockloom.training.physics import physics_clips
from blockloom.training.run import initial_model

SIZES = ("backbone.dim=32", "backbone.layers=1", "text.dim=16", "text.buckets=32")
EDGES = ("condition.structure=edges", "condition.structure_size=2")


def setup(name="video/teacher_forcing", *extra):
    recipe = load_recipe(name, [*SIZES, *EDGES, *extra])
    tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    clips = physics_clips(6, 2, 0, num_frames=7, size=8, pushes=recipe.condition.actions > 0)
    return recipe, tokenizer, clips


def test_windows_are_told_the_maps_of_their_frames(tmp_path):
    recipe, tokenizer, clips = setup()
    rows = clip_structure(clips, recipe.condition, tokenizer)
    values = encode_clips(tokenizer, clips, tmp_path)
    assert rows.shape == (len(values), 16, 4)
    tokens = ClipTokens(values, latent_offsets(clips, tokenizer), 3)
    told = ClipStructure(rows, tokens.windows)[torch.tensor([0, 7])]
    window = clips.window(torch.tensor([0, 1]), 5).pixels()  # 5 windows of 3 frames per clip
    maps = structure_tokens(structure_map("edges", window), tokenizer, 2)
    torch.testing.assert_close(told[0], maps[0, :3].flatten(0, 1))
    torch.testing.assert_close(told[1], maps[1, 2:5].flatten(0, 1))


def test_frames_behind_the_end_of_a_clip_have_no_structure():
    recipe, tokenizer, clips = setup()
    rows = clip_structure(clips, recipe.condition, tokenizer)
    windows = ClipTokens(rows, latent_offsets(clips, tokenizer), 10, pad=True).windows
    told = ClipStructure(rows, windows)[torch.tensor([1])].unflatten(1, (10, 16))
    assert torch.equal(told[0, :7], rows[7:14]) and not bool(told[0, 7:].any())


@pytest.mark.parametrize("name", ["video/make_your_video", "video/acdit"])
def test_training_learns_from_the_maps(tmp_path, name):
    recipe, tokenizer, clips = setup(name)
    model = initial_model(recipe, tokenizer, 0)
    stage = stage_of_clips(model, tokenizer, clips, encode_clips(tokenizer, clips, tmp_path))
    torch.nn.init.normal_(model.head.out.weight, std=0.1)  # heads start at zero
    loss, _ = stage.loss(torch.arange(4), torch.Generator().manual_seed(0), 0)
    loss.backward()
    gradient = model.backbone.embed_structure.weight.grad
    assert gradient is not None and float(gradient.abs().max()) > 0
    with pytest.raises(ValueError, match="structure is missing"):
        type(stage)(model, stage.values, stage.prompt_ids, clips.captions, stage.actions)


@pytest.mark.slow
def test_structure_lowers_the_error_on_held_out_clips():
    """A second system, trained alike with and without edges."""
    settings = ("backbone.dim=32",)
    told, plain = (
        clip_learning_check(load_recipe("video/teacher_forcing", [*settings, *more]), 200)
        for more in (EDGES, ())
    )
    assert told.value < 0.95 * plain.value
    assert told.drawn_db > plain.drawn_db
