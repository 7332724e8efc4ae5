"""Settings and report of a training run.

They are plain data: the loop reads them, `config.json` keeps them. They do not know the loop.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..core.errors import UsageError

# Settings a resumed run may change: they alter what is written, not what is computed.
FREE_ON_RESUME = {
    "save_every",
    "keep_last",
    "log_every",
    "evaluate_every",
    "progress",
    "tensorboard",
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run.

    Attributes:
        num_steps: Optimiser steps.
        batch_size: Items per step, over all processes.
        seed: Decides item order and all noise.
        optimizer: "adamw", or "muon" for hidden matrices with AdamW for the rest.
        learning_rate: Peak rate.
        weight_decay: Decoupled decay of matrices and kernels.
        betas: AdamW's moment decays.
        curve: Learning rate after the warm-up.
        warmup_steps: Steps of the linear rise.
        final_ratio: Last rate over the peak, cosine only.
        late_from: First step of a second part with a rate of its own, which rises and falls as the
            first; None = there is none.
        late_learning_rate: Peak rate of the second part.
        max_grad_norm: Gradients are scaled down to this norm; 0 turns clipping off.
        ema_decay: Largest decay of the weights' moving average; 0 turns it off.
        accumulation: Parts a batch is split into to save memory.
        precision: "fp32", "bf16", or "auto" to time both once.
        max_bad_steps: Steps in a row without a finite gradient before the run stops.
        save_every: Steps between checkpoints; the last step is always saved.
        keep_last: Checkpoints kept.
        log_every: Steps between log lines; numbers are means over those steps.
        evaluate_every: Steps between calls of `evaluate`; 0 for only after the last.
        progress: Show a bar on stderr.
        tensorboard: Mirror the log to TensorBoard.
    """

    num_steps: int
    batch_size: int
    seed: int = 0
    optimizer: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    curve: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = 100
    final_ratio: float = 0.0
    late_from: int | None = None
    late_learning_rate: float | None = None
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    accumulation: int = 1
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    max_bad_steps: int = 5
    save_every: int = 500
    keep_last: int = 2
    log_every: int = 20
    evaluate_every: int = 0
    progress: bool = True
    tensorboard: bool = False

    def __post_init__(self) -> None:
        """Check every setting.

        Raises:
            UsageError: A setting is outside its range; it, its value and the range are named.
        """
        for name in ("num_steps", "batch_size", "accumulation", "save_every", "keep_last"):
            self._at_least(name, 1)
        for name in ("log_every", "max_bad_steps"):
            self._at_least(name, 1)
        for name in ("warmup_steps", "evaluate_every", "weight_decay", "max_grad_norm"):
            self._at_least(name, 0)
        if not 0 < self.learning_rate < math.inf:
            raise UsageError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if self.late_from is not None:
            self._at_least("late_from", 0)
            if not 0 < (self.late_learning_rate or 0) < math.inf:
                raise UsageError(
                    f"late_learning_rate is {self.late_learning_rate}; it must be above 0"
                )
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay is {self.ema_decay}; it must be in [0, 1), nearest 0.999")
        for name, allowed in (
            ("optimizer", ("adamw", "muon")),
            ("curve", ("cosine", "constant")),
            ("precision", ("auto", "fp32", "bf16")),
        ):
            if getattr(self, name) not in allowed:
                raise UsageError(f"{name} is {getattr(self, name)!r}; allowed {', '.join(allowed)}")
        if self.batch_size % self.accumulation:
            raise UsageError(
                f"batch_size is {self.batch_size}; it must be a multiple of accumulation "
                f"{self.accumulation}"
            )

    def _at_least(self, name: str, lowest: int) -> None:
        if getattr(self, name) < lowest:
            raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")


@dataclass(frozen=True)
class TrainReport:
    """How a run ended.

    Attributes:
        step: Optimiser steps taken in all.
        loss: Mean loss of the last logged window.
        skipped: Steps without a finite gradient, in all.
        seconds: Wall time of this call.
        checkpoint: Newest checkpoint directory.
    """

    step: int
    loss: float
    skipped: int
    seconds: float
    checkpoint: Path | None
