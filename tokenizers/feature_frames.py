"""A tokenizer of feature frames that compresses nothing: every frame is one standardised token.

For short rows of numbers, such as what a simulated body senses and does. It does not know what the
features mean.
"""

from collections.abc import Sequence

from diffusers.configuration_utils import register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin

from .feature_streams import PlainFeatureTokenizer


class FeatureFrameTokenizer(PlainFeatureTokenizer):
    """Feature frames as latents: one stream, whose features may share deviations in groups."""

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
        self._set_streams((features,), groups)
