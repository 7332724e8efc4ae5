"""The checker: the published mismatch table, every violated condition, free commits, windows."""

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockloom.core.attention import attend, lower
from blockloom.core.closure import (
    AdvancePlan,
    check_exact,
    count_mismatches,
    free_committable,
    is_condition_free,
    needed_window,
)
from blockloom.core.layout import Layout, Role
from blockloom.core.layouts import flat, frames, grid, pack, prefix, two_copy
from blockloom.core.masks import MaskTable
from blockloom.core.rules import rule

BD3 = rule("block_diffusion")
TABLES = {
    "bd3": BD3,
    "nbdiff": rule("nbdiff"),
    "wedlm": rule("wedlm"),
    "jacobi a": rule("jacobi", draft="N"),
    "jacobi b": rule("jacobi", variant="multi", draft="N"),
    "jacobi c": rule("jacobi", variant="window", draft="N"),
    "leaky": MaskTable.parse(
        {"C->C": "LE(block)", "C->N": "EQ(block)", "N->C": "LT(block)", "N->N": "EQ(block)"}
    ),
    "off by one": MaskTable.parse({"C->C": "LE(block)", "N->C": "LE(block)", "N->N": "EQ(block)"}),
}
BOTH_ALL = AdvancePlan(noisy_sees="all", clean_sees="all")
CAUSAL_COMMIT = AdvancePlan(noisy_sees="all", clean_sees="causal")
BOTH_CAUSAL = AdvancePlan(noisy_sees="causal", clean_sees="causal")
NAIVE_FUSED = AdvancePlan("fused", noisy_sees="all", clean_sees="all")


def fixture_layout() -> Layout:
    layout = two_copy(flat(12, block_size=4))
    return layout.replace(group=layout.block // 2)


@pytest.mark.parametrize(
    ("name", "both_all", "causal_commit", "both_causal", "fused"),
    [
        ("bd3", 0, 9, 18, 0),
        ("nbdiff", 9, 0, 9, 6),
        ("wedlm", 18, 9, 0, 15),
        ("jacobi a", 18, 9, 0, 15),
        ("jacobi c", 19, 10, 4, 16),
        ("leaky", 12, 12, 21, 8),
        ("off by one", 12, 21, 21, 12),
    ],
)
def test_hand_made_masks_mismatch_as_published(name, both_all, causal_commit, both_causal, fused):
    plans = (BOTH_ALL, CAUSAL_COMMIT, BOTH_CAUSAL, NAIVE_FUSED)
    got = [count_mismatches(TABLES[name], fixture_layout(), plan) for plan in plans]
    assert got == [both_all, causal_commit, both_causal, fused]


@pytest.mark.parametrize(("name", "unit"), [("jacobi b", "all"), ("jacobi c", "group")])
def test_whole_window_together_then_causal_commit_is_exact(name, unit):
    plan = AdvancePlan(unit=unit, noisy_sees="causal", clean_sees="causal")
    assert count_mismatches(TABLES[name], fixture_layout(), plan) == 0
    assert check_exact(TABLES[name], fixture_layout(), unit=unit).exact
    assert not check_exact(TABLES[name], fixture_layout()).exact


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("bd3", 0), ("nbdiff", 0), ("wedlm", 0), ("jacobi a", 0),
        ("jacobi c", 4), ("jacobi b", 8), ("leaky", 8), ("off by one", 12),
    ],
)  # fmt: skip
def test_fused_mask_evaluated_from_the_table(name, expected):
    assert count_mismatches(TABLES[name], fixture_layout(), AdvancePlan("fused")) == expected
    report = check_exact(TABLES[name], fixture_layout(), commit="fused")
    assert report.exact == (expected == 0)
    assert report.decode_mismatches == expected


ATOMS = [
    "ALL", "NONE", "EQ(block)", "LT(block)", "LE(block)", "LE(order)", "NEAR(block,2)",
    "AHEAD(order,2)", "EQ(block) & LE(order)", "LT(group)", "~EQ(group)", "k.COND",
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    cells=st.tuples(*[st.sampled_from(ATOMS)] * 3, st.sampled_from(["NONE", "NONE", "EQ(block)"])),
    commit=st.sampled_from(["separate", "fused"]),
    block=st.sampled_from([2, 3, 5]),
)
def test_verdict_names_a_reason_exactly_when_a_row_differs(cells, commit, block):
    """Random tables: the conditions, the vectorised count and the walk over passes agree."""
    table = MaskTable.parse(dict(zip(("C->C", "N->C", "N->N", "C->N"), cells, strict=True)))
    layout = two_copy(prefix(flat(11, block_size=block), 2))
    layout = layout.replace(group=torch.div(layout.block, 2, rounding_mode="floor"))
    report = check_exact(table, layout, commit=commit)
    seen = table.visible(layout, layout)
    missing = walk(layout, commit, lambda row, usable: bool(seen[row, ~usable].any()))
    assert report.decode_mismatches == missing
    assert report.exact == (missing == 0) or commit == "fused"
    if missing:
        assert report.violations


def walk(layout: Layout, commit: str, is_wrong) -> int:
    """Run the passes of a two-copy decode and count rows for which `is_wrong(row, usable)`."""
    cache = torch.zeros(layout.num_tokens, dtype=torch.bool)
    wrong = 0
    for keep, active in passes(layout, commit, num_prompt=int((layout.block < 0).sum())):
        usable = cache.clone()
        usable[active] = True
        wrong += sum(is_wrong(row, usable) for row in active.tolist())
        cache[active[:keep]] = True
    return wrong


EXACT = {
    "image tiles, own commit pass": (BD3, lambda: two_copy(grid(8, 8, block="tile:4x4")), {}),
    "image rows with prompt, fused": (
        BD3, lambda: two_copy(prefix(grid(5, 3, block="row"), 4)), {"commit": "fused"}),
    "random segments after a prompt": (
        rule("causal_fusion"),
        lambda: two_copy(prefix(Layout.make(9, block=[0, 1, 1, 2, 2, 2, 3, 4, 4]), 3)), {}),
    "causal clean stream": (rule("nbdiff"), lambda: two_copy(flat(16, block_size=4)), {}),
    "autoregressive with prompt": (
        rule("causal"), lambda: prefix(grid(4, 4, block="token"), 3), {"commit": "token"}),
    "sliding window by tokens": (
        rule("sliding_window", window=4), lambda: sink_first(flat(12)),
        {"commit": "token", "window": 4}),
    "two blocks back by tokens": (
        rule("block_window_causal"), lambda: flat(12, block_size=3),
        {"commit": "token", "window": 2, "window_unit": "block"}),
    "scales": (
        rule("scales"), lambda: Layout.make(30, block=[0] + [1] * 4 + [2] * 9 + [3] * 16),
        {"commit": "block"}),
    "per-token levels, one copy": (
        rule("block_causal"), lambda: prefix(frames(5, 2, 2).replace(copy=1, level=0.3), 2),
        {"commit": "block"}),
    "frames with window and sink": (
        rule("block_diffusion", window=3, sink=True), lambda: two_copy(sink_first(frames(7, 1, 2))),
        {"window": 3}),
    "the same, fused, evicting after the pass": (
        rule("block_diffusion", window=3, sink=True), lambda: two_copy(sink_first(frames(7, 1, 2))),
        {"window": 3, "commit": "fused"}),
    "one copy with window": (
        rule("block_causal", window=2), lambda: frames(6, 1, 2).replace(copy=1, level=0.3),
        {"window": 2, "commit": "block"}),
    "packed documents": (BD3, lambda: pack(
        [two_copy(flat(8, block_size=2)), two_copy(flat(6, block_size=2))], length=30), {}),
    "no cache": (
        rule("bidirectional"), lambda: flat(8, block_size=2).replace(copy=1), {"commit": "none"}),
}  # fmt: skip


def sink_first(layout: Layout) -> Layout:
    return layout.replace(role=torch.where(layout.block == 0, int(Role.SINK), 0))


@pytest.mark.parametrize("case", EXACT)
def test_exact_recipes_pass(case):
    table, build, options = EXACT[case]
    report = check_exact(table, build(), **options)
    assert report.violations == []
    assert report.exact
    assert report.decode_mismatches == 0


REFUSED = {
    "clean sees noisy": (TABLES["leaky"], lambda: fixture_layout(), {}, r"\(a\) clean rows see"),
    "clean sees the future": (
        MaskTable.parse({"C->C": "ALL", "N->C": "LT(block)", "N->N": "EQ(block)"}),
        lambda: fixture_layout(), {}, r"\(b\) clean rows see later clean blocks: 48 pairs"),
    "noisy sees its own clean copy": (
        TABLES["off by one"], lambda: fixture_layout(), {}, r"\(c\) noisy rows see clean rows"),
    "noisy sees other noisy blocks": (
        rule("staged_window"), lambda: fixture_layout().replace(reach=2), {},
        r"\(c\) noisy rows see noisy rows of another block"),
    "bidirectional, cached by block": (
        rule("bidirectional"), lambda: flat(16, block_size=4).replace(copy=1),
        {"commit": "block"}, r"\(b\) rows see keys with a later block"),
    "bidirectional, cached by token": (
        rule("hybrid_lm", mode="all"), lambda: flat(8), {"commit": "token"},
        r"\(b\) rows see keys with a later order.*28 pairs"),
    "no clean copy to store": (
        rule("bidirectional"), lambda: flat(16, block_size=4).replace(copy=1), {},
        r"blocks \[0, 1, 2\] have no clean copy"),
    "two copies committed by token": (
        BD3, lambda: fixture_layout(), {"commit": "token"}, r"\(a\) commit='token' runs one copy"),
    "segments cut by token commits": (
        rule("segments"), lambda: flat(16, block_size=4), {"commit": "token"},
        r"\(b\) rows see keys with a later order"),
    "window without a windowed mask": (
        BD3, lambda: two_copy(frames(6, 1, 2)), {"window": 3},
        r"\(c\) a key is evicted before its last reader: cache window 3 \(own counted\)"),
    "mask window of past blocks, cache window with own": (
        rule("block_diffusion", window=4), lambda: two_copy(frames(7, 1, 2)), {"window": 3},
        r"\(c\) a key is evicted before its last reader"),
    "cache holds one block more and nobody masks it": (
        rule("block_diffusion", window=3), lambda: two_copy(frames(7, 1, 2)),
        {"window": 3, "counts_own": False, "decode_mask": "none"},
        r"another set of keys than in training"),
    "sink not trained": (
        rule("block_diffusion", window=3), lambda: two_copy(sink_first(frames(7, 1, 2))),
        {"window": 3, "decode_mask": "none"}, r"another set of keys"),
    "fused pass that evicts first": (
        rule("block_diffusion", window=3), lambda: two_copy(frames(7, 1, 2)),
        {"window": 3, "commit": "fused", "evict": "before"}, r"evicting before the fused pass"),
    "window in another unit": (
        rule("sliding_window", window=4, sink=False), lambda: flat(16, block_size=2),
        {"commit": "token", "window": 2, "window_unit": "block"}, r"\(c\) a key is evicted"),
    "causal commit skipped": (
        rule("nbdiff"), lambda: fixture_layout(), {"decode_mask": "none"},
        r"decode_mask='none', so the table must be evaluated"),
    "prompt reads the picture": (
        MaskTable.parse({"C->C": "ALL"}), lambda: prefix(flat(4), 2), {"commit": "token"},
        r"\(static\) prompt rows see generated rows: 8 pairs"),
    "time enters the clean copy": (
        BD3, lambda: fixture_layout(), {"clean_is_modulated": True}, r"\(d\) clean rows are mod"),
    "noise in the clean copy": (
        BD3, lambda: fixture_layout().replace(level=0.2), {}, r"\(d\) .*context level 0.0"),
    "one cache for both branches": (
        BD3, lambda: two_copy(prefix(flat(8, block_size=2), 2)), {"cache_per_branch": False},
        r"\(d\) committed rows see COND rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_inexact_recipes_are_refused_with_the_reason(case):
    table, build, options, message = REFUSED[case]
    report = check_exact(table, build(), **options)
    assert not report.exact
    assert any(re.search(message, sentence) for sentence in report.violations), report.violations


def test_window_counts_own_block():
    """A mask trained on two past blocks plus its own needs exactly window 3."""
    layout = two_copy(frames(8, 1, 2))
    table = rule("block_diffusion", window=3)
    assert needed_window(table, layout) == 3
    verdicts = {w: check_exact(table, layout, window=w).exact for w in (1, 2, 3, 4)}
    assert verdicts == {1: False, 2: False, 3: True, 4: True}
    fast = {
        own: check_exact(table, layout, window=3, counts_own=own, decode_mask="none").exact
        for own in (True, False)
    }
    assert fast == {True: True, False: False}
    assert needed_window(BD3, layout) == 8


def test_condition_free_caches():
    clean = two_copy(flat(8, block_size=2))
    assert is_condition_free(BD3, clean)
    assert check_exact(BD3, clean, cache_per_branch=False).exact
    assert not is_condition_free(BD3, two_copy(prefix(flat(8, block_size=2), 2)))
    blind = MaskTable.parse(
        {"C->C": "LE(block) & ~k.COND | EQ(block)", "N->C": "LT(block)", "N->N": "EQ(block)"}
    )
    assert is_condition_free(blind, two_copy(prefix(flat(8, block_size=2), 2)))


def test_notes_say_what_a_small_layout_cannot_show():
    report = check_exact(rule("block_diffusion", window=3), two_copy(frames(3, 1, 2)), window=3)
    assert any("3 blocks; check one with at least 4" in note for note in report.notes)
    assert any("window 3 never evicts" in note for note in report.notes)
    assert "full forward" in check_exact(BD3, fixture_layout(), commit="none").notes[0]


def pass_rows(num_past: int, window: Layout) -> Layout:
    """Committed clean rows and one active window behind them."""
    return Layout.cat([flat(num_past), window])


@pytest.mark.parametrize(
    ("observed", "expected"),
    [
        ([0, 2], [0]),
        ([0, 1], [0, 1]),
        ([1, 2], []),
        ([0, 1, 3], [0, 1]),
        ([0, 1, 2, 3], [0, 1, 2, 3]),
    ],
)
def test_wedlm_frees_exactly_the_contiguous_real_prefix(observed, expected):
    slots = sorted(range(4), key=lambda slot: (slot not in observed, slot))
    order = torch.empty(4, dtype=torch.int64)
    order[torch.tensor(slots)] = torch.arange(4) + 3
    level = [0.0 if slot in observed else 1.0 for slot in range(4)]
    active = Layout.make(
        4, copy=1, block=9, order=order, source=range(3, 7), position=range(3, 7), level=level
    )
    layout = pass_rows(3, active)
    twins = flat(7)
    real = torch.tensor([True] * 3 + [slot in observed for slot in range(4)])
    free = free_committable(rule("wedlm"), layout, real, twins=twins)
    assert torch.nonzero(free[3:])[:, 0].tolist() == expected
    assert free[:3].all()


def test_jacobi_active_tokens_as_clean_rows():
    layout = flat(7).replace(level=torch.tensor([0.0] * 5 + [1.0, 0.0]))
    real = torch.tensor([True] * 5 + [False, True])
    free = free_committable(rule("causal"), layout, real)
    assert free.tolist() == [True] * 5 + [False, False]


def test_block_diffusion_frees_a_block_only_when_all_of_it_is_real():
    active = Layout.make(4, copy=1, block=1, order=range(4, 8), source=range(4, 8), level=0.0)
    layout = Layout.cat([flat(4, block_size=4), active])
    real = torch.ones(8, dtype=torch.bool)
    assert free_committable(BD3, layout, real).all()
    real[6] = False
    assert free_committable(BD3, layout, real).tolist() == [True] * 4 + [False] * 4
    noisy = layout.replace(level=torch.tensor([0.0] * 4 + [1.0] * 4))
    assert not free_committable(BD3, noisy, torch.ones(8, dtype=torch.bool))[4:].any()


def test_moved_positions_are_never_free():
    layout = flat(4)
    moved = layout.replace(position=torch.tensor([0, 1, 9, 3]))
    free = free_committable(rule("causal"), moved, torch.ones(4, dtype=torch.bool), twins=layout)
    assert free.tolist() == [True, True, False, False]


@pytest.mark.parametrize(
    ("name", "commit", "is_exact"),
    [("bd3", "separate", True), ("nbdiff", "separate", True), ("leaky", "separate", False),
     ("off by one", "separate", False), ("bd3", "fused", True), ("leaky", "fused", False)],
)  # fmt: skip
def test_verdict_agrees_with_numbers(name, commit, is_exact):
    """Two attention layers in fp64: block by block against a growing cache, or all at once."""
    table, layout = TABLES[name], two_copy(prefix(flat(8, block_size=2), 1))
    error = decode_error(table, layout, commit)
    assert check_exact(table, layout, commit=commit).exact == is_exact
    assert (error < 1e-10) if is_exact else (error > 1e-3)


def decode_error(table: MaskTable, layout: Layout, commit: str) -> float:
    """Largest difference of noisy outputs between a cached decode and one masked forward."""
    generator = torch.Generator().manual_seed(5)
    data = torch.randn(layout.num_tokens, 8, generator=generator, dtype=torch.float64)
    weights = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64)

    def layers(hidden, q, keys, cache):
        fresh = []
        for weight, past in zip(weights, cache, strict=True):
            query, key, value = (torch.tanh(hidden @ w)[None, None] for w in weight)
            fresh.append((key, value))
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
            hidden = hidden + attend(query, key, value, lower(table, q, keys))[0, 0]
        return hidden, fresh

    empty = [(torch.zeros(1, 1, 0, 8, dtype=torch.float64),) * 2] * 2
    expected, _ = layers(data, layout, layout, empty)
    cache, stored, error = empty, torch.zeros(0, dtype=torch.int64), 0.0
    for keep, active in passes(layout, commit):
        keys = layout.take(torch.cat([stored, active]))
        got, fresh = layers(data[active], layout.take(active), keys, cache)
        is_noisy = layout.copy[active] == 1
        if is_noisy.any():
            error = max(error, float((got - expected[active])[is_noisy].abs().max()))
        cache = [
            (torch.cat([k, new_k[:, :, :keep]], 2), torch.cat([v, new_v[:, :, :keep]], 2))
            for (k, v), (new_k, new_v) in zip(cache, fresh, strict=True)
        ]
        stored = torch.cat([stored, active[:keep]])
    return error


def passes(layout: Layout, commit: str, num_prompt: int = 1):
    """Yield (rows to keep from the front, active rows) of a two-copy decode."""

    def rows(block: int, copy: int) -> torch.Tensor:
        return torch.nonzero((layout.block == block) & (layout.copy == copy))[:, 0]

    yield num_prompt, rows(-1, 0)
    for block in range(int(layout.block.max()) + 1):
        if commit == "fused":
            before = rows(block - 1, 0) if block else rows(-2, 0)
            yield len(before), torch.cat([before, rows(block, 1)])
        else:
            yield 0, rows(block, 1)
            yield len(rows(block, 0)), rows(block, 0)


def test_errors():
    with pytest.raises(ValueError, match=r"commit must be one of.*'later'"):
        check_exact(BD3, fixture_layout(), commit="later")
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        check_exact(BD3, fixture_layout(), window=0)
    with pytest.raises(ValueError, match="decode_mask must be"):
        check_exact(BD3, fixture_layout(), decode_mask="all")
    with pytest.raises(ValueError, match=r"\[tokens\], got \[batch, tokens\]"):
        count_mismatches(BD3, fixture_layout().expand(2))
    with pytest.raises(ValueError, match="one length, got 24, 24, 3"):
        free_committable(BD3, fixture_layout(), torch.ones(3, dtype=torch.bool))
