"""Motion autoencoders with learned codes: one codebook, or residual levels.

Entries follow the mean of the latents they attract; an entry that attracts too few is replaced by
a latent of the batch. It does not know how codes are generated.
"""

from abc import abstractmethod
from collections.abc import Sequence

import torch
from diffusers.configuration_utils import register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from vector_quantize_pytorch import ResidualVQ, VectorQuantize

from .motion_base import HUMAN_GROUPS
from .motion_vae import MotionAutoencoder

ABSENT = -1
"""Code of a residual level that is left out."""
_FIRST_COUNT = 2.0  # latents of a batch that an entry attracts on average


class MotionCodeTokenizer(MotionAutoencoder):
    """Motion autoencoder whose latent frames are rows of codes; quantisers subclass it."""

    value = "code"
    num_codebooks = 1
    latent_channels = 0
    flattening = 0.0  # distances of latents are those of the features

    @torch.no_grad()
    def prepare(self, clips: Sequence[Float[Tensor, "1 features _"]], seed: int = 0) -> None:
        """Measure the features, set the linear paths, and cluster the latents for first entries.

        Args:
            clips: Training clips.
            seed: Of the clusters.

        Raises:
            ValueError: No clip, or none as long as a step.
        """
        super().prepare(clips, seed)
        parts = [self._steps(clip.to(self.feature_mean)) for clip in clips]
        frames = rearrange(torch.cat(parts), "f (c s) -> f c s", s=self.step_frames)
        latents = rearrange(self.encoder.linear(frames), "f k 1 -> 1 f k")
        self.cluster(latents.float(), torch.Generator().manual_seed(seed))

    @abstractmethod
    def cluster(
        self, latents: Float[Tensor, "1 latents channels"], generator: torch.Generator
    ) -> None:
        """Set the entries to means of clusters of latents.

        Args:
            latents: float32.
            generator: CPU generator of the latents that clusters start from.
        """

    @abstractmethod
    def quantize(
        self,
        latents: Float[Tensor, "batch latents channels"],
        is_known: Bool[Tensor, "batch latents"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise float32 latents; in training mode also move the entries.

        Args:
            latents: float32.
            is_known: Latents that count in training; None = all.
            generator: CPU generator of what is drawn in training.

        Returns:
            Quantised latents with a gradient, int codes [batch latents levels], and an extra
            scalar loss.
        """

    @abstractmethod
    def lookup(self, codes: Int[Tensor, "batch latents levels"]) -> Tensor:
        """Turn codes into latents [batch latents channels]."""

    def bottleneck(
        self,
        encoded: Float[Tensor, "batch channels latents"],
        is_known: Bool[Tensor, "batch latents"],
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor, dict[str, float]]:
        """Quantise; in training mode also move the entries.

        Args:
            encoded: Latents, float32.
            is_known: Latents that count.
            generator: CPU generator of the number of levels kept.
        """
        latents = rearrange(encoded, "b c f -> b f c")
        # Autocast would round distances to bfloat16, so it is off here.
        with torch.autocast(latents.device.type, enabled=False):
            quantized, codes, extra = self.quantize(latents, is_known, generator)
        if not bool(is_known.any()):
            extra = torch.zeros_like(extra)  # the library takes the mean of nothing
        used = codes[..., 0][is_known].unique().numel() / self.codebook_size
        metrics = {"quantizer": float(extra.detach()), "codes_used": used}
        return rearrange(quantized, "b f c -> b c f"), extra, metrics

    def values_of(self, encoded: Tensor) -> Int[Tensor, "batch latents levels 1"]:
        """Quantise encoder output [batch channels latents] without moving the entries."""
        if encoded.is_meta:  # shapes alone; quantisers look at values
            shape = (len(encoded), encoded.shape[2], self.num_tokens, 1)
            return encoded.new_empty(shape, dtype=torch.int64)
        was_training = self.training
        self.eval()
        latents = rearrange(encoded, "b c f -> b f c").float()
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            codes = self.quantize(latents)[1]
        self.train(was_training)
        return codes.long()[..., None]

    def latents_of(self, values: Tensor) -> Float[Tensor, "batch channels latents"]:
        """Look codes [batch latents levels 1] up.

        Raises:
            ValueError: A code outside the codebook.
        """
        codes = values[..., 0]
        if codes.is_meta:
            shape = (len(codes), self.code_dim, codes.shape[1])
            return codes.new_empty(shape, dtype=self.dtype)
        self._check_codes(codes)
        return rearrange(self.lookup(codes), "b f c -> b c f").to(self.feature_mean.dtype)

    @property
    def code_dim(self) -> int:
        """Channels of a codebook entry."""
        return int(self.config["code_dim"])

    def _check_codes(self, codes: Int[Tensor, "batch latents levels"]) -> None:
        if not codes.numel():
            return
        lowest = codes.new_full((codes.shape[2],), ABSENT)
        lowest[0] = 0
        if (codes < lowest).any() or int(codes.max()) >= self.codebook_size:
            absent = f"; {ABSENT} leaves a level after the first out" if len(lowest) > 1 else ""
            raise ValueError(
                f"codes span {int(codes.min())}..{int(codes.max())}; legal values are "
                f"0..{self.codebook_size - 1}{absent}"
            )


class MotionVQTokenizer(MotionCodeTokenizer):
    """One code per latent frame.

    Source: Neural Discrete Representation Learning (arXiv:1711.00937), appendix A.1, with the
    resets of T2M-GPT (arXiv:2301.06052), section 3.1.
    """

    grid = (1, 1)

    @register_to_config
    def __init__(
        self,
        features: int = 263,
        groups: Sequence[int] | None = HUMAN_GROUPS,
        group_loss: Sequence[float] | None = None,
        temporal_stride: int = 4,
        width: int = 160,
        dilations: Sequence[int] = (9, 3, 1),
        codebook_size: int = 512,
        code_dim: int = 64,
        decay: float = 0.99,
        reset_below: float = 1.0,
        commitment_weight: float = 0.02,
        rotation_trick: bool = False,
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
            codebook_size: Entries of the codebook.
            code_dim: Channels of an entry.
            decay: Of the moving averages, in (0, 1).
            reset_below: Entries whose average count falls below this are replaced.
            commitment_weight: Loss weight that draws latents to their entries.
            rotation_trick: Turn gradients with the latent (arXiv:2410.06424) instead of copying
                them.
            velocity_weight: Loss weight of the error of frame-to-frame change.
            summed: First features that readers add up over time, as turn and way of the root.
            drift_weight: Loss weight of the error of their running sums.
            dropout: Share of the residual layers' inner channels dropped in training.

        Raises:
            ValueError: A setting out of its range.
        """
        super().__init__()
        self.codebook_size = codebook_size
        self._build(
            features, groups, group_loss, temporal_stride, width, dilations, code_dim, dropout
        )
        self.quantizer = VectorQuantize(
            dim=code_dim,
            codebook_size=codebook_size,
            decay=decay,
            threshold_ema_dead_code=reset_below,
            commitment_weight=commitment_weight,
            rotation_trick=rotation_trick,
        )

    def quantize(
        self,
        latents: Float[Tensor, "batch latents channels"],
        is_known: Bool[Tensor, "batch latents"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Replace latents by their nearest entries; nothing is drawn."""
        quantized, codes, extra = self.quantizer(latents, mask=is_known)
        return quantized, codes[..., None], extra.sum()

    def cluster(
        self, latents: Float[Tensor, "1 latents channels"], generator: torch.Generator
    ) -> None:
        """Set the entries to means of clusters of latents."""
        cluster_entries(self.quantizer, latents, generator)

    def lookup(self, codes: Int[Tensor, "batch latents 1"]) -> Tensor:
        """Turn codes into codebook entries."""
        return self.quantizer.get_output_from_indices(codes[..., 0])


class MotionRVQTokenizer(MotionCodeTokenizer):
    """Several codes per latent frame, each for what those before it left over.

    The tokens of a latent frame are its levels, coarse to fine. Levels after the first may be left
    out: code -1 adds nothing, so that the first levels alone give a preview.

    Source: SoundStream (arXiv:2107.03312), algorithm 1 and section III-C (quantiser dropout), as
    used by MoMask (arXiv:2312.00063), section 3.1; rotation trick: arXiv:2410.06424, section 4.
    """

    @register_to_config
    def __init__(
        self,
        features: int = 263,
        groups: Sequence[int] | None = HUMAN_GROUPS,
        group_loss: Sequence[float] | None = None,
        temporal_stride: int = 4,
        width: int = 160,
        dilations: Sequence[int] = (9, 3, 1),
        levels: int = 6,
        codebook_size: int = 256,
        code_dim: int = 64,
        level_dropout: float = 0.2,
        decay: float = 0.99,
        reset_below: float = 1.0,
        commitment_weight: float = 0.02,
        rotation_trick: bool = False,
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
            levels: Codes per latent frame, at least 2.
            codebook_size: Entries of each level's codebook.
            code_dim: Channels of an entry.
            level_dropout: Share of the batches trained with a random number of first levels.
            decay: Of the moving averages, in (0, 1).
            reset_below: Entries whose average count falls below this are replaced.
            commitment_weight: Loss weight that draws latents to their entries.
            rotation_trick: Turn gradients with the latent instead of copying them.
            velocity_weight: Loss weight of the error of frame-to-frame change.
            summed: First features that readers add up over time, as turn and way of the root.
            drift_weight: Loss weight of the error of their running sums.
            dropout: Share of the residual layers' inner channels dropped in training.

        Raises:
            ValueError: A setting out of its range.
        """
        super().__init__()
        if levels < 2:
            raise ValueError(f"levels is {levels}; it must be at least 2; for 1 take motion_vq")
        if not 0 <= level_dropout <= 1:
            raise ValueError(f"level_dropout is {level_dropout}; it must be in [0, 1]")
        self.codebook_size = codebook_size
        self.grid = (1, levels)
        self._build(
            features, groups, group_loss, temporal_stride, width, dilations, code_dim, dropout
        )
        self.quantizer = ResidualVQ(
            dim=code_dim,
            num_quantizers=levels,
            codebook_size=codebook_size,
            quantize_dropout=True,
            decay=decay,
            threshold_ema_dead_code=reset_below,
            commitment_weight=commitment_weight,
            rotation_trick=rotation_trick,
        )

    def quantize(
        self,
        latents: Float[Tensor, "batch latents channels"],
        is_known: Bool[Tensor, "batch latents"] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Replace latents by sums of entries; drawn are how many levels a batch keeps."""
        seed = 0
        if self.training:
            share, draw = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
            self.quantizer.quantize_dropout = share < self.config["level_dropout"]
            seed = int(draw * 2**31)
        quantized, codes, extra = self.quantizer(
            latents, mask=is_known, rand_quantize_dropout_fixed_seed=seed
        )
        return quantized, codes, extra.sum()

    def cluster(
        self, latents: Float[Tensor, "1 latents channels"], generator: torch.Generator
    ) -> None:
        """Set the entries of every level to means of clusters of what those before left over."""
        for layer in self.quantizer.layers:
            latents = latents - cluster_entries(layer, latents, generator)

    def lookup(self, codes: Int[Tensor, "batch latents levels"]) -> Tensor:
        """Add the entries of all levels; an absent one adds nothing."""
        return self.quantizer.get_output_from_indices(codes)


def cluster_entries(
    quantizer: VectorQuantize,
    latents: Float[Tensor, "1 latents channels"],
    generator: torch.Generator,
    rounds: int = 15,
) -> Float[Tensor, "1 latents channels"]:
    """Set the entries of a codebook to means of clusters, by Lloyd's algorithm.

    Args:
        quantizer: Its entries, their average counts and sums are set.
        latents: float32; where they are fewer than entries, some entries stay equal to a latent.
        generator: CPU generator of the latents that clusters start from.
        rounds: Rounds of assignment and means.

    Returns:
        The entry of every latent.
    """
    rows, book = latents[0], quantizer._codebook
    order = torch.randperm(len(rows), generator=generator).repeat(
        -(-book.codebook_size // len(rows))
    )
    entries = rows[order[: book.codebook_size]].clone()
    for _ in range(rounds):
        nearest = torch.cdist(rows, entries).argmin(dim=1)
        counts = torch.bincount(nearest, minlength=len(entries)).to(rows)
        sums = torch.zeros_like(entries).index_add_(0, nearest, rows)
        means = sums / counts.clamp_min(1)[:, None]
        entries = torch.where(counts[:, None] > 0, means, entries)
    nearest = torch.cdist(rows, entries).argmin(dim=1)
    book.embed.copy_(entries[None])
    # As if every entry had its share of a batch so far; training goes on from there.
    book.cluster_size.fill_(_FIRST_COUNT)
    book.embed_avg.copy_(entries[None] * _FIRST_COUNT)
    return entries[nearest][None]
