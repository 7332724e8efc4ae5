"""Reading a file of prompts: JSONL with one object per line, or plain text with one prompt.

What it does not know: models, output files. Nothing here loads torch.

Invariants: the file is streamed, one line in memory at a time, so a million lines are no
trouble; every line is either an `Item` or a `BadLine` with its number; ids are unique.
"""

import hashlib
import json
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..core.errors import DataError, nearest
from ..core.messages import explain, one_line
from ..pipelines.params import ImageParams, hash64
from . import values

MAX_LINE_BYTES = 64 * 1024
MAX_FILE_BYTES = 2**30
MAX_ID = 10_000


class PromptLine(BaseModel):
    """One line of a JSONL prompt file; unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=0, max_length=values.MAX_PROMPT)
    id: str | int | None = None
    negative_prompt: str | None = Field(None, max_length=values.MAX_PROMPT)
    seed: int | None = Field(None, ge=0, le=values.MAX_SEED)
    style: str | None = Field(None, max_length=200)
    steps: int | None = Field(None, ge=1, le=values.MAX_STEPS)
    guidance_scale: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    temperature: float | None = Field(None, ge=0, le=100, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)


@dataclass(frozen=True)
class Item:
    """One picture to draw.

    Attributes:
        index: Position among the prompts of the file, from 0; never renumbered.
        line: Line in the file, from 1.
        id: Its own id, or the index as text.
        params: Its parameters, complete.
        name: What its file name is made from: the id if it has one, else the prompt.
    """

    index: int
    line: int
    id: str
    params: ImageParams
    name: str


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used, and why."""

    index: int
    line: int
    reason: str


@dataclass(frozen=True)
class Defaults:
    """What an item uses where it says nothing: the run's flags."""

    model: str
    seed: int
    settings: dict[str, Any]


def read_items(path: Path, defaults: Defaults, limit: int | None) -> Iterator[Item | BadLine]:
    """Stream a prompt file.

    Args:
        path: `.jsonl` or `.json` lines are objects; any other file holds prompts, where lines
            that begin with # and blank lines are left out.
        defaults: The run's flags.
        limit: Stop after this many prompts.

    Yields:
        Items and bad lines, in order.

    Raises:
        DataError: The file is missing, not a regular file, not UTF-8 text, or over 1 GiB.
    """
    check_file(path)
    is_json = path.suffix.lower() in (".jsonl", ".json", ".ndjson")
    seen: set[bytes] = set()
    index = 0
    for number, raw in raw_lines(path):
        if limit is not None and index >= limit:
            return
        item = _parse_line(path, number, index, raw, is_json, defaults)
        if item is None:
            continue
        if isinstance(item, Item):
            digest = hashlib.blake2b(item.id.encode("utf-8", "surrogatepass"), digest_size=16)
            if digest.digest() in seen:
                item = BadLine(index, number, explain("id is used twice", got=item.id))
            else:
                seen.add(digest.digest())
        index += 1
        yield item


def check_file(path: Path, what: str = "prompt file") -> None:
    """Refuse what cannot be read line by line: no file, a folder or device, or over 1 GiB.

    Args:
        path: The file.
        what: How messages call it.

    Raises:
        DataError: One of these.
    """
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "bad name"
        raise DataError(explain(f"cannot read {what} {path.name}: {reason}")) from error
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise DataError(explain(f"{what} {path.name} is {kind}"))
    if status.st_size > MAX_FILE_BYTES:
        raise DataError(
            explain(f"{what} {path.name}", got=f"{status.st_size} bytes", allowed="1 GiB")
        )


def raw_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Stream the lines of a text file with their numbers, from 1.

    Raises:
        DataError: UTF-16, a line over 64 KiB, or a failure to read.
    """
    try:
        with path.open("rb") as stream:
            if stream.read(2) in (b"\xff\xfe", b"\xfe\xff"):
                raise DataError(explain(f"{path.name} is UTF-16", hint="save it as UTF-8"))
            stream.seek(0)
            if stream.read(3) != b"\xef\xbb\xbf":  # a UTF-8 mark is allowed and skipped
                stream.seek(0)
            number = 0
            while raw := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(raw) > MAX_LINE_BYTES:
                    raise DataError(
                        explain(f"{path.name} line {number} is longer than {MAX_LINE_BYTES} bytes")
                    )
                yield number, raw
    except OSError as error:
        raise DataError(explain(f"cannot read {path.name}: {error.strerror}")) from error


def decoded(path: Path, number: int, raw: bytes) -> str:
    """Decode one line, without the space around it.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        return raw.decode("utf-8").strip()
    except UnicodeDecodeError as error:
        raise DataError(
            explain(f"{path.name} line {number} is not UTF-8 (byte {error.start + 1})")
        ) from error


def _parse_line(
    path: Path, number: int, index: int, raw: bytes, is_json: bool, defaults: Defaults
) -> Item | BadLine | None:
    text = decoded(path, number, raw)
    if not text or (not is_json and text.startswith("#")):
        return None
    try:
        line = _json_line(text) if is_json else PromptLine(prompt=text)
        for name in ("prompt", "negative_prompt", "style"):
            values.checked_text(name, getattr(line, name) or "")
    except (ValidationError, values.FlagError, ValueError, RecursionError) as error:
        return BadLine(index, number, _reason(error))
    return _item(index, number, line, defaults)


def _json_line(text: str) -> PromptLine:
    content = json.loads(text)
    if "\\ud" in text.lower() and isinstance(content, dict):
        for name, value in content.items():  # pydantic's own message hides what is wrong
            values.checked_text(str(name)[:40], value if isinstance(value, str) else "")
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return PromptLine.model_validate(content)


def _reason(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return one_line(str(error))
    found = error.errors(include_url=False)
    # A misspelt key also leaves its right name missing; the misspelling is the better message.
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        names = list(PromptLine.model_fields)
        return explain("unknown key", got=name, allowed=", ".join(names), hint=nearest(name, names))
    got = None if first["type"] == "missing" else first.get("input")
    return explain(f"{name}: {first['msg']}", got=got)


def _item(index: int, number: int, line: PromptLine, defaults: Defaults) -> Item | BadLine:
    item_id = str(index) if line.id is None else str(line.id)
    if len(item_id) > MAX_ID:
        return BadLine(index, number, f"id is longer than {MAX_ID} characters")
    own = {
        "negative_prompt": line.negative_prompt,
        "style": line.style,
        "num_inference_steps": line.steps,
        "guidance_scale": line.guidance_scale,
        "temperature": line.temperature,
        "top_k": line.top_k,
        "top_p": line.top_p,
    }
    settings = defaults.settings | {k: v for k, v in own.items() if v is not None}
    seed = hash64(defaults.seed, item_id) if line.seed is None else line.seed
    params = ImageParams(prompt=line.prompt, seed=seed, model=defaults.model, **settings)
    return Item(index, number, item_id, params, line.prompt if line.id is None else item_id)
