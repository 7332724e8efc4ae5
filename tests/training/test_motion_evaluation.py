"""Evaluation of motion models: what is drawn, what stands beside it, what is told about both."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.tiny_motion import TEXTS, tiny_motions

from blockloom.core.errors import ResourceError
from blockloom.core.recipe import load_recipe
from blockloom.tokenizers.motion_base import HUMAN_GROUPS
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.clips import ClipDataset
from blockloom.training.motion_drawing import (
    drawn_motions,
    latent_frames,
    most_frames,
    recoded_motions,
)
from blockloom.training.motion_evaluation import (
    MotionSettings,
    by_metric,
    evaluate_motions,
    evaluator_for,
)
from blockloom.training.motion_panel import Panel, frechet_floors, joints_of, mean_bones
from blockloom.training.run import initial_model
from blockloom.training.text_motion import fingerprint, train_text_motion

SMALL = (
    "layout.frames=5", "backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16",
    "text.buckets=32", "text.words=6", "schedule.steps=2",
)  # fmt: skip
SIZES = {"width": 32, "dim": 16, "buckets": 64}
SETTINGS = MotionSettings(variants=2, evaluator_steps=60)


@pytest.fixture(scope="module")
def clips() -> ClipDataset:
    return tiny_motions()


def parts_of(recipe: str, clips: ClipDataset, *more: str, **tokenizer):
    spec = load_recipe(recipe, [*SMALL, *more])
    built = build_video_tokenizer({"features": 263, "groups": HUMAN_GROUPS, **tokenizer}).eval()
    train = [clips.clip(i) for i, split in enumerate(clips.split) if split == "train"]
    built.measure_features(torch.from_numpy(motion.T[None].copy()) for motion in train)
    model = initial_model(spec, built, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # heads start at zero; bodies should move
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.eval(), built


@pytest.fixture(scope="module")
def flow(clips):
    """Latents are the features themselves, frame after frame, in a window: any length."""
    return parts_of("motion/block_flow", clips, "cache.window=3", kind="features")


@pytest.fixture(scope="module")
def masked(clips):
    """Codes of four frames, all at once: five latent frames at the most."""
    return parts_of(
        "motion/mmm", clips, kind="motion_vq", width=8, codebook_size=7, code_dim=4
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(flow, clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sheet = folder / "sheet.png"
    return evaluate_motions(*flow, clips, folder, SETTINGS, "rules.npz", sheet), folder


def test_lengths_become_whole_latent_frames(flow, masked):
    assert [latent_frames(*flow, n) for n in (1, 2, 23)] == [1, 2, 23]
    assert [latent_frames(*masked, n) for n in (1, 4, 5, 20)] == [1, 1, 2, 5]
    assert most_frames(*flow) is None and most_frames(*masked) == 20


@pytest.mark.parametrize("name", ["flow", "masked"])
def test_what_is_drawn_depends_on_its_text_key_and_seed_alone(name, request):
    model, tokenizer = request.getfixturevalue(name)
    texts, lengths = list(TEXTS), [8, 5, 8, 1, 7]
    together = drawn_motions(model, tokenizer, texts, lengths, seed=3)
    assert [motion.shape for motion in together] == [(n, 263) for n in lengths]
    one_by_one = drawn_motions(model, tokenizer, texts, lengths, seed=3, batch_size=1)
    assert all(np.array_equal(a, b) for a, b in zip(together, one_by_one, strict=True))
    other = drawn_motions(model, tokenizer, texts, lengths, seed=4)
    assert all(not np.array_equal(a, b) for a, b in zip(together, other, strict=True))
    renamed = drawn_motions(model, tokenizer, ["sit", *texts[1:]], lengths, seed=3)
    assert [np.array_equal(a, b) for a, b in zip(together, renamed, strict=True)] == [
        False, True, True, True, True,
    ]  # fmt: skip


def test_a_tokenizer_that_loses_nothing_returns_motions_of_any_length(flow, masked, clips):
    motions = [clips.clip(0)[:n] for n in (1, 6, 7)]
    again = recoded_motions(flow[1], motions)
    assert all(np.allclose(a, b, atol=1e-5) for a, b in zip(again, motions, strict=True))
    assert [len(motion) for motion in recoded_motions(masked[1], motions)] == [1, 6, 7]


def test_models_of_many_wordings_are_asked_in_one_they_do_not_know(report, clips):
    parts = parts_of("motion/block_flow", clips, "cache.window=3", "train.wordings=1",
                     kind="features")  # fmt: skip
    table = evaluate_motions(*parts, clips, report[1], SETTINGS, "rules.npz")["table"]
    for line in ("mm_distance", "frechet_distance"):
        assert "generated_in_other_words" not in report[0]["table"][line]
        assert table[line]["generated"] == report[0]["table"][line]["generated"]
        assert table[line]["generated_in_other_words"] != table[line]["generated"]


def test_what_is_generated_stands_beside_real_motion_and_copies(report, clips):
    result, _ = report
    json.dumps(result, allow_nan=False)
    sets = {"generated", "real_held_out", "tokenizer_reconstruction", "nearest_training_text",
            "one_real_pose_held", "standing_still"}  # fmt: skip
    table = result["table"]
    for k in (1, 2, 3):
        line = table[f"r_precision_top_{k}"]
        assert set(line) == sets | {"chance"} and line["chance"] == pytest.approx(k / 5)
        assert all(line[name]["n"] == 10 for name in sets)
        # Features are the latents: the tokenizer changes nothing that is seen.
        assert line["tokenizer_reconstruction"] == line["real_held_out"]
    top = table["r_precision_top_3"]
    assert top["real_held_out"]["value"] >= 0.95 > top["generated"]["value"]
    assert top["nearest_training_text"]["value"] >= 0.95  # every text was trained on
    assert top["standing_still"]["value"] <= 0.6
    held = table["mm_distance"]["one_real_pose_held"]["value"]
    assert held > table["mm_distance"]["real_held_out"]["value"] + 0.2  # a pose is no motion
    seen = table["recognised"]
    assert seen["real_held_out"]["value"] >= 0.7 > seen["one_real_pose_held"]["value"] + 0.2
    both = table["r_precision_recognised_top_3"]
    assert all(both[name]["value"] <= min(top[name]["value"], seen[name]["value"]) for name in sets)
    low, high = top["generated"]["interval"]
    assert 0 <= low <= top["generated"]["value"] <= high <= 1
    distance = table["frechet_distance"]
    assert set(distance) == sets - {"real_held_out"}
    assert distance["tokenizer_reconstruction"]["value"] == pytest.approx(0, abs=1e-4)
    assert distance["generated"]["value"] > distance["nearest_training_text"]["value"]
    assert distance["generated"]["is_rank_deficient"]  # 10 motions in more dimensions
    ratio = result["generated_over_real"]["r_precision_top_3"]
    assert ratio["value"] == pytest.approx(
        top["generated"]["value"] / top["real_held_out"]["value"]
    )
    assert result["reconstruction"]["mpjpe_mm"]["value"] == pytest.approx(0, abs=0.05)
    assert table["bone_length_stretch"]["standing_still"]["value"] == pytest.approx(0, abs=1e-6)
    assert table["foot_contact_speed_m_s"]["standing_still"]["value"] == pytest.approx(0, abs=1e-6)
    assert table["jerk_m_s3"]["generated"]["value"] > table["jerk_m_s3"]["real_held_out"]["value"]


def test_the_result_names_its_evaluator_and_what_was_asked(report, clips):
    result, folder = report
    about, asked = result["evaluator"], result["held_out"]
    assert about["name"].startswith("blockloom text-motion evaluator, " + about["hash"])
    assert about["trained_on"] == "20 clips of 5 texts from rules.npz"
    assert about["trained_on_these_clips"] is True
    assert asked["motions"] == asked["asked"] == 10 and asked["texts"] == asked["pool"] == 5
    assert asked["texts_not_trained_on"] == []
    place = folder / f"evaluator-{fingerprint(clips.only('train'))}"
    assert sorted(file.suffix for file in place.iterdir()) == [".json", ".safetensors"]


def test_the_sheet_shows_real_motions_above_generated_ones(report):
    with Image.open(report[1] / "sheet.png") as picture:
        rows = np.asarray(picture.convert("L")).astype(float)
    # Twelve strips of eight poses, a white line under every second one.
    assert rows.shape == (12 * 192 + 6 * 6, 8 * 119)
    real, drawn = rows[:192], rows[192:384]
    assert (rows[384:390] == 255).all() and real.std() > 5 and drawn.std() > 5
    assert np.abs(real - drawn).mean() > 1


def test_several_motions_of_a_text_differ_as_real_ones_do(report):
    result, _ = report
    lines = result["multimodality"]
    assert lines["variants_per_text"] == 2 and lines["generated"]["n"] == 5
    assert lines["generated"]["value"] > 0
    assert lines["real_training_motions_of_the_same_texts"]["n"] == 5


def test_texts_that_nobody_was_trained_on_are_told_apart(flow, clips, tmp_path):
    """Without its training motions a text is a stranger to model and evaluator alike."""
    strange = ClipDataset(
        clips.frames, clips.offsets, clips.captions,
        ["other" if s == "train" and c == TEXTS[4] else s
         for c, s in zip(clips.captions, clips.split, strict=True)], clips.fps,
    )  # fmt: skip
    settings = replace(SETTINGS, num=6, seed=1, variants=0, evaluator=tmp_path / "judge")
    result = evaluate_motions(*flow, strange, tmp_path, settings)
    assert result["held_out"]["texts_not_trained_on"] == [TEXTS[4]]
    assert result["held_out"]["motions"] == 14 and result["held_out"]["asked"] == 6
    assert result["multimodality"] is None
    known = result["trained_texts_only"]["r_precision_top_1"]["real_held_out"]
    assert known["n"] < 6 and known["value"] == 1.0
    # The same evaluator is used again, here on other clips, which is told.
    again = evaluate_motions(*flow, clips, tmp_path, settings)
    assert again["evaluator"]["hash"] == result["evaluator"]["hash"]
    assert again["evaluator"]["trained_on_these_clips"] is False


def test_models_of_short_motions_are_compared_with_as_much_of_real_ones(masked, clips, tmp_path):
    settings = replace(SETTINGS, num=3, variants=0, evaluator_steps=2)
    result = evaluate_motions(*masked, clips, tmp_path, settings)
    assert result["evaluator"]["frames"] == 20
    shorter = evaluate_motions(*masked, clips, tmp_path, replace(settings, frames=12))
    assert shorter["evaluator"]["frames"] == 12
    assert result["reconstruction"]["mpjpe_mm"]["value"] > 10  # untrained codes


def test_an_evaluator_that_cannot_be_kept_is_still_used(clips, tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    settings = MotionSettings(evaluator_steps=2)
    with caplog.at_level(logging.WARNING):
        encoder = evaluator_for(clips, blocked, settings, "rules")
    assert "not kept" in caplog.text
    assert encoder.weights_hash() == evaluator_for(clips, tmp_path, settings, "x").weights_hash()
    with pytest.raises(ResourceError, match="cannot write evaluator judge"):
        evaluator_for(clips, tmp_path, replace(settings, evaluator=blocked / "judge"), "rules")
    with pytest.raises(ResourceError, match="evaluator file is a file"):
        evaluator_for(clips, tmp_path, replace(settings, evaluator=blocked), "rules")
    assert blocked.read_text() == "not a folder"


def test_a_panel_measures_bodies_by_hand(clips):
    encoder = train_text_motion(clips.only("train"), 1, 8, **SIZES)
    motion = clips.clip(0)
    bones = mean_bones(joints_of([motion]))
    panel = Panel(encoder, [TEXTS[0]] * 3, list(TEXTS), list(TEXTS), bones * 0.8, 20.0)
    values = panel.moved(joints_of([motion, motion[:1], motion[:3]]))
    # Bones a quarter longer than the skeleton's; walking stretches these legs a little.
    assert values["bone_length_error"] == pytest.approx([0.25] * 3, abs=0.02)
    assert np.isnan(values["jerk_m_s3"]).tolist() == [False, True, True]
    assert np.isnan(values["foot_skating_ratio"]).tolist() == [False, True, False]
    # The feet are on the floor all the time and go 1 m/s on the whole.
    assert values["foot_contact_ratio"][0] == 1.0 and values["foot_skating_ratio"][0] > 0.5
    assert 0.7 < values["foot_contact_speed_m_s"][0] < 1.4


def test_floors_grow_as_sets_shrink():
    rng = np.random.default_rng(0)
    train, held_out = rng.normal(size=(200, 4)), rng.normal(size=(40, 4))
    floors = frechet_floors(train, held_out, splits=8)
    sizes = {name: line["items_a_side"] for name, line in floors.items()}
    assert sizes == {
        "train_against_held_out": 40, "halves_of_train": 40, "halves_of_held_out": 20,
    }  # fmt: skip
    assert floors["halves_of_held_out"]["value"] > floors["halves_of_train"]["value"] > 0
    far = frechet_floors(train, held_out + 3.0, splits=8)
    assert far["train_against_held_out"]["value"] == pytest.approx(36, rel=0.2)
    assert frechet_floors(train[:3], held_out[:1])["halves_of_held_out"] is None
    # Of more held-out than training vectors a part is drawn, not the first of the list.
    more = rng.normal(size=(200, 4))
    more = more[more[:, 0].argsort()]
    drawn = frechet_floors(train[:20], more, splits=8)["train_against_held_out"]
    assert drawn["value"] < 2 and drawn["range"][0] < drawn["range"][1]


def test_tables_are_turned_to_one_line_per_metric():
    table = by_metric({"a": {"x": 1, "y": 2}, "b": {"x": 3}}, {"x": 0.5})
    assert table == {"x": {"a": 1, "b": 3, "chance": 0.5}, "y": {"a": 2}}
