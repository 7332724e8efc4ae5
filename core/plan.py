"""From a recipe and a grid size to layouts: what trains together, and what is decoded when.

One `DecodePlan` serves training (the layout with its clean and noisy copies), decoding (the rows of
each block) and `inspect`. It does not know models, values or schedules.

Invariants: `content` lists every data slot once, in generation order; block numbers in it count
0, 1, 2, ... without gaps; prompt rows have block -1 and see only prompt rows.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .attention import Lowered
from .cache import CacheView
from .corruption import segment_sizes
from .far import Far, coarse_rows
from .grouping import PerLayer, lower_layers
from .layout import Copy, Layout, Role
from .layouts import acting_frames, grid, prefix, two_copy
from .layouts import frames as lay_out_frames
from .masks import MaskTable
from .orders import halton_order
from .poses import routes_of
from .recipe import Recipe, frames_per_block
from .rules import rule
from .stages import Stage, stages_of

NUM_SENTINELS = 3
"""Slots a moved span adds: its mark in place, its mark at the end, and the end-of-span mark."""


@dataclass
class DecodePlan:
    """Layouts of one recipe at one size.

    `content` carries clean labels (copy, level) for two-copy and shifted recipes and noisy ones
    for single-copy bidirectional recipes; `write` is the recipe's commit policy. `groups` are
    the groupings that layers take in turn. `matrix` and `delay` say which blocks are in flight
    together, at most `flight` of them; `offset` is where the first full set of them starts in
    training (recipes whose blocks in flight see each other). `order` "any" = rows stand in an
    order of their own; `relabels` = the copy of a row says whether its token is known. `levels`
    grants rows to every token of a frame in turn; empty = all tokens of a block are filled
    together. Finished blocks are kept noised to `context_noise` and told `context_level`. `far`
    are the coarse rows that stand beside the clean ones.
    """

    table: MaskTable
    content: Layout
    prompt: Layout | None
    height: int
    width: int
    copies: int
    shift: int
    write: str
    window: int | None = None
    sink: int = 0
    groups: tuple[str, ...] = ("site",)
    matrix: str = "autoregressive"
    delay: int = 1
    flight: int = 1
    offset: int = 0
    context_noise: float = 0.0
    context_level: float = 0.0
    far: Far | None = None
    levels: tuple[int, ...] = ()
    order: str = "raster"
    relabels: bool = False
    rows_of_block: list[Tensor] = field(init=False)
    _memo: dict = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        block = self.content.block
        count = int(block.max()) + 1
        self.rows_of_block = [(block == b).nonzero()[:, 0] for b in range(count)]

    @property
    def num_blocks(self) -> int:
        """Blocks of data tokens."""
        return len(self.rows_of_block)

    @property
    def num_slots(self) -> int:
        """Data slots, sentinels included."""
        return self.content.num_tokens

    @property
    def num_prompt_rows(self) -> int:
        """Static rows in front."""
        return 0 if self.prompt is None else self.prompt.num_tokens

    def sources(self, block: int) -> Int[Tensor, " tokens"]:
        """Data slots of a block, in generation order."""
        return self.content.source[self.rows_of_block[block]]

    def stages(self, block: int, num_steps: int | None = None) -> tuple[Stage, ...]:
        """Cut a block into what is filled in turn; `num_steps` overrides the first one's rows."""
        return stages_of(self.sources(block), self.levels, num_steps)

    @property
    def commits_alone(self) -> bool:
        """True when finished blocks become permanent in a pass of their own."""
        return self.write in ("separate", "block")

    @property
    def keeps_only_copy(self) -> bool:
        """True when there is one copy and its finished rows, run again as context, are kept."""
        return self.copies == 1 and self.write in ("block", "fused")

    @property
    def keeps_blocks(self) -> bool:
        """True when a finished block is context for later ones by rows of its own."""
        return self.copies == 2 or bool(self.shift) or self.keeps_only_copy

    def clean_rows(self, block: int) -> Layout:
        """Rows that make a finished block permanent: the clean copy, or the only one as context."""
        copy = Copy.NOISY if self.keeps_only_copy else Copy.CLEAN
        rows = self._remember(("clean", block), copy, self.context_level)
        if self.far is None:
            return rows
        return self.joined([rows, self._remember(("coarse", block), copy, self.context_level)])

    def noisy_rows(self, block: int) -> Layout:
        """Rows that predict a block."""
        return self._remember(("noisy", block), Copy.NOISY, 1.0)

    def told_rows(self, block: int, is_known: Bool[Tensor, " tokens"]) -> Layout:
        """Rows of a block of a recipe that relabels: clean where known, noisy where masked."""
        key = ("told", block, tuple(is_known.tolist()))
        if key not in self._memo:
            self._memo[key] = relabelled(self.noisy_rows(block), is_known.cpu())
        return self._memo[key]

    def flying_rows(self, block: int, first: int) -> Layout:
        """Rows that predict a block while `first` is the oldest block in flight."""
        if self.groups != ("block",):
            return self.noisy_rows(block)
        key = ("flying", block, first)
        if key not in self._memo:
            self._memo[key] = self.noisy_rows(block).replace(group=first)
        return self._memo[key]

    def in_flight(self, first: int, newest: int) -> range:
        """Blocks whose rows run together.

        Args:
            first: The oldest unfinished block.
            newest: The newest block that moves.

        Returns:
            `first` up to `newest`; for rolling recipes always as many as train together, and where
            finished blocks are not kept all that came before, too.
        """
        if self.matrix == "rolling":
            newest = first + self.flight - 1
        return range(first if self.keeps_blocks else 0, min(newest + 1, self.num_blocks))

    def _remember(self, key: tuple, copy: Copy, level: float) -> Layout:
        if key not in self._memo:
            rows = self._rows_of(*key)
            self._memo[key] = rows.replace(copy=int(copy), level=level)
        return self._memo[key]

    def _rows_of(self, kind: str, block: int) -> Layout:
        """Select the rows of a block, coarse ones or those of its data slots."""
        if kind == "coarse" and self.far is not None:
            return self.far.of_block(block)
        return self.content.take(self.rows_of_block[block])

    def joined(self, parts: list[Layout]) -> Layout:
        """Join layouts, remembering the result so that its lowered mask can be remembered too."""
        if len(parts) == 1:
            return parts[0]
        key = ("join", *(id(part) for part in parts))
        if key not in self._memo:
            self._memo[key] = (Layout.cat(parts), parts)  # the parts keep their ids alive
        return self._memo[key][0]

    def routes(self, queries: Layout, poses: Tensor | None = None) -> dict[str, Tensor]:
        """Build the tables that relations of the mask read besides attributes; {} = none.

        Args:
            queries: Rows whose keys are selected.
            poses: Pose of every block [batch, blocks, 4, 4]; None = all alike.
        """
        return routes_of(self.table.route_names(), poses, queries.block, len(self.rows_of_block))

    def lower(
        self, queries: Layout, keys: Layout, backend: str = "auto", poses: Tensor | None = None
    ) -> Lowered | PerLayer:
        """Lower the table, for every grouping of the layers; see `routes` for `poses`."""
        routes = self.routes(queries, poses)
        return lower_layers(
            self.table, queries, keys, self.groups, self.height, self.width,
            backend="dense" if routes else backend, routes=routes,
        )  # fmt: skip

    def lowered(
        self, active: Layout, view: CacheView | None, poses: Tensor | None = None
    ) -> Lowered | PerLayer:
        """Lower the table for one decode pass.

        The past of a plan is a function of its length, so the result is remembered by it, unless
        the poses of a request have a say.
        """
        past = 0 if view is None else view.length
        if active.is_batched or poses is not None or (view is not None and view.is_batched):
            return self.lower(active, active if view is None else view.layout, poses=poses)
        key = ("lower", id(active), past)
        if key not in self._memo:
            keys = active if view is None else view.layout
            self._memo[key] = (self.lower(active, keys), active)
        return self._memo[key][0]

    def training_layout(self, offset: int | None = None) -> Layout:
        """Layout of one training forward: prompt rows, then clean, then coarse, then noisy rows.

        Shifted recipes leave out the last token, which predicts nothing.

        Args:
            offset: First block of a full flight; None = the plan's own.
        """
        content = self.content
        if self.shift:
            content = content.take(slice(0, content.num_tokens - 1))
        full = content if self.prompt is None else Layout.cat([self.prompt, content])
        once = full.num_tokens
        full = two_copy(full) if self.copies == 2 else full
        if self.far is not None:
            parts = [full.take(slice(0, once)), self.far.rows, full.take(slice(once, None))]
            full = Layout.cat(parts)
        if self.groups != ("block",):
            return full
        flight = _first_in_flight(
            full.block, self.offset if offset is None else offset, self.flight
        )
        return full.replace(group=torch.where(full.copy == Copy.NOISY, flight, full.block))

    def capacity(self) -> int:
        """Cache slots a whole rollout needs per row."""
        if self.window is None:
            return self.num_prompt_rows + self.num_slots
        widest = max(len(rows) for rows in self.rows_of_block)
        slots = self.num_prompt_rows + (self.window + self.sink + 1) * widest
        if self.far is None:
            return slots
        kept = len(self.rows_of_block) if self.far_window is None else self.far_window + 1
        return slots + kept * int(self.far.rows.block.bincount().max())

    @property
    def far_window(self) -> int | None:
        """Blocks whose coarse rows are kept, the query's own counted; None = all, or no rows."""
        if self.far is None or self.far.blocks is None or self.window is None:
            return None
        return self.window + self.far.blocks


def relabelled(rows: Layout, is_known: Bool[Tensor, " rows"]) -> Layout:
    """Let the copy of noisy rows say whether their token is known.

    Args:
        rows: Noisy rows.
        is_known: Which hold a token.
    """
    known = is_known.to(rows.device)
    copy = torch.where(known, int(Copy.CLEAN), rows.copy)
    return rows.replace(copy=copy, level=torch.where(known, 0.0, rows.level))


def _first_in_flight(block: Tensor, offset: int, flight: int) -> Tensor:
    """First block of the flight each block belongs to; blocks before `offset` fly together."""
    start = offset + (block - offset).div(flight, rounding_mode="floor") * flight
    return start.clamp_min(0)


def mask_table(recipe: Recipe) -> MaskTable:
    """Build the visibility table a recipe names, with its cache window where it has one."""
    if isinstance(recipe.mask, dict):
        return MaskTable.parse(recipe.mask)
    if recipe.cache.nearest is not None:
        return rule(recipe.mask, nearest=recipe.cache.nearest, sink=recipe.cache.sink > 0)
    if recipe.cache.window is not None:
        # Prompt rows are pinned: a window that lost the prompt would draw anything.
        sink = recipe.cache.sink > 0 or num_prompt_rows(recipe) > 0
        spec = recipe.cache.far
        far = {} if spec is None else {"far": spec.blocks or 0}
        return rule(recipe.mask, window=recipe.cache.window, sink=sink, **far)
    return rule(recipe.mask)


def grid_of(length: int) -> tuple[int, int]:
    """Split a token count into the most square grid: 12 -> (3, 4), 144 -> (12, 12).

    Raises:
        ValueError: `length` below 1.
    """
    if length < 1:
        raise ValueError(f"length = {length} tokens; legal >= 1; try 1")
    height = max(h for h in range(1, int(length**0.5) + 1) if length % h == 0)
    return height, length // height


def num_prompt_rows(recipe: Recipe) -> int:
    """Rows in front of the data: the words and the pooled prompt, or one start row, or none.

    A shifted recipe needs at least one row, because its first token is predicted by the row before.
    """
    if recipe.condition.prefix:
        return recipe.text.words + 1
    return 1 if recipe.layout.shift else 0


def build_plan(
    recipe: Recipe,
    height: int,
    width: int,
    *,
    generator: torch.Generator | None = None,
    span: tuple[int, int] | None = None,
    frames: int | None = None,
    first: Int[Tensor, " slots"] | None = None,
) -> DecodePlan:
    """Lay out a recipe on a token grid, or on a row of them for a video.

    Args:
        recipe: The recipe.
        height: Token rows.
        width: Token columns.
        generator: Draws the random order and the random split of recipes that train on them; None
            = raster order and the fixed partition of `layout.block`.
        span: Moves the slots start..stop-1 to the end (stream layouts: infilling).
        frames: Latent frames of a video; None = as many as the recipe trains on.
        first: Slots that come first where the order is free: those that are given.

    Returns:
        The plan.
    """
    layout = recipe.layout
    if recipe.acting is not None:
        content = acting_frames(frames or layout.frames, height, width)
    elif layout.kind == "frames":
        content = _clip(layout.block, frames or layout.frames, height, width)
    elif layout.kind == "stream":
        content = _stream(layout.text_tokens, height, width, span, bool(layout.spans))
    else:
        content = grid(height, width, block=layout.block)
    if layout.permute != "none" and (generator is not None or layout.permute == "any"):
        content = _permuted(content, generator, first)
    if generator is not None and layout.split == "random":
        content = _resplit(content, generator)
    if layout.groups == ("block",):
        content = content.replace(group=content.block)
    if layout.copies == 1 and not layout.shift:
        content = content.replace(copy=int(Copy.NOISY), level=1.0)
    if recipe.cache.sink:
        is_sink = content.block < recipe.cache.sink
        content = content.replace(role=content.role | is_sink.long() * int(Role.SINK))
    rows, spec = num_prompt_rows(recipe), recipe.cache.far
    far = None
    if spec is not None:
        far = Far(coarse_rows(content, height, width, spec.patch), spec.blocks)
    schedule, num_blocks = recipe.schedule, int(content.block.max()) + 1
    flight, offset = blocks_in_flight(recipe, num_blocks), 0
    if generator is not None and schedule.matrix == "rolling":
        offset = int(torch.randint(flight, (), generator=generator))
    return DecodePlan(
        table=mask_table(recipe),
        content=content,
        prompt=_prompt_rows(content, rows, recipe.cache.window is not None) if rows else None,
        height=height,
        width=width,
        copies=layout.copies,
        shift=layout.shift,
        write=recipe.cache.write,
        window=recipe.cache.window,
        sink=recipe.cache.sink,
        groups=layout.groups,
        matrix=schedule.matrix,
        delay=schedule.delay,
        flight=flight,
        offset=offset,
        context_noise=recipe.cache.context_noise,
        context_level=recipe.cache.context_level,
        far=far,
        levels=schedule.levels,
        order="any" if layout.permute == "any" else "raster",
        relabels=layout.relabel,
    )


def blocks_in_flight(recipe: Recipe, num_blocks: int) -> int:
    """Most blocks that are between noise and clean at the same time."""
    schedule = recipe.schedule
    most = {
        "autoregressive": 1,
        "pyramid": -(-schedule.steps // schedule.delay),
        "rolling": schedule.flight,
    }
    return min(most.get(schedule.matrix, num_blocks), num_blocks)


def _clip(block: int | str, frames: int, height: int, width: int) -> Layout:
    """Lay out the frames of a video in blocks of frames, of one token, or of everything."""
    together = frames if block == "all" else frames_per_block(block) or 1
    content = lay_out_frames(frames, height, width, together)
    return content.replace(block=content.order) if block == "token" else content


def _prompt_rows(content: Layout, rows: int, is_windowed: bool) -> Layout:
    """Lay out the static rows in front; windows never drop them."""
    role = Role.PROMPT | Role.COND | (Role.SINK if is_windowed else Role(0))
    return prefix(content.take(slice(0, 0)), rows, role=role)


def _permuted(content: Layout, generator: torch.Generator | None, first: Tensor | None) -> Layout:
    """Change which slot stands at which rank, blocks keep their sizes.

    Args:
        content: In raster order.
        generator: Draws the order; None = Halton's, from coarse to fine.
        first: Slots whose turn comes before all others, in raster order.
    """
    if generator is None:
        index = halton_order(content.num_tokens, 1)
    else:
        index = torch.randperm(content.num_tokens, generator=generator)
    if first is not None:
        rest = ~torch.isin(content.source[index], first)
        is_first = torch.isin(content.source, first).nonzero()[:, 0]
        index = torch.cat((is_first, index[rest]))
    shuffled = content.take(index)
    return shuffled.replace(order=content.order, block=content.block)


def _resplit(content: Layout, generator: torch.Generator) -> Layout:
    """Cut the sequence into a random number of blocks of random size (CausalFusion)."""
    sizes = torch.tensor(segment_sizes(content.num_tokens, generator))
    return content.replace(block=torch.repeat_interleave(torch.arange(len(sizes)), sizes))


def _stream(
    text_tokens: int, height: int, width: int, span: tuple[int, int] | None, sentinels: bool
) -> Layout:
    """One stream of text and picture tokens; with `span`, those slots move to the end (CM3).

    Slots: 0..text_tokens-1 text, then the picture in raster order, then the sentinels
    [mark in place, mark at the end, end of span].
    """
    picture = grid(height, width, block="token")
    rank = torch.arange(-text_tokens, 0)
    text = Layout.make(text_tokens, role=int(Role.TEXT), position=torch.stack((rank, rank), -1))
    picture = picture.replace(source=picture.source + text_tokens)
    content = Layout.cat([text, picture])
    total = content.num_tokens
    if span is not None and sentinels:
        start, stop = span
        marks = content.take(torch.tensor([start, start, min(stop, total - 1)]))
        marks = marks.replace(source=torch.arange(total, total + NUM_SENTINELS), role=0)
        pieces = [
            content.take(slice(0, start)),
            marks.take(slice(0, 1)),
            content.take(slice(stop, total)),
            marks.take(slice(1, 2)),
            content.take(slice(start, stop)),
            marks.take(slice(2, 3)),
        ]
        content = Layout.cat(pieces)
    rank = torch.arange(content.num_tokens)
    return content.replace(order=rank, block=rank)
