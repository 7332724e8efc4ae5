"""Motion sets load on one body at one rate, mirror, and train a tokenizer; bad ones are named."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange

from blockloom import cli
from blockloom.core.errors import DataError, ModelError
from blockloom.core.recipe import load_recipe
from blockloom.motion.bvh_motion import motion_to_bvh
from blockloom.motion.bvh_write import write_bvh
from blockloom.motion.clip import Motion, motion_from_rotations
from blockloom.motion.features import human_features, recover, start_of
from blockloom.motion.rotations import about_axis, multiply
from blockloom.motion.skeleton import HUMAN22, world_rotations
from blockloom.tokenizers.video_build import build_video_tokenizer, load_video_tokenizer
from blockloom.training.clip_run import clip_model_stage
from blockloom.training.clips import ClipDataset
from blockloom.training.motion_archive import (
    convert_motions,
    holds_motion,
    load_motions,
    motion_row,
    with_mirror,
)
from blockloom.training.motion_run import load_motion_data, reconstruction_errors
from blockloom.training.run import initial_model, train
from blockloom.training.wordings import worded

LEFT_ELBOW, LEFT_WRIST, RIGHT_WRIST = 18, 20, 21


def waving(frames=60, fps=20.0, speed=1.0, body=HUMAN22, text="wave the left hand"):
    """A body that walks along +Z, turns a little and swings its left arm."""
    time = torch.arange(frames, dtype=torch.float64) / fps
    local = torch.zeros(frames, 22, 4, dtype=torch.float64)
    local[..., 0] = 1
    local[:, 0] = about_axis("Y", 0.3 * torch.sin(time))
    swing = about_axis("Z", 0.8 * torch.sin(3 * speed * time))
    local[:, LEFT_ELBOW] = multiply(swing, about_axis("X", 0.4 * torch.cos(time)))
    root = torch.stack([0 * time, 0.95 + 0 * time, 1.2 * time], dim=1)
    return motion_from_rotations(body, local, root, fps, text)


def arrays_of(motions, split=None):
    """Lay motions out as motion_text.npz does."""
    bodies = [m.skeleton for m in motions]
    world = [world_rotations(m.skeleton, m.tensors()[1]).numpy() for m in motions]
    return {
        "joints": np.concatenate([m.joints for m in motions]),
        "bone_quat": np.concatenate(world).astype(np.float16),
        "offsets": np.concatenate([[0], np.cumsum([len(m) for m in motions])]),
        "text": np.array([m.text for m in motions]),
        "split": np.array(split or ["train"] * len(motions)),
        "skeleton_id": np.arange(len(motions), dtype=np.int16),
        "rest_joints": np.stack([body.rest_joints() for body in bodies]).astype(np.float32),
        "joint_names": np.array(HUMAN22.names),
        "parents": np.array(HUMAN22.parents, dtype=np.int8),
        "fps": np.array([motions[0].fps], dtype=np.float32),
    }


@pytest.fixture
def archive(tmp_path):
    """Two training motions, one of them on a body a fifth larger, and one that is held out."""
    large = HUMAN22.with_offsets(HUMAN22.offsets * 1.2)
    motions = [
        waving(),
        waving(44, speed=0.5, body=large, text="wave slowly with the left hand"),
        waving(48, speed=1.5),
    ]
    path = tmp_path / "motion.npz"
    np.savez(path, **arrays_of(motions, ["train", "train", "test"]))
    return path


def test_an_archive_becomes_features_of_one_body(archive):
    data = load_motions(archive)
    assert len(data) == 3 and data.num_features == 263 and data.fps == 20
    assert data.lengths.tolist() == [59, 43, 47]
    assert data.captions[1] == "wave slowly with the left hand"
    assert data.split == ["train", "train", "test"]
    wanted = human_features(waving().on_floor())
    # Rotations are stored with 11 bits.
    assert np.abs(data.clip(0) - wanted).max() < 3e-3
    joints = recover(data.clip(1)).double()
    bones = (joints[:, 1:] - joints[:, list(HUMAN22.parents[1:])]).norm(dim=-1)
    own = torch.from_numpy(HUMAN22.offsets[1:].copy()).norm(dim=-1)
    assert (bones - own).abs().max() < 1e-4
    # Its steps shrink with its legs: 1.2 m/s becomes 1 m/s.
    assert float(joints[-1, 0, 2] - joints[0, 0, 2]) == pytest.approx(42 / 20, abs=0.02)


def test_places_alone_are_enough(tmp_path):
    arrays = arrays_of([waving()])
    for name in ("bone_quat", "rest_joints", "skeleton_id", "joint_names", "parents", "fps"):
        del arrays[name]
    np.savez(tmp_path / "places.npz", **arrays)
    data = load_motions(tmp_path / "places.npz")
    motion = waving().on_floor()
    joints = recover(data.clip(0), start_of(motion))
    torch.testing.assert_close(joints, torch.from_numpy(motion.joints)[:-1], atol=1e-3, rtol=0)


def test_a_folder_of_bvh_with_captions(tmp_path):
    (tmp_path / "test").mkdir()
    write_bvh(tmp_path / "a.bvh", motion_to_bvh(waving(120, fps=40.0)))
    (tmp_path / "a.txt").write_text("wave the left hand\n")
    write_bvh(tmp_path / "test" / "b.bvh", motion_to_bvh(waving(30)))
    assert holds_motion(tmp_path)
    data = load_motions(tmp_path)
    assert data.captions == ["wave the left hand", ""] and data.split == ["train", "test"]
    assert data.lengths.tolist() == [59, 29]
    wanted = human_features(waving().on_floor())
    assert np.abs(data.clip(0)[:, :67] - wanted[:59, :67]).max() < 5e-3
    rows = [{"file_name": "test/b.bvh", "text": "wave", "split": "held_out"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    listed = load_motions(tmp_path)
    assert listed.captions == ["wave"] and listed.split == ["held_out"]
    rows[0]["file_name"] = "../motion.bvh"
    (tmp_path / "captions.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(DataError, match="outside the folder"):
        load_motions(tmp_path)


def test_converted_sets_read_back_and_mirror(archive, tmp_path):
    target = tmp_path / "features.npz"
    data = convert_motions(archive, target, mirror=True)
    again = load_motions(target)
    assert np.array_equal(again.frames, data.frames) and again.captions == data.captions
    assert data.split == ["train", "train", "test", "train", "train"]
    assert data.captions[3] == "wave the right hand"
    one, two = recover(data.clip(0)), recover(data.clip(3))
    torch.testing.assert_close(
        two[:, RIGHT_WRIST], one[:, LEFT_WRIST] * torch.tensor([-1.0, 1, 1]), atol=1e-4, rtol=0
    )
    assert one[:, LEFT_WRIST, 1].std() > 0.1 > one[:, RIGHT_WRIST, 1].std()
    with pytest.raises(DataError, match="frames have 3 features; only the 263"):
        with_mirror(ClipDataset(np.zeros((2, 3), np.float32), np.array([0, 2]), [""], ["train"]))
    done = np.zeros((len(data.frames), 2), np.float32)
    with pytest.raises(DataError, match="clips with actions cannot be mirrored"):
        with_mirror(replace(data, actions=done))


def test_few_files_that_cannot_be_read_are_left_out(tmp_path, caplog):
    for number in range(12):
        write_bvh(tmp_path / f"{number:02}.bvh", motion_to_bvh(waving(30)))
    (tmp_path / "05.bvh").write_text((tmp_path / "05.bvh").read_text()[:90])
    with caplog.at_level("WARNING"):
        assert len(load_motions(tmp_path)) == 11
    (line,) = (record.message for record in caplog.records if "skipped" in record.message)
    assert line.startswith("clip skipped: 05.bvh: ") and line.count("05.bvh") == 1
    (tmp_path / "06.bvh").write_text("HIERARCHY\n")
    with pytest.raises(DataError, match=r"2 of 12 clips are bad: 05\.bvh: .*; 06\.bvh: "):
        load_motions(tmp_path)


def test_slow_rates_are_filled_in_between():
    with pytest.raises(DataError, match=r"7\.2e\+07 at 20"):
        motion_row(replace(waving(1001), fps=1 / 3600))
    slow = motion_row(waving(31, fps=10.0))
    assert len(slow) == 60
    assert np.abs(slow[:, 3:67] - motion_row(waving(61))[:, 3:67]).max() < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joints": np.zeros((152, 22), np.float32)}, "'joints' is float32"),
        ({"offsets": np.array([0, 3])}, "offsets run from 0 to 3; needed 0 to 152"),
        ({"offsets": None}, "no array 'offsets'"),
        ({"bone_quat": np.zeros((152, 21, 4), np.float16)}, r"'bone_quat' is \[152, 21, 4\]"),
        ({"bone_quat": np.zeros((152, 22, 4), np.float16)}, "clip 0: .*no unit quaternion"),
        ({"rest_joints": None}, "'bone_quat' but no 'rest_joints'"),
        ({"rest_joints": np.zeros((1, 21, 3), np.float32)}, r"\[bodies, 22, 3\]"),
        ({"skeleton_id": np.array([0, 1, 3])}, r"'skeleton_id' is not in 0\.\.2"),
        ({"joint_names": np.array(["hips"] * 21)}, "22 joints, and 21 names"),
        ({"fps": np.array([0.0])}, "'fps' is float64"),
        ({"text": np.array(["a"])}, r"array 'text' has shape \[1\], not \[3\]"),
    ],
)
def test_bad_archives_are_named(archive, tmp_path, changes, message):
    with np.load(archive) as file:
        arrays = dict(file)
    arrays = {name: value for name, value in (arrays | changes).items() if value is not None}
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        load_motions(tmp_path / "bad.npz")
    assert "bad.npz" in str(caught.value)


def test_what_holds_no_motion_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no\.npz: no such file"):
        load_motions(tmp_path / "no.npz")
    with pytest.raises(DataError, match=r"holds no \.bvh files"):
        load_motions(tmp_path)
    assert not holds_motion(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"unknown kind; allowed a folder of \.bvh"):
        load_motions(tmp_path / "a.txt")
    np.savez(tmp_path / "pictures.npz", frames=np.zeros((2, 4, 4, 3), np.uint8), offsets=[0, 2])
    with pytest.raises(DataError, match="holds pictures; needed 'joints'"):
        load_motions(tmp_path / "pictures.npz")
    np.savez(tmp_path / "short.npz", **arrays_of([waving(1)]))
    with pytest.raises(DataError, match="1 of 1 clips are bad: clip 0: features need two frames"):
        load_motions(tmp_path / "short.npz")


TINY = [
    "tokenizer={kind: %s, width: 16, dilations: [1], code_dim: 8, codebook_size: 16,"
    " train: {num_steps: 4, batch_size: 4, frames: 30, learning_rate: 0.003}}",
    "layout.frames=4", "backbone.dim=32", "backbone.layers=1", "backbone.heads=2",
    "train.batch_size=4", "train.warmup=0", "train.mirror=true", "train.save_every=2",
]  # fmt: skip


def tiny_recipe(kind="motion_vq", name="motion/t2m_gpt"):
    return load_recipe(name, [TINY[0] % kind, *TINY[1:]])


def test_the_tokenizer_stage_measures_trains_and_reports_millimetres(archive, tmp_path):
    recipe = tiny_recipe()
    report = train(recipe, archive, tmp_path / "run", stage="tokenizer", progress=False)
    assert report["tokenizer"]["step"] == 4 and report["tokenizer"]["skipped"] == 0
    tokenizer = load_video_tokenizer(tmp_path / "run" / "tokenizer" / "final")
    clips = load_motion_data(recipe, archive, tokenizer)
    assert len(clips) == 5  # mirrored
    seen = torch.from_numpy(clips.only("train").frames)
    torch.testing.assert_close(
        tokenizer.feature_mean[:, 0], seen.double().mean(0).float(), atol=2e-3, rtol=1e-3
    )
    errors = reconstruction_errors(tokenizer, clips.only("test"))
    assert errors["windows"] == 1 and errors["frames"] == 44
    for name, value in errors.items():
        assert report["tokenizer"][f"held_out_{name}"] == pytest.approx(value, rel=0.02)
    # The model stage finds it and trains no tokenizer.
    again = train(recipe, archive, tmp_path / "run", stage="model", steps=1, progress=False)
    assert "tokenizer" not in again and again["model"]["step"] == 1


def test_every_window_is_told_in_every_wording(archive, tmp_path):
    changes = [
        "train.wordings=2",
        "train.synonyms={wave the left hand: [hail a cab]}",
        "train.pad=true",
    ]
    recipe = load_recipe("motion/t2m_gpt", [TINY[0] % "motion_vq", *TINY[1:], *changes])
    tokenizer = build_video_tokenizer({"kind": "motion_vq", "width": 16, "dilations": [1]}).eval()
    clips = load_motion_data(recipe, archive, tokenizer)
    model = initial_model(recipe, tokenizer, 0)
    stage = clip_model_stage(model, tokenizer, clips, tmp_path)
    seen = clips.only("train")
    assert stage.num_items % 3 == 0
    plain = stage.num_items // 3
    owners = stage.values.windows.clip
    for way in range(3):
        items = torch.arange(way * plain, (way + 1) * plain)
        assert torch.equal(stage.values[items], stage.values[torch.arange(plain)])
        synonyms = recipe.train.synonyms
        told = [worded(text, way, synonyms.get(text, ())) for text in seen.captions]
        assert (
            told[0]
            == ("wave the left hand", "a person hails a cab", "someone waves the left hand")[way]
        )
        wanted = model.text_encoder.tokenize([told[clip] for clip in owners[items]])
        assert torch.equal(stage.prompt_ids[items], wanted)
    with pytest.raises(ModelError, match=r"train\.synonyms with train\.wordings = 0"):
        load_recipe("motion/t2m_gpt", ["train.synonyms={walk: [stroll]}"])
    with pytest.raises(ModelError, match=r'train\.wordings with modality = "video"'):
        load_recipe("video/acdit", ["train.wordings=2"])


def test_a_tokenizer_run_that_is_cut_off_goes_on_to_the_same_weights(archive, tmp_path):
    recipe = tiny_recipe("motion_rvq", "motion/momask")
    recipe.tokenizer["train"]["save_every"] = 2
    train(recipe, archive, tmp_path / "one", stage="tokenizer", progress=False)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (newest,) = (tmp_path / "two" / "tokenizer" / "checkpoints").glob("*4")
    # As if the run had been killed after the checkpoint of step 2.
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "two" / "tokenizer" / "final")
    train(recipe, archive, tmp_path / "two", stage="tokenizer", resume=True, progress=False)
    one, two = (load_video_tokenizer(tmp_path / n / "tokenizer" / "final") for n in ("one", "two"))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_errors_are_distances_of_joints(archive):
    class Shifted:
        """Returns poses 30 mm too high, in steps of 4 frames."""

        step_frames = 4

        def state_dict(self):
            return {"any": torch.zeros(1)}

        def encode(self, frames):
            return frames

        def decode(self, frames):
            shifted = frames.clone()
            shifted[:, 3] += 0.03
            shifted[:, 5:67:3] += 0.03
            return shifted

        def standardise(self, frames):
            return frames

    clips = load_motions(archive)
    errors = reconstruction_errors(Shifted(), clips)
    assert errors["mpjpe_mm"] == pytest.approx(30, abs=0.01)
    assert errors["mpjpe_root_aligned_mm"] == pytest.approx(0, abs=0.01)
    assert errors["feature_error"] == pytest.approx((22 * 0.03**2 / 263) ** 0.5, rel=1e-3)
    assert errors["windows"] == 3 and errors["frames"] == 56 + 40 + 44


def test_features_that_are_not_trained_are_measured(tmp_path):
    rng = np.random.default_rng(0)
    frames = (rng.normal(size=(80, 6)) * [1, 2, 3, 4, 5, 6] + 7).astype(np.float32)
    path = tmp_path / "observations.npz"
    split = np.array(["train", "test"])
    np.savez(path, frames=frames, offsets=[0, 60, 80], split=split, captions=["go", "go"])
    recipe = load_recipe("motion/block_flow", ["tokenizer={kind: features, features: 6}"])
    report = train(recipe, path, tmp_path / "run", stage="tokenizer", progress=False)
    assert report["tokenizer"]["measured_frames"] == 60
    tokenizer = load_video_tokenizer(tmp_path / "run" / "tokenizer" / "final")
    with torch.no_grad():
        values = tokenizer.encode(rearrange(torch.from_numpy(frames[:60]), "t f -> 1 f t"))[0, :, 0]
    assert values.mean(0).abs().max() < 0.01 and (values.std(0) - 1).abs().max() < 0.02
    assert report["tokenizer"]["held_out_feature_error"] < 1e-3
    wrong = load_recipe("motion/block_flow", ["tokenizer={kind: features, features: 5}"])
    with pytest.raises(DataError, match=r"6 features and the tokenizer takes 5; set tokenizer\."):
        load_motion_data(wrong, path, build_video_tokenizer({"kind": "features", "features": 5}))


def test_rotations_are_needed_nowhere():
    places = replace(waving(), rotations=None)
    assert isinstance(places, Motion)
    assert np.abs(motion_row(places)[:, :67] - motion_row(waving())[:, :67]).max() < 0.02


def test_the_command_converts_motion(archive, tmp_path, capsys):
    target = tmp_path / "set.npz"
    arguments = ["data", "convert", str(archive), "--out", str(target), "--mirror"]
    assert cli.main([*arguments, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["num_motions"] == 5 and report["num_frames"] == 59 + 43 + 47 + 59 + 43
    assert np.array_equal(load_motions(target).frames, load_motions(archive, mirror=True).frames)
    assert cli.main([*arguments, "--overwrite", "--size", "64"]) == 2
    assert "--size with motion" in capsys.readouterr().err
    np.savez(tmp_path / "images.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    pictures = ["data", "convert", str(tmp_path / "images.npz"), "--out", str(tmp_path / "p.npz")]
    assert cli.main([*pictures, "--mirror"]) == 2
    assert "--mirror with pictures" in capsys.readouterr().err
