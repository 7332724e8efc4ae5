"""Video tokenizers round pretrained diffusers autoencoders: Wan and CogVideoX.

Both autoencoders look back through the inputs of their convolutions. diffusers drops Wan's when a
call ends; here they travel in the `StreamState`, so a stream may stop and go on anywhere.

The wrapped module is used as it is. It does not download anything: give a folder, a hub id you
chose, or a module.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from .continuous import noise_like
from .losses import reconstruction_loss
from .video_base import Features, check_clip, check_count, motion_loss
from .video_steps import SteppedTokenizer

Step = Callable[[Tensor, Features, bool], tuple[Tensor, Features]]

# diffusers' mark of a layer that has passed its first frame over and kept nothing yet.
_PASSED_OVER = "Rep"


class AutoencoderTokenizer(ModelMixin, ConfigMixin, SteppedTokenizer):
    """What the adapters share: tokens in raster order, standard latents, the training loss."""

    value = "latent"
    num_codebooks = 0
    codebook_size = 0

    @abstractmethod
    def moments_step(
        self, frames: Tensor, features: Features, is_first: bool
    ) -> tuple[Tensor, Features]:
        """Return mean and log-variance [batch 2*channels latents rows columns] of one step."""

    @abstractmethod
    def pixels_step(
        self, latents: Tensor, features: Features, is_first: bool
    ) -> tuple[Tensor, Features]:
        """Turn the autoencoder's own latents [batch channels latents rows columns] into pixels."""

    def encode_step(
        self,
        frames: Float[Tensor, "batch 3 frames height width"],
        features: Features,
        is_first: bool,
    ) -> tuple[Float[Tensor, "batch latents tokens channels"], Features]:
        """Encode the frames of one step: the posterior's mode, standardised.

        Args:
            frames: Pixels in [-1, 1].
            features: Layer inputs the step before kept; empty on the first.
            is_first: Whether a stream starts here.
        """
        moments, kept = self.moments_step(frames, features, is_first)
        tokens = rearrange(moments.chunk(2, dim=1)[0], "b c f h w -> b f (h w) c")
        return (tokens - self.latent_mean) / self.latent_std, kept

    def decode_step(
        self,
        values: Float[Tensor, "batch latents tokens channels"],
        features: Features,
        is_first: bool,
    ) -> tuple[Float[Tensor, "batch 3 frames height width"], Features]:
        """Decode the latent frames of one step.

        Args:
            values: Standardised latents.
            features: Layer inputs the step before kept; empty on the first.
            is_first: Whether a stream starts here.
        """
        latents = values * self.latent_std + self.latent_mean
        grid = rearrange(latents, "b f (h w) c -> b c f h w", h=self.grid[0]).contiguous()
        pixels, kept = self.pixels_step(grid, features, is_first)
        return pixels.clamp(-1, 1), kept

    def loss(
        self,
        pixels: Float[Tensor, "batch 3 frames height width"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the reconstruction loss of a posterior sample plus the KL term.

        Args:
            pixels: Clips in [-1, 1].
            generator: CPU generator of the sample.

        Raises:
            ValueError: Frames of another size, or a number of frames that steps do not fill.
        """
        check_clip(pixels, self.frame_size)
        check_count("clip", "frames", pixels.shape[2], self.first_frames, self.step_frames)
        posterior = DiagonalGaussianDistribution(
            _in_steps(self.moments_step, pixels, self.first_frames, self.step_frames)
        )
        sample = posterior.mean + posterior.std * noise_like(posterior.mean, generator)
        decoded = _in_steps(self.pixels_step, sample, self.first_latents, self.step_latents)
        images, target = (rearrange(c, "b c f h w -> (b f) c h w") for c in (decoded, pixels))
        total, metrics = reconstruction_loss(images, target)
        # The mean over latent numbers, so that the weight does not depend on the clip's size.
        divergence = posterior.kl().sum() / sample.numel()
        motion = motion_loss(decoded, pixels)
        metrics |= {"kl": float(divergence.detach()), "motion": float(motion.detach())}
        return total + motion + self.config["kl_weight"] * divergence, metrics

    @classmethod
    def wrap(cls, autoencoder: nn.Module, frame_size: Sequence[int]) -> "AutoencoderTokenizer":
        """Use a loaded autoencoder; its weights are shared, not copied.

        Args:
            autoencoder: The diffusers module this class is for.
            frame_size: Height and width of the frames, in pixels.

        Raises:
            ValueError: A frame that the autoencoder's cells do not tile.
        """
        loaded: Any = autoencoder
        with torch.device("meta"):  # these weights give way at once
            tokenizer: Any = cls(tuple(frame_size), _plain(loaded.config))
        tokenizer.autoencoder = loaded
        tokenizer._measure(next(loaded.parameters()))
        return tokenizer.train(loaded.training)

    @abstractmethod
    def _statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return mean and deviation of the autoencoder's latents, per channel."""

    def _describe(self, frame_size: Sequence[int], spatial_stride: int) -> None:
        for side in frame_size:
            if side < spatial_stride or side % spatial_stride:
                nearest = max(spatial_stride, round(side / spatial_stride) * spatial_stride)
                raise ValueError(
                    f"frame_size holds {side}; this autoencoder takes multiples of "
                    f"{spatial_stride}, nearest {nearest}"
                )
        self.frame_size = (frame_size[0], frame_size[1])
        self.grid = (frame_size[0] // spatial_stride, frame_size[1] // spatial_stride)
        self._measure(next(self.autoencoder.parameters()))
        self.latent_channels = len(self.latent_mean)

    def _measure(self, like: Tensor) -> None:
        for name, numbers in zip(("latent_mean", "latent_std"), self._statistics(), strict=True):
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.float32).to(like))


class WanTokenizer(AutoencoderTokenizer):
    """Latents of a diffusers `AutoencoderKLWan`, standardised by its own means and deviations.

    Clips have 4n+1 frames: the first alone, then groups of four.
    """

    @register_to_config
    def __init__(
        self,
        frame_size: Sequence[int] = (480, 832),
        autoencoder_config: Mapping[str, Any] | None = None,
        kl_weight: float = 1e-6,
    ):
        """Build an autoencoder with fresh weights; `wrap` takes a trained one.

        Args:
            frame_size: Height and width of a frame, in pixels.
            autoencoder_config: Configuration of the `AutoencoderKLWan`; None for its defaults.
            kl_weight: Loss weight of the KL divergence when it is trained further.

        Raises:
            ValueError: A frame that the autoencoder's cells do not tile.
        """
        super().__init__()
        self.autoencoder = AutoencoderKLWan(**_plain(autoencoder_config))
        config = self.autoencoder.config
        self._describe(frame_size, (config.patch_size or 1) * 2 ** (len(config.dim_mult) - 1))
        self.temporal_stride = self.step_frames = 2 ** sum(config.temperal_downsample)

    def _statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        config = self.autoencoder.config
        return config.latents_mean, config.latents_std

    def moments_step(
        self, frames: Tensor, features: Features, is_first: bool
    ) -> tuple[Tensor, Features]:
        """Encode one frame at the start, then one group of frames.

        Args:
            frames: [batch 3 frames height width].
            features: Convolution inputs by slot.
            is_first: Whether a stream starts here.
        """
        patched = patchify(frames, self.autoencoder.config.patch_size or 1)
        slots = _to_slots(features, self.autoencoder.encoder)
        out = self.autoencoder.encoder(patched, feat_cache=slots, feat_idx=[0])
        return self.autoencoder.quant_conv(out), _from_slots(slots, len(frames))

    def pixels_step(
        self, latents: Tensor, features: Features, is_first: bool
    ) -> tuple[Tensor, Features]:
        """Decode one latent frame, to one pixel frame at the start and to a group later.

        Args:
            latents: [batch channels 1 rows columns].
            features: Convolution inputs by slot.
            is_first: Whether a stream starts here.
        """
        slots = _to_slots(features, self.autoencoder.decoder)
        out = self.autoencoder.decoder(
            self.autoencoder.post_quant_conv(latents),
            feat_cache=slots,
            feat_idx=[0],
            first_chunk=is_first,
        )
        pixels = unpatchify(out, self.autoencoder.config.patch_size or 1)
        return pixels, _from_slots(slots, len(latents))


class CogVideoXTokenizer(AutoencoderTokenizer):
    """Latents of a diffusers `AutoencoderKLCogVideoX`, scaled by its own factor.

    Its group norms take statistics over the frames of a step, so results depend on the grouping:
    pixels in 9, 8, 8, ... frames and latents in 3, 2, 2, ... as diffusers groups clips of 8n+1
    frames. A single frame is a clip too, but not the start of a stream.
    """

    takes_single = True

    @register_to_config
    def __init__(
        self,
        frame_size: Sequence[int] = (480, 720),
        autoencoder_config: Mapping[str, Any] | None = None,
        kl_weight: float = 1e-6,
    ):
        """Build an autoencoder with fresh weights; `wrap` takes a trained one.

        Args:
            frame_size: Height and width of a frame, in pixels.
            autoencoder_config: Configuration of the `AutoencoderKLCogVideoX`; None for its
                defaults.
            kl_weight: Loss weight of the KL divergence when it is trained further.

        Raises:
            ValueError: A frame that the autoencoder's cells do not tile.
        """
        super().__init__()
        self.autoencoder = AutoencoderKLCogVideoX(**_plain(autoencoder_config))
        config = self.autoencoder.config
        self._describe(frame_size, 2 ** (len(config.block_out_channels) - 1))
        self.temporal_stride = int(config.temporal_compression_ratio)
        self.step_frames = self.autoencoder.num_sample_frames_batch_size
        self.step_latents = self.autoencoder.num_latent_frames_batch_size
        if self.step_frames != self.step_latents * self.temporal_stride:
            raise ValueError(
                f"temporal_compression_ratio is {self.temporal_stride}; allowed "
                f"{self.step_frames // self.step_latents}"
            )
        self.first_frames = self.step_frames + 1
        self.first_latents = self.step_latents + 1

    def encode(
        self, pixels: Float[Tensor, "batch 3 frames height width"]
    ) -> Float[Tensor, "batch latents tokens channels"]:
        """Turn a clip of 8n+1 frames, or a single frame, into standardised latents.

        Raises:
            ValueError: Frames of another size or number.
        """
        check_clip(pixels, self.frame_size)
        if pixels.shape[2] == 1:
            return _one_by_one(self.encode_step, pixels.to(self.dtype))
        return super().encode(pixels)

    def decode(
        self, values: Float[Tensor, "batch latents tokens channels"]
    ) -> Float[Tensor, "batch 3 frames height width"]:
        """Turn 2n+1 latent frames, or a single one, into a clip clamped to [-1, 1].

        Raises:
            ValueError: Latents of another shape or number.
        """
        self._check_values(values)
        if values.shape[1] == 1:
            return _one_by_one(self.decode_step, values.to(self.dtype))
        return super().decode(values)

    def _statistics(self) -> tuple[Sequence[float], Sequence[float]]:
        config = self.autoencoder.config
        shift, deviation = config.shift_factor or 0.0, 1 / config.scaling_factor
        return [shift] * config.latent_channels, [deviation] * config.latent_channels

    def moments_step(
        self, frames: Tensor, features: Features, is_first: bool
    ) -> tuple[Tensor, Features]:
        """Encode one group of frames.

        Args:
            frames: [batch 3 frames height width].
            features: Convolution inputs by dotted layer name.
            is_first: Whether a stream starts here.
        """
        out, kept = self.autoencoder.encoder(frames, conv_cache=_nest(features) or None)
        if self.autoencoder.quant_conv is not None:
            out = self.autoencoder.quant_conv(out)
        return out, _flatten(kept)

    def pixels_step(
        self, latents: Tensor, features: Features, is_first: bool
    ) -> tuple[Tensor, Features]:
        """Decode one group of latent frames.

        Args:
            latents: [batch channels latents rows columns].
            features: Convolution inputs by dotted layer name.
            is_first: Whether a stream starts here.
        """
        if self.autoencoder.post_quant_conv is not None:
            latents = self.autoencoder.post_quant_conv(latents)
        out, kept = self.autoencoder.decoder(latents, conv_cache=_nest(features) or None)
        return out, _flatten(kept)


def _in_steps(run: Step, inputs: Tensor, first: int, step: int) -> Tensor:
    """Run a whole clip, time on axis 2, batch at once and with gradients."""
    sizes = [first] + [step] * ((inputs.shape[2] - first) // step)
    outputs: list[Tensor] = []
    features: Features = {}
    for index, part in enumerate(inputs.split(sizes, dim=2)):
        output, features = run(part, features, index == 0)
        outputs.append(output)
    return torch.cat(outputs, dim=2)


def _one_by_one(run: Step, inputs: Tensor) -> Tensor:
    """Run a single step on every item alone, so that bits do not depend on the batch."""
    return torch.cat([run(item.contiguous(), {}, True)[0] for item in inputs.split(1)])


def _to_slots(features: Features, network: nn.Module) -> list[Any]:
    """Lay features out as the list diffusers' Wan layers read; the list is new, tensors are not."""
    count = sum(isinstance(module, WanCausalConv3d) for module in network.modules())
    slots: list[Any] = [None] * count
    for name, kept in features.items():
        slots[int(name)] = kept if kept.numel() else _PASSED_OVER
    return slots


def _from_slots(slots: list[Any], batch_size: int) -> Features:
    """Name the used slots; a slot that was passed over becomes a tensor without numbers."""
    like = next(kept for kept in slots if isinstance(kept, Tensor))
    return {
        str(index): like.new_empty(batch_size, 0) if isinstance(kept, str) else kept
        for index, kept in enumerate(slots)
        if kept is not None
    }


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Features:
    """Name the tensors of a nested cache by dotted paths.

    Kernels of one frame keep their whole input too, though nothing reads it; they are left out.
    """
    flat: Features = {}
    for name, kept in tree.items():
        if isinstance(kept, Mapping):
            flat |= _flatten(kept, f"{prefix}{name}.")
        elif kept is not None and name not in ("conv_y", "conv_b"):
            flat[prefix + name] = kept
    return flat


def _nest(features: Features) -> dict[str, Any]:
    """Undo `_flatten`."""
    tree: dict[str, Any] = {}
    for name, kept in features.items():
        *path, leaf = name.split(".")
        branch = tree
        for part in path:
            branch = branch.setdefault(part, {})
        branch[leaf] = kept
    return tree


def _plain(config: Mapping[str, Any] | None) -> dict[str, Any]:
    # diffusers keeps its own bookkeeping (class name, version, source) under leading underscores.
    return {name: value for name, value in (config or {}).items() if not name.startswith("_")}
