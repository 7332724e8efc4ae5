"""Measuring video models: statistics on known frames, drawing from beginnings, whole reports."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from blockloom import cli
from blockloom.core.errors import DataError, ModelError, UsageError
from blockloom.core.recipe import load_recipe
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training import run
from blockloom.training.clip_archive import save_clip_archive
from blockloom.training.clip_evaluation import ClipSettings, evaluate_clips, mean_frame
from blockloom.training.clip_statistics import byte_psnr, contrast, motion, sharpness
from blockloom.training.clips import ClipDataset
from blockloom.training.dreams import Dream, beginnings, dreamed, given_frames
from blockloom.training.endurance import collapse, resident_bytes
from blockloom.training.physics import physics_clips
from blockloom.training.run import initial_model, save_pipeline
from blockloom.training.steering import load_steering

SETTINGS = (
    "modality=video", "layout.kind=frames", "layout.block=frame", "layout.frames=4",
    "cache.window=3", "condition.actions=4", "backbone.dim=32", "backbone.layers=1",
    "backbone.heads=2", "text.dim=16", "text.buckets=32", "text.words=3", "schedule.steps=2",
    "corruption.kind=flow", "head.objective=velocity", "schedule.update=euler",
    "tokenizer={kind: frames, image: {kind: patch, image_size: 16, patch: 8}}",
)  # fmt: skip
LEFT_RIGHT = {"left": [0, 1, 0, 0], "right": [0, 0, 1, 0], "straight": [1, 0, 0, 0]}
QUICK = ClipSettings(num=3, speed_frames=4, steer_frames=5, endurance=40)


def parts(*extra):
    recipe = load_recipe("image/acdit", [*SETTINGS, *extra])
    tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    model = initial_model(recipe, tokenizer, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # heads start at zero; frames should move
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def model_parts():
    return parts()


@pytest.fixture(scope="module")
def clips():
    """Two training clips and two held-out ones of 20 frames with pushes."""
    return physics_clips(2, 2, num_frames=20, size=16, pushes=True)


@pytest.fixture(scope="module")
def folder(model_parts, tmp_path_factory):
    path = tmp_path_factory.mktemp("world") / "final"
    save_pipeline(path, *model_parts)
    (path / "world.json").write_text(json.dumps({"title": "balls", "steering": LEFT_RIGHT}))
    return path


def frames_of(*values):
    """One clip whose frames have one grey level each."""
    levels = torch.tensor(values, dtype=torch.uint8)
    return levels[None, :, None, None, None].expand(1, -1, 4, 4, 3)


def test_decibels_are_of_the_256_levels():
    target = frames_of(10, 10, 10, 0)
    psnr = byte_psnr(frames_of(10, 11, 20, 255), target)[0].tolist()
    # 20 log10(255 / error), at most 60.
    assert psnr == pytest.approx([60.0, 48.1308, 28.1308, 0.0], abs=1e-3)


def test_sharpness_motion_and_contrast_of_known_frames():
    stripes = torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8)
    stripes[:, :, :, ::2] = 200
    assert sharpness(stripes).item() == 200.0 and sharpness(frames_of(9)).item() == 0.0
    assert contrast(stripes).item() == 100.0
    moved = motion(frames_of(5, 5, 15), frames_of(2))
    assert moved[0].tolist() == [3.0, 0.0, 10.0]


def test_beginnings_are_spread_over_clips_and_carry_what_led_to_their_frames(clips, model_parts):
    held_out = clips.take([2, 3])
    after = beginnings(held_out, 4, 2, 6, 4, model_parts[1])
    assert len(after) == 4 and after.future.shape[1] == 6
    places = [
        next(t for t in range(20) if np.array_equal(held_out.clip(i % 2)[t], first))
        for i, first in enumerate(after.frames[:, 0].numpy())
    ]
    assert places == [3, 3, 9, 9]
    assert after.keys == [0, 1, 2, 3] and after.prompts[:2] == held_out.captions
    led = held_out.clip_actions(1)[places[3] - 1]
    assert after.actions[3, 0].tolist() == [float(i == led) for i in range(4)]
    assert torch.equal(after.last[:, 0], after.frames[:, 1])
    with pytest.raises(DataError, match=r"longest clip has 20 frames and 2 \+ 19"):
        beginnings(held_out, 4, 2, 19, 4)


def test_a_beginning_goes_on_alike_whatever_is_drawn_beside_it(clips, model_parts):
    model, tokenizer = model_parts
    after = beginnings(clips.take([2, 3]), 4, given_frames(model, tokenizer), 6, 3, tokenizer)
    assert after.given == 2
    together = dreamed(model, tokenizer, after, 6)
    assert torch.equal(together, dreamed(model, tokenizer, after, 6, batch_size=1))
    assert torch.equal(together[:, :3], dreamed(model, tokenizer, after, 3))
    for other in (
        dreamed(model, tokenizer, after, 6, told=False),
        dreamed(model, tokenizer, after, 6, seed=1),
        dreamed(model, tokenizer, after, 6, steps=1),
        dreamed(model, tokenizer, after, 6, actions=torch.ones(3, 6, 4)),
    ):
        assert not torch.equal(together, other)


def test_a_dream_stays_as_large_as_it_is(clips, model_parts):
    model, tokenizer = model_parts
    after = beginnings(clips, 4, 2, 3, 1, tokenizer)
    dream = Dream(model, tokenizer, after)
    for _ in range(4):
        dream.step(torch.zeros(1, 1, 4))
    size = dream.num_bytes
    for _ in range(9):
        dream.step(torch.zeros(1, 1, 4))
    assert dream.num_bytes == size > 0
    assert (resident_bytes() or 2**30) > 2**20  # not every system says


def test_collapse_is_relative_to_real_frames(clips):
    after = beginnings(clips, 4, 2, 6, 2)
    real = torch.stack(
        [
            sharpness(after.future).mean(),
            motion(after.future, after.last).mean(),
            contrast(after.future).mean(),
        ]
    )
    table = torch.cat((real.expand(4, -1), real.expand(4, -1) * torch.tensor([0.5, 0.0, 2.0])))
    report = collapse(table, after, 4)
    assert list(report["at_end"].values()) == pytest.approx([0.5, 0.0, 2.0])
    assert report["most_stretch"]["sharpness"] == pytest.approx(1.0)
    assert report["least_stretch"]["motion"] == 0.0


def test_a_whole_report(clips, model_parts, folder, tmp_path):
    report = evaluate_clips(*model_parts, clips, folder, QUICK, tmp_path / "s.png")
    json.dumps(report, allow_nan=False)
    lines = report["horizons"]
    assert (lines["contexts"], lines["frames_ahead"]) == (3, [1, 4, 16])
    after = beginnings(clips.take([2, 3]), 4, 2, 16, 3)
    copied = byte_psnr(after.last, after.future[:, :1]).mean()
    assert lines["copy_last_frame"]["psnr_db"][0] == pytest.approx(float(copied), abs=1e-3)
    assert lines["copy_last_frame"]["motion_ratio"] == [0.0, 0.0, 0.0]
    mean = byte_psnr(mean_frame(clips).expand_as(after.future), after.future).mean(0)
    assert lines["mean_training_frame"]["psnr_db"][2] == pytest.approx(float(mean[15]), abs=1e-3)
    # Raw patches lose nothing, so the tokenizer alone is exact.
    assert lines["tokenizer_alone"]["psnr_db"] == [60.0, 60.0, 60.0]
    assert lines["tokenizer_alone"]["sharpness_ratio"] == [1.0, 1.0, 1.0]
    assert lines["model"]["psnr_db"] != lines["same_model_told_no_actions"]["psnr_db"]
    steer = report["steering"]
    assert steer["contexts"] == 3 and len(steer["left"]["degrees_by_transition"]) == 5
    assert steer["estimator_on_real_frames"]["pairs"] == 2 * 15
    assert report["endurance"]["frames"] == 40
    assert report["endurance"]["memory"]["state_growth_bytes"] == 0
    assert report["speed"]["by_threads"][-1]["threads"] == 1
    # Three beginnings twice, three directions, the long rollout in three rows; lines between.
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.size == (12 * 16, 12 * 16 + 6 * 6)
    again = evaluate_clips(*model_parts, clips, folder, QUICK)
    assert again["horizons"] == lines and again["steering"] == steer


def test_eval_of_a_pipeline_folder(clips, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "ClipSettings", partial(ClipSettings, speed_frames=0, steer_frames=3))
    save_clip_archive(clips, tmp_path / "clips.npz")
    report = run.evaluate(folder, tmp_path / "clips.npz", num=2, steps=1)
    assert (report["model"], report["steps"], report["given_frames"]) == ("final", 1, 2)
    assert report["horizons"]["contexts"] == report["steering"]["contexts"] == 2
    assert "speed" not in report and "endurance" not in report


def test_the_command_hands_its_flags_on(folder, tmp_path, monkeypatch, capsys):
    asked = {}
    monkeypatch.setattr(run, "evaluate", lambda *_, **settings: asked.update(settings) or {"n": 1})
    (tmp_path / "clips.npz").write_bytes(b"not read here")
    flags = ["--num", "2", "--steps", "3", "--endurance", "9", "--device", "cpu"]
    assert cli.main(["eval", str(folder), "--data", str(tmp_path / "clips.npz"), *flags]) == 0
    assert json.loads(capsys.readouterr().out) == {"n": 1}
    assert (asked["num"], asked["steps"], asked["endurance"]) == (2, 3, 9)
    assert cli.main(["eval", str(folder), "--data", "d", "--endurance", "1"]) == 2


def test_worlds_that_say_nothing_are_not_steered_and_nonsense_is_refused(tmp_path):
    assert load_steering(tmp_path, 4) is None
    path = tmp_path / "world.json"
    path.write_text('{"title": "balls"}')
    assert load_steering(tmp_path, 4) is None
    path.write_text(json.dumps({"steering": LEFT_RIGHT | {"pivot": [0.5, 0.9]}}))
    steering = load_steering(tmp_path, 4)
    assert steering is not None
    assert (steering.right, steering.pivot) == ((0.0, 0.0, 1.0, 0.0), (0.5, 0.9))
    for told, reason in (
        ({"left": [0]}, "1 finite|not 4 finite numbers"),
        ({k: LEFT_RIGHT[k] for k in ("left", "right")}, "straight"),
        (LEFT_RIGHT | {"left": LEFT_RIGHT["right"]}, "same action"),
        (LEFT_RIGHT | {"pivot": [0.5, 2]}, "0 to 1"),
        (LEFT_RIGHT | {"up": [0, 0, 0, 1]}, "unknown keys up"),
        (LEFT_RIGHT | {"left": [0, float("nan"), 0, 0]}, "not 4 finite"),
        (3, "steering"),
    ):
        path.write_text(json.dumps({"steering": told}))
        with pytest.raises(ModelError, match=reason):
            load_steering(tmp_path, 4)


def test_what_cannot_be_measured_is_said(clips, folder, model_parts, tmp_path):
    train_only = clips.only("train")
    with pytest.raises(DataError, match="eval needs others"):
        evaluate_clips(*model_parts, train_only, folder, QUICK)
    short = ClipDataset(
        np.zeros((4, 16, 16, 3), np.uint8), np.array([0, 2, 4]), ["", ""], ["train", "test"],
        actions=np.array([0, -1, 0, -1]),
    )  # fmt: skip
    with pytest.raises(DataError, match="at most 2 frames; the model is given 2"):
        evaluate_clips(*model_parts, short, folder, QUICK)


def test_endurance_of_pictures_is_refused(tiny_model, tmp_path):
    with pytest.raises(UsageError, match="endurance 9: tiny makes pictures"):
        run.evaluate(tiny_model, tmp_path, endurance=9)
