"""Discrete image tokenizer with product finite scalar quantisation.

Every grid cell is `num_codebooks` codes; a code names one point of a fixed lattice with `levels`
steps an axis. There is no learned codebook, so nothing can collapse. Quantisation runs in float32.

It does not know how codes are generated.
"""

import math
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from vector_quantize_pytorch import FSQ

from .base import check_codes, check_pixels
from .conv import ConvDecoder, ConvEncoder
from .losses import reconstruction_loss


class FSQTokenizer(ModelMixin, ConfigMixin):
    """Convolutional autoencoder whose latent is quantised to groups of lattice points.

    Source: Finite Scalar Quantization (arXiv:2309.15505), section 3; the lattice is split into
    `num_codebooks` independent groups.
    """

    value = "code"
    latent_channels = 0

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        patch: int = 4,
        widths: Sequence[int] = (64, 128, 192),
        encoder_depths: Sequence[int] = (1, 1, 1),
        decoder_depths: Sequence[int] = (2, 1, 2),
        levels: Sequence[int] = (4, 4, 4),
        num_codebooks: int = 10,
        absolute_weight: float = 1.0,
        square_weight: float = 1.0,
        edge_weight: float = 1.0,
    ):
        """Build the network.

        Args:
            image_size: Side of the image in pixels.
            patch: Side of the patches cut at the door, in pixels; a power of two.
            widths: Channels per resolution, finest first; each resolution halves the last.
            encoder_depths: Encoder layers per resolution.
            decoder_depths: Decoder layers per resolution.
            levels: Lattice steps per axis, each at least 3; their product is the codebook size.
            num_codebooks: Codes per token.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.
        """
        super().__init__()
        check_network(image_size, patch, widths)
        self.image_size = image_size
        self.num_codebooks = num_codebooks
        self.codebook_size = math.prod(levels)
        side = image_size // patch // 2 ** (len(widths) - 1)
        self.grid = (side, side)
        channels = len(levels) * num_codebooks
        self.encoder = ConvEncoder(image_size, patch, widths, encoder_depths, channels)
        self.quantizer = FSQ(
            list(levels), num_codebooks=num_codebooks, keep_num_codebooks_dim=True
        )
        self.decoder = ConvDecoder(image_size, patch, widths, decoder_depths, channels)
        self.to(memory_format=torch.channels_last)

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    def encode(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Int[Tensor, "batch tokens codebooks"]:
        """Turn pixels in [-1, 1] into codes, int64 in [0, codebook_size).

        Raises:
            ValueError: The image has another size.
        """
        check_pixels(pixels, self.image_size)
        return self._quantize(self.encoder(pixels.to(self.dtype)))[1]

    def decode(
        self, values: Int[Tensor, "batch tokens codebooks"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Turn codes into pixels clamped to [-1, 1].

        Raises:
            ValueError: Codes of another shape or outside the codebook.
        """
        check_codes(values, self.num_tokens, self.num_codebooks, self.codebook_size)
        features = self.quantizer.indices_to_codes(values)
        grid = rearrange(features, "b (h w) c -> b c h w", h=self.grid[0])
        return self.decoder(grid.to(self.dtype)).clamp(-1, 1)

    def loss(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the reconstruction loss; FSQ needs no further term.

        Args:
            pixels: Images in [-1, 1].
            generator: Unused; part of the tokenizer protocol.
        """
        check_pixels(pixels, self.image_size)
        features, codes = self._quantize(self.encoder(pixels))
        total, metrics = reconstruction_loss(
            self.decoder(features),
            pixels,
            absolute_weight=self.config["absolute_weight"],
            square_weight=self.config["square_weight"],
            edge_weight=self.config["edge_weight"],
        )
        metrics["codes_used"] = codes[..., 0].unique().numel() / self.codebook_size
        return total, metrics

    def _quantize(self, features: Tensor) -> tuple[Tensor, Tensor]:
        tokens = rearrange(features, "b c h w -> b (h w) c").float()
        # Autocast would round the lattice arithmetic to bfloat16, so it is off here.
        with torch.autocast(tokens.device.type, enabled=False):
            quantized, codes = self.quantizer(tokens)
        return rearrange(quantized, "b (h w) c -> b c h w", h=self.grid[0]), codes.long()


def check_network(image_size: int, patch: int, widths: Sequence[int]) -> None:
    """Refuse a network whose resolutions do not come out whole.

    Raises:
        ValueError: `patch` is no power of two, or the image does not divide down to the grid.
    """
    if patch < 1 or patch & (patch - 1):
        nearest = 2 ** max(0, round(math.log2(max(patch, 1))))
        raise ValueError(f"patch is {patch}; it must be a power of two, nearest {nearest}")
    stride = patch * 2 ** (len(widths) - 1)
    if image_size % stride:
        nearest = max(stride, round(image_size / stride) * stride)
        raise ValueError(
            f"image_size is {image_size}; it must be a multiple of patch * 2^(levels-1) = "
            f"{stride}, nearest {nearest}"
        )
