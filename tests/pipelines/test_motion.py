"""Motions: one result however they are asked for, frames that are kept, and what is refused."""

import numpy as np
import pytest
import torch
from tests.tiny_motion import tiny_features

from blockloom.core.errors import BlockloomError, ModelError, UsageError
from blockloom.core.recipe import list_recipes, load_recipe
from blockloom.core.sampling import item_generator
from blockloom.models.video import LiveBlocks, WholeBlocks
from blockloom.motion.clip import Motion, fk_error
from blockloom.motion.features import HUMAN_SIZE
from blockloom.motion.procedural import procedural_motion
from blockloom.motion.skeleton import HUMAN22
from blockloom.pipelines.auto import AutoPipeline
from blockloom.pipelines.motion import _DEFAULTS, MotionPipeline
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.run import initial_model, save_pipeline

SMALL = ("backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16",
         "text.buckets=32", "text.words=3", "tokenizer.width=8")  # fmt: skip
PIPES = {
    "flow": ("motion/block_flow", "cache.window=2", "layout.frames=3", "schedule.steps=2"),
    "pairs": ("motion/block_flow", "layout.block=frames:2", "cache.window=2", "layout.frames=4"),
    "codes": ("motion/t2m_gpt", "layout.frames=3"),
    "levels": ("motion/mogo_levels", "layout.frames=3"),
    "all": ("motion/momask", "layout.frames=5"),
}
_BUILT = {}


def pipe_of(name):
    """Build the pipeline of a tiny recipe once, with weights that make bodies move."""
    if name not in _BUILT:
        recipe, *settings = PIPES[name]
        recipe = load_recipe(recipe, [*SMALL, *settings])
        described = {key: part for key, part in recipe.tokenizer.items() if key != "train"}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            tokenizer = build_video_tokenizer(described).eval()
        rows = np.stack([tiny_features("a person walks forward", 24, seed) for seed in range(3)])
        tokenizer.measure_features([torch.from_numpy(rows).transpose(1, 2)])
        model = initial_model(recipe, tokenizer, 0)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        pipe = MotionPipeline(tokenizer, model.eval())
        pipe.set_progress_bar_config(disable=True)
        _BUILT[name] = pipe
    return _BUILT[name]


def walk(frames=20, seed=0):
    """A motion whose joints follow from its rotations: what features say of a tiny walk."""
    from blockloom.motion.features import Start, features_to_motion

    rows = tiny_features("a person walks forward", frames, seed)
    return features_to_motion(rows, start=Start(1.0, 2.0, 0.3))


def streamed(pipe, prompt="", **settings):
    events = list(pipe.stream(prompt, **settings))
    parts = [e.data["joints"] for e in events if e.kind == "decoded"]
    return np.concatenate(parts, 1), events


def joints_of(output):
    return np.stack([motion.joints for motion in output.motions])


def blocks_of(pipe, **settings):
    return pipe._job("", _DEFAULTS | settings).blocks


@pytest.mark.parametrize("name", PIPES)
def test_a_call_is_its_stream_and_motions_are_those_made_alone(name):
    pipe = pipe_of(name)
    count = pipe.trained_frames + 8
    prompts = [["walk"], ["jump", "turn"] if name != "all" else ["jump"]]
    called = pipe(prompts, num_frames=count, seed=3)
    joints, events = streamed(pipe, prompts, num_frames=count, seed=3)
    assert np.array_equal(joints_of(called), joints) and called.is_complete
    assert joints.shape == (2, count, 22, 3) and events[-1].data == {"is_complete": True}
    for k, texts in enumerate(prompts):
        alone = pipe([texts], num_frames=count, generator=item_generator(3, k)).motions[0]
        assert np.array_equal(alone.joints, joints[k])
        assert np.array_equal(alone.rotations, called.motions[k].rotations)
        assert alone.text == "; ".join(texts) and alone.fps == 20
        assert fk_error(alone)[1] < 1e-2  # millimetres: bones keep their lengths
    assert not np.array_equal(joints[0], joints[1])
    assert np.array_equal(pipe(prompts, num_frames=count, seed=3, output_type="np").motions, joints)


@pytest.mark.parametrize("name", ["flow", "pairs", "levels"])
def test_streaming_hands_out_every_part_and_both_ways_agree(name, monkeypatch):
    pipe = pipe_of(name)
    step = 4 * pipe.frames_per_block
    live, events = streamed(pipe, "walk", num_frames=6 * step, seed=1)
    sizes = [e.data["joints"].shape[1] for e in events if e.kind == "decoded"]
    assert sizes == [step] * 6 and isinstance(blocks_of(pipe), LiveBlocks)
    longer = pipe("walk", num_frames=8 * step, seed=1)
    assert np.array_equal(joints_of(longer)[:, : 6 * step], live)
    monkeypatch.setattr("blockloom.models.video.goes_on", lambda model: False)
    assert isinstance(blocks_of(pipe), WholeBlocks)
    assert np.array_equal(live, streamed(pipe, "walk", num_frames=6 * step, seed=1)[0])


@pytest.mark.parametrize("name", PIPES)
@pytest.mark.parametrize("count", [16, 19])
def test_a_motion_is_gone_on_with_and_its_frames_stay(name, count):
    pipe, start = pipe_of(name), walk(count)
    step = 4 * (1 if name == "all" else pipe.frames_per_block)
    first = pipe("walk", motion=start, num_frames=count + 2 * step, seed=5).motions[0]
    other = pipe("walk", motion=walk(count, 1), num_frames=count + 2 * step, seed=5).motions[0]
    assert len(first) == count + 2 * step
    assert np.array_equal(first.joints[:count], start.joints)
    assert np.array_equal(first.rotations[:count], start.rotations)
    assert not np.array_equal(first.joints[count:], other.joints[count:])
    assert first.skeleton == start.skeleton
    # The root goes on from where it is, as fast as it was.
    way = np.diff(first.joints[:, 0, [0, 2]], axis=0)
    assert np.abs(way[count - 1] - way[count - 2]).max() < 1e-4
    bare = pipe("walk", motion=start.joints, num_frames=count + 2 * step, seed=5).motions[0]
    assert np.array_equal(bare.joints[:count], start.joints)


@pytest.mark.parametrize("count", [12, 20])
def test_turning_bodies_go_on_where_they_are(count):
    # Headings are smoothed over time: short clips that turn have others than longer ones.
    circle = procedural_motion("a person walks in a circle to the left", item_generator(0, 1), 60)
    pipe, start = pipe_of("flow"), circle.cut(0, count)
    made = pipe("walk", motion=start, num_frames=count + 8, seed=5).motions[0]
    way = np.diff(made.joints[:, 0, [0, 2]], axis=0)
    assert np.abs(way[count - 1] - way[count - 2]).max() < 1e-4
    pipe = pipe_of("all")
    made = pipe("walk", motion=circle.cut(0, 48), span=(12, 40), seed=5).motions[0]
    way = np.diff(made.joints[:, 0, [0, 2]], axis=0)
    for seam in (12, 40):
        steps = np.linalg.norm(np.diff(way[seam - 3 : seam + 2], axis=0), axis=-1)
        assert steps.max() < 0.02  # metres per frame from one to the next


def test_seconds_count_what_is_given_even_where_it_fills_no_block():
    pipe, start = pipe_of("pairs"), walk(6)
    assert pipe.planned_frames("walk", motion=start, seconds=2.0) == 38  # 6 and 4 blocks of 8
    made = pipe("walk", motion=start, seconds=2.0, seed=1).motions[0]
    assert len(made) == 38 and np.array_equal(made.joints[:6], start.joints)
    usual = pipe.planned_frames("walk", motion=start)
    assert pipe.planned_frames("walk", motion=start, num_frames=usual) == usual
    pair = [walk(6), walk(6, 1)]
    both = {"motion": pair, "seconds": 2.0, "num_motions_per_prompt": 2}
    assert pipe.planned_frames("walk", **both) == 38


def test_poses_flow_out_of_what_was_given(monkeypatch):
    pipe, start = pipe_of("flow"), walk(24)

    def step_over_the_seam():
        made = pipe("walk", motion=start, num_frames=48, seed=2).motions[0].joints
        poses = made - made[:, :1]
        return np.linalg.norm(poses[24] - poses[23], axis=-1).mean()

    blended = step_over_the_seam()
    monkeypatch.setattr("blockloom.pipelines.motion_frames.take_out", lambda rows, *_: rows)
    plain = step_over_the_seam()  # untrained: the model is far from what was given
    natural = np.abs(np.diff(start.joints - start.joints[:, :1], axis=0)).max()
    assert plain > 0.03 and blended < 0.5 * plain + natural, (plain, blended)


@pytest.mark.parametrize("span", [(8, 20), (7, 21), (0, 12), (10, 30), (0, 29)])
def test_a_span_is_redrawn_and_everything_else_stays(span):
    pipe, start = pipe_of("all"), walk(30)
    first, second = (pipe("jump", motion=start, span=span, seed=k).motions[0] for k in (1, 2))
    kept = np.ones(30, bool)
    kept[slice(*span)] = False
    for made in (first, second):
        assert len(made) == 30 and np.array_equal(made.joints[kept], start.joints[kept])
        assert np.array_equal(made.rotations[kept], start.rotations[kept])
    assert not np.array_equal(first.joints[~kept], second.joints[~kept])
    joints, events = streamed(pipe, "jump", motion=start, span=span, seed=1)
    assert np.array_equal(joints[0], first.joints)
    assert [e.data["is_given"] for e in events if e.kind == "decoded"] == [True, False][
        span[0] == 0 :
    ]


def test_a_redrawn_span_arrives_where_the_kept_frames_begin():
    pipe, start = pipe_of("all"), walk(40)
    for seed in range(3):
        made = pipe("jump", motion=start, span=(12, 28), seed=seed).motions[0]
        steps = np.linalg.norm(np.diff(made.joints[:, 0], axis=0), axis=-1)
        inside = steps[13:26].max()
        assert steps[11] < 1.5 * inside and steps[27] < 1.5 * inside
    # From the first frame on, the body may come from anywhere: nothing is bent.
    made = pipe("jump", motion=start, span=(0, 16), seed=0).motions[0]
    steps = np.linalg.norm(np.diff(made.joints[:, 0], axis=0), axis=-1)
    assert steps[15] < 1.5 * steps[:15].max()


def test_models_that_go_in_order_redraw_the_end_only():
    pipe, start = pipe_of("flow"), walk(22)
    made = pipe("jump", motion=start, span=(9, 22), seed=1).motions[0]
    assert len(made) == 22 and np.array_equal(made.joints[:9], start.joints[:9])
    assert not np.array_equal(made.joints[9:], start.joints[9:])
    with pytest.raises(UsageError, match=r"cannot see them; try span=\(9, 22\)"):
        pipe("jump", motion=start, span=(9, 15), seed=1)
    with pytest.raises(UsageError, match=r"layout\.block = all or layout\.permute = any"):
        pipe("jump", motion=start, span=(9, 15), seed=1)
    assert not pipe.can_infill and pipe_of("all").can_infill


def test_prompts_change_from_their_block_or_second_on():
    pipe = pipe_of("flow")
    plain = pipe("walk", num_frames=24, seed=2, output_type="np").motions
    texts = ["walk", "walk", "walk", "turn"]
    turned = pipe(texts, num_frames=24, seed=2, output_type="np").motions
    assert np.array_equal(plain[:, :12], turned[:, :12])
    assert not np.array_equal(plain[:, 12:], turned[:, 12:])
    timed = pipe(["walk", "turn"], segment_seconds=0.6, seed=2, output_type="np").motions
    assert np.array_equal(timed, turned)
    uneven = pipe(["walk", "turn"], segment_seconds=[0.6, 0.2], num_frames=24, seed=2)
    assert np.array_equal(joints_of(uneven), turned)
    assert uneven.motions[0].text == "walk; turn"


def test_seconds_mean_the_nearest_legal_length():
    pipe = pipe_of("pairs")
    lengths = [len(pipe(seconds=s, seed=0).motions[0]) for s in (0.1, 1.1, 1.3)]
    assert lengths == [8, 24, 24]
    assert len(pipe(motion=walk(19), seconds=1.5, seed=0).motions[0]) == 19 + 8


def test_an_interrupted_call_keeps_finished_frames_and_the_pipeline():
    pipe = pipe_of("flow")
    whole = pipe(num_frames=24, seed=1).motions[0]

    def stop(pipe, index, level, tensors):
        assert tensors["latents"].isfinite().all()
        if index == 5:  # in the third block of two rows each
            pipe.interrupt()

    cut = pipe(num_frames=24, seed=1, callback_on_step_end=stop)
    assert not cut.is_complete and np.array_equal(cut.motions[0].joints, whole.joints[:8])
    asked = iter([True])
    nothing = list(pipe.stream(num_frames=24, seed=1, should_stop=lambda: next(asked)))
    assert [e.kind for e in nothing] == ["row", "done"]
    again, is_complete = pipe(num_frames=24, seed=1, return_dict=False)
    assert is_complete and np.array_equal(again[0].joints, whole.joints)


BAD = [
    ("flow", {"num_frames": 0}, "num_frames is 0; legal 4n; try 4"),
    ("flow", {"num_frames": 30}, "legal 4n; try 28 or 32"),
    ("pairs", {"num_frames": 9}, "legal 8n; try 8 or 16"),
    ("flow", {"num_frames": 2.5}, "whole number"),
    ("flow", {"num_frames": 10**9}, "num_frames"),
    ("all", {"num_frames": 10**6}, "lays a motion out whole and takes at most 4096"),
    ("flow", {"seconds": 0}, "seconds"),
    ("flow", {"seconds": float("nan")}, "seconds"),
    ("flow", {"seconds": float("inf")}, "seconds"),
    ("flow", {"seconds": 1e9}, "try 50000"),
    ("flow", {"seconds": 1, "num_frames": 20}, "pass one of them"),
    ("flow", {"motion": 12, "num_frames": 12}, r"the 12 given and 4n more; try 16"),
    ("flow", {"motion": 12, "num_frames": 18}, r"4n more; try 16 or 20"),
    ("flow", {"motion": 3}, "frames of motion.*at least 4"),
    ("flow", {"motion": "walk.bvh"}, "motion is not legal"),
    ("flow", {"motion": np.zeros((8, 21, 3))}, r"float64 \(8, 21, 3\)"),
    ("flow", {"motion": np.zeros((0, 22, 3))}, "no frames"),
    ("flow", {"motion": np.full((8, 22, 3), np.nan)}, "not finite"),
    ("flow", {"motion": [np.zeros((8, 22, 3))] * 3}, "number of given motions.*1 or 1"),
    ("all", {"span": (0, 4)}, "pass motion too"),
    ("all", {"span": (4, 4), "motion": 20}, r"0 <= start < end <= 20; try \(4, 5\)"),
    ("all", {"span": (4, 40), "motion": 20}, r"try \(4, 20\)"),
    ("all", {"span": (-1, 4), "motion": 20}, r"try \(0, 4\)"),
    ("all", {"span": (1.5, 4), "motion": 20}, "span"),
    ("all", {"span": "24", "motion": 20}, "span"),
    ("all", {"span": (0, 20), "motion": 20}, "keeps nothing.*num_frames=20"),
    ("all", {"span": (0, 8), "motion": 20, "num_frames": 24}, "beside span.*try 20"),
    ("flow", {"prompt": []}, "prompt"),
    ("flow", {"prompt": None}, "NoneType"),
    ("flow", {"prompt": ["a", 3]}, "prompt item"),
    ("flow", {"prompt": "x" * 10**6}, "at most 100000"),
    ("flow", {"prompt": ["a"] * 9, "num_frames": 16}, "number of prompts.*at most 4; try 4"),
    ("all", {"prompt": ["a", "b"]}, "number of prompts.*at most 1; try 1"),
    ("flow", {"prompt": ["a", "b"], "segment_seconds": [1]}, "number of segment_seconds.*2"),
    ("flow", {"prompt": ["a", "b"], "segment_seconds": [1, -1]}, "segment_seconds"),
    ("flow", {"num_inference_steps": 0}, "num_inference_steps.*try 1"),
    ("flow", {"guidance_scale": float("nan")}, "guidance_scale"),
    ("flow", {"temperature": -1}, "temperature.*try 0"),
    ("flow", {"num_motions_per_prompt": 0}, "num_motions_per_prompt.*try 1"),
    ("flow", {"output_type": "bvh"}, "output_type"),
    ("flow", {"generator": [torch.Generator()] * 2}, "number of generators"),
]


@pytest.mark.parametrize(("name", "settings", "match"), BAD)
def test_bad_requests_name_the_way_out_and_leave_the_pipeline(name, settings, match):
    pipe = pipe_of(name)
    if isinstance(settings.get("motion"), int):
        settings = settings | {"motion": walk(settings["motion"])}
    with pytest.raises(UsageError, match=match) as found:
        pipe(**settings)
    assert "\n" not in str(found.value)
    with pytest.raises(UsageError, match="stream setting"):
        next(pipe.stream(frames=3))


def test_foreign_bodies_and_rates_are_told_where_to_go():
    pipe, start = pipe_of("flow"), walk(12)
    names = tuple(f"bone{k}" for k in range(22))
    other = type(HUMAN22)(names, HUMAN22.parents, HUMAN22.offsets)
    for motion, words in (
        (Motion(start.joints, other), "joints of motion.*bone0.*retarget"),
        (Motion(start.joints, HUMAN22, 30.0), "fps of motion.*resample.*try 20"),
    ):
        with pytest.raises(BlockloomError, match=words):
            pipe(motion=motion)


def test_saved_models_open_as_motion_pipelines(tmp_path):
    pipe = pipe_of("flow")
    save_pipeline(tmp_path / "saved", pipe.model, pipe.tokenizer)
    again = AutoPipeline.from_pretrained(str(tmp_path / "saved"))
    assert type(again) is MotionPipeline and again.tokenizer.features == HUMAN_SIZE
    again.set_progress_bar_config(disable=True)
    assert again("walk", num_frames=8, seed=1).motions[0].joints.shape == (8, 22, 3)


def test_models_of_other_features_are_refused():
    recipe = load_recipe("motion/block_flow", [*SMALL, "tokenizer.features=12",
                                               "tokenizer.groups=null"])  # fmt: skip
    described = {key: part for key, part in recipe.tokenizer.items() if key != "train"}
    tokenizer = build_video_tokenizer(described).eval()
    with pytest.raises(ModelError, match=r"12 features.*the 263 of a human body"):
        MotionPipeline(tokenizer, initial_model(recipe, tokenizer, 0))


def is_of_a_body(name):
    tokenizer = load_recipe(name).tokenizer
    has_width = tokenizer["kind"].startswith("motion_")
    return has_width and tokenizer.get("features", HUMAN_SIZE) == HUMAN_SIZE


@pytest.mark.parametrize("name", list(filter(is_of_a_body, list_recipes("motion"))))
def test_every_recipe_of_a_body_makes_and_goes_on_with_motions(name):
    PIPES[name] = (name, "backbone.heads=1")
    pipe = pipe_of(name)
    short = 4 * pipe.frames_per_block * 2
    called = pipe([["a"], ["b"]], num_frames=short, seed=3)
    alone = pipe("b", num_frames=short, generator=item_generator(3, 1)).motions[0]
    assert np.array_equal(called.motions[1].joints, alone.joints)
    longer = pipe("b", motion=alone, num_frames=short + 8, seed=4).motions[0]
    assert np.array_equal(longer.joints[:short], alone.joints)
    assert np.isfinite(longer.joints).all()
