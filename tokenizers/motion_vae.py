"""Causal autoencoders of feature frames, and the one with continuous latents (sigma-VAE).

`temporal_stride` feature frames become one latent frame, the first like every other. It does not
know what the features mean, nor how latents or codes are generated.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from .causal_conv import Tape
from .continuous import channel_statistics
from .motion_base import (
    HUMAN_GROUPS,
    FeatureTokenizer,
    drift_error,
    group_weights,
    known_mean,
    motion_errors,
)
from .motion_conv import MotionDecoder, MotionEncoder
from .sigma import SigmaVAETokenizer
from .video_base import Features


class MotionAutoencoder(ModelMixin, ConfigMixin, FeatureTokenizer):
    """One-dimensional causal convolutions to latent frames and back; bottlenecks subclass it.

    `prepare` sets the linear paths to principal components, whose latents have mean square 1.

    Source: the layout of stages follows MoMask (arXiv:2312.00063), section 3.1, and T2M-GPT
    (arXiv:2301.06052), section 3.1; differs: nothing looks ahead, frames are normalised before
    convolutions, two linear halves double the frames instead of repeating them, and linear paths
    run beside the convolutions.
    """

    flattening: float
    """How far `prepare` levels the channels' deviations out: 0 not at all, 1 wholly."""

    @abstractmethod
    def bottleneck(
        self, encoded: Tensor, is_known: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Turn encoder output [batch channels latents] into decoder input, for training.

        Args:
            encoded: Encoder output, float32.
            is_known: Latent frames that count, bool [batch latents].
            generator: Source of noise.

        Returns:
            Decoder input of the same shape, the weighted extra loss, and metrics.
        """

    @abstractmethod
    def values_of(self, encoded: Tensor) -> Tensor:
        """Turn encoder output [batch channels latents] into values [batch latents tokens width]."""

    @abstractmethod
    def latents_of(self, values: Tensor) -> Tensor:
        """Turn values into decoder input [batch channels latents]."""

    def encode_step(
        self, frames: Float[Tensor, "batch features frames"], features: Features, is_first: bool
    ) -> tuple[Tensor, Features]:
        """Encode `temporal_stride` frames.

        Args:
            frames: Features as they are.
            features: Layer inputs the step before kept; empty on the first.
            is_first: Whether a stream starts here.
        """
        tape = Tape(features)
        return self.values_of(self.encoder(self.standardise(frames), tape)), tape.kept

    def decode_step(
        self, values: Tensor, features: Features, is_first: bool
    ) -> tuple[Float[Tensor, "batch features frames"], Features]:
        """Decode one latent frame to `temporal_stride` frames.

        Args:
            values: As `encode_step` returns them.
            features: Layer inputs the step before kept; empty on the first.
            is_first: Whether a stream starts here.
        """
        tape = Tape(features)
        return self.restore(self.decoder(self.latents_of(values), tape)), tape.kept

    @torch.no_grad()
    def prepare(self, clips: Sequence[Float[Tensor, "1 features _"]], seed: int = 0) -> None:
        """Measure the features, then set the linear paths to their principal components.

        Args:
            clips: Training clips; steps that they do not fill are left out.
            seed: Unused here.

        Raises:
            ValueError: No clip, or none as long as a step.
        """
        super().prepare(clips, seed)
        weights = group_weights(self.groups, self.config["group_loss"]).sqrt().clamp_min(0.03)
        scale = weights[:, 0].double().repeat_interleave(self.step_frames)
        rows = torch.cat([self._steps(clip.to(self.feature_mean)) for clip in clips]).double().cpu()
        components, deviation = principal_components(rows * scale, self._channels)
        gain = deviation.clamp_min(1e-4 * deviation.max()) ** -self.flattening
        gain = gain / (deviation * gain).square().mean().sqrt()
        into, back = components * gain[:, None] * scale, components.T / gain / scale[:, None]
        frames = self.step_frames
        self.encoder.linear.conv.weight.copy_(rearrange(into, "k (c s) -> k c s", s=frames))
        self.decoder.linear.conv.weight.copy_(back[..., None])
        for path in (self.encoder, self.decoder):
            bias = path.linear.conv.bias
            assert bias is not None
            bias.zero_()

    def _steps(self, clip: Float[Tensor, "1 features frames"]) -> Float[Tensor, "steps numbers"]:
        whole = clip.shape[2] // self.step_frames * self.step_frames
        frames = self.standardise(clip[..., :whole])
        return rearrange(frames, "1 c (f s) -> f (c s)", s=self.step_frames)

    def loss(
        self,
        frames: Float[Tensor, "batch features frames"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the error of standardised features and of their change, plus the bottleneck's own.

        The whole clip passes at once: the same function as the steps, without their bits.

        Args:
            frames: Clips of features as they are; at the end of a clip frames may be NaN, and the
                step that holds the first of them and all after it do not count.
            generator: CPU generator of the bottleneck's noise.

        Raises:
            ValueError: Clips of another number of features, or a number of frames that steps do
                not fill.
        """
        self.check_input(frames)
        self._check_frames(frames.shape[2])
        steps = rearrange(frames, "b c (f s) -> b f (c s)", s=self.step_frames)
        is_known = steps.isfinite().all(dim=2)
        target = self.standardise(frames).nan_to_num()
        encoded = self.encoder(target).float()
        latents, extra, metrics = self.bottleneck(encoded, is_known, generator)
        decoded = self.decoder(latents).float()
        weights = group_weights(self.groups, self.config["group_loss"]).to(target)
        counts = is_known.repeat_interleave(self.step_frames, dim=1)
        error, pace = motion_errors(decoded, target, weights, counts)
        drift = drift_error(decoded, target, self.config["summed"], counts)
        total = error + self.config["velocity_weight"] * pace + extra
        total = total + self.config["drift_weight"] * drift
        named = {"error": error, "pace": pace, "drift": drift}
        return total, {name: float(value.detach()) for name, value in named.items()} | metrics

    def _build(
        self, features: int, groups: Sequence[int] | None, group_loss: Sequence[float] | None,
        temporal_stride: int, width: int, dilations: Sequence[int], channels: int, dropout: float,
    ) -> None:  # fmt: skip
        _check_network(temporal_stride, width, dilations, channels, dropout)
        self._set_features(features, groups)
        group_weights(self.groups, group_loss)  # refuses weights that do not fit
        self.temporal_stride = self.step_frames = self.first_frames = temporal_stride
        self._channels = channels
        halvings = temporal_stride.bit_length() - 1
        self.encoder = MotionEncoder(features, width, halvings, dilations, channels, dropout)
        self.decoder = MotionDecoder(features, width, halvings, dilations, channels, dropout)


class MotionSigmaTokenizer(MotionAutoencoder):
    """Motion autoencoder with a mean only; one noise scale is drawn per clip.

    Source: LatentLM (arXiv:2412.08635), section 3.2.
    """

    value = "latent"
    grid = (1, 1)
    num_codebooks = 0
    codebook_size = 0
    flattening = 0.5  # of all gains of one mean square, the one that the same noise harms least

    @register_to_config
    def __init__(
        self,
        features: int = 263,
        groups: Sequence[int] | None = HUMAN_GROUPS,
        group_loss: Sequence[float] | None = None,
        temporal_stride: int = 4,
        width: int = 160,
        dilations: Sequence[int] = (9, 3, 1),
        latent_channels: int = 32,
        noise_std: float = 0.5,
        regulariser_weight: float = 1e-3,
        velocity_weight: float = 0.5,
        summed: int = 3,
        drift_weight: float = 0.02,
        dropout: float = 0.0,
    ):
        """Build the network.

        Args:
            features: Numbers of a frame.
            groups: Sizes of the groups of features that share a deviation; None = one each.
            group_loss: Loss weight of a feature of every group; None = all the same.
            temporal_stride: Frames per latent frame; 2, 4 or 8.
            width: Channels inside.
            dilations: Dilation of every residual layer of a stage.
            latent_channels: Floats of a latent frame.
            noise_std: Noise scale; the drawn scale has deviation `noise_std / 0.8`.
            regulariser_weight: Loss weight of the mean squared mean.
            velocity_weight: Loss weight of the error of frame-to-frame change.
            summed: First features that readers add up over time, as turn and way of the root.
            drift_weight: Loss weight of the error of their running sums.
            dropout: Share of the residual layers' inner channels dropped in training.

        Raises:
            ValueError: A setting out of its range.
        """
        super().__init__()
        self.latent_channels = latent_channels
        self._build(
            features,
            groups,
            group_loss,
            temporal_stride,
            width,
            dilations,
            latent_channels,
            dropout,
        )
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))

    def bottleneck(
        self,
        encoded: Float[Tensor, "batch channels latents"],
        is_known: Bool[Tensor, "batch latents"],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Add noise of one drawn scale per clip, as the image tokenizer does.

        Args:
            encoded: Means, float32.
            is_known: Latent frames whose size counts.
            generator: CPU generator of scale and noise.
        """
        noisy, _ = SigmaVAETokenizer.posterior_sample(self, encoded[..., None], generator)
        size = known_mean(encoded.square(), is_known)
        extra = self.config["regulariser_weight"] * size
        return noisy[..., 0], extra, {"regulariser": float(size.detach())}

    def values_of(self, encoded: Tensor) -> Float[Tensor, "batch latents 1 channels"]:
        """Standardise means [batch channels latents]."""
        latents = rearrange(encoded, "b c f -> b f 1 c")
        return (latents - self.latent_mean) / self.latent_std

    def latents_of(self, values: Tensor) -> Float[Tensor, "batch channels latents"]:
        """Undo the standardisation of latents [batch latents 1 channels]."""
        return rearrange(values * self.latent_std + self.latent_mean, "b f 1 c -> b c f")

    @torch.no_grad()
    def measure_latents(self, batches: Iterable[Float[Tensor, "_ features _"]]) -> None:
        """Set the buffers so that `encode` gives mean 0 and deviation 1 on these clips.

        Args:
            batches: Clips of features; at least one.

        Raises:
            ValueError: No clips.
        """
        mean, deviation = channel_statistics(
            self._means(frames.to(self.device, self.dtype)) for frames in batches
        )
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(deviation)

    def _means(self, frames: Tensor) -> Float[Tensor, "latents channels"]:
        """Return the means of the latent frames of clips, those with unknown frames left out."""
        steps = rearrange(frames, "b c (f s) -> (b f) (c s)", s=self.step_frames)
        means = self.encoder(self.standardise(frames).nan_to_num())
        return rearrange(means, "b c f -> (b f) c")[steps.isfinite().all(dim=1)]


def principal_components(
    rows: Float[Tensor, "rows numbers"], count: int
) -> tuple[Float[Tensor, "components numbers"], Float[Tensor, " components"]]:
    """Find the directions along which rows of mean 0 vary most.

    Args:
        rows: At least one.
        count: Components; those beyond the number of numbers are zero.

    Returns:
        Unit vectors and the deviation along each, largest first.

    Raises:
        ValueError: No rows.
    """
    if not len(rows):
        raise ValueError("prepare got no clip as long as a step of the tokenizer")
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    kept = min(count, len(values))
    components = rows.new_zeros(count, rows.shape[1])
    deviation = rows.new_zeros(count)
    components[:kept] = vectors.flip(1).T[:kept]
    deviation[:kept] = values.flip(0)[:kept].clamp_min(0).sqrt()
    return components, deviation


def _check_network(
    temporal_stride: int, width: int, dilations: Sequence[int], channels: int, dropout: float
) -> None:
    if temporal_stride not in (2, 4, 8):
        nearest = min((2, 4, 8), key=lambda stride: abs(stride - temporal_stride))
        raise ValueError(
            f"temporal_stride is {temporal_stride}; allowed 2, 4, 8, nearest {nearest}"
        )
    for name, count in (("width", width), ("channels of a latent frame", channels)):
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1, nearest 1")
    for dilation in dilations:
        if dilation < 1:
            raise ValueError(f"dilations holds {dilation}; at least 1 only, nearest 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout}; it must be in [0, 1), nearest 0")
