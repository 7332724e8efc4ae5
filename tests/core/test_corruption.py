import math
from itertools import pairwise

import pytest
import torch

from blockloom.core import corruption
from blockloom.core.errors import UsageError


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("kind", "mean", "low", "high"),
    [
        ("cosine", 2 / math.pi, 0.0, 1.0),
        # E[arccos u] = 1, over pi/2
        ("arccos", 2 / math.pi, 0.0, 1.0),
        ("uniform", 0.5, 0.0, 1.0),
        ("truncnorm", 0.867, 0.7, 1.0),
        # mean of cos(pi/2 k) over k in [0, .7]; smallest is cos(.35 pi) = .454
        ("givt", math.sin(0.35 * math.pi) / (0.35 * math.pi), 0.4539, 1.0),
    ],
)
def test_mask_ratio_means_and_ranges(kind, mean, low, high):
    ratios = corruption.mask_ratios(kind, (50_000,), gen())
    assert ratios.min() >= low and ratios.max() <= high
    assert ratios.mean().item() == pytest.approx(mean, abs=0.005)
    assert torch.equal(ratios, corruption.mask_ratios(kind, (50_000,), gen()))


def test_cosine_and_arccos_have_different_shapes_despite_the_same_mean():
    # P(cos(pi/2 u) > r) = 2/pi arccos(r); P(arccos(u) / (pi/2) > r) = cos(pi/2 r)
    cosine = corruption.mask_ratios("cosine", (50_000,), gen())
    arccos = corruption.mask_ratios("arccos", (50_000,), gen())
    for r in (0.2, 0.5, 0.9):
        above = (cosine > r).float().mean().item()
        assert above == pytest.approx(2 / math.pi * math.acos(r), abs=0.01)
        above = (arccos > r).float().mean().item()
        assert above == pytest.approx(math.cos(math.pi / 2 * r), abs=0.01)


def test_truncated_normal_is_the_inverse_of_its_distribution():
    u = torch.tensor([0.0, 0.5, 1.0])
    value = corruption.truncated_normal(u, 1.0, 0.25, 0.7, 1.0)
    assert value[0].item() == pytest.approx(0.7, abs=1e-6) and value[2].item() == 1.0
    z = (value[1].double() - 1) / 0.25
    share = (torch.special.ndtr(z) - torch.special.ndtr(torch.tensor(-1.2).double())) / (
        0.5 - torch.special.ndtr(torch.tensor(-1.2).double())
    )
    assert share.item() == pytest.approx(0.5, abs=1e-5)


def test_stratified_numbers_fill_every_slice_once():
    u = corruption.uniform((4, 8), gen(), stratified=True)
    assert sorted((u.flatten() * 32).floor().long().tolist()) == list(range(32))
    assert u.max() < 1
    ordered = corruption.uniform((1, 32), gen(), stratified=True)[0]
    assert not (ordered.diff() > 0).all()  # shuffled: place says nothing about value


def test_clipped_ratios_stay_inside():
    u = corruption.mask_ratios("uniform", (1000,), gen(), low=0.3, high=0.8)
    assert u.min() >= 0.3 and u.max() <= 0.8
    assert u.mean().item() == pytest.approx(0.55, abs=0.02)


@pytest.mark.parametrize(
    ("rounding", "expected"), [("ceil", [8, 3, 1]), ("round", [7, 2, 1]), ("floor", [7, 2, 1])]
)
def test_exact_mask_counts(rounding, expected):
    ratio = torch.tensor([[0.72], [0.24], [0.0]])
    mask = corruption.exact_mask(ratio, torch.zeros(10).long(), gen(), rounding=rounding)
    assert mask.sum(dim=-1).tolist() == expected


def test_exact_mask_of_representable_shares_is_exact_in_float32():
    for n in (10, 256):
        ratio = torch.arange(1, n + 1)[:, None] / n
        for rounding in ("ceil", "floor", "round"):
            mask = corruption.exact_mask(ratio, torch.zeros(n).long(), gen(), rounding=rounding)
            assert mask.sum(dim=-1).tolist() == list(range(1, n + 1))


def test_exact_mask_per_block_never_touches_prompt_or_fixed_tokens():
    block = torch.tensor([-1, -1, 0, 1, 0, 1, 0, 1, 0, 1])  # interleaved on purpose
    ratio = torch.tensor([[0.5, 1.0], [1.0, 0.25]])
    maskable = torch.ones(2, 10, dtype=torch.bool)
    maskable[1, 2] = False
    mask = corruption.exact_mask(ratio, block, gen(), maskable)
    assert not mask[:, :2].any() and not mask[1, 2]
    assert [mask[0, block == b].sum().item() for b in (0, 1)] == [2, 4]
    assert [mask[1, block == b].sum().item() for b in (0, 1)] == [3, 1]


def test_exact_mask_chooses_uniformly():
    ratio = torch.full((6000, 1), 0.4)
    mask = corruption.exact_mask(ratio, torch.zeros(5).long(), gen())
    assert (mask.sum(dim=-1) == 2).all()
    assert torch.allclose(mask.float().mean(dim=0), torch.full((5,), 0.4), atol=0.03)
    both = (mask[:, 0] & mask[:, 1]).float().mean().item()
    assert both == pytest.approx(0.1, abs=0.02)  # 2/5 * 1/4


def test_bernoulli_mask_follows_the_ratio_of_each_block():
    block = torch.tensor([0] * 50 + [1] * 50 + [-1])
    ratio = torch.tensor([[0.2, 0.9]]).expand(400, 2)
    mask = corruption.bernoulli_mask(ratio, block, gen())
    assert mask[:, :50].float().mean().item() == pytest.approx(0.2, abs=0.01)
    assert mask[:, 50:100].float().mean().item() == pytest.approx(0.9, abs=0.01)
    assert not mask[:, 100].any()
    assert corruption.bernoulli_mask(torch.ones(2, 1), block, gen())[:, :100].all()
    assert not corruption.bernoulli_mask(torch.zeros(2, 1), block, gen()).any()


def test_any_order_times_masks_and_weights():
    mask, time, weight = corruption.any_order_mask(8000, 6, gen())
    assert torch.equal(mask.sum(dim=-1), 6 - time)
    assert torch.allclose(weight, 6 / (6 - time).float())
    share = torch.bincount(time, minlength=6) / 8000
    assert torch.allclose(share, torch.full((6,), 1 / 6), atol=0.02)
    # Unbiased: every token's expected weight is sum over t of 1/D * (D - t)/D * D/(D - t) = 1.
    expected = (mask * weight[:, None]).mean(dim=0)
    assert torch.allclose(expected, torch.ones(6), atol=0.07)
    _, paired, _ = corruption.any_order_mask(10, 6, gen(), antithetic=True)
    assert torch.equal(paired[:5] + paired[5:], torch.full((5,), 5))


def test_single_spans_have_mean_length_a_third():
    generator = gen()
    lengths = []
    for _ in range(4000):
        spans = corruption.draw_spans(300, generator, num_spans=1)
        lengths += [end - start for start, end in spans] or [0]
        assert all(0 <= start < end <= 300 for start, end in spans)
    assert sum(lengths) / len(lengths) == pytest.approx(100, abs=4)


def test_many_spans_are_disjoint_sorted_and_at_most_as_asked():
    generator = gen()
    for _ in range(200):
        spans = corruption.draw_spans(64, generator, num_spans=4, max_spans=4)
        assert len(spans) <= 4 and spans == sorted(spans) and spans
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
    numbers = [len(corruption.draw_spans(1000, generator)) for _ in range(4000)]
    # Poisson(1) cut to one sentinel: P(no span) = 1/e
    assert numbers.count(0) / 4000 == pytest.approx(math.exp(-1), abs=0.03)


def test_segment_count_fixture():
    probs = corruption.segment_count_probs(256)
    assert round(probs[0].item(), 4) == 0.1
    mean = (probs * torch.arange(1, 257)).sum().item()
    assert round(mean, 2) == 10.0
    assert int(torch.searchsorted(probs.cumsum(0), 0.5)) + 1 == 7  # median


def test_segment_sizes_follow_the_distribution():
    generator = gen()
    draws = [corruption.segment_sizes(256, generator) for _ in range(2000)]
    assert all(sum(sizes) == 256 and min(sizes) >= 1 for sizes in draws)
    number = [len(sizes) for sizes in draws]
    assert number.count(1) / 2000 == pytest.approx(0.1, abs=0.02)
    assert sum(number) / 2000 == pytest.approx(10, abs=0.7)
    two = [sizes[0] for sizes in draws if len(sizes) == 2]
    assert sum(two) / len(two) == pytest.approx(128, abs=20)  # cuts are uniform
    assert corruption.segment_sizes(1, generator) == [1]


def test_segment_weights_fall_linearly_with_the_start():
    weights = corruption.segment_weights([2, 4, 2])
    assert weights.tolist() == [2.0, 2.0, 1.75, 1.75, 1.75, 1.75, 1.25, 1.25]
    assert corruption.segment_weights([8]).tolist() == [2.0] * 8


def test_swapped_tokens_come_from_the_same_place_of_another_item():
    place = torch.arange(6).expand(200, -1)
    values = torch.stack((torch.arange(200)[:, None].expand(-1, 6), place), -1)
    mixed = corruption.swap_tokens(values, 0.8, gen(3))
    assert torch.equal(mixed[..., 1], place)
    changed = (mixed[..., 0] != values[..., 0]).float().mean(1)
    # Shares are uniform in [0, 0.8]: mean 0.4, and some items keep (nearly) everything.
    assert changed.mean() == pytest.approx(0.4, abs=0.05)
    assert changed.min() == 0 and changed.max() > 0.7
    assert torch.equal(mixed, corruption.swap_tokens(values, 0.8, gen(3)))
    assert corruption.swap_tokens(values, 0.0, gen(3)) is values


def test_blocks_in_flight_rise_by_equal_steps():
    flight = torch.tensor([0, 0, 0, 3, 3, 3])
    place = torch.tensor([0, 1, 2, 0, 1, 2])
    levels = corruption.flight_levels(4000, flight, place, 3, gen())
    assert levels.shape == (4000, 6) and 0 <= levels.min() and levels.max() == 1.0
    steps = levels[:, 1:3] - levels[:, :2]
    under_way = levels[:, 2] < 1.0
    assert torch.allclose(steps[under_way], torch.full_like(steps[under_way], 1 / 3), atol=1e-6)
    # Half are under way, and of the others a third begins with its oldest block in the last third.
    assert abs(float((levels[:, 0] < 1 / 3).float().mean()) - (0.5 + 0.5 / 3)) < 0.03
    assert abs(float((levels[:, 0] > 2 / 3).float().mean()) - 0.5 / 3) < 0.03
    assert bool((levels[:, 1:3][levels[:, 0] > 2 / 3] == 1.0).all())  # not begun yet
    assert not torch.equal(levels[:, :3], levels[:, 3:])  # flights draw their own
    shifted = corruption.flight_levels(4000, flight, place, 3, gen(), shift=2.0)
    assert torch.allclose(shifted, 2 * levels / (1 + levels))


def test_noise_levels():
    uniform = corruption.noise_levels("uniform", (4000, 5), gen())
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
    logit = corruption.noise_levels("logit_normal", (4000, 5), gen(), mean=0.5, std=0.7)
    assert ((logit > 0) & (logit < 1)).all()
    z = torch.logit(logit.double())
    assert z.mean().item() == pytest.approx(0.5, abs=0.02)
    assert z.std().item() == pytest.approx(0.7, abs=0.02)
    ddpm = corruption.noise_levels("ddpm", (4000, 5), gen())
    times = (ddpm * 1000).round()
    assert times.min() >= 1 and times.max() <= 1000
    assert torch.allclose(times, ddpm * 1000, atol=1e-3)
    shifted = corruption.noise_levels("uniform", (4000, 5), gen(), shift=3.0)
    assert torch.allclose(shifted, 3 * uniform / (1 + 2 * uniform))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: corruption.mask_ratios("cosin", (1,), gen()), "cosin.*cosine"),
        (lambda: corruption.mask_ratios("uniform", (1,), gen(), low=0.9, high=0.5), r"0\.9"),
        (lambda: corruption.noise_levels("normal", (1,), gen()), "normal.*logit_normal"),
        (
            lambda: corruption.exact_mask(
                torch.ones(1, 1), torch.zeros(2).long(), gen(), rounding="up"
            ),
            "up.*ceil",
        ),
        (lambda: corruption.segment_count_probs(4, 0.0), r"0\.0"),
        (lambda: corruption.segment_sizes(0, gen()), "length.*0"),
        (lambda: corruption.swap_tokens(torch.ones(1, 1, 1), 1.5, gen()), r"1\.5"),
    ],
)
def test_errors(call, match):
    with pytest.raises(UsageError, match=match):
        call()
