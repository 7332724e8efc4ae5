"""Multistep ODE solvers for continuous blocks, through diffusers.

What it is: DPM-Solver++ and UniPC behind the level-row interface, for straight-path velocity
models and for noise-predicting models with linear betas (ACDiT).
What it does not know: the solvers' formulas, which stay in diffusers.
Invariants: every block runs on a fresh solver, so no history crosses a block boundary; levels fall
from 1 to 0. With noise prediction, level = (t + 1) / T for the T training times t = 0 .. T-1.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import UsageError, check_count, check_one_of, check_range, describe
from .base import Row
from .flow import LevelScheduler

SOLVERS: dict[str, Any] = {"dpm": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}


class Multistep(LevelScheduler):
    """Run a block with a multistep solver.

    Args:
        num_steps: Rows per block.
        shift: Timestep shift of the straight path; only for "velocity".
        prediction_type: "velocity" (straight path) or "eps" (linear betas).
        solver: "dpm" (DPM-Solver++ multistep) or "unipc".
        solver_order: 1, 2 or 3.
        num_train_timesteps: Training times T.
        beta_start: First beta of the linear schedule, in (0, 1).
        beta_end: Last beta, in (beta_start, 1).
        guidance_scale: Classifier-free guidance weight; 1 = off.
        guidance_ramp: See `core.guidance`.
        guidance_start: Scale at the start of a ramp.
        guidance_power: Exponent of "cosine_power".

    Raises:
        UsageError: A setting outside its range.

    Source: DPM-Solver++ (arXiv:2211.01095); UniPC (arXiv:2302.04867); ACDiT (arXiv:2412.07720)
        uses 25 DPM-Solver++ steps per block and betas 1e-4 .. 2e-2.
    """

    predictions = ("velocity", "eps")

    @register_to_config
    def __init__(
        self,
        num_steps: int = 25,
        shift: float = 1.0,
        prediction_type: str = "velocity",
        solver: str = "dpm",
        solver_order: int = 2,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 2e-2,
        guidance_scale: float = 1.0,
        guidance_ramp: str = "constant",
        guidance_start: float = 1.0,
        guidance_power: float = 2.75,
    ) -> None:
        self._check()
        check_one_of("solver", solver, tuple(SOLVERS))
        check_one_of("solver_order", solver_order, (1, 2, 3))
        check_count("num_train_timesteps", num_train_timesteps, 2)
        check_range("beta_start", beta_start, 0.0, 1.0, open_low=True)
        check_range("beta_end", beta_end, beta_start, 1.0)
        self._inner: Any = None
        betas = torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float64)
        # Entry t + 1 belongs to training time t; entry 0 is clean data.
        kept = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(dim=0)])
        self._signal_share = kept.float()

    def _fresh(self, num_steps: int) -> Any:
        config = self.config
        flow = config.prediction_type == "velocity"
        inner = SOLVERS[config.solver](
            num_train_timesteps=config.num_train_timesteps,
            beta_start=config.beta_start,
            beta_end=config.beta_end,
            beta_schedule="linear",
            solver_order=config.solver_order,
            prediction_type="flow_prediction" if flow else "epsilon",
            use_flow_sigmas=flow,
            flow_shift=config.shift if flow else 1.0,
        )
        with warnings.catch_warnings():
            # diffusers hands tensors to numpy the old way; nothing a user could change.
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            inner.set_timesteps(num_steps)
        return inner

    def levels(self, num_steps: int | None = None) -> list[float]:
        """List the levels the solver visits: num_steps + 1 numbers from 1 to 0.

        The straight-path solvers start a hair below 1, where their log signal-to-noise ratio is
        finite; the first level is reported as 1 because the sample is pure noise there.

        Args:
            num_steps: Overrides the config.

        Raises:
            UsageError: num_steps < 1, or more steps than training times.
        """
        steps = self.config.num_steps if num_steps is None else num_steps
        check_count("num_steps", steps, 1, self.config.num_train_timesteps)
        inner = self._fresh(steps)
        if self.config.prediction_type == "velocity":
            return [1.0, *inner.sigmas[1:-1].tolist(), 0.0]
        times = inner.timesteps.tolist()
        return [(time + 1) / self.config.num_train_timesteps for time in times] + [0.0]

    def rows(self, num_steps: int | None = None, start: float = 1.0) -> list[Row]:
        """Plan the forwards of a block; see `LevelScheduler.rows`.

        Raises:
            UsageError: A start below 1: the solver's times are those of a whole block.
        """
        if start != 1.0:
            raise UsageError(describe("start level of a multistep solver", start, "1", 1))
        return super().rows(num_steps)

    def begin(self, num_steps: int | None = None) -> None:
        """Start a new block: the next first row builds a fresh solver.

        Args:
            num_steps: Not needed; the rows carry their number.
        """
        self._inner = None

    def step(
        self,
        prediction: Float[Tensor, "batch tokens channels"],
        row: Row,
        sample: Float[Tensor, "batch tokens channels"],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "batch tokens channels"]:
        """Take one solver step; see `LevelScheduler.step`. Rows must come in order.

        Raises:
            UsageError: A row arrives out of order, or before the block's first row.
        """
        if row.index == 0:
            self._inner = self._fresh(row.num_rows)
        done = -1 if self._inner is None else self._inner.step_index or 0
        if done != row.index or self._inner.num_inference_steps != row.num_rows:
            allowed = f"rows in order from 0 (next is {max(done, 0)})"
            raise UsageError(describe("row index of a multistep solver", row.index, allowed))
        time = self._inner.timesteps[row.index]
        return self._inner.step(prediction, time, sample, return_dict=False)[0]

    def add_noise(
        self,
        clean: Float[Tensor, "batch *rest"],
        noise: Float[Tensor, "batch *rest"],
        level: float | Float[Tensor, "batch *rest"],
    ) -> Float[Tensor, "batch *rest"]:
        """Corrupt clean values to a level.

        Straight path for "velocity"; for "eps": sqrt(a) clean + sqrt(1 - a) noise, with a the
        product of (1 - beta) up to the training time of the level.

        Args:
            clean: Data.
            noise: Standard normal numbers of the same shape.
            level: In [0, 1], rounded to a training time for "eps"; a tensor must broadcast.
        """
        if self.config.prediction_type == "velocity":
            return super().add_noise(clean, noise, level)
        share = self._share(level, clean)
        return share.sqrt() * clean + (1 - share).sqrt() * noise

    def predict_clean(
        self,
        prediction: Float[Tensor, "batch *rest"],
        row: Row,
        sample: Float[Tensor, "batch *rest"],
    ) -> Float[Tensor, "batch *rest"]:
        """Compute the clean block a prediction implies: (x - sqrt(1 - a) eps) / sqrt(a) for eps."""
        if self.config.prediction_type == "velocity":
            return super().predict_clean(prediction, row, sample)
        share = self._share(row.level, sample)
        return (sample - (1 - share).sqrt() * prediction) / share.sqrt()

    def _share(self, level: float | Tensor, like: Tensor) -> Tensor:
        index = self._time_index(torch.as_tensor(level))
        return self._signal_share[index.cpu()].to(like.device, like.dtype)

    def _time_index(self, level: Float[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
        return (level * self.config.num_train_timesteps).round().long()
