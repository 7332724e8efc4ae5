"""`blockloom doctor`: what this machine and this installation can do."""

import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any

from ..core.errors import BlockloomError
from ..core.messages import one_line
from ..pipelines.guard import read_json
from ..pipelines.params import bundled_models, weights_hash
from . import output
from .arguments import Doctor

_PACKAGES = (
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "tokenizers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "gradio",
)
_EXTRAS = {
    "test": ("pytest", "hypothesis", "beartype"),
    "train": ("tensorboard", "pyarrow"),
    "metrics": ("torchmetrics", "scipy"),
    "docs": ("matplotlib",),
}
_MIN_FREE_BYTES = 2**30


@dataclass(frozen=True)
class Check:
    """One line of the report; `level` is ok, note or fail."""

    name: str
    level: str
    detail: str


def run(args: Doctor) -> int:
    """Run every check and print the result.

    Args:
        args: Parsed flags.

    Returns:
        0 when nothing failed, else 5.
    """
    checks = [_python(), *_packages(), *_guarded("tokenizers", _tokenizers)]
    checks += _guarded("compute", _compute)
    checks += [*_guarded("disk", lambda: _disk(Path(args.out))), *_models(), *_extras()]
    is_fine = all(check.level != "fail" for check in checks)
    if args.format == "json":
        output.emit_json({"ok": is_fine, "checks": [asdict(check) for check in checks]})
    else:
        for check in checks:
            output.say(f"[{check.level:>4}] {check.name}: {check.detail}")
    return 0 if is_fine else 5


def _guarded(name: str, check: Callable[[], list[Check]]) -> list[Check]:
    """A broken installation may raise anything; the report must still be complete."""
    try:
        return check()
    except Exception as error:
        return [Check(name, "fail", one_line(f"{type(error).__name__}: {error}")[:300])]


def _python() -> Check:
    level = "ok" if sys.version_info >= (3, 11) else "fail"
    return Check("python", level, f"{platform.python_version()} on {platform.platform()}")


def _packages() -> list[Check]:
    from .. import __version__

    checks = [Check("blockloom", "ok", __version__)]
    for name in _PACKAGES:
        try:
            checks.append(Check(name, "ok", metadata.version(name)))
        except metadata.PackageNotFoundError:
            checks.append(Check(name, "fail", "not installed"))
    return checks


def _tokenizers() -> list[Check]:
    """Our folder `tokenizers/` must never hide the package of that name."""
    spec = util.find_spec("tokenizers")
    is_real = spec is not None and spec.origin is not None
    detail = "Hugging Face's package" if is_real else "hidden by a folder of that name"
    return [Check("import tokenizers", "ok" if is_real else "fail", detail)]


def _compute() -> list[Check]:
    import torch

    checks = [
        Check(
            "cpu",
            "ok",
            f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}",
        )
    ]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            size = f"{properties.total_memory / 2**30:.0f} GiB"
            checks.append(Check(f"cuda:{i}", "ok", f"{properties.name}, {size}"))
    else:
        checks.append(Check("cuda", "note", "none; the bundled models need none"))
    speeds = {name: _matmul_seconds(getattr(torch, name)) for name in ("float32", "bfloat16")}
    detail = ", ".join(f"{name} {1e3 * seconds:.1f} ms" for name, seconds in speeds.items())
    faster = min(speeds, key=lambda name: speeds[name])
    checks.append(
        Check("dtype", "ok", f"512 x 512 product on the CPU: {detail}; {faster} is faster")
    )
    return checks


def _matmul_seconds(dtype: Any) -> float:
    import torch

    matrix = torch.ones(512, 512, dtype=dtype)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        matrix @ matrix
        times.append(time.perf_counter() - start)
    return min(times)


def _disk(folder: Path) -> list[Check]:
    nearest = folder.resolve()
    while not nearest.exists():
        nearest = nearest.parent
    free = shutil.disk_usage(nearest).free
    is_writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    return [
        Check("disk", "ok" if free >= _MIN_FREE_BYTES else "note", f"{free / 2**30:.1f} GiB free"),
        Check(
            "output folder",
            "ok" if is_writable else "fail",
            f"{folder} is {'writable' if is_writable else 'not writable'}",
        ),
    ]


def _models() -> list[Check]:
    bundled = bundled_models()
    if not bundled:
        return [Check("bundled models", "note", "none in this installation")]
    checks = []
    for name, folder in bundled.items():
        try:
            digest = weights_hash(folder)
            stated = (folder / "weights.sha256.json").is_file()
            expected = (
                read_json(folder / "weights.sha256.json", "weights.sha256.json").get("sha256")
                if stated
                else digest
            )
        except BlockloomError as error:
            checks.append(Check(name, "fail", str(error)))
            continue
        is_right = digest == expected
        detail = f"sha256 {digest[:16]}" + ("" if is_right else f", expected {str(expected)[:16]}")
        checks.append(Check(name, "ok" if is_right else "fail", detail))
    return checks


def _extras() -> list[Check]:
    checks = []
    for extra, modules in _EXTRAS.items():
        missing = [name for name in modules if util.find_spec(name) is None]
        detail = (
            f'missing {", ".join(missing)}: pip install ".[{extra}]"' if missing else "installed"
        )
        checks.append(Check(f"extra {extra}", "note" if missing else "ok", detail))
    return checks
