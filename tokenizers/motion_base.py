"""What motion tokenizers share: feature frames in and out, standardised inside.

A *feature frame* is a row of numbers: a pose, or what a robot senses. A clip of them is
Float[batch features frames]; everything else is as for videos (video_base.py), and streams run on
the same loop (video_steps.py).

Features are standardised with a mean per feature and one deviation per group of features, so that
inside a group an error counts the same whichever feature has it (among joint positions a
millimetre is a millimetre). In training, frames behind the end of a short clip are not a number:
nothing is learned from them. It does not know what the features mean.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from .continuous import mean_and_variance
from .video_steps import SteppedTokenizer

HUMAN_GROUPS = (1, 2, 1, 63, 126, 66, 4)
"""Group sizes of the 263 numbers of a human pose: turn, ground velocity, height, joint positions,
rotations, joint velocities, contacts."""


class FeatureTokenizer(SteppedTokenizer):
    """A video tokenizer whose frames are rows of numbers.

    Attributes:
        features: Numbers of a frame.
        groups: Sizes of the groups of features that share a deviation.
        feature_mean: Mean of every feature, float [features, 1].
        feature_std: Deviation of every feature's group, float [features, 1].
    """

    frame_size = (1, 1)  # a frame has features and no sides
    features: int
    groups: list[int]
    feature_mean: Tensor
    feature_std: Tensor

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of a frame: its numbers."""
        return (self.features,)

    def check_input(self, frames: Tensor) -> None:
        """Refuse clips of another rank or number of features.

        Raises:
            ValueError: Not [batch, features, frames] of this number of features.
        """
        if frames.ndim != 3 or frames.shape[1] != self.features:
            raise ValueError(
                f"clip has shape {list(frames.shape)}; this tokenizer takes "
                f"[batch, {self.features}, frames]"
            )

    def num_frames(self, num_latents: int) -> int:
        """Return the feature frames that so many latent frames decode to."""
        return num_latents * self.step_frames

    @torch.no_grad()
    def measure_features(self, batches: Iterable[Float[Tensor, "_ features _"]]) -> None:
        """Set mean and deviations to those of these clips, in float64; done before training.

        Args:
            batches: Clips; at least one.

        Raises:
            ValueError: No clips, or clips of another number of features.
        """

        def known_rows(clips: Tensor) -> Tensor:
            self.check_input(clips)
            rows = rearrange(clips.cpu(), "b n f -> (b f) n")
            return rows[rows.isfinite().all(dim=1)]

        mean, variance = mean_and_variance(map(known_rows, batches), "measure_features", "clips")
        shared = [part.mean().expand(len(part)) for part in variance.split(self.groups)]
        # A group that never moves would be blown up by its own rounding error.
        deviation = torch.cat(shared).sqrt().clamp_min(1e-4)
        self.feature_mean.copy_(mean[:, None])
        self.feature_std.copy_(deviation[:, None])

    def prepare(self, clips: Sequence[Float[Tensor, "1 features _"]], seed: int = 0) -> None:
        """Set what is measured rather than learned; done once, before training.

        Args:
            clips: Training clips.
            seed: Of what is drawn meanwhile; here nothing.

        Raises:
            ValueError: As `measure_features`.
        """
        self.measure_features(clips)

    def standardise(
        self, frames: Float[Tensor, "batch features frames"]
    ) -> Float[Tensor, "batch features frames"]:
        """Give features mean 0 and their groups deviation 1."""
        return (frames - self.feature_mean) / self.feature_std

    def restore(
        self, frames: Float[Tensor, "batch features frames"]
    ) -> Float[Tensor, "batch features frames"]:
        """Undo `standardise`."""
        return frames * self.feature_std + self.feature_mean

    def _set_features(self, features: int, groups: Sequence[int] | None) -> None:
        if features < 1:
            raise ValueError(f"features is {features}; it must be at least 1")
        if groups and (min(groups) < 1 or sum(groups) != features):
            raise ValueError(
                f"groups {list(groups)} hold {sum(groups)} features; they must be whole numbers "
                f"from 1 on that hold {features}; for one group per feature leave them out"
            )
        self.features = features
        self.groups = list(groups or [1] * features)
        module = cast(nn.Module, self)  # every tokenizer is one
        module.register_buffer("feature_mean", torch.zeros(features, 1))
        module.register_buffer("feature_std", torch.ones(features, 1))


def group_weights(groups: Sequence[int], weights: Sequence[float] | None) -> Tensor:
    """Spread loss weights of groups over their features, with mean 1 over the features.

    Args:
        groups: Features of each group.
        weights: One per group, at least 0; None = every feature counts the same.

    Returns:
        float32 [features, 1].

    Raises:
        ValueError: Another number of weights, or weights that are below 0 or all 0.
    """
    given = [1.0] * len(groups) if weights is None else list(weights)
    if len(given) != len(groups):
        raise ValueError(f"weights has {len(given)} numbers for {len(groups)} groups of features")
    if min(given) < 0 or not max(given) > 0:
        raise ValueError(f"weights are {given}; they must be at least 0, and one above 0")
    spread = torch.cat([torch.full((n,), float(w)) for n, w in zip(groups, given, strict=True)])
    return (spread / spread.mean())[:, None]


def motion_errors(
    frames: Float[Tensor, "batch features frames"],
    target: Float[Tensor, "batch features frames"],
    weights: Float[Tensor, "features 1"],
    is_known: Bool[Tensor, "batch frames"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Average the weighted smooth absolute error of frames, and of the change between frames.

    Args:
        frames: Reconstruction, standardised.
        target: Original, standardised.
        weights: Of every feature.
        is_known: Frames that count; the others come last in their clip.

    Returns:
        Both errors; the second is 0 where no two frames count.
    """
    error = F.smooth_l1_loss(frames, target, reduction="none")
    pace = F.smooth_l1_loss(frames.diff(dim=2), target.diff(dim=2), reduction="none")
    return known_mean(weights * error, is_known), known_mean(weights * pace, is_known[:, 1:])


def drift_error(
    frames: Float[Tensor, "batch features frames"],
    target: Float[Tensor, "batch features frames"],
    summed: int,
    is_known: Bool[Tensor, "batch frames"],
) -> Float[Tensor, ""]:
    """Average the smooth absolute error of the running sums of the first features.

    Args:
        frames: Reconstruction, standardised.
        target: Original, standardised.
        summed: Number of features, from the first on; with 0 the error is 0.
        is_known: Frames that count; the others come last in their clip.
    """
    if not summed:
        return frames.new_zeros(())
    sums = (frames[:, :summed] - target[:, :summed]).cumsum(dim=2)
    return known_mean(F.smooth_l1_loss(sums, torch.zeros_like(sums), reduction="none"), is_known)


def known_mean(
    errors: Float[Tensor, "batch channels frames"], is_known: Bool[Tensor, "batch frames"]
) -> Float[Tensor, ""]:
    """Average over channels and the frames that count; 0 where none does."""
    counted = errors.mean(dim=1) * is_known
    return counted.sum() / is_known.sum().clamp_min(1)
