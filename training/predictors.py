"""The best predictions that know the position and nothing else: baselines of the learning checks.

For codes that is a table of frequencies per slot; for latents one Gaussian per slot, which under
noise gives a linear predictor in closed form. A model beats them only by using what it sees: other
tokens, the prompt, or more structure than a Gaussian has.

It does not know models. Everything is fitted on training values and evaluated elsewhere.
"""

import math
from typing import NamedTuple

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor

SMOOTHING = 0.1
"""Counts added to every code, so that an unseen one costs many nats but not infinitely many."""
MIN_VARIANCE = 1e-6


class CodeTable:
    """Frequencies of every code at every slot."""

    def __init__(self, values: Int[Tensor, "items slots codebooks"], num_codes: int) -> None:
        """Count.

        Args:
            values: Training codes in [0, num_codes).
            num_codes: Codes per codebook.
        """
        counts = torch.full((*values.shape[1:], num_codes), SMOOTHING)
        counts.scatter_add_(2, values.permute(1, 2, 0), torch.ones(values.permute(1, 2, 0).shape))
        self.log_prob = (counts / counts.sum(-1, keepdim=True)).log()

    def loss(
        self, target: Int[Tensor, "batch rows codebooks"], slots: Int[Tensor, " rows"]
    ) -> Float[Tensor, "batch rows"]:
        """Return nats per row, averaged over codebooks.

        Args:
            target: True codes.
            slots: Slot of each row.
        """
        table = self.log_prob[slots].expand(len(target), -1, -1, -1)
        return -table.gather(3, target[..., None])[..., 0].mean(-1)


class Path(NamedTuple):
    """Shares of data and noise in a noisy sample and in the wanted prediction.

    `sample = signal * clean + noise * eps` and `target = clean_share * clean + noise_share * eps`;
    each is one number per row, [batch, rows, 1].
    """

    signal: Tensor
    noise: Tensor
    clean_share: Tensor
    noise_share: Tensor


class SlotGaussians:
    """One Gaussian with full covariance per slot, kept as mean, axes and variances."""

    def __init__(self, values: Float[Tensor, "items slots channels"]) -> None:
        """Fit.

        Args:
            values: Training latents; more items than channels.
        """
        rows = values.double().transpose(0, 1)
        mean = rows.mean(1, keepdim=True)
        centred = rows - mean
        covariance = einsum(centred, centred, "s n c, s n d -> s c d") / (rows.shape[1] - 1)
        variance, axes = torch.linalg.eigh(covariance)
        self.mean, self.axes = mean[:, 0].float(), axes.float()
        self.variance = variance.clamp_min(MIN_VARIANCE).float()

    def density_loss(
        self, target: Float[Tensor, "batch rows channels"], slots: Int[Tensor, " rows"]
    ) -> Float[Tensor, "batch rows"]:
        """Return the negative log density per row, in nats."""
        score = self._turned(target - self.mean[slots], slots)
        variance = self.variance[slots]
        return 0.5 * (score.square() / variance + variance.log() + math.log(2 * math.pi)).sum(-1)

    def predict(
        self, sample: Float[Tensor, "batch rows channels"], path: Path, slots: Int[Tensor, " rows"]
    ) -> Float[Tensor, "batch rows channels"]:
        """Return the expected target given a noisy sample: the best linear prediction.

        Args:
            sample: Noisy latents.
            path: How sample and target were mixed.
            slots: Slot of each row.
        """
        mean, variance = self.mean[slots], self.variance[slots]
        score = self._turned(sample - path.signal * mean, slots)
        covariance = path.clean_share * path.signal * variance + path.noise_share * path.noise
        gain = covariance / (path.signal**2 * variance + path.noise**2)
        back = einsum(gain * score, self.axes[slots], "b r d, r c d -> b r c")
        return path.clean_share * mean + back

    def _turned(self, offset: Tensor, slots: Tensor) -> Tensor:
        """Coordinates of offsets along the axes of their slot."""
        return einsum(offset, self.axes[slots], "b r c, r c d -> b r d")
