"""Schedulers for continuous blocks on the straight path from noise to data.

What it is: level rows, the Euler update and predict-clean-then-renoise.
What it does not know: models, caches, latents' meaning.
Invariants: levels fall strictly from 1 to 0; x = (1 - s) clean + s noise, velocity = noise - clean;
after the last row the sample is the predicted clean block.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float
from torch import Tensor

from ..curves import shift_level
from ..errors import UsageError, check_count, check_one_of, check_range, describe
from ..guidance import RAMPS, guidance_at
from ..sampling import per_item_randn
from .base import (
    BlockScheduler,
    Row,
    clean_from_velocity,
    flow_noise,
    velocity_from_clean,
)


class LevelScheduler(BlockScheduler, ABC):
    """Base of schedulers that lower a block's noise level from 1 to 0.

    Subclasses register `num_steps`, `shift`, `prediction_type`, `guidance_scale`,
    `guidance_ramp`, `guidance_start` and `guidance_power`.
    """

    predictions: tuple[str, ...] = ("velocity", "clean")

    def _check(self) -> None:
        config = self.config
        check_count("num_steps", config.num_steps)
        check_range("shift", config.shift, 0.0, open_low=True)
        check_one_of("guidance_ramp", config.guidance_ramp, RAMPS)
        if config.prediction_type == "eps" and "eps" not in self.predictions:
            # Straight paths cannot start from noise prediction: at level 1 it holds no data.
            allowed = f"{', '.join(self.predictions)} for {type(self).__name__}"
            raise UsageError(
                describe("prediction_type", "eps", allowed, "Multistep, which takes eps")
            )
        check_one_of("prediction_type", config.prediction_type, self.predictions)

    def levels(self, num_steps: int | None = None) -> list[float]:
        """List the levels of a block: num_steps + 1 numbers from 1 to 0.

        Args:
            num_steps: Overrides the config.
        """
        steps = self.config.num_steps if num_steps is None else num_steps
        check_count("num_steps", steps)
        return [shift_level(1 - i / steps, self.config.shift) for i in range(steps + 1)]

    def rows(self, num_steps: int | None = None, start: float = 1.0) -> list[Row]:
        """Plan the forwards of a block.

        Args:
            num_steps: Overrides the config.
            start: Level the block starts at, in (0, 1]; the levels below it keep their proportions.
        """
        levels = [start * level for level in self.levels(num_steps)]
        steps = len(levels) - 1
        return [
            Row(
                index=i,
                num_rows=steps,
                level=levels[i],
                level_next=levels[i + 1],
                guidance_scale=self._guidance(i, steps),
            )
            for i in range(steps)
        ]

    def _guidance(self, index: int, num_rows: int) -> float:
        config = self.config
        last = {"cosine_power": num_rows, "mar_linear": num_rows}
        span = last.get(config.guidance_ramp, num_rows - 1)
        done = index + 1 if config.guidance_ramp == "mar_linear" else index
        progress = 1.0 if span == 0 or config.guidance_ramp == "constant" else done / span
        return guidance_at(
            config.guidance_ramp,
            config.guidance_scale,
            progress,
            start=config.guidance_start,
            power=config.guidance_power,
        )

    def begin(self, num_steps: int | None = None) -> None:
        """Start a new block: forget whatever the previous block left behind.

        Args:
            num_steps: Rows of the coming block; the config's when None.
        """

    @abstractmethod
    def step(
        self,
        prediction: Float[Tensor, "batch tokens channels"],
        row: Row,
        sample: Float[Tensor, "batch tokens channels"],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "batch tokens channels"]:
        """Move a block from `row.level` to `row.level_next`.

        Args:
            prediction: Model output, as `prediction_type` says.
            row: The row being run.
            sample: The block at `row.level`.
            generators: One CPU generator per item; only used by schedulers that add noise.
        """

    def add_noise(
        self,
        clean: Float[Tensor, "batch *rest"],
        noise: Float[Tensor, "batch *rest"],
        level: float | Float[Tensor, "batch *rest"],
    ) -> Float[Tensor, "batch *rest"]:
        """Corrupt clean values to a level, as training does: (1 - s) clean + s noise.

        Args:
            clean: Data.
            noise: Standard normal numbers of the same shape.
            level: In [0, 1]; a tensor must broadcast against `clean`.
        """
        return flow_noise(clean, noise, level)

    def target(
        self,
        clean: Float[Tensor, "batch *rest"],
        noise: Float[Tensor, "batch *rest"],
    ) -> Float[Tensor, "batch *rest"]:
        """Compute what the model is trained to predict.

        Args:
            clean: Data.
            noise: The noise `add_noise` was given.
        """
        kind = self.config.prediction_type
        return {"velocity": noise - clean, "clean": clean, "eps": noise}[kind]

    def predict_clean(
        self,
        prediction: Float[Tensor, "batch *rest"],
        row: Row,
        sample: Float[Tensor, "batch *rest"],
    ) -> Float[Tensor, "batch *rest"]:
        """Compute the clean block a prediction implies, for previews and renoising: x - s v.

        Args:
            prediction: Model output, as `prediction_type` says.
            row: The row it was made for.
            sample: The block at `row.level`.
        """
        if self.config.prediction_type == "clean":
            return prediction
        return clean_from_velocity(sample, prediction, row.level)

    def _velocity(self, prediction: Tensor, row: Row, sample: Tensor) -> Tensor:
        if self.config.prediction_type == "velocity":
            return prediction
        return velocity_from_clean(sample, prediction, row.level)


class FlowEuler(LevelScheduler):
    """Euler steps along the velocity field: x <- x + (s_next - s) v.

    Args:
        num_steps: Rows per block.
        shift: Timestep shift a in a s / (1 + (a - 1) s); 1 = none.
        prediction_type: "velocity" or "clean".
        guidance_scale: Classifier-free guidance weight; 1 = off.
        guidance_ramp: See `core.guidance`.
        guidance_start: Scale at the start of a ramp.
        guidance_power: Exponent of "cosine_power".

    Raises:
        UsageError: A setting outside its range.
    """

    @register_to_config
    def __init__(
        self,
        num_steps: int = 25,
        shift: float = 1.0,
        prediction_type: str = "velocity",
        guidance_scale: float = 1.0,
        guidance_ramp: str = "constant",
        guidance_start: float = 1.0,
        guidance_power: float = 2.75,
    ) -> None:
        self._check()

    def step(
        self,
        prediction: Float[Tensor, "batch tokens channels"],
        row: Row,
        sample: Float[Tensor, "batch tokens channels"],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "batch tokens channels"]:
        """Take one Euler step; see `LevelScheduler.step`."""
        velocity = self._velocity(prediction, row, sample)
        return sample + (row.level_next - row.level) * velocity


class Renoise(LevelScheduler):
    """Predict the clean block, then mix in fresh noise at the next level.

    clean = x - s v; x <- (1 - s_next) clean + s_next * noise.

    Args:
        num_steps: Rows per block, usually 1 to 4.
        shift: Timestep shift; 1 = none.
        prediction_type: "velocity" or "clean".
        guidance_scale: Classifier-free guidance weight; 1 = off.
        guidance_ramp: See `core.guidance`.
        guidance_start: Scale at the start of a ramp.
        guidance_power: Exponent of "cosine_power".

    Raises:
        UsageError: A setting outside its range.

    Source: Self-Forcing (arXiv:2506.08009), algorithm 2.
    """

    @register_to_config
    def __init__(
        self,
        num_steps: int = 4,
        shift: float = 1.0,
        prediction_type: str = "velocity",
        guidance_scale: float = 1.0,
        guidance_ramp: str = "constant",
        guidance_start: float = 1.0,
        guidance_power: float = 2.75,
    ) -> None:
        self._check()

    def step(
        self,
        prediction: Float[Tensor, "batch tokens channels"],
        row: Row,
        sample: Float[Tensor, "batch tokens channels"],
        generators: Sequence[torch.Generator],
    ) -> Float[Tensor, "batch tokens channels"]:
        """Predict clean and renoise; see `LevelScheduler.step`. The last row draws no noise."""
        clean = self.predict_clean(prediction, row, sample)
        if row.level_next == 0.0:
            return clean
        noise = per_item_randn(sample.shape[1:], generators, sample.device, sample.dtype)
        return flow_noise(clean, noise, row.level_next)
