"""Start-up: what `blockloom --help` costs over a bare Python.

Wall time of whole processes, in turns; the least of each side, because everything else that runs on
the machine only ever adds.
"""

import subprocess
import sys
import time

import torch
from common import Row, device_name

PASS_SECONDS = 0.7


def _seconds(command: list[str]) -> tuple[float, str]:
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout


def run(device: torch.device, *, repeats: int = 7) -> list[Row]:
    """Measure; `ratio` is the seconds over bare Python, and must stay below the pass line."""
    bare, ours = [], []
    help_command = [sys.executable, "-m", "blockloom", "--help"]
    _, text = _seconds(help_command)
    if "generate" not in text:
        raise RuntimeError("start-up: --help did not list the commands")
    for _ in range(repeats):
        bare.append(_seconds([sys.executable, "-c", "pass"])[0])
        ours.append(_seconds(help_command)[0])
    over = min(ours) - min(bare)
    row = Row(
        name="startup", what="seconds of `blockloom --help` over bare Python (lower is better)",
        peer="python -c pass", shape={}, ours=min(ours), theirs=min(bare), ratio=over,
        ratio_spread=(over, max(ours) - min(bare)), pass_line=PASS_SECONDS,
        passed=over <= PASS_SECONDS, clock="wall", dtype="none", threads=torch.get_num_threads(),
        device=device_name(torch.device("cpu")), repeats=repeats,
    )  # fmt: skip
    return [row]
