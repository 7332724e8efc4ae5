"""Every named rule against a loop predicate, on the attributes its own system would have.

The predicates below are written from the systems' descriptions over plain dictionaries; they never
call the relation language.
"""

from collections.abc import Callable

import pytest
import torch

from blockloom.core.layout import Copy, Layout, Role
from blockloom.core.layouts import (
    draft_tree,
    flat,
    frames,
    grid,
    lookahead_blocks,
    pack,
    prefix,
    rearrange_spans,
    two_copy,
)
from blockloom.core.masks import MaskTable
from blockloom.core.rules import RULES, rule

Row = dict[str, int]
C, N, D = 0, 1, 2
PROMPT, TEXT, SINK, COND, LAST, KEEP = 1, 2, 4, 8, 16, 32


def twin_layout() -> Layout:
    """Twelve tokens in blocks of two after a prompt, clean and noisy, windows of two blocks."""
    layout = two_copy(prefix(flat(12, block_size=2), 2))
    return layout.replace(group=torch.div(layout.block, 2, rounding_mode="floor"))


def shuffled_layout() -> Layout:
    """Noisy rows whose compute order differs from their place (observed slots first)."""
    layout = twin_layout()
    order = layout.order.clone()
    noisy = torch.nonzero(layout.copy == N)[:, 0]
    order[noisy] = order[noisy].reshape(-1, 2).flip(1).flatten()
    return layout.replace(order=order)


def draft_layout() -> Layout:
    layout = twin_layout()
    return layout.replace(copy=torch.where(layout.copy == N, D, layout.copy))


def sinks(layout: Layout) -> Layout:
    """Block 0 and the prompt are sinks."""
    return layout.replace(role=torch.where(layout.block <= 0, layout.role | SINK, layout.role))


def noisy_frames() -> Layout:
    return frames(4, 1, 3).replace(copy=N, level=1.0)


def roles(layout: Layout, every: int, bit: int) -> Layout:
    is_hit = torch.arange(layout.num_tokens) % every == every - 1
    return layout.replace(role=torch.where(is_hit, layout.role | bit, layout.role))


def rearranged() -> Layout:
    text = flat(3).replace(role=TEXT, source=-1)
    return rearrange_spans(Layout.cat([text, flat(8)]), [(1, 3), (5, 6)])


def tree_layout() -> Layout:
    return Layout.cat([flat(3), draft_tree([-1, 0, 0, 2, -1])])


def staged() -> Layout:
    """Six blocks in flight: earlier blocks are at later stages, which reach fewer blocks back."""
    layout = two_copy(flat(12, block_size=2))
    return layout.replace(reach=torch.tensor([2, 3, 4, 5, 5, 5])[layout.block])


def permuted() -> Layout:
    """The published BAD example: perm = [2, 0, 3, 1], masked = {1, 3}, order = -perm."""
    return Layout.make(4, order=[-2, 0, -3, -1], copy=[C, N, C, N])


def rolling() -> Layout:
    """Clean blocks 0-3; blocks 2-4 are in flight together, their window starts at block 2."""
    clean = flat(8, block_size=2)
    clean = clean.replace(group=clean.block)
    flying = flat(10, block_size=2).take(slice(4, 10)).replace(copy=N, level=0.5, group=2)
    return Layout.cat([clean, flying])


def conditions() -> Layout:
    """Two reference pictures as conditions, then a picture."""
    refs = Layout.make(4, group=[0, 0, 1, 1], role=COND, source=-1, block=-1)
    return Layout.cat([refs, flat(4).replace(copy=N, block=0)])


def by_copy(**cells: Callable[[Row, Row], bool]) -> Callable[[Row, Row], bool]:
    """Choose the predicate by the letters of query and key copy; missing cells are hidden."""
    return lambda q, k: cells.get("CND"[q["copy"]] + "CND"[k["copy"]], lambda q, k: False)(q, k)


def order_before(q: Row, k: Row) -> bool:
    return not k["order"] > q["order"]


def block_past(q: Row, k: Row) -> bool:
    return k["block"] < q["block"]


def block_upto(q: Row, k: Row) -> bool:
    return k["block"] < q["block"] or k["block"] == q["block"]


def same_block(q: Row, k: Row) -> bool:
    return k["block"] == q["block"]


def everything(q: Row, k: Row) -> bool:
    return True


def blocks_back(q: Row, k: Row) -> int:
    return q["block"] - k["block"]


def near_or_sink(q: Row, k: Row) -> bool:
    """Own block and the two before it, or a sink."""
    return blocks_back(q, k) in (0, 1, 2) or bool(k["role"] & SINK)


def below(q: Row, k: Row) -> bool:
    return k["group"] <= q["group"]


def upto_and_below(q: Row, k: Row) -> bool:
    return block_upto(q, k) and below(q, k)


def past_and_below(q: Row, k: Row) -> bool:
    return block_past(q, k) and below(q, k)


def same_group(q: Row, k: Row) -> bool:
    return q["group"] == k["group"]


def text_is_blind(q: Row, k: Row) -> bool:
    return not (q["role"] & TEXT and not k["role"] & TEXT)


BD3 = {"CC": block_upto, "NC": block_past, "NN": same_block}
CASES: dict[str, tuple[str, dict, Callable[[], Layout], Callable[[Row, Row], bool]]] = {
    "ar": ("causal", {}, lambda: prefix(flat(6), 2), by_copy(CC=order_before)),
    "ar window": (
        "causal", {"window": 3, "sink": True}, lambda: sinks(flat(8)),
        by_copy(CC=lambda q, k: q["order"] - k["order"] in (0, 1, 2)
                or (order_before(q, k) and bool(k["role"] & SINK))),
    ),
    "wedlm": (
        "wedlm", {}, shuffled_layout,
        by_copy(CC=order_before, NC=block_past,
                NN=lambda q, k: same_block(q, k) and order_before(q, k)),
    ),
    "wedlm decode window": (
        "wedlm_window", {},
        lambda: Layout.cat([flat(5), Layout.make(
            4, copy=N, block=99, order=[5, 7, 6, 8], level=[0.0, 1.0, 0.0, 1.0])]),
        by_copy(CC=order_before, NC=everything, NN=order_before),
    ),
    "rearranged": ("rearranged_spans", {}, rearranged, by_copy(CC=order_before)),
    "text tower": (
        "text_tower", {"base": "packed"}, rearranged, by_copy(CC=text_is_blind),
    ),
    "masked": (
        "bidirectional", {}, lambda: prefix(flat(5).replace(copy=N, level=1.0), 2),
        by_copy(CC=everything, NC=everything, NN=everything),
    ),
    "scales": (
        "scales", {}, lambda: Layout.make(14, block=[0] + [1] * 4 + [2] * 9),
        by_copy(CC=block_upto),
    ),
    "prefix lm": (
        "prefix_lm", {}, lambda: Layout.make(7, block=[0, 0, 0, 1, 2, 3, 4]),
        by_copy(CC=block_upto),
    ),
    "careless whisper": (
        "segments", {}, lambda: lookahead_blocks(8, block_size=2, extra=1),
        lambda q, k: k["order"] < 2 * max(q["order"] // 2 + 1, 2),
    ),
    "u2": (
        "block_prefix", {"left_blocks": 1}, lambda: flat(8, block_size=2),
        lambda q, k: (q["order"] // 2 - 1) * 2 <= k["order"] < (q["order"] // 2 + 1) * 2,
    ),
    "bd3": ("block_diffusion", {}, twin_layout, by_copy(**BD3)),
    "acdit tiles": (
        "block_diffusion", {}, lambda: two_copy(grid(4, 4, block="tile:2x2")), by_copy(**BD3),
    ),
    "bd3 window sink": (
        "block_diffusion", {"window": 3, "sink": True}, lambda: sinks(twin_layout()),
        by_copy(CC=lambda q, k: block_upto(q, k) and near_or_sink(q, k),
                NC=lambda q, k: block_past(q, k) and near_or_sink(q, k), NN=same_block),
    ),
    "causal fusion": (
        "causal_fusion", {},
        lambda: two_copy(prefix(Layout.make(6, block=[0, 1, 1, 1, 2, 2]), 3)), by_copy(**BD3),
    ),
    "nbdiff": (
        "nbdiff", {}, twin_layout, by_copy(CC=order_before, NC=block_past, NN=same_block),
    ),
    "jacobi a": (
        "jacobi", {}, draft_layout,
        by_copy(CC=order_before, DC=block_past,
                DD=lambda q, k: same_block(q, k) and order_before(q, k)),
    ),
    "jacobi b": (
        "jacobi", {"variant": "multi"}, draft_layout,
        by_copy(CC=order_before, DC=lambda q, k: bool(k["role"] & COND), DD=order_before),
    ),
    "jacobi c": (
        "jacobi", {"variant": "window"}, draft_layout,
        by_copy(CC=order_before,
                DC=lambda q, k: k["block"] // 2 < q["block"] // 2 or bool(k["role"] & COND),
                DD=lambda q, k: k["block"] // 2 == q["block"] // 2 and order_before(q, k)),
    ),
    "diffusion forcing": (
        "block_causal", {}, lambda: prefix(noisy_frames(), 2),
        by_copy(CC=block_upto, NC=block_upto, NN=block_upto),
    ),
    "block causal window": (
        "block_causal", {"window": 2}, noisy_frames,
        by_copy(NN=lambda q, k: blocks_back(q, k) in (0, 1)),
    ),
    "rolling forcing": (
        "rolling_window", {}, rolling,
        by_copy(CC=block_upto, NC=lambda q, k: k["block"] < 2, NN=everything),
    ),
    "sandai magi": (
        "staged_window", {}, staged,
        by_copy(CC=same_block,
                NC=lambda q, k: 0 < blocks_back(q, k) < q["reach"],
                NN=lambda q, k: 0 <= blocks_back(q, k) < q["reach"]),
    ),
    "draft tree": (
        "draft_tree", {}, tree_layout,
        by_copy(CC=order_before, DC=everything,
                DD=lambda q, k: (q["row"] - 3, k["row"] - 3) in {
                    (0, 0), (1, 1), (1, 0), (2, 2), (2, 0), (3, 3), (3, 2), (3, 0), (4, 4)}),
    ),
    "mtla": (
        "merged_latents", {}, lambda: roles(flat(9), 3, LAST),
        lambda q, k: k["row"] == q["row"] or (k["row"] < q["row"] and k["row"] % 3 == 2),
    ),
    "lex": (
        "block_window_causal", {}, lambda: flat(9, block_size=3),
        lambda q, k: k["row"] <= q["row"] and q["row"] // 3 - k["row"] // 3 <= 1,
    ),
    "sliding window": (
        "sliding_window", {"window": 2}, lambda: sinks(flat(8)),
        lambda q, k: k["row"] <= q["row"] and (q["row"] - k["row"] < 2 or k["row"] == 0),
    ),
    "sparse drop": (
        "sparse_drop", {}, lambda: roles(flat(9), 2, KEEP),
        lambda q, k: k["row"] <= q["row"] and q["row"] % 2 == 1 and k["row"] % 2 == 1,
    ),
    "sparse hash": (
        "sparse_hash", {}, lambda: flat(9).replace(group=torch.arange(9) * 5 % 3),
        lambda q, k: k["row"] <= q["row"] and (q["row"] - k["row"]) % 3 == 0,
    ),
    "striped": (
        "striped", {}, lambda: flat(8).take(torch.arange(8).reshape(2, 4).T.flatten()),
        lambda q, k: k["source"] <= q["source"],
    ),
    "gpt-bert causal": ("hybrid_lm", {}, lambda: flat(5), lambda q, k: k["row"] <= q["row"]),
    "gpt-bert all": ("hybrid_lm", {"mode": "all"}, lambda: flat(5), everything),
    "window attention": (
        "window_attention", {}, lambda: noisy_frames().replace(group=torch.arange(12) % 2),
        lambda q, k: (q["row"] - k["row"]) % 2 == 0,
    ),
    "temporal axis": (
        "temporal_axis", {}, noisy_frames,
        lambda q, k: (q["row"] - k["row"]) % 3 == 0 and k["row"] <= q["row"],
    ),
    "easy control": (
        "condition_star", {}, conditions,
        by_copy(CC=same_group, NC=everything, NN=everything),
    ),
    "bad": (
        "hybrid_permuted", {}, permuted,
        by_copy(CC=everything, CN=everything, NC=everything, NN=order_before),
    ),
    "magnet": (
        "band", {"width": 6}, lambda: flat(15).replace(copy=N),
        lambda q, k: abs(q["row"] - k["row"]) <= 5,
    ),
    "vidlada": (
        "band", {"attribute": "block", "width": 2}, noisy_frames,
        lambda q, k: abs(q["row"] // 3 - k["row"] // 3) <= 1,
    ),
    "megabyte global": ("causal", {}, lambda: flat(4), lambda q, k: k["row"] <= q["row"]),
    "megabyte local": (
        "local_causal", {}, lambda: flat(9).replace(group=torch.arange(9) // 3),
        lambda q, k: k["row"] <= q["row"] and k["row"] // 3 == q["row"] // 3,
    ),
    "ancat": (
        "lookahead", {}, lambda: flat(6).replace(reach=torch.tensor([1, 3, 1, 2, 1, 1])),
        lambda q, k: k["row"] <= q["row"] + [0, 2, 0, 1, 0, 0][q["row"]],
    ),
    "momask": (
        "level_stages", {}, lambda: two_copy(frames(3, 1, 3)),
        by_copy(
            CC=upto_and_below, NC=past_and_below,
            NN=lambda q, k: same_block(q, k) and below(q, k),
        ),
    ),
    "momask window": (
        "level_stages", {"window": 2}, lambda: two_copy(frames(4, 1, 2)),
        by_copy(
            CC=lambda q, k: upto_and_below(q, k) and q["block"] - k["block"] < 2,
            NC=lambda q, k: past_and_below(q, k) and q["block"] - k["block"] < 2,
            NN=lambda q, k: same_block(q, k) and below(q, k),
        ),
    ),
    "mogo": (
        "level_stacks", {}, lambda: two_copy(frames(3, 1, 3)),
        by_copy(
            CC=upto_and_below, NC=past_and_below,
            NN=lambda q, k: same_block(q, k) and same_group(q, k),
        ),
    ),
    "packed": (
        "packed", {}, lambda: pack([flat(3), flat(2), flat(4)]),
        lambda q, k: q["document"] == k["document"],
    ),
}  # fmt: skip


def rows_of(layout: Layout) -> list[Row]:
    names = ("block", "copy", "order", "role", "group", "reach", "document", "source")
    columns = [getattr(layout, name).tolist() for name in names]
    rows = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    return [row | {"row": number} for number, row in enumerate(rows)]


@pytest.mark.parametrize("case", CASES)
def test_rule_equals_its_loop(case):
    name, params, build, predicate = CASES[case]
    layout = build()
    rows = rows_of(layout)
    expected = torch.tensor([[bool(predicate(q, k)) for k in rows] for q in rows])
    assert torch.equal(rule(name, **params).visible(layout, layout), expected)
    assert expected.any()


def test_routed_rule_reads_the_table_for_past_blocks():
    layout = two_copy(flat(8, block_size=2))
    generator = torch.Generator().manual_seed(0)
    route = torch.rand(16, 4, generator=generator) < 0.5
    seen = rule("routed_block_diffusion").visible(layout, layout, routes={"past": route})
    rows = rows_of(layout)
    see = by_copy(
        CC=block_upto,
        NC=lambda q, k: block_past(q, k) and bool(route[q["row"], k["block"]]),
        NN=same_block,
    )
    assert torch.equal(seen, torch.tensor([[see(q, k) for k in rows] for q in rows]))


def test_every_rule_is_covered_and_prints():
    covered = {name for name, *_ in CASES.values()} | {"routed_block_diffusion", "turns"}
    assert set(RULES) <= covered
    for name in RULES:
        table = rule(name, **({"window": 4} if name == "sliding_window" else {}))
        assert MaskTable.parse(table.to_dict()) == table


def test_published_bad_rows():
    layout = permuted()
    seen = rule("hybrid_permuted").visible(layout, layout).int().tolist()
    assert seen == [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [1, 0, 1, 1]]
    shut = rule("hybrid_permuted", known_see_masked=False).visible(layout, layout).int().tolist()
    assert [shut[0], shut[2]] == [[1, 0, 1, 0], [1, 0, 1, 0]]


def test_published_streaming_rows():
    layout = lookahead_blocks(8, block_size=2, extra=1)
    assert rule("segments").visible(layout, layout).sum(-1).tolist() == [4] * 4 + [6] * 2 + [8] * 2
    chunked = flat(8, block_size=2)
    u2 = rule("block_prefix", left_blocks=1).visible(chunked, chunked)
    first = u2.int().argmax(-1).tolist()
    assert first == [0, 0, 0, 0, 2, 2, 4, 4]
    assert u2.sum(-1).tolist() == [2, 2] + [4] * 6


def test_prompt_sees_prompt_only():
    layout = two_copy(prefix(flat(4, block_size=2), 2))
    seen = rule("block_diffusion").visible(layout, layout)
    assert seen[:2].int().tolist() == [[1, 1] + [0] * 8] * 2
    assert seen[2:, :2].all()


def test_sink_is_role_not_copy():
    assert int(Role.SINK) == SINK
    assert int(Copy.DRAFT) == D
    assert PROMPT == int(Role.PROMPT)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("causel", {}, "must be one of.*'causal'"),
        ("causal", {"windw": 3}, "'causal'.*windw"),
        ("jacobi", {"variant": "d"}, "jacobi variant.*'d'"),
        ("hybrid_lm", {"mode": "x"}, "hybrid_lm mode"),
        ("causal", {"window": 0}, "at least 1, got 0"),
    ],
)
def test_errors(name, params, message):
    with pytest.raises(ValueError, match=message):
        rule(name, **params)
