"""Discrete image tokenizer with learned codebooks: nearest entry, moving averages, resets.

It does not know how codes are generated.
"""

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize

from .discrete import DiscreteTokenizer


class VQTokenizer(DiscreteTokenizer):
    """Convolutional autoencoder whose latent is replaced by the nearest codebook entries.

    Entries follow the mean of the features they attract; an entry that attracts too few is
    replaced by a feature of the batch.

    Source: Neural Discrete Representation Learning (arXiv:1711.00937), section 3 and appendix A.1.
    """

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        patch: int = 4,
        widths: Sequence[int] = (64, 128, 192),
        encoder_depths: Sequence[int] = (1, 1, 1),
        decoder_depths: Sequence[int] = (2, 1, 2),
        codebook_size: int = 512,
        code_dim: int = 8,
        num_codebooks: int = 4,
        decay: float = 0.99,
        reset_below: float = 1.0,
        commitment_weight: float = 0.25,
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
            codebook_size: Entries of each codebook.
            code_dim: Channels of an entry, at least 2.
            num_codebooks: Codes per token, each with its own codebook.
            decay: Of the moving averages, in (0, 1).
            reset_below: Entries whose average count falls below this are replaced.
            commitment_weight: Loss weight that draws features to their entries.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.
        """
        super().__init__()
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        channels = code_dim * num_codebooks
        self._build(image_size, patch, widths, encoder_depths, decoder_depths, channels)
        self.quantizer = VectorQuantize(
            dim=channels,
            codebook_size=codebook_size,
            codebook_dim=code_dim,
            heads=num_codebooks,
            separate_codebook_per_head=True,
            decay=decay,
            threshold_ema_dead_code=reset_below,
            commitment_weight=commitment_weight,
            rotation_trick=False,
        )

    def quantize(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Replace features by their nearest entries; in training mode also move the entries.

        Args:
            features: float32 [batch tokens channels].
        """
        quantized, codes, extra = self.quantizer(features)
        # One head comes back without its axis.
        return quantized, codes.view(*features.shape[:2], self.num_codebooks), extra.sum()

    def lookup(self, codes: Tensor) -> Tensor:
        """Turn codes [batch tokens codebooks] into codebook entries."""
        if self.num_codebooks == 1:
            codes = codes[..., 0]
        return self.quantizer.get_output_from_indices(codes)
