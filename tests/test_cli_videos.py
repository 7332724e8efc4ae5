"""Videos on the command line: what is written, what is gone on with, what a killed run leaves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.killing import kill_while_writing

from blockloom import cli
from blockloom.core.sampling import item_generator
from blockloom.pipelines.auto import AutoPipeline
from blockloom.pipelines.video import VideoPipeline
from blockloom.pipelines.video_input import read_video
from blockloom.pipelines.video_media import save_video
from blockloom.pipelines.world_files import CONTROLS, STARTS

SIZES = (
    "layout.frames=3", "cache.window=2", "backbone.dim=32", "backbone.layers=1",
    "backbone.heads=2", "text.dim=16", "text.buckets=32", "text.words=3",
)  # fmt: skip
CAUSAL = (
    "tokenizer={kind: video_kl, frame_size: [8, 8], spatial_stride: 4, temporal_stride: 4,"
    " widths: [8, 8, 16], encoder_depths: [1, 1, 1], decoder_depths: [1, 1, 1],"
    " latent_channels: 3}"
)
TOGETHER = ("layout.block=all", "layout.copies=1", "cache.write=none", "cache.window=null",
            "cache.exact=false", "mask=bidirectional", "condition.actions=0")  # fmt: skip
KINDS = {
    "clips": ("condition.actions=0",),
    "causal": ("condition.actions=0", CAUSAL),
    "together": TOGETHER,
    "guided": ("condition.actions=0", "condition.structure=edges", "condition.structure_size=2"),
    "world": ("condition.actions=3",),
}


def frames_of(count: int, seed: int = 0, size: int = 8) -> np.ndarray:
    """Frames of four squares in colours that a GIF keeps."""
    squares = np.random.default_rng(seed).integers(0, 256, (count, 2, 2, 3), dtype=np.uint8)
    return squares.repeat(size // 2, 1).repeat(size // 2, 2)


@pytest.fixture(scope="session")
def shelf_of_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save one tiny pipeline of each kind, with weights that make frames move."""
    import torch

    from blockloom.core.recipe import load_recipe
    from blockloom.tokenizers.video_build import build_video_tokenizer
    from blockloom.training.run import initial_model, save_pipeline

    folder = tmp_path_factory.mktemp("videos")
    for name, settings in KINDS.items():
        recipe = load_recipe("video/teacher_forcing", [*SIZES, *settings])
        tokenizer: Any = build_video_tokenizer(recipe.tokenizer).eval()
        model = initial_model(recipe, tokenizer, 0)
        generator = torch.Generator().manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        save_pipeline(folder / name, model.eval(), tokenizer)
    controls = {"controls": {"ArrowLeft": [1, 0, 0], "ArrowUp": [0, 0.5, 0]}, "fps": 10}
    (folder / "world" / CONTROLS).write_text(json.dumps(controls))
    starts = {"frames": frames_of(2, 7)[None], "actions": np.zeros((1, 2, 3), np.float32)}
    np.savez(folder / "world" / STARTS, **starts)
    return folder


def shown(path: Path | str) -> np.ndarray:
    return read_video(path).frames


def pipe_of(folder: Path) -> VideoPipeline:
    pipe = VideoPipeline.from_pretrained(str(folder))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_a_video_is_what_the_pipeline_makes_and_can_be_made_again(
    run: Any, here: Path, shelf_of_videos: Path
) -> None:
    model = shelf_of_videos / "clips"
    flags = ("--model", model, "--seed", 3, "--frames", 5, "--fps", 10, "--guidance-scale", 2)
    _, out, _ = run("generate", "video", "a ball", *flags, "--out", "a.gif")
    assert out == f"{here / 'a.gif'}\n"
    settings = {"num_frames": 5, "guidance_scale": 2.0, "generator": item_generator(3, 0)}
    made = pipe_of(model)("a ball", **settings).frames[0]
    assert np.array_equal(shown("a.gif"), made)
    sidecar = json.loads((here / "a.json").read_text())
    assert (sidecar["kind"], sidecar["prompt"], sidecar["seed"]) == ("video", "a ball", 3)
    assert sidecar["params"]["num_frames"] == 5 and sidecar["params"]["fps"] == 10
    for source in ("a.gif", "a.json"):
        run("generate", "video", "--params-from", source, "--model", model, "--out", "b.gif",
            "--overwrite")  # fmt: skip
        assert (here / "a.gif").read_bytes() == (here / "b.gif").read_bytes()
    run("generate", "video", "--params-from", "a.gif", "--model", model, "--out", "c.gif",
        "--frames", 7)  # fmt: skip
    assert np.array_equal(shown("c.gif")[:5], made) and len(shown("c.gif")) == 7
    # The same video may be written again, another one not.
    run("generate", "video", "a ball", *flags, "--out", "a.gif")
    run("generate", "video", "a cube", *flags, "--out", "a.gif", code=2)


def test_every_format_plays_and_several_go_to_a_folder(
    run: Any, here: Path, shelf_of_videos: Path
) -> None:
    model = shelf_of_videos / "clips"
    for name in ("a.mp4", "a.webm"):
        run("generate", "video", "x", "--model", model, "--seed", 1, "--frames", 3, "--scale", 4,
            "--out", name, "--no-metadata")  # fmt: skip
        assert shown(name).shape == (3, 32, 32, 3) and read_video(name).fps == 8
    assert not (here / "a.json").exists()
    _, out, _ = run("generate", "video", "x", "--model", model, "--seed", 1, "--frames", 3,
                    "--num", 2, "--out", "many", "--format", "json")  # fmt: skip
    reports = json.loads(out)
    assert [r["seed"] for r in reports] == [1, 2]
    assert [Path(r["path"]).suffix for r in reports] == [".mp4", ".mp4"]


def test_first_frames_come_from_pictures_and_clips(
    run: Any, here: Path, shelf_of_videos: Path
) -> None:
    model, start = shelf_of_videos / "clips", frames_of(3, 1)
    Image.fromarray(start[0]).save("first.png")
    save_video(start, "start.gif", fps=5)
    flags = ("--model", model, "--seed", 2, "--frames", 6)
    run("generate", "video", *flags, "--image", "first.png", "--out", "one.gif")
    run("generate", "video", *flags, "--video", "start.gif", "--out", "two.gif")
    run("edit", "video", "start.gif", "--continue", 3, *flags[:4], "--out", "three.gif")
    one, two = shown("one.gif"), shown("two.gif")
    assert np.array_equal(one[0], start[0]) and np.array_equal(two[:3], start)
    assert not np.array_equal(one[3:], two[3:]) and len(one) == len(two) == 6
    assert np.array_equal(two, shown("three.gif")) and read_video("three.gif").fps == 5
    run("generate", "video", "--params-from", "one.gif", "--model", model, "--out", "x.gif", code=2)
    run("generate", "video", "--params-from", "one.gif", "--model", model, "--image", "first.png",
        "--out", "x.gif")  # fmt: skip
    assert np.array_equal(one, shown("x.gif"))


def test_structure_comes_from_a_clip(run: Any, here: Path, shelf_of_videos: Path) -> None:
    model, shape = shelf_of_videos / "guided", frames_of(4, 3)
    save_video(shape, "shape.gif", fps=5)
    flags = ("--model", model, "--seed", 2)
    run("generate", "video", "x", *flags, "--structure", "shape.gif", "--out", "one.gif")
    made = pipe_of(model)("x", structure=shape, generator=item_generator(2, 0)).frames[0]
    assert np.array_equal(shown("one.gif"), made) and len(made) == 4
    again = ("generate", "video", "--params-from", "one.gif", "--model", model, "--out", "x.gif")
    _, _, err = run(*again, code=2)
    assert "guided by structure; try --structure" in err
    run(*again, "--structure", "shape.gif")
    assert np.array_equal(shown("one.gif"), shown("x.gif"))
    _, _, err = run("generate", "video", "x", *flags, "--out", "y.gif", code=2)
    assert "guided by structure (edges)" in err
    plain = ("--model", shelf_of_videos / "clips", "--structure", "shape.gif", "--out", "y.gif")
    _, _, err = run("generate", "video", "x", *plain, code=2)
    assert "takes no structure" in err


def test_a_clip_of_an_odd_length_is_gone_on_with_from_its_last_frames(
    run: Any, here: Path, shelf_of_videos: Path
) -> None:
    start = frames_of(7, 2)
    save_video(start, "start.gif", fps=8)
    _, _, err = run("edit", "video", "start.gif", "--continue", 4, "--seed", 1, "--model",
                    shelf_of_videos / "causal", "--out", "on.gif")  # fmt: skip
    assert "last 5 of 7 frames" in err
    made = pipe_of(shelf_of_videos / "causal")(
        video=start[2:], num_frames=9, generator=item_generator(1, 0)
    )
    assert np.array_equal(shown("on.gif")[:7], start)
    assert np.array_equal(shown("on.gif")[7:], made.frames[0, 5:])


def test_every_block_may_have_its_prompt(run: Any, here: Path, shelf_of_videos: Path) -> None:
    model = shelf_of_videos / "clips"
    Path("plot.txt").write_text("a ball\na ball\na cube\n")
    flags = ("--model", model, "--seed", 3, "--frames", 5)
    run("generate", "video", *flags, "--prompts-per-block", "plot.txt", "--out", "a.gif")
    texts = ["a ball", "a ball", "a cube"]
    made = pipe_of(model)(texts, num_frames=5, generator=item_generator(3, 0)).frames[0]
    assert np.array_equal(shown("a.gif"), made)
    run("generate", "video", "--params-from", "a.gif", "--model", model, "--out", "b.gif")
    assert np.array_equal(shown("b.gif"), made)
    run("generate", "video", "a ball", *flags, "--out", "c.gif")
    plain = shown("c.gif")
    assert np.array_equal(plain[:2], made[:2]) and not np.array_equal(plain[2], made[2])


def test_frames_between_two(run: Any, here: Path, shelf_of_videos: Path) -> None:
    ends = frames_of(2, 3)
    save_video(ends, "ends.gif", fps=8)
    flags = ("--between", 3, "--seed", 1, "--out", "full.gif")
    _, _, err = run("edit", "video", "ends.gif", *flags, "--model", shelf_of_videos / "clips",
                    code=2)  # fmt: skip
    assert "cannot see the last" in err and "--continue N" in err
    run("edit", "video", "ends.gif", *flags, "--model", shelf_of_videos / "together")
    assert np.array_equal(shown("full.gif")[[0, 4]], ends) and len(shown("full.gif")) == 5


class TestPlay:
    def play(self, run: Any, model: Path, *flags: Any, code: int = 0) -> str:
        return run("play", "--model", model, *flags, code=code)[2]

    def test_a_session_goes_on_bit_for_bit(
        self, run: Any, here: Path, shelf_of_videos: Path
    ) -> None:
        model = shelf_of_videos / "world"
        Path("all.txt").write_text("# a lap\nArrowLeft x2\nArrowUp+ArrowLeft\n0.1, 0, 0\n2 x2\n-\n")
        Path("first.csv").write_text("steer,gas,brake\n1,0,0\n1;0;0\n")
        Path("second.jsonl").write_text(
            '"ArrowUp+ArrowLeft"\n[0.1, 0, 0]\n{"action": 2, "repeat": 2}\nnull\n'
        )
        self.play(run, model, "--actions", "all.txt", "--seed", 5, "--out", "all.gif")
        self.play(run, model, "--actions", "first.csv", "--seed", 5, "--out", "one.gif",
                  "--session-out", "s.safetensors")  # fmt: skip
        self.play(run, model, "--actions", "second.jsonl", "--resume", "s.safetensors",
                  "--out", "two.gif", "--session-out", "t.safetensors")  # fmt: skip
        whole, parts = shown("all.gif"), [shown("one.gif"), shown("two.gif")]
        assert np.array_equal(whole, np.concatenate(parts))
        assert [len(part) for part in parts] == [2 + 2, 5] and read_video("all.gif").fps == 10
        assert np.array_equal(whole[:2], frames_of(2, 7))  # the start that came with the model
        world: Any = AutoPipeline.from_pretrained(str(model))
        session = world.start(frames_of(2, 7), seed=5)
        played = [session.step(a) for a in ([1, 0, 0], [1, 0, 0], [1, 0.5, 0])]
        assert np.array_equal(whole[2:5], np.concatenate(played))
        record = json.loads(Path("two.json").read_text())["params"]
        assert record["session_sha256"] and record["actions_sha256"] and record["given"] == 0

    def test_worlds_start_from_files_too(self, run: Any, here: Path, shelf_of_videos: Path) -> None:
        model, start = shelf_of_videos / "world", frames_of(1, 9)
        Image.fromarray(start[0].repeat(2, 0).repeat(2, 1)).save("start.png")
        Path("a.txt").write_text("- x3\n")
        self.play(run, model, "--actions", "a.txt", "--frames", "start.png", "--seed", 1,
                  "--out", "a.gif")  # fmt: skip
        assert len(shown("a.gif")) == 4
        assert np.abs(shown("a.gif")[0].astype(int) - start[0]).max() <= 40  # resampled edges
        _, _, err = run("generate", "video", "--params-from", "a.gif", "--out", "b.gif",
                        "--model", model, code=2)  # fmt: skip
        assert "played world" in err

    def test_a_model_without_actions_only_goes_on(
        self, run: Any, here: Path, shelf_of_videos: Path
    ) -> None:
        Path("a.txt").write_text("- x3\n")
        flags = ("--actions", "a.txt", "--seed", 1, "--out", "a.gif")
        self.play(run, shelf_of_videos / "clips", *flags)
        made = pipe_of(shelf_of_videos / "clips")(num_frames=3, generator=item_generator(1, 0))
        assert np.array_equal(shown("a.gif"), made.frames[0])
        Path("a.txt").write_text("1\n")
        err = self.play(run, shelf_of_videos / "clips", *flags, code=3)
        assert "a.txt line 1" in err and "takes no actions" in err


GENERATE, EDIT = ("generate", "video", "x"), ("edit", "video")
BAD = [
    # frame counts, rates, sizes, names: refused as usage
    (GENERATE, ("--frames", "0"), 2, "try 1"),
    (GENERATE, ("--frames", "4.5"), 2, "try 4 or 5"),
    (GENERATE, ("--model", "causal", "--frames", "80"), 2, "4n+1; try 77 or 81"),
    (GENERATE, ("--fps", "0"), 2, "try 0.1"),
    (GENERATE, ("--fps", "nan"), 2, "--fps"),
    (GENERATE, ("--fps", "inf"), 2, "--fps"),
    (GENERATE, ("--fps", "60", "--out", "a.gif"), 2, "--fps of a GIF; got 60; allowed up to 50"),
    (GENERATE, ("--scale", "0"), 2, "try 1"),
    (GENERATE, ("--out", "a.exe"), 2, "try .mp4"),
    (GENERATE, ("--out", "a.png"), 2, ".mp4, .webm, .gif"),
    (GENERATE, ("--num", "2", "--out", "a.mp4"), 2, "--out with a folder"),
    (GENERATE, ("--width", "8"), 2, "--width is no flag of generate video"),
    (GENERATE, ("--top-k", "8"), 2, "--top-k is no flag of generate video"),
    (GENERATE, ("--image", "p.png", "--video", "v.gif"), 2, "one of them"),
    (("generate", "image", "x"), ("--frames", "8"), 2, "--frames is no flag of generate image"),
    (("generate", "image", "x"), (), 4, "makes videos"),
    (GENERATE, ("--prompts-per-block", "ok.txt"), 2, "beside --prompts-per-block"),
    (GENERATE[:2], ("--prompts-per-block", "missing.txt"), 3, "cannot read prompt file"),
    (GENERATE[:2], ("--prompts-per-block", "nothing.txt"), 3, "holds no prompts"),
    (GENERATE[:2], ("--prompts-per-block", "range.txt", "--frames", "1"), 2, "at most 1; try 1"),
    (("bench",), (), 4, "makes videos"),
    (EDIT, (), 2, "no input video"),
    ((*EDIT, "v.gif"), (), 2, "--continue N or --between N"),
    ((*EDIT, "v.gif"), ("--continue", "0"), 2, "try 1"),
    ((*EDIT, "v.gif"), ("--model", "causal", "--continue", "3"), 2, "try 5"),
    ((*EDIT, "p.png"), ("--between", "3"), 2, "two frames"),
    (("edit", "image", "p.png"), ("--continue", "3"), 2, "--continue is no flag of edit image"),
    # clips and pictures that cannot be read
    (GENERATE, ("--image", "missing.png"), 3, "cannot read missing.png"),
    (GENERATE, ("--image", "junk.png"), 3, "not a picture"),
    (GENERATE, ("--structure", "missing.gif"), 3, "cannot read missing.gif"),
    (GENERATE, ("--structure", "cut.gif"), 3, "cut short"),
    (("generate", "image", "x"), ("--structure", "v.gif"), 2, "--structure is no flag"),
    (GENERATE, ("--video", "junk.mp4"), 3, "not a video of a known format"),
    (GENERATE, ("--video", "list.mp4"), 3, "not a video of a known format"),
    (GENERATE, ("--video", "cut.gif"), 3, "cut short"),
    (GENERATE, ("--video", "folder"), 3, "not a regular file"),
    ((*EDIT, "missing.mp4"), ("--continue", "1"), 3, "cannot read missing.mp4"),
    (GENERATE, ("--params-from", "v.gif"), 3, "holds no blockloom parameters"),
    (GENERATE, ("--params-from", "junk.json"), 3, "not JSON"),
    # models
    (GENERATE, ("--model", "missing"), 4, "no such model"),
    # actions
    (("play",), (), 2, "no --actions given"),
    (("play", "--actions", "missing.txt"), (), 3, "cannot read script missing.txt"),
    (("play", "--actions", "folder"), (), 3, "a folder"),
    (("play", "--actions", "empty.txt"), (), 3, "holds no actions"),
    (("play", "--actions", "latin.txt"), (), 3, "latin.txt line 2 is not UTF-8"),
    (("play", "--actions", "range.txt"), (), 3, "line 2: action; got 3; allowed 3 finite numbers"),
    (("play", "--actions", "few.txt"), (), 3, "line 1: action; got 0.5 1"),
    (("play", "--actions", "nan.txt"), (), 3, "got nan 0 0"),
    (("play", "--actions", "key.txt"), (), 3, "got ArrowLift; allowed"),
    (("play", "--actions", "repeat.txt"), (), 3, "repeat; got 0"),
    (("play", "--actions", "json.txt"), (), 3, "unknown key; got actoin"),
    (("play", "--actions", "deep.txt"), (), 3, "deep.txt line 1"),
    (("play", "--actions", "long.txt"), (), 3, "too long a script"),
    (("play", "--actions", "ok.txt"), ("--start", "3"), 2, "--start; got 3; allowed 0 to 0; try 0"),
    (("play", "--actions", "ok.txt"), ("--out", "a.wav"), 2, "try .mp4"),
    # sessions
    (("play", "--actions", "ok.txt"), ("--resume", "missing.safetensors"), 3, "no session"),
    (("play", "--actions", "ok.txt"), ("--resume", "junk.safetensors"), 3, "no session"),
    (("play", "--actions", "ok.txt"), ("--resume", "foreign.safetensors"), 3, "no session"),
    (("play", "--actions", "ok.txt"), ("--resume", "x", "--seed", "3"), 2, "--seed beside"),
    (("play", "--actions", "ok.txt"), ("--session-out", "s.pt"), 2, "try s.safetensors"),
    (("play", "--actions", "ok.txt"), ("--session-out", "foreign.safetensors"), 2, "--overwrite"),
]


@pytest.fixture
def bad_files(here: Path) -> Path:
    from safetensors.numpy import save_file

    Image.fromarray(frames_of(1)[0]).save("p.png")
    save_video(frames_of(2), "v.gif", fps=5)
    Path("cut.gif").write_bytes(Path("v.gif").read_bytes()[:-20])
    for name in ("junk.png", "junk.mp4", "junk.json", "junk.safetensors"):
        Path(name).write_bytes(b"neither this nor that")
    Path("list.mp4").write_text("#EXTM3U\nfile:///etc/passwd\n")
    Path("folder").mkdir()
    texts = {
        "empty": "# nothing\n\n", "range": "1\n3\n", "few": "0.5, 1\n", "nan": "nan, 0, 0\n",
        "key": "ArrowLift\n", "repeat": "1 x0\n", "json": '{"actoin": 1}\n', "ok": "1\n",
        "nothing": "", "deep": "[" * 5000 + "\n", "long": "1 x999999\n1 x2\n",
    }  # fmt: skip
    for name, text in texts.items():
        Path(f"{name}.txt").write_text(text)
    Path("latin.txt").write_bytes(b"1\n\xe9\n")
    save_file({"block": np.zeros(1)}, "foreign.safetensors", {"session": "{}"})
    return here


@pytest.mark.parametrize(("command", "flags", "code", "words"), BAD)
def test_bad_inputs_give_one_line_and_leave_no_file(
    command: tuple[str, ...], flags: tuple[str, ...], code: int, words: str, run: Any,
    bad_files: Path, shelf_of_videos: Path,
) -> None:  # fmt: skip
    default = "world" if command[0] == "play" else "clips"
    arguments = [*command, *flags]
    if "--model" in flags:
        place = arguments.index("--model") + 1
        arguments[place] = str(shelf_of_videos / arguments[place])
    else:
        arguments += ["--model", str(shelf_of_videos / default)]
    before = sorted(bad_files.rglob("*"))
    _, out, err = run(*arguments, code=code)
    assert words in err and out == ""
    assert [p for p in sorted(bad_files.rglob("*")) if p not in before and p.is_file()] == []


def test_a_killed_run_leaves_nothing_or_a_whole_file(here: Path, shelf_of_videos: Path) -> None:
    command = ["generate", "video", "x", "--seed", "1"]
    command += ["--model", str(shelf_of_videos / "clips"), "--scale", "4", "--out", "a.mp4"]
    kill_while_writing([*command, "--frames", "100000"], here, ".a.mp4.*.part")
    assert [path.name for path in here.iterdir() if not path.name.startswith(".")] == []
    status = cli.main([*command, "--frames", "3"])
    assert status == 0 and shown("a.mp4").shape == (3, 32, 32, 3)
    # What the killed run had begun is gone too.
    assert sorted(path.name for path in here.iterdir()) == ["a.json", "a.mp4"]
