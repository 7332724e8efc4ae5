"""A tokenizer of feature frames that hold several streams: every stream of a frame is one token.

For scenes with several things that go on side by side, such as what two people say and how they
move. Nothing is compressed; streams narrower than the widest are filled up with zeros. It does not
know what the streams mean.

A frame of one stream is feature_frames.py, on the same base.
"""

from collections.abc import Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .motion_base import FeatureTokenizer
from .untrained import PlainError
from .video_base import Features


class PlainFeatureTokenizer(PlainError, ModelMixin, ConfigMixin, FeatureTokenizer):
    """Feature frames as one row of tokens with mean 0 and deviation 1; nothing is lost or learned.

    Attributes:
        streams: Numbers of every stream of a frame, in their order.
    """

    value = "latent"
    temporal_stride = 1
    num_codebooks = 0
    codebook_size = 0
    streams: tuple[int, ...]

    def encode_step(
        self, frames: Float[Tensor, "batch features 1"], features: Features, is_first: bool
    ) -> tuple[Float[Tensor, "batch 1 streams channels"], Features]:
        """Standardise one frame and cut it into streams; nothing is kept.

        Args:
            frames: Features as they are.
            features: Unused, empty.
            is_first: Unused.
        """
        parts = self.standardise(frames)[..., 0].split(list(self.streams), 1)
        wide = [F.pad(part, (0, self.latent_channels - part.shape[1])) for part in parts]
        return torch.stack(wide, 1)[:, None], {}

    def decode_step(
        self, values: Float[Tensor, "batch 1 streams channels"], features: Features, is_first: bool
    ) -> tuple[Float[Tensor, "batch features 1"], Features]:
        """Join the streams of one frame and undo the standardisation; nothing is kept.

        Args:
            values: Standardised streams.
            features: Unused, empty.
            is_first: Unused.
        """
        parts = [values[:, 0, index, :size] for index, size in enumerate(self.streams)]
        return self.restore(torch.cat(parts, 1)[..., None]), {}

    def _set_streams(self, streams: Sequence[int], groups: Sequence[int] | None) -> None:
        self._set_features(sum(streams), groups)
        self.streams = tuple(streams)
        self.latent_channels = max(streams)
        self.grid = (1, len(streams))


class FeatureStreamTokenizer(PlainFeatureTokenizer):
    """Several streams; every feature has a deviation of its own."""

    @register_to_config
    def __init__(self, streams: Sequence[int] = (1, 1)):
        """Make room for the mean and the deviations, which `measure_features` sets.

        Args:
            streams: Numbers of every stream of a frame.

        Raises:
            ValueError: no streams, or an empty one.
        """
        super().__init__()
        if not streams or min(streams) < 1:
            raise ValueError(
                f"streams {list(streams)} must be one or more numbers from 1 on; try [4, 6]"
            )
        self._set_streams(streams, None)
