"""Continuous image tokenizer with a learned diagonal Gaussian posterior (KL-VAE).

It does not know how latents are generated.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from torch import Tensor

from .continuous import ContinuousTokenizer, noise_like


class KLTokenizer(ContinuousTokenizer):
    """Autoencoder whose encoder gives a mean and a log-variance per channel and cell.

    Source: Auto-Encoding Variational Bayes (arXiv:1312.6114), appendix B; small KL weight as in
    latent diffusion (arXiv:2112.10752), section 3.1.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        patch: int = 4,
        widths: Sequence[int] = (64, 128, 192),
        encoder_depths: Sequence[int] = (1, 1, 1),
        decoder_depths: Sequence[int] = (2, 1, 2),
        latent_channels: int = 24,
        regulariser_weight: float = 1e-4,
        absolute_weight: float = 1.0,
        square_weight: float = 2.0,
        edge_weight: float = 1.0,
    ):
        """Build the network.

        Args:
            image_size: Side of the image in pixels.
            patch: Side of the patches cut at the door, in pixels; a power of two.
            widths: Channels per resolution, finest first; each resolution halves the last.
            encoder_depths: Encoder layers per resolution.
            decoder_depths: Decoder layers per resolution.
            latent_channels: Floats per token.
            regulariser_weight: Loss weight of the KL divergence, in nats per channel.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.
        """
        super().__init__()
        self.latent_channels = latent_channels
        self._build(image_size, patch, widths, encoder_depths, decoder_depths, 2)

    def posterior_mean(self, features: Tensor) -> Tensor:
        """Return the first half of the features."""
        return features.chunk(2, dim=1)[0]

    def posterior_sample(
        self, features: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Sample the posterior; the regulariser is its KL divergence from a standard normal.

        Args:
            features: Means and log-variances, float32 [batch 2*channels height width].
            generator: CPU generator of the noise.
        """
        mean, log_variance = features.chunk(2, dim=1)
        log_variance = log_variance.clamp(-30, 20)  # outside, exp() over- or underflows
        sample = mean + (0.5 * log_variance).exp() * noise_like(mean, generator)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)
        return sample, divergence.mean()
