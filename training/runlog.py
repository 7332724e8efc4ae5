"""The run's JSONL log: one line per logged step, cut back exactly when a run resumes.

It does not know what the numbers mean.
"""

import json
import math
from pathlib import Path
from typing import Any

from .checkpoint import write_atomic


class RunLog:
    """Append-only JSON lines, each with a "step"; optionally mirrored to TensorBoard."""

    def __init__(self, path: Path, tensorboard: bool = False):
        """Open the log for appending.

        Args:
            path: The .jsonl file; created on the first line.
            tensorboard: Also write event files into a `tensorboard` folder beside it.

        Raises:
            ImportError: `tensorboard` is set and the package is missing.
        """
        self.path = path
        self._writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(path.parent / "tensorboard"))

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null, so every line is JSON.

        Args:
            step: Optimiser steps taken so far.
            values: Names to numbers.
        """
        plain = {name: _plain(value) for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **plain}) + "\n")
        if self._writer is not None:
            for name, value in plain.items():
                if isinstance(value, int | float):
                    self._writer.add_scalar(name, value, step)

    def read(self) -> list[dict[str, Any]]:
        """Read all whole lines; a line torn by a kill is left out."""
        if not self.path.exists():
            return []
        return [line for line in map(_parse, self.path.read_text().splitlines()) if line]

    def cut_after(self, step: int) -> None:
        """Drop lines of steps past `step` and torn lines, atomically.

        Args:
            step: Step of the checkpoint the run goes on from.
        """
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in self.read() if line["step"] <= step]
            write_atomic(self.path, "".join(kept).encode())

    def close(self) -> None:
        """Flush TensorBoard, when it is on."""
        if self._writer is not None:
            self._writer.close()


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _parse(line: str) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) and isinstance(parsed.get("step"), int) else None
