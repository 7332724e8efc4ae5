"""Continuous image tokenizer with a fixed, shared noise scale (sigma-VAE).

It does not know how latents are generated.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from torch import Tensor

from .continuous import ContinuousTokenizer, noise_like


class SigmaVAETokenizer(ContinuousTokenizer):
    """Autoencoder whose encoder gives a mean only; the noise scale is one number per image.

    A learned variance may shrink to zero, and a generator's small errors then fall outside what
    the decoder has seen. Here the scale is drawn, never learned, so the decoder tolerates error.

    Source: LatentLM (arXiv:2412.08635), section 3.2: z = mean + s * noise with
    s ~ N(0, (std / 0.8)^2) per image, and the squared mean in place of the KL term.
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
        noise_std: float = 0.75,
        regulariser_weight: float = 1e-3,
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
            noise_std: Noise scale; the drawn scale has deviation `noise_std / 0.8`.
            regulariser_weight: Loss weight of the mean squared mean.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.
        """
        super().__init__()
        self.latent_channels = latent_channels
        self._build(image_size, patch, widths, encoder_depths, decoder_depths, 1)

    def posterior_mean(self, features: Tensor) -> Tensor:
        """Return the features themselves."""
        return features

    def posterior_sample(
        self, features: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Add noise of one drawn scale per image; the regulariser is the mean squared mean.

        Args:
            features: Means, float32 [batch channels height width].
            generator: CPU generator of scale and noise.
        """
        scale = noise_like(features[:, :1, :1, :1], generator) * (self.config["noise_std"] / 0.8)
        return features + scale * noise_like(features, generator), features.square().mean()
