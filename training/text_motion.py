"""A small text-motion encoder of our own, trained on the data set it then judges.

A motion, as HumanML3D features, and a text become vectors of length one, near each other where they
belong together. It needs no download and no accelerator. What it knows is what its training clips
showed, so its verdicts mean something only beside those on real motion, and every result carries
its name, the hash of its weights and what it was trained on. It knows no generator.

Source: the evaluator of HumanML3D (Guo et al., CVPR 2022, section 4): convolutions over features
without contacts, a bidirectional GRU, a text encoder, trained contrastively. Differs: hashed words
instead of GloVe and part-of-speech tags; unit vectors and cross-entropy (CLIP, arXiv:2103.00020)
instead of a margin; clips of one text are all right answers (arXiv:2004.11362); far smaller.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from tqdm import tqdm

from ..core.errors import DataError, ModelError, check_count
from ..models.text import HashTextEncoder
from .balance import balanced_order
from .clips import ClipDataset
from .motion_augment import FEATURES, GROUPS, augmented, spoiled
from .optim import learning_rate_at
from .order import batch_indices, seed_for
from .text_video import TEMPERATURE, contrastive
from .tokenizer_stage import save_half

SEEN = GROUPS[-1].stop
"""Features that are looked at, from the first on: all but the contacts."""
MOST_FRAMES = 196
"""Frames of a motion that are looked at; published sets cut there."""
TRAIN_STEPS = 250
NOTHING = "nothing"
"""Text of what no body does: frozen, shuffled and trembling motions."""
SPOIL_EVERY = 2
"""Every second clip of a batch is shown once more, spoiled."""
LEAST_SPREAD = 1e-3
"""Smallest deviation a group of features is divided by; float16 holds it."""


class TextMotionEncoder(ModelMixin, ConfigMixin):
    """Motions and texts in one space.

    Args:
        width: Channels of the convolutions, and of the GRU in each direction.
        dim: Length of a vector.
        buckets: Rows of the text encoder's table.
        words: Most words of a text.
        trained_on: What it was trained on, in words; part of its name.
        data: Fingerprint of the training clips, see `fingerprint`.
        texts: Different texts among them.
    """

    mean: Tensor
    std: Tensor

    @register_to_config
    def __init__(
        self, width: int = 96, dim: int = 48, buckets: int = 1024, words: int = 16,
        trained_on: str = "nothing", data: str = "", texts: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_buffer("mean", torch.zeros(SEEN))
        self.register_buffer("std", torch.ones(SEEN))
        self.first = nn.Conv1d(SEEN, width, 4, stride=2, padding=1)
        self.second = nn.Conv1d(width, width, 4, stride=2, padding=1)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * width, dim)
        self.text = HashTextEncoder(dim=dim, num_buckets=buckets, max_words=words)

    @property
    def name(self) -> str:
        """Name for results: what it is, the hash of its weights, what it was trained on."""
        trained = self.config.trained_on
        return f"blockloom text-motion evaluator, {self.weights_hash()}, trained on {trained}"

    def weights_hash(self) -> str:
        """Hash all weights as they are stored, in float16; 12 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().half().numpy().tobytes())
        return digest.hexdigest()[:12]

    def see(
        self, features: Float[Tensor, "clips frames features"], lengths: Int[Tensor, " clips"]
    ) -> Float[Tensor, "clips dim"]:
        """Turn motions into unit vectors; what stands behind a motion's length is not looked at.

        Args:
            features: Raw HumanML3D features, 263 of them, contacts last.
            lengths: Frames of each motion, from 1.
        """
        x = (features[..., :SEEN] - self.mean) / self.std
        left = lengths.to(x.device)
        x = x * _is_inside(left, x.shape[1])[..., None]
        for layer, norm in zip((self.first, self.second), self.norms, strict=True):
            x = F.pad(x, (0, 0, 0, x.shape[1] % 2))  # zeros behind the end, whatever the batch
            x = F.silu(norm(rearrange(layer(rearrange(x, "b t c -> b c t")), "b c t -> b t c")))
            left = (left + 1) // 2
            x = x * _is_inside(left, x.shape[1])[..., None]
        packed = pack_padded_sequence(x, left.cpu(), batch_first=True, enforce_sorted=False)
        x, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        # A mean over time, not the last state: length alone should say little.
        return F.normalize(self.head(x.sum(1) / left[:, None]), dim=-1)

    def read(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Turn texts into unit vectors."""
        ids = self.text.tokenize(texts).to(self.head.weight.device)
        return F.normalize(self.text(ids).pooled, dim=-1)

    @torch.no_grad()
    def embed(
        self, motions: Sequence[NDArray[np.float32]], batch_size: int = 64
    ) -> NDArray[np.float64]:
        """Turn motions of any lengths into unit vectors.

        Args:
            motions: Feature frames [frames, 263] each; the first `MOST_FRAMES` are looked at.
            batch_size: Motions at once.

        Returns:
            float64 [motions, dim].

        Raises:
            DataError: No motion, another number of features, or features that are not finite.
        """
        check_features(motions)
        parts = []
        for first in range(0, len(motions), batch_size):
            some = [torch.from_numpy(m[:MOST_FRAMES]) for m in motions[first : first + batch_size]]
            parts.append(self.see(*padded(some)).double().cpu())
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Turn texts into unit vectors, float64 [texts, dim]."""
        return self.read(texts).double().cpu().numpy()


def _is_inside(lengths: Int[Tensor, " clips"], frames: int) -> Bool[Tensor, "clips frames"]:
    return torch.arange(frames, device=lengths.device) < lengths[:, None]


def check_features(motions: Sequence[NDArray[np.float32]]) -> None:
    """Require motions of finite HumanML3D features.

    Raises:
        DataError: No motion, another number of features, or features that are not finite.
    """
    if not motions:
        raise DataError("no motion to measure; pass at least one")
    for number, motion in enumerate(motions):
        if motion.ndim != 2 or motion.shape[1] != FEATURES or not len(motion):
            raise DataError(
                f"motion {number} has shape {list(motion.shape)}; needed [frames, {FEATURES}]"
            )
        if not np.isfinite(motion).all():
            raise DataError(f"motion {number} holds numbers that are not finite")


def padded(
    motions: Sequence[Float[Tensor, "frames features"]],
) -> tuple[Float[Tensor, "clips frames features"], Int[Tensor, " clips"]]:
    """Lay motions of different lengths in one tensor, zeros behind each, and return the lengths."""
    lengths = torch.tensor([len(motion) for motion in motions])
    return nn.utils.rnn.pad_sequence(list(motions), batch_first=True), lengths


def fingerprint(clips: ClipDataset) -> str:
    """Hash the texts, the lengths and, coarsely, the features of clips; 12 hexadecimal digits.

    Coarsely, because features come from sines and roots whose last bits differ between machines.
    """
    size = np.abs(clips.frames).mean(axis=0, dtype=np.float64)
    rough = [f"{size[group].mean():.2f}" for group in GROUPS]
    parts = [*clips.captions, *map(str, clips.lengths.tolist()), *rough]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


@torch.enable_grad()
def train_text_motion(
    clips: ClipDataset, steps: int = TRAIN_STEPS, batch_size: int = 48, seed: int = 0, *,
    source: str = "the given clips", progress: bool = False, **settings: Any,
) -> TextMotionEncoder:  # fmt: skip
    """Train an encoder on motions with texts; rare texts come more often.

    The cross-entropy is that of motions to all texts of the set, and of the batch both ways.

    Args:
        clips: Training clips of HumanML3D features, of at least two different texts.
        steps: Optimiser steps.
        batch_size: Clips per step.
        seed: Seed of the weights, the order and the augmentation.
        source: Name of the data set, for the encoder's name.
        progress: Show a bar on stderr.
        settings: Sizes of `TextMotionEncoder`.

    Returns:
        The encoder in eval mode, its weights rounded to float16: stored and loaded, it is the same.

    Raises:
        DataError: Clips of something else, or of fewer than two different texts.
    """
    check_count("steps", steps)
    motions = [clips.clip(i) for i in range(len(clips))]
    check_features(motions)
    texts = sorted(set(clips.captions))
    if len(texts) < 2:
        raise DataError("a text-motion encoder needs clips of at least 2 different texts")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed_for(seed, "text motion"))
        encoder = TextMotionEncoder(
            **settings, data=fingerprint(clips), texts=len(texts),
            trained_on=f"{len(clips)} clips of {len(texts)} texts from {source}",
        )  # fmt: skip
    encoder.mean, encoder.std = fitted(motions)
    order = balanced_order(clips.captions, "caption")
    assert order is not None
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.05)
    encoder.train()
    for step in tqdm(range(steps), desc="evaluator", disable=not progress):
        generator = torch.Generator().manual_seed(seed_for(seed, "motion", step))
        chosen = order[batch_indices(seed, step, batch_size, len(order))].tolist()
        pieces, told = augmented(
            [torch.from_numpy(motions[i]) for i in chosen], [clips.captions[i] for i in chosen],
            encoder.std, generator,
        )  # fmt: skip
        for piece in pieces[::SPOIL_EVERY]:
            pieces.append(spoiled(piece, encoder.std, generator, clips.fps))
            told.append(NOTHING)
        loss = _loss(encoder, pieces, told, texts)
        rate = learning_rate_at(step, peak=2e-3, num_steps=steps, warmup_steps=min(30, steps // 4))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.half().float().eval()


def _loss(
    encoder: TextMotionEncoder, pieces: Sequence[Tensor], told: Sequence[str], texts: Sequence[str]
) -> Tensor:
    """Mean of two cross-entropies: to all texts, and within the batch both ways."""
    everything = sorted({*texts, *told})  # mirrored clips bring texts of their own
    words = encoder.read(everything)
    seen = encoder.see(*padded(pieces))
    right = torch.tensor([everything.index(text) for text in told])
    named = F.cross_entropy(seen @ words.T / TEMPERATURE, right)
    return (named + contrastive(seen, words[right], told)) / 2


def fitted(
    motions: Sequence[NDArray[np.float32]],
) -> tuple[Float[Tensor, " features"], Float[Tensor, " features"]]:
    """Measure the mean of each feature and the deviation of its group.

    One deviation for a group (all positions, all velocities, ...) keeps joints that hardly move
    from being blown up, as HumanML3D does.

    Args:
        motions: Feature frames [frames, 263] each.
    """
    frames = np.concatenate(motions).astype(np.float64)[:, :SEEN]
    spread = frames.std(0)
    for group in GROUPS:
        spread[group] = max(spread[group].mean(), LEAST_SPREAD)
    return torch.from_numpy(frames.mean(0)).float(), torch.from_numpy(spread).float()


def save_text_motion(encoder: TextMotionEncoder, folder: Path) -> None:
    """Store an encoder as float16 safetensors with its configuration.

    Args:
        encoder: From `train_text_motion`.
        folder: Created when missing.
    """
    save_half(encoder, folder)


def load_text_motion(folder: Path) -> TextMotionEncoder:
    """Load an encoder in eval mode.

    Raises:
        ModelError: The folder holds none, or one that cannot be read.
    """
    try:
        encoder = TextMotionEncoder.from_pretrained(folder, use_safetensors=True)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"cannot load the text-motion evaluator {folder.name}: {str(error).splitlines()[0]}"
        ) from error
    return encoder.float().eval()
