"""What a model folder must look like before any of it is loaded.

What it does not know: torch, or what the weights mean. It reads names, small JSON files and the
headers of safetensors files.

Invariants: after `check_folder` returns, loading the folder opens no pickle, follows no link out
of the folder, reads no JSON file over 4 MiB, and imports no module but this package's own.
"""

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

from ..core.errors import ModelError, nearest
from ..core.messages import explain

MAX_JSON_BYTES = 4 * 2**20
MAX_HEADER_BYTES = 16 * 2**20
MAX_SETTING = 2**20  # beyond any real size; refused before a tensor of that size is allocated
STARTS = "starts.npz"
"""First frames of a world, beside `model_index.json`; the one archive a folder may hold."""
MAX_STARTS_BYTES = 512 * 2**20
_PICKLED = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz"}
_OUR_ROOMS = ("tokenizers", "models")
_DIFFUSERS_KEYS = {"_class_name", "_diffusers_version", "_name_or_path", "_use_default_values"}


def check_folder(folder: Path) -> None:
    """Refuse a model folder that holds anything that could run, escape, or exhaust memory.

    Args:
        folder: Folder with a `model_index.json`.

    Raises:
        ModelError: The file and the reason.
    """
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.resolve().is_relative_to(root):
            raise ModelError(explain(f"{name} is a link out of the model folder"))
        suffix = path.suffix.lower()
        if name == STARTS:
            check_starts(path)
        elif suffix in _PICKLED:
            raise ModelError(
                explain(
                    f"{name} is a pickle and can run code when opened",
                    allowed="safetensors weights",
                    hint="convert it: save the model again with safe_serialization=True",
                )
            )
        elif path.name.endswith(".index.json"):
            _check_shards(path, name)
        elif suffix == ".json":
            read_json(path, name)
        elif suffix == ".safetensors":
            _check_header(path, name)
    _check_index(read_json(folder / "model_index.json", "model_index.json"))


def check_starts(path: Path) -> None:
    """Refuse an archive of first frames with more than its two arrays, or that is too large.

    Args:
        path: The archive; it is opened without pickles later.

    Raises:
        ModelError: No archive, other members, or over 512 MiB unpacked.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise ModelError(explain(f"{path.name} is no archive of arrays")) from error
    if sorted(member.filename for member in members) != ["actions.npy", "frames.npy"]:
        raise ModelError(explain(f"{path.name} is not made of the arrays frames and actions"))
    if sum(member.file_size for member in members) > MAX_STARTS_BYTES:
        raise ModelError(explain(f"{path.name} unpacks to over {MAX_STARTS_BYTES} bytes"))


def read_json(path: Path, name: str) -> dict[str, Any]:
    """Read a JSON object from an untrusted folder.

    Args:
        path: The file.
        name: How messages call it.

    Raises:
        ModelError: Over 4 MiB, unreadable, not an object, with a repeated key, or with NaN.
    """
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(explain(f"{name} is larger than {MAX_JSON_BYTES} bytes"))
        return _parse(path.read_bytes(), name)
    except OSError as error:
        raise ModelError(explain(f"cannot read {name}: {error.strerror}")) from error


def _parse(content: bytes, name: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key stands there twice")
        return result

    def constant(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    try:
        value = json.loads(content, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        raise ModelError(explain(f"{name} is nested too deeply")) from None
    except ValueError as error:
        raise ModelError(explain(f"{name} is not sound JSON: {error}")) from None
    if not isinstance(value, dict):
        raise ModelError(explain(f"{name} is not a JSON object"))
    return value


def _check_header(path: Path, name: str) -> None:
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise ModelError(explain(f"{name} is damaged or no safetensors file"))
        header = _parse(stream.read(length), f"header of {name}")
    for tensor, entry in header.items():
        if tensor == "__metadata__":
            continue
        offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (
            isinstance(offsets, list)
            and len(offsets) == 2
            and all(isinstance(x, int) for x in offsets)
            and 0 <= offsets[0] <= offsets[1] <= size - 8 - length
        ):
            raise ModelError(explain(f"{name}: tensor {tensor} lies outside the file"))


def _check_shards(path: Path, name: str) -> None:
    shards = read_json(path, name).get("weight_map")
    if not isinstance(shards, dict):
        raise ModelError(explain(f"{name} holds no weight_map"))
    for shard in {str(value) for value in shards.values()}:
        is_plain = Path(shard).name == shard and shard.endswith(".safetensors")
        if not is_plain:
            raise ModelError(explain(f"{name} names a file elsewhere", got=shard))
        if not (path.parent / shard).is_file():
            raise ModelError(explain(f"{name} names a missing shard", got=shard))


def _check_index(index: dict[str, Any]) -> None:
    package = __package__.split(".")[0]
    allowed = tuple(f"{package}.{room}." for room in _OUR_ROOMS)
    for key, value in index.items():
        if key.startswith("_"):
            if key not in _DIFFUSERS_KEYS:
                raise ModelError(
                    explain(
                        "model_index.json: unknown key", got=key, hint=nearest(key, _DIFFUSERS_KEYS)
                    )
                )
            continue
        is_pair = isinstance(value, list) and len(value) == 2
        if not is_pair or not all(isinstance(part, str) for part in value):
            raise ModelError(explain(f"model_index.json: {key} is not [module, class]"))
        if not value[0].startswith(allowed) or not value[0].replace(".", "_").isidentifier():
            raise ModelError(
                explain(
                    f"model_index.json: {key} names a foreign module",
                    got=value[0],
                    allowed=" or ".join(f"{prefix}*" for prefix in allowed),
                )
            )


def check_configs(folder: Path) -> None:
    """Refuse configuration keys that the named class does not take.

    Imports the classes, which `check_folder` has limited to this package.

    Args:
        folder: A folder that passed `check_folder`.

    Raises:
        ModelError: Unknown class, unknown key (with the nearest), a size beyond reason, or no
            configuration.
    """
    from importlib import import_module
    from inspect import signature

    for key, value in read_json(folder / "model_index.json", "model_index.json").items():
        if key.startswith("_"):
            continue
        try:
            cls = getattr(import_module(value[0]), value[1])
        except (ImportError, AttributeError) as error:
            raise ModelError(explain(f"model_index.json: no class {value[1]}")) from error
        legal = [name for name in signature(cls.__init__).parameters if name != "self"]
        config = read_json(folder / key / "config.json", f"{key}/config.json")
        for name, setting in config.items():
            if isinstance(setting, int) and abs(setting) > MAX_SETTING:
                raise ModelError(
                    explain(
                        f"{key}/config.json: {name}", got=setting, allowed=f"at most {MAX_SETTING}"
                    )
                )
            if name not in legal and name not in _DIFFUSERS_KEYS:
                raise ModelError(
                    explain(
                        f"{key}/config.json: unknown key",
                        got=name,
                        allowed=", ".join(legal),
                        hint=nearest(name, legal),
                    )
                )
