"""Builders of layouts: flat tokens, grids, frames, prompts, and clean + noisy copies.

Every builder is a pure function from sizes to a `Layout`. None of them knows what the tokens mean.
Rearranged spans, delay patterns, interleaving, packing and draft trees live in layout_streams.py
and are offered here too.

Invariant: rows stand in generation order, so `block` and `order` never fall along the rows of one
copy.
"""

import re

import torch
from einops import rearrange

from .layout import Copy, Layout, Role
from .layout_streams import (
    DelayPattern,
    draft_tree,
    interleave,
    pack,
    rearrange_spans,
    rows_of_sources,
)

__all__ = [
    "DelayPattern",
    "acting_frames",
    "draft_tree",
    "flat",
    "frames",
    "grid",
    "interleave",
    "lookahead_blocks",
    "pack",
    "prefix",
    "rearrange_spans",
    "rows_of_sources",
    "two_copy",
]


def flat(num_tokens: int, *, block_size: int = 1) -> Layout:
    """Lay out tokens on one axis, cut into blocks of equal size.

    Args:
        num_tokens: Number of tokens, at least 1.
        block_size: Tokens per block; the last block may be short.

    Returns:
        Rows in order; `block = row // block_size`.

    Raises:
        ValueError: A size below 1.
    """
    _require_positive(num_tokens=num_tokens, block_size=block_size)
    return Layout.make(num_tokens, block=torch.arange(num_tokens) // block_size)


def grid(height: int, width: int, *, block: str | int) -> Layout:
    """Lay out a picture's tokens in generation order.

    Args:
        height: Rows of the token grid.
        width: Columns of the token grid.
        block: `"token"`, `"row"`, `"all"`, `"tile:HxW"` (tiles in raster order, tokens in raster
            order inside a tile), or a number of consecutive raster tokens (the last may be short).

    Returns:
        Rows in generation order: `order` is the rank, `position` is (row, column) and `source` the
        raster index `row * width + column`.

    Raises:
        ValueError: A size below 1, an unknown block word, or tiles that do not divide the grid.
    """
    _require_positive(height=height, width=width)
    num_tokens = height * width
    source = torch.arange(num_tokens)
    if isinstance(block, int):
        _require_positive(block=block)
        block_of = source // block
    elif block.startswith("tile:"):
        tile_height, tile_width = _tile_size(block, height, width)
        source = rearrange(
            source,
            "(th h tw w) -> (th tw h w)",
            h=tile_height,
            w=tile_width,
            tw=width // tile_width,
        )
        block_of = torch.arange(num_tokens) // (tile_height * tile_width)
    else:
        words = {"token": source, "row": source // width, "all": torch.zeros_like(source)}
        if block not in words:
            raise ValueError(
                f"grid block must be one of {sorted(words)}, 'tile:HxW' or a whole number, "
                f"got {block!r}; try 'row'"
            )
        block_of = words[block]
    position = torch.stack([source // width, source % width], -1)
    return Layout.make(num_tokens, block=block_of, source=source, position=position)


def frames(num_frames: int, height: int, width: int, frames_per_block: int = 1) -> Layout:
    """Lay out latent frames, each a raster of patches.

    Args:
        num_frames: Number of latent frames.
        height: Patch rows of a frame.
        width: Patch columns of a frame.
        frames_per_block: Latent frames generated together; the last block may be short.

    Returns:
        Rows frame by frame; `position` is (frame, row, column), `group` is the spatial site.

    Raises:
        ValueError: A size below 1.
    """
    _require_positive(
        num_frames=num_frames, height=height, width=width, frames_per_block=frames_per_block
    )
    rank = torch.arange(num_frames * height * width)
    frame, site = rank // (height * width), rank % (height * width)
    return Layout.make(
        len(rank),
        block=frame // frames_per_block,
        group=site,
        position=torch.stack([frame, site // width, site % width], -1),
    )


def acting_frames(num_frames: int, height: int, width: int) -> Layout:
    """Lay out frames, each followed by one row that holds what is done in it.

    Args:
        num_frames: Number of latent frames.
        height: Patch rows of a frame.
        width: Patch columns of a frame.

    Returns:
        Two blocks per step, the frame and its ACTION row, which stands in the middle of the frame's
        positions; `source` counts rows, so a step has `height * width + 1` slots.

    Raises:
        ValueError: A size below 1.

    Source: the physical token of PAR (arXiv:2508.09822), a frame and an action.
    """
    seen = frames(num_frames, height, width)
    step = torch.arange(num_frames)
    middle = torch.tensor([(height - 1) / 2, (width - 1) / 2]).expand(num_frames, 2)
    done = Layout.make(
        num_frames,
        block=step,
        role=int(Role.ACTION),
        position=torch.cat((step[:, None].float(), middle), -1),
    )
    woven = interleave([seen, done])
    return woven.replace(source=woven.order)


def prefix(
    layout: Layout, num_prompt: int, *, role: Role | int = Role.PROMPT | Role.COND
) -> Layout:
    """Put prompt rows in front of a layout.

    Args:
        layout: Rows to generate.
        num_prompt: Number of prompt rows; 0 returns the layout unchanged.
        role: Role bits of the prompt rows.

    Returns:
        Prompt rows (block -1, copy CLEAN, order -num_prompt..-1, source -1, level 0, `position`
        equal to `order` on every axis) followed by the rows of `layout`.
    """
    if num_prompt == 0:
        return layout
    order = torch.arange(-num_prompt, 0, device=layout.device)
    prompt = Layout.make(
        num_prompt,
        device=layout.device,
        block=-1,
        copy=Copy.CLEAN,
        order=order,
        role=int(role),
        source=-1,
        position=order[:, None].expand(num_prompt, layout.num_axes),
    )
    return Layout.cat([prompt, layout])


def two_copy(layout: Layout) -> Layout:
    """Append a noisy copy of every row that is generated.

    Args:
        layout: One-dimensional clean layout, with or without prompt rows (`block < 0`).

    Returns:
        The clean rows, then one NOISY row (level 1) per row with `block >= 0`, with the same
        block, order, position and source.

    Raises:
        ValueError: The layout is batched; build one sequence and expand it.

    Source: BD3-LM (arXiv:2503.09573); the clean copy stands first as in ACDiT.
    """
    if layout.is_batched:
        raise ValueError("two_copy takes a layout [tokens], got [batch, tokens]; expand afterwards")
    clean = layout.replace(copy=int(Copy.CLEAN), level=0.0)
    noisy = layout.take(torch.nonzero(layout.block >= 0)[:, 0])
    return Layout.cat([clean, noisy.replace(copy=int(Copy.NOISY), level=1.0)])


def lookahead_blocks(num_frames: int, *, block_size: int, extra: int = 0) -> Layout:
    """Lay out streaming encoder frames whose first blocks are merged into one.

    Args:
        num_frames: Number of frames.
        block_size: Frames that arrive together (g).
        extra: Blocks that the first block waits for in addition (E).

    Returns:
        Rows with `block = max(row // block_size, extra)`.

    Source: CarelessWhisper (arXiv:2508.12301).
    """
    _require_positive(num_frames=num_frames, block_size=block_size)
    block = (torch.arange(num_frames) // block_size).clamp(min=extra)
    return Layout.make(num_frames, block=block)


def _tile_size(block: str, height: int, width: int) -> tuple[int, int]:
    match = re.fullmatch(r"tile:(\d+)x(\d+)", block)
    if match is None:
        raise ValueError(f"grid block tile must read 'tile:HxW', got {block!r}; try 'tile:2x2'")
    tile = int(match[1]), int(match[2])
    legal = _nearest_divisor(height, tile[0]), _nearest_divisor(width, tile[1])
    if tile != legal:
        raise ValueError(
            f"grid block {block!r} does not divide the grid {height}x{width}; "
            f"nearest legal value 'tile:{legal[0]}x{legal[1]}'"
        )
    return tile


def _nearest_divisor(size: int, want: int) -> int:
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    return min(divisors, key=lambda number: abs(number - want))


def _require_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}; nearest legal value 1")
