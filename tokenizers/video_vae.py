"""Causal video autoencoders with continuous latents: learned-variance (KL) and sigma bottleneck.

A clip of `temporal_stride * n + 1` frames becomes n + 1 latent frames, the first frame alone.
Latents leave with mean 0 and deviation 1 per channel, by buffers measured on training data.

It does not know how latents are generated.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .causal_conv import CausalDecoder, CausalEncoder, Tape
from .continuous import channel_statistics
from .kl import KLTokenizer
from .losses import reconstruction_loss
from .sigma import SigmaVAETokenizer
from .video_base import Features, check_clip, motion_loss
from .video_steps import SteppedTokenizer


class CausalVideoTokenizer(ModelMixin, ConfigMixin, SteppedTokenizer):
    """Causal convolutional autoencoder of clips; bottlenecks subclass it.

    Source: the frame grouping follows the VAE of Wan (arXiv:2503.20314), section 4.1; differs:
    the time convolutions also run on the first frame, after zeros.
    """

    value = "latent"
    num_codebooks = 0
    codebook_size = 0

    @abstractmethod
    def posterior_mean(self, features: Tensor) -> Tensor:
        """Return the mean latent of encoder features [batch features height width]."""

    @abstractmethod
    def posterior_sample(
        self, features: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw a latent for training and return it with the scalar regulariser."""

    def encode_step(
        self,
        frames: Float[Tensor, "batch 3 frames height width"],
        features: Features,
        is_first: bool,
    ) -> tuple[Float[Tensor, "batch latents tokens channels"], Features]:
        """Encode one frame at the start, then `temporal_stride` frames.

        Args:
            frames: Pixels in [-1, 1].
            features: Layer inputs the step before kept; empty on the first.
            is_first: Whether a stream starts here.
        """
        tape = Tape(features)
        encoded = self.encoder(rearrange(frames, "b c f h w -> b f c h w"), tape)
        tokens = rearrange(self._mean(encoded), "b f c h w -> b f (h w) c")
        return (tokens - self.latent_mean) / self.latent_std, tape.kept

    def decode_step(
        self,
        values: Float[Tensor, "batch latents tokens channels"],
        features: Features,
        is_first: bool,
    ) -> tuple[Float[Tensor, "batch 3 frames height width"], Features]:
        """Decode one latent frame to one pixel frame at the start, then to `temporal_stride`.

        Args:
            values: Standardised latents.
            features: Layer inputs the step before kept; empty on the first.
            is_first: Whether a stream starts here.
        """
        tape = Tape(features)
        latents = values * self.latent_std + self.latent_mean
        frames = self.decoder(rearrange(latents, "b f (h w) c -> b f c h w", h=self.grid[0]), tape)
        return rearrange(frames, "b f c h w -> b c f h w").clamp(-1, 1), tape.kept

    def loss(
        self,
        pixels: Float[Tensor, "batch 3 frames height width"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the reconstruction loss of a noisy latent plus the weighted regulariser.

        The whole clip passes at once: the same function as the steps, without their bits.

        Args:
            pixels: Clips in [-1, 1].
            generator: CPU generator of the latent noise.

        Raises:
            ValueError: Frames of another size, or a number of frames that steps do not fill.
        """
        check_clip(pixels, self.frame_size)
        self._check_frames(pixels.shape[2])
        encoded = self.encoder(rearrange(pixels, "b c f h w -> b f c h w")).float()
        latent, regulariser = self.posterior_sample(_join(encoded), generator)
        frames = self.decoder(_part(latent, encoded.shape[1]))
        images = rearrange(frames, "b f c h w -> (b f) c h w")
        total, metrics = reconstruction_loss(
            images,
            rearrange(pixels, "b c f h w -> (b f) c h w"),
            absolute_weight=self.config["absolute_weight"],
            square_weight=self.config["square_weight"],
            edge_weight=self.config["edge_weight"],
        )
        motion = motion_loss(rearrange(frames, "b f c h w -> b c f h w"), pixels)
        metrics["motion"] = float(motion.detach())
        metrics["regulariser"] = float(regulariser.detach())
        total = total + self.config["motion_weight"] * motion
        return total + self.config["regulariser_weight"] * regulariser, metrics

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Float[Tensor, "_ 3 _ height width"]]) -> None:
        """Set the buffers so that `encode` gives mean 0 and deviation 1 on these clips.

        Args:
            batches: Clips in [-1, 1]; at least one.

        Raises:
            ValueError: No clips.
        """
        clips = (pixels.to(self.device, self.dtype) for pixels in batches)
        means = (self._mean(self.encoder(rearrange(c, "b c f h w -> b f c h w"))) for c in clips)
        mean, deviation = channel_statistics(
            rearrange(m, "b f c h w -> (b f h w) c") for m in means
        )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(deviation)

    def _mean(self, encoded: Tensor) -> Tensor:
        return _part(self.posterior_mean(_join(encoded)), encoded.shape[1])

    def _build(
        self,
        frame_size: Sequence[int],
        spatial_stride: int,
        temporal_stride: int,
        widths: Sequence[int],
        encoder_depths: Sequence[int],
        decoder_depths: Sequence[int],
        features_per_channel: int,
    ) -> None:
        check_video_network(frame_size, spatial_stride, temporal_stride, widths)
        self.frame_size = (frame_size[0], frame_size[1])
        self.grid = (frame_size[0] // spatial_stride, frame_size[1] // spatial_stride)
        self.temporal_stride = self.step_frames = temporal_stride
        halvings = len(widths) - 1
        patch = spatial_stride // 2**halvings
        # Time is halved where images are smallest, so that fine levels see every frame.
        coarse = temporal_stride.bit_length() - 1
        strides = [1] * (halvings - coarse) + [2] * coarse
        channels = self.latent_channels
        self.encoder = CausalEncoder(
            self.grid, patch, strides, widths, encoder_depths, features_per_channel * channels
        )
        self.decoder = CausalDecoder(self.grid, patch, strides, widths, decoder_depths, channels)
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))


class VideoKLTokenizer(CausalVideoTokenizer):
    """Causal video autoencoder with a mean and a log-variance per channel and cell.

    Source: Auto-Encoding Variational Bayes (arXiv:1312.6114), appendix B.
    """

    @register_to_config
    def __init__(
        self,
        frame_size: Sequence[int] = (64, 64),
        spatial_stride: int = 8,
        temporal_stride: int = 4,
        widths: Sequence[int] = (32, 64, 96),
        encoder_depths: Sequence[int] = (1, 1, 1),
        decoder_depths: Sequence[int] = (1, 1, 2),
        latent_channels: int = 16,
        regulariser_weight: float = 1e-4,
        absolute_weight: float = 1.0,
        square_weight: float = 2.0,
        edge_weight: float = 1.0,
        motion_weight: float = 1.0,
    ):
        """Build the network.

        Args:
            frame_size: Height and width of a frame, in pixels; multiples of `spatial_stride`.
            spatial_stride: Pixels per latent cell along a side; a power of two.
            temporal_stride: Pixel frames per latent frame after the first; 1, 2 or 4.
            widths: Channels per resolution, finest first; each resolution halves the last.
            encoder_depths: Encoder layers per resolution.
            decoder_depths: Decoder layers per resolution.
            latent_channels: Floats per token.
            regulariser_weight: Loss weight of the KL divergence, in nats per channel.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.
            motion_weight: Loss weight of the error of frame-to-frame change.

        Raises:
            ValueError: Sizes or strides that do not fit together.
        """
        super().__init__()
        self.latent_channels = latent_channels
        self._build(
            frame_size, spatial_stride, temporal_stride, widths, encoder_depths, decoder_depths, 2
        )

    # The bottleneck of the image tokenizer, on frames laid side by side.
    posterior_mean = KLTokenizer.posterior_mean
    posterior_sample = KLTokenizer.posterior_sample


class VideoSigmaTokenizer(CausalVideoTokenizer):
    """Causal video autoencoder with a mean only; one noise scale is drawn per clip.

    Source: LatentLM (arXiv:2412.08635), section 3.2.
    """

    @register_to_config
    def __init__(
        self,
        frame_size: Sequence[int] = (64, 64),
        spatial_stride: int = 8,
        temporal_stride: int = 4,
        widths: Sequence[int] = (32, 64, 96),
        encoder_depths: Sequence[int] = (1, 1, 1),
        decoder_depths: Sequence[int] = (1, 1, 2),
        latent_channels: int = 16,
        noise_std: float = 0.75,
        regulariser_weight: float = 1e-3,
        absolute_weight: float = 1.0,
        square_weight: float = 2.0,
        edge_weight: float = 1.0,
        motion_weight: float = 1.0,
    ):
        """Build the network.

        Args:
            frame_size: Height and width of a frame, in pixels; multiples of `spatial_stride`.
            spatial_stride: Pixels per latent cell along a side; a power of two.
            temporal_stride: Pixel frames per latent frame after the first; 1, 2 or 4.
            widths: Channels per resolution, finest first; each resolution halves the last.
            encoder_depths: Encoder layers per resolution.
            decoder_depths: Decoder layers per resolution.
            latent_channels: Floats per token.
            noise_std: Noise scale; the drawn scale has deviation `noise_std / 0.8`.
            regulariser_weight: Loss weight of the mean squared mean.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.
            motion_weight: Loss weight of the error of frame-to-frame change.

        Raises:
            ValueError: Sizes or strides that do not fit together.
        """
        super().__init__()
        self.latent_channels = latent_channels
        self._build(
            frame_size, spatial_stride, temporal_stride, widths, encoder_depths, decoder_depths, 1
        )

    # The bottleneck of the image tokenizer, on frames laid side by side.
    posterior_mean = SigmaVAETokenizer.posterior_mean
    posterior_sample = SigmaVAETokenizer.posterior_sample


def check_video_network(
    frame_size: Sequence[int], spatial_stride: int, temporal_stride: int, widths: Sequence[int]
) -> None:
    """Refuse a network whose resolutions do not come out whole.

    Raises:
        ValueError: Strides that are no powers of two or that the number of resolutions cannot
            reach, widths that are no multiples of 8, or a frame that cells do not tile.
    """
    halvings = len(widths) - 1
    least = 2**halvings
    if spatial_stride < least or spatial_stride & (spatial_stride - 1):
        nearest = max(least, 2 ** max(0, spatial_stride.bit_length() - 1))
        raise ValueError(
            f"spatial_stride is {spatial_stride}; with {len(widths)} widths it must be a power of "
            f"two from {least} on, nearest {nearest}"
        )
    legal = [stride for stride in (1, 2, 4) if stride <= least]
    if temporal_stride not in legal:
        nearest = min(legal, key=lambda stride: abs(stride - temporal_stride))
        raise ValueError(
            f"temporal_stride is {temporal_stride}; with {len(widths)} widths allowed "
            f"{', '.join(map(str, legal))}, nearest {nearest}"
        )
    for width in widths:
        if width < 8 or width % 8:
            nearest = max(8, round(width / 8) * 8)
            raise ValueError(f"widths holds {width}; multiples of 8 only, nearest {nearest}")
    if len(frame_size) != 2:
        raise ValueError(f"frame_size is {list(frame_size)}; it must be [height, width]")
    for side in frame_size:
        if side < spatial_stride or side % spatial_stride:
            nearest = max(spatial_stride, round(side / spatial_stride) * spatial_stride)
            raise ValueError(
                f"frame_size holds {side}; multiples of spatial_stride {spatial_stride} only, "
                f"nearest {nearest}"
            )


def _join(frames: Tensor) -> Tensor:
    """Lay frames below each other as one image, the form the image bottlenecks take."""
    return rearrange(frames, "b f c h w -> b c (f h) w")


def _part(image: Tensor, num_frames: int) -> Tensor:
    return rearrange(image, "b c (f h) w -> b f c h w", f=num_frames)
