"""The checker: does a cached decode see exactly what the training mask showed?

Everything is decided by evaluating the mask table on a layout's own attributes (at least four
blocks, windows and sinks included), never symbolically. `check_exact` names the violated condition;
`count_mismatches` counts rows whose decode-visible set differs from their training-visible set;
`free_committable` finds what may become permanent without another pass. Knows no network and no
cache object.

Invariants: rows with `block < 0` are a static prompt, run once in one pass and never evicted; a
window counts the query's own block and not the sinks.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool
from torch import Tensor

from .far import is_coarse
from .layout import Copy, Layout, Role
from .masks import MaskTable, dense
from .passes import COMMITS, AdvancePlan, Offered, mismatches, offered, pass_number, pinned

__all__ = [
    "COMMITS",
    "AdvancePlan",
    "ClosureReport",
    "check_exact",
    "count_mismatches",
    "free_committable",
    "is_condition_free",
    "needed_window",
]


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
    routes: Mapping[str, Bool[Tensor, "queries blocks"]] | None = None,
    far: int | None = None,
) -> ClosureReport:
    """Decide whether a cached decode of a layout is exact, and say why not.

    Args:
        table: Training visibility table.
        layout: Training layout `[tokens]` with at least four blocks.
        commit: See `AdvancePlan`.
        window: Cache window; None = nothing is evicted.
        window_unit: See `AdvancePlan`.
        counts_own: See `AdvancePlan`.
        evict: See `AdvancePlan`.
        unit: See `AdvancePlan`.
        decode_mask: `"table"`, or `"none"` for the fast path in which every active row sees
            the whole cache and all active rows of its copy.
        clean_is_modulated: Whether noise level or class condition enters the clean rows.
        cache_per_branch: Whether each guidance branch has a cache of its own.
        context_level: Noise level committed rows are run at.
        routes: Tables that relations of the mask read, as in `MaskTable.visible`.
        far: See `AdvancePlan`.

    Returns:
        The report; `exact` is true exactly when there is no violation.

    Raises:
        ValueError: Batched layout or an unknown setting.
    """
    if decode_mask not in ("table", "none"):
        raise ValueError(f"decode_mask must be 'table' or 'none', got {decode_mask!r}")
    sees = "table" if decode_mask == "table" else "all"
    plan = AdvancePlan(
        commit, window, window_unit, counts_own, evict, unit, noisy_sees=sees, clean_sees=sees,
        far=far,
    )  # fmt: skip
    _require_flat(layout)
    if commit == "none":
        return ClosureReport(True, [], 0, ["no cache: every row of the schedule is a full forward"])
    seen = dense(table, layout, layout, routes=routes)
    violations = _table_violations(layout, seen, plan)
    given = offered(layout, plan)
    violations += _eviction_violations(layout, seen, plan, given)
    violations += _conditioning(
        layout, seen, clean_is_modulated, cache_per_branch, context_level, commit
    )
    count = mismatches(layout, seen, plan, given)
    if count and not violations:
        violations.append(
            f"(c) {count} rows of the decode see another set of keys than in training: "
            f"decode_mask={decode_mask!r}, so the table must be evaluated"
        )
    return ClosureReport(not violations, violations, count, _notes(layout, plan))


def count_mismatches(table: MaskTable, layout: Layout, plan: AdvancePlan | None = None) -> int:
    """Count rows whose decode-visible set differs from their training-visible set.

    Each noisy row counts once (one pass per block), each clean row once (its commit pass); a fused
    plan never runs the clean copy of the last block.

    Args:
        table: Training visibility table.
        layout: Training layout `[tokens]`.
        plan: How the decode runs; None = a clean pass after each block, the table evaluated.

    Returns:
        Number of rows in [0, tokens]; 0 = exact.

    Raises:
        ValueError: Batched layout.
    """
    _require_flat(layout)
    plan = AdvancePlan() if plan is None else plan
    if plan.commit == "none":
        return 0
    return mismatches(layout, dense(table, layout, layout), plan, offered(layout, plan))


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
        count, nor do coarse rows, which no window evicts.
    """
    _require_flat(layout)
    seen = dense(table, layout, layout)
    evictable = seen & ~(pinned(layout) | is_coarse(layout))[None, :] & (layout.block >= 0)[:, None]
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


def _table_violations(layout: Layout, seen: Tensor, plan: AdvancePlan) -> list[str]:
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
        unit = pass_number(layout, plan)
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


def _missing_copy(layout: Layout, plan: AdvancePlan) -> str:
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
    layout: Layout, seen: Tensor, plan: AdvancePlan, given: Offered
) -> list[str]:
    if plan.window is None:
        return []
    lost = seen & given.evicted & given.counted[:, None]
    text = (
        f"(c) a key is evicted before its last reader: cache window {plan.window} "
        f"({'own counted' if plan.counts_own else 'own not counted'}"
        f"{', evicting before the fused pass' if plan.evict == 'before' else ''}"
        f"{'' if plan.far is None else f'; coarse rows {plan.far}'})"
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


def _notes(layout: Layout, plan: AdvancePlan) -> list[str]:
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
