"""Choose the arithmetic of a run by timing it on the device at hand.

On some processors bfloat16 matrices are twice as fast as float32, on others ten times slower, and
no flag tells reliably; so both are timed. It does not know the model.
"""

import contextlib
import logging
import time
from typing import Literal

import torch

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16"]


def probe_precision(device: torch.device, budget_seconds: float = 0.05) -> Precision:
    """Time float32 against bfloat16 matrix products and name the faster, about 50 ms in all.

    Args:
        device: Where the run takes place.
        budget_seconds: Time for both measurements together.
    """
    seconds = {
        name: _seconds_per_product(device, dtype, budget_seconds / 2)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    }
    # A tie goes to float32: bfloat16 has to pay for its rounding.
    chosen: Precision = "bf16" if seconds["bf16"] < 0.9 * seconds["fp32"] else "fp32"
    logger.info(
        "precision probe on %s: fp32 %.0f us, bf16 %.0f us per 256x256x256 product; using %s",
        device,
        seconds["fp32"] * 1e6,
        seconds["bf16"] * 1e6,
        chosen,
    )
    return chosen


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager:
    """Return the context under which forward passes run."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _seconds_per_product(device: torch.device, dtype: torch.dtype, budget: float) -> float:
    left = torch.ones(256, 256, dtype=dtype, device=device)
    _wait(left @ left)  # first call compiles or loads kernels
    best, start = float("inf"), time.perf_counter()
    while time.perf_counter() - start < budget:
        before = time.perf_counter()
        _wait(left @ left)
        best = min(best, time.perf_counter() - before)
    return best


def _wait(result: torch.Tensor) -> None:
    float(result[0, 0])
