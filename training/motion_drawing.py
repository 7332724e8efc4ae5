"""Motions that a model draws from texts, each of its own length, as feature frames.

Invariant: what is drawn for a text depends on the text, its key, the seed and the number of frames,
not on which others are drawn beside it. It measures nothing.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from tqdm import tqdm

from ..core.recipe import frames_per_block
from ..core.sampling import item_generator
from ..models.generator import GenerativeModel
from ..models.video import VideoRequest, goes_on, video_values

Motions = list[NDArray[np.float32]]
BATCH = 16
"""Motions drawn side by side; changes none of them."""


def latent_frames(model: GenerativeModel, tokenizer: Any, frames: int) -> int:
    """Count the latent frames of a motion: enough for its frames, a whole number of blocks.

    Args:
        model: Draws the latent frames.
        tokenizer: Decodes them.
        frames: Feature frames wanted, from 1.
    """
    beyond = max(0, frames - tokenizer.first_frames)
    count = 1 + -(-beyond // tokenizer.step_frames)
    block = frames_per_block(model.recipe.layout.block) or 1
    return -(-count // block) * block


def most_frames(model: GenerativeModel, tokenizer: Any) -> int | None:
    """Return the longest motion that a model was made for, in feature frames; None = any length."""
    if goes_on(model):
        return None
    return int(tokenizer.num_frames(model.recipe.layout.frames))


@torch.no_grad()
def drawn_motions(
    model: GenerativeModel, tokenizer: Any, texts: Sequence[str], lengths: Sequence[int], *,
    seed: int = 0, steps: int | None = None, batch_size: int = BATCH, progress: bool = False,
) -> Motions:  # fmt: skip
    """Draw one motion per text.

    Args:
        model: A motion model in eval mode.
        tokenizer: Its tokenizer; decodes to features [batch, features, frames].
        texts: One per motion.
        lengths: Feature frames of each motion.
        seed: Seed of all noise; motion k is item k of it.
        steps: Rows per block; None = the recipe's.
        batch_size: Motions at once; only those of as many latent frames are drawn together.
        progress: Show a bar on stderr.

    Returns:
        float32 [frames, features] each, in the order of the texts.
    """
    groups: dict[int, list[int]] = {}
    for number, frames in enumerate(lengths):
        groups.setdefault(latent_frames(model, tokenizer, frames), []).append(number)
    drawn: dict[int, NDArray[np.float32]] = {}
    with tqdm(total=len(texts), desc="motions", disable=not progress) as bar:
        for count, numbers in sorted(groups.items()):
            for first in range(0, len(numbers), batch_size):
                some = numbers[first : first + batch_size]
                request = VideoRequest(
                    [texts[i] for i in some], [item_generator(seed, i) for i in some], count,
                    num_steps=steps,
                )  # fmt: skip
                for i, features in zip(some, _decoded(model, tokenizer, request), strict=True):
                    drawn[i] = features[: lengths[i]]
                bar.update(len(some))
    return [drawn[i] for i in range(len(texts))]


def _decoded(model: GenerativeModel, tokenizer: Any, request: VideoRequest) -> NDArray[np.float32]:
    """Run a request to its end and decode it, float32 [items, frames, features]."""
    features = tokenizer.decode(video_values(model, request))
    return rearrange(features, "b c t -> b t c").float().cpu().numpy()


@torch.no_grad()
def recoded_motions(tokenizer: Any, motions: Sequence[NDArray[np.float32]]) -> Motions:
    """Encode and decode motions: no model of these tokens can be nearer.

    Args:
        tokenizer: Takes features [batch, features, frames].
        motions: [frames, features] each; the last frame is held to fill the last latent frame.

    Returns:
        float32 [frames, features] each, as long as it was.
    """
    device = next(iter(tokenizer.state_dict().values())).device
    found = []
    for motion in motions:
        beyond = max(0, len(motion) - tokenizer.first_frames)
        count = tokenizer.first_frames + -(-beyond // tokenizer.step_frames) * tokenizer.step_frames
        held = np.pad(motion, ((0, count - len(motion)), (0, 0)), mode="edge")
        values = tokenizer.encode(torch.from_numpy(held.T[None].copy()).to(device))
        decoded = tokenizer.decode(values)[0].T.float().cpu().numpy()
        found.append(np.ascontiguousarray(decoded[: len(motion)]))
    return found
