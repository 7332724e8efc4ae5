"""Answers frame after frame: regression, aligned numbers, scores that fall period by period."""

import pytest
import torch
from einops import rearrange
from torch.nn import functional

from blockloom.core.errors import UsageError
from blockloom.core.layout import Layout
from blockloom.models.heads import RegressionHead, build_head
from blockloom.models.layers import AlignedAttention, distance_bias, period_features


def test_slopes_and_steps_are_those_of_the_paper():
    rows = Layout.make(61)
    bias = distance_bias(rows.take(slice(60, 61)), rows, 4, decay=1.0, period=30)[0, :, 0]
    slopes = torch.tensor([0.25, 0.0625, 0.015625, 0.00390625])
    assert torch.equal(bias[:, 60 - 29], torch.zeros(4))
    assert torch.equal(bias[:, 60 - 30], -slopes)
    assert torch.equal(bias[:, 60 - 59], -slopes) and torch.equal(bias[:, 0], -2 * slopes)
    linear = distance_bias(rows.take(slice(60, 61)), rows, 4, decay=1.0)[0, :, 0]
    assert torch.equal(linear[:, 60 - 29], -29 * slopes)


def test_places_repeat_after_a_period():
    features = period_features(torch.tensor([-1.0, 0, 1, 29, 30, 31]), 8, 30)
    assert torch.equal(features[0], features[3])
    assert torch.equal(features[1], features[4]) and torch.equal(features[2], features[5])
    assert torch.equal(features[1], torch.tensor([0.0] * 4 + [1.0] * 4).double())
    slow = torch.tensor(1e-4**0.75, dtype=torch.float64)  # the last of four frequencies
    torch.testing.assert_close(features[3, 3], torch.sin(29 * slow))


def test_aligned_attention_is_cross_attention_with_a_diagonal_mask():
    torch.manual_seed(0)
    part = AlignedAttention(16, 5)
    told = torch.randn(2, 7, 5)
    heads = [rearrange(torch.randn(2, 7, 16), "b n (h d) -> b h n d", h=4) for _ in range(2)]
    value = rearrange(part.to_value(told), "b n (h d) -> b h n d", h=4)
    diagonal = torch.eye(7, dtype=torch.bool)
    read = functional.scaled_dot_product_attention(*heads, value, attn_mask=diagonal)
    expected = part.to_out(rearrange(read, "b h n d -> b n (h d)"))
    torch.testing.assert_close(part(told), expected)
    assert float(expected.detach().std()) > 0.05


def test_an_answer_starts_at_zero_and_is_the_mean_after_training():
    head = build_head({"kind": "regression"}, 8, latent_channels=3)
    assert isinstance(head, RegressionHead)
    hidden = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(1))
    target = torch.full((4, 5, 3), 2.0)
    assert not bool(head.sample(hidden, []).values.any())
    assert torch.equal(head.loss(hidden, target), torch.full((4, 5), 4.0))
    with torch.no_grad():
        head.out.weight.normal_(generator=torch.Generator().manual_seed(2))
        head.out.bias.copy_(torch.tensor([1.0, 0.0, -1.0]))
    drawn = head.sample(hidden, [], temperature=3.0)
    assert drawn.stats is None and torch.equal(drawn.values, head.predict(hidden))
    pulled = head.sample(hidden, [], uncond_hidden=0.5 * hidden, guidance_scale=2.0).values
    torch.testing.assert_close(pulled, head.predict(1.5 * hidden))


def test_answers_are_latents():
    with pytest.raises(UsageError, match="needs a tokenizer with latent values"):
        build_head({"kind": "regression"}, 8, codebook_size=7)
