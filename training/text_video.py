"""A small text-video encoder of our own, trained on the data set it then judges.

A caption has parts, which its commas separate. For every part a clip and a text become vectors of
length one, near each other where they belong together. It needs no download and no accelerator.
What it knows is what its training clips showed, so its verdicts mean something only beside those on
real clips. It knows no generator.

Source: symmetric contrastive training of CLIP (arXiv:2103.00020), section 2.3. Differs: one vector
per part of a caption, so that an unseen combination of seen parts is no stranger; equal parts in a
batch are all right answers; frames enter together, with their differences.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.errors import DataError, check_count
from ..models.text import HashTextEncoder
from .clips import ClipDataset
from .optim import learning_rate_at
from .order import batch_indices, seed_for

MOMENTS, STRIDE, SIDE = 8, 2, 32
"""Frames that are looked at, frames from one to the next, and the side they are shrunk to."""
SPAN = (MOMENTS - 1) * STRIDE + 1
DIM = 96
TEMPERATURE = 0.1
NAME = "own-text-video-contrastive"


class TextVideoEncoder(nn.Module):
    """Captions and clips of `MOMENTS` frames in one space."""

    def __init__(
        self, num_parts: int, width: int = 48, dim: int = DIM, buckets: int = 1024, words: int = 12
    ):
        """Build fresh networks.

        Args:
            num_parts: Parts of a caption.
            width: Channels of the first convolution.
            dim: Length of a vector.
            buckets: Rows of the text encoder's table.
            words: Most words of a part.
        """
        super().__init__()
        self.num_parts = num_parts
        widths = [3 * (2 * MOMENTS - 1), width, 2 * width, 3 * width]
        self.layers = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in pairwise(widths)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(4, b) for b in widths[1:])
        self.head = nn.Linear(widths[-1] * (SIDE // 8) ** 2, num_parts * dim)
        self.text = HashTextEncoder(dim=dim, num_buckets=buckets, max_words=words, num_layers=0)

    def see(
        self, pixels: Float[Tensor, "clips moments 3 side side"]
    ) -> Float[Tensor, "clips parts dim"]:
        """Turn frames in [-1, 1] into unit vectors, one per part."""
        moves = pixels.diff(dim=1) * 2
        x = rearrange(torch.cat((pixels, moves), 1), "b t c h w -> b (t c) h w")
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.silu(norm(layer(x)))
        parts = rearrange(self.head(x.flatten(1)), "b (p d) -> b p d", p=self.num_parts)
        return F.normalize(parts, dim=-1)

    def read(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]:
        """Turn texts, each a part of a caption, into unit vectors."""
        ids = self.text.tokenize(texts).to(self.head.weight.device)
        return F.normalize(self.text(ids).pooled, dim=-1)

    def read_captions(self, captions: Sequence[str]) -> Float[Tensor, "captions parts dim"]:
        """Turn captions into unit vectors, one per part."""
        texts = [part for caption in captions for part in parts_of(caption, self.num_parts)]
        return rearrange(self.read(texts), "(c p) d -> c p d", p=self.num_parts)


def parts_of(caption: str, num_parts: int) -> list[str]:
    """Split "a fox, walk, dark background" at its commas; later commas stay in the last part."""
    parts = [part.strip() for part in caption.split(",", num_parts - 1)]
    return parts + [""] * (num_parts - len(parts))


def fewest_parts(captions: Sequence[str]) -> int:
    """Count the parts that every caption has."""
    return min(caption.count(",") for caption in captions) + 1


def moments(
    frames: UInt8[Tensor, "frames height width 3"], start: int = 0
) -> UInt8[Tensor, "moments height width 3"]:
    """Pick the frames that are looked at, every second one; a short clip's last one is held."""
    index = start + STRIDE * torch.arange(MOMENTS)
    return frames[index.clamp_max(len(frames) - 1)]


def shrunk(
    frames: UInt8[Tensor, "clips moments height width 3"],
) -> Float[Tensor, "clips moments 3 side side"]:
    """Average frames down to the encoder's side, in [-1, 1]."""
    flat = rearrange(frames, "b t h w c -> (b t) c h w").float() / 127.5 - 1
    small = F.interpolate(flat, size=(SIDE, SIDE), mode="area")
    return rearrange(small, "(b t) c h w -> b t c h w", t=frames.shape[1])


@torch.enable_grad()
def train_text_video(
    clips: ClipDataset, steps: int = 400, batch_size: int = 64, seed: int = 0
) -> TextVideoEncoder:
    """Train an encoder on clips with captions.

    Args:
        clips: Training clips, of at least two different captions.
        steps: Optimiser steps; about 0.1 s each on one core.
        batch_size: Clips per step.
        seed: Seed of the weights, the order and the pieces that are shown.

    Returns:
        The encoder in eval mode.

    Raises:
        DataError: Fewer than two different captions.
    """
    check_count("steps", steps)
    if len(set(clips.captions)) < 2:
        raise DataError("a text-video encoder needs clips of at least 2 different captions")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed_for(seed, "text video"))
        encoder = TextVideoEncoder(fewest_parts(clips.captions))
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=0.05)
    batch_size = min(batch_size, len(clips))
    encoder.train()
    for step in range(steps):
        generator = torch.Generator().manual_seed(seed_for(seed, "piece", step))
        chosen = batch_indices(seed, step, batch_size, len(clips)).tolist()
        pixels = augmented(
            shrunk(torch.stack([_piece(clips, i, generator) for i in chosen])), generator
        )
        captions = [clips.captions[i] for i in chosen]
        told, vectors = encoder.read_captions(captions), encoder.see(pixels)
        parts = zip(*(parts_of(c, encoder.num_parts) for c in captions), strict=True)
        losses = [contrastive(vectors[:, p], told[:, p], part) for p, part in enumerate(parts)]
        loss = torch.stack(losses).mean()
        rate = learning_rate_at(step, peak=2e-3, num_steps=steps, warmup_steps=min(30, steps // 4))
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval()


def _piece(clips: ClipDataset, index: int, generator: torch.Generator) -> Tensor:
    """Cut a piece out of a clip at a random place."""
    frames = torch.from_numpy(clips.clip(index))
    places = max(1, len(frames) - SPAN + 1)
    return moments(frames, int(torch.randint(places, (), generator=generator)))


def augmented(
    pixels: Float[Tensor, "clips moments 3 side side"], generator: torch.Generator
) -> Float[Tensor, "clips moments 3 side side"]:
    """Shift, blur and noise pieces: what is judged later is drawn, not filmed.

    Args:
        pixels: Pieces in [-1, 1].
        generator: Source of randomness; one shift, one share of blur and one noise per piece.
    """
    count = len(pixels)
    shift = torch.randint(-2, 3, (count, 2), generator=generator).tolist()
    moved = torch.stack(
        [torch.roll(clip, offset, (-2, -1)) for clip, offset in zip(pixels, shift, strict=True)]
    )
    flat = rearrange(moved, "b t c h w -> (b t) c h w")
    blurred = F.avg_pool2d(F.pad(flat, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share, noise = torch.rand((2, count, 1, 1, 1, 1), generator=generator)
    mixed = moved + share * (blurred.reshape_as(moved) - moved)
    return mixed + 0.1 * noise * torch.randn(mixed.shape, generator=generator)


def contrastive(
    seen: Float[Tensor, "clips dim"], told: Float[Tensor, "clips dim"], texts: Sequence[str]
) -> Float[Tensor, ""]:
    """Cross-entropy of clips to texts and back; equal texts share the right answer.

    Args:
        seen: Vectors of clips.
        told: Vectors of their texts.
        texts: The texts.
    """
    _, kind = np.unique(np.asarray(texts), return_inverse=True)
    kinds = torch.from_numpy(kind)
    right = (kinds[:, None] == kinds).float()
    right = right / right.sum(1, keepdim=True)
    scores = seen @ told.T / TEMPERATURE
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
