"""Linear head for diffusion inside the trunk: one prediction per token and noise level.

The trunk itself sees the noisy latents, so the head is a modulated linear map and the trunk runs
again at every row of the schedule. The head does not know the schedule.

Invariant: the prediction is zero at initialisation. Source: adaLN-zero of DiT (arXiv:2212.09748),
used per block by ACDiT (arXiv:2412.07720).
"""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.errors import check_one_of
from ...core.numerics import RowStableLinear, row_stable_activation
from .base import Head, check_sizes, zero_init

PREDICTIONS = ("velocity", "eps")
MIN_CLEAN_SHARE = 1e-3


class PatchHead(Head):
    """Map trunk states to a velocity or a noise estimate.

    Args:
        dim: Width of the trunk states and of the conditioning vector.
        channels: Latent channels per token.
        prediction: "velocity" (`eps - x0`) or "eps".
        modulated: Scale and shift the normalised state by the conditioning vector (adaLN).

    Raises:
        UsageError: A size is not positive or the prediction is unknown.
    """

    runs: ClassVar[str] = "row"

    def __init__(
        self, dim: int, channels: int, prediction: str = "velocity", modulated: bool = True
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, channels=channels)
        check_one_of("prediction", prediction, PREDICTIONS)
        self.channels = channels
        self.prediction = prediction
        self.norm = nn.LayerNorm(dim, elementwise_affine=not modulated)
        self.modulation = zero_init(RowStableLinear(dim, 2 * dim)) if modulated else None
        self.out = zero_init(RowStableLinear(dim, channels))

    def predict(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        cond: Float[Tensor, "batch tokens dim"] | Float[Tensor, "batch dim"] | None = None,
    ) -> Float[Tensor, "batch tokens channels"]:
        """Predict velocity or noise.

        Args:
            hidden: Trunk states of the noisy tokens.
            cond: Conditioning vector (noise level and prompt), per item or per token; None means
                no modulation.

        Returns:
            Prediction in the units of the standardised latents.
        """
        state = self.norm(hidden)
        if self.modulation is not None and cond is not None:
            cond = cond if cond.ndim == hidden.ndim else cond[:, None]
            shift, scale = self.modulation(row_stable_activation("silu", cond)).chunk(2, dim=-1)
            state = state * (1 + scale) + shift
        return self.out(state)

    def target(self, clean: Float[Tensor, "*rows"], noise: Float[Tensor, "*rows"]) -> Tensor:
        """Return what `predict` is trained to output.

        Args:
            clean: Clean latents.
            noise: Standard normal noise mixed into them.

        Returns:
            `noise - clean` for velocity, `noise` for eps.
        """
        return noise - clean if self.prediction == "velocity" else noise

    def to_clean(
        self,
        prediction: Float[Tensor, "*rows"],
        sample: Float[Tensor, "*rows"],
        level: Float[Tensor, "..."] | float,
    ) -> Float[Tensor, "*rows"]:
        """Turn a prediction into an estimate of the clean latents on the straight path.

        Args:
            prediction: Output of `predict`.
            sample: Noisy latents `(1 - level) * clean + level * noise`.
            level: Noise level in [0, 1], broadcast against `sample`.

        Returns:
            Estimated clean latents; for eps the divisor `1 - level` is kept at 0.001 or above.
        """
        if self.prediction == "velocity":
            return sample - level * prediction
        share = torch.as_tensor(1.0 - level).clamp_min(MIN_CLEAN_SHARE).to(sample)
        return (sample - level * prediction) / share

    def loss(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        target: Float[Tensor, "batch tokens channels"],
        generator: torch.Generator | None = None,
        cond: Tensor | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Return the squared error per token, averaged over channels.

        Args:
            hidden: Trunk states of the noisy tokens.
            target: Value of `target(clean, noise)`; the caller chose the noise, because the trunk
                had to see it.
            generator: Unused; the loss draws no noise of its own.
            cond: Conditioning vector, see `predict`.

        Returns:
            Mean squared error, float32.
        """
        error = self.predict(hidden, cond).float() - target.float()
        return error.square().mean(dim=-1)
