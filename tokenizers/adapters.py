"""Tokenizers round pretrained diffusers autoencoders: `AutoencoderKL` and `VQModel`.

The wrapped module is used as it is; only shapes are turned to tokens in raster order. It does not
download anything: give a folder, a hub id you chose, or a module.
"""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .base import check_codes, check_latents, check_pixels
from .continuous import noise_like
from .losses import reconstruction_loss


def _grid(image_size: int, num_resolutions: int) -> tuple[int, int]:
    stride = 2 ** (num_resolutions - 1)
    if image_size < stride or image_size % stride:
        nearest = max(stride, round(image_size / stride) * stride)
        raise ValueError(
            f"image_size is {image_size}; it must be a multiple of {stride}, nearest {nearest}"
        )
    return image_size // stride, image_size // stride


class AutoencoderKLTokenizer(ModelMixin, ConfigMixin):
    """Latents of a diffusers `AutoencoderKL`, shifted and scaled by its own factors."""

    value = "latent"
    num_codebooks = 0
    codebook_size = 0

    @register_to_config
    def __init__(
        self,
        image_size: int = 256,
        autoencoder_config: Mapping[str, Any] | None = None,
        kl_weight: float = 1e-6,
    ):
        """Build an autoencoder with fresh weights; `wrap` takes a trained one.

        Args:
            image_size: Side of the image in pixels.
            autoencoder_config: Configuration of the `AutoencoderKL`; None for its defaults.
            kl_weight: Loss weight of the KL divergence when it is trained further.
        """
        super().__init__()
        self.autoencoder = AutoencoderKL(**_plain(autoencoder_config))
        config = self.autoencoder.config
        self.image_size = image_size
        self.grid = _grid(image_size, len(config.block_out_channels))
        self.latent_channels = config.latent_channels
        self._scale = config.scaling_factor
        self._shift = config.shift_factor or 0.0

    @classmethod
    def wrap(cls, autoencoder: AutoencoderKL, image_size: int) -> "AutoencoderKLTokenizer":
        """Use a loaded autoencoder; its weights are shared, not copied.

        Args:
            autoencoder: The module.
            image_size: Side of the images in pixels.
        """
        tokenizer = cls(image_size, _plain(autoencoder.config))
        tokenizer.autoencoder = autoencoder
        return tokenizer

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    def encode(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch tokens channels"]:
        """Return (posterior mode - shift) * scale as tokens.

        Raises:
            ValueError: The image has another size.
        """
        check_pixels(pixels, self.image_size)
        mode = self.autoencoder.encode(pixels.to(self.dtype)).latent_dist.mode()
        return rearrange((mode - self._shift) * self._scale, "b c h w -> b (h w) c")

    def decode(
        self, values: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Turn latents into pixels clamped to [-1, 1].

        Raises:
            ValueError: Latents of another shape.
        """
        check_latents(values, self.num_tokens, self.latent_channels)
        grid = rearrange(values.to(self.dtype), "b (h w) c -> b c h w", h=self.grid[0])
        return self.autoencoder.decode(grid / self._scale + self._shift).sample.clamp(-1, 1)

    def loss(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the reconstruction loss of a posterior sample plus the KL term.

        Args:
            pixels: Images in [-1, 1].
            generator: CPU generator of the sample.
        """
        check_pixels(pixels, self.image_size)
        posterior = self.autoencoder.encode(pixels).latent_dist
        sample = posterior.mean + posterior.std * noise_like(posterior.mean, generator)
        total, metrics = reconstruction_loss(self.autoencoder.decode(sample).sample, pixels)
        divergence = posterior.kl().mean()
        metrics["kl"] = float(divergence.detach())
        return total + self.config["kl_weight"] * divergence, metrics


class VQModelTokenizer(ModelMixin, ConfigMixin):
    """Codes of a diffusers `VQModel`, one per cell."""

    value = "code"
    latent_channels = 0
    num_codebooks = 1

    @register_to_config
    def __init__(self, image_size: int = 256, model_config: Mapping[str, Any] | None = None):
        """Build a model with fresh weights; `wrap` takes a trained one.

        Args:
            image_size: Side of the image in pixels.
            model_config: Configuration of the `VQModel`; None for its defaults.
        """
        super().__init__()
        self.model = VQModel(**_plain(model_config))
        self.image_size = image_size
        self.grid = _grid(image_size, len(self.model.config.block_out_channels))
        self.codebook_size = self.model.config.num_vq_embeddings

    @classmethod
    def wrap(cls, model: VQModel, image_size: int) -> "VQModelTokenizer":
        """Use a loaded model; its weights are shared, not copied.

        Args:
            model: The module.
            image_size: Side of the images in pixels.
        """
        tokenizer = cls(image_size, _plain(model.config))
        tokenizer.model = model
        return tokenizer

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    def encode(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Int[Tensor, "batch tokens 1"]:
        """Turn pixels in [-1, 1] into codes, int64.

        Raises:
            ValueError: The image has another size.
        """
        check_pixels(pixels, self.image_size)
        latents = self.model.encode(pixels.to(self.dtype)).latents
        codes = self.model.quantize(latents)[2][2]
        return codes.reshape(len(pixels), self.num_tokens, 1)

    def decode(
        self, values: Int[Tensor, "batch tokens 1"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Turn codes into pixels clamped to [-1, 1].

        Raises:
            ValueError: Codes of another shape or outside the codebook.
        """
        check_codes(values, self.num_tokens, 1, self.codebook_size)
        # VQModel.decode would quantise again, or refuse codes by its config; so its parts are
        # called in its own order.
        entries = self.model.quantize.embedding(values[..., 0])
        grid = rearrange(entries, "b (h w) c -> b c h w", h=self.grid[0]).contiguous()
        condition = grid if self.model.config.norm_type == "spatial" else None
        return self.model.decoder(self.model.post_quant_conv(grid), condition).clamp(-1, 1)

    def loss(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the reconstruction loss plus the model's commitment term.

        Args:
            pixels: Images in [-1, 1].
            generator: Unused; part of the tokenizer protocol.
        """
        check_pixels(pixels, self.image_size)
        result = self.model(pixels)
        total, metrics = reconstruction_loss(result.sample, pixels)
        commitment = result.commit_loss.mean()
        metrics["quantizer"] = float(commitment.detach())
        return total + commitment, metrics


def _plain(config: Mapping[str, Any] | None) -> dict[str, Any]:
    # diffusers keeps its own bookkeeping (class name, version, source) under leading underscores.
    return {name: value for name, value in (config or {}).items() if not name.startswith("_")}
