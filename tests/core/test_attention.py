"""Lowerings: dense, FlexAttention, rectangles and no mask agree; pair counts are exact."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockloom.core.attention import (
    DenseMask,
    FlexMask,
    NoMask,
    Rectangles,
    attend,
    flops,
    lower,
)
from blockloom.core.layout import Layout
from blockloom.core.layouts import flat, grid, pack, prefix, two_copy
from blockloom.core.masks import MaskTable
from blockloom.core.rules import rule

# fp64 sums in another order: a few ulps of values of size one.
TOLERANCE = 1e-12
TABLES = [
    {"C->C": "LE(block)", "N->C": "LT(block)", "N->N": "EQ(block)"},
    {"C->C": "LE(order)", "N->C": "LT(block)", "N->N": "EQ(block) & LE(order)"},
    {"C->C": "LE(order) & (NEAR(order,3) | k.SINK)", "N->N": "NEAR(block,reach)", "N->C": "ALL"},
    {"C->C": "EQ(group) | k.COND", "N->C": "~EQ(group)", "N->N": "AHEAD(order,4)", "C->N": "NONE"},
]


def qkv(layout_q: Layout, layout_k: Layout, batch: int = 2, heads: int = 4, kv_heads: int = 4):
    generator = torch.Generator().manual_seed(7)
    shapes = [(heads, layout_q.num_tokens, 16), *[(kv_heads, layout_k.num_tokens, 16)] * 2]
    return [
        torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    ]


def reference(query, key, value, seen, bias=None):
    """Plain softmax attention, head by head; rows that see nothing give zero."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    if bias is not None:
        scores = scores + bias
    weight = torch.where(seen, scores, -torch.inf).softmax(-1)
    return torch.where(seen.any(-1)[..., None], weight @ value, 0.0)


def random_layout(seed: int, num_tokens: int) -> Layout:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (num_tokens,), generator=generator)

    return Layout.make(
        num_tokens,
        block=draw(-1, 4).sort().values,
        copy=draw(0, 2).sort().values,
        role=draw(0, 64),
        group=draw(0, 3),
        reach=draw(1, 4),
        document=draw(-1, 2).sort().values,
    )


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    entries=st.sampled_from(TABLES),
    num_queries=st.integers(1, 20),
    num_keys=st.integers(1, 24),
    grouped=st.booleans(),
    biased=st.booleans(),
)
def test_all_lowerings_agree(seed, entries, num_queries, num_keys, grouped, biased):
    table = MaskTable.parse(entries)
    q, k = random_layout(seed, num_queries), random_layout(seed + 1, num_keys)
    query, key, value = qkv(q, k, kv_heads=2 if grouped else 4)
    bias = torch.sin(torch.arange(num_queries)[:, None] * 3.0 + torch.arange(num_keys))
    bias = bias.double().expand(1, 4, -1, -1) if biased else None
    seen = table.visible(q, k)
    expected = reference(query, key, value, seen, bias)
    for backend in ("dense", "rectangles", "flex", "auto"):
        lowered = lower(table, q, k, backend=backend)
        assert flops(lowered) == int(seen.sum())
        got = attend(query, key, value, lowered, bias=bias)
        assert got.isfinite().all()
        assert (got - expected).abs().max() < TOLERANCE, backend


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), entries=st.sampled_from(TABLES), num_tokens=st.integers(1, 40))
def test_rectangles_tile_the_mask_exactly(seed, entries, num_tokens):
    layout = random_layout(seed, num_tokens)
    table = MaskTable.parse(entries)
    lowered = lower(table, layout, layout, backend="rectangles")
    painted = torch.zeros(num_tokens, num_tokens, dtype=torch.int64)
    for rect in lowered.rects:
        shape = rect.q_stop - rect.q_start, rect.k_stop - rect.k_start
        patch = torch.ones(shape, dtype=torch.int64)
        if rect.kind == "causal":
            assert shape[0] == shape[1]
            patch = patch.tril()
        painted[rect.q_start : rect.q_stop, rect.k_start : rect.k_stop] += patch
    padding = torch.diag_embed((layout.document < 0).long())
    seen = table.visible(layout, layout).long()
    assert torch.equal(painted, seen - padding * seen.diagonal().diag_embed())


@pytest.mark.parametrize(("length", "block"), [(16, 4), (24, 3), (64, 16), (12, 1)])
def test_two_copy_area_is_length_squared_plus_length_times_block(length, block):
    layout = two_copy(flat(length, block_size=block))
    for backend in ("dense", "rectangles", "flex"):
        lowered = lower(rule("block_diffusion"), layout, layout, backend=backend)
        assert flops(lowered) == length * length + length * block


def test_pair_counts_of_each_form():
    layout = flat(10)
    assert flops(lower(rule("causal"), layout, layout)) == 55
    assert flops(lower(rule("packed"), layout, layout)) == 100
    assert flops(lower(rule("causal"), layout.expand(3), layout)) == 165
    assert flops(lower(rule("sliding_window", window=3, sink=False), layout, layout)) == 27


def test_rectangles_of_known_masks():
    causal = lower(rule("causal"), flat(6), flat(6), backend="rectangles")
    assert causal.rects == ((0, 6, 0, 6, "causal"),)
    layout = two_copy(prefix(flat(4, block_size=2), 1))
    wanted = {
        (0, 1, 0, 1, "full"), (1, 3, 0, 3, "full"), (3, 5, 0, 5, "full"),
        (5, 7, 0, 1, "full"), (5, 7, 5, 7, "full"), (7, 9, 0, 3, "full"), (7, 9, 7, 9, "full"),
    }  # fmt: skip
    assert set(lower(rule("block_diffusion"), layout, layout, backend="rectangles").rects) == wanted
    # A new causal block behind a cache: the shared past is one slice, the tail is causal.
    tokens = flat(9)
    tail = lower(rule("causal"), tokens.take(slice(6, 9)), tokens, backend="rectangles")
    assert tail.rects == ((0, 3, 0, 6, "full"), (0, 3, 6, 9, "causal"))


def test_auto_takes_the_cheapest_form_on_cpu():
    layout = two_copy(flat(16, block_size=4))
    table = rule("block_diffusion")
    assert isinstance(lower(table, layout, layout), DenseMask)
    long = two_copy(flat(128, block_size=32))
    assert isinstance(lower(table, long, long), Rectangles)
    decode = layout.take(slice(20, 24)), layout.take(torch.tensor([0, 1, 2, 3, 20, 21, 22, 23]))
    assert isinstance(lower(table, *decode), NoMask)
    scattered = flat(64)
    assert isinstance(lower(rule("band", width=3, copy="C"), scattered, scattered), DenseMask)


def test_batch_rows_with_one_mask_use_the_cheap_forms_and_others_go_dense():
    table, wide = rule("causal"), flat(5).expand(2)
    assert isinstance(lower(table, wide, wide), Rectangles)
    ragged = wide.replace(document=torch.tensor([[0] * 5, [0, 0, 0, -1, -1]]))
    lowered = lower(table, ragged, ragged)
    assert isinstance(lowered, DenseMask)
    assert flops(lowered) == 15 + 6
    query, key, value = qkv(ragged, ragged)
    seen = table.visible(ragged, ragged)[:, None]
    real = (ragged.document >= 0)[:, None, :, None]
    bias = torch.linspace(-2, 2, 25, dtype=torch.float64).reshape(1, 1, 5, 5)
    for backend in ("dense", "flex"):
        lowered = lower(table, ragged, ragged, backend=backend)
        got = attend(query, key, value, lowered, bias=bias)
        assert (got - reference(query, key, value, seen, bias)).mul(real).abs().max() < TOLERANCE
        assert (got.masked_select(~real) == 0).all()
    with pytest.raises(ValueError, match="'rectangles' needs one mask"):
        lower(table, ragged, ragged, backend="rectangles")


@pytest.mark.parametrize("backend", ["dense", "rectangles", "flex"])
def test_padding_rows_give_zero_not_nan(backend):
    layout = pack([flat(3), flat(2)], length=8)
    lowered = lower(rule("causal"), layout, layout, backend=backend)
    query, key, value = qkv(layout, layout)
    got = attend(query, key, value, lowered)
    assert (got[:, :, 5:] == 0).all()
    assert got[:, :, :5].abs().min() > 0


@pytest.mark.parametrize("backend", ["dense", "rectangles"])
def test_gradients_reach_exactly_the_visible_keys(backend):
    layout = two_copy(grid(2, 4, block=2))
    table = rule("block_diffusion")
    query, key, value = qkv(layout, layout)
    value.requires_grad_()
    lowered = lower(table, layout, layout, backend=backend)
    row = 8 + 5
    attend(query, key, value, lowered)[:, :, row].square().sum().backward()
    touched = (value.grad != 0).any(-1).all(0).all(0)
    assert torch.equal(touched, table.visible(layout, layout)[row])


def test_flex_mask_is_remembered_per_layout_pair():
    layout = two_copy(flat(8, block_size=4))
    table = rule("block_diffusion")
    first = lower(table, layout, layout, backend="flex")
    assert isinstance(first, FlexMask)
    assert lower(table, layout, layout, backend="flex") is first
    other = layout.replace(block=0)
    assert flops(lower(table, other, other, backend="flex")) != flops(first)


def test_routed_masks_lower_densely_with_a_head_axis():
    layout = flat(8, block_size=2)
    table = MaskTable.parse({"C->C": "LE(block) & ROUTE(top)"})
    generator = torch.Generator().manual_seed(1)
    routes = {"top": torch.rand(2, 4, 8, 4, generator=generator) < 0.5}
    query, key, value = qkv(layout, layout)
    lowered = lower(table, layout, layout, routes=routes)
    seen = table.visible(layout, layout, routes=routes)
    difference = attend(query, key, value, lowered) - reference(query, key, value, seen)
    assert difference.abs().max() < TOLERANCE
    with pytest.raises(ValueError, match="'dense' only, got backend 'flex'"):
        lower(table, layout, layout, backend="flex", routes=routes)


def test_errors():
    layout = flat(4)
    with pytest.raises(ValueError, match=r"must be one of.*'cuda'"):
        lower(rule("causal"), layout, layout, backend="cuda")
    with pytest.raises(ValueError, match="'none' needs every pair visible, 6 pairs of 16"):
        lower(rule("causal"), layout, layout, backend="none")
    query, key, value = qkv(layout, layout, heads=4, kv_heads=3)
    with pytest.raises(ValueError, match="multiple of kv_heads, got 4 and 3"):
        attend(query, key, value, NoMask(16))
