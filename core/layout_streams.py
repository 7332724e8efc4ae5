"""Builders that join, reorder or stagger streams of tokens.

Rearranged spans (infilling by a causal model), codebook delay patterns, interleaved streams, packed
documents and draft trees. Re-exported by core/layouts.py; knows no modality.

Invariants: `DelayPattern.invert(DelayPattern.apply(codes))` gives the codes back bit for bit, and
`rows_of_sources` finds every data slot of a rearranged layout.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from .layout import Copy, Layout, Role

SENTINEL, END, HOLE = -2, -3, -4
"""`source` of rows that carry no data: span placeholder, end of piece, delay hole."""


def rearrange_spans(
    layout: Layout,
    spans: list[tuple[int, int]],
    *,
    end_kept: bool = True,
    delay: int = 0,
) -> Layout:
    """Move spans to the end so that a causal model sees what follows them.

    Kept rows stay in place with one sentinel row per span; then come, in span order, the same
    sentinel, the span and an end row. TEXT rows stand first and are not touched.

    Args:
        layout: One-dimensional layout; spans count its rows without the TEXT rows.
        spans: Sorted disjoint (start, stop) pairs, each with at least one row.
        end_kept: Whether an end row closes the kept rows (VoiceCraft; CM3 has none).
        delay: Extra rows per piece of a stream whose codebooks are staggered by 1..delay steps;
            codebook 0 of the piece then starts one row late.

    Returns:
        Rows with `order` and `block` = rank, one `position` axis = rank within text or media,
        `group` = piece (0..spans kept, then one per span; sentinels carry their span), `source`
        as before or `SENTINEL`, `END`, `HOLE`.

    Raises:
        ValueError: Batched layout, or spans that are empty, unsorted, overlapping or outside.

    Source: CM3 (arXiv:2201.07520) section 2; VoiceCraft (arXiv:2403.16973) section 3.1.
    """
    if layout.is_batched:
        raise ValueError("rearrange_spans takes a layout [tokens], got [batch, tokens]")
    is_text = (layout.role & int(Role.TEXT)) != 0
    text, media = (
        layout.take(torch.nonzero(is_text)[:, 0]),
        layout.take(torch.nonzero(~is_text)[:, 0]),
    )
    _check_spans(spans, media.num_tokens)
    slots = media.source.tolist()
    edges = [0, *(edge for span in spans for edge in span), len(slots)]
    source: list[int] = []
    group: list[int] = []

    def put(values: list[int], piece: int, closing: bool, staggered: int) -> None:
        rows = [*values, *([END] if closing else [])]
        if staggered:
            rows = [HOLE, *rows, *([HOLE] * (staggered - 1))]
        source.extend(rows)
        group.extend([piece] * len(rows))

    for piece in range(len(spans) + 1):
        is_last = piece == len(spans)
        put(slots[edges[2 * piece] : edges[2 * piece + 1]], piece, end_kept and is_last, delay)
        if not is_last:
            put([SENTINEL], piece, False, 0)
    for number, (start, stop) in enumerate(spans):
        put([SENTINEL], number, False, 0)
        put(slots[start:stop], len(spans) + 1 + number, True, delay)
    rank = torch.arange(len(source))
    moved = Layout.make(len(source), order=rank + text.num_tokens, source=source, group=group)
    moved = moved.replace(block=moved.order, position=rank, document=_only_document(layout))
    text_rank = torch.arange(text.num_tokens)
    text = text.replace(order=text_rank, block=text_rank, position=text_rank)
    return Layout.cat([text, moved.to(layout.device)])


def rows_of_sources(layout: Layout, copy: Copy = Copy.CLEAN) -> Int[Tensor, " slots"]:
    """Find the row that carries each data slot; the inverse of a rearrangement.

    Args:
        layout: One-dimensional layout.
        copy: Which copy to look in.

    Returns:
        Row numbers sorted by `source`; rows without data (source < 0) are left out.

    Raises:
        ValueError: A slot is carried by two rows of that copy, or by none.
    """
    rows = torch.nonzero((layout.copy == int(copy)) & (layout.source >= 0))[:, 0]
    sources = layout.source[rows]
    order = torch.argsort(sources)
    if not torch.equal(sources[order], torch.arange(len(rows), device=rows.device)):
        raise ValueError(f"copy {copy.name} must carry each data slot once, got {sources.tolist()}")
    return rows[order]


@dataclass(frozen=True)
class DelayPattern:
    """Staggered codebooks: frame t of codebook c stands at step `t + delays[c] + 1`.

    Step 0 is empty, so the model always has a first input. All-zero delays are the parallel
    pattern.

    Attributes:
        num_codebooks: Number of codebooks.
        delays: Delay of each codebook in steps; None = 0, 1, 2, ...

    Source: MusicGen (arXiv:2306.05284), codebook interleaving patterns.
    """

    num_codebooks: int
    delays: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        delays = tuple(range(self.num_codebooks) if self.delays is None else self.delays)
        object.__setattr__(self, "delays", delays)
        if len(delays) != self.num_codebooks or min(delays, default=-1) < 0:
            raise ValueError(
                f"delays must be {self.num_codebooks} numbers of at least 0, got {delays}"
            )

    @property
    def max_delay(self) -> int:
        """Delay of the latest codebook, in steps."""
        return max(self.delays or (0,))

    def num_steps(self, num_frames: int) -> int:
        """Number of steps, step 0 included."""
        return num_frames + self.max_delay + 1

    def frames_at(self, num_frames: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return the frame each codebook carries at each step.

        Args:
            num_frames: Number of frames.
            device: Where the result lives.

        Returns:
            `[codebooks, steps]` frame numbers, -1 where the cell is special.
        """
        step = torch.arange(self.num_steps(num_frames), device=device)
        delay = torch.tensor(self.delays, device=device)
        frame = step[None, :] - delay[:, None] - 1
        return torch.where((frame >= 0) & (frame < num_frames), frame, -1)

    def apply(
        self, codes: Int[Tensor, "*batch codebooks frames"], special: int
    ) -> Int[Tensor, "*batch codebooks steps"]:
        """Stagger codes; cells outside the pattern get the special code.

        Args:
            codes: Codes of any integer value.
            special: Code of empty cells, usually the codebook size.

        Returns:
            Staggered codes with `frames + max(delays) + 1` steps.

        Raises:
            ValueError: Wrong number of codebooks.
        """
        self._check(codes)
        frame = self.frames_at(codes.shape[-1], device=codes.device)
        picked = codes.gather(-1, frame.clamp(min=0).expand(*codes.shape[:-1], -1))
        return picked.masked_fill(frame < 0, special)

    def invert(
        self, steps: Int[Tensor, "*batch codebooks steps"]
    ) -> Int[Tensor, "*batch codebooks frames"]:
        """Undo `apply` exactly.

        Args:
            steps: Staggered codes.

        Returns:
            Codes with `steps - max(delays) - 1` frames.

        Raises:
            ValueError: Wrong number of codebooks, or too few steps for one frame.
        """
        self._check(steps)
        num_frames = steps.shape[-1] - self.max_delay - 1
        if num_frames < 1:
            raise ValueError(
                f"steps must be at least {self.max_delay + 2} for delays {self.delays}, "
                f"got {steps.shape[-1]}"
            )
        delay = torch.tensor(self.delays, device=steps.device)
        index = torch.arange(num_frames, device=steps.device)[None, :] + delay[:, None] + 1
        return steps.gather(-1, index.expand(*steps.shape[:-1], -1))

    def _check(self, codes: Tensor) -> None:
        if codes.shape[-2] != self.num_codebooks:
            raise ValueError(
                f"delay pattern has {self.num_codebooks} codebooks, got {codes.shape[-2]}"
            )


def interleave(layouts: list[Layout], *, merge_blocks: bool = False) -> Layout:
    """Weave streams block by block: block 0 of each stream, then block 1 of each, and so on.

    Args:
        layouts: One-dimensional layouts with the same number of position axes. Rows with
            `block < 0` stay in front.
        merge_blocks: False: each stream's part of a round is a block of its own, so that later
            streams see earlier ones of the round. True: a round is one block.

    Returns:
        Rows in generation order with new `block` and `order`; `group` = stream number; position,
        source and roles as before.

    Raises:
        ValueError: A batched layout or differing numbers of axes.
    """
    if any(layout.is_batched for layout in layouts):
        raise ValueError("interleave takes layouts [tokens], got [batch, tokens]")
    joined = Layout.cat([layout.replace(group=i) for i, layout in enumerate(layouts)])
    key = joined.block if merge_blocks else joined.block * len(layouts) + joined.group
    key = torch.where(joined.block < 0, -1, key)
    order = torch.argsort(
        torch.where(joined.block < 0, -1, joined.block * len(layouts) + joined.group), stable=True
    )
    woven, key = joined.take(order), key[order]
    num_static = int((woven.block < 0).sum())
    block = torch.unique(key, return_inverse=True)[1] - (1 if num_static else 0)
    rank = torch.arange(woven.num_tokens, device=woven.device) - num_static
    return woven.replace(block=block, order=rank)


def pack(layouts: list[Layout], *, length: int | None = None) -> Layout:
    """Put several documents into one sequence; they cannot see each other.

    Args:
        layouts: One-dimensional layouts.
        length: Total rows after padding; None = no padding. Padding rows have document -1.

    Returns:
        The rows of all layouts with `document` 0, 1, ... and every other attribute unchanged.

    Raises:
        ValueError: `length` is smaller than the rows given.
    """
    packed = Layout.cat([layout.replace(document=i) for i, layout in enumerate(layouts)])
    if length is None or length == packed.num_tokens:
        return packed
    missing = length - packed.num_tokens
    if missing < 0:
        raise ValueError(
            f"pack length {length} is too small; nearest legal value {packed.num_tokens}"
        )
    position = torch.zeros(missing, packed.num_axes)
    padding = Layout.make(
        missing, document=-1, source=-1, block=0, order=0, position=position, device=packed.device
    )
    return Layout.cat([packed, padding])


def draft_tree(parents: list[int]) -> Layout:
    """Lay out the nodes of a draft tree with their depth-first intervals.

    Args:
        parents: Parent of each node, -1 for nodes that follow the committed text directly;
            parents stand before their children.

    Returns:
        DRAFT rows in the order given; node k is an ancestor of q (or q itself) exactly when
        `tree_in[k] <= tree_in[q] < tree_out[k]`. `position` and `order` are depths.

    Raises:
        ValueError: A parent that does not stand before its child.
    """
    count = len(parents)
    for node, parent in enumerate(parents):
        if not -1 <= parent < node:
            raise ValueError(f"parent of node {node} must lie in [-1, {node - 1}], got {parent}")
    size = [1] * count
    for node in range(count - 1, -1, -1):
        if parents[node] >= 0:
            size[parents[node]] += size[node]
    first, depth, cursor, next_root = [0] * count, [0] * count, [0] * count, 0
    for node, parent in enumerate(parents):
        if parent < 0:
            first[node], next_root = next_root, next_root + size[node]
        else:
            first[node] = cursor[parent]
            cursor[parent] += size[node]
            depth[node] = depth[parent] + 1
        cursor[node] = first[node] + 1
    tree_out = [start + width for start, width in zip(first, size, strict=True)]
    return Layout.make(
        count, copy=Copy.DRAFT, order=depth, tree_in=first, tree_out=tree_out, level=0.0
    )


def _only_document(layout: Layout) -> int:
    documents = torch.unique(layout.document).tolist()
    if len(documents) != 1:
        raise ValueError(f"rearrange_spans takes one document, got {documents}; pack afterwards")
    return documents[0]


def _check_spans(spans: list[tuple[int, int]], num_rows: int) -> None:
    edge = 0
    for start, stop in spans:
        if not edge <= start < stop <= num_rows:
            raise ValueError(
                f"spans must be sorted, disjoint and non-empty inside [0, {num_rows}], got {spans}"
            )
        edge = stop
