"""A video tokenizer that treats every frame as a picture of its own, with any image tokenizer.

Frames do not see each other, so the temporal stride is 1 and a stream has nothing to remember.

It does not know which image tokenizer it holds.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .build import TOKENIZERS, build_tokenizer
from .video_base import Direction, Features, check_clip
from .video_steps import SteppedTokenizer


class FrameTokenizer(ModelMixin, ConfigMixin, SteppedTokenizer):
    """Frames one by one through an image tokenizer, discrete or continuous."""

    temporal_stride = 1

    @register_to_config
    def __init__(self, image: Mapping[str, Any] | None = None):
        """Build the image tokenizer with fresh weights; `wrap` takes a trained one.

        Args:
            image: `kind` and settings for `build_tokenizer`; None for a shallow network on
                64 x 64 pixels ("light"), made for one CPU core.

        Raises:
            ValueError: An unknown kind or setting.
        """
        super().__init__()
        self._adopt(build_tokenizer(image or {"kind": "light"}))

    @classmethod
    def wrap(cls, image: nn.Module) -> "FrameTokenizer":
        """Use a loaded image tokenizer; its weights are shared, not copied.

        Args:
            image: An `ImageTokenizer` of a kind that `build_tokenizer` knows.

        Raises:
            ValueError: A class that `build_tokenizer` does not know.
        """
        kinds = {known: kind for kind, known in TOKENIZERS.items()}
        if type(image) not in kinds:
            raise ValueError(
                f"{type(image).__name__} is no image tokenizer; allowed "
                f"{', '.join(known.__name__ for known in kinds)}"
            )
        config: Mapping[str, Any] = getattr(image, "config", {})
        plain = {name: value for name, value in config.items() if not name.startswith("_")}
        tokenizer = cls({"kind": kinds[type(image)], **plain})
        tokenizer._adopt(image)
        return tokenizer.train(image.training)

    def encode_step(
        self, frames: Float[Tensor, "batch 3 1 height width"], features: Features, is_first: bool
    ) -> tuple[Tensor, Features]:
        """Encode one frame; nothing is kept.

        Args:
            frames: Pixels in [-1, 1].
            features: Unused, empty.
            is_first: Unused.
        """
        return self.inner.encode(frames[:, :, 0])[:, None], {}

    def decode_step(
        self, values: Tensor, features: Features, is_first: bool
    ) -> tuple[Float[Tensor, "batch 3 1 height width"], Features]:
        """Decode one frame; nothing is kept.

        Args:
            values: [batch 1 tokens width].
            features: Unused, empty.
            is_first: Unused.
        """
        return self.inner.decode(values[:, 0])[:, :, None], {}

    def loss(
        self,
        pixels: Float[Tensor, "batch 3 frames height width"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the image tokenizer's loss over all frames.

        Args:
            pixels: Clips in [-1, 1].
            generator: CPU generator of stochastic tokenizers.
        """
        check_clip(pixels, self.frame_size)
        return self.inner.loss(rearrange(pixels, "b c f h w -> (b f) c h w"), generator)

    def measure_latents(self, batches: Iterable[Float[Tensor, "_ 3 _ height width"]]) -> None:
        """Standardise the image tokenizer's latents on the frames of these clips.

        Args:
            batches: Clips in [-1, 1]; at least one.

        Raises:
            ValueError: No clips, or a tokenizer whose latents are not measured.
        """
        if not hasattr(self.inner, "measure_latents"):
            raise ValueError(f"{type(self.inner).__name__} has no latents to measure")
        self.inner.measure_latents(rearrange(c, "b c f h w -> (b f) c h w") for c in batches)

    def estimate_state_bytes(self, batch_size: int, direction: Direction) -> int:
        """Return 0: frames are complete as they come and nothing is kept."""
        return 0

    def _adopt(self, image: nn.Module) -> None:
        tokenizer: Any = image
        self.inner = tokenizer
        self.value = tokenizer.value
        self.frame_size = (tokenizer.image_size, tokenizer.image_size)
        self.grid = tokenizer.grid
        self.num_codebooks = tokenizer.num_codebooks
        self.codebook_size = tokenizer.codebook_size
        self.latent_channels = tokenizer.latent_channels
