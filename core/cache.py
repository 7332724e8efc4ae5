"""The key/value cache: what a finished token leaves behind for later ones.

Per layer it holds keys (normalised and, by default, un-rotated) and values in pre-allocated
buffers; beside them, once for all layers, the same attributes the mask reads, so that one predicate
serves training and decoding. Each row of the batch has two explicit counts, `committed <= written`:
nothing is ever inferred from buffer contents.

It does not know what a block or an image is, and it never decides visibility: that is the mask's
job.

Invariants: a pass is a pure function of (tokens, attributes, view); only `commit` moves
`committed`; slots at or beyond `written` are never read; an entry that still holds noise or a mask
is refused by `commit` unless the caller states the level at which context is kept.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import ResourceError
from .layout import ATTRIBUTES, INT_ATTRIBUTES, Layout, Role


class CacheFull(ResourceError, IndexError):
    """The cache holds fewer free slots than a pass wants to write."""


@dataclass
class CacheView:
    """One pass over the cache: read access to the past, staging room for the active tokens."""

    cache: "KVCache"
    active: Layout
    keep: Tensor | None
    start: int | Tensor
    length: int
    is_batched: bool
    only_keys: bool = False

    @cached_property
    def past(self) -> Layout:
        """Attributes of the entries that stood in the cache when the pass began."""
        if self.is_batched:
            return self.cache._batch_layout(self.length, self.start)
        return self.cache._row_layout(self.length)

    @cached_property
    def _in_place(self) -> bool:
        """Whether free slots can serve as scratch for all active rows, staged or not."""
        count = self.active.num_tokens
        whole = self.keep is None or len(self.keep) == count
        room = isinstance(self.start, int) and self.length + count <= self.cache.capacity
        return whole and room and not torch.is_grad_enabled()

    @cached_property
    def layout(self) -> Layout:
        """Attributes of all keys: the past, then the active rows."""
        return Layout.cat([self.past, self.active])

    def extend(
        self, layer: int, key: Float[Tensor, "b h q d"], value: Float[Tensor, "b h q d"]
    ) -> tuple[Float[Tensor, "b h k d"], Float[Tensor, "b h k d"]]:
        """Return the cached keys and values followed by the active ones.

        The active ones are also staged behind `written` when the pass will be kept; that write is
        idempotent by slot, so a recomputed layer (activation checkpointing) changes nothing.
        With more batch rows than the cache has (guidance branches over condition-free entries),
        the past is shared by every branch and the first rows are the ones staged.
        """
        cache, length, count = self.cache, self.length, key.shape[2]
        branches = key.shape[0] // cache.batch
        if branches == 1 and self._in_place:
            # No copy of the past, and a peek leaves `written` alone.
            keys, values = cache.keys[layer], cache.values[layer]
            keys.narrow(2, length, count).copy_(key)
            values.narrow(2, length, count).copy_(value)
            return keys.narrow(2, 0, length + count), values.narrow(2, 0, length + count)
        past_key, past_value = cache._past(layer, length)
        if self.keep is not None:
            cache._stage(layer, self.start, key[: cache.batch], value[: cache.batch], self.keep)
        if branches > 1:
            past_key, past_value = (_of_all(part, branches) for part in (past_key, past_value))
        return torch.cat((past_key, key), 2), torch.cat((past_value, value), 2)


def _of_all(part: Tensor, branches: int) -> Tensor:
    """Show every branch the same entries; a single item's are not copied for it."""
    if len(part) == 1:
        return part.expand(branches, -1, -1, -1)
    return part.repeat(branches, 1, 1, 1)


class KVCache:
    """Pre-allocated keys, values and attributes with write, view, commit, rollback, evict, fork."""

    def __init__(
        self,
        *,
        num_layers: int,
        batch: int,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        num_axes: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rotated: bool = False,
        poison: bool = False,
        differentiable: bool = False,
    ) -> None:
        """Allocate the buffers.

        Args:
            num_layers: Layers that cache; 0 keeps attributes only (used to draw the log).
            batch: Rows.
            capacity: Slots per row, in tokens.
            num_kv_heads: Key/value heads.
            head_dim: Channels per head.
            num_axes: Axes of the positions stored beside the entries.
            dtype: Type of keys and values.
            device: Where the buffers live.
            rotated: Keys arrive already rotated by their absolute position (a fast path: no
                rotation at read, and no re-basing afterwards).
            poison: Fill free slots with NaN, so that a wrong read shows (for tests).
            differentiable: Let gradients go back through what is kept (training on rollouts).
        """
        if batch < 1 or capacity < 1:
            raise ValueError(f"batch = {batch} and capacity = {capacity} must be >= 1; try 1")
        shape = (batch, num_kv_heads, capacity, head_dim)
        fill = float("nan") if poison else 0.0
        self.keys = [torch.full(shape, fill, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.full_like(k, fill) for k in self.keys]
        self.batch, self.capacity, self.poison = batch, capacity, poison
        self.rotated, self.differentiable = rotated, differentiable
        self._uniform = True
        empty = Layout.make(
            capacity, document=-1, source=-1, position=torch.zeros(capacity, num_axes)
        )
        self._own(empty.to(torch.device(device)).expand(batch))
        self.written = torch.zeros(batch, dtype=torch.int64)
        self.committed = torch.zeros(batch, dtype=torch.int64)
        self.exact = True
        self._num_writes = 0
        self._evicted: tuple[int | None, ...] = ()
        self.log: list[dict[str, Any]] = []

    def _own(self, layout: Layout) -> None:
        """Copy attributes into two buffers of which `layout` holds views: one write per pass."""
        self._integers, self._floats = (part.clone() for part in _bundled(layout))
        integers = dict(zip(INT_ATTRIBUTES, self._integers.unbind(1), strict=True))
        position, level = self._floats[:, :-1].transpose(1, 2), self._floats[:, -1]
        self.layout = Layout(**integers, position=position, level=level)

    @staticmethod
    def estimate_bytes(
        *, num_layers: int, batch: int, capacity: int, num_kv_heads: int, head_dim: int,
        bytes_per_value: int = 4,
    ) -> int:  # fmt: skip
        """Return layers * 2 * kv_heads * head_dim * slots * rows * bytes, the keys and values."""
        return num_layers * 2 * num_kv_heads * head_dim * capacity * batch * bytes_per_value

    @property
    def aligned(self) -> bool:
        """True when every row has written the same number of tokens."""
        return bool((self.written == self.written[0]).all())

    def _note(self, op: str, **what: Any) -> None:
        self.log.append(
            {
                "op": op,
                **what,
                "written": self.written.tolist(),
                "committed": self.committed.tolist(),
            }
        )

    def _past(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        return self.keys[layer][:, :, :length], self.values[layer][:, :, :length]

    def _slots(self, start: int | Tensor, count: int) -> Tensor:
        """Slot index [batch, count] behind each row's `written`."""
        offset = torch.arange(count)
        begin = start if isinstance(start, Tensor) else torch.full((self.batch,), start)
        return begin[:, None] + offset

    def _stage(
        self, layer: int, start: int | Tensor, key: Tensor, value: Tensor, keep: Tensor | None
    ) -> None:
        kept_key, kept_value = key, value
        if not self.differentiable:
            kept_key, kept_value = key.detach(), value.detach()
        if keep is not None:
            kept_key, kept_value = kept_key[:, :, keep], kept_value[:, :, keep]
        if isinstance(start, int):
            stop = start + kept_key.shape[2]
            self.keys[layer][:, :, start:stop] = kept_key
            self.values[layer][:, :, start:stop] = kept_value
            return
        slots = self._slots(start, kept_key.shape[2]).to(key.device)
        index = slots[:, None, :, None].expand_as(kept_key)
        self.keys[layer].scatter_(2, index, kept_key)
        self.values[layer].scatter_(2, index, kept_value)

    def view(
        self, active: Layout, *, keep: Tensor | None = None, only_keys: bool = False
    ) -> CacheView:
        """Open a pass over the written entries.

        Args:
            active: Attributes of the tokens about to run (1-D, or one row per batch row).
            keep: Indices of the active tokens to stage; None = peek, nothing is stored.
            only_keys: Nobody will read the hidden states of this pass, so the last layer may stop
                at its keys and values.

        Raises:
            CacheFull: the kept tokens do not fit behind `written`.
        """
        length = int(self.written.max())
        if keep is not None and length + len(keep) > self.capacity:
            raise CacheFull(
                f"cache capacity = {self.capacity} tokens, {length} written, "
                f"{len(keep)} more asked; try capacity {length + len(keep)}"
            )
        self._wipe_free()  # what an earlier peek left there must not be readable
        aligned = self.aligned
        start = length if aligned else self.written.clone()
        is_batched = not (aligned and self._uniform)
        return CacheView(self, active, keep, start, length, is_batched, only_keys)

    def _row_layout(self, length: int) -> Layout:
        """Attributes once for all rows: so far every write gave all rows the same ones."""
        return Layout(**{n: getattr(self.layout, n)[0, :length] for n in ATTRIBUTES})

    def _batch_layout(self, length: int, written: int | Tensor) -> Layout:
        parts = {n: getattr(self.layout, n)[:, :length] for n in ATTRIBUTES}
        if isinstance(written, Tensor):
            beyond = torch.arange(length) >= written[:, None]
            document = parts["document"].masked_fill(beyond.to(parts["document"].device), -1)
            parts["document"] = document
        return Layout(**parts)

    def write(self, view: CacheView) -> int:
        """Keep the staged tokens of a finished pass: attributes stored, `written` moves.

        Returns:
            Number of tokens written per row (0 for a peek).
        """
        if view.keep is None:
            return 0
        in_order = bool((view.keep[1:] > view.keep[:-1]).all())
        everything = in_order and len(view.keep) == view.active.num_tokens
        kept = view.active if everything else view.active.take(view.keep)
        aligned = self.aligned
        self._uniform = self._uniform and aligned and not kept.is_batched
        if aligned:
            integers, floats = _bundled(kept)
            start, count = int(self.written[0]), kept.num_tokens
            self._integers.narrow(2, start, count).copy_(integers)
            self._floats.narrow(2, start, count).copy_(floats)
        else:
            self._scatter(kept if kept.is_batched else kept.expand(self.batch))
        self.written = self.written + kept.num_tokens
        self._num_writes += 1
        self._note("write", tokens=kept.num_tokens, source=_first_row(kept.source))
        return kept.num_tokens

    def _scatter(self, kept: Layout) -> None:
        """Store attributes behind each row's own `written`."""
        slots = self._slots(self.written, kept.num_tokens).to(kept.document.device)
        for name in ATTRIBUTES:
            target, source = getattr(self.layout, name), getattr(kept, name)
            index = slots[..., None].expand_as(source) if source.ndim == 3 else slots
            target.scatter_(1, index, source.to(target.dtype))

    def commit(
        self, count: int | Tensor | None = None, *, copy: int | None = None,
        context_level: float | None = None,
    ) -> None:  # fmt: skip
        """Make the first `count` written-but-uncommitted tokens of each row permanent.

        Args:
            count: Tokens per row, or one number per row; None = all written. May be 0.
            copy: Relabel them (the clean copy, for tables with a clean column); None = unchanged.
            context_level: Level at which context is declared to be kept (single-copy tables);
                None = only tokens that hold no noise and no mask may be committed.

        Raises:
            ValueError: more than is written, or a token that still holds noise.
        """
        low, high = int(self.committed.min()), int(self.written.max())
        fresh = self.layout.level[:, low:high]
        if count is None and copy is None and not bool((fresh > 0).any()):
            amount = self.written - self.committed
            self.committed = self.written.clone()
            self._note("commit", tokens=amount.tolist())
            return
        pending = self.written - self.committed
        amount = pending if count is None else torch.as_tensor(count).expand(self.batch).clone()
        if bool((amount < 0).any()) or bool((amount > pending).any()):
            raise ValueError(
                f"commit count = {amount.tolist()}; legal 0..{pending.tolist()} tokens written"
            )
        slot = torch.arange(low, high)
        chosen = (slot >= self.committed[:, None]) & (slot < (self.committed + amount)[:, None])
        chosen = chosen.to(self.layout.level.device)
        level = fresh[chosen]
        if context_level is None and bool((level > 0).any()):
            raise ValueError(
                f"commit of a token at level {float(level.max()):g}; only level 0 is final: run a "
                "commit pass over the clean tokens, or state context_level"
            )
        if copy is not None:
            self.layout.copy[:, low:high][chosen] = copy
        self.committed = self.committed + amount
        self._note("commit", tokens=amount.tolist())

    def rollback(self, to: int | Tensor | None = None) -> None:
        """Drop the tail behind `to` tokens (None = everything not committed). Costs nothing.

        Raises:
            ValueError: `to` outside 0..written.
        """
        target = self.committed if to is None else torch.as_tensor(to).expand(self.batch).clone()
        if bool((target < 0).any()) or bool((target > self.written).any()):
            raise ValueError(f"rollback to = {target.tolist()}; legal 0..{self.written.tolist()}")
        self.written = target.clone()
        self.committed = torch.minimum(self.committed, target)
        self._wipe_free()
        self._note("rollback")

    def _wipe_free(self) -> None:
        if not self.poison:
            return
        free = torch.arange(self.capacity) >= self.written[:, None]
        for buffer in (*self.keys, *self.values):
            mask = free[:, None, :, None].to(buffer.device).expand_as(buffer)
            buffer.masked_fill_(mask, float("nan"))

    def evict(self, *, window: int, sink: int = 0, next_block: int, far: int | None = None) -> int:
        """Drop committed entries that no row of block `next_block` or later can see.

        `window` counts blocks including the query's own and not the sink: while block b runs,
        blocks b-window+1 .. b-1 stay, and so do blocks below `sink` and tokens with the SINK role.
        Of coarse rows those of blocks b-far+1 .. b-1 stay, or all for None.

        Returns:
            Number of tokens dropped per row.

        Raises:
            ValueError: window < 1, rows not aligned, or tokens still uncommitted.
        """
        if window < 1:
            raise ValueError(f"window = {window} blocks; legal >= 1; try 1")
        wish = (window, sink, next_block, far, self._num_writes)
        if wish == self._evicted:  # nothing has come since
            return 0
        if not self.aligned or bool((self.written != self.committed).any()):
            raise ValueError("evict needs aligned, fully committed rows; commit or rollback first")
        self._evicted = wish
        length = int(self.written[0])
        block, role = self.layout.block[0, :length], self.layout.role[0, :length]
        stays = (block > next_block - window) | (block < sink) | ((role & int(Role.SINK)) > 0)
        is_coarse = (role & int(Role.COARSE)) > 0
        stays = torch.where(is_coarse, far is None or block > next_block - far, stays)
        index = stays.nonzero()[:, 0]
        dropped = length - len(index)
        if dropped:
            self._gather(index.expand(self.batch, -1))
            self.written = torch.full_like(self.written, len(index))
            self.committed = self.written.clone()
            self._wipe_free()
        self._note("evict", tokens=dropped)
        return dropped

    def move_sinks(self, by: float) -> None:
        """Shift kept sink rows, but not the prompt's, along the first position axis.

        Args:
            by: How far.

        Raises:
            ValueError: keys that were rotated when they were written.
        """
        if self.rotated:
            raise ValueError("keys are rotated and cannot move; set cache.keys to unrotated")
        role = self.layout.role
        is_sink = ((role & int(Role.SINK)) > 0) & ((role & int(Role.PROMPT)) == 0)
        first = self.layout.position[..., 0]
        first += torch.where(is_sink, by, 0.0).to(first)

    def _gather(self, index: Tensor) -> None:
        """Move the given slots [batch, m] to the front of every buffer."""
        count = index.shape[1]
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                wide = index[:, None, :, None].to(buffer.device)
                wide = wide.expand(-1, buffer.shape[1], -1, buffer.shape[3])
                moved = buffer.gather(2, wide)
                if self.differentiable:  # autograd remembers the buffer it gathered from
                    buffers[layer] = torch.cat((moved, buffer[:, :, count:]), 2)
                else:
                    buffer[:, :, :count] = moved
        for name in ATTRIBUTES:
            target = getattr(self.layout, name)
            wide = index[..., None].expand(-1, -1, target.shape[-1]) if target.ndim == 3 else index
            target[:, :count] = target.gather(1, wide.to(target.device))

    def select(self, rows: Tensor) -> "KVCache":
        """Return a cache holding the given batch rows (repeats allowed), as independent copies."""
        other = object.__new__(KVCache)
        other.__dict__.update(self.__dict__)
        other.keys = [k[rows.to(k.device)].clone() for k in self.keys]
        other.values = [v[rows.to(v.device)].clone() for v in self.values]
        at = rows.to(self.layout.document.device)
        other._own(Layout(**{n: getattr(self.layout, n)[at] for n in ATTRIBUTES}))
        other.written, other.committed = self.written[rows].clone(), self.committed[rows].clone()
        other.batch, other.log = len(rows), list(self.log)
        return other

    def fork(self, copies: int) -> "KVCache":
        """Return `copies` whole batches one after the other (guidance branches, candidates)."""
        if copies < 1:
            raise ValueError(f"copies = {copies}; legal >= 1; try 1")
        return self.select(torch.arange(self.batch).repeat(copies))

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        self.written.zero_()
        self.committed.zero_()
        self.exact = self._uniform = True
        self._wipe_free()
        self._note("reset")

    def snapshot(self) -> dict[str, Tensor]:
        """Return plain tensors (safetensors-ready) from which `restore` continues bit for bit."""
        state = {f"keys.{i}": k.clone() for i, k in enumerate(self.keys)}
        state |= {f"values.{i}": v.clone() for i, v in enumerate(self.values)}
        state |= {f"layout.{n}": getattr(self.layout, n).clone() for n in ATTRIBUTES}
        return state | {"written": self.written.clone(), "committed": self.committed.clone()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take over a snapshot.

        Raises:
            ValueError: the snapshot is of another shape, layer count or type.
        """
        mine = self.snapshot()
        if state.keys() != mine.keys():
            odd = sorted(state.keys() ^ mine.keys())[0]
            raise ValueError(f"snapshot does not fit this cache: {odd} is missing or extra")
        for name, tensor in mine.items():
            if tensor.shape != state[name].shape or tensor.dtype != state[name].dtype:
                raise ValueError(
                    f"snapshot {name} has {tuple(state[name].shape)} {state[name].dtype}; this "
                    f"cache needs {tuple(tensor.shape)} {tensor.dtype}"
                )
        for i, (key, value) in enumerate(zip(self.keys, self.values, strict=True)):
            key.copy_(state[f"keys.{i}"])
            value.copy_(state[f"values.{i}"])
        for name in ATTRIBUTES:
            getattr(self.layout, name).copy_(state[f"layout.{name}"])
        self.written, self.committed = state["written"].clone(), state["committed"].clone()
        self._evicted = ()
        self._uniform = self.aligned and all(
            bool((getattr(self.layout, n) == getattr(self.layout, n)[:1]).all()) for n in ATTRIBUTES
        )


_BUNDLES: WeakKeyDictionary[Layout, tuple[Tensor, Tensor]] = WeakKeyDictionary()


def _bundled(layout: Layout) -> tuple[Tensor, Tensor]:
    """Attributes as [batch or 1, names, tokens] int64 and [batch or 1, axes + 1, tokens] float32.

    Remembered per layout: a plan runs the same rows in every request.
    """
    if layout not in _BUNDLES:
        integers = torch.stack([getattr(layout, name) for name in INT_ATTRIBUTES], -2)
        floats = torch.cat((layout.position.transpose(-1, -2), layout.level[..., None, :]), -2)
        _BUNDLES[layout] = (integers, floats)
    return _BUNDLES[layout]


def _first_row(source: Tensor) -> list[int]:
    return source.reshape(-1, source.shape[-1])[0].tolist()
