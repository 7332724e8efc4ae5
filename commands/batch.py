"""`blockloom batch`: one picture per line of a file, resumable and sharded.

What it does not know: how a line is parsed (`prompts`) or a picture written (`pipelines.media`).

Invariants: a picture is done when the PNG and its sidecar stand there with matching key and
hash, and only then; an interrupted run loses at most the pictures in flight; two processes
never work on the same shard of one folder; shards together give exactly the unsharded files.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import groupby, islice
from pathlib import Path
from typing import IO, Any

from ..core.errors import BlockloomError, DataError, ResourceError, UsageError
from ..core.messages import explain
from ..pipelines.guard import read_json
from ..pipelines.media import file_name, is_done, save_png, write_bytes
from ..pipelines.params import canonical_json
from . import models, output
from .arguments import Batch
from .generate import flag_settings
from .prompts import BadLine, Defaults, Item, read_items

EXIT_SOME_FAILED = 6
INDEX = "index.jsonl"
RUN_FILE = "run.json"


def run(args: Batch) -> int:
    """Check every line, then draw what is missing.

    Args:
        args: Parsed flags.

    Returns:
        0, or 6 when some items failed and `--on-error skip` was given.
    """
    if args.prompts is None:
        raise UsageError(explain("no prompt file given", hint="blockloom batch prompts.txt"))
    if args.out is None:
        raise UsageError(explain("--out is missing", allowed="a folder", hint="--out pictures"))
    if Path(args.out).suffix.lower() == ".png":
        raise UsageError(explain("--out of batch", got=args.out, allowed="a folder"))
    folder = output.plan(args.out, 1).folder
    choice = models.choose(args.model, args.recipe)
    models.check_makes(choice, "image")
    defaults = Defaults(choice.name, args.seed, flag_settings(args))
    path = Path(args.prompts)
    total, bad = _check_lines(args, path, defaults, choice)
    if args.dry_run:
        return _report(args, {"total": total, "failed": [asdict(b) for b in bad]}, len(bad))
    device = models.pick_device(args.device, args.dtype or "float32")
    output.ensure_writable(folder)
    with _locked(folder, args.shard):
        _check_same_run(folder, choice, defaults, overwrite=args.overwrite)
        work = _Work(args, choice, folder, device)
        for entry in bad:
            work.fail(entry.index, entry.line, entry.reason)
        work.draw_all(_mine(read_items(path, defaults, args.limit), args.shard))
    return _report(args, {"total": total, **work.counts()}, len(work.failed))


def _check_lines(
    args: Batch, path: Path, defaults: Defaults, choice: models.Choice
) -> tuple[int, list[BadLine]]:
    """Read the whole file once before any weights load."""
    total, bad = 0, []
    checked: set[str] = set()
    for entry in read_items(path, defaults, args.limit):
        total += 1
        if isinstance(entry, Item):
            settings = models.group_key(entry.params)[0]
            if settings not in checked:
                models.check_model_limits(entry.params, choice)
                checked.add(settings)
        elif args.on_error == "stop":
            raise DataError(explain(f"{path.name} line {entry.line}: {entry.reason}"))
        elif _is_mine(entry.index, args.shard):
            bad.append(entry)
    if total == 0:
        raise DataError(explain(f"{path.name} holds 0 prompts", allowed="at least 1"))
    return total, bad


def _is_mine(index: int, shard: str) -> bool:
    number, of = (int(part) for part in shard.split("/"))
    return index % of == number


def _mine(entries: Iterator[Item | BadLine], shard: str) -> Iterator[Item]:
    return (e for e in entries if isinstance(e, Item) and _is_mine(e.index, shard))


class _Work:
    """The drawing half of a run: opens the model when the first picture is really missing."""

    def __init__(self, args: Batch, choice: models.Choice, folder: Path, device: Any) -> None:
        self.args = args
        self.choice = choice
        self.folder = folder
        self.device = device
        self.pipe: Any = None
        self.done = 0
        self.skipped = 0
        self.failed: list[dict[str, Any]] = []

    def counts(self) -> dict[str, Any]:
        """Summarise the run."""
        return {"done": self.done, "already_there": self.skipped, "failed": self.failed}

    def fail(self, index: int, line: int, reason: str) -> None:
        """Record one failed line."""
        self.failed.append({"index": index, "line": line, "reason": reason})
        output.note(f"line {line}: {reason}")
        self.log({"index": index, "line": line, "status": "failed", "reason": reason})

    def log(self, entry: dict[str, Any]) -> None:
        """Append one line to the index."""
        # One write of one line in append mode: shards may share the file.
        with (self.folder / INDEX).open("ab") as stream:
            stream.write(canonical_json(entry).encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())

    def draw_all(self, items: Iterator[Item]) -> None:
        """Draw what is missing, neighbours with equal settings together."""
        missing = (item for item in items if not self.is_there(item))
        for _, group in groupby(missing, lambda item: models.group_key(item.params)):
            while chunk := list(islice(group, self.args.batch_size)):
                self.draw_chunk(chunk)

    def path(self, item: Item) -> Path:
        """Name an item's file."""
        return self.folder / file_name(item.index, item.name, item.params.seed)

    def is_there(self, item: Item) -> bool:
        """Say whether an item needs no work."""
        if self.args.overwrite:
            return False
        path = self.path(item)
        if is_done(path, item.params.key(self.choice.weights_sha256)):
            self.skipped += 1
            return True
        return False

    def draw_chunk(self, chunk: list[Item]) -> None:
        """Draw and write a few items in one call."""
        if self.pipe is None:
            dtype = self.args.dtype or "float32"
            self.pipe = models.open_model(self.choice, self.device, dtype)
        try:
            images = models.draw(self.pipe, [item.params for item in chunk])
        except (BlockloomError, ArithmeticError, MemoryError) as error:
            self.after_failure(chunk, error)
            return
        for item, image in zip(chunk, images, strict=True):
            self.save(item, image)

    def after_failure(self, chunk: list[Item], error: Exception) -> None:
        """Draw the pictures of a failed call one by one, so that one cannot take others along."""
        if len(chunk) > 1:
            for item in chunk:
                self.draw_chunk([item])
        elif self.args.on_error == "stop":
            raise error
        else:
            self.fail(chunk[0].index, chunk[0].line, str(error))

    def save(self, item: Item, image: Any) -> None:
        """Write one picture, then its line in the index."""
        record = self.choice.record(item.params)
        path = self.path(item)
        digest = save_png(image, path, record, in_file=not self.args.no_metadata)
        entry = {"index": item.index, "line": item.line, "id": item.id, "status": "done"}
        self.log(entry | {"file": path.name, "sha256": digest, "seed": item.params.seed})
        self.done += 1
        if self.args.format == "text":
            output.say(str(path))


def _check_same_run(
    folder: Path, choice: models.Choice, defaults: Defaults, *, overwrite: bool
) -> None:
    """Refuse to mix two runs in one folder, and say what differs."""
    run = {
        "model": choice.name,
        "recipe": choice.recipe,
        "weights_sha256": choice.weights_sha256,
        "seed": defaults.seed,
        "settings": defaults.settings,
    }
    path = folder / RUN_FILE
    if path.exists() and not overwrite:
        earlier = read_json(path, path.name)
        changed = [
            f"{key} {earlier.get(key)!r} -> {value!r}"
            for key, value in run.items()
            if earlier.get(key) != value
        ]
        if changed:
            raise UsageError(
                explain(
                    f"{folder.name} holds a run with other settings: {', '.join(changed)}",
                    hint="another --out, or --overwrite",
                )
            )
    write_bytes(path, json.dumps(run, indent=2, sort_keys=True).encode() + b"\n")


@contextmanager
def _locked(folder: Path, shard: str) -> Iterator[None]:
    """Hold the folder: alone without shards, beside other shards with them.

    Raises:
        ResourceError: Another process holds it; its process id is named.
    """
    number, of = shard.split("/")
    is_alone = of == "1"
    with _flock(folder / ".blockloom.lock", shared=not is_alone):
        if is_alone:
            # Nobody else writes here now, so a .part is what a killed run left behind.
            for stale in folder.glob(".*.part"):
                stale.unlink(missing_ok=True)
            yield
        else:
            with _flock(folder / f".blockloom-{number}-of-{of}.lock", shared=False):
                yield


@contextmanager
def _flock(path: Path, *, shared: bool) -> Iterator[None]:
    with path.open("a+b") as stream:
        _acquire(stream, path, shared=shared)
        if not shared:
            stream.truncate(0)
            stream.write(str(os.getpid()).encode())
            stream.flush()
        yield


def _acquire(stream: IO[bytes], path: Path, *, shared: bool) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: no advisory locks here; the atomic writes still hold.
        return
    try:
        fcntl.flock(stream, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        stream.seek(0)
        holder = stream.read(20).decode("ascii", "replace") or "unknown"
        raise ResourceError(
            explain(
                f"folder {path.parent.name} is in use by process {holder}",
                hint="--shard i/n to share the work",
            )
        ) from error


def _report(args: Batch, result: dict[str, Any], num_failed: int) -> int:
    if args.format == "json":
        output.emit_json(result)
    else:
        parts = [f"{result['total']} prompts"]
        parts += [
            f"{result[k]} {k.replace('_', ' ')}" for k in ("done", "already_there") if k in result
        ]
        output.note(", ".join([*parts, f"{num_failed} failed"]))
        for entry in result["failed"]:
            output.note(f"failed: line {entry['line']}: {entry['reason']}")
    return EXIT_SOME_FAILED if num_failed else 0
