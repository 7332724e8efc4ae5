"""Hostile model folders: refused with exit code 4, quickly, and nothing in them runs.

Each case is a copy of a sound folder with one thing changed. All run in one process that carries
an audit hook, which writes down every unpickling, process start, connection, and import from the
model folder while a folder is being opened.
"""

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Damage = Callable[[Path], None]
WEIGHTS = "model/diffusion_pytorch_model.safetensors"
PICKLE = b"\x80\x04cposix\nsystem\n(S'touch hacked'\ntR."


def edit_json(name: str, **changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content) and None


def header(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Rewrite the header of the weights."""

    def damage(folder: Path) -> None:
        path = folder / WEIGHTS
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        changed = change(json.loads(content[8 : 8 + length]))
        text = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])

    return damage


def first(change: dict[str, Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def apply(entries: dict[str, Any]) -> dict[str, Any]:
        name = next(key for key in sorted(entries) if key != "__metadata__")
        return entries | {name: entries[name] | change}

    return apply


def overlapping(entries: dict[str, Any]) -> dict[str, Any]:
    names = [key for key in entries if key != "__metadata__"]
    return {name: entries[names[0]] for name in names}


def sharded(shard: str) -> Damage:
    def damage(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        index = {"metadata": {}, "weight_map": {"head.weight": shard}}
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))

    return damage


def huge_config(folder: Path) -> None:
    with (folder / "model" / "config.json").open("r+b") as stream:
        stream.truncate(2**30)  # sparse: takes no disk


def link_out(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).symlink_to("/etc/passwd")


def with_module(folder: Path) -> None:
    (folder / "pipeline.py").write_text("open('hacked', 'w')")
    edit_json("model_index.json", model=["pipeline", "Evil"])(folder)


CASES: dict[str, Damage] = {
    "pickle_as_safetensors": write(WEIGHTS, PICKLE),
    "torch_file": write("model/diffusion_pytorch_model.bin", PICKLE),
    "torch_file_pt": write("extra.pt", PICKLE),
    "header_length_2_63": write(WEIGHTS, b"\0" * 7 + b"\x80" + b"{}"),
    "header_longer_than_file": write(WEIGHTS, struct.pack("<Q", 9999) + b"{}"),
    "header_not_json": header(lambda _: b"no json at all"),
    "header_nested": header(lambda _: b'{"a":' * 100_000),
    "offsets_out_of_file": header(first({"data_offsets": [0, 2**40]})),
    "offsets_negative": header(first({"data_offsets": [-8, 0]})),
    "offsets_overlap": header(overlapping),
    "duplicate_tensor": header(lambda e: json.dumps(e)[:-1].encode() + b',"a":{},"a":{}}'),
    "shape_is_not_bytes": header(first({"shape": [3]})),
    "shape_2_31": header(first({"shape": [2**31, 2**31]})),
    "unknown_dtype": header(first({"dtype": "OBJECT"})),
    "empty_weights": write(WEIGHTS, b""),
    "shard_elsewhere": sharded("../../secret.safetensors"),
    "shard_absolute": sharded("/etc/passwd"),
    "shard_missing": sharded("model-00001-of-00002.safetensors"),
    "link_out_of_folder": link_out,
    "config_1_gb": huge_config,
    "config_nested": write("model/config.json", b"[" * 100_000),
    "config_nan": write("model/config.json", b'{"height": NaN}'),
    "config_twice": write("model/config.json", b'{"height": 4, "height": 5}'),
    "config_missing": lambda folder: (folder / "model" / "config.json").unlink(),
    "config_not_object": write("model/config.json", b"[]"),
    "config_huge_dims": edit_json("model/config.json", height=2**31, width=2**31),
    "config_large_dims": edit_json("model/config.json", height=2**21, width=1),
    "config_wrong_type": edit_json("model/config.json", height="four"),
    "trust_remote_code": edit_json("model/config.json", trust_remote_code=True),
    "target": edit_json("model/config.json", _target_="os.system"),
    "auto_map": edit_json("tokenizer/config.json", auto_map={"AutoModel": "evil--evil.Evil"}),
    "class": edit_json("model/config.json", __class__="os.system"),
    "attention_kernel": edit_json("model/config.json", attn_implementation="someone/kernel"),
    "unknown_recipe_key": edit_json("model/config.json", recipe={"name": "x", "evil": 1}),
    "foreign_module": edit_json("model_index.json", model=["os", "system"]),
    "foreign_in_our_package": edit_json("model_index.json", model=["blockloom.cli", "main"]),
    "function_not_class": edit_json(
        "model_index.json", model=["blockloom.models.generator", "Any"]
    ),
    "diffusers_module": edit_json("model_index.json", model=["diffusers", "UNet2DModel"]),
    "own_module": with_module,
    "custom_pipeline": edit_json("model_index.json", _class_name=["pipeline", "Evil"]),
    "unknown_pipeline": edit_json("model_index.json", _class_name="StableDiffusionPipeline"),
    "index_key": edit_json("model_index.json", _module="pipeline"),
    "index_not_json": write("model_index.json", b"\xff\xfe"),
}

DRIVER = """
import contextlib, io, json, os, resource, sys, time
from blockloom import cli
root, good, names = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
assert cli.main(["generate", "image", "x", "--seed", "1", "--model", good, "--out", "g.png"]) == 0
events, watching = [], [False]
def hook(event, args):
    if not watching[0]:
        return
    if event in ("pickle.find_class", "os.system", "subprocess.Popen", "os.exec", "os.posix_spawn",
                 "socket.connect", "os.fork"):
        events.append(event)
    if event == "ctypes.dlopen" and str(args[0]).startswith(root):
        events.append("dlopen " + str(args[0]))
    if event == "import" and str(args[0]).startswith(("pipeline", "evil")):
        events.append("import " + str(args[0]))
    if event == "open" and isinstance(args[0], str) and (
        args[0].startswith("/etc/passwd") or args[0].endswith((".pt", ".bin"))):
        events.append("open " + args[0])
sys.addaudithook(hook)
results = {}
for name in names:
    events.clear()
    error = io.StringIO()
    start = time.perf_counter()
    watching[0] = True
    with contextlib.redirect_stderr(error):
        code = cli.main(["generate", "image", "x", "--seed", "1", "--out", name + ".png",
                         "--model", os.path.join(root, name)])
    watching[0] = False
    results[name] = [code, error.getvalue(), list(events), time.perf_counter() - start]
print(json.dumps({"results": results, "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


@pytest.fixture(scope="module")
def outcome(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("hostile")
    for name, damage in CASES.items():
        shutil.copytree(tiny_model, root / name)
        damage(root / name)
    place = tmp_path_factory.mktemp("place")
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, str(root), str(tiny_model), json.dumps(list(CASES))],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    answer["files"] = sorted(path.name for path in place.iterdir())
    return answer


@pytest.mark.parametrize("name", CASES)
def test_refused_and_nothing_runs(name: str, outcome: dict[str, Any]) -> None:
    code, error, events, seconds = outcome["results"][name]
    assert (code, events) == (4, []), error
    lines = [line for line in error.splitlines() if line]
    assert lines[-1].startswith("error[E-MODEL]")
    assert sum(line.startswith("error[") for line in lines) == 1
    assert "Traceback" not in error
    assert seconds < 5


def test_nothing_is_left_behind(outcome: dict[str, Any]) -> None:
    assert outcome["files"] == ["g.json", "g.png"]
