"""The command line's promises: exit codes, one line per error, nothing lost, nothing half written.

Most cases run in this process through `cli.main`. The model folder of these cases passes every
check of names and configuration but holds no loadable weights: exit code 2 or 3 therefore also
shows that the fault was found before weights load (loading them would answer 4).
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import save_file

from blockloom import cli
from blockloom.commands import edit, output, prompts, values
from blockloom.commands.batch import _locked
from blockloom.core.errors import ResourceError, UsageError
from blockloom.pipelines.params import ImageParams

Result = tuple[int, str, str]


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that is a saved pipeline as far as names go."""
    import numpy as np

    folder = tmp_path_factory.mktemp("model") / "tiny"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "model_index.json").write_text('{"_class_name": "ImagePipeline"}')
    config = '{"recipe": {"name": "image/maskgit"}, "codebook_size": 64}'
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(config)
    (folder / "tokenizer" / "config.json").write_text('{"image_size": 16}')
    save_file({"weight": np.zeros(3, "float32")}, folder / "tokenizer" / "model.safetensors")
    return str(folder)


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> "Runner":
    monkeypatch.chdir(tmp_path)
    return Runner(capsys)


class Runner:
    """Calls the command line and checks what holds for every answer."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: str) -> Result:
        code = cli.main(list(arguments))
        out, err = self.capsys.readouterr()
        assert "Traceback" not in err
        errors = [line for line in err.splitlines() if line.startswith("error[")]
        assert len(errors) == (code not in (0, 6))
        if errors:
            assert err.splitlines()[-1] == errors[0]
        assert code in (0, 1, 2, 3, 4, 5, 6, 130, 143)
        return code, out, err


def no_files(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.suffix in (".png", ".part", ".json")]


class TestUsage:
    def test_no_arguments_prints_usage(self, run: Runner) -> None:
        code, out, err = run()
        assert code == 2
        assert "usage: blockloom" in err
        assert out == ""

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["generat", "image", "x"], ["unknown command", "try generate"]),
            (["generate", "imge", "x"], ["imge", "image"]),
            (["generate", "image", "x", "--stpes", "4"], ["--stpes", "--steps"]),
            (["generate", "image", "x", "--steps", "0"], ["--steps", "1 to 1000", "try 1"]),
            (["generate", "image", "x", "--steps", "-1"], ["got -1", "try 1"]),
            (["generate", "image", "x", "--steps", "1e9"], ["1 to 1000", "try 1000"]),
            (["generate", "image", "x", "--steps", "4.5"], ["got 4.5", "try 4 or 5"]),
            (["generate", "image", "x", "--steps"], ["--steps"]),
            (["generate", "image", "x", "--seed", "-2"], ["--seed", "or -1", "try 0"]),
            (["generate", "image", "x", "--seed", str(2**64)], [str(2**64 - 1)]),
            (["generate", "image", "x", "--seed", "abc"], ["--seed", "abc"]),
            (["generate", "image", "x", "--seed", "9" * 5000], ["--seed"]),
            (["generate", "image", "x", "--width", "0"], ["--width", "try 8"]),
            (["generate", "image", "x", "--width", "17"], ["17", "16 or 24"]),
            (["generate", "image", "x", "--width", "1000000"], ["4096"]),
            (["generate", "image", "x", "--height", "-8"], ["--height", "try 8"]),
            (["generate", "image", "x", "--guidance-scale", "nan"], ["nan", "0 to 100"]),
            (["generate", "image", "x", "--guidance-scale", "-5"], ["try 0"]),
            (["generate", "image", "x", "--guidance-scale", "1e308"], ["try 100"]),
            (["generate", "image", "x", "--temperature", "-1"], ["--temperature", "try 0"]),
            (["generate", "image", "x", "--temperature", "inf"], ["--temperature"]),
            (["generate", "image", "x", "--top-k", "0"], ["--top-k", "try 1"]),
            (["generate", "image", "x", "--top-p", "1.5"], ["--top-p", "try 1"]),
            (["generate", "image", "x", "--top-p", "0"], ["above 0 to 1"]),
            (["generate", "image", "x", "--num", "0"], ["--num", "try 1"]),
            (["generate", "image", "x", "--device", "gpu"], ["--device", "auto, cpu"]),
            (["generate", "image", "x", "--dtype", "float8"], ["--dtype", "try float"]),
            (["generate", "image", "x", "--format", "xml"], ["xml", "json"]),
            (["generate", "image", "x" * 10_001], ["too long", "10001", "10000"]),
            (["generate", "image", "a\0b"], ["NUL"]),
            (["generate", "image", "\ud800"], ["UTF-8"]),
            (["generate", "image", "a", "b"], ["Unrecognized", "b"]),
            (["edit", "image", "x.png", "--region", "lefft"], ["try left"]),
            (["edit", "image", "x.png", "--region", "5,0,5,9"], ["empty", "x0 < x1"]),
            (["edit", "image", "x.png", "--region", "1,2,3"], ["x0,y0,x1,y1"]),
            (["edit", "image"], ["no input picture"]),
            (["batch", "x.txt", "--shard", "2/2"], ["--shard", "0/2 and 1/2"]),
            (["batch", "--out", "o"], ["no prompt file"]),
            (["batch", "x.txt"], ["--out is missing"]),
            (["batch", "x.txt", "--out", "a.png"], ["allowed a folder"]),
            (["train"], ["no recipe"]),
            (["train", "image/maskgit"], ["--data is missing"]),
            (["train", "image/maskgit", "--set", "steps"], ["section.key=value"]),
            (["eval"], ["no model"]),
            (["inspect"], ["no recipe"]),
            (["inspect", "image/maskgit", "--length", "0"], ["--length", "try 1"]),
            (["inspect", "image/maskgit", "--out", "m.exe"], [".exe", ".npy"]),
            (["inspect", "image/maskgit", "--what", "cache", "--out", "m.npy"], [".json"]),
            (["inspect", "image/maksgit"], ["image/maskgit"]),
            (["data", "convert"], ["--data is missing"]),
            (["demo", "--port", "0"], ["--port", "try 1"]),
        ],
    )
    def test_bad_flags_answer_2_and_name_the_way_out(
        self, arguments: list[str], words: list[str], run: Runner, tmp_path: Path
    ) -> None:
        code, out, err = run(*arguments)
        assert (code, out) == (2, "")
        for word in words:
            assert word in err.splitlines()[-1]
        assert no_files(tmp_path)

    def test_no_prompt(self, run: Runner, model: str) -> None:
        code, _, err = run("generate", "image", "--model", model)
        assert code == 2
        assert "no prompt given" in err

    def test_model_limits_are_checked_before_weights(self, run: Runner, model: str) -> None:
        code, _, err = run("generate", "image", "x", "--model", model, "--top-k", "65")
        assert code == 2
        assert "1 to 64; try 64" in err
        code, _, err = run("generate", "image", "x", "--model", model, "--width", "32")
        assert code == 2
        assert "allowed 16" in err

    def test_missing_cuda_device_lists_what_is_here(self, run: Runner, model: str) -> None:
        code, _, err = run("generate", "image", "x", "--model", model, "--device", "cuda:99")
        assert code == 2
        assert "cuda:99" in err
        assert "cpu" in err

    def test_half_precision_on_the_cpu(self, run: Runner, model: str) -> None:
        code, _, err = run(
            *("generate", "image", "x", "--model", model),
            *("--device", "cpu", "--dtype", "float16"),
        )
        assert code == 2
        assert "try float32" in err

    def test_model_and_recipe_exclude_each_other(self, run: Runner, model: str) -> None:
        code, _, err = run("generate", "image", "x", "--model", model, "--recipe", "image/mar")
        assert code == 2
        assert "one of them" in err

    def test_help_of_every_command(self, run: Runner) -> None:
        from blockloom.commands.arguments import COMMANDS

        for name in COMMANDS:
            code, out, err = run(name, "--help")
            assert (code, err) == (0, "")
            assert f"usage: blockloom {name}" in out

    def test_random_seed_is_said(self, capsys: pytest.CaptureFixture[str]) -> None:
        seed = output.pick_seed(-1)
        assert 0 <= seed < 2**32
        assert capsys.readouterr().err == f"seed {seed}\n"
        assert output.pick_seed(5) == 5


class TestModels:
    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("blockloom/emojj", "no such model"),
            ("", "empty"),
            ("https://example.org/x", "URL"),
            ("../..", "model_index"),
            ("a\0b", "no such model"),
        ],
    )
    def test_bad_names_answer_4(self, name: str, words: str, run: Runner) -> None:
        code, _, err = run("generate", "image", "x", "--model", name, "--seed", "1")
        assert code == 4
        assert words in err

    def test_folder_with_a_pickle(self, run: Runner, model: str) -> None:
        (Path(model) / "model.pt").write_bytes(b"x")
        code, _, err = run("generate", "image", "x", "--model", model)
        assert code == 4
        assert "model.pt is a pickle" in err

    @pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, " " * 2_000_000])
    def test_broken_index(self, content: str, run: Runner, model: str) -> None:
        (Path(model) / "model" / "config.json").write_text(content)
        code, _, err = run("generate", "image", "x", "--model", model)
        assert code == 4
        assert "config.json" in err

    def test_recipe_without_weights_says_how_to_train(self, run: Runner) -> None:
        code, _, err = run("generate", "image", "x", "--recipe", "image/ardm")
        assert code == 4
        assert "blockloom train image/ardm" in err


class TestOutput:
    def generate(self, run: Runner, model: str, out: str, *more: str) -> Result:
        return run("generate", "image", "x", "--seed", "1", "--model", model, "--out", out, *more)

    def test_unknown_extension(self, run: Runner, model: str) -> None:
        code, _, err = self.generate(run, model, "out.exe")
        assert code == 2
        assert ".exe" in err
        assert ".png" in err

    def test_one_file_for_many(self, run: Runner, model: str) -> None:
        code, _, err = self.generate(run, model, "a.png", "--num", "3")
        assert code == 2
        assert "--num 3" in err

    def test_folder_is_a_file(self, run: Runner, model: str, tmp_path: Path) -> None:
        (tmp_path / "taken").write_text("x")
        assert self.generate(run, model, "taken/a.png")[0] == 2
        assert self.generate(run, model, "taken")[0] == 2
        (tmp_path / "folder.png").mkdir()
        assert self.generate(run, model, "folder.png")[0] == 2

    @pytest.mark.parametrize("out", ["", " ", "a\0b"])
    def test_empty_and_nul(self, out: str, run: Runner, model: str) -> None:
        assert self.generate(run, model, out)[0] == 2

    def test_existing_file_is_not_lost(self, run: Runner, model: str, tmp_path: Path) -> None:
        (tmp_path / "a.png").write_bytes(b"precious")
        code, _, err = self.generate(run, model, "a.png")
        assert code == 2
        assert "--overwrite" in err
        assert (tmp_path / "a.png").read_bytes() == b"precious"
        (tmp_path / "b.json").write_text("precious")
        assert self.generate(run, model, "b.png")[0] == 2

    def test_unwritable_folder_answers_5_before_loading(
        self, run: Runner, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr("tempfile.TemporaryFile", refuse)
        code, _, err = self.generate(run, model, "pictures")
        assert code == 5
        assert "Permission denied" in err

    def test_link_is_resolved_and_shown(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        assert output.plan(str(tmp_path / "link"), 2).folder == tmp_path / "real"
        assert str(tmp_path / "real") in capsys.readouterr().err

    def test_names_never_leave_the_folder(self, tmp_path: Path) -> None:
        target = output.plan(str(tmp_path), 2)
        for prompt in ("../../x", "/etc/passwd", "C:\\x", "a" * 5000, "🍎"):
            params = ImageParams(prompt=prompt, seed=1, model="m")
            assert target.path(0, params).parent == tmp_path

    @pytest.mark.parametrize("content", [b"", b"x", b"{}", b"[" * 99_999])
    def test_params_from_a_wrong_file(
        self, content: bytes, run: Runner, model: str, tmp_path: Path
    ) -> None:
        (tmp_path / "a.json").write_bytes(content)
        code, _, err = self.generate(run, model, "b.png", "--params-from", "a.json")
        assert code == 3
        assert "a.json" in err
        assert self.generate(run, model, "b.png", "--params-from", "none.png")[0] == 3


class TestEdit:
    def test_input_faults(self, run: Runner, model: str, tmp_path: Path) -> None:
        (tmp_path / "a.svg").write_text("<svg/>")
        for name in ("missing.png", "a.svg", "."):
            code, _, _ = run("edit", "image", name, "--prompt", "x", "--region", "left")
            assert code == 3

    def test_missing_flags(self, run: Runner, model: str, tmp_path: Path) -> None:
        from PIL import Image

        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        assert run("edit", "image", "a.png", "--region", "left", "--model", model)[0] == 2
        assert run("edit", "image", "a.png", "--prompt", "x", "--model", model)[0] == 2
        code, _, err = run(
            *("edit", "image", "a.png", "--prompt", "x", "--region", "4,4,9,9"),
            *("--model", model, "--seed", "1"),
        )
        assert code == 2
        assert "try 4,4,8,8" in err

    def test_region_and_keep_mask(self) -> None:
        assert edit.region_box("top", 6, 5) == (0, 0, 6, 2)
        assert edit.region_box("right", 6, 5) == (3, 0, 6, 5)
        assert edit.region_box("1,2,3,4", 6, 4) == (1, 2, 3, 4)
        with pytest.raises(UsageError, match="inside 0,0,6,4"):
            edit.region_box("0,0,7,4", 6, 4)
        keep = edit.keep_mask((3, 0, 6, 4), (6, 4), 8)
        assert keep.shape == (8, 8)
        assert keep[:, :4].all()
        assert not keep[:, 4:].any()
        # 1..2 of 5 pixels covers 1.6..3.2 of 8: grown to 1..4
        keep = edit.keep_mask((1, 1, 2, 2), (5, 5), 8)
        assert (~keep).sum() == 9
        assert not keep[1:4, 1:4].any()


class TestBatchFiles:
    def batch(self, run: Runner, model: str, path: str, *more: str) -> Result:
        return run("batch", path, "--out", "o", "--model", model, "--dry-run", *more)

    def test_faulty_files_answer_3(self, run: Runner, model: str, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "empty").write_text("")
        (tmp_path / "comments").write_text("# nothing\n\n   \n")
        (tmp_path / "bytes").write_bytes(b"fine\n\xff\xfe\xfa\n")
        (tmp_path / "utf16").write_bytes("apple".encode("utf-16"))
        (tmp_path / "nul").write_bytes(b"a\0b\n")
        (tmp_path / "long").write_bytes(b"a" * 10_000_000)
        expected = {
            "missing": "missing",
            "folder": "folder",
            "pipe": "regular file",
            "empty": "0 prompts",
            "comments": "0 prompts",
            "bytes": "line 2",
            "utf16": "UTF-16",
            "nul": "line 1",
            "long": "longer",
            "/dev/zero": "regular file",
        }
        for name, words in expected.items():
            code, _, err = self.batch(run, model, name)
            assert (name, code) == (name, 3)
            assert words in err

    def test_unreadable_file(
        self, run: Runner, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "p.txt").write_text("apple\n")
        open_file = Path.open

        def refuse(self: Path, *args: object, **settings: object) -> object:
            if self.name == "p.txt":
                raise PermissionError(13, "Permission denied")
            return open_file(self, *args, **settings)  # type: ignore[call-overload]

        monkeypatch.setattr(Path, "open", refuse)
        code, _, err = self.batch(run, model, "p.txt")
        assert code == 3
        assert "Permission denied" in err

    def test_broken_line_stops_or_is_skipped(self, run: Runner, model: str, tmp_path: Path) -> None:
        lines = [json.dumps({"id": str(i), "prompt": f"apple {i}"}) for i in range(10)]
        lines[6] = '{"prompt": '
        (tmp_path / "p.jsonl").write_text("\n".join(lines))
        code, _, err = self.batch(run, model, "p.jsonl")
        assert code == 3
        assert "line 7" in err
        code, out, _ = self.batch(run, model, "p.jsonl", "--on-error", "skip", "--format", "json")
        assert code == 6
        report = json.loads(out)
        assert report["total"] == 10
        assert [entry["line"] for entry in report["failed"]] == [7]

    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ('{"promt": "x"}', ["unknown key", "promt", "try prompt"]),
            ('{"prompt": 3}', ["prompt"]),
            ('{"prompt": "x", "seed": -1}', ["seed"]),
            ('{"prompt": "x", "seed": true}', ["seed"]),
            ('{"prompt": "x", "steps": 0}', ["steps"]),
            ('{"prompt": "x", "steps": 4.5}', ["steps"]),
            ('{"prompt": "x", "top_p": NaN}', ["top_p"]),
            ('{"prompt": "\\ud800"}', ["UTF-8"]),
            ('{"prompt": "a\\u0000"}', ["NUL"]),
            ("[1]", ["object"]),
            ("[" * 60_000, []),
            ('{"id": "' + "x" * 20_000 + '", "prompt": "x"}', ["id"]),
        ],
    )
    def test_bad_jsonl_lines(
        self, line: str, words: list[str], run: Runner, model: str, tmp_path: Path
    ) -> None:
        (tmp_path / "p.jsonl").write_text(line + "\n")
        code, _, err = self.batch(run, model, "p.jsonl")
        assert code == 3
        for word in ["line 1", *words]:
            assert word in err

    def test_duplicate_ids(self, run: Runner, model: str, tmp_path: Path) -> None:
        (tmp_path / "p.jsonl").write_text('{"id":"a","prompt":"x"}\n{"id":"a","prompt":"y"}\n')
        code, _, err = self.batch(run, model, "p.jsonl")
        assert code == 3
        assert "line 2" in err
        assert "twice" in err

    def test_limits_of_the_model_hold_for_lines(
        self, run: Runner, model: str, tmp_path: Path
    ) -> None:
        (tmp_path / "p.jsonl").write_text('{"prompt":"x","top_k":65}\n')
        assert self.batch(run, model, "p.jsonl")[0] == 2

    def test_text_files(self, tmp_path: Path) -> None:
        path = tmp_path / "p.txt"
        path.write_bytes(b"\xef\xbb\xbf=1+1\r\n# no\n\n red apple \n")
        items = list(prompts.read_items(path, prompts.Defaults("m", 3, {}), None))
        assert [i.params.prompt for i in items if isinstance(i, prompts.Item)] == [
            "=1+1",
            "red apple",
        ]
        assert [(i.index, i.line) for i in items] == [(0, 1), (1, 4)]

    def test_seeds_depend_on_id_and_run_only(self, tmp_path: Path) -> None:
        lines = [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y"}, {"prompt": "z", "seed": 9}]

        def seeds(order: list[int], seed: int) -> dict[str, int]:
            path = tmp_path / "p.jsonl"
            path.write_text("\n".join(json.dumps(lines[i]) for i in order))
            items = prompts.read_items(path, prompts.Defaults("m", seed, {}), None)
            return {i.params.prompt: i.params.seed for i in items if isinstance(i, prompts.Item)}

        assert seeds([0, 1, 2], 0) == seeds([2, 1, 0], 0)
        assert seeds([0, 1, 2], 0)["x"] != seeds([0, 1, 2], 1)["x"]
        assert seeds([0, 1, 2], 0)["z"] == 9

    def test_a_million_lines_stream(self, tmp_path: Path) -> None:
        import tracemalloc

        path = tmp_path / "p.txt"
        path.write_bytes(b"apple\n" * 50_000)
        tracemalloc.start()
        count = sum(1 for _ in prompts.read_items(path, prompts.Defaults("m", 0, {}), None))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 50_000
        assert peak < 12 * 2**20  # the set of seen ids, not the lines

    def test_second_process_is_refused_by_name(self, tmp_path: Path) -> None:
        with _locked(tmp_path, "0/1"), pytest.raises(ResourceError, match=str(os.getpid())):
            with _locked(tmp_path, "0/1"):
                pass
        with _locked(tmp_path, "0/2"), _locked(tmp_path, "1/2"):
            with pytest.raises(ResourceError), _locked(tmp_path, "0/1"):
                pass
            with pytest.raises(ResourceError), _locked(tmp_path, "1/2"):
                pass

    def test_limit(self, tmp_path: Path) -> None:
        path = tmp_path / "p.txt"
        path.write_text("a\nb\nc\n")
        assert len(list(prompts.read_items(path, prompts.Defaults("m", 0, {}), 2))) == 2


class TestOtherCommands:
    def test_recipes(self, run: Runner) -> None:
        code, out, _ = run("recipes", "--format", "json", "--modality", "image")
        assert code == 0
        rows = {row["name"]: row for row in json.loads(out)}
        assert {"image/llamagen", "image/maskgit", "image/acdit"} <= set(rows)
        assert all({"exact", "learns", "system"} <= set(row) for row in rows.values())
        code, out, _ = run("recipes")
        assert code == 0
        assert "image/acdit" in out

    def test_doctor(self, run: Runner) -> None:
        code, out, _ = run("doctor", "--format", "json")
        report = json.loads(out)
        assert code == 0, report
        names = {check["name"]: check for check in report["checks"]}
        assert names["import tokenizers"]["level"] == "ok"
        assert names["torch"]["level"] == "ok"

    @pytest.mark.parametrize("command", [["train", "image/maskgit"], ["eval", "m"]])
    def test_missing_data(self, command: list[str], run: Runner, tmp_path: Path) -> None:
        assert run(*command, "--data", "nowhere", "--out", "o")[0] == 3
        (tmp_path / "a.txt").write_text("x")
        code, _, err = run(*command, "--data", "a.txt", "--out", "o")
        assert code == 3
        assert ".npz" in err

    def test_bad_override(self, run: Runner) -> None:
        code, _, err = run("inspect", "image/maskgit", "--set", "schedule.stpes=4")
        assert code == 4
        assert "steps" in err


class TestProcess:
    def test_bug_is_one_line_with_a_way_to_the_details(
        self, run: Runner, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise ZeroDivisionError("oops")

        monkeypatch.setattr("blockloom.commands.doctor._python", fail)
        code, _, err = run("doctor")
        assert code == 1
        assert "ZeroDivisionError: oops" in err
        assert "--debug" in err
        with pytest.raises(ZeroDivisionError):
            cli.main(["doctor", "--debug"])

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (MemoryError(), 5),
            (OSError(28, "No space left on device"), 5),
            (KeyboardInterrupt(), 130),
            (BrokenPipeError(), 0),
        ],
    )
    def test_machine_faults(
        self,
        error: BaseException,
        code: int,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr("blockloom.commands.doctor._python", fail)
        monkeypatch.setattr("blockloom.cli._close_quietly", lambda: 0)
        assert cli.main(["doctor"]) == code
        assert "Traceback" not in capsys.readouterr().err

    def test_swallowed_interrupt_still_answers_130(
        self, run: Runner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def swallow(*_: object) -> int:
            try:
                signal.raise_signal(signal.SIGINT)
            except KeyboardInterrupt:
                pass
            return 0

        monkeypatch.setattr("blockloom.commands.doctor.run", swallow)
        code, _, err = run("doctor")
        assert code == 130
        assert "interrupted" in err

    def test_handlers_are_put_back(self, run: Runner) -> None:
        before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        run("recipes")
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before

    def test_closed_stdout_is_quiet(self, tmp_path: Path) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "blockloom", "recipes", "--format", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
        ) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            err = process.stderr.read()
            assert process.wait(60) == 0
        assert err == b""

    @pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_signals_in_the_first_second(
        self, signum: signal.Signals, code: int, tmp_path: Path
    ) -> None:
        with subprocess.Popen(
            [sys.executable, "-m", "blockloom", "doctor"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            cwd=tmp_path,
        ) as process:
            assert process.stderr is not None
            time.sleep(0.7)  # past the interpreter's start, inside the import of torch
            process.send_signal(signum)
            err = process.stderr.read().decode()
            # A signal outside `main` (start, shutdown) ends the process in the system's own way,
            # which a shell reports with the same number.
            assert process.wait(60) in (code, -signum)
        assert "Traceback" not in err

    def test_a_signal_inside_a_finaliser_still_ends_the_run(self, tmp_path: Path) -> None:
        code = """
import os, signal, sys, time
from blockloom import cli
class Dying:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0)  # the signal's exception is raised here, where nobody can catch it
def dispatch(arguments):
    Dying()
    time.sleep(20)
    return 0
cli._dispatch = dispatch
sys.exit(cli.main([]))
"""
        before = time.monotonic()
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert run.returncode == 130 and time.monotonic() - before < 15
        assert run.stderr == "error[E-SIGNAL] interrupted; finished files are kept\n"

    def test_help_is_quick(self, tmp_path: Path) -> None:
        def seconds(*arguments: str) -> float:
            times = []
            for _ in range(3):
                start = time.perf_counter()
                subprocess.run(
                    [sys.executable, *arguments],
                    check=True,
                    stdout=subprocess.DEVNULL,
                    cwd=tmp_path,
                )
                times.append(time.perf_counter() - start)
            return min(times)

        assert seconds("-m", "blockloom", "--help") - seconds("-c", "pass") <= 0.7


class TestValues:
    def test_legal_texts(self) -> None:
        assert values.whole("--n", 0, 9)("9") == 9
        assert values.whole("--n", 0, 9, also=-1)("-1") == -1
        assert values.real("--x", 0, 1)("0") == 0.0
        assert values.device("cuda:3") == "cuda:3"
        assert values.shard("01/02") == "1/2"
        assert values.region(" 1, 2,3,4") == "1,2,3,4"
        assert values.override("a.b=c=d") == "a.b=c=d"

    @pytest.mark.parametrize("text", ["", "٣x", "0x10", "1_0_", "nan", "None", "1" * 9999])
    def test_odd_numbers_are_refused(self, text: str) -> None:
        with pytest.raises(values.FlagError):
            values.whole("--n", 1, 9)(text)
