"""Motions on the command line: what is written, what is kept, what a killed run leaves."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.killing import kill_while_writing

from blockloom import cli
from blockloom.core.errors import DataError
from blockloom.core.sampling import item_generator
from blockloom.motion.bvh_motion import motion_to_bvh
from blockloom.motion.bvh_write import write_bvh
from blockloom.motion.clip import Motion, fk_error, resample
from blockloom.motion.skeleton import HUMAN22, Skeleton
from blockloom.pipelines.motion import MotionPipeline
from blockloom.pipelines.motion_media import (
    encode_npz,
    read_motion,
    read_motion_metadata,
    save_motion,
)
from blockloom.pipelines.params import MotionParams, read_record
from blockloom.pipelines.video_input import read_video

SIZES = ("layout.frames=3", "backbone.dim=32", "backbone.layers=1", "backbone.heads=2",
         "text.dim=16", "text.buckets=32", "text.words=3", "tokenizer.width=8")  # fmt: skip
KINDS = {
    "flow": ("motion/block_flow", "cache.window=2", "schedule.steps=2"),
    "all": ("motion/momask",),
}


def walk(frames: int = 20, seed: int = 0) -> Motion:
    from tests.tiny_motion import tiny_features

    from blockloom.motion.features import Start, features_to_motion

    rows = tiny_features("a person walks forward", frames, seed)
    return features_to_motion(rows, start=Start(1.0, 2.0, 0.3))


@pytest.fixture(scope="session")
def shelf_of_motions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save one tiny pipeline of each kind, with weights that make bodies move."""
    import torch
    from tests.tiny_motion import tiny_features

    from blockloom.core.recipe import load_recipe
    from blockloom.tokenizers.video_build import build_video_tokenizer
    from blockloom.training.run import initial_model, save_pipeline

    folder = tmp_path_factory.mktemp("motions")
    rows = torch.from_numpy(tiny_features("a person walks forward", 24))[None]
    for name, (recipe_name, *settings) in KINDS.items():
        recipe = load_recipe(recipe_name, [*SIZES, *settings])
        described = {key: part for key, part in recipe.tokenizer.items() if key != "train"}
        tokenizer: Any = build_video_tokenizer(described).eval()
        tokenizer.measure_features([rows.transpose(1, 2)])
        model = initial_model(recipe, tokenizer, 0)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        save_pipeline(folder / name, model.eval(), tokenizer)
    return folder


def pipe_of(folder: Path) -> MotionPipeline:
    pipe = MotionPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_one_motion_in_every_format_tells_how_it_was_made(
    run: Any, here: Path, shelf_of_motions: Path
) -> None:
    model = shelf_of_motions / "flow"
    flags = ("--model", model, "--seed", 3, "--seconds", 0.8, "--guidance-scale", 2)
    _, out, _ = run("generate", "motion", "a person walks", *flags, "--out", "a.npz",
                    "--formats", "bvh,glb,mp4,gif")  # fmt: skip
    names = ["a.npz", "a.bvh", "a.glb", "a.mp4", "a.gif"]
    assert out.split() == [str(here / name) for name in names]
    settings = {"num_frames": 16, "guidance_scale": 2.0, "generator": item_generator(3, 0)}
    made = pipe_of(model)("a person walks", **settings).motions[0]
    arrays = np.load("a.npz", allow_pickle=False)
    assert np.array_equal(arrays["joints"], made.joints)
    assert np.array_equal(arrays["rotations"], made.rotations)
    assert tuple(arrays["names"]) == HUMAN22.names and arrays["fps"] == 20
    assert tuple(arrays["parents"]) == HUMAN22.parents and arrays["text"] == "a person walks"
    assert np.array_equal(read_motion("a.npz").joints, made.joints)
    assert np.abs(read_motion("a.bvh").joints - made.joints).max() < 1e-4
    for name in ("a.mp4", "a.gif"):
        video = read_video(name)
        assert video.frames.shape == (16, 384, 384, 3) and video.fps == pytest.approx(20)
    sidecar = json.loads((here / "a.json").read_text())
    assert sidecar["file"] == "a.npz" and list(sidecar["files"]) == sorted(names)
    assert (sidecar["kind"], sidecar["prompt"], sidecar["seed"]) == ("motion", "a person walks", 3)
    record = read_record(sidecar, MotionParams)
    assert record.recipe == "motion/block_flow" and record.params.num_frames == 16
    assert record.versions["blockloom"] and len(record.weights_sha256) == 64
    for name in (*names, "a.json"):  # of the .bvh the sidecar is read
        assert read_record(read_motion_metadata(name), MotionParams) == record
    for name in ("a.glb", "a.gif", "a.bvh"):
        run("generate", "motion", "--params-from", name, "--model", model, "--out", "b.npz",
            "--overwrite")  # fmt: skip
        assert (here / "a.npz").read_bytes() == (here / "b.npz").read_bytes()
    # The same motion may be written again, another one not.
    again = ("--out", "a.npz", "--formats", "bvh,glb,mp4,gif")
    run("generate", "motion", "a person walks", *flags, *again)
    _, _, err = run("generate", "motion", "a person jumps", *flags, *again, code=2)
    assert "--overwrite" in err


def test_several_motions_go_to_a_folder_as_video_and_bvh(
    run: Any, here: Path, shelf_of_motions: Path
) -> None:
    flags = ("--model", shelf_of_motions / "all", "--seed", 1, "--frames", 8, "--num", 2)
    _, out, _ = run("generate", "motion", "x", *flags, "--out", "many", "--format", "json")
    reports = json.loads(out)
    assert [r["seed"] for r in reports] == [1, 2]
    found = sorted(path.name for path in (here / "many").iterdir())
    assert found == [f"0000{k}-x-{k + 1}.{kind}" for k in (0, 1) for kind in ("bvh", "json", "mp4")]
    assert [sorted(Path(p).suffix for p in r["files"]) for r in reports] == [[".bvh", ".mp4"]] * 2
    run("generate", "motion", *flags[:6], "--out", "quiet.glb", "--no-metadata")
    assert (
        not (here / "quiet.json").exists()
        and b"weights_sha256" not in Path("quiet.glb").read_bytes()
    )


def test_prompts_by_the_second(run: Any, here: Path, shelf_of_motions: Path) -> None:
    model = shelf_of_motions / "flow"
    Path("plot.txt").write_text("walk\njump\n")
    flags = ("--model", model, "--seed", 2, "--prompts-per-block", "plot.txt")
    run("generate", "motion", *flags, "--segment-seconds", 0.4, "--out", "a.npz")
    pipe, how = pipe_of(model), {"generator": item_generator(2, 0), "num_frames": 16}
    made = pipe(["walk", "jump"], segment_seconds=0.4, **how).motions[0]
    assert np.array_equal(read_motion("a.npz").joints, made.joints)
    run("generate", "motion", "--params-from", "a.json", "--model", model, "--out", "b.npz")
    assert np.array_equal(read_motion("b.npz").joints, made.joints)
    run("generate", "motion", *flags, "--frames", 16, "--out", "c.npz")
    blocks = pipe(["walk", "jump"], **how | {"generator": item_generator(2, 0)}).motions[0]
    assert np.array_equal(read_motion("c.npz").joints, blocks.joints)
    assert not np.array_equal(made.joints, blocks.joints)


def test_motions_from_files_are_kept_and_gone_on_with(
    run: Any, here: Path, shelf_of_motions: Path
) -> None:
    model, start = shelf_of_motions / "flow", walk(18)
    Path("start.npz").write_bytes(encode_npz(start))
    flags = ("--model", model, "--seed", 2)
    run("generate", "motion", "x", *flags, "--motion", "start.npz", "--frames", 26,
        "--out", "a.npz")  # fmt: skip
    run("edit", "motion", "start.npz", "--prompt", "x", *flags, "--continue", 8, "--out", "b.npz")
    one, two = read_motion("a.npz"), read_motion("b.npz")
    assert np.array_equal(one.joints[:18], start.joints) and len(one) == 26
    assert np.array_equal(one.joints, two.joints)
    record = json.loads(Path("a.json").read_text())["params"]
    assert record["given"] == 18 and record["num_frames"] == 26
    _, _, err = run("generate", "motion", "--params-from", "a.npz", "--model", model, "--out",
                    "c.npz", code=2)  # fmt: skip
    assert "--motion FILE" in err
    run("generate", "motion", "--params-from", "a.npz", "--model", model, "--motion", "start.npz",
        "--out", "c.npz")  # fmt: skip
    assert Path("c.npz").read_bytes() == Path("a.npz").read_bytes()


def test_a_span_of_somebodys_bvh_is_redrawn(run: Any, here: Path, shelf_of_motions: Path) -> None:
    fast = resample(walk(30), 60)
    write_bvh("in.bvh", motion_to_bvh(fast))
    given = read_motion("in.bvh")
    assert given.fps == 20 and np.abs(given.joints - walk(30).joints[: len(given)]).max() < 2e-3
    flags = ("--prompt", "jump", "--seed", 1, "--out", "out.npz")
    _, _, err = run("edit", "motion", "in.bvh", "--span", "0.4-1.0", *flags, "--model",
                    shelf_of_motions / "flow", code=2)  # fmt: skip
    assert "cannot see the last" in err and "try --span 0.4-1.5" in err
    run("edit", "motion", "in.bvh", "--span", "0.4-1.0", *flags, "--model",
        shelf_of_motions / "all", "--formats", "npz,glb,bvh")  # fmt: skip
    made = read_motion("out.npz")
    assert np.array_equal(made.joints[:8], given.joints[:8])
    assert np.array_equal(made.joints[20:], given.joints[20:])
    assert not np.array_equal(made.joints[8:20], given.joints[8:20])
    run("edit", "motion", "in.bvh", "--params-from", "out.glb", "--out", "again.npz", "--model",
        shelf_of_motions / "all")  # fmt: skip
    assert Path("again.npz").read_bytes() == Path("out.npz").read_bytes()
    run("edit", "motion", "in.bvh", "--span", "0.4-1.5", *flags[:4], "--out", "end.npz", "--model",
        shelf_of_motions / "flow")  # fmt: skip
    assert np.array_equal(read_motion("end.npz").joints[:8], given.joints[:8])


def test_frames_between_two_ends(run: Any, here: Path, shelf_of_motions: Path) -> None:
    ends = walk(20)
    Path("ends.npz").write_bytes(encode_npz(ends))
    flags = ("--between", 12, "--seed", 1, "--out", "full.npz")
    _, _, err = run("edit", "motion", "ends.npz", *flags, "--model", shelf_of_motions / "flow",
                    code=2)  # fmt: skip
    assert "--between" in err and "--continue N" in err
    assert "(layout.block = all or layout.permute = any)" in err
    run("edit", "motion", "ends.npz", *flags, "--model", shelf_of_motions / "all")
    made = read_motion("full.npz").joints
    assert len(made) == 4 + 12 + 4
    assert np.array_equal(made[:4], ends.joints[:4])
    assert np.array_equal(made[-4:], ends.joints[-4:])
    pace = np.linalg.norm(np.diff(made[:, 0, [0, 2]], axis=0), axis=-1)  # of the root
    assert pace[2] > 0.02 and abs(pace[3] - pace[2]) < 1e-4 > abs(pace[4] - pace[3])
    again = ("--params-from", "full.npz", "--model", shelf_of_motions / "all")
    run("edit", "motion", "ends.npz", *again, "--out", "again.npz")
    assert Path("again.npz").read_bytes() == Path("full.npz").read_bytes()
    Path("foreign.npz").write_bytes(encode_npz(walk(20, seed=1)))
    _, _, err = run("edit", "motion", "foreign.npz", *again, "--out", "other.npz")
    assert "another input" in err and len(read_motion("other.npz")) == 20


GENERATE, EDIT = ("generate", "motion", "x"), ("edit", "motion")
SPAN = ("--span", "0.2-0.6", "--model", "all")
BAD = [
    # lengths, spans, formats, names: refused as usage
    (GENERATE, ("--frames", "0"), 2, "try 1"),
    (GENERATE, ("--frames", "30"), 2, "num_frames is 30; legal 4n; try 28 or 32"),
    (GENERATE, ("--frames", "4.5"), 2, "try 4 or 5"),
    (GENERATE, ("--frames", "99999999"), 2, "try 1000000"),
    (GENERATE, ("--model", "all", "--frames", "400000"), 2, "lays a motion out whole"),
    (GENERATE, ("--seconds", "0"), 2, "--seconds"),
    (GENERATE, ("--seconds", "nan"), 2, "--seconds"),
    (GENERATE, ("--seconds", "inf"), 2, "try 50000"),
    (GENERATE, ("--seconds", "-3"), 2, "--seconds"),
    (GENERATE, ("--seconds", "2", "--frames", "40"), 2, "one of them"),
    (GENERATE, ("--formats", "fbx"), 2, "--formats; got fbx; allowed mp4, gif, bvh, glb, npz"),
    (GENERATE, ("--formats", "bvh,gbl"), 2, "try glb"),
    (GENERATE, ("--out", "a.fbx"), 2, "--out extension"),
    (GENERATE, ("--out", "a.png"), 2, ".bvh"),
    (GENERATE, ("--num", "2", "--out", "a.bvh"), 2, "--out with a folder"),
    (GENERATE, ("--fps", "30"), 2, "--fps is no flag of generate motion"),
    (GENERATE, ("--width", "8"), 2, "--width is no flag of generate motion"),
    (GENERATE, ("--image", "p.png"), 2, "--image is no flag of generate motion"),
    (GENERATE, ("--segment-seconds", "1"), 2, "--prompts-per-block"),
    (GENERATE, ("--prompts-per-block", "ok.txt"), 2, "beside --prompts-per-block"),
    (GENERATE[:2], ("--prompts-per-block", "nothing.txt"), 3, "holds no prompts"),
    (GENERATE[:2], ("--prompts-per-block", "ok.txt", "--frames", "4"), 2, "at most 1; try 1"),
    (("generate", "motion", "x" * 10**6), (), 2, "prompt is too long; got 1000000 characters"),
    (("generate", "motion", "\0"), (), 2, "NUL"),
    (("generate", "image", "x"), ("--seconds", "2"), 2, "--seconds is no flag of generate image"),
    (("generate", "video", "x"), ("--formats", "glb"), 2, "--formats is no flag of generate video"),
    (("generate", "video", "x"), (), 4, "makes motions"),
    (("edit", "image", "p.png"), ("--span", "1-2"), 2, "--span is no flag of edit image"),
    (EDIT, (), 2, "no input motion"),
    ((*EDIT, "ok.bvh"), (), 2, "--span START-END, --continue N and --between N"),
    ((*EDIT, "ok.bvh"), ("--span", "0.2-0.4", "--continue", "4"), 2, "say what to do"),
    ((*EDIT, "ok.bvh"), ("--span", "4"), 2, "START-END in seconds"),
    ((*EDIT, "ok.bvh"), ("--span", "2-1"), 2, "--span is empty"),
    ((*EDIT, "ok.bvh"), ("--span", "0.2-9", "--model", "all"), 2, "inside 0-1, one frame"),
    ((*EDIT, "ok.bvh"), ("--span", "0.2-0.21", "--model", "all"), 2, "try 0.2-0.25"),
    ((*EDIT, "ok.bvh"), ("--span", "0-1", "--model", "all"), 2, "keeps nothing"),
    ((*EDIT, "ok.bvh"), ("--continue", "0"), 2, "try 1"),
    ((*EDIT, "ok.bvh"), ("--continue", "3"), 2, "4n more; try 24"),
    ((*EDIT, "short.npz"), ("--continue", "4"), 2, "at least 4 to go on from"),
    ((*EDIT, "short.npz"), ("--between", "4", "--model", "all"), 2, "at least 8 frames"),
    # motions that cannot be read
    ((*EDIT, "missing.bvh"), SPAN, 3, "cannot read missing.bvh"),
    ((*EDIT, "folder.bvh"), SPAN, 3, "not a regular file"),
    ((*EDIT, "junk.bvh"), SPAN, 3, "junk.bvh"),
    ((*EDIT, "cut.bvh"), SPAN, 3, "cut.bvh"),
    ((*EDIT, "robot.bvh"), SPAN, 3, "robot.bvh"),
    ((*EDIT, "walk.fbx"), SPAN, 3, "allowed .bvh or .npz"),
    ((*EDIT, "junk.npz"), SPAN, 3, "no archive of plain arrays"),
    ((*EDIT, "pickle.npz"), SPAN, 3, "no archive of plain arrays"),
    ((*EDIT, "other.npz"), SPAN, 3, "no array joints"),
    ((*EDIT, "flat.npz"), SPAN, 3, "joints; got float32 [20, 66]"),
    ((*EDIT, "nan.npz"), SPAN, 3, "not finite in frame 3"),
    ((*EDIT, "fps.npz"), SPAN, 3, "fps of a motion is nan"),
    ((*EDIT, "few.npz"), SPAN, 3, "5 joints without names"),
    ((*EDIT, "empty.npz"), SPAN, 3, "at least one frame"),
    (GENERATE, ("--motion", "junk.bvh"), 3, "junk.bvh"),
    (GENERATE, ("--params-from", "ok.bvh"), 3, "cannot read ok.json"),
    (GENERATE, ("--params-from", "bare.npz"), 3, "holds no blockloom parameters"),
    (GENERATE, ("--params-from", "junk.glb"), 3, "holds no blockloom parameters"),
    (GENERATE, ("--params-from", "junk.json"), 3, "not JSON"),
    # models
    (GENERATE, ("--model", "missing"), 4, "no such model"),
    (GENERATE, ("--model", "clips"), 4, "makes videos"),
]


@pytest.fixture
def bad_files(here: Path) -> Path:
    start = walk(20)
    write_bvh("ok.bvh", motion_to_bvh(start))
    text = Path("ok.bvh").read_text()
    Path("cut.bvh").write_text(text[: len(text) // 2])
    robot = text
    for number, name in enumerate(HUMAN22.names):
        robot = robot.replace(f" {name}\n", f" part{number}\n")
    Path("robot.bvh").write_text(robot)
    Path("folder.bvh").mkdir()
    for name in ("junk.bvh", "junk.npz", "junk.glb", "junk.json", "walk.fbx"):
        Path(name).write_bytes(b"neither this nor that")
    Path("short.npz").write_bytes(encode_npz(start.cut(0, 3)))
    Path("bare.npz").write_bytes(encode_npz(start))
    joints = start.joints.copy()
    joints[3, 4] = np.nan
    np.savez("nan.npz", joints=joints)
    np.savez("fps.npz", joints=start.joints, fps=np.nan)
    np.savez("flat.npz", joints=start.joints.reshape(20, 66))
    np.savez("few.npz", joints=start.joints[:, :5])
    np.savez("empty.npz", joints=start.joints[:0])
    np.savez("other.npz", frames=start.joints)
    np.savez("pickle.npz", joints=np.array([{}], dtype=object))
    for name, words in {"nothing": "", "ok": "walk\njump\n"}.items():
        Path(f"{name}.txt").write_text(words)
    return here


@pytest.mark.parametrize(("command", "flags", "code", "words"), BAD)
def test_bad_inputs_give_one_line_and_leave_no_file(
    command: tuple[str, ...], flags: tuple[str, ...], code: int, words: str, run: Any,
    bad_files: Path, shelf_of_motions: Path, tiny_clips: Path,
) -> None:  # fmt: skip
    arguments = [*command, *flags]
    if "--model" in flags:
        place = arguments.index("--model") + 1
        name = arguments[place]
        arguments[place] = str(tiny_clips if name == "clips" else shelf_of_motions / name)
    else:
        arguments += ["--model", str(shelf_of_motions / "flow")]
    before = sorted(bad_files.rglob("*"))
    _, out, err = run(*arguments, code=code)
    assert words in err and out == "" and len(err) < 600
    assert [p for p in sorted(bad_files.rglob("*")) if p not in before and p.is_file()] == []


def test_a_missing_package_is_named_before_anything_is_made(
    run: Any, here: Path, shelf_of_motions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("generate", "motion", "x", "--model", shelf_of_motions / "flow", "--seed", 1)
    monkeypatch.setitem(sys.modules, "pygltflib", None)
    _, _, err = run(*flags, "--out", "a.bvh", "--formats", "bvh,glb", code=2)
    assert "pip install 'blockloom[motion]'" in err
    monkeypatch.setitem(sys.modules, "av", None)
    _, _, err = run(*flags, "--out", "a.mp4", code=2)
    assert "pip install 'blockloom[video]'" in err and not list(here.iterdir())
    run(*flags, "--out", "a.bvh", "--frames", 8)  # a skeleton needs neither


def test_motion_files_of_the_22_joints_come_back_as_they_were(here: Path) -> None:
    start = walk(12)
    bare = replace(start, rotations=None)
    Path("bare.npz").write_bytes(encode_npz(bare, {"seed": 1}))
    again = read_motion("bare.npz")
    assert again.rotations is None and np.array_equal(again.joints, start.joints)
    np.savez("joints.npz", joints=start.joints)
    lengths = np.linalg.norm(read_motion("joints.npz").skeleton.offsets, axis=-1)
    assert np.allclose(lengths[1:], np.linalg.norm(start.skeleton.offsets, axis=-1)[1:], atol=1e-5)
    assert encode_npz(start, {"seed": 1}) == encode_npz(start, {"seed": 1})
    assert read_motion_metadata("bare.npz") == {"seed": 1}


def test_a_sidecar_is_believed_of_its_own_bvh_only(run: Any, here: Path) -> None:
    save_motion(walk(12), [here / "a.bvh"], {"seed": 1})
    told = read_motion_metadata("a.bvh")
    assert told["seed"] == 1
    for kind in ("bvh", "json"):  # both under another name
        Path(f"b.{kind}").write_bytes(Path(f"a.{kind}").read_bytes())
    assert read_motion_metadata("b.bvh") == told
    write_bvh("a.bvh", motion_to_bvh(walk(12, seed=1)))
    _, _, err = run("generate", "motion", "--params-from", "a.bvh", code=3)
    assert "a.json tells of another a.bvh than this one; try a.json itself" in err
    assert read_motion_metadata("a.json") == told
    told.pop("files")
    Path("b.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="tells of another"):
        read_motion_metadata("b.bvh")


def test_joints_of_the_same_names_on_another_tree_are_retargeted(here: Path) -> None:
    start = walk(12)
    names, parents = HUMAN22.names, list(HUMAN22.parents)
    parents[names.index("head")] = names.index("spine3")
    other = Skeleton(names, tuple(parents), start.skeleton.offsets, hips=HUMAN22.hips)
    Path("other.npz").write_bytes(encode_npz(replace(start, skeleton=other)))
    # A joint between two that are known: nothing can be left out.
    longer = Skeleton((*names[:1], "waist", *names[1:]),
                      (-1, 0, *(p + (p > 0) if p else 1 for p in HUMAN22.parents[1:])),
                      np.insert(start.skeleton.offsets, 1, 0.01, 0))  # fmt: skip
    joints, turns = (np.insert(a, 1, a[:, 0], 1) for a in (start.joints, start.rotations))
    Path("longer.npz").write_bytes(encode_npz(Motion(joints, longer, 20.0, turns)))
    for name in ("other.npz", "longer.npz"):
        read = read_motion(name)
        assert read.skeleton.names == names and read.skeleton.parents == HUMAN22.parents
        assert read.rotations is not None and fk_error(read)[1] < 1
        where = read.joints[:, 20] - read.joints[:, 0]
        assert np.abs(where - (start.joints[:, 20] - start.joints[:, 0])).max() < 0.1


def test_a_killed_run_leaves_nothing_or_whole_files(here: Path, shelf_of_motions: Path) -> None:
    command = ["generate", "motion", "x", "--seed", "1"]
    command += ["--model", str(shelf_of_motions / "flow"), "--out", "a.mp4", "--formats", "mp4,bvh"]
    kill_while_writing([*command, "--frames", "600"], here, ".a.mp4.*.part")
    assert [path.name for path in here.iterdir() if not path.name.startswith(".")] == []
    assert cli.main([*command, "--frames", "8"]) == 0
    # What the killed run had begun is gone too.
    assert sorted(path.name for path in here.iterdir()) == ["a.bvh", "a.json", "a.mp4"]
