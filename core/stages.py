"""Stages of a block: its tokens level by level, where a frame's tokens are levels of one another.

A residual tokenizer gives every frame several codes, each the correction of those before it. They
are filled in that order: level 0 of the whole block first, over as many rows as the recipe grants
it, then level 1, and so on; a level looks at the levels below it (MoMask, MAGNeT). Training shows
what decoding meets: below a drawn level everything is known, above it nothing is.

It does not know models, schedulers or losses. Invariant: the level of a slot is its place in its
frame.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .corruption import exact_mask
from .errors import check_count


@dataclass(frozen=True)
class Stage:
    """Tokens of a block that are filled together before the next stage begins.

    Attributes:
        tokens: bool [tokens of the block], True for those of this stage; None = all.
        steps: Rows granted; None = the schedule's.
    """

    tokens: Bool[Tensor, " tokens"] | None = None
    steps: int | None = None

    def among(self, slots: Bool[Tensor, "batch tokens"]) -> Bool[Tensor, "batch tokens"]:
        """Keep the slots of a block that are of this stage."""
        return slots if self.tokens is None else slots & self.tokens.to(slots.device)


def level_of(source: Int[Tensor, " tokens"], num_levels: int) -> Int[Tensor, " tokens"]:
    """Return the level of data slots: their place in their frame."""
    return source % num_levels


def stages_of(
    source: Int[Tensor, " tokens"], levels: Sequence[int], num_steps: int | None = None
) -> tuple[Stage, ...]:
    """Cut a block into its stages.

    Args:
        source: Data slots of the block.
        levels: Rows granted to every level; empty = no levels.
        num_steps: Rows of the lowest level instead, as a request asked for.
    """
    if not levels:
        return (Stage(steps=num_steps),)
    level = level_of(source, len(levels))
    granted = [levels[0] if num_steps is None else num_steps, *levels[1:]]
    return tuple(Stage(level == j, steps) for j, steps in enumerate(granted))


def residual_level(u: Float[Tensor, "*shape"], num_levels: int) -> Int[Tensor, "*shape"]:
    """Map uniform numbers to residual levels 1 .. num_levels - 1, low ones more often.

    j = round((1 - cos(pi/2 u)) * (Q - 2)) + 1.

    Args:
        u: In [0, 1].
        num_levels: Q, level 0 counted; at least 2.

    Source: MoMask (arXiv:2312.00063), the released training of its residual transformer.

    Example:
        >>> residual_level(torch.tensor([0.0, 0.25, 0.5, 0.75, 0.999]), 6).tolist()
        [1, 1, 2, 3, 5]
    """
    check_count("num_levels", num_levels, 2)
    return torch.round((1 - torch.cos(math.pi / 2 * u)) * (num_levels - 2)).long() + 1


def draw_levels(
    shape: Sequence[int], num_levels: int, generator: torch.Generator
) -> Int[Tensor, "*shape"]:
    """Draw the level that is learned: the lowest half of the time, else a residual one.

    Args:
        shape: [batch], or [batch, blocks].
        num_levels: Levels of a frame; 1 gives zeros.
        generator: Source of randomness.

    Source: MoMask (arXiv:2312.00063); differs: one model learns all levels, so the lowest, which
        has most to say, gets half of the draws.
    """
    size = tuple(shape)
    coin, u = torch.rand((2, *size), generator=generator, device=generator.device)
    if num_levels == 1:
        return torch.zeros(size, dtype=torch.long)
    return torch.where(coin < 0.5, 0, residual_level(u, num_levels))


def level_mask(
    ratio: Float[Tensor, "batch blocks"],
    drawn: Int[Tensor, "batch blocks"],
    block: Int[Tensor, " tokens"],
    source: Int[Tensor, " tokens"],
    levels: Sequence[int],
    generator: torch.Generator,
) -> tuple[Bool[Tensor, "batch tokens"], Bool[Tensor, "batch tokens"]]:
    """Hide a share of the drawn level of every block, and everything above it.

    Args:
        ratio: Share hidden of the drawn level where it has several rows; a level with one row,
            which is decoded from nothing of its own, is hidden whole.
        drawn: Level learned in every block; one column stands for all blocks.
        block: Block of every token.
        source: Data slot of every token.
        levels: Rows granted to every level.
        generator: Source of randomness.

    Returns:
        Which tokens are hidden, and which are of the drawn level.
    """
    column = block.clamp(0, drawn.shape[1] - 1)
    own = level_of(source, len(levels))[None]
    wanted = drawn[:, column]
    is_drawn = own == wanted
    rows = torch.tensor(levels)[drawn]
    share = torch.where(rows == 1, 1.0, ratio.expand(drawn.shape))
    chosen = exact_mask(share, column, generator, is_drawn)
    return (own > wanted) | chosen, is_drawn
