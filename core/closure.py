"""The checker: does a cached decode see exactly what the training mask showed?

Everything is decided by evaluating the mask table on a layout's own attributes (at least four
blocks, windows and sinks included), never symbolically. `check_exact` names the violated condition;
`count_mismatches` counts rows whose decode-visible set differs from their training-visible set;
`free_committable` finds what may become permanent without another pass. No network, no cache object.

Invariants: rows with `block < 0` are a static prompt, run once in one pass and never evicted; a
window counts the query's own block and not the sinks.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from .layout import Copy, Layout, Role
from .masks import MaskTable, dense

COMMITS = ("separate", "fused", "token", "block", "none")
SEEN = ("table", "all", "causal")


@dataclass(frozen=True)
class ClosureReport:
    """Verdict of the checker.

    Attributes:
        exact: Whether the cached decode equals the masked forward for all contents.
        violations: One sentence per violated condition, with its letter and an example pair.
        decode_mismatches: Rows whose decode-visible set differs from the training-visible set.
        notes: What the verdict does not cover.
    """

    exact: bool
    violations: list[str]
    decode_mismatches: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DecodePlan:
    """How a decode runs, as far as visibility is concerned.

    Attributes:
        commit: When keys become permanent. `"separate"`: a clean pass after each noisy block;
            `"fused"`: that pass rides with the next block; `"token"`: one causal copy, each row
            as it is produced; `"block"`: one copy, each block after its last row of the schedule;
            `"none"`: no cache.
        window: Blocks (or `order` ranks) the cache serves, own counted, sinks not; None = all.
        window_unit: `"block"`, `"order"`, or None = order for token commits, else block.
        counts_own: False: the cache was built to hold `window` PAST blocks, not `window - 1`.
        evict: Whether a fused pass evicts `"after"` it or `"before"` it.
        unit: What one noisy pass covers: `"block"`, `"group"` (a window of blocks) or `"all"`.
        noisy_sees: Mask inside the active noisy rows: `"table"` evaluates the table; `"all"` and
            `"causal"` are hand-made masks (the whole cache, and all or earlier active rows).
        clean_sees: The same for clean rows in their commit pass.
    """

    commit: str = "separate"
    window: int | None = None
    window_unit: str | None = None
    counts_own: bool = True
    evict: str = "after"
    unit: str = "block"
    noisy_sees: str = "table"
    clean_sees: str = "table"

    def __post_init__(self) -> None:
        allowed = {
            "commit": COMMITS,
            "window_unit": (None, "block", "order"),
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


def check_exact(
    table: MaskTable,
    layout: Layout,
    *,
    commit: str = "separate",
    window: int | None = None,
    window_unit: str | None = None,
    counts_own: bool = True,
    evict: str = "after",
    unit: str = "block",
    decode_mask: str = "table",
    clean_is_modulated: bool = False,
    cache_per_branch: bool = True,
    context_level: float = 0.0,
) -> ClosureReport:
    """Decide whether a cached decode of a layout is exact, and say why not.

    Args:
        table: Training visibility table.
        layout: Training layout `[tokens]` with at least four blocks.
        commit: See `DecodePlan`.
        window: Cache window; None = nothing is evicted.
        window_unit: See `DecodePlan`.
        counts_own: See `DecodePlan`.
        evict: See `DecodePlan`.
        unit: See `DecodePlan`.
        decode_mask: `"table"`, or `"none"` for the fast path in which every active row sees
            the whole cache and all active rows of its copy.
        clean_is_modulated: Whether noise level or class condition enters the clean rows.
        cache_per_branch: Whether each guidance branch has a cache of its own.
        context_level: Noise level committed rows are run at.

    Returns:
        The report; `exact` is true exactly when there is no violation.

    Raises:
        ValueError: Batched layout or an unknown setting.
    """
    if decode_mask not in ("table", "none"):
        raise ValueError(f"decode_mask must be 'table' or 'none', got {decode_mask!r}")
    sees = "table" if decode_mask == "table" else "all"
    plan = DecodePlan(
        commit, window, window_unit, counts_own, evict, unit, noisy_sees=sees, clean_sees=sees
    )
    _require_flat(layout)
    if commit == "none":
        return ClosureReport(True, [], 0, ["no cache: every row of the schedule is a full forward"])
    seen = dense(table, layout, layout)
    violations = _table_violations(layout, seen, plan)
    offered = _offered(layout, plan)
    violations += _eviction_violations(layout, seen, plan, offered)
    violations += _conditioning(
        layout, seen, clean_is_modulated, cache_per_branch, context_level, commit
    )
    mismatches = _count(layout, seen, plan, offered)
    if mismatches and not violations:
        violations.append(
            f"(c) {mismatches} rows of the decode see another set of keys than in training: "
            f"decode_mask={decode_mask!r}, so the table must be evaluated"
        )
    return ClosureReport(not violations, violations, mismatches, _notes(layout, plan))


def count_mismatches(table: MaskTable, layout: Layout, plan: DecodePlan = DecodePlan()) -> int:
    """Count rows whose decode-visible set differs from their training-visible set.

    Each noisy row counts once (one pass per block), each clean row once (its commit pass); a fused
    plan never runs the clean copy of the last block.

    Args:
        table: Training visibility table.
        layout: Training layout `[tokens]`.
        plan: How the decode runs.

    Returns:
        Number of rows in [0, tokens]; 0 = exact.

    Raises:
        ValueError: Batched layout.
    """
    _require_flat(layout)
    if plan.commit == "none":
        return 0
    return _count(layout, dense(table, layout, layout), plan, _offered(layout, plan))


def free_committable(
    table: MaskTable,
    layout: Layout,
    real: Bool[Tensor, " tokens"],
    *,
    twins: Layout | None = None,
) -> Bool[Tensor, " tokens"]:
    """Find rows of one pass that may be stored as their clean twins without another pass.

    A row qualifies when it was a real token at the input, at level 0, at its twin's position, and
    saw the same set as its twin would, all of it made of qualifying rows (greatest fixed point).

    Args:
        table: Visibility table the pass evaluated.
        layout: Rows of the pass, cached ones included, `[tokens]`.
        real: Rows whose input was a final token (cached rows are).
        twins: The clean row each row would become; None = same attributes, copy CLEAN, level 0.

    Returns:
        True where the row's keys and values may become permanent.

    Raises:
        ValueError: Lengths differ.

    Source: corollary of the equivalence of masked and cached attention; gives the contiguous real
        prefix for WeDLM (arXiv:2512.22737) and Jacobi decoding.
    """
    twins = layout.replace(copy=int(Copy.CLEAN), level=0.0) if twins is None else twins
    if not layout.num_tokens == twins.num_tokens == real.shape[-1]:
        raise ValueError(
            f"layout, twins and real must have one length, got {layout.num_tokens}, "
            f"{twins.num_tokens}, {real.shape[-1]}"
        )
    needed = dense(table, twins, twins)
    same_set = (dense(table, layout, layout) == needed).all(-1)
    same_place = (layout.position == twins.position).all(-1) & (layout.level == twins.level)
    free = real & same_set & same_place & (layout.document >= 0)
    while True:
        kept = free & ~(needed & ~free[None, :]).any(-1)
        if torch.equal(kept, free):
            return free
        free = kept


def needed_window(table: MaskTable, layout: Layout) -> int:
    """Return the smallest cache window, in blocks, that loses no key a row still reads.

    Args:
        table: Training visibility table.
        layout: Training layout `[tokens]`.

    Returns:
        Blocks with the query's own counted; sinks and prompt rows are never evicted and do not
        count.
    """
    _require_flat(layout)
    seen = dense(table, layout, layout)
    evictable = seen & ~_pinned(layout)[None, :] & (layout.block >= 0)[:, None]
    behind = layout.block[:, None] - layout.block[None, :]
    return int(behind[evictable].max().clamp(min=0)) + 1 if bool(evictable.any()) else 1


def is_condition_free(table: MaskTable, layout: Layout) -> bool:
    """Whether no committed row can be reached by a COND row through any number of layers.

    Args:
        table: Training visibility table.
        layout: Training layout `[tokens]`.

    Returns:
        True when one cache may serve all guidance branches, as far as attention is concerned.
    """
    return _is_condition_free(layout, dense(table, layout, layout))


def _is_condition_free(layout: Layout, seen: Tensor) -> bool:
    touched = (layout.role & int(Role.COND)) != 0
    while True:
        grown = touched | (seen & touched[None, :]).any(-1)
        if torch.equal(grown, touched):
            break
        touched = grown
    is_data = (layout.copy == int(Copy.CLEAN)) & (layout.block >= 0)
    return not bool((touched & is_data).any())


def _require_flat(layout: Layout) -> None:
    if layout.is_batched:
        raise ValueError("the closure checker takes a layout [tokens], got [batch, tokens]")


def _pinned(layout: Layout) -> Tensor:
    """Rows no window evicts: static prompt rows and sinks."""
    return (layout.block < 0) | ((layout.role & int(Role.SINK)) != 0)


def _unit(layout: Layout, plan: DecodePlan) -> Tensor:
    """Number of the noisy pass a row belongs to; prompt rows come before all passes."""
    unit = torch.zeros_like(layout.block) if plan.unit == "all" else getattr(layout, plan.unit)
    return torch.where(layout.block < 0, -1, unit)


@dataclass(frozen=True, eq=False)
class _Offered:
    """Per pair: the key is in the cache, or active in the same pass, when the query runs."""

    cached: Bool[Tensor, "rows rows"]
    active: Bool[Tensor, "rows rows"]
    evicted: Bool[Tensor, "rows rows"]
    counted: Bool[Tensor, " rows"]

    @property
    def present(self) -> Tensor:
        return self.cached | self.active


def _offered(layout: Layout, plan: DecodePlan) -> _Offered:
    """Simulate the passes of a plan; nothing here looks at the table."""
    is_real = layout.document >= 0
    same_document = layout.document[:, None] == layout.document[None, :]
    is_static = layout.block < 0
    both_static = is_static[:, None] & is_static[None, :]
    static_past = ~is_static[:, None] & is_static[None, :]
    counted = is_real.clone()
    if plan.commit in ("separate", "fused"):
        cached, active = _two_copy_passes(layout, plan)
        if plan.commit == "fused":
            counted &= ~((layout.copy == int(Copy.CLEAN)) & _is_last_unit(layout, plan))
    else:
        rank = layout.order if plan.commit == "token" else layout.block
        same_copy = layout.copy[:, None] == layout.copy[None, :]
        cached = (rank[None, :] < rank[:, None]) & same_copy
        active = (rank[None, :] == rank[:, None]) & same_copy
    cached = ((cached & ~both_static) | static_past) & same_document & is_real[None, :]
    active = (active | both_static) & same_document & is_real[None, :]
    gone = cached & _outside_window(layout, plan)
    return _Offered(cached & ~gone, active, gone, counted)


def _two_copy_passes(layout: Layout, plan: DecodePlan) -> tuple[Tensor, Tensor]:
    unit = _unit(layout, plan)
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


def _is_last_unit(layout: Layout, plan: DecodePlan) -> Tensor:
    """Rows of the last block of their document: nobody reads their clean copy."""
    unit = _unit(layout, plan)
    same_document = layout.document[:, None] == layout.document[None, :]
    latest = torch.where(same_document, unit[None, :], -1).amax(-1)
    return (unit == latest) & (layout.block >= 0)


def _outside_window(layout: Layout, plan: DecodePlan) -> Tensor:
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
    held = plan.window if plan.counts_own else plan.window + 1
    return (now - rank[None, :] >= held) & ~_pinned(layout)[None, :]


def _count(layout: Layout, seen: Tensor, plan: DecodePlan, offered: _Offered) -> int:
    is_clean = (layout.copy == int(Copy.CLEAN))[:, None]
    earlier = layout.order[None, :] <= layout.order[:, None]

    def decode(mode: str) -> Tensor:
        if mode == "table":
            return seen & offered.present
        return offered.cached | (offered.active & (earlier if mode == "causal" else True))

    got = torch.where(is_clean, decode(plan.clean_sees), decode(plan.noisy_sees))
    return int(((got != seen).any(-1) & offered.counted).sum())


def _table_violations(layout: Layout, seen: Tensor, plan: DecodePlan) -> list[str]:
    """Conditions on the table alone: nothing may be seen that has not been run yet."""
    is_clean = layout.copy == int(Copy.CLEAN)
    is_static = layout.block < 0
    q_clean, k_clean = is_clean[:, None], is_clean[None, :]
    generated = ~is_static[:, None]
    checks = [
        ("(static) prompt rows see generated rows", ~generated & ~is_static[None, :]),
    ]
    if plan.commit in ("token", "block"):
        name = "order" if plan.commit == "token" else "block"
        rank = getattr(layout, name)
        later = generated & (rank[None, :] > rank[:, None])
        mixed = generated & ~is_static[None, :] & (q_clean != k_clean)
        checks += [
            (f"(b) rows see keys with a later {name}, which do not exist yet", later),
            (f"(a) commit={plan.commit!r} runs one copy, rows see another copy", mixed),
        ]
    else:
        unit = _unit(layout, plan)
        past, same = unit[None, :] < unit[:, None], unit[None, :] == unit[:, None]
        checks += [
            ("(a) clean rows see noisy or draft rows", generated & q_clean & ~k_clean),
            (
                "(b) clean rows see later clean blocks",
                generated & q_clean & k_clean & ~(past | same),
            ),
            (
                "(c) noisy rows see clean rows of their own or a later block",
                generated & ~q_clean & k_clean & ~past,
            ),
            (
                "(c) noisy rows see noisy rows of another block",
                generated & ~q_clean & ~k_clean & ~same,
            ),
        ]
    found = [_sentence(layout, text, seen & pairs) for text, pairs in checks]
    found.append(_missing_copy(layout, plan))
    return [sentence for sentence in found if sentence]


def _missing_copy(layout: Layout, plan: DecodePlan) -> str:
    """Two-copy commits need clean rows for every block that is read later."""
    if plan.commit not in ("separate", "fused"):
        return ""
    is_clean = layout.copy == int(Copy.CLEAN)
    noisy = torch.unique(layout.block[~is_clean])
    clean = torch.unique(layout.block[is_clean])
    lacking = [b for b in noisy.tolist()[:-1] if b >= 0 and b not in set(clean.tolist())]
    if len(noisy) and not lacking:
        return ""
    what = f"blocks {lacking[:8]} have no clean copy" if len(noisy) else "there are no noisy rows"
    return (
        f"(b) commit={plan.commit!r} stores the clean copy of each block, but {what}; "
        "use two_copy(layout), or commit 'block' or 'token' for a single copy"
    )


def _eviction_violations(
    layout: Layout, seen: Tensor, plan: DecodePlan, offered: _Offered
) -> list[str]:
    if plan.window is None:
        return []
    lost = seen & offered.evicted & offered.counted[:, None]
    text = (
        f"(c) a key is evicted before its last reader: cache window {plan.window} "
        f"({'own counted' if plan.counts_own else 'own not counted'}"
        f"{', evicting before the fused pass' if plan.evict == 'before' else ''})"
    )
    sentence = _sentence(layout, text, lost)
    return [sentence] if sentence else []


def _conditioning(
    layout: Layout,
    seen: Tensor,
    clean_is_modulated: bool,
    cache_per_branch: bool,
    context_level: float,
    commit: str,
) -> list[str]:
    """Condition (d): what the committed rows were computed from must not change."""
    found = []
    is_clean = (layout.copy == int(Copy.CLEAN)) & (layout.document >= 0) & (layout.block >= 0)
    if commit != "block" and bool((layout.level[is_clean] != context_level).any()):
        found.append(
            f"(d) clean rows carry other noise levels than the context level {context_level}"
        )
    if clean_is_modulated and commit in ("separate", "fused"):
        found.append("(d) clean rows are modulated by noise level or class, which changes per row")
    if not cache_per_branch and not _is_condition_free(layout, seen):
        found.append("(d) committed rows see COND rows, so guidance branches need a cache each")
    return found


def _sentence(layout: Layout, text: str, pairs: Tensor) -> str:
    """Describe offending pairs with one example; empty when there are none."""
    count = int(pairs.sum())
    if not count:
        return ""
    query, key = divmod(int(pairs.flatten().to(torch.uint8).argmax()), layout.num_tokens)

    def name(row: int) -> str:
        copy = Copy(int(layout.copy[row])).name[0]
        return f"{copy} row {row} (block {int(layout.block[row])}, order {int(layout.order[row])})"

    return f"{text}: {count} pairs, e.g. {name(query)} sees {name(key)}"


def _notes(layout: Layout, plan: DecodePlan) -> list[str]:
    num_blocks = len(torch.unique(layout.block[layout.block >= 0]))
    notes = []
    if num_blocks < 4:
        notes.append(f"the layout has {num_blocks} blocks; check one with at least 4 as well")
    if plan.window is not None and plan.window_unit != "order" and num_blocks <= plan.window:
        notes.append(f"the layout has {num_blocks} blocks, so window {plan.window} never evicts")
    if plan.commit == "block":
        notes.append(
            "single copy: exact as a function; whether training saw clean context is a property "
            "of the recipe"
        )
    return notes
