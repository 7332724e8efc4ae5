import math

import pytest
import torch

from blockloom.core import sampling
from blockloom.core.errors import UsageError
from blockloom.core.sampling import (
    filter_logits,
    item_generator,
    per_item_gumbel,
    per_item_rand,
    per_item_randn,
    sample_codes,
    token_stats,
)


def streams(*keys, seed=0):
    return [item_generator(seed, key) for key in keys]


def test_item_generator_depends_on_seed_key_and_key_type_only():
    first = torch.rand(4, generator=item_generator(7, 3))
    assert torch.equal(first, torch.rand(4, generator=item_generator(7, 3)))
    others = [item_generator(8, 3), item_generator(7, 4), item_generator(7, "3")]
    for other in others:
        assert not torch.equal(first, torch.rand(4, generator=other))
    # Concatenation must not collide: seed 1 with key "2|3" is not seed 12 with key 3.
    assert item_generator(1, 23).initial_seed() != item_generator(12, 3).initial_seed()
    assert 0 <= item_generator(-5, "x").initial_seed() < 2**63


@pytest.mark.parametrize("draw", [per_item_rand, per_item_randn, per_item_gumbel])
def test_draws_of_an_item_do_not_depend_on_the_batch(draw):
    together = draw((5, 3), streams("a", "b", "c"))
    assert together.shape == (3, 5, 3) and together.dtype == torch.float32
    for i, key in enumerate("abc"):
        assert torch.equal(together[i : i + 1], draw((5, 3), streams(key)))
    reordered = draw((5, 3), streams("c", "a"))
    assert torch.equal(reordered, together[[2, 0]])


def test_gumbel_has_the_right_mean_variance_and_no_infinities():
    noise = per_item_gumbel((200_000,), streams(0)).double()
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772) < 0.01
    assert abs(noise.var().item() - math.pi**2 / 6) < 0.03


def test_temperature_divides_and_zero_keeps_the_first_best():
    logits = torch.tensor([[1.0, 3.0, 3.0, -torch.inf]])
    assert torch.equal(filter_logits(logits, 2.0), logits / 2)
    greedy = filter_logits(logits, 0.0)
    assert greedy.isfinite().tolist() == [[False, True, False, False]]


def test_top_k_and_top_p_keep_the_documented_sets():
    probs = torch.tensor([0.5, 0.25, 0.15, 0.1])
    logits = probs.log()
    kept = lambda **how: filter_logits(logits, **how).isfinite().tolist()  # noqa: E731
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_k=9) == [True] * 4
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.7) == [True, True, False, False]
    assert kept(top_p=0.76) == [True, True, True, False]
    assert kept(top_p=1e-9) == [True, False, False, False]
    assert kept(top_p=1.0) == [True] * 4


def test_filter_order_is_part_of_the_recipe():
    # T = 2 flattens .7/.2/.1 to .52/.28/.20: the nucleus of .85 grows from two codes to three.
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    first = filter_logits(logits, 2.0, top_p=0.85, order=("temperature", "top_p"))
    last = filter_logits(logits, 2.0, top_p=0.85, order=("top_p", "temperature"))
    assert first.isfinite().tolist() == [True, True, True]
    assert last.isfinite().tolist() == [True, True, False]


def test_stats_against_closed_form():
    probs = torch.tensor([[[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]])
    stats = token_stats(probs.log(), torch.tensor([[1, 0]]))
    assert torch.allclose(stats.prob, torch.tensor([[0.25, 1.0]]))
    assert torch.allclose(stats.max_prob, torch.tensor([[0.5, 1.0]]))
    assert torch.allclose(stats.margin, torch.tensor([[0.25, 1.0]]))
    assert torch.allclose(stats.entropy, torch.tensor([[1.5 * math.log(2), 0.0]]), atol=1e-6)


def test_uniform_entropy_is_log_vocab_and_vocabulary_of_one_works():
    assert torch.allclose(
        token_stats(torch.zeros(1, 1, 8), torch.zeros(1, 1, dtype=torch.long)).entropy,
        torch.tensor([[math.log(8)]]),
    )
    codes, stats = sample_codes(torch.zeros(1, 2, 1), streams(0))
    assert codes.tolist() == [[0, 0]] and stats.margin.tolist() == [[1.0, 1.0]]


def test_sampling_follows_the_distribution():
    probs = torch.tensor([0.6, 0.3, 0.1, 0.0])
    logits = probs.log().expand(1, 40_000, 4)
    codes, stats = sample_codes(logits, streams("chi"))
    share = torch.bincount(codes[0], minlength=4) / 40_000
    assert torch.allclose(share, probs, atol=0.01)
    assert share[3] == 0
    assert torch.allclose(stats.prob, probs[codes])


def test_banned_code_is_never_drawn_and_has_no_probability():
    logits = torch.zeros(2, 500, 5)
    logits[..., 4] = 50.0  # the mask id looks overwhelmingly likely
    for temperature in (0.0, 1.0):
        codes, stats = sample_codes(logits, streams(1, 2), temperature, banned_ids=[4])
        assert (codes < 4).all()
        assert torch.allclose(stats.max_prob, torch.full((2, 500), 0.25))


def test_zero_temperature_takes_the_best_and_uses_no_randomness():
    logits = torch.tensor([[[0.0, 2.0, 2.0]]])
    generators = streams(0)
    before = generators[0].get_state()
    codes, stats = sample_codes(logits, generators, 0.0)
    assert codes.tolist() == [[1]]
    assert torch.equal(before, generators[0].get_state())
    assert stats.prob.item() == pytest.approx(logits.softmax(-1)[0, 0, 1].item())


def test_confidence_from_raw_or_filtered():
    logits = torch.tensor([[[0.5, 0.3, 0.2]]]).log()
    raw = sample_codes(logits, streams(0), 1.0, top_k=1)[1]
    filtered = sample_codes(logits, streams(0), 1.0, top_k=1, conf_from="filtered")[1]
    assert raw.prob.item() == pytest.approx(0.5)
    assert filtered.prob.item() == 1.0 and filtered.entropy.item() == 0.0


@pytest.mark.parametrize(
    ("vocab", "temperature", "top_p"), [(7, 1.0, None), (1000, 0.7, 0.9), (65536, 1.0, None)]
)
def test_an_items_codes_and_stats_are_bit_equal_alone_and_in_a_batch(vocab, temperature, top_p):
    tokens = 1 if vocab > 32768 else 17  # one long row is where torch splits a sum over threads
    logits = torch.randn(3, tokens, vocab, generator=torch.Generator().manual_seed(1))
    codes, stats = sample_codes(logits, streams(0, 1, 2), temperature, top_p=top_p)
    for i in range(3):
        alone, alone_stats = sample_codes(logits[i : i + 1], streams(i), temperature, top_p=top_p)
        assert torch.equal(alone[0], codes[i])
        for one, many in zip(alone_stats, stats, strict=True):
            assert torch.equal(one[0], many[i])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x: filter_logits(x, -1.0), "temperature.*-1"),
        (lambda x: filter_logits(x, top_p=0.0), r"top_p.*0\.0"),
        (lambda x: filter_logits(x, top_k=-2), "top_k.*-2"),
        (lambda x: filter_logits(x, order=("topp",)), "topp.*top_p"),
        (lambda x: sample_codes(x, streams(0, 1)), "2.*1"),
        (lambda x: sample_codes(x, streams(0), conf_from="row"), "row.*raw"),
        (lambda x: sample_codes(x, streams(0), banned_ids=[3]), "3.*2"),
    ],
)
def test_errors_name_the_value(call, match):
    with pytest.raises(UsageError, match=match):
        call(torch.zeros(1, 2, 3))


@pytest.mark.parametrize(("uniform", "code"), [(0.0, 1), (0.4999, 1), (0.5, 2), (1 - 2**-53, 2)])
def test_extreme_random_numbers_never_draw_a_code_of_probability_zero(uniform, code, monkeypatch):
    def fixed(shape, generators, device, dtype):
        return torch.full((len(generators), *shape), uniform, dtype=dtype, device=device)

    monkeypatch.setattr(sampling, "per_item_rand", fixed)
    logits = torch.tensor([[[-torch.inf, 0.0, 0.0, -torch.inf]]])
    assert sample_codes(logits, streams(0))[0].item() == code
