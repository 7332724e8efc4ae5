"""The relation language: every atom against a loop, printing, parsing, tables, routing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockloom.core.layout import Copy, Layout, Role
from blockloom.core.layouts import draft_tree, flat, pack
from blockloom.core.masks import (
    AHEAD,
    ALL,
    EQ,
    IN,
    LE,
    LT,
    NEAR,
    NONE,
    ROUTE,
    K,
    MaskTable,
    Q,
    parse_relation,
)  # fmt: skip

ATOMS = {
    "ALL": (ALL, lambda q, k: True),
    "NONE": (NONE, lambda q, k: False),
    "EQ(group)": (EQ("group"), lambda q, k: k["group"] == q["group"]),
    "LT(block)": (LT("block"), lambda q, k: k["block"] < q["block"]),
    "LE(order)": (LE("order"), lambda q, k: k["order"] <= q["order"]),
    "NEAR(block,2)": (NEAR("block", 2), lambda q, k: q["block"] - k["block"] in (0, 1)),
    "NEAR(block,reach)": (
        NEAR("block", "reach"),
        lambda q, k: q["block"] - k["block"] in range(q["reach"]),
    ),
    "AHEAD(order,3)": (AHEAD("order", 3), lambda q, k: k["order"] - q["order"] in (0, 1, 2)),
    "AHEAD(order,reach)": (
        AHEAD("order", "reach"),
        lambda q, k: k["order"] - q["order"] in range(q["reach"]),
    ),
    "q.KEEP": (Q("KEEP"), lambda q, k: bool(q["role"] & 32)),
    "k.SINK": (K("SINK"), lambda q, k: bool(k["role"] & 4)),
}


def random_layout(seed: int, num_tokens: int = 14) -> Layout:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (num_tokens,), generator=generator)

    return Layout.make(
        num_tokens,
        block=draw(-1, 4).sort().values,
        copy=draw(0, 3),
        order=torch.randperm(num_tokens, generator=generator),
        role=draw(0, 64),
        group=draw(0, 3),
        reach=draw(1, 4),
        document=draw(-1, 2),
    )


def as_dicts(layout: Layout) -> list[dict[str, int]]:
    names = ("block", "copy", "order", "role", "group", "reach", "document", "tree_in", "tree_out")
    columns = [getattr(layout, name).tolist() for name in names]
    return [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]


@pytest.mark.parametrize("text", ATOMS)
def test_atom_equals_its_loop(text):
    relation, predicate = ATOMS[text]
    layout = random_layout(3).replace(document=0, copy=0)
    rows = as_dicts(layout)
    expected = torch.tensor([[predicate(q, k) for k in rows] for q in rows])
    table = MaskTable.of({(Copy.CLEAN, Copy.CLEAN): relation})
    assert torch.equal(table.visible(layout, layout), expected)
    assert str(relation) == text
    assert parse_relation(text) == relation


def test_in_means_ancestor_or_self():
    parents = [-1, 0, 0, 1, 2, -1, 5]
    table = MaskTable.parse({"D->D": "IN"})
    tree = draft_tree(parents)

    def ancestors(node: int) -> set[int]:
        return set() if node < 0 else {node} | ancestors(parents[node])

    expected = torch.tensor([[k in ancestors(q) for k in range(7)] for q in range(7)])
    assert torch.equal(table.visible(tree, tree), expected)


relations = st.recursive(
    st.sampled_from([relation for relation, _ in ATOMS.values()] + [IN, ROUTE("top")]),
    lambda inner: st.one_of(
        st.builds(lambda a, b: a & b, inner, inner),
        st.builds(lambda a, b: a | b, inner, inner),
        st.builds(lambda a: ~a, inner),
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(relation=relations)
def test_printing_and_parsing_are_inverse(relation):
    parsed = parse_relation(str(relation))
    assert parsed == relation
    assert hash(parsed) == hash(relation)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')", "LE(block) and LE(order)", "LE(position)", "NEAR(block)", "LE(block,2)",
        "NEAR(block,0)", "NEAR(block,group)", "x.SINK", "k.BLUE", "LE(", "q.SINK()", "1",
        "LE(block=1)", "NEAR(block, -1)",
    ],
)  # fmt: skip
def test_parsing_refuses_everything_else(text):
    with pytest.raises(ValueError, match=r"does not parse|not allowed|takes|allowed|at least|bad"):
        parse_relation(text)


def test_table_round_trip_and_hash():
    entries = {"C->C": "LE(block)", "N->C": "LT(block)", "N->N": "EQ(block)"}
    table = MaskTable.parse(entries)
    assert table.to_dict() == entries
    assert table == MaskTable.parse(dict(reversed(entries.items())))
    assert len({table, MaskTable.parse(entries)}) == 1
    assert str(table) == "C->C LE(block) ; N->C LT(block) ; N->N EQ(block)"
    with pytest.raises(ValueError, match="'X->Y'"):
        MaskTable.parse({"C->X": "ALL"})


@pytest.mark.parametrize("seed", range(4))
def test_table_selects_by_copy_and_document(seed):
    layout, keys = random_layout(seed), random_layout(seed + 50, 9)
    table = MaskTable.parse({"C->C": "LE(block)", "N->C": "LT(order)", "D->N": "EQ(group)"})
    see = {
        (0, 0): lambda q, k: k["block"] <= q["block"],
        (1, 0): lambda q, k: k["order"] < q["order"],
        (2, 1): lambda q, k: k["group"] == q["group"],
    }

    def expected(q: dict[str, int], k: dict[str, int]) -> bool:
        if q["document"] != k["document"] or k["document"] < 0:
            return False
        return see.get((q["copy"], k["copy"]), lambda q, k: False)(q, k)

    want = torch.tensor([[expected(q, k) for k in as_dicts(keys)] for q in as_dicts(layout)])
    assert torch.equal(table.visible(layout, keys), want)
    batched = table.visible(layout.expand(2), keys)
    assert torch.equal(batched, want.expand(2, *want.shape))


def test_padding_rows_see_only_themselves_in_self_attention():
    layout = pack([flat(2), flat(1)], length=5)
    table = MaskTable.parse({"C->C": "ALL"})
    expected = torch.block_diag(torch.ones(2, 2), *(torch.ones(1, 1) for _ in range(3))).bool()
    assert torch.equal(table.visible(layout, layout), expected)
    wide = layout.expand(2)
    assert torch.equal(table.visible(wide, wide), expected.expand(2, 5, 5))
    assert not table.visible(layout, layout.take(slice(0, 5)))[3:].any()


def test_routes_pick_past_blocks_only():
    layout = flat(6, block_size=2)
    table = MaskTable.parse({"C->C": "LE(block) & ROUTE(top)"})
    route = torch.zeros(6, 3, dtype=torch.bool)
    route[4, 0] = route[5, 1] = True
    seen = table.visible(layout, layout, routes={"top": route})
    assert seen[2].tolist() == [False, False, True, True, False, False]
    assert seen[4].tolist() == [True, True, False, False, True, True]
    assert seen[5].tolist() == [False, False, True, True, True, True]
    assert table.route_names() == {"top"}
    with pytest.raises(ValueError, match="'top' is missing"):
        table.visible(layout, layout)


def test_routes_may_differ_by_batch_and_head():
    layout = flat(4, block_size=2)
    table = MaskTable.parse({"C->C": "LE(block) & ROUTE(top)"})
    route = torch.zeros(2, 3, 4, 2, dtype=torch.bool)
    route[1, 2, 3, 0] = True
    seen = table.visible(layout.expand(2), layout.expand(2), routes={"top": route})
    assert seen.shape == (2, 3, 4, 4)
    assert seen[1, 2, 3].all()
    assert not seen[0, 2, 3, :2].any()
    assert not seen[1, 1, 3, :2].any()
    shared = table.visible(layout, layout, routes={"top": route[1, 2]})
    assert torch.equal(shared, seen[1, 2])


def test_prompt_rows_are_never_routed_away():
    layout = Layout.make(3, block=[-1, 0, 1])
    table = MaskTable.parse({"C->C": "LE(block) & ROUTE(top)"})
    seen = table.visible(layout, layout, routes={"top": torch.zeros(3, 2, dtype=torch.bool)})
    assert seen[2].tolist() == [True, False, True]


def test_role_bits_have_their_documented_values():
    assert [int(role) for role in Role] == [1, 2, 4, 8, 16, 32, 64, 128]
