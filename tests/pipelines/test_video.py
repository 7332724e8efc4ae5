"""Videos: one result however they are asked for, frames that are given, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from blockloom.core.errors import UsageError
from blockloom.core.recipe import list_recipes, load_recipe
from blockloom.core.sampling import item_generator
from blockloom.models.video import LiveBlocks, WholeBlocks
from blockloom.pipelines.auto import AutoPipeline
from blockloom.pipelines.clip_frames import to_clip
from blockloom.pipelines.video import VideoPipeline
from blockloom.pipelines.video_checks import near_counts, prompt_plan
from blockloom.pipelines.world import WorldPipeline
from blockloom.tokenizers.structure import structure_map
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.run import initial_model, save_pipeline

TINY = (
    "condition.actions=0", "layout.frames=3", "cache.window=2", "backbone.dim=32",
    "backbone.layers=1", "backbone.heads=2", "text.dim=16", "text.buckets=32", "text.words=3",
)  # fmt: skip
CAUSAL = (
    "tokenizer={kind: video_kl, frame_size: [8, 8], spatial_stride: 4, temporal_stride: 2,"
    " widths: [8, 8, 16], encoder_depths: [1, 1, 1], decoder_depths: [1, 1, 1],"
    " latent_channels: 3}"
)
TOGETHER = ("layout.block=all", "layout.copies=1", "cache.write=none", "cache.window=null",
            "cache.exact=false", "mask=bidirectional")  # fmt: skip
SMALL = ("backbone.dim=32", "backbone.layers=1", "text.dim=16", "text.buckets=32")
PIPES = {
    "flow": ("video/teacher_forcing",),
    "flow_whole": ("video/teacher_forcing", "cache.window=null"),
    "fused": ("video/acdit",),
    "masked": ("video/masked", "tokenizer.image.patch=4"),
    "pairs": ("video/teacher_forcing", "layout.block=frames:2", "layout.frames=4"),
    "causal": ("video/teacher_forcing", CAUSAL),
    "together": ("video/teacher_forcing", *TOGETHER),
    "guided": ("video/teacher_forcing", "condition.structure=luma", "condition.structure_size=2"),
    "world": ("video/teacher_forcing", "condition.actions=3"),
}
_BUILT = {}


def pipe_of(name):
    """Build the pipeline of a tiny recipe once, with weights that make frames move."""
    if name not in _BUILT:
        recipe, *settings = PIPES[name]
        recipe = load_recipe(recipe, [*(SMALL if "/" in name else TINY), *settings])
        described = {key: part for key, part in recipe.tokenizer.items() if key != "train"}
        tokenizer = build_video_tokenizer(described).eval()
        model = initial_model(recipe, tokenizer, 0)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        pipe = VideoPipeline(tokenizer, model.eval())
        pipe.set_progress_bar_config(disable=True)
        _BUILT[name] = pipe
    return _BUILT[name]


def clip(name, count, seed=0):
    """Draw frames of four large squares each, which every tokenizer tells apart."""
    height, width = pipe_of(name).tokenizer.frame_size
    squares = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return squares.repeat(height // 2, 1).repeat(width // 2, 2)


def streamed(pipe, prompt="", **settings):
    events = list(pipe.stream(prompt, **settings))
    parts = [e.data["frames"] for e in events if e.kind == "decoded"]
    return np.concatenate(parts, 1), events


@pytest.mark.parametrize("name", [name for name in PIPES if name not in ("world", "guided")])
def test_a_call_is_its_stream_and_videos_are_those_made_alone(name):
    pipe, count = pipe_of(name), pipe_of(name).trained_frames + 4
    prompts = [["a red ball"], ["blue", "green"] if name != "together" else ["blue"]]
    called = pipe(prompts, num_frames=count, seed=3).frames
    assert called.shape[:2] == (2, count) and called.dtype == np.uint8
    frames, events = streamed(pipe, prompts, num_frames=count, seed=3)
    assert np.array_equal(called, frames) and events[-1].data == {"is_complete": True}
    for k, texts in enumerate(prompts):
        alone = pipe([texts], num_frames=count, generator=item_generator(3, k)).frames
        assert np.array_equal(alone[0], called[k])
    assert not np.array_equal(called[0], called[1])
    assert not np.array_equal(called[0, 0], called[0, 1]) or name == "together"


@pytest.mark.parametrize("name", list_recipes("video"))
def test_every_recipe_makes_and_goes_on_with_videos(name):
    PIPES[name] = (name, "backbone.heads=1")
    pipe = pipe_of(name)
    short = pipe.count_frames(None)
    is_guided = pipe.model.recipe.condition.structure != "none"

    def guide(count):
        return {"structure": clip(name, count, seed=5)} if is_guided else {}

    called = pipe([["a"], ["b"]], num_frames=short, seed=3, **guide(short)).frames
    item = item_generator(3, 1)
    alone = pipe("b", num_frames=short, generator=item, **guide(short)).frames
    assert np.array_equal(called[1], alone[0]) and not np.array_equal(called[0], called[1])
    step = pipe.tokenizer.step_frames * pipe.frames_per_block
    more = guide(short + step)
    longer = pipe("b", video=alone[0], num_frames=short + step, seed=4, **more).frames
    assert np.array_equal(longer[:, :short], alone) and longer.shape[1] == short + step


def test_structure_guides_every_frame():
    pipe, shape = pipe_of("guided"), clip("guided", 5, 1)
    made = pipe("a", structure=shape, seed=3).frames
    assert made.shape[1] == 5  # as many as the structure has
    assert np.array_equal(made, streamed(pipe, "a", structure=shape, seed=3)[0])
    luma = structure_map("luma", to_clip(shape))[0]
    pictures = [Image.fromarray(frame) for frame in shape]
    for same in (luma, luma.numpy(), luma.repeat_interleave(2, 1), pictures):
        assert np.array_equal(pipe("a", structure=same, seed=3).frames, made)
    other = shape.copy()
    other[3] = 255 - other[3]
    changed = pipe("a", structure=other, seed=3).frames
    assert np.array_equal(changed[:, :3], made[:, :3])
    assert not np.array_equal(changed[:, 3], made[:, 3])
    both = np.stack([shape, other])
    two = pipe([["a"], ["a"]], structure=both, generator=[item_generator(3, 0)] * 2).frames
    assert not np.array_equal(two[0, 3], two[1, 3])
    alone = pipe("a", structure=shape, generator=item_generator(3, 0)).frames
    first = pipe([["a"], ["a"]], structure=both, seed=3).frames[0]
    assert np.array_equal(first, alone[0])


@pytest.mark.parametrize(
    ("name", "structure", "settings", "message"),
    [
        ("guided", None, {}, r"guided by structure \(luma\); give a clip"),
        ("flow", "clip", {}, "takes no structure; leave it out"),
        ("guided", "clip", {"num_frames": 6}, r"number of structure maps .*got 4; allowed 6"),
        ("guided", np.zeros((4, 8), np.float32), {}, r"structure .*got \(4, 8\); allowed numbers"),
        ("guided", np.full((4, 8, 8), 1.5), {}, r"allowed numbers in \[0, 1\]"),
        ("guided", np.full((4, 8, 8), np.nan), {}, r"allowed numbers in \[0, 1\]"),
        ("guided", np.zeros((3, 4, 8, 8)), {}, "number of structures .*got 3; allowed 1"),
        ("guided", "frames.gif", {}, "structure"),
    ],
)
def test_structure_that_does_not_fit_is_refused(name, structure, settings, message):
    shape = clip(name, 4) if isinstance(structure, str) and structure == "clip" else structure
    with pytest.raises(UsageError, match=message):
        pipe_of(name)("a", structure=shape, **settings)


@pytest.mark.parametrize("name", ["flow", "fused", "masked", "pairs"])
def test_both_ways_of_making_a_video_give_the_same_bits(name, monkeypatch):
    pipe, given = pipe_of(name), clip(name, 2)
    settings = {"video": given, "num_frames": 10, "seed": 1, "guidance_scale": 2.0}
    live, events = streamed(pipe, ["a", "b", "c"], **settings)
    assert isinstance(pipe._job("", _settings(settings)).blocks, LiveBlocks)
    monkeypatch.setattr("blockloom.models.video.goes_on", lambda model: False)
    assert isinstance(pipe._job("", _settings(settings)).blocks, WholeBlocks)
    assert np.array_equal(live, streamed(pipe, ["a", "b", "c"], **settings)[0])
    assert any(e.kind == "row" for e in events)


def _settings(given):
    from blockloom.pipelines.video import _DEFAULTS

    return _DEFAULTS | given


@pytest.mark.parametrize("name", ["flow", "flow_whole", "masked", "pairs", "causal", "together"])
def test_given_frames_stay_and_lead_what_follows(name):
    pipe = pipe_of(name)
    count = 2 if name == "pairs" else 1
    total = 9 if name == "causal" else 8
    one, two = clip(name, count, 1), clip(name, count, 2)
    first = pipe(video=one, num_frames=total, seed=5).frames
    other = pipe(video=two, num_frames=total, seed=5).frames
    assert np.array_equal(first[0, :count], one) and np.array_equal(other[0, :count], two)
    assert not np.array_equal(first[0, count:], other[0, count:])
    picture = Image.fromarray(one[0])
    if count == 1:
        assert np.array_equal(first, pipe(image=picture, num_frames=total, seed=5).frames)


def test_a_video_goes_on_from_its_end():
    pipe = pipe_of("causal")
    start = pipe(num_frames=5, seed=1).frames[0]
    longer = pipe(video=start, num_frames=9, seed=2).frames[0]
    assert np.array_equal(longer[:5], start) and longer.shape[0] == 9
    # A first frame that fills no whole block: the video is laid out whole and still made.
    pairs = pipe_of("pairs")
    odd = pairs(image=clip("pairs", 1)[0], num_frames=4, seed=1).frames[0]
    assert np.array_equal(odd[0], clip("pairs", 1)[0]) and odd.shape[0] == 4
    assert isinstance(pairs._job("", _settings({"image": clip("pairs", 1)[0]})).blocks, WholeBlocks)


def test_frames_between_two_need_a_model_that_sees_the_end():
    pipe, ends = pipe_of("together"), clip("together", 2, 4)
    other = clip("together", 1, 5)[0]
    made = pipe(image=ends[0], last_image=ends[1], num_frames=5, seed=1).frames[0]
    moved = pipe(image=ends[0], last_image=other, num_frames=5, seed=1).frames[0]
    assert np.array_equal(made[0], ends[0]) and np.array_equal(made[-1], ends[1])
    assert not np.array_equal(made[1:4], moved[1:4])
    for name, match in (("flow", "cannot see it"), ("causal", "single frames")):
        with pytest.raises(UsageError, match=match):
            pipe_of(name)(last_image=clip(name, 1)[0], seed=1)


def test_prompts_change_from_their_block_on():
    pipe = pipe_of("flow")
    plain = pipe("red", num_frames=6, seed=2).frames
    turned = pipe(["red", "red", "red", "blue"], num_frames=6, seed=2).frames
    assert np.array_equal(plain[:, :3], turned[:, :3])
    assert not np.array_equal(plain[:, 3], turned[:, 3])


def test_actions_steer_and_may_leave_out_the_given_frames():
    pipe, start = pipe_of("world"), clip("world", 2)
    idle = pipe(video=start, num_frames=5, seed=1).frames
    turned = pipe(video=start, num_frames=5, seed=1, actions=[None, 1, None]).frames
    assert np.array_equal(idle[:, :3], turned[:, :3])
    assert not np.array_equal(idle[:, 3], turned[:, 3])
    rows = [[0, 0, 0]] * 3 + [[0, 1, 0], [0, 0, 0]]
    same = pipe(video=start, num_frames=5, seed=1, actions=np.array([rows], float)).frames
    assert np.array_equal(turned, same)
    world = WorldPipeline(pipe.tokenizer, pipe.model).start(start, seed=1)
    played = np.concatenate([world.step(action) for action in (None, 1, None)])
    assert np.array_equal(played, turned[0, 2:])


def test_an_interrupted_call_keeps_finished_frames_and_the_pipeline():
    pipe = pipe_of("flow")
    whole = pipe(num_frames=6, seed=1).frames

    def stop(pipe, index, level, tensors):
        assert tensors["latents"].isfinite().all()
        if index == 5:  # in the third block of two rows each
            pipe.interrupt()

    cut = pipe(num_frames=6, seed=1, callback_on_step_end=stop)
    assert not cut.is_complete and np.array_equal(cut.frames, whole[:, :2])
    assert np.array_equal(pipe(num_frames=6, seed=1).frames, whole)
    asked = iter([False, False, True])
    events = list(pipe.stream(num_frames=6, seed=1, should_stop=lambda: next(asked)))
    assert [e.kind for e in events].count("decoded") == 1 and not events[-1].data["is_complete"]


def test_pictures_and_tuples():
    pipe, settings = pipe_of("flow"), {"num_frames": 3, "seed": 1}
    frames, is_complete = pipe(output_type="pil", return_dict=False, **settings)
    assert is_complete and len(frames) == 1 and len(frames[0]) == 3
    expected = pipe(**settings).frames[0]
    assert np.array_equal(np.stack([np.asarray(f) for f in frames[0]]), expected)


@pytest.mark.parametrize(
    ("name", "settings", "match"),
    [
        ("flow", {"num_frames": 0}, "num_frames is 0; legal whole numbers; try 1"),
        ("flow", {"num_frames": 2.5}, "whole number"),
        ("pairs", {"num_frames": 7}, "num_frames is 7; legal 2n; try 6 or 8"),
        ("causal", {"num_frames": 80}, r"num_frames is 80; legal 2n\+1; try 79 or 81"),
        ("flow", {"num_frames": 2, "video": 3}, "above the 3 given; try 4"),
        ("causal", {"video": 4}, r"given frames is 4; legal 2n\+1; try 3 or 5"),
        ("flow", {"prompt": []}, "prompt"),
        ("flow", {"prompt": None}, "NoneType"),
        ("flow", {"prompt": ["a", 3]}, "prompt item"),
        ("flow", {"prompt": "x" * 100_001}, "at most 100000"),
        ("flow", {"prompt": ["a"] * 9, "num_frames": 4}, "number of prompts.*at most 4; try 4"),
        ("flow", {"num_inference_steps": 0}, "num_inference_steps.*try 1"),
        ("flow", {"guidance_scale": float("nan")}, "guidance_scale"),
        ("flow", {"temperature": -1}, "temperature.*try 0"),
        ("flow", {"num_videos_per_prompt": 0}, "num_videos_per_prompt.*try 1"),
        ("flow", {"output_type": "pt"}, "output_type"),
        ("flow", {"actions": [0]}, "takes no actions"),
        ("world", {"actions": [0], "num_frames": 3}, "number of actions.*3"),
        ("world", {"actions": [0, 0, 3], "num_frames": 3}, "0 to 2; try 2"),
        ("flow", {"video": 1, "image": Image.new("RGB", (8, 8))}, "pass one of them"),
        ("flow", {"image": np.zeros((8, 8))}, "image is not legal"),
        ("flow", {"video": np.zeros((0, 8, 8, 3), np.uint8)}, "at least one frame"),
        ("flow", {"video": np.zeros((2, 8, 8, 3))}, "float64"),
        ("flow", {"generator": [torch.Generator()] * 2}, "number of generators"),
    ],
)
def test_bad_requests_name_the_way_out_and_leave_the_pipeline(name, settings, match):
    pipe = pipe_of(name)
    if isinstance(settings.get("video"), int):
        settings = settings | {"video": clip(name, settings["video"])}
    with pytest.raises(UsageError, match=match) as found:
        pipe(**settings)
    assert "\n" not in str(found.value)
    with pytest.raises(UsageError, match="stream setting"):
        next(pipe.stream(frames=3))


def test_near_counts_and_prompt_plans():
    tokenizer = pipe_of("causal").tokenizer
    assert near_counts(tokenizer, 1, 80) == [79, 81]
    assert near_counts(tokenizer, 1, 81) == [81]
    assert near_counts(tokenizer, 3, 1) == [5]
    assert near_counts(tokenizer, 3, 12) == [11, 17]
    assert prompt_plan("a") == [["a"]] and prompt_plan(["a", "b"]) == [["a", "b"]]
    assert prompt_plan([["a"], ["b", "c"]]) == [["a"], ["b", "c"]]


@pytest.mark.parametrize(("name", "kind"), [("flow", VideoPipeline), ("world", WorldPipeline)])
def test_saved_models_open_as_what_they_are(name, kind, tmp_path):
    pipe = pipe_of(name)
    save_pipeline(tmp_path / "saved", pipe.model, pipe.tokenizer)
    again = AutoPipeline.from_pretrained(str(tmp_path / "saved"))
    assert type(again) is kind
    videos = VideoPipeline.from_pretrained(str(tmp_path / "saved"))
    videos.set_progress_bar_config(disable=True)
    settings = {"num_frames": 3, "seed": 1}
    assert videos("a", **settings).frames.shape == pipe("a", **settings).frames.shape
