"""How many slots each decode row reveals.

What it is: count plans of published decoders as lists of ints, the random counts of ancestral
samplers, and the budget policy of order-agnostic models.
What it does not know: which slots are revealed (that is the order and the accept rule).
Invariants: a plan sums to the number of masks and every row reveals at least one; a plan never has
more rows than masks; curve arithmetic is float64.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .curves import CURVES, curve
from .errors import UsageError, check_count, check_one_of, check_range, describe
from .sampling import per_item_rand

PLANS = ("even", "dream", "doubling", "first_hitting", "one", "all")
COUNT_NAMES = (*CURVES, *PLANS)
BASES = ("remaining", "revealed", "counts", "inclusive", "inclusive_floor")


def reveal_counts(
    name: str | Sequence[int], length: int, num_steps: int, on: str = "remaining"
) -> list[int]:
    """Plan how many slots every row reveals.

    One curve name means three different plans in published code, so the base is explicit. With
    p = (i + 1) / N and m the curve (1 -> 0):
    "remaining": floor(n * m(p)) slots stay masked (MaskGIT, TiTok, MAR);
    "revealed": floor(n * (1 - m(p))) slots are known (Halton-MaskGIT);
    "counts": row i reveals round(n * m(r_i) / sum m) with r from 1 down to 0 (MaskGIL);
    "inclusive": round(n * m(i / (N - 1))), at least 1, are masked when row i runs, so that the last
    row reveals one (MoMask); "inclusive_floor": the same rounded down (MAGNeT).

    Args:
        name: A curve, or "even" (remainder on the first rows), "dream", "doubling" (2^i, own row
            number), "first_hitting" and "one" (one slot a row), "all" (one row), or the counts
            themselves.
        length: Masked slots, >= 0.
        num_steps: Rows asked for; more rows than slots are clamped to `length`.
        on: What a curve describes; ignored by the other plans.

    Returns:
        One count per row; [] when nothing is masked.

    Raises:
        UsageError: Unknown name or base, num_steps < 1, or given counts that do not fit.

    Example:
        >>> reveal_counts("cosine", 256, 8)
        [5, 15, 24, 31, 39, 45, 48, 49]
    """
    check_count("length", length, 0)
    if length == 0:
        return []
    check_count("num_steps", num_steps)
    check_one_of("count base", on, BASES)
    if not isinstance(name, str):
        return _checked([int(count) for count in name], length)
    check_one_of("count", name, COUNT_NAMES)
    rows = min(num_steps, length)
    if name in CURVES:
        return _checked(_from_curve(name, length, rows, on), length)
    plans = {
        "even": lambda: [length // rows + (i < length % rows) for i in range(rows)],
        "dream": lambda: _dream(length, rows),
        "doubling": lambda: doubling_counts(length),
        "first_hitting": lambda: [1] * length,
        "one": lambda: [1] * length,
        "all": lambda: [length],
    }
    return _checked(plans[name](), length)


def _checked(counts: list[int], length: int) -> list[int]:
    if sum(counts) != length or any(count < 1 for count in counts):
        raise UsageError(describe("counts", counts, f"counts >= 1 that sum to {length}"))
    return counts


def _from_curve(name: str, length: int, rows: int, on: str) -> list[int]:
    mask_ratio = curve(name)
    if on == "counts":
        return _proportional([mask_ratio(1 - i / max(rows - 1, 1)) for i in range(rows)], length)
    if on.startswith("inclusive"):
        return _inclusive(mask_ratio, length, rows, math.floor if on.endswith("floor") else round)
    remaining: list[int] = []
    for i in range(rows):
        ratio = mask_ratio((i + 1) / rows)
        left = (
            math.floor(length * ratio)
            if on == "remaining"
            else (length - math.floor(length * (1 - ratio)))
        )
        before = remaining[-1] if remaining else length
        # At least one slot for this row and one for each row still to come.
        remaining.append(min(max(left, rows - 1 - i), before - 1))
    remaining[-1] = 0
    return [a - b for a, b in pairwise([length, *remaining])]


def _inclusive(
    mask_ratio: Callable[[float], float], length: int, rows: int, whole: Callable[[float], int]
) -> list[int]:
    """Plan by how many slots are masked when a row runs, the curve's end included."""
    masked = [whole(length * mask_ratio(i / max(rows - 1, 1))) for i in range(rows)]
    masked[0] = length  # also where there is one row, which does all
    for i in range(1, rows):  # every row reveals one slot, and leaves one for each row to come
        masked[i] = max(min(masked[i], masked[i - 1] - 1), rows - i)
    return [a - b for a, b in pairwise([*masked, 0])]


def _proportional(weights: list[float], length: int) -> list[int]:
    if len(weights) == 1:
        return [length]
    total = sum(weights)
    counts = [max(1, round(length * weight / total)) for weight in weights]
    counts[-1] += length - sum(counts)
    # Rounding up to one on short sequences can overdraw the last row: take it back from the top.
    while counts[-1] < 1:
        largest = max(range(len(counts) - 1), key=lambda i: counts[i])
        counts[largest] -= 1
        counts[-1] += 1
    return counts


def _dream(length: int, rows: int) -> list[int]:
    """Truncate n * (1 - s/t) to an int on float32 times, as Dream's released sampler does."""
    times = torch.linspace(1.0, 1e-3, rows + 1)
    counts: list[int] = []
    left = length
    for i in range(rows):
        share = float(left * (1 - times[i + 1] / times[i]))
        wanted = left if i == rows - 1 else max(1, int(share))
        counts.append(min(wanted, left - (rows - 1 - i)))
        left -= counts[-1]
    return counts


def doubling_counts(length: int) -> list[int]:
    """Plan powers of two, 2^i in row i, over floor(log2 n) rows; the last takes the rest.

    Source: ascending step-size schedule of EOSER-ASS (arXiv:2509.23924).

    Example:
        >>> doubling_counts(64)
        [1, 2, 4, 8, 16, 33]
    """
    check_count("length", length)
    rows = max(1, length.bit_length() - 1)
    return [2**i for i in range(rows - 1)] + [length - (2 ** (rows - 1) - 1)]


def ancestral_share(time: float, time_next: float) -> float:
    """Chance that a masked slot is revealed between two times, 1 - t_next / t.

    Args:
        time: t in (0, 1], the masked fraction now.
        time_next: In [0, t].

    Source: MDLM / BD3-LM ancestral sampler (arXiv:2503.09573) under log-linear noise.
    """
    check_range("time", time, 0.0, 1.0, open_low=True)
    check_range("next time", time_next, 0.0, time)
    return 1.0 - time_next / time


def binomial_counts(
    num_masked: Int[Tensor, " batch"],
    share: float,
    generators: Sequence[torch.Generator],
    *,
    min_count: int = 1,
) -> Int[Tensor, " batch"]:
    """Draw how many masks each item reveals when each is revealed with probability `share`.

    Args:
        num_masked: Masks left per item.
        share: Probability in [0, 1], see `ancestral_share`.
        generators: One CPU generator per item.
        min_count: Progress guarantee; 0 restores the plain binomial.

    Returns:
        Counts in [min(min_count, num_masked), num_masked].
    """
    check_range("share", share, 0.0, 1.0)
    drawn = [
        int((torch.rand(int(masks), generator=generator) < share).sum())
        for masks, generator in zip(num_masked.tolist(), generators, strict=True)
    ]
    counts = torch.tensor(drawn, device=num_masked.device, dtype=num_masked.dtype)
    return torch.minimum(counts.clamp(min=min_count), num_masked)


def poisson_counts(
    num_masked: Int[Tensor, " batch"],
    rate: float,
    generators: Sequence[torch.Generator],
    *,
    min_count: int = 1,
) -> Int[Tensor, " batch"]:
    """Draw a Poisson(rate * num_masked) number of reveals per item, at most all of them.

    Args:
        num_masked: Masks left per item.
        rate: Unmasking rate times the time step, >= 0.
        generators: One CPU generator per item.
        min_count: Progress guarantee.

    Source: FlexMDM tau-leaping (brianlck/FlexMDM).
    """
    check_range("rate", rate, 0.0)
    drawn = [
        int(torch.poisson(torch.tensor(rate * masks), generator=generator))
        for masks, generator in zip(num_masked.tolist(), generators, strict=True)
    ]
    counts = torch.tensor(drawn, device=num_masked.device, dtype=num_masked.dtype)
    return torch.minimum(counts.clamp(min=min_count), num_masked)


def first_hitting_times(
    length: int, generators: Sequence[torch.Generator]
) -> Float[Tensor, "batch length"]:
    """Draw the time after each single reveal: t <- t * u^(1/k) with k masks left.

    The expected times for n masks are n/(n+1), (n-1)/(n+1), ..., 1/(n+1).

    Args:
        length: Masks at the start, all revealed one at a time.
        generators: One CPU generator per item.

    Source: first-hitting sampler (arXiv:2409.02908) as used by BD3-LM.
    """
    masks = torch.arange(length, 0, -1, dtype=torch.float64)
    uniform = per_item_rand((length,), generators, dtype=torch.float64)
    return uniform.pow(1 / masks).cumprod(dim=-1).float()


def budget_policy(token_nll: Sequence[float], budget: int) -> tuple[list[int], float]:
    """Choose at which tokens parallel rows should start, by dynamic programming.

    Generating tokens s..t-1 in one row costs (t - s) * nll[s]: all are predicted from what was
    known before the row. Losses are sorted descending first, so that noise in the measured
    curve cannot be exploited.

    Args:
        token_nll: Mean loss per token when t tokens are known, t = 0 .. D-1.
        budget: Number of rows, in [1, D].

    Returns:
        Start index of every row, and the expected total cost.

    Raises:
        UsageError: budget outside [1, D].

    Source: ARDM (arXiv:2110.02037), section 3.1; differs: unreachable states cost +inf, not 0.
    """
    losses = sorted((float(loss) for loss in token_nll), reverse=True)
    length = len(losses)
    check_count("budget", budget, 1, length)
    cost = [0.0] + [math.inf] * length
    parents: list[list[int]] = []
    for _ in range(budget):
        best = [math.inf] * (length + 1)
        parent = [0] * (length + 1)
        for end in range(1, length + 1):
            options = [cost[start] + (end - start) * losses[start] for start in range(end)]
            parent[end] = min(range(end), key=options.__getitem__)
            best[end] = options[parent[end]]
        cost = best
        parents.append(parent)
    starts, end = [], length
    for parent in reversed(parents):
        end = parent[end]
        starts.append(end)
    return starts[::-1], cost[length]


def starts_to_counts(starts: Sequence[int], length: int) -> list[int]:
    """Turn row start indices, the first being 0, into counts per row.

    Example:
        >>> starts_to_counts([0, 3, 6, 10, 15, 22], 32)
        [3, 3, 4, 5, 7, 10]
    """
    if not starts or starts[0] != 0:
        raise UsageError(describe("row starts", list(starts), "a list that begins with 0"))
    edges = [*starts, length]
    return _checked([end - start for start, end in pairwise(edges)], length)
