import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockloom.core.counts import (
    BASES,
    COUNT_NAMES,
    ancestral_share,
    binomial_counts,
    budget_policy,
    doubling_counts,
    first_hitting_times,
    poisson_counts,
    reveal_counts,
    starts_to_counts,
)
from blockloom.core.curves import CURVES, curve, shift_level, streaming_times
from blockloom.core.errors import UsageError
from blockloom.core.sampling import item_generator

HALTON_576 = [11, 11, 12, 11, 12, 12, 11, 12, 12, 12, 12, 12, 13, 13, 12, 13]
HALTON_576 += [14, 14, 14, 14, 15, 15, 17, 16, 18, 19, 21, 22, 25, 30, 39, 92]


@pytest.mark.parametrize(
    ("name", "on", "length", "steps", "expected"),
    [
        ("cosine", "remaining", 256, 8, [5, 15, 24, 31, 39, 45, 48, 49]),  # MaskGIT
        ("arccos", "counts", 256, 8, [1, 18, 26, 32, 38, 43, 48, 50]),  # MaskGIL
        ("arccos", "remaining", 256, 8, [21, 21, 21, 23, 25, 28, 35, 82]),  # TiTok
        ("arccos", "revealed", 256, 8, [20, 21, 21, 23, 25, 28, 35, 83]),  # Halton-MaskGIT
        ("arccos", "revealed", 576, 32, HALTON_576),
        ("even", "remaining", 30, 8, [4, 4, 4, 4, 4, 4, 3, 3]),  # LLaDA
        ("dream", "remaining", 64, 8, [7, 8, 8, 8, 8, 8, 8, 9]),
        ("dream", "remaining", 30, 8, [3, 3, 3, 4, 4, 4, 4, 5]),
        ("doubling", "remaining", 64, 6, [1, 2, 4, 8, 16, 33]),  # ASS
        ("doubling", "remaining", 128, 7, [1, 2, 4, 8, 16, 32, 65]),
        ("cosine", "remaining", 256, 256, [1] * 256),  # MAR with K = n
        ("linear", "remaining", 16, 4, [4, 4, 4, 4]),
        ("one", "remaining", 5, 2, [1] * 5),
        ("first_hitting", "remaining", 4, 1, [1] * 4),
        ("all", "remaining", 9, 4, [9]),
        ((2, 3), "remaining", 5, 9, [2, 3]),
    ],
)
def test_published_plans(name, on, length, steps, expected):
    assert reveal_counts(name, length, steps, on) == expected


def test_mar_with_64_iterations_reveals_one_to_seven():
    counts = reveal_counts("cosine", 256, 64)
    assert min(counts) == 1 and max(counts) == 7 and len(counts) == 64


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(COUNT_NAMES),
    st.sampled_from(BASES),
    st.integers(0, 600),
    st.integers(1, 80),
)
def test_every_plan_reveals_all_and_at_least_one_a_row(name, on, length, steps):
    counts = reveal_counts(name, length, steps, on)
    assert sum(counts) == length
    assert all(count >= 1 for count in counts)
    if name in CURVES or name in ("even", "dream"):
        assert len(counts) == min(steps, length)


def test_more_rows_than_slots_is_clamped():
    for name in ("cosine", "arccos", "even", "dream"):
        assert reveal_counts(name, 3, 50) == [1, 1, 1]
    assert reveal_counts("cosine", 0, 8) == []


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: reveal_counts("cosin", 8, 2), "cosin.*cosine"),
        (lambda: reveal_counts("cosine", 8, 0), "num_steps.*0.*1"),
        (lambda: reveal_counts("cosine", 8, 2, "remain"), "remain.*remaining"),
        (lambda: reveal_counts([3, 3], 8, 2), r"\[3, 3\].*8"),
        (lambda: reveal_counts([8, 0], 8, 2), r"\[8, 0\]"),
        (lambda: ancestral_share(0.5, 0.6), r"0\.6.*0\.5"),
        (lambda: budget_policy([1.0, 1.0], 3), "3.*2"),
        (lambda: starts_to_counts([1, 2], 4), r"\[1, 2\]"),
        (lambda: curve("cos"), "cos.*cosine"),
    ],
)
def test_errors(call, match):
    with pytest.raises(UsageError, match=match):
        call()


@pytest.mark.parametrize("name", list(CURVES))
def test_curves_fall_from_one_to_exactly_zero(name):
    values = [curve(name)(i / 40) for i in range(41)]
    assert values[0] == 1.0 and values[-1] == 0.0
    assert all(a > b for a, b in pairwise(values))


def test_shift_and_streaming_times():
    assert shift_level(0.0, 5.0) == 0.0 and shift_level(1.0, 5.0) == 1.0
    assert shift_level(0.5, 3.0) == 0.75
    assert shift_level(0.3) == 0.3
    expected = [0, 0.0667, 0.1429, 0.2308, 0.3333, 0.4545, 0.6, 0.7778]  # D-AR
    assert [round(t, 4) for t in streaming_times(8)] == expected
    assert torch.allclose(shift_level(torch.tensor([0.5]), 3.0), torch.tensor([0.75]))


def test_doubling_of_short_sequences():
    assert [doubling_counts(n) for n in (1, 2, 3, 4, 7)] == [[1], [2], [3], [1, 3], [1, 6]]


def test_budget_policy_fixture_and_extremes():
    losses = [0.5 + 1.5 * math.exp(-t / 10) for t in range(32)]
    starts, cost = budget_policy(losses, 6)
    assert starts == [0, 3, 6, 10, 15, 22]
    assert cost == pytest.approx(33.89, abs=0.005)
    assert budget_policy(losses, 32)[1] == pytest.approx(31.12, abs=0.005)
    assert budget_policy(losses, 32)[0] == list(range(32))
    assert budget_policy(losses, 1) == ([0], pytest.approx(32 * losses[0]))
    linspace = [0, 5, 11, 16, 21, 27]
    rows = zip(linspace, starts_to_counts(linspace, 32), strict=True)
    assert sum(losses[s] * n for s, n in rows) == pytest.approx(34.58, abs=0.005)
    # Measured curves are noisy; order of the measurements must not matter.
    assert budget_policy(losses[::-1], 6) == (starts, cost)


def test_first_hitting_times_have_the_expected_means():
    generators = [item_generator(0, i) for i in range(4000)]
    times = first_hitting_times(4, generators)
    assert (times[:, 1:] < times[:, :-1]).all()
    assert torch.allclose(times.mean(dim=0), torch.tensor([0.8, 0.6, 0.4, 0.2]), atol=0.015)
    assert torch.equal(times[7:8], first_hitting_times(4, [item_generator(0, 7)]))


def test_random_counts_make_progress_and_follow_their_law():
    masks = torch.tensor([0, 1, 50] * 400)
    generators = lambda: [item_generator(1, i) for i in range(1200)]  # noqa: E731
    share = ancestral_share(0.8, 0.6)
    assert share == pytest.approx(0.25)
    binomial = binomial_counts(masks, share, generators())
    poisson = poisson_counts(masks, 0.25, generators())
    for counts in (binomial, poisson):
        assert (counts[masks == 0] == 0).all()
        assert (counts[masks == 1] == 1).all()
        assert (counts <= masks).all()
        assert abs(counts[masks == 50].float().mean().item() - 12.5) < 0.6
    plain = binomial_counts(masks, share, generators(), min_count=0)
    assert abs(plain[masks == 1].float().mean().item() - 0.25) < 0.07
    assert binomial_counts(masks, 1.0, generators()).equal(masks)
    assert binomial_counts(masks, share, generators())[5] == binomial[5]


def masked_before(counts: list[int], length: int) -> list[int]:
    """Masks left when every row runs."""
    return [length - sum(counts[:row]) for row in range(len(counts))]


@pytest.mark.parametrize(
    ("length", "steps", "basis", "masked"),
    [
        # MoMask, rounded, the curve's end included.
        (48, 10, "inclusive", [48, 47, 45, 42, 37, 31, 24, 16, 8, 1]),
        (50, 10, "inclusive", [50, 49, 47, 43, 38, 32, 25, 17, 9, 1]),
        # MAGNeT, rounded down.
        (500, 20, "inclusive_floor",
         [500, 498, 493, 484, 472, 457, 439, 418, 394, 367, 338, 307, 273, 237, 200, 162, 122, 82,
          41, 1]),
        # BAD, the order decided before: floor of the share after every row.
        (49, 10, "remaining", [49, 48, 46, 43, 39, 34, 28, 22, 15, 7]),
        (20, 4, "remaining", [20, 18, 14, 7]),
        (25, 4, "remaining", [25, 23, 17, 9]),  # TIMAR: 23 17 9 0 are left after every row
    ],
)  # fmt: skip
def test_published_masked_counts_of_motion_and_audio(length, steps, basis, masked):
    counts = reveal_counts("cosine", length, steps, basis)
    assert masked_before(counts, length) == masked and sum(counts) == length


@pytest.mark.parametrize("basis", ["inclusive", "inclusive_floor"])
@pytest.mark.parametrize(("length", "steps"), [(1, 5), (3, 10), (7, 1), (10, 10)])
def test_inclusive_plans_reveal_something_in_every_row(basis, length, steps):
    counts = reveal_counts("cosine", length, steps, basis)
    assert sum(counts) == length and min(counts) >= 1 and len(counts) == min(length, steps)
