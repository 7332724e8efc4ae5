"""What the rows of a training forward hold and which of them predict, before anything is corrupted.

The objective (objective.py) corrupts them and takes the loss.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.layout import Copy, Layout, Role
from ..core.plan import NUM_SENTINELS
from ..core.recipe import Recipe
from ..models.generate import caption_codes
from ..models.generator import TEXT_CODES


def stream_values(
    codes: Int[Tensor, "items cells 1"],
    captions: Sequence[str],
    text_tokens: int,
    codebook_size: int,
) -> Int[Tensor, "items slots 1"]:
    """Join captions, picture codes and the three span marks into one stream of ids."""
    text = caption_codes(captions, text_tokens, codebook_size)
    first = codebook_size + TEXT_CODES
    marks = torch.arange(first, first + NUM_SENTINELS).expand(len(captions), -1)
    return torch.cat((text, codes[..., 0].cpu(), marks), 1)[..., None]


def predicted_part(layout: Layout, share: float, generator: torch.Generator) -> Layout:
    """Leave out the noisy copy of some blocks, which then are context only.

    No other block sees a block's noisy rows, so the rows that stay compute what they did.

    Args:
        layout: Two copies, one-dimensional.
        share: Share of blocks that keep their noisy copy, in [0, 1]; at least one does above 0.
            Blocks of ACTION rows always keep theirs and are not counted.
        generator: Draws which.
    """
    acts = (layout.role & int(Role.ACTION)) != 0
    blocks = layout.block[(layout.copy == Copy.NOISY) & ~acts].unique()
    order = torch.randperm(len(blocks), generator=generator)
    chosen = blocks[order[: min(len(blocks), math.ceil(share * len(blocks) - 1e-6))]]
    stays = (layout.copy != Copy.NOISY) | acts | torch.isin(layout.block, chosen)
    return layout.take(stays.nonzero()[:, 0])


def action_values(recipe: Recipe, values: Tensor) -> Tensor:
    """Cut out of slots as wide as a frame's token what an action is: one id, or its numbers."""
    acting = recipe.acting
    assert acting is not None
    return values[..., :1].long() if acting.codes else values[..., : acting.numbers]
