"""What all benchmarks share: timing two sides in turns, and one row of the report.

Both sides of a ratio run in one process, in turns, on the same inputs, after their outputs were
compared: a fast wrong answer raises. CPU figures are process time, so other jobs on the machine
weigh on both sides alike; wall time stands beside it.
"""

import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from blockloom.core.recipe import load_recipe
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start
from blockloom.models.generator import GenerativeModel

PEERS = ("torch", "transformers", "diffusers", "numpy")


@dataclass
class Row:
    """One line of the report; times in seconds, `ratio` = peer / ours (higher is better for us)."""

    name: str
    what: str
    peer: str
    shape: dict[str, Any]
    ours: float
    theirs: float
    ratio: float
    ratio_spread: tuple[float, float]
    pass_line: float | None
    passed: bool | None
    clock: str
    dtype: str
    threads: int
    device: str
    repeats: int
    wall_ratio: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Timing:
    """Seconds of both sides, one entry per turn."""

    ours: list[float]
    theirs: list[float]
    ours_wall: list[float]
    theirs_wall: list[float]
    clock: str

    @property
    def ratio(self) -> float:
        """Ratio of the medians."""
        return statistics.median(self.theirs) / statistics.median(self.ours)

    @property
    def spread(self) -> tuple[float, float]:
        """Smallest and largest ratio of one turn."""
        turns = [b / a for a, b in zip(self.ours, self.theirs, strict=True)]
        return min(turns), max(turns)


def _measure(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        wall = time.perf_counter()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return begin.elapsed_time(end) / 1e3, time.perf_counter() - wall
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.process_time() - cpu, time.perf_counter() - wall


def in_turns(
    ours: Callable[[], object], theirs: Callable[[], object], *, repeats: int, device: torch.device
) -> Timing:
    """Time two sides in turns, each after one run that does not count.

    Args:
        ours: Our side.
        theirs: The peer.
        repeats: Turns that count.
        device: CUDA times with events, everything else with process time. Process time adds up
            the threads, so with several threads the wall clock is the one to read.
    """
    ours(), theirs()
    timing = Timing([], [], [], [], "cuda events" if device.type == "cuda" else "process time")
    for _ in range(repeats):
        for run, seconds, wall in (
            (ours, timing.ours, timing.ours_wall),
            (theirs, timing.theirs, timing.theirs_wall),
        ):
            measured, elapsed = _measure(run, device)
            seconds.append(measured)
            wall.append(elapsed)
    return timing


def report_row(
    name: str, what: str, peer: str, timing: Timing, *, shape: dict[str, Any],
    pass_line: float | None, device: torch.device, dtype: str = "float32", **notes: Any,
) -> Row:  # fmt: skip
    """Turn timings into a row; `pass_line` is the least ratio that passes."""
    wall = statistics.median(timing.theirs_wall) / statistics.median(timing.ours_wall)
    return Row(
        name=name,
        what=what,
        peer=peer,
        shape=shape,
        ours=statistics.median(timing.ours),
        theirs=statistics.median(timing.theirs),
        ratio=timing.ratio,
        ratio_spread=timing.spread,
        pass_line=pass_line,
        passed=None if pass_line is None else timing.ratio >= pass_line,
        clock=timing.clock,
        dtype=dtype,
        threads=torch.get_num_threads(),
        device=device_name(device),
        repeats=len(timing.ours),
        wall_ratio=wall,
        notes=notes,
    )


def device_name(device: torch.device) -> str:
    """Name the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    for line in Path("/proc/cpuinfo").read_text().splitlines() if _has_cpuinfo() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _has_cpuinfo() -> bool:
    return Path("/proc/cpuinfo").is_file()


def environment() -> dict[str, Any]:
    """Commit, versions and machine of this run."""
    root = Path(__file__).resolve().parents[1]
    git = ["git", "-C", str(root)]
    commit = subprocess.run(
        [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "core", "models", "configs", "benchmarks/*.py"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "commit": commit.stdout.strip() or None,
        "changed_files": [line[3:] for line in changed.stdout.splitlines()],
        "versions": {name: version(name) for name in PEERS},
        "python": platform.python_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": Path("/proc/loadavg").read_text().split()[:3] if _has_cpuinfo() else None,
    }


def build_model(
    recipe: str, overrides: Sequence[str], height: int, width: int, *, codebook_size: int = 0,
    latent_channels: int = 0, device: torch.device,
) -> GenerativeModel:  # fmt: skip
    """Build a model with random weights everywhere, also where training starts at zero."""
    spec = load_recipe(recipe, list(overrides))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GenerativeModel(
            spec.model_dump(mode="json"), height, width, codebook_size=codebook_size,
            latent_channels=latent_channels,
        )  # fmt: skip
        for parameter in model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return model.eval().to(device)


def draw(model: GenerativeModel, **settings: Any) -> torch.Tensor:
    """Draw one picture's codes through the library's own request, from seed 0."""
    request = Request(["a red apple"], [item_generator(0, 0)], **settings)
    rollout = start(model, request)
    for _ in rollout.events():
        pass
    return rollout.values


def require_equal(ours: torch.Tensor, theirs: torch.Tensor, name: str) -> None:
    """Refuse to time sides that disagree.

    Raises:
        RuntimeError: The codes differ anywhere.
    """
    if not torch.equal(ours, theirs):
        wrong = int((ours != theirs).sum())
        raise RuntimeError(f"{name}: the two sides disagree on {wrong} of {ours.numel()} values")


def as_json(rows: Sequence[Row], **about: Any) -> dict[str, Any]:
    """The whole report as plain data."""
    return {**environment(), **about, "rows": [asdict(row) for row in rows]}
