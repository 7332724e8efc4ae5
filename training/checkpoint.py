"""Checkpoint directories that survive a kill at any instant.

A checkpoint is a directory of safetensors and JSON files with a sha256 manifest. It is written
under a temporary name beside the others, synced, then renamed; the `latest` pointer follows. So a
reader meets whole checkpoints only, and a damaged one is passed over for the one before.

It does not know what the tensors mean. Invariants: no pickle; only names this module gave
(`step_` plus eight digits, and its own temporaries) are ever deleted.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.errors import DataError

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8})")
_TEMPORARY = re.compile(r"step_\d{8}\.tmp-\d+")


@dataclass(frozen=True)
class Checkpoint:
    """Contents of one verified checkpoint.

    Attributes:
        step: Optimiser steps taken when it was written.
        path: Its directory.
        tensors: File stem to named tensors, on the CPU.
        documents: File stem to JSON document.
    """

    step: int
    path: Path
    tensors: dict[str, dict[str, Tensor]]
    documents: dict[str, dict[str, Any]]


class CheckpointStore:
    """The checkpoints of one run, newest last, of which the last few are kept."""

    def __init__(self, folder: Path | str, keep_last: int = 2):
        """Open a folder and remove temporaries a killed run left behind.

        Args:
            folder: Created when missing.
            keep_last: Checkpoints kept after a save, at least 1.

        Raises:
            ValueError: `keep_last` below 1.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; it must be at least 1")
        self.folder = Path(folder)
        self.keep_last = keep_last
        self.folder.mkdir(parents=True, exist_ok=True)
        for entry in self.folder.iterdir():
            if _TEMPORARY.fullmatch(entry.name) and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        documents: Mapping[str, Mapping[str, Any]],
    ) -> Path:
        """Write one checkpoint atomically, verify it, then drop the oldest.

        Args:
            step: Optimiser steps taken, 0..99999999.
            tensors: File stem to named tensors; any device or memory format.
            documents: File stem to a JSON document.

        Returns:
            The finished directory.

        Raises:
            OSError: The disk refused; earlier checkpoints are untouched.
        """
        final = self.folder / f"step_{step:08d}"
        temporary = self.folder / f"{final.name}.tmp-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            _write_files(temporary, tensors, documents)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync_folder(self.folder)
        verify(final)
        write_atomic(self.folder / "latest", (final.name + "\n").encode())
        for old in self.list()[: -self.keep_last]:
            shutil.rmtree(old)
        return final

    def list(self) -> list[Path]:
        """List finished checkpoint directories, oldest first (not verified)."""
        found = (p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir())
        return sorted(found, key=lambda path: path.name)

    def load(self) -> Checkpoint | None:
        """Read the newest undamaged checkpoint; None when the folder holds none.

        A damaged one is named in a warning and the one before it is tried.

        Raises:
            DataError: Checkpoints exist and all of them are damaged.
        """
        found = self.list()
        for path in reversed(found):
            try:
                return read(path)
            except DataError as error:
                logger.warning("checkpoint %s is damaged (%s); trying the one before", path, error)
        if found:
            raise DataError(f"all {len(found)} checkpoints in {self.folder} are damaged")
        return None


def verify(path: Path) -> None:
    """Check every file of a checkpoint against its manifest.

    Raises:
        DataError: A file is missing or differs; the file is named.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())["sha256"]
        names = dict(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path / 'manifest.json'}: unreadable ({error})") from error
    for name, digest in names.items():
        file = path / Path(name).name
        if not file.is_file():
            raise DataError(f"{file}: missing")
        if _digest(file) != digest:
            raise DataError(f"{file}: sha256 differs from the manifest")


def read(path: Path) -> Checkpoint:
    """Verify and read one checkpoint directory.

    Raises:
        DataError: A file is missing, differs from the manifest or does not parse.
    """
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise DataError(f"{path}: not a checkpoint directory (step_ and eight digits)")
    verify(path)
    try:
        tensors = {file.stem: load_file(file) for file in sorted(path.glob("*.safetensors"))}
        documents = {
            file.stem: json.loads(file.read_text())
            for file in sorted(path.glob("*.json"))
            if file.name != "manifest.json"
        }
    except (OSError, ValueError, SafetensorError) as error:
        raise DataError(f"{path}: unreadable ({error})") from error
    return Checkpoint(int(match[1]), path, tensors, documents)


def write_atomic(path: Path, content: bytes) -> None:
    """Replace a file so that a reader sees the old or the new content, never a part.

    Args:
        path: File to replace or create.
        content: Its new bytes.
    """
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def _write_files(
    folder: Path,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Mapping[str, Any]],
) -> None:
    for stem, group in tensors.items():
        # clone() parts tied weights, which safetensors refuses to store twice.
        plain = {name: value.detach().cpu().contiguous().clone() for name, value in group.items()}
        save_file(plain, folder / f"{stem}.safetensors")
    for stem, document in documents.items():
        (folder / f"{stem}.json").write_text(json.dumps(document, indent=1, allow_nan=True))
    digests = {file.name: _digest(file) for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"sha256": digests}, indent=1))
    for file in folder.iterdir():
        with file.open("rb+") as handle:
            os.fsync(handle.fileno())
    _sync_folder(folder)


def _digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
