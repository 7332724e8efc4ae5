"""The one decode loop.

It walks the blocks of a `DecodePlan`. For each block it runs the rows of the schedule against the
cache, lets the head draw values, accepts some of them, and makes the finished block permanent. It
yields an event after every row and every commit; progress bars, previews, streaming and the plain
pipeline call are all consumers of that stream.

It knows neither models nor pictures: a `Decoder` runs forwards and draws values. Autoregression is
a block of one token and one row; MaskGIT one block and many rows; block diffusion many and many.

Invariants: an item's values depend on its own generator only, of which every block takes one
number, however many rows it needed, and one more where context is kept with noise;
`use_cache=False` recomputes the whole past in every pass and gives the same values (the slow twin
the fast path is tested against).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from .decoder import Decoder, Event
from .errors import UsageError, check_range
from .flight import Flight
from .given import require_equal_counts
from .layout import Layout
from .missing import split_unknown
from .plan import DecodePlan
from .sampling import per_item_randn
from .schedulers.base import Row, flow_noise


class Rollout:
    """One request: several items decoded together."""

    def __init__(
        self,
        plan: DecodePlan,
        decoder: Decoder,
        scheduler: Any,
        *,
        values: Tensor,
        is_known: Bool[Tensor, "batch slots"],
        generators: Sequence[torch.Generator],
        num_steps: int | None = None,
        start_level: float = 1.0,
        use_cache: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
        record: Callable[[Layout, Tensor], None] | None = None,
    ) -> None:
        """Set up the request.

        Args:
            plan: Layouts and commit policy.
            decoder: Runs the model.
            scheduler: From `core.schedulers`; owns counts, orders, levels and updates.
            values: Codes [batch, slots, codebooks] or latents [batch, slots, channels]; given
                content where `is_known`, anything elsewhere. Not modified.
            is_known: Slots that are given and stay as they are; where a value is -1, or not a
                number, nothing is known and rows are masked.
            generators: One CPU generator per item.
            num_steps: Rows per block; None = the scheduler's own.
            start_level: Blocks of latents start as `values` noised to this level, in (0, 1]; at 1
                they start as noise alone (SDEdit, arXiv:2108.01073).
            use_cache: False recomputes the past in every pass.
            should_stop: Asked before every row; True ends the rollout, committed work is kept.
            record: Called with the rows and hidden states of every pass (for proofs).

        Raises:
            ValueError: shapes of values, is_known and generators disagree.
            UsageError: items have different numbers of given slots in a block.
        """
        batch, slots = is_known.shape
        if slots != plan.num_slots or values.shape[:2] != is_known.shape:
            raise ValueError(
                f"values {tuple(values.shape)} and is_known {tuple(is_known.shape)} must cover "
                f"{plan.num_slots} slots"
            )
        if len(generators) != batch:
            raise ValueError(f"{len(generators)} generators for {batch} items; give one per item")
        require_equal_counts(plan, is_known)
        self.plan, self.decoder, self.scheduler = plan, decoder, scheduler
        self.values, unknown = split_unknown(values)
        self.is_known, self.given = is_known.clone(), is_known.clone()
        self.is_missing = unknown & is_known
        self.generators, self.num_steps = list(generators), num_steps
        check_range("start_level", start_level, 0.0, 1.0, open_low=True)
        self.start_level = start_level
        self.kept = self.values.clone() if plan.context_noise and plan.keeps_blocks else None
        self.should_stop, self.record = should_stop, record
        selects = bool(plan.table.route_names())
        self.poses: Tensor | None = decoder.poses if selects else None
        caches = plan.write != "none"
        self.cache = decoder.new_cache(plan, batch) if use_cache and caches else None
        self.pending: list[Layout] = [] if plan.prompt is None else [plan.prompt]
        self.context: list[Layout] = []
        self.num_passes = self.num_forwarded = 0
        self._rows: dict[tuple[int, int | None], list[Row]] = {}

    # -- passes -----------------------------------------------------------------------------

    def _content(
        self, layout: Layout, block_values: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Values, masked flags and levels of some rows; `block_values` overrides noisy rows."""
        source = layout.source.clamp_min(0)
        values = self.values[:, source]
        noisy = layout.level >= 1  # finished rows stand at the level context is kept at
        if self.kept is not None:
            values = torch.where(noisy[:, None], values, self.kept[:, source])
        is_masked = is_missing = self.is_missing[:, source]
        if block_values is None:
            is_masked = noisy & ~self.is_known[:, source] | is_missing
        else:
            count = block_values.shape[1]
            values = torch.cat((values[:, : values.shape[1] - count], block_values), 1)
        level = is_masked.to(values.dtype if values.is_floating_point() else torch.float32)
        return values, is_masked, torch.where(noisy, level, layout.level.to(level))

    def _pass(
        self, active: list[Layout], keep: int, *, block_values: Tensor | None = None,
        level: float | Tensor | None = None, only_keys: bool = False,
    ) -> Tensor:  # fmt: skip
        """Run rows against the past and keep the first `keep` of them in the cache.

        `level` is that of the noisy rows: one number, or one for each of the last rows; all items
        share it then, and the decoder is handed levels without an axis of items.

        Returns:
            Hidden states of the active rows, one set per guidance branch.
        """
        plan = self.plan
        past = [] if self.cache is not None else self.context
        layout = plan.joined([*past, *active])
        skip = layout.num_tokens - sum(part.num_tokens for part in active)
        values, is_masked, rows_level = self._content(layout, block_values)
        if isinstance(level, Tensor):
            rows_level = layout.level.clone()
            rows_level[..., -len(level) :] = level.to(values.device)
        elif level is not None:
            rows_level = torch.where(layout.level >= 1, level, layout.level)
        view = None
        if self.cache is not None:
            kept = torch.arange(keep) if keep else None
            view = self.cache.view(layout, keep=kept, only_keys=only_keys)
        lowered = plan.lowered(layout, view, self.poses)
        hidden = self.decoder.forward(values, is_masked, layout, rows_level.float(), lowered, view)
        self.num_passes += 1
        self.num_forwarded += layout.num_tokens
        if self.cache is not None and view is not None and keep:
            self.cache.write(view)
            self.cache.commit(context_level=plan.context_level or None)
        hidden = hidden[:, skip:]
        if self.record is not None:
            self.record(plan.joined(active), hidden)
        return hidden

    def _flush(self) -> None:
        """Make pending rows permanent in a pass of their own."""
        if not self.pending:
            return
        rows, self.pending = self.pending, []
        if self.cache is not None:
            count = sum(r.num_tokens for r in rows)
            self._pass(rows, count, only_keys=self.record is None)
        else:
            self.context += rows

    def predict_rows(self, block: int, **how: Any) -> Tensor:
        """Run the rows that predict a block, with pending rows riding in front where allowed."""
        plan = self.plan
        if plan.shift:
            return self.run_rows([], block, **how)[:, -1:]
        noisy = self._noisy_parts(block)
        hidden = self.run_rows(noisy, block, **how)
        first = sum(r.num_tokens for r in noisy[:block]) if len(noisy) > 1 else 0
        return hidden[:, first : first + plan.noisy_rows(block).num_tokens]

    def run_rows(self, noisy: list[Layout], oldest: int, **how: Any) -> Tensor:
        """Run noisy rows, with pending rows riding in front where allowed.

        Args:
            noisy: Rows of blocks that are not finished; none for shifted recipes.
            oldest: The first of these blocks; what it and later ones cannot see may be dropped.
            **how: See `_pass`.

        Returns:
            States of the noisy rows; without any, of those that rode in front.
        """
        plan = self.plan
        if plan.commits_alone or plan.write == "prefix":
            self._flush()
        riding, self.pending = self.pending, []
        count = sum(rows.num_tokens for rows in riding)
        caches = self.cache is not None
        hidden = self._pass([*riding, *noisy], count if caches else 0, **how)
        if not caches:
            self.context += riding
        if plan.write in ("fused", "token"):
            self._evict(oldest)
        return hidden[:, count:] if noisy else hidden

    def _noisy_parts(self, block: int) -> list[Layout]:
        """Noisy rows that run to predict a block: its own, or all of them for single copies.

        Where finished blocks are not kept, a block's context is the other noisy rows, so none can
        be left out.
        """
        plan = self.plan
        if plan.relabels:
            return [plan.told_rows(block, self.is_known[0, plan.sources(block)])]
        if plan.keeps_blocks:
            return [plan.noisy_rows(block)]
        return [plan.noisy_rows(b) for b in range(plan.num_blocks)]

    def finish(self, block: int) -> Iterator[Event]:
        """Queue the clean rows of a finished block and drop what no later row can see."""
        plan = self.plan
        last = block == plan.num_blocks - 1
        if self.kept is not None and not last:
            self._keep(block, self.kept)
        if self.pending and plan.window is not None and not plan.commits_alone:
            # Given blocks run no pass of their own; a windowed cache cannot hold them all at once.
            self._flush()
            self._evict(block)
        if plan.keeps_blocks and not last:
            self.pending.append(plan.clean_rows(block))
        if plan.commits_alone and not last:
            self._flush()
            self._evict(block + 1)
        yield self._event("commit", f"block_{block}", block)

    def _keep(self, block: int, kept: Tensor) -> None:
        """Noise a finished block to the level at which later blocks look back on it."""
        source = self.plan.sources(block)
        clean = self.values[:, source]
        noise = per_item_randn(clean.shape[1:], self._streams(), clean.device).to(clean.dtype)
        kept[:, source] = flow_noise(clean, noise, self.plan.context_noise)

    def amend(self, block: int, values: Tensor) -> None:
        """Replace a generated block by what was observed, before anything has looked back on it.

        With fused commits a finished block waits for the next pass to become permanent; until then
        its rows have not run, so the cache that follows is that of a rollout which was given the
        observation.

        Args:
            block: The block finished last.
            values: Its observed values [batch, slots of the block, channels].

        Raises:
            UsageError: The block is already permanent, or not finished.

        Source: PAR (arXiv:2508.09822), whose observed frame replaces the predicted one.
        """
        if block < 0 or not any(int(rows.block[0]) == block for rows in self.pending):
            raise UsageError(
                f"block {block} cannot be replaced by an observation: only the block finished last "
                'can, before the next one runs, with cache.write = "fused"'
            )
        self.give(self.plan.sources(block), values)
        if self.kept is not None:
            self._keep(block, self.kept)

    def give(self, source: Tensor, values: Tensor) -> None:
        """Take values [batch, slots, channels] of some slots as given; some may be unknown."""
        self.values[:, source], self.is_missing[:, source] = split_unknown(values.to(self.values))
        self.is_known[:, source] = self.given[:, source] = True

    def _evict(self, next_block: int) -> None:
        """Drop what no row of `next_block` or later can see."""
        if self.cache is not None and self.plan.window is not None:
            window, sink, far = self.plan.window, self.plan.sink, self.plan.far_window
            self.cache.evict(window=window, sink=sink, next_block=next_block, far=far)

    def _event(self, kind: str, path: str, block: int, **data: Any) -> Event:
        data |= {"values": self.values, "is_known": self.is_known}
        return Event(kind, path, block, self.plan.num_blocks, data)

    # -- blocks -----------------------------------------------------------------------------

    def events(self) -> Iterator[Event]:
        """Decode every block; yields row, commit and finally done events.

        The event data holds `values` and `is_known` (live tensors in slot order), and for rows
        `row`, `of_rows`, `accepted` [batch, tokens of the block], `score` (which of them were taken
        first: higher, or None), `sources` and `level`; rows of latents also
        `received`: the block as the row was given it.
        """
        flies = self.plan.matrix != "autoregressive" and self.decoder.per_level
        blocks = self._flight_events() if flies else self._blocks_events()
        for event in blocks:
            yield event
            if event.kind == "done":
                return
        yield self._event("done", "done", self.plan.num_blocks - 1, interrupted=False)

    def _blocks_events(self) -> Iterator[Event]:
        """One block after the other."""
        for block in range(self.plan.num_blocks):
            yield from self.block_events(block)

    def _flight_events(self) -> Iterator[Event]:
        """Given blocks first, then all others as their level matrix says."""
        first, blocks = 0, self.plan.num_blocks
        while first < blocks and bool(self.given[:, self.plan.sources(first)].all()):
            yield from self.finish(first)
            first += 1
        if first == blocks:
            return
        for event in Flight(self, first).events():
            if event is None:
                yield self._event("done", "done", first, interrupted=True)
                return
            yield event

    def block_events(self, block: int) -> Iterator[Event]:
        """Decode one block; yields its rows and its commit, or done where somebody said stop.

        Blocks come in order; an endless plan is driven through here, a block at a time.
        """
        fill = self._denoise if self.decoder.per_level else self._unmask
        if not bool(self.given[:, self.plan.sources(block)].all()):
            for event in fill(block):
                if event is None:
                    yield self._event("done", "done", block, interrupted=True)
                    return
                yield event
        yield from self.finish(block)

    def _unmask(self, block: int) -> Iterator[Event | None]:
        """Reveal the masked slots of a block row by row, one stage after the other."""
        plan, scheduler = self.plan, self.scheduler
        source = plan.sources(block)
        open_slots, before = ~self.is_known[:, source], 0
        stages = [
            (stage, self._planned_rows(int(stage.among(open_slots).sum(1).max()), stage.steps))
            for stage in plan.stages(block, self.num_steps)
        ]
        of_rows = sum(len(rows) for _, rows in stages)
        streams = self._streams()
        rank = self._rank(source, streams)
        for stage, rows in stages:
            for row in rows:
                is_masked = stage.among(~self.is_known[:, source])
                if not bool(is_masked.any()):
                    break  # rules that decide their own count may be done before the last row
                if self.should_stop():
                    yield None
                    return
                hidden = self.predict_rows(block)
                drawn = self.decoder.draw(hidden, row, streams, source)
                accepted, score = scheduler.take(row, is_masked, drawn.stats, rank, streams)
                old = self.values[:, source]
                self.values[:, source] = torch.where(
                    accepted[..., None], drawn.values.to(old.dtype), old
                )
                self.is_known[:, source] |= accepted
                yield self._row_event(
                    block, row, source, is_masked, accepted, score, before=before, of_rows=of_rows
                )
            before += len(rows)

    def _planned_rows(self, left: int, steps: int | None) -> list[Row]:
        """Rows for `left` open slots; blocks and stages of one size share their plan."""
        if (left, steps) not in self._rows:
            most = None if steps is None else min(steps, left)
            self._rows[left, steps] = self.scheduler.rows(left, most) if left else []
        return self._rows[left, steps]

    def _streams(self) -> list[torch.Generator]:
        """Start every item's random stream for one block.

        An item may need fewer rows than its neighbours, but the whole batch runs until the last
        one is done; a stream of its own per block keeps later blocks out of that.
        """
        seeds = [int(torch.randint(2**62, (), generator=g)) for g in self.generators]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _rank(self, source: Tensor, streams: Sequence[torch.Generator]) -> Tensor | None:
        plan = self.plan
        if len(source) == 1:  # nothing to order
            return torch.zeros(len(streams), 1, device=self.values.device)
        if plan.order == "any" and self.scheduler.config.order == "raster":  # as rows stand
            turns = torch.arange(len(source), device=self.values.device, dtype=torch.float32)
            return turns.expand(len(streams), -1)
        cells = plan.num_slots == plan.height * plan.width
        if not cells and self.scheduler.config.order == "random":  # whatever the clip's length
            return self.scheduler.make_rank(1, len(source), streams, device=self.values.device)
        height, width = (plan.height, plan.width) if cells else (1, plan.num_slots)
        rank = self.scheduler.make_rank(height, width, streams, device=self.values.device)
        return None if rank is None else rank.expand(len(streams), -1)[:, source]

    def _denoise(self, block: int) -> Iterator[Event | None]:
        """Lower the noise level of a whole block row by row."""
        scheduler, source = self.scheduler, self.plan.sources(block)
        given = self.given[:, source][..., None]
        clean, has_given = self.values[:, source], bool(given.any())
        streams = self._streams()
        noise = per_item_randn(clean.shape[1:], streams, clean.device).to(clean.dtype)
        begins_low = self.start_level < 1.0
        x = scheduler.add_noise(clean, noise, self.start_level) if begins_low else noise
        scheduler.begin(self.num_steps)
        for row in scheduler.rows(self.num_steps, self.start_level):
            if self.should_stop():
                yield None
                return
            if has_given:
                x = torch.where(given, scheduler.add_noise(clean, noise, row.level), x)
            received = x
            hidden = self.predict_rows(block, block_values=x, level=row.level)
            x = scheduler.step(self.decoder.predict(hidden, row), row, x, streams)
            if row.is_last:
                x = torch.where(given, clean, x) if has_given else x
                self.is_known[:, source] = True
            self.values[:, source] = x
            everything = torch.ones_like(given[..., 0])
            yield self._row_event(
                block,
                row,
                source,
                everything,
                everything if row.is_last else ~everything,
                received=received,
            )

    def _row_event(
        self, block: int, row: Row, source: Tensor, predicted: Tensor, accepted: Tensor,
        score: Tensor | None = None, *, before: int = 0, of_rows: int | None = None, **more: Any,
    ) -> Event:  # fmt: skip
        index = before + row.index  # rows are counted through the stages of a block
        return self._event(
            "row", f"block_{block}/row_{index}", block, row=index, of_rows=of_rows or row.num_rows,
            sources=source, predicted=predicted, accepted=accepted, score=score, level=row.level,
            level_next=row.level_next, guidance=row.guidance_scale, temperature=row.temperature,
            **more,
        )  # fmt: skip


def run(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Exhaust a rollout; returns the values and which of them are known."""
    for _ in rollout.events():
        pass
    return rollout.values, rollout.is_known
