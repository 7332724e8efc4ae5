"""What a cached decode offers to each row, simulated from a layout's attributes.

A `AdvancePlan` says which passes run and what the cache keeps; `offered` turns it into booleans per
pair of rows, `mismatches` compares them with a training mask. Nothing here judges; core/closure.py
does.

Invariants: rows with `block < 0` are a static prompt, run once in one pass and never evicted; a
window counts the query's own block and not the sinks.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .far import is_coarse
from .layout import Copy, Layout, Role

COMMITS = ("separate", "fused", "token", "block", "none")
SEEN = ("table", "all", "causal")


@dataclass(frozen=True)
class AdvancePlan:
    """How a decode runs, as far as visibility is concerned.

    Attributes:
        commit: When keys become permanent. `"separate"`: a clean pass after each noisy block;
            `"fused"`: that pass rides with the next block; `"token"`: one causal copy, each row
            as it is produced; `"block"`: one copy, each block after its last row of the schedule;
            `"none"`: no cache.
        window: Blocks (or `order` ranks) the cache serves, own counted, sinks not; None = all.
        window_unit: `"block"`, `"order"`, `"group"` (blocks in flight see the past of the first of
            them), or None = order for token commits, else block.
        counts_own: False: the cache was built to hold `window` PAST blocks, not `window - 1`.
        evict: Whether a fused pass evicts `"after"` it or `"before"` it.
        unit: What one noisy pass covers: `"block"`, `"group"` (a window of blocks) or `"all"`.
        noisy_sees: Mask inside the active noisy rows: `"table"` evaluates the table; `"all"` and
            `"causal"` are hand-made masks (the whole cache, and all or earlier active rows).
        clean_sees: The same for clean rows in their commit pass.
        far: Blocks whose coarse rows the cache serves, counted as `window` is; None = all.
    """

    commit: str = "separate"
    window: int | None = None
    window_unit: str | None = None
    counts_own: bool = True
    evict: str = "after"
    unit: str = "block"
    noisy_sees: str = "table"
    clean_sees: str = "table"
    far: int | None = None

    def __post_init__(self) -> None:
        allowed = {
            "commit": COMMITS,
            "window_unit": (None, "block", "order", "group"),
            "evict": ("after", "before"),
            "unit": ("block", "group", "all"),
            "noisy_sees": SEEN,
            "clean_sees": SEEN,
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"{name} must be one of {list(values)}, got {getattr(self, name)!r}"
                )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}; nearest legal value 1")


def pinned(layout: Layout) -> Bool[Tensor, " rows"]:
    """Rows no window evicts: static prompt rows and sinks."""
    return (layout.block < 0) | ((layout.role & int(Role.SINK)) != 0)


def pass_number(layout: Layout, plan: AdvancePlan) -> Int[Tensor, " rows"]:
    """Number of the noisy pass a row belongs to; prompt rows come before all passes."""
    unit = torch.zeros_like(layout.block) if plan.unit == "all" else getattr(layout, plan.unit)
    return torch.where(layout.block < 0, -1, unit)


@dataclass(frozen=True, eq=False)
class Offered:
    """What the decode offers, per (query, key) pair of rows.

    Attributes:
        cached: The key is in the cache when the query runs.
        active: Both run in the same pass.
        evicted: The key was in the cache and has been evicted.
        counted: Rows the decode runs at all (no padding; no last clean block when fused).
    """

    cached: Bool[Tensor, "rows rows"]
    active: Bool[Tensor, "rows rows"]
    evicted: Bool[Tensor, "rows rows"]
    counted: Bool[Tensor, " rows"]

    @property
    def present(self) -> Bool[Tensor, "rows rows"]:
        """Pairs whose key is at hand, cached or active."""
        return self.cached | self.active


def offered(layout: Layout, plan: AdvancePlan) -> Offered:
    """Simulate the passes of a plan; nothing here looks at the table.

    Args:
        layout: Training layout `[tokens]`.
        plan: How the decode runs.

    Returns:
        The pairs each pass offers.
    """
    is_real = layout.document >= 0
    same_document = layout.document[:, None] == layout.document[None, :]
    is_static = layout.block < 0
    both_static = is_static[:, None] & is_static[None, :]
    static_past = ~is_static[:, None] & is_static[None, :]
    counted = is_real.clone()
    if plan.commit in ("separate", "fused"):
        cached, active = _two_copy_passes(layout, plan)
        if plan.commit == "fused":
            counted &= ~((layout.copy == int(Copy.CLEAN)) & _is_last_pass(layout, plan))
    else:
        rank = layout.order if plan.commit == "token" else layout.block
        same_copy = layout.copy[:, None] == layout.copy[None, :]
        cached = (rank[None, :] < rank[:, None]) & same_copy
        active = (rank[None, :] == rank[:, None]) & same_copy
    cached = ((cached & ~both_static) | static_past) & same_document & is_real[None, :]
    active = (active | both_static) & same_document & is_real[None, :]
    gone = cached & _outside_window(layout, plan)
    return Offered(cached & ~gone, active, gone, counted)


def _two_copy_passes(layout: Layout, plan: AdvancePlan) -> tuple[Tensor, Tensor]:
    unit = pass_number(layout, plan)
    is_clean = layout.copy == int(Copy.CLEAN)
    behind = unit[:, None] - unit[None, :]
    to_clean = is_clean[None, :].expand_as(behind)
    clean_row, noisy_row = is_clean[:, None], ~is_clean[:, None]
    own_noisy = noisy_row & ~is_clean[None, :] & (behind == 0)
    if plan.commit == "separate":
        return to_clean & (behind > 0), (clean_row & to_clean & (behind == 0)) | own_noisy
    # Fused: pass b runs C of block b - 1 beside N of block b; the cache ends at block b - 2.
    clean_active = to_clean & torch.where(clean_row, behind == 0, behind == 1)
    cached = to_clean & torch.where(clean_row, behind > 0, behind > 1)
    return cached, clean_active | own_noisy


def _is_last_pass(layout: Layout, plan: AdvancePlan) -> Tensor:
    """Rows of the last block of their document: nobody reads their clean copy."""
    unit = pass_number(layout, plan)
    same_document = layout.document[:, None] == layout.document[None, :]
    latest = torch.where(same_document, unit[None, :], -1).amax(-1)
    return (unit == latest) & (layout.block >= 0)


def _outside_window(layout: Layout, plan: AdvancePlan) -> Tensor:
    """Pairs whose key has been evicted when the query runs."""
    if plan.window is None:
        return torch.zeros(
            layout.num_tokens, layout.num_tokens, dtype=torch.bool, device=layout.device
        )
    name = plan.window_unit or ("order" if plan.commit == "token" else "block")
    rank = getattr(layout, name)
    now = rank[:, None].clone()
    if plan.commit == "fused":
        # The pass of block b also carries C of block b - 1, whose window starts one block earlier.
        is_clean = (layout.copy == int(Copy.CLEAN))[:, None]
        now = torch.where(is_clean, now, now - 1) if plan.evict == "after" else now + is_clean
    more = not plan.counts_own
    gone = now - rank[None, :] >= plan.window + more
    lost = torch.zeros_like(gone) if plan.far is None else now - rank[None, :] >= plan.far + more
    return torch.where(is_coarse(layout)[None, :], lost, gone & ~pinned(layout)[None, :])


def mismatches(
    layout: Layout, seen: Bool[Tensor, "rows rows"], plan: AdvancePlan, given: Offered
) -> int:
    """Count rows whose decode-visible set differs from the training-visible one.

    Args:
        layout: Training layout `[tokens]`.
        seen: Training mask, True = the query may attend the key.
        plan: How the decode runs.
        given: Result of `offered` for the same layout and plan.

    Returns:
        Number of rows in [0, tokens].
    """
    is_clean = (layout.copy == int(Copy.CLEAN))[:, None]
    earlier = layout.order[None, :] <= layout.order[:, None]

    def decode(mode: str) -> Tensor:
        if mode == "table":
            return seen & given.present
        return given.cached | (given.active & (earlier if mode == "causal" else True))

    got = torch.where(is_clean, decode(plan.clean_sees), decode(plan.noisy_sees))
    return int(((got != seen).any(-1) & given.counted).sum())
