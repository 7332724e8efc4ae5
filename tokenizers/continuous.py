"""What the trained continuous tokenizers share: a convolutional autoencoder with standard latents.

Latents leave with mean 0 and deviation 1 per channel, by buffers measured on training data and
stored with the weights. A subclass says how the encoder's output becomes a mean and a noisy sample.

It does not know how latents are generated.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .base import check_latents, check_pixels
from .conv import ConvDecoder, ConvEncoder
from .discrete import check_network
from .losses import reconstruction_loss


class ContinuousTokenizer(ModelMixin, ConfigMixin, ABC):
    """Convolutional autoencoder with continuous latents; posteriors subclass it."""

    value = "latent"
    num_codebooks = 0
    codebook_size = 0

    image_size: int
    grid: tuple[int, int]
    latent_channels: int

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    @abstractmethod
    def posterior_mean(self, features: Tensor) -> Tensor:
        """Return the mean latent of encoder features [batch features height width]."""

    @abstractmethod
    def posterior_sample(
        self, features: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw a latent for training and return it with the scalar regulariser."""

    def encode(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch tokens channels"]:
        """Turn pixels in [-1, 1] into standardised latents, without noise.

        Raises:
            ValueError: The image has another size.
        """
        check_pixels(pixels, self.image_size)
        mean = self.posterior_mean(self.encoder(pixels.to(self.dtype)))
        tokens = rearrange(mean, "b c h w -> b (h w) c")
        return (tokens - self.latent_mean) / self.latent_std

    def decode(
        self, values: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Turn standardised latents into pixels clamped to [-1, 1].

        Raises:
            ValueError: Latents of another shape.
        """
        check_latents(values, self.num_tokens, self.latent_channels)
        tokens = values.to(self.dtype) * self.latent_std + self.latent_mean
        grid = rearrange(tokens, "b (h w) c -> b c h w", h=self.grid[0])
        return self.decoder(grid).clamp(-1, 1)

    def loss(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the reconstruction loss of a noisy latent plus the weighted regulariser.

        Args:
            pixels: Images in [-1, 1].
            generator: CPU generator of the latent noise.
        """
        check_pixels(pixels, self.image_size)
        latent, regulariser = self.posterior_sample(self.encoder(pixels).float(), generator)
        total, metrics = reconstruction_loss(
            self.decoder(latent),
            pixels,
            absolute_weight=self.config["absolute_weight"],
            square_weight=self.config["square_weight"],
            edge_weight=self.config["edge_weight"],
        )
        metrics["regulariser"] = float(regulariser.detach())
        return total + self.config["regulariser_weight"] * regulariser, metrics

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Float[Tensor, "batch 3 height width"]]) -> None:
        """Set the buffers so that `encode` gives mean 0 and deviation 1 on these images.

        Args:
            batches: Images in [-1, 1]; at least one.

        Raises:
            ValueError: No images.
        """
        means = (
            self.posterior_mean(self.encoder(pixels.to(self.device, self.dtype)))
            for pixels in batches
        )
        mean, deviation = channel_statistics(rearrange(m, "b c h w -> (b h w) c") for m in means)
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(deviation)

    def _build(
        self,
        image_size: int,
        patch: int,
        widths: Sequence[int],
        encoder_depths: Sequence[int],
        decoder_depths: Sequence[int],
        features_per_channel: int,
    ) -> None:
        check_network(image_size, patch, widths)
        self.image_size = image_size
        side = image_size // patch // 2 ** (len(widths) - 1)
        self.grid = (side, side)
        channels = self.latent_channels
        self.encoder = ConvEncoder(
            image_size, patch, widths, encoder_depths, features_per_channel * channels
        )
        self.decoder = ConvDecoder(image_size, patch, widths, decoder_depths, channels)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))
        for part in (self.encoder, self.decoder):
            # torch's stub of `Module.to` does not list memory_format
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def noise_like(reference: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw standard normal noise on the CPU, so that bits do not depend on the device.

    Args:
        reference: Gives shape, dtype and device.
        generator: CPU generator; None for torch's global one.
    """
    noise = torch.randn(reference.shape, generator=generator)
    return noise.to(reference.device, reference.dtype)


def channel_statistics(
    batches: Iterable[Float[Tensor, "_ channels"]],
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Measure mean and deviation of every channel, in float64.

    Args:
        batches: Tokens; at least one.

    Returns:
        Mean, and deviation of at least 1e-3: a channel that never moves would be blown up by its
        own rounding error.

    Raises:
        ValueError: No tokens.
    """
    mean, variance = mean_and_variance(batches, "measure_latents", "items")
    return mean, variance.sqrt().clamp_min(1e-3)


def mean_and_variance(
    batches: Iterable[Float[Tensor, "_ channels"]], name: str, items: str
) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Measure mean and variance of every channel in one pass, in float64.

    Args:
        batches: Rows of numbers; at least one row.
        name: Who measures, for the message.
        items: What is measured, for the message.

    Raises:
        ValueError: No rows.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        rows = batch.double()
        count += len(rows)
        total, squares = total + rows.sum(0), squares + rows.square().sum(0)
    if not count:
        raise ValueError(f"{name} got 0 {items}; it needs at least 1")
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0)
