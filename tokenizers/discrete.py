"""What the trained discrete tokenizers share: a convolutional autoencoder round a quantiser.

A subclass gives the quantiser and two functions: features to (quantised features, codes, extra
loss), and codes to features. Quantisation runs in float32 whatever the autocast.

It does not know which quantiser is used, nor how codes are generated.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from .base import check_codes, check_pixels
from .conv import ConvDecoder, ConvEncoder
from .losses import reconstruction_loss


class DiscreteTokenizer(ModelMixin, ConfigMixin, ABC):
    """Convolutional autoencoder with integer codes; quantisers subclass it."""

    value = "code"
    latent_channels = 0

    image_size: int
    grid: tuple[int, int]
    num_codebooks: int
    codebook_size: int

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    @abstractmethod
    def quantize(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise float32 features [batch tokens channels].

        Returns:
            Quantised features with a straight-through gradient, int codes
            [batch tokens codebooks], and an extra scalar loss.
        """

    @abstractmethod
    def lookup(self, codes: Tensor) -> Tensor:
        """Turn codes [batch tokens codebooks] into features [batch tokens channels]."""

    def encode(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Int[Tensor, "batch tokens codebooks"]:
        """Turn pixels in [-1, 1] into codes, int64 in [0, codebook_size).

        Raises:
            ValueError: The image has another size.
        """
        check_pixels(pixels, self.image_size)
        was_training = self.training
        # Some quantisers update their codebook in training mode; encoding must not.
        self.eval()
        codes = self._quantize(self.encoder(pixels.to(self.dtype)))[1]
        self.train(was_training)
        return codes

    def decode(
        self, values: Int[Tensor, "batch tokens codebooks"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Turn codes into pixels clamped to [-1, 1].

        Raises:
            ValueError: Codes of another shape or outside the codebook.
        """
        check_codes(values, self.num_tokens, self.num_codebooks, self.codebook_size)
        features = rearrange(self.lookup(values), "b (h w) c -> b c h w", h=self.grid[0])
        return self.decoder(features.to(self.dtype)).clamp(-1, 1)

    def loss(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the reconstruction loss plus the quantiser's own term.

        Args:
            pixels: Images in [-1, 1].
            generator: Unused; part of the tokenizer protocol.
        """
        check_pixels(pixels, self.image_size)
        features, codes, extra = self._quantize(self.encoder(pixels))
        total, metrics = reconstruction_loss(
            self.decoder(features),
            pixels,
            absolute_weight=self.config["absolute_weight"],
            square_weight=self.config["square_weight"],
            edge_weight=self.config["edge_weight"],
        )
        metrics["quantizer"] = float(extra.detach())
        metrics["codes_used"] = codes[..., 0].unique().numel() / self.codebook_size
        return total + extra, metrics

    def _build(
        self,
        image_size: int,
        patch: int,
        widths: Sequence[int],
        encoder_depths: Sequence[int],
        decoder_depths: Sequence[int],
        channels: int,
    ) -> None:
        check_network(image_size, patch, widths)
        self.image_size = image_size
        side = image_size // patch // 2 ** (len(widths) - 1)
        self.grid = (side, side)
        self.encoder = ConvEncoder(image_size, patch, widths, encoder_depths, channels)
        self.decoder = ConvDecoder(image_size, patch, widths, decoder_depths, channels)
        for part in (self.encoder, self.decoder):
            # torch's stub of `Module.to` does not list memory_format
            part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _quantize(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tokens = rearrange(features, "b c h w -> b (h w) c").float()
        # Autocast would round distances and lattice arithmetic to bfloat16, so it is off here.
        with torch.autocast(tokens.device.type, enabled=False):
            quantized, codes, extra = self.quantize(tokens)
        grid = rearrange(quantized, "b (h w) c -> b c h w", h=self.grid[0])
        return grid.to(features.dtype), codes.long(), extra


def check_network(image_size: int, patch: int, widths: Sequence[int]) -> None:
    """Refuse a network whose resolutions do not come out whole.

    Raises:
        ValueError: `patch` is no power of two, or the image does not divide down to the grid.
    """
    if patch < 1 or patch & (patch - 1):
        nearest = 2 ** max(0, round(math.log2(max(patch, 1))))
        raise ValueError(f"patch is {patch}; it must be a power of two, nearest {nearest}")
    for width in widths:
        if width < 8 or width % 8:
            nearest = max(8, round(width / 8) * 8)
            raise ValueError(f"widths holds {width}; multiples of 8 only, nearest {nearest}")
    stride = patch * 2 ** (len(widths) - 1)
    if image_size < stride or image_size % stride:
        nearest = max(stride, round(image_size / stride) * stride)
        raise ValueError(
            f"image_size is {image_size}; it must be a multiple of patch * 2^(levels-1) = "
            f"{stride}, nearest {nearest}"
        )
