"""Structure maps of encoded clips: what every window's tokens are told of their frames' shape.

Computed from the pixel frames by a plain function (tokenizers/structure.py), once, beside the
latents. It knows neither models nor the loop.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ..core.recipe_sections import ConditionSpec
from ..tokenizers.structure import structure_map, structure_tokens
from .clip_stage import ClipWindows
from .clips import ClipDataset, tokenizer_input


class ClipStructure:
    """What the tokens of a window are told, in place of a tensor [windows, slots, numbers]."""

    def __init__(self, rows: Float[Tensor, "frames cells numbers"], windows: ClipWindows) -> None:
        """Join maps and windows.

        Args:
            rows: One per latent frame of all clips, from `clip_structure`.
            windows: Windows of the same frames.
        """
        # Windows that go on behind a clip's end look up one row past the last.
        self.rows = torch.cat((rows, torch.zeros_like(rows[:1]))).to(windows.start.device)
        self.windows = windows

    def __getitem__(self, indices: Tensor | slice) -> Float[Tensor, "batch slots numbers"]:
        """Gather the maps of windows, frame after frame."""
        return rearrange(self.rows[self.windows.rows(indices)], "b f n k -> b (f n) k")


@torch.no_grad()
def clip_structure(
    dataset: ClipDataset, condition: ConditionSpec, tokenizer: Any
) -> Float[Tensor, "frames cells numbers"]:
    """Compute what the tokens of all latent frames of all clips are told.

    Args:
        dataset: Clips of the tokenizer's frame size.
        condition: The recipe's, with `structure`.
        tokenizer: The `VideoTokenizer` of the latent frames.

    Returns:
        Rows in the order of `encode_clips`.
    """
    parts = []
    for index in range(len(dataset)):
        frames = torch.from_numpy(dataset.clip(index))
        if len(frames) < tokenizer.first_frames:
            continue
        maps = structure_map(condition.structure, tokenizer_input(frames[None]))
        parts.append(structure_tokens(maps, tokenizer, condition.structure_size)[0])
    return torch.cat(parts)
