"""Discrete image tokenizer with binary spherical quantisation, its bits dealt to several codes.

A token of `num_codebooks * bits` bits would need a softmax of 2^bits_total; as groups of `bits`
each code has 2^bits values and the ordinary K-codebook head applies.

It does not know how codes are generated.
"""

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from torch import Tensor
from vector_quantize_pytorch import LFQ

from .discrete import DiscreteTokenizer


class BSQTokenizer(DiscreteTokenizer):
    """Convolutional autoencoder whose latent is a unit vector rounded to the signs of its axes.

    Source: Binary Spherical Quantization (arXiv:2406.07548), section 3; differs: each group of
    bits lies on its own sphere, and the entropy term is computed per group.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        patch: int = 4,
        widths: Sequence[int] = (64, 128, 192),
        encoder_depths: Sequence[int] = (1, 1, 1),
        decoder_depths: Sequence[int] = (2, 1, 2),
        bits: int = 6,
        num_codebooks: int = 10,
        entropy_weight: float = 0.02,
        diversity: float = 1.0,
        inverse_temperature: float = 4.0,
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
            bits: Bits of a code, 1..16; a code has 2^bits values.
            num_codebooks: Codes per token.
            entropy_weight: Loss weight of the entropy term.
            diversity: Weight of the batch entropy inside that term.
            inverse_temperature: Sharpness of the soft assignment the entropies are taken of.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.

        Raises:
            ValueError: `bits` outside 1..16, or a size that does not fit.
        """
        super().__init__()
        if not 1 <= bits <= 16:
            raise ValueError(f"bits is {bits}; allowed 1..16, nearest {min(max(bits, 1), 16)}")
        self.num_codebooks = num_codebooks
        self.codebook_size = 2**bits
        channels = bits * num_codebooks
        self._build(image_size, patch, widths, encoder_depths, decoder_depths, channels)
        self.quantizer = LFQ(
            dim=channels,
            codebook_size=self.codebook_size,
            num_codebooks=num_codebooks,
            keep_num_codebooks_dim=True,
            spherical=True,
            entropy_loss_weight=entropy_weight,
            diversity_gamma=diversity,
        )

    def quantize(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round features to the signs of their axes.

        Args:
            features: float32 [batch tokens channels].
        """
        result = self.quantizer(features, inv_temperature=self.config["inverse_temperature"])
        return result.quantized, result.indices, result.entropy_aux_loss

    def lookup(self, codes: Tensor) -> Tensor:
        """Turn codes [batch tokens codebooks] into signs of unit length per group."""
        return self.quantizer.indices_to_codes(codes)
