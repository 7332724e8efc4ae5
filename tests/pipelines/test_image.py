"""The picture pipeline: calls, streams, interrupts, editing, seeds, and what it refuses."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from blockloom.core.errors import ModelError, UsageError
from blockloom.core.recipe import list_recipes
from blockloom.core.sampling import item_generator
from blockloom.models.generator import GenerativeModel
from blockloom.pipelines.image import ImagePipeline, from_pixels, keep_cells, to_pixels
from blockloom.tokenizers.build import build_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
RECIPES = list_recipes("image")
PIPES: dict[str, ImagePipeline] = {}


@pytest.fixture
def pipe_for(tiny):
    def build(name: str, *overrides: str) -> ImagePipeline:
        key = " ".join([name, *overrides])
        if key not in PIPES:
            recipe = tiny.recipe(name, *overrides)
            kind = "palette" if recipe.head.kind == "categorical" else "patch"
            tokenizer: Any = build_tokenizer({"kind": kind, "image_size": 16, "patch": 4})
            sizes = (
                {"codebook_size": tokenizer.codebook_size}
                if kind == "palette"
                else {"latent_channels": tokenizer.latent_channels}
            )
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = GenerativeModel(recipe.model_dump(mode="json"), *tokenizer.grid, **sizes)
                with torch.no_grad():
                    for parameter in model.parameters():
                        if not bool(parameter.any()):
                            parameter.add_(torch.randn_like(parameter) * 0.1)
            pipe = ImagePipeline(tokenizer, model.eval())
            pipe.set_progress_bar_config(disable=True)
            PIPES[key] = pipe
        return PIPES[key]

    return build


def picture(seed=0):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 255, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(4, 0).repeat(4, 1))


@pytest.mark.parametrize("name", RECIPES)
def test_call_equals_stream_and_items_equal_single_calls(pipe_for, name):
    pipe = pipe_for(name)
    prompts = ["a red cat", "blue dog"]
    settings = {"seed": 3, "num_inference_steps": 2, "guidance_scale": 2.0}
    called = pipe(prompts, **settings)
    assert called.is_complete and [im.size for im in called.images] == [(16, 16)] * 2
    *events, done = pipe.stream(prompts, **settings, preview=False)
    assert torch.equal(done.data["tokens"], called.tokens) and done.data["is_complete"]
    assert [im.tobytes() for im in done.data["images"]] == [im.tobytes() for im in called.images]
    assert {e.kind for e in events} == {"row", "commit"}
    for item, prompt in enumerate(prompts):
        single = pipe(prompt, generator=item_generator(3, item), **(settings | {"seed": None}))
        assert torch.equal(single.tokens[0], called.tokens[item])
        assert single.images[0].tobytes() == called.images[item].tobytes()
    # A pipeline keeps nothing from one call to the next.
    assert torch.equal(pipe(prompts, **settings).tokens, called.tokens)
    slow = pipe(prompts, **settings, use_cache=False)
    assert (slow.tokens.float() - called.tokens.float()).abs().max() < 1e-2


@pytest.mark.parametrize("name", RECIPES)
def test_editing_keeps_the_kept_tokens_bit_for_bit(pipe_for, name):
    pipe, keep = pipe_for(name), np.zeros((16, 16), bool)
    keep[:, :8] = True
    given = pipe.tokenizer.encode(to_pixels(picture(), 16))
    output = pipe(
        "cat", image=picture(), keep=keep, seed=1, num_inference_steps=2, num_images_per_prompt=2
    )
    cells = torch.from_numpy(keep_cells(keep, (4, 4)).reshape(-1))
    for item in range(2):
        assert torch.equal(output.tokens[item, cells], given[0, cells])
    assert not torch.equal(output.tokens[0, ~cells], output.tokens[1, ~cells])
    kept = np.asarray(output.images[0])[:, :8].astype(int)
    assert np.abs(kept - np.asarray(output.images[1])[:, :8]).max() == 0


def test_several_pictures_per_prompt_and_generators(pipe_for):
    pipe = pipe_for("image/block_masked")
    many = pipe(["cat", "dog"], num_images_per_prompt=2, seed=5).tokens
    assert len(many) == 4 and not torch.equal(many[0], many[1])
    alone = pipe("dog", generator=item_generator(5, 2)).tokens
    assert torch.equal(alone[0], many[2])
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    both = pipe(["cat", "dog"], generator=seeds).tokens
    assert torch.equal(pipe("dog", generator=torch.Generator().manual_seed(2)).tokens[0], both[1])
    one = [pipe(["cat", "dog"], generator=torch.Generator().manual_seed(9)).tokens for _ in "ab"]
    assert torch.equal(one[0], one[1]) and not torch.equal(one[0][0], one[0][1])


@pytest.mark.parametrize("name", ["image/block_masked", "image/acdit", "image/llamagen"])
def test_interrupt_within_one_row_keeps_finished_work(pipe_for, name):
    pipe, rows = pipe_for(name), []

    def stop(pipe, index, level, tensors):
        rows.append(int(tensors["is_known"].sum()))
        if index == 5:
            pipe.interrupt()
        return {}

    settings = {"seed": 1, "num_inference_steps": 2}
    inputs = ["latents", "is_known"]
    output = pipe(
        "cat", **settings, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=inputs
    )
    assert len(rows) == 6 and not output.is_complete
    full = pipe("cat", **settings)
    assert full.is_complete  # the flag does not survive the call
    assert 0 < rows[-1] < 16
    done = rows[-1]  # blocks are in raster order
    assert torch.equal(output.tokens[0, : done - done % 4], full.tokens[0, : done - done % 4])
    seen: list[str] = []
    stop_early = {"preview": False, "should_stop": lambda: seen.count("row") >= 3}
    for event in pipe.stream("cat", **settings, **stop_early):
        seen.append(event.kind)
    assert seen.count("row") == 3 and event.kind == "done" and not event.data["is_complete"]
    assert event.data["images"][0].size == (16, 16)


def test_previews_show_what_is_known_and_a_check_elsewhere(pipe_for):
    pipe = pipe_for("image/block_masked")
    shown = [e for e in pipe.stream("cat", seed=0, num_inference_steps=2) if e.kind == "decoded"]
    assert len(shown) == 8
    early, final = (np.asarray(e.data["images"][0]) for e in (shown[1], shown[-1]))
    assert np.array_equal(early[:4], final[:4])  # the first row of blocks is done
    assert len(np.unique(early[8:].reshape(-1, 3), axis=0)) == 2  # the check
    assert shown[0].data["images"][0].size == (16, 16)


def test_output_types_agree(pipe_for):
    pipe = pipe_for("image/maskgit")
    made = {kind: pipe("cat", seed=0, output_type=kind) for kind in ("pil", "np", "pt", "latent")}
    array, tensor = made["np"].images, made["pt"].images
    assert array.shape == (1, 16, 16, 3) and tensor.shape == (1, 3, 16, 16)
    assert np.array_equal(array[0], tensor[0].permute(1, 2, 0).numpy())
    assert np.array_equal(np.round(array[0] * 255), np.asarray(made["pil"].images[0]))
    assert torch.equal(made["latent"].images, made["pil"].tokens)
    images, tokens, complete = pipe("cat", seed=0, return_dict=False)
    assert complete and torch.equal(tokens, made["pil"].tokens) and images[0].size == (16, 16)


def test_saved_pipelines_draw_the_same_bits(pipe_for, tmp_path):
    for name in ("image/block_masked", "image/mar"):
        pipe = pipe_for(name)
        pipe.save_pretrained(tmp_path / name)
        again = ImagePipeline.from_pretrained(tmp_path / name)
        again.set_progress_bar_config(disable=True)
        assert again.recipe_name == name and not again.model.training
        one, two = (p("cat", seed=2, num_inference_steps=2).tokens for p in (pipe, again))
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt": 3}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["cat", 4]}, "prompt item"),
        ({"prompt": "x" * 100_001}, "prompt length"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt"),
        ({"num_images_per_prompt": 257}, "try '256'"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_scale": -1.0}, "try '0\\.0'"),
        ({"temperature": 101.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": 0}, "top_k"),
        ({"height": 32}, "try '16'"),
        ({"output_type": "jpeg"}, "output_type"),
        ({"generator": [torch.Generator()] * 2}, "number of generators"),
        ({"negative_prompt": ["a", "b", "c"]}, "number of negative prompts"),
        ({"keep": np.ones((4, 4), bool)}, "keep needs image"),
        ({"image": picture()}, "need keep"),
        ({"image": picture(), "keep": np.ones((4, 4), bool)}, "keep covers every cell"),
        ({"image": picture(), "keep": np.ones((5, 4), bool)}, "keep shape"),
        ({"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}, "callback_on_step_end"),
    ],
)
def test_bad_settings_are_refused_before_anything_runs(pipe_for, settings, words):
    with pytest.raises(UsageError, match=words):
        pipe_for("image/maskgit")(**({"prompt": "cat"} | settings))


def test_unknown_stream_settings_and_callback_results_are_refused(pipe_for):
    pipe = pipe_for("image/maskgit")
    with pytest.raises(UsageError, match="stream setting"):
        list(pipe.stream("cat", stepz=3))
    with pytest.raises(UsageError, match="callback result"):
        pipe("cat", callback_on_step_end=lambda *_: {"prompt_embeds": 1})


def test_a_tokenizer_of_another_grid_is_refused(pipe_for):
    model = pipe_for("image/maskgit").model
    other: Any = build_tokenizer({"kind": "palette", "image_size": 32, "patch": 4})
    with pytest.raises(ModelError, match="does not fit a model of grid"):
        ImagePipeline(other, model)


def test_pixels_round_trip_and_transparency_is_white():
    array = np.asarray(picture(3))
    assert np.array_equal(np.asarray(from_pixels(to_pixels(array, 16), "pil")[0]), array)
    clear = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    assert torch.equal(to_pixels(clear, 16), torch.ones(1, 3, 16, 16))
    assert to_pixels(Image.new("L", (8, 8), 0), 16).shape == (1, 3, 16, 16)
    keep = np.ones((16, 16), bool)
    keep[0, 0] = False
    cells = keep_cells(keep, (4, 4))
    assert not cells[0, 0] and cells.sum() == 15  # a cell stays when all of its pixels do


@pytest.mark.parametrize("name", ["image/block_masked", "image/acdit"])
def test_tokens_of_an_earlier_picture_can_be_kept_without_decoding(pipe_for, name):
    pipe = pipe_for(name)
    first = pipe("a red cat", seed=1)
    keep = np.zeros((4, 4), dtype=bool)
    keep[:2] = True
    redrawn = pipe("blue dog", seed=2, latents=first.tokens, keep=keep)
    assert torch.equal(redrawn.tokens[:, :8], first.tokens[:, :8])
    assert not torch.equal(redrawn.tokens[:, 8:], first.tokens[:, 8:])


def test_tokens_that_do_not_fit_are_refused(pipe_for):
    pipe = pipe_for("image/block_masked")
    keep = np.zeros((4, 4), dtype=bool)
    codes = torch.zeros(1, 16, 1, dtype=torch.long)
    for latents, words in (
        (codes[:, :15], "latents shape"),
        (codes.float(), "latents dtype"),
        (codes - 1, "latents"),
        (codes + 99, "latents"),
    ):
        with pytest.raises(UsageError, match=words):
            pipe("a", latents=latents, keep=keep)
    with pytest.raises(UsageError, match="need keep"):
        pipe("a", latents=codes)
    with pytest.raises(UsageError, match="pass one"):
        pipe("a", latents=codes, image=picture(), keep=keep)
    flow = pipe_for("image/acdit")
    bad = torch.full((1, 16, flow.tokenizer.latent_channels), float("nan"))
    with pytest.raises(UsageError, match="finite"):
        flow("a", latents=bad, keep=keep)
