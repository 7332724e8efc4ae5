import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockloom.core import accept
from blockloom.core.errors import UsageError
from blockloom.core.sampling import TokenStats, item_generator


def row(*values):
    return torch.tensor([values], dtype=torch.float32)


def slots(accepted):
    return accepted[0].nonzero()[:, 0].tolist()


ALL5 = torch.ones(1, 5, dtype=torch.bool)


def test_top_n_is_exact_under_ties_and_ignores_revealed_slots():
    score = row(0.5, 0.5, 0.5, 0.9, 1.0)
    masked = torch.tensor([[True, True, True, True, False]])
    assert slots(accept.accept_top_n(score, masked, 1)) == [3]
    assert slots(accept.accept_top_n(score, masked, 2)) == [0, 3]
    assert slots(accept.accept_top_n(score, masked, 9)) == [0, 1, 2, 3]
    assert slots(accept.accept_top_n(score, masked, 0)) == [3]  # progress


def test_top_n_chooses_masked_slots_even_when_their_score_is_minus_infinity_or_nan():
    score = row(-math.inf, 1.0, math.nan, 2.0, 3.0)
    masked = torch.tensor([[True, False, True, False, False]])
    assert slots(accept.accept_top_n(score, masked, 2)) == [0, 2]


def test_counts_may_differ_per_item():
    score = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    masked = torch.ones(2, 3, dtype=torch.bool)
    accepted = accept.accept_top_n(score, masked, torch.tensor([1, 2]))
    assert accepted.tolist() == [[False, False, True], [True, True, False]]


def test_threshold_takes_the_set_or_the_best_one():
    assert slots(accept.accept_threshold(row(0.95, 0.2, 0.9, 0.89, 0.1), ALL5, 0.9)) == [0, 2]
    assert slots(accept.accept_threshold(row(0.1, 0.2, 0.5, 0.4, 0.3), ALL5, 0.9)) == [2]


def test_quota_is_the_larger_of_both_sets():
    confidence = row(0.97, 0.2, 0.96, 0.8, 0.1)
    assert slots(accept.accept_quota(confidence, ALL5, 0.95, 1)) == [0, 2]
    assert slots(accept.accept_quota(confidence, ALL5, 0.95, 3)) == [0, 2, 3]


@pytest.mark.parametrize(("gamma", "count"), [(0, 1), (0.01, 2), (0.03, 3), (0.1, 4), (0.5, 5)])
def test_entropy_budget_fixture(gamma, count):
    entropy = row(0.9, 0.01, 0.3, 0.05, 0.02)
    accepted = accept.accept_entropy_budget(-entropy, entropy, ALL5, gamma)
    assert slots(accepted) == sorted(entropy[0].argsort()[:count].tolist())


def test_entropy_budget_follows_its_score_not_the_entropy():
    entropy = row(0.9, 0.01, 0.3, 0.05, 0.02)
    raster = -torch.arange(5.0)[None]
    # Slot 0 first: sums minus maxima are 0, .01, .31, .36, .38
    assert slots(accept.accept_entropy_budget(raster, entropy, ALL5, 0.35)) == [0, 1, 2]


def test_factor_rule_fixture_and_progress():
    confidence = row(0.5, 0.99, 0.95, 0.97, 0.8)
    assert slots(accept.accept_factor(confidence, ALL5, 1.0)) == [1, 2, 3, 4]
    assert slots(accept.accept_factor(row(0.1, 0.2, 0.1, 0.1, 0.1), ALL5, 1.0)) == [1]
    masked = torch.tensor([[True, False, False, False, True]])
    assert slots(accept.accept_factor(row(1, 1, 1, 1, 1), masked, 1.0)) == [0, 4]


def test_confident_prefix_stops_at_the_first_unsure_slot():
    confidence = row(0.95, 0.99, 0.5, 0.99, 0.99)
    assert slots(accept.accept_confident_prefix(confidence, ALL5, 0.9)) == [0, 1]
    assert slots(accept.accept_confident_prefix(row(0.1, 1, 1, 1, 1), ALL5, 0.9)) == [0]
    masked = torch.tensor([[False, True, False, True, True]])
    assert slots(accept.accept_confident_prefix(confidence, masked, 0.9)) == [1, 3, 4]
    backwards = torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0])
    assert slots(accept.accept_confident_prefix(confidence, ALL5, 0.9, backwards)) == [3, 4]


@pytest.mark.parametrize(("weight", "expected"), [(0.1, [0, 2]), (0.02, [0, 2, 4])])
def test_wedlm_fixture(weight, expected):
    entropy = row(0.1, 0.5, 0.05, 0.39, 0.2)
    accepted = accept.accept_low_entropy(entropy, ALL5, 0.4, distance_weight=weight)
    assert slots(accepted) == expected


def test_distance_counts_from_the_first_mask():
    masked = torch.tensor([[False, False, True, True, False]])
    assert accept.distance_entropy(row(0, 0, 0, 0, 0), masked, 0.5).tolist() == [[0, 0, 0, 0.5, 1]]
    assert slots(accept.accept_low_entropy(row(0, 0, 9, 8, 0), masked, 0.4)) == [3]


def test_longest_match_and_rejection():
    draft = torch.tensor([[1, 2, 3, 4], [5, 2, 3, 4]])
    target = torch.tensor([[1, 2, 0, 4], [1, 2, 3, 4]])
    assert accept.longest_match(draft, target).tolist() == [2, 0]
    assert accept.longest_match(draft, draft).tolist() == [4, 4]
    q, p = row(0.5, 0.5, 0.5), row(0.6, 0.1, 0.5)
    assert accept.accept_rejection(q, p, row(0.99, 0.1, 0.9)).tolist() == [3]
    assert accept.accept_rejection(q, p, row(0.99, 0.5, 0.0)).tolist() == [1]


def test_rejection_accepts_with_probability_p_over_q():
    uniform = torch.rand(20_000, 1, generator=torch.Generator().manual_seed(0))
    q, p = torch.full((20_000, 1), 0.8), torch.full((20_000, 1), 0.2)
    assert accept.accept_rejection(q, p, uniform).float().mean().item() == pytest.approx(
        0.25, abs=0.01
    )


def test_longest_tree_path():
    parents = [-1, 0, 0, 2, 3, -1]
    right = torch.tensor(
        [[1, 1, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]], dtype=torch.bool
    )
    assert accept.longest_path(parents, right) == [[0, 2, 3], [5], []]
    assert accept.longest_path([], torch.zeros(1, 0, dtype=torch.bool)) == [[]]


def test_scores():
    stats = TokenStats(row(0.2, 0.5), row(0.6, 0.5), row(0.3, 0.1), row(1.0, 0.2))
    assert torch.equal(accept.base_score("confidence", stats), stats.prob)
    assert torch.equal(accept.base_score("max_prob", stats), stats.max_prob)
    assert torch.equal(accept.base_score("margin", stats), stats.margin)
    assert torch.equal(accept.base_score("entropy", stats), -stats.entropy)
    assert torch.equal(accept.base_score("confidence", stats, log=True), stats.prob.log())
    with pytest.raises(UsageError, match=r"confidense.*confidence"):
        accept.base_score("confidense", stats)


def test_choice_noise_draws_slots_in_proportion_to_their_probability():
    probs = torch.tensor([0.6, 0.3, 0.1])
    generators = [item_generator(0, i) for i in range(6000)]
    score = accept.add_choice_noise(probs.log().expand(6000, 3), 1.0, generators)
    share = torch.bincount(score.argmax(dim=-1), minlength=3) / 6000
    assert torch.allclose(share, probs, atol=0.02)
    same = accept.add_choice_noise(probs[None], 0.0, [generators[0]])
    assert torch.equal(same, probs[None])


def test_eos_factor_fixtures():
    gammas = [round(accept.eos_gamma(s / 7), 3) for s in range(8)]
    assert gammas == [0.4, 0.486, 0.571, 0.657, 0.743, 0.829, 0.914, 1.0]
    # With ascending steps the time is (2^(s+1) - 1) / 2^S
    times = [round((2 ** (s + 1) - 1) / 2**6, 4) for s in range(6)]
    assert times == [0.0156, 0.0469, 0.1094, 0.2344, 0.4844, 0.9844]
    held = accept.scale_eos(row(0.9, 0.8), torch.tensor([[True, False]]), 0.5)
    assert torch.allclose(held, row(0.45, 0.8))


def test_restriction_to_the_first_masked_slots():
    masked = torch.tensor([[False, True, True, False, True]])
    assert slots(accept.restrict_first(masked, 2)) == [1, 2]
    assert torch.equal(accept.restrict_first(masked, 0), masked)


RULES = {
    "top_n": lambda c, h, m: accept.accept_top_n(c, m, 2),
    "threshold": lambda c, h, m: accept.accept_threshold(c, m, 0.7),
    "quota": lambda c, h, m: accept.accept_quota(c, m, 0.7, 2),
    "entropy_budget": lambda c, h, m: accept.accept_entropy_budget(c, h, m, 0.3),
    "factor": lambda c, h, m: accept.accept_factor(c, m, 1.0),
    "confident_prefix": lambda c, h, m: accept.accept_confident_prefix(c, m, 0.6),
    "low_entropy": lambda c, h, m: accept.accept_low_entropy(h, m, 0.4, distance_weight=0.05),
}


@pytest.mark.parametrize("name", list(RULES))
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_rule_stays_in_the_mask_makes_progress_and_ignores_the_batch(name, seed):
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.rand(4, 6, generator=generator)
    entropy = torch.rand(4, 6, generator=generator)
    masked = torch.rand(4, 6, generator=generator) < 0.5
    accepted = RULES[name](confidence, entropy, masked)
    assert not (accepted & ~masked).any()
    assert torch.equal(accepted.any(dim=-1), masked.any(dim=-1))
    for i in range(4):
        alone = RULES[name](confidence[i : i + 1], entropy[i : i + 1], masked[i : i + 1])
        assert torch.equal(alone[0], accepted[i])
