"""The commands that draw, end to end, with a tiny untrained model of real classes."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blockloom import cli
from blockloom.pipelines.media import read_image, read_metadata


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def generate(model: Path, *arguments: str, code: int = 0) -> None:
    assert cli.main(["generate", "image", *arguments, "--model", str(model)]) == code


def digests(folder: Path, pattern: str = "*.png") -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob(pattern))
    }


def pixels(path: Path) -> np.ndarray:
    return np.asarray(read_image(path))


class TestGenerate:
    def test_one_file(
        self, tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        generate(tiny_model, "red apple", "--seed", "3", "--style", "noto", "--out", "a.png")
        assert capsys.readouterr().out.strip() == str(folder / "a.png")
        assert pixels(folder / "a.png").shape == (16, 16, 3)
        record = read_metadata(folder / "a.png")
        assert record.params.full_prompt == "red apple, noto style"
        assert record.params.seed == 3
        assert record.recipe == "image/maskgit"
        assert record.versions["torch"]
        assert sorted(p.name for p in folder.iterdir()) == ["a.json", "a.png"]

    def test_num_equals_singles_and_names_tell_the_seed(
        self, tiny_model: Path, folder: Path
    ) -> None:
        generate(tiny_model, "red apple", "--seed", "3", "--num", "3", "--out", "many")
        names = [f"0000{k}-red-apple-{3 + k}.png" for k in range(3)]
        assert sorted(digests(folder / "many")) == names
        for k in range(3):
            generate(tiny_model, "red apple", "--seed", str(3 + k), "--out", f"{k}.png")
            assert (folder / f"{k}.png").read_bytes() == (folder / "many" / names[k]).read_bytes()
        assert len(set(digests(folder / "many").values())) == 3

    def test_command_line_equals_api(self, tiny_model: Path, folder: Path) -> None:
        from blockloom import ImagePipeline

        generate(tiny_model, "red apple", "--seed", "3", "--steps", "4", "--out", "a.png")
        pipe = ImagePipeline.from_pretrained(str(tiny_model))
        pipe.set_progress_bar_config(disable=True)
        image = pipe("red apple", seed=3, num_inference_steps=4).images[0]
        assert (np.asarray(image) == pixels(folder / "a.png")).all()
        *_, done = pipe.stream("red apple", seed=3, num_inference_steps=4)
        assert (np.asarray(done.data["images"][0]) == pixels(folder / "a.png")).all()

    def test_params_from_repeats_bit_for_bit_in_another_process(
        self, tiny_model: Path, folder: Path
    ) -> None:
        flags = ["--steps", "3", "--guidance-scale", "2", "--temperature", "1.5", "--top-k", "5"]
        flags += ["--top-p", "0.9", "--negative-prompt", "blue"]
        generate(tiny_model, "red apple", "--seed", "3", "--out", "a.png", *flags)
        for source in ("a.png", "a.json"):
            command = [sys.executable, "-m", "blockloom", "generate", "image"]
            command += ["--params-from", source, "--model", str(tiny_model), "--out", "b.png"]
            command += ["--overwrite"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            assert result.returncode == 0, result.stderr
            assert "warning" not in result.stderr
            assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()

    def test_flags_beside_params_from_win(self, tiny_model: Path, folder: Path) -> None:
        generate(tiny_model, "red apple", "--seed", "3", "--steps", "3", "--out", "a.png")
        generate(tiny_model, "--params-from", "a.png", "--seed", "4", "--out", "b.png")
        params = read_metadata(folder / "b.png").params
        assert (params.prompt, params.seed, params.num_inference_steps) == ("red apple", 4, 3)

    def test_other_weights_are_said(
        self,
        tiny_model: Path,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        generate(tiny_model, "red apple", "--seed", "3", "--out", "a.png")
        sidecar = json.loads((folder / "a.json").read_text())
        sidecar["weights_sha256"] = "0" * 64
        (folder / "c.json").write_text(json.dumps(sidecar))
        generate(tiny_model, "--params-from", "c.json", "--out", "b.png")
        assert "other weights" in capsys.readouterr().err

    def test_the_same_picture_may_be_written_again_another_not(
        self, tiny_model: Path, folder: Path
    ) -> None:
        generate(tiny_model, "red apple", "--seed", "3", "--out", "a.png")
        before = digests(folder)
        generate(tiny_model, "red apple", "--seed", "3", "--out", "a.png")
        generate(tiny_model, "red apple", "--seed", "4", "--out", "a.png", code=2)
        assert digests(folder) == before
        generate(tiny_model, "red apple", "--seed", "4", "--out", "a.png", "--overwrite")
        assert digests(folder) != before

    def test_no_metadata(self, tiny_model: Path, folder: Path) -> None:
        generate(tiny_model, "red apple", "--seed", "3", "--out", "a.png", "--no-metadata")
        assert [p.name for p in folder.iterdir()] == ["a.png"]
        assert b"apple" not in (folder / "a.png").read_bytes()

    def test_json_and_random_seed(
        self, tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        generate(tiny_model, "red apple", "--out", "a.png", "--format", "json")
        captured = capsys.readouterr()
        (entry,) = json.loads(captured.out)
        assert f"seed {entry['seed']}" in captured.err
        assert entry["sha256"] == digests(folder)["a.png"]

    def test_greedy_is_temperature_0(self, tiny_model: Path, folder: Path) -> None:
        generate(tiny_model, "x", "--seed", "1", "--temperature", "0", "--out", "a.png")
        assert (folder / "a.png").is_file()

    def test_empty_prompt_is_allowed(self, tiny_model: Path, folder: Path) -> None:
        generate(tiny_model, "", "--seed", "1", "--out", "a.png")
        assert read_metadata(folder / "a.png").params.prompt == ""

    def test_default_folder(self, tiny_model: Path, folder: Path) -> None:
        generate(tiny_model, "../../x", "--seed", "1")
        (path,) = (folder / "outputs").glob("*.png")
        assert path.name.startswith("00000-x-")

    def test_disk_full_leaves_no_part(
        self, tiny_model: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", fail)
        generate(tiny_model, "x", "--seed", "1", "--out", "out", code=5)
        assert list((folder / "out").iterdir()) == []

    def test_damaged_weights_answer_4(self, tiny_model: Path, folder: Path) -> None:
        import shutil

        shutil.copytree(tiny_model, folder / "m")
        (path,) = (folder / "m" / "model").glob("*.safetensors")
        content = path.read_bytes()
        damaged = {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "header": b"\xff" * 8 + content[8:],
            "pickle": b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.",
        }
        for name, bad in damaged.items():
            path.write_bytes(bad)
            generate(folder / "m", "x", "--seed", "1", "--out", f"{name}.png", code=4)
            assert not (folder / f"{name}.png").exists()
        assert not (folder / "hacked").exists()


class TestEdit:
    def test_kept_half_stays(self, tiny_model: Path, folder: Path) -> None:
        generate(tiny_model, "red apple", "--seed", "3", "--out", "a.png")
        arguments = ["edit", "image", "a.png", "--prompt", "green pear", "--region", "right"]
        arguments += ["--seed", "5", "--model", str(tiny_model), "--out", "b.png"]
        assert cli.main(arguments) == 0
        before, after = pixels(folder / "a.png"), pixels(folder / "b.png")
        assert (before[:, :8] == after[:, :8]).all()
        assert (before[:, 8:] != after[:, 8:]).any()
        record = read_metadata(folder / "b.png")
        assert record.params.region == "right"
        again = ["edit", "image", "a.png", "--params-from", "b.png", "--model", str(tiny_model)]
        assert cli.main([*again, "--out", "c.png"]) == 0
        assert (folder / "b.png").read_bytes() == (folder / "c.png").read_bytes()
        generate(tiny_model, "--params-from", "b.png", "--out", "d.png", code=2)


class TestBatch:
    def batch(self, model: Path, *arguments: str) -> int:
        return cli.main(["batch", "p.jsonl", "--model", str(model), *arguments])

    @pytest.fixture(autouse=True)
    def prompts(self, folder: Path) -> None:
        lines = [{"id": f"item {k}", "prompt": f"apple {k}"} for k in range(5)]
        lines[2]["steps"] = 2  # type: ignore[assignment]
        lines[4]["seed"] = 7  # type: ignore[assignment]
        (folder / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines))

    def test_batch_size_and_shards_change_no_pixel(self, tiny_model: Path, folder: Path) -> None:
        assert self.batch(tiny_model, "--out", "a") == 0
        assert self.batch(tiny_model, "--out", "b", "--batch-size", "1") == 0
        for shard in ("1/2", "0/2"):
            assert self.batch(tiny_model, "--out", "c", "--shard", shard) == 0
        expected = digests(folder / "a")
        assert len(expected) == 5
        assert digests(folder / "b") == expected
        assert digests(folder / "c") == expected
        assert len((folder / "c" / "index.jsonl").read_text().splitlines()) == 5

    def test_second_run_does_nothing_and_a_lost_file_comes_back(
        self, tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.batch(tiny_model, "--out", "a") == 0
        expected = digests(folder / "a")
        (folder / "a" / sorted(expected)[1]).write_bytes(b"torn")
        (folder / "a" / ".x.png.1.part").write_bytes(b"stale")
        capsys.readouterr()
        assert self.batch(tiny_model, "--out", "a", "--format", "json") == 0
        report = json.loads(capsys.readouterr().out)
        assert (report["done"], report["already_there"]) == (1, 4)
        assert digests(folder / "a") == expected
        assert list((folder / "a").glob(".*.part")) == []

    def test_changed_parameters_are_refused_with_the_difference(
        self, tiny_model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.batch(tiny_model, "--out", "a") == 0
        before = digests(folder / "a")
        capsys.readouterr()
        assert self.batch(tiny_model, "--out", "a", "--seed", "9") == 2
        assert "seed 0 -> 9" in capsys.readouterr().err
        assert digests(folder / "a") == before

    def test_broken_line_is_skipped_and_answers_6(self, tiny_model: Path, folder: Path) -> None:
        text = (folder / "p.jsonl").read_text().splitlines()
        text[1] = "{"
        (folder / "p.jsonl").write_text("\n".join(text))
        assert self.batch(tiny_model, "--out", "a") == 3
        assert not (folder / "a").exists()
        assert self.batch(tiny_model, "--out", "a", "--on-error", "skip") == 6
        assert len(digests(folder / "a")) == 4
        index = [json.loads(x) for x in (folder / "a" / "index.jsonl").read_text().splitlines()]
        assert [e["line"] for e in index if e["status"] == "failed"] == [2]

    def test_item_equals_generate(self, tiny_model: Path, folder: Path) -> None:
        assert self.batch(tiny_model, "--out", "a") == 0
        generate(tiny_model, "apple 4", "--seed", "7", "--out", "b.png")
        (path,) = (folder / "a").glob("00004-*.png")
        assert path.read_bytes() == (folder / "b.png").read_bytes()


class TestInspect:
    def test_mask_as_numbers(self, folder: Path) -> None:
        arguments = ["inspect", "image/acdit", "--what", "mask", "--length", "12"]
        assert cli.main([*arguments, "--set", "layout.block=3", "--out", "m.npy"]) == 0
        mask = np.load(folder / "m.npy", allow_pickle=False)
        tokens = json.loads((folder / "m.json").read_text())
        assert mask.dtype == bool
        assert mask.shape == (len(tokens), len(tokens))
        assert {"block", "copy", "order", "role", "position", "document"} <= set(tokens[0])
        data = [i for i, t in enumerate(tokens) if t["block"] >= 0]
        for q in data:
            for k in data:
                query, key = tokens[q], tokens[k]
                if (query["copy"], key["copy"]) == (0, 0):
                    expected = key["block"] <= query["block"]
                elif (query["copy"], key["copy"]) == (1, 0):
                    expected = key["block"] < query["block"]
                elif (query["copy"], key["copy"]) == (1, 1):
                    expected = key["block"] == query["block"]
                else:
                    expected = False
                assert mask[q, k] == expected

    @pytest.mark.parametrize("what", ["layout", "mask", "schedule", "cache"])
    def test_pictures_and_json(self, what: str, folder: Path) -> None:
        arguments = ["inspect", "image/block_masked", "--what", what, "--length", "16"]
        assert cli.main([*arguments, "--out", "v.png"]) == 0
        assert cli.main([*arguments, "--out", "v.json"]) == 0
        assert read_image(folder / "v.png").width >= 320
        assert json.loads((folder / "v.json").read_text())

    def test_schedule_covers_everything_once(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ["inspect", "image/maskgit", "--what", "schedule", "--length", "144"]
        assert cli.main([*arguments, "--set", "schedule.steps=10", "--format", "json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert len(rows) == 10
        accepted = [position for row in rows for position in row["accepted"]]
        assert sorted(accepted) == list(range(144))


class TestBench:
    def test_both_ways_are_timed(
        self, tiny_model: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        arguments = ["bench", "--model", str(tiny_model), "--num", "1", "--repeat", "1"]
        assert cli.main([*arguments, "--format", "json"]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["cached_seconds"] > 0
        assert result["cache_ratio"] == pytest.approx(
            result["recomputed_seconds"] / result["cached_seconds"]
        )


class TestTraining:
    @pytest.fixture
    def pictures(self, folder: Path) -> Path:
        place = folder / "pictures"
        place.mkdir()
        for k in range(8):
            colour = (255 * (k & 1), 255 * (k >> 1 & 1), 255 * (k >> 2))
            Image.new("RGB", (16, 16), colour).save(place / f"{k}.png")
            (place / f"{k}.txt").write_text(f"colour {k}")
        return place

    def test_convert(self, pictures: Path, folder: Path) -> None:
        arguments = ["data", "convert", "pictures", "--out", "set.npz"]
        assert cli.main(arguments) == 0
        with np.load(folder / "set.npz", allow_pickle=False) as archive:
            assert archive["images"].shape == (8, 16, 16, 3)
            assert sorted(archive["captions"]) == [f"colour {k}" for k in range(8)]
        assert cli.main(arguments) == 2
        assert cli.main([*arguments, "--overwrite", "--size", "8"]) == 0

    def test_train_then_draw_then_measure(
        self, pictures: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sizes = ["backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "train.batch_size=4"]
        sets = [word for size in sizes for word in ("--set", size)]
        tokenizer = ["--set", "tokenizer={kind: palette, image_size: 16, patch: 4}"]
        arguments = ["train", "image/maskgit", "--data", "pictures", "--out", "run"]
        assert cli.main([*arguments, "--steps", "2", *sets, *tokenizer, "--format", "json"]) == 0
        json.loads(capsys.readouterr().out)
        generate(folder / "run" / "final", "colour 1", "--seed", "1", "--out", "a.png")
        assert pixels(folder / "a.png").shape == (16, 16, 3)
        assert cli.main(["eval", "run/final", "--data", "pictures", "--out", "e.json"]) == 0
        assert json.loads((folder / "e.json").read_text())["recipe"] == "image/maskgit"
