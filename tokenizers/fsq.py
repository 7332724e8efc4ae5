"""Discrete image tokenizer with product finite scalar quantisation.

Every grid cell is `num_codebooks` codes; a code names one point of a fixed lattice with `levels`
steps an axis. There is no learned codebook, so nothing can collapse.

It does not know how codes are generated.
"""

import math
from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from torch import Tensor
from vector_quantize_pytorch import FSQ

from .discrete import DiscreteTokenizer


class FSQTokenizer(DiscreteTokenizer):
    """Convolutional autoencoder whose latent is quantised to groups of lattice points.

    Source: Finite Scalar Quantization (arXiv:2309.15505), section 3; differs: the lattice is split
    into `num_codebooks` independent groups.
    """

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
            levels: Lattice steps per axis, each at least 3; their product is the codebook size.
            num_codebooks: Codes per token.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.

        Raises:
            ValueError: A size that does not fit, or fewer than 3 levels on an axis.
        """
        super().__init__()
        if not levels or min(levels) < 3:
            raise ValueError(f"levels is {list(levels)}; every axis needs at least 3 steps")
        self.num_codebooks = num_codebooks
        self.codebook_size = math.prod(levels)
        channels = len(levels) * num_codebooks
        self._build(image_size, patch, widths, encoder_depths, decoder_depths, channels)
        self.quantizer = FSQ(list(levels), num_codebooks=num_codebooks, keep_num_codebooks_dim=True)

    def quantize(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Round features to the lattice; there is no extra loss.

        Args:
            features: float32 [batch tokens channels].
        """
        quantized, codes = self.quantizer(features)
        return quantized, codes, features.new_zeros(())

    def lookup(self, codes: Tensor) -> Tensor:
        """Turn codes [batch tokens codebooks] into lattice points."""
        return self.quantizer.indices_to_codes(codes)
