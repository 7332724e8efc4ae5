"""A tokenizer of feature frames that compresses nothing: every frame is one standardised token.

For short rows of numbers, such as what a simulated body senses and does. It does not know what the
features mean.
"""

from collections.abc import Sequence

from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .motion_base import FeatureTokenizer
from .untrained import PlainError
from .video_base import Features


class FeatureFrameTokenizer(PlainError, ModelMixin, ConfigMixin, FeatureTokenizer):
    """Feature frames as latents with mean 0 and deviation 1; nothing is lost or learned."""

    value = "latent"
    grid = (1, 1)
    temporal_stride = 1
    num_codebooks = 0
    codebook_size = 0

    @register_to_config
    def __init__(self, features: int = 263, groups: Sequence[int] | None = None):
        """Make room for the mean and the deviations, which `measure_features` sets.

        Args:
            features: Numbers of a frame, and of a latent frame.
            groups: Sizes of the groups of features that share a deviation; None = one each.

        Raises:
            ValueError: A setting out of its range.
        """
        super().__init__()
        self._set_features(features, groups)
        self.latent_channels = features

    def encode_step(
        self, frames: Float[Tensor, "batch features 1"], features: Features, is_first: bool
    ) -> tuple[Float[Tensor, "batch 1 1 features"], Features]:
        """Standardise one frame; nothing is kept.

        Args:
            frames: Features as they are.
            features: Unused, empty.
            is_first: Unused.
        """
        return rearrange(self.standardise(frames), "b c f -> b f 1 c"), {}

    def decode_step(
        self, values: Float[Tensor, "batch 1 1 features"], features: Features, is_first: bool
    ) -> tuple[Float[Tensor, "batch features 1"], Features]:
        """Undo the standardisation of one frame; nothing is kept.

        Args:
            values: Standardised features.
            features: Unused, empty.
            is_first: Unused.
        """
        return self.restore(rearrange(values, "b f 1 c -> b c f")), {}
