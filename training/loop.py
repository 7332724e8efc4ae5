"""The training loop: one class that trains any stage, and resumes it bit for bit.

A stage says which module to train, how many items there are and what the loss of some items is.
Everything random is a pure function of (seed, step): the order of items, the stage's generator and
torch's global generator. So a run killed at any instant and resumed ends with the same bits.

It does not know tokenizers, recipes or images. Invariants: a step whose loss or gradient is not
finite touches neither weights, optimiser nor average; a checkpoint is whole or absent.
"""

import contextlib
import dataclasses
import json
import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from ..core.errors import ModelError, UsageError
from .checkpoint import Checkpoint, CheckpointStore, write_atomic
from .optim import (
    build_optimizers,
    learning_rate_at,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from .order import batch_indices, seed_for
from .precision import Precision, autocast, probe_precision
from .runlog import RunLog
from .settings import FREE_ON_RESUME, TrainConfig, TrainReport

logger = logging.getLogger(__name__)


class Stage(Protocol):
    """What the loop trains.

    Attributes:
        num_items: Training items; batches hold indices in [0, num_items).
    """

    @property
    def num_items(self) -> int:
        """Training items."""
        ...

    def modules(self) -> nn.Module:
        """Return the module whose trainable parameters are moved and checkpointed."""
        ...

    def loss(
        self, indices: Tensor, generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the scalar mean loss of some items, and named metrics.

        Args:
            indices: int64 [items], on the CPU.
            generator: CPU generator seeded from (seed, step); the only source of randomness.
            step: Step being taken, from 0.
        """
        ...


class _StageModule(nn.Module):
    """Routes the loss through `forward`, which is where distributed wrappers hook in."""

    def __init__(self, stage: Stage):
        super().__init__()
        self.trained = stage.modules()
        self._loss = stage.loss

    def forward(
        self, indices: Tensor, generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        return self._loss(indices, generator, step)


class Trainer:
    """Train one stage in one folder.

    The folder gets `checkpoints/`, `log.jsonl` and `config.json`.
    """

    def __init__(
        self,
        stage: Stage,
        config: TrainConfig,
        folder: Path | str,
        *,
        resume: bool = False,
        evaluate: Callable[[int], dict[str, float]] | None = None,
    ):
        """Prepare a run, or load its newest checkpoint.

        Args:
            stage: What to train.
            config: Settings.
            folder: Output folder, created when missing.
            resume: Go on from the newest checkpoint; starts afresh when there is none.
            evaluate: Called with the step under averaged weights; its numbers go to the log as
                "eval_<name>".

        Raises:
            UsageError: The folder holds a run and `resume` is off, or a setting that changes the
                arithmetic differs from the run that is resumed.
            ModelError: The checkpoint does not fit the stage's module.
            DataError: All checkpoints are damaged.
        """
        if stage.num_items < 1:
            raise UsageError("the stage has no training items; at least 1 is needed")
        self.stage, self.config, self.folder = stage, config, Path(folder)
        self.evaluate = evaluate
        self.store = CheckpointStore(self.folder / "checkpoints", config.keep_last)
        if not resume:
            self._refuse_existing()
        found = self.store.load() if resume else None
        self.accelerator = Accelerator(mixed_precision="no")
        if config.batch_size % (config.accumulation * self.accelerator.num_processes):
            raise UsageError(
                f"batch_size is {config.batch_size}; it must be a multiple of accumulation x "
                f"processes = {config.accumulation * self.accelerator.num_processes}"
            )
        self.module = stage.modules().to(self.accelerator.device)
        self.optimizers = build_optimizers(
            self.module,
            kind=config.optimizer,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            betas=config.betas,
        )
        self.ema = self._build_ema()
        self.step = self.skipped = self._bad_in_row = 0
        self._window: dict[str, float] = {}
        self._window_seconds, self._window_steps = 0.0, 0
        self.log = RunLog(self.folder / "log.jsonl", config.tensorboard)
        if found is not None:
            self._restore(found)
        self.precision = self._choose_precision(found)
        self._wrapped = self.accelerator.prepare(_StageModule(stage))
        self._last_checkpoint = found.path if found else None
        self._stop_signal = 0  # number of the signal that asked to stop

    def run(self) -> TrainReport:
        """Train to the last step.

        Returns:
            How it ended.

        Raises:
            ModelError: Too many steps in a row without a finite gradient; `diverged.json` in the
                folder names the items.
            SystemExit: SIGTERM (143) or SIGINT (130) arrived; a checkpoint was written first.
        """
        started = time.perf_counter()
        if self.accelerator.is_main_process:
            settings = dataclasses.asdict(self.config) | {"used_precision": self.precision}
            write_atomic(self.folder / "config.json", _json(settings))
            self.log.cut_after(self.step)
        devices = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        # Third-party layers draw from torch's global generator; the caller's state is given back.
        with torch.random.fork_rng(devices), self._signals(), self._bar() as bar:
            while self.step < self.config.num_steps:
                self._one_step(bar)
        self.log.close()
        loss = next((x["loss"] for x in reversed(self.log.read()) if "loss" in x), math.nan)
        seconds = time.perf_counter() - started
        return TrainReport(self.step, loss, self.skipped, seconds, self._last_checkpoint)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[nn.Module]:
        """Put the moving average into the module for the time of the block."""
        if self.ema is None:
            yield self.module
            return
        parameters = list(self.module.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield self.module
        finally:
            self.ema.restore(parameters)

    def save(self) -> Path | None:
        """Write a checkpoint now; a full disk is logged and the run goes on.

        Returns:
            The directory, or None when the disk refused or this is not the main process.
        """
        if not self.accelerator.is_main_process:
            return None
        tensors, numbers = optimizer_state(self.optimizers, self.module)
        groups = {"model": self.module.state_dict(), "optimizer": tensors}
        if self.ema is not None:
            names = [name for name, _ in self.module.named_parameters()]
            groups["ema"] = dict(zip(names, self.ema.shadow_params, strict=True))
        state = {
            "step": self.step,
            "skipped": self.skipped,
            "bad_in_row": self._bad_in_row,
            "window": self._window,
            "precision": self.precision,
            "ema_step": self.ema.optimization_step if self.ema else 0,
            "config": dataclasses.asdict(self.config),
        }
        documents = {"state": state, "optimizer_numbers": numbers}
        try:
            self._last_checkpoint = self.store.save(self.step, groups, documents)
        except OSError as error:
            logger.warning("checkpoint at step %d not written: %s", self.step, error)
            return None
        return self._last_checkpoint

    def _rate(self) -> float:
        """Learning rate of the coming step."""
        config, split = self.config, self.config.late_from
        if split is None or self.step < split:
            start, stop, peak = 0, split or config.num_steps, config.learning_rate
        else:
            start, stop, peak = split, config.num_steps, config.late_learning_rate or 0.0
        return learning_rate_at(
            self.step - start,
            peak=peak,
            num_steps=stop - start,
            warmup_steps=config.warmup_steps,
            curve=config.curve,
            final_ratio=config.final_ratio,
        )

    def _one_step(self, bar: tqdm) -> None:
        config, before = self.config, time.perf_counter()
        rate = self._rate()
        set_learning_rate(self.optimizers, rate)
        indices = batch_indices(config.seed, self.step, config.batch_size, self.stage.num_items)
        loss, metrics, norm = self._gradients(indices)
        if math.isfinite(loss) and math.isfinite(norm):
            for optimizer in self.optimizers:
                optimizer.step()
            if self.ema is not None:
                self.ema.step(self.module.parameters())
            self._bad_in_row = 0
        else:
            self._count_bad(indices, loss, norm)
        self.step += 1
        seconds = time.perf_counter() - before
        self._record({"loss": loss, "grad_norm": norm, **metrics}, seconds, rate, bar)
        self._after_step()

    def _gradients(self, indices: Tensor) -> tuple[float, dict[str, float], float]:
        accelerator, parts = self.accelerator, self.config.accumulation
        seed = seed_for(self.config.seed, "step", self.step, accelerator.process_index)
        torch.random.default_generator.manual_seed(seed)
        torch.cuda.manual_seed_all(seed)  # does nothing without a GPU
        generator = torch.Generator().manual_seed(seed)
        mine = indices[accelerator.process_index :: accelerator.num_processes]
        self.module.train()
        self.module.zero_grad(set_to_none=True)
        total = 0.0
        metrics: dict[str, float] = {}
        for part, some in enumerate(mine.chunk(parts)):
            last = part == parts - 1
            sync = contextlib.nullcontext() if last else accelerator.no_sync(self._wrapped)
            with sync:
                with autocast(accelerator.device, self.precision):
                    loss, named = self._wrapped(some, generator, self.step)
                accelerator.backward(loss / parts)
            total += float(loss.detach()) / parts
            for name, value in named.items():
                metrics[name] = metrics.get(name, 0.0) + float(value) / parts
        limit = self.config.max_grad_norm or math.inf
        norm = float(nn.utils.clip_grad_norm_(self.module.parameters(), limit))
        if accelerator.num_processes > 1:
            total = float(accelerator.reduce(torch.tensor(total), reduction="mean"))
        return total, metrics, norm

    def _count_bad(self, indices: Tensor, loss: float, norm: float) -> None:
        self.skipped += 1
        self._bad_in_row += 1
        logger.warning("step %d skipped: loss %s, gradient norm %s", self.step, loss, norm)
        if self._bad_in_row < self.config.max_bad_steps:
            return
        report = {"step": self.step, "loss": repr(loss), "grad_norm": repr(norm)}
        report |= {"items": indices.tolist(), "skipped": self.skipped}
        write_atomic(self.folder / "diverged.json", _json(report))
        raise ModelError(
            f"loss or gradient was not finite for {self._bad_in_row} steps in a row, up to step "
            f"{self.step}; try learning_rate below {self.config.learning_rate} or precision fp32"
        )

    def _record(self, values: dict[str, float], seconds: float, rate: float, bar: tqdm) -> None:
        self._window_steps += 1
        self._window_seconds += seconds
        for name, value in values.items():
            # One bad step must not blank the whole window; skipped steps are counted instead.
            if math.isfinite(value):
                self._window[name] = self._window.get(name, 0.0) + value
                self._window[f"#{name}"] = self._window.get(f"#{name}", 0) + 1
        bar.update()
        if self.step % self.config.log_every and self.step != self.config.num_steps:
            return
        names = [name for name in self._window if not name.startswith("#")]
        means = {name: self._window[name] / self._window[f"#{name}"] for name in names}
        line = {**means, "lr": rate, "skipped": self.skipped}
        rate = self._window_steps * self.config.batch_size / self._window_seconds
        line["items_per_second"] = round(rate, 2)
        if self.accelerator.is_main_process:
            self.log.write(self.step, line)
        bar.set_postfix({name: f"{value:.4g}" for name, value in list(means.items())[:3]})
        self._window, self._window_seconds, self._window_steps = {}, 0.0, 0

    def _after_step(self) -> None:
        config, ended = self.config, self.step == self.config.num_steps
        due = config.evaluate_every and self.step % config.evaluate_every == 0
        if self.evaluate is not None and (ended or due):
            with self.averaged_weights(), torch.no_grad():
                self.module.eval()
                numbers = self.evaluate(self.step)
            if self.accelerator.is_main_process:
                named = {f"eval_{name}": value for name, value in numbers.items()}
                self.log.write(self.step, named)
        if ended or self._stop_signal or self.step % config.save_every == 0:
            self.save()
        if self._stop_signal and not ended:
            raise SystemExit(128 + self._stop_signal)

    def _refuse_existing(self) -> None:
        if self.store.list():
            raise UsageError(
                f"{self.folder} already holds a run ({self.store.list()[-1].name}); resume it or "
                "choose another folder"
            )

    def _build_ema(self) -> EMAModel | None:
        if not self.config.ema_decay:
            return None
        return EMAModel(
            self.module.parameters(),
            decay=self.config.ema_decay,
            use_ema_warmup=True,
            power=3 / 4,
        )

    def _choose_precision(self, found: Checkpoint | None) -> Precision:
        if self.config.precision != "auto":
            return self.config.precision
        if found is not None:
            return found.documents["state"]["precision"]
        return probe_precision(self.accelerator.device)

    def _restore(self, found: Checkpoint) -> None:
        state = found.documents["state"]
        # Through JSON, so that tuples compare as the lists they were stored as.
        now = _unjson(_json(dataclasses.asdict(self.config)))
        for name, value in now.items():
            if name not in FREE_ON_RESUME and state["config"].get(name) != value:
                raise UsageError(
                    f"{name} is {value!r}, but the run to resume in {self.folder} has "
                    f"{state['config'].get(name)!r}"
                )
        try:
            self.module.load_state_dict(found.tensors["model"])
            numbers = found.documents["optimizer_numbers"]
            load_optimizer_state(
                self.optimizers, self.module, found.tensors.get("optimizer", {}), numbers
            )
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{found.path} does not fit this model: {error}") from error
        if self.ema is not None:
            names = [name for name, _ in self.module.named_parameters()]
            for name, shadow in zip(names, self.ema.shadow_params, strict=True):
                shadow.copy_(found.tensors["ema"][name])
            self.ema.optimization_step = state["ema_step"]
        self.step, self.skipped = state["step"], state["skipped"]
        self._bad_in_row = state["bad_in_row"]
        self._window = state["window"]

    def _bar(self) -> tqdm:
        shown = self.config.progress and self.accelerator.is_main_process
        return tqdm(
            total=self.config.num_steps, initial=self.step, file=sys.stderr, disable=not shown
        )

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        # Python delivers signals to the main thread only; elsewhere the caller owns them.
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        names = (signal.SIGTERM, signal.SIGINT)
        before = {name: signal.signal(name, self._on_signal) for name in names}
        try:
            yield
        finally:
            for name, handler in before.items():
                signal.signal(name, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop_signal = number


def _json(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def _unjson(content: bytes) -> dict[str, Any]:
    return json.loads(content)
