"""Row-stable linear maps: the bits of a row must not depend on its neighbours."""

import pytest
import torch
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from blockloom.core.numerics import (
    RowStableActivation,
    RowStableLinear,
    differentiable_attention,
    item_stable_attention,
    row_stable_linear,
)


def _layer_and_rows(dtype: torch.dtype, features: int, out: int, num_rows: int = 64):
    generator = torch.Generator().manual_seed(features * 1000 + out)
    layer = RowStableLinear(features, out, dtype=dtype).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.randn(out, features, generator=generator, dtype=dtype))
        layer.bias.copy_(torch.randn(out, generator=generator, dtype=dtype))
    return layer, torch.randn(num_rows, features, generator=generator, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("features", "out"), [(3, 5), (16, 1), (33, 100), (64, 64), (192, 576)])
def test_rows_are_bit_equal_for_every_row_count(dtype, features, out):
    layer, rows = _layer_and_rows(dtype, features, out)
    with torch.no_grad():
        full = layer(rows)
        for count in range(1, 21):
            assert torch.equal(layer(rows[:count]), full[:count]), count


def test_leading_axes_and_values_match_plain_linear():
    layer, rows = _layer_and_rows(torch.float64, 7, 4, 30)
    x = rows.reshape(2, 3, 5, 7)
    with torch.no_grad():
        got = layer(x)
    torch.testing.assert_close(got, functional.linear(x, layer.weight, layer.bias).detach())
    assert got.shape == (2, 3, 5, 4)


def test_training_uses_the_plain_map_and_has_gradients():
    layer, rows = _layer_and_rows(torch.float32, 6, 3, 5)
    layer.train()
    layer(rows).sum().backward()
    torch.testing.assert_close(layer.weight.grad, rows.sum(0).expand(3, 6))
    assert torch.equal(layer.bias.grad, torch.full((3,), 5.0))


def test_no_bias_and_no_rows():
    weight = torch.arange(6.0).reshape(2, 3)
    with torch.no_grad():
        got = row_stable_linear(torch.ones(1, 3), weight)
        assert got.tolist() == [[3.0, 12.0]]
        assert row_stable_linear(torch.ones(0, 3), weight).shape == (0, 2)


@pytest.mark.parametrize("kind", ["silu", "gelu", "sigmoid"])
@pytest.mark.parametrize("width", [3, 16, 48, 192])
def test_activation_rows_are_bit_equal_and_right(kind, width):
    plain = {
        "silu": functional.silu,
        "gelu": lambda x: functional.gelu(x, approximate="tanh"),
        "sigmoid": torch.sigmoid,
    }[kind]
    rows = torch.randn(300, width, generator=torch.Generator().manual_seed(width))
    activate = RowStableActivation(kind)
    with torch.no_grad():
        full = activate(rows)
        torch.testing.assert_close(full, plain(rows))
        for count in range(1, 300, 7):
            assert torch.equal(activate(rows[:count]), full[:count]), count
    rows.requires_grad_()
    activate(rows).sum().backward()
    assert rows.grad.isfinite().all()


def test_attention_of_an_item_does_not_depend_on_its_neighbours_with_two_threads():
    # One query, twelve keys, four heads: the kernel gives a lone item's heads to both threads.
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for heads, keys, dim in ((4, 12, 16), (4, 9, 12), (2, 31, 20)):
            generator = torch.Generator().manual_seed(keys)
            query = torch.randn(5, heads, 1, dim, generator=generator)
            key = torch.randn(5, heads, keys, dim, generator=generator)
            value = torch.randn(5, heads, keys, dim, generator=generator)
            mask = torch.rand(5, 1, 1, keys, generator=generator) > 0.3
            with torch.no_grad():
                for chosen in (None, mask):
                    together = item_stable_attention(query, key, value, chosen)
                    for item in range(5):
                        own = slice(item, item + 1)
                        alone = item_stable_attention(
                            query[own], key[own], value[own], None if chosen is None else mask[own]
                        )
                        assert torch.equal(together[own], alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", ["none", "bool", "bias", "causal"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attention_by_its_definition_equals_the_kernel(kind, kv_heads):
    rng = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=rng, dtype=torch.float64)
    key, value = (
        torch.randn(2, kv_heads, 7, 8, generator=rng, dtype=torch.float64) for _ in range(2)
    )
    visible = torch.rand(5, 7, generator=rng) < 0.7
    visible[:, 0] = True
    mask = {
        "none": None,
        "bool": visible,
        "bias": torch.randn(5, 7, generator=rng, dtype=torch.float64),
        "causal": causal_lower_right(5, 7),
    }[kind]
    usual = item_stable_attention(query, key, value, mask)
    with differentiable_attention():
        plain = item_stable_attention(query, key, value, mask)
        _, change = torch.func.jvp(
            lambda q: item_stable_attention(q, key, value, mask), (query,), (query.cos(),)
        )
    assert (plain - usual).abs().max() < 1e-12
    step = 1e-6
    ends = [item_stable_attention(query + h * query.cos(), key, value, mask) for h in (step, -step)]
    assert (change - (ends[0] - ends[1]) / (2 * step)).abs().max() < 1e-8
    assert torch.equal(item_stable_attention(query, key, value, mask), usual)
