"""Corruption of training data: how much is masked or noised, and where.

What it is: mask-ratio distributions, exact-count and independent masks per item or per block, the
order-agnostic objective's times and weights, span and segment sampling, noise levels.
What it does not know: models, losses, layouts' copies.
Invariants: everything random takes a `torch.Generator` and is drawn on its device; masks follow the
device of the tensors they mask; the result is a function of the generator's state and the
arguments only.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .curves import shift_level
from .errors import check_count, check_one_of, check_range

RATIOS = ("cosine", "arccos", "uniform", "truncnorm", "givt", "all")
LEVELS = ("uniform", "logit_normal", "ddpm")
ROUNDINGS = {"ceil": torch.ceil, "round": torch.round, "floor": torch.floor}


def uniform(
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    stratified: bool = False,
) -> Float[Tensor, "*shape"]:
    """Draw uniform numbers in [0, 1), optionally one per equal slice of the interval.

    Args:
        shape: Any shape.
        generator: Source of randomness.
        stratified: Number k of n lies in [k/n, (k+1)/n), then all are shuffled: each number is
            still uniform, but their mean varies far less between batches.

    Source: BD3-LM (arXiv:2503.09573), low-discrepancy times; differs: shuffled, so that a
        sample's blocks do not get neighbouring values.
    """
    size = tuple(shape)
    draw = torch.rand(size, generator=generator, device=generator.device)
    if not stratified:
        return draw
    count = draw.numel()
    slices = torch.randperm(count, generator=generator, device=generator.device)
    # float32 rounding of (count - 1 + u) / count can reach 1.0, which is outside the range.
    return ((slices + draw.flatten()) / count).clamp(max=1 - 2**-24).reshape(size)


def mask_ratios(
    kind: str,
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    low: float = 0.0,
    high: float = 1.0,
    stratified: bool = False,
) -> Float[Tensor, "*shape"]:
    """Draw the fraction of tokens to mask.

    Args:
        kind: "cosine": cos(pi/2 u). "arccos": arccos(u) / (pi/2). "uniform": u. "truncnorm": a
            normal with mean 1 and std 0.25 cut to [0.7, 1]. "givt": cos(pi/2 keep) with keep
            uniform in [0, 0.7]. "all": 1, for blocks that are decoded in one row.
        shape: [batch], or [batch, blocks] for one ratio per block.
        generator: Source of randomness.
        low: The underlying u is drawn from [low, high]: clipped schedules.
        high: See `low`.
        stratified: See `uniform`.

    Returns:
        Ratios in [0, 1].

    Raises:
        UsageError: Unknown kind, or an empty [low, high].

    Source: MaskGIT (arXiv:2202.04200); MaskGIL; MAR (arXiv:2406.11838); GIVT (arXiv:2312.02116).
    """
    check_one_of("mask ratio", kind, RATIOS)
    check_range("low", low, 0.0, high)
    check_range("high", high, low, 1.0)
    u = low + (high - low) * uniform(shape, generator, stratified=stratified)
    if kind == "cosine":
        return torch.cos(math.pi / 2 * u)
    if kind == "all":
        return torch.ones_like(u)
    if kind == "arccos":
        return torch.arccos(u) / (math.pi / 2)
    if kind == "truncnorm":
        return truncated_normal(u, mean=1.0, std=0.25, low=0.7, high=1.0)
    return torch.cos(math.pi / 2 * 0.7 * u) if kind == "givt" else u


def truncated_normal(
    u: Float[Tensor, "*shape"], mean: float, std: float, low: float, high: float
) -> Float[Tensor, "*shape"]:
    """Map uniform numbers to a normal distribution cut to [low, high], by its inverse.

    Args:
        u: In [0, 1].
        mean: Mean of the uncut normal.
        std: Standard deviation of the uncut normal, > 0.
        low: Lower cut.
        high: Upper cut.
    """
    bounds = torch.tensor([(low - mean) / std, (high - mean) / std], dtype=torch.float64)
    start, end = torch.special.ndtr(bounds).tolist()
    value = mean + std * torch.special.ndtri(start + (end - start) * u.double())
    return value.clamp(low, high).float()


def bernoulli_mask(
    ratio: Float[Tensor, "batch blocks"],
    block: Int[Tensor, "*batch tokens"],
    generator: torch.Generator,
    is_maskable: Bool[Tensor, "batch tokens"] | None = None,
) -> Bool[Tensor, "batch tokens"]:
    """Mask every token independently with the probability of its block.

    Args:
        ratio: In [0, 1]; one column masks all tokens alike.
        block: Block of every token, 0 .. blocks-1; negative ids (prompt) are never masked.
        generator: Source of randomness.
        is_maskable: False for tokens that must stay; None = all.
    """
    block, chosen = _expand_blocks(ratio, block, is_maskable)
    chance = ratio.gather(1, block)
    draw = torch.rand(block.shape, generator=generator, device=generator.device)
    return chosen & (draw.to(chance.device) < chance)


def exact_mask(
    ratio: Float[Tensor, "batch blocks"],
    block: Int[Tensor, "*batch tokens"],
    generator: torch.Generator,
    is_maskable: Bool[Tensor, "batch tokens"] | None = None,
    *,
    rounding: str = "ceil",
    min_count: int = 1,
) -> Bool[Tensor, "batch tokens"]:
    """Mask an exact share of every block, the tokens chosen uniformly.

    Args:
        ratio: In [0, 1]; one column treats all tokens as one block.
        block: Block of every token, 0 .. blocks-1; negative ids (prompt) are never masked.
        generator: Source of randomness.
        is_maskable: False for tokens that must stay; None = all.
        rounding: "ceil" (MAR), "round" (WeDLM) or "floor" of ratio * maskable tokens.
        min_count: Least masked tokens of a block that has maskable ones, so no loss is empty.
    """
    check_one_of("rounding", rounding, tuple(ROUNDINGS))
    block, chosen = _expand_blocks(ratio, block, is_maskable)
    size = torch.zeros(ratio.shape, dtype=torch.long, device=block.device)
    size.scatter_add_(1, block, chosen.long())
    # float64: ceil of 0.7f * 10 is 7 only when the product does not pick up a rounding error.
    wanted = ROUNDINGS[rounding]((ratio.double() * size).sub(_slack(rounding))).long()
    count = torch.minimum(wanted.clamp(min=min_count), size)
    return chosen & (_rank_in_block(block, chosen, generator) < count.gather(1, block))


def _slack(rounding: str) -> float:
    # Ratios are float32: without slack 0.7 (stored as 0.69999999 or 0.70000001) * 10 is unstable.
    return {"ceil": 1e-5, "floor": -1e-5, "round": 0.0}[rounding]


def _expand_blocks(
    ratio: Tensor, block: Tensor, is_maskable: Tensor | None
) -> tuple[Tensor, Tensor]:
    block = block.expand(ratio.shape[0], block.shape[-1])
    chosen = block >= 0
    if is_maskable is not None:
        chosen = chosen & is_maskable
    if ratio.shape[1] == 1:
        return torch.zeros_like(block), chosen
    return block.clamp(min=0), chosen


def _rank_in_block(block: Tensor, chosen: Tensor, generator: torch.Generator) -> Tensor:
    """Give the chosen tokens of every block random distinct ranks 0, 1, ...; others rank last."""
    size, device = block.shape, generator.device
    keys = torch.rand(size, generator=generator, device=device, dtype=torch.float64)
    keys = keys.to(block.device)
    # Whole part: block; fraction: random for chosen tokens below 1/2, the others above.
    order = (block + keys / 2 + (~chosen) * 0.5).argsort(dim=-1)
    sorted_block = block.gather(-1, order).contiguous()
    start = torch.searchsorted(sorted_block, sorted_block)
    place = torch.arange(block.shape[-1], device=block.device) - start
    return torch.empty_like(place).scatter_(-1, order, place)


def any_order_mask(
    batch: int, length: int, generator: torch.Generator, *, antithetic: bool = False
) -> tuple[Bool[Tensor, "batch tokens"], Int[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Draw a time and a random order, and mask every token the order has not reached.

    Args:
        batch: Items.
        length: Tokens D.
        generator: Source of randomness.
        antithetic: Items in pairs use t and D - 1 - t, which lowers the variance of the bound.

    Returns:
        Masks (D - t tokens each), times t uniform on 0 .. D-1, and the weights D / (D - t) that
        make the summed masked loss an unbiased bound on the log-likelihood.

    Source: ARDM (arXiv:2110.02037), eq. 3 and algorithm 2.
    """
    check_count("length", length)
    time = torch.randint(length, (batch,), generator=generator, device=generator.device)
    if antithetic:
        half = batch // 2
        time[half : 2 * half] = length - 1 - time[:half]
    rank = torch.rand((batch, length), generator=generator, device=generator.device)
    is_masked = rank.argsort(dim=-1).argsort(dim=-1) >= time[:, None]
    return is_masked, time, length / (length - time).float()


def draw_spans(
    length: int,
    generator: torch.Generator,
    *,
    rate: float = 1.0,
    max_spans: int = 1,
    num_spans: int | None = None,
) -> list[tuple[int, int]]:
    """Draw disjoint spans of a document to move to its end.

    The number is Poisson(rate) cut to [0, max_spans]. One span is sorted(u1, u2) * length, start
    rounded down and end to nearest, so its mean length is length / 3. For k > 1, k^2 candidates
    are drawn and taken from the last one back while they do not overlap.

    Args:
        length: Tokens of the document.
        generator: Source of randomness.
        rate: Mean of the Poisson number.
        max_spans: Sentinels available, minus the one kept for prompts.
        num_spans: Fixes the number instead of drawing it.

    Returns:
        (start, end) pairs, end exclusive, ascending, none empty; [] = a plain document.

    Source: CM3 (arXiv:2201.07520), section 2, and its released data transform.
    """
    if num_spans is None:
        mean = torch.tensor(rate, device=generator.device)
        num_spans = int(torch.poisson(mean, generator=generator))
    wanted = min(max(num_spans, 0), max_spans)
    if wanted == 0:
        return []
    pairs = torch.rand((wanted**2, 2), generator=generator, device=generator.device)
    ends = (pairs.sort(dim=-1).values.double() * length).tolist()
    spans: list[tuple[int, int]] = []
    for low, high in reversed(ends):
        start, end = math.floor(low), round(high)
        apart = all(end <= other_start or start >= other_end for other_start, other_end in spans)
        if end > start and apart and len(spans) < wanted:
            spans.append((start, end))
    return sorted(spans)


def segment_count_probs(length: int, decay: float = 0.9) -> Float[Tensor, " length"]:
    """Compute P(number of segments = 1 .. length), proportional to decay^(N - 1).

    Args:
        length: Tokens.
        decay: In (0, 1].

    Source: CausalFusion (arXiv:2412.12095), section 3.3.
    """
    check_range("decay", decay, 0.0, 1.0, open_low=True)
    weights = decay ** torch.arange(length, dtype=torch.float64)
    return weights / weights.sum()


def segment_sizes(length: int, generator: torch.Generator, decay: float = 0.9) -> list[int]:
    """Cut a sequence into a random number of segments at uniformly random places.

    Args:
        length: Tokens.
        generator: Source of randomness.
        decay: See `segment_count_probs`.

    Returns:
        Sizes >= 1 that sum to `length`.
    """
    check_count("length", length)
    cumulative = segment_count_probs(length, decay).cumsum(dim=0)
    draw = torch.rand((), generator=generator, device=generator.device, dtype=torch.float64).cpu()
    num_cuts = min(int(torch.searchsorted(cumulative, draw, right=True)), length - 1)
    places = torch.randperm(length - 1, generator=generator, device=generator.device)
    cuts = sorted((places[:num_cuts] + 1).tolist())
    return [end - start for start, end in pairwise([0, *cuts, length])]


def segment_weights(sizes: Sequence[int], first_weight: float = 2.0) -> Float[Tensor, " tokens"]:
    """Weigh every token by where its segment starts: w - (w - 1) * start / length.

    Args:
        sizes: Segment sizes in order.
        first_weight: Weight w of the first segment, falling towards 1.

    Source: CausalFusion (arXiv:2412.12095), difficulty weighting.
    """
    size = torch.tensor(list(sizes))
    start = size.cumsum(dim=0) - size
    weight = first_weight - (first_weight - 1) * start / size.sum()
    return weight.float().repeat_interleave(size)


def noise_levels(
    kind: str,
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    num_train_timesteps: int = 1000,
    stratified: bool = False,
) -> Float[Tensor, "*shape"]:
    """Draw noise levels, 1 = noise.

    Args:
        kind: "uniform", "logit_normal" (sigmoid of a normal number) or "ddpm" ((t + 1) / T for a
            uniform training time t).
        shape: [batch] for one level per item, [batch, blocks] for one per block.
        generator: Source of randomness.
        mean: Of the normal number; above 0 trains more on noise.
        std: Of the normal number, > 0.
        shift: Timestep shift applied last; not for "ddpm".
        num_train_timesteps: T of "ddpm".
        stratified: See `uniform`.

    Returns:
        Levels in [0, 1]; never 0 for "ddpm".

    Raises:
        UsageError: Unknown kind.

    Source: Stable Diffusion 3 (arXiv:2403.03206), section 3.1; ACDiT (arXiv:2412.07720).
    """
    check_one_of("noise level", kind, LEVELS)
    check_range("std", std, 0.0, open_low=True)
    u = uniform(shape, generator, stratified=stratified)
    if kind == "ddpm":
        time = (u * num_train_timesteps).floor().clamp(max=num_train_timesteps - 1)
        return (time + 1) / num_train_timesteps
    if kind == "logit_normal":
        # The inverse of the normal distribution is -inf at 0; half a float step keeps it finite.
        u = torch.sigmoid(mean + std * torch.special.ndtri(u.clamp(min=2**-25)))
    return shift_level(u, shift)


def flight_levels(
    batch: int,
    flight: Int[Tensor, " rows"],
    place: Int[Tensor, " rows"],
    size: int,
    generator: torch.Generator,
    *,
    shift: float = 1.0,
) -> Float[Tensor, "batch rows"]:
    """Draw the levels of blocks in flight together: each later one is one `size`-th noisier.

    Half of the flights are under way, their oldest block in the last `size`-th; the others have
    just begun, and blocks that have not are at level 1.

    Args:
        batch: Items.
        flight: Number of the flight each row belongs to, any distinct numbers.
        place: Place of the row's block in its flight, 0 = oldest.
        size: Blocks of a full flight.
        generator: Source of randomness.
        shift: Timestep shift applied last.

    Source: Rolling Forcing (arXiv:2509.25161), joint windows of rising noise; differs: levels are
        continuous here.
    """
    names, index = flight.unique(return_inverse=True)
    shape = (batch, len(names))
    start = torch.rand(shape, generator=generator)
    begun = torch.randint(size, shape, generator=generator)
    start = start + torch.where(torch.rand(shape, generator=generator) < 0.5, 0, begun)
    return shift_level(((start[:, index] + place) / size).clamp_max(1.0), shift)


def swap_tokens(
    values: Float[Tensor, "batch tokens width"] | Int[Tensor, "batch tokens width"],
    largest_share: float,
    generator: torch.Generator,
) -> Tensor:
    """Replace tokens by those that another item of the batch has in the same place.

    Every item draws its own share, uniform in [0, largest_share]; its tokens are then swapped
    independently with that probability. Wrong tokens of real pictures resemble a decoder's own
    mistakes more than random ids do.

    Args:
        values: Tokens or latents.
        largest_share: In [0, 1]; 0 returns the values unchanged.
        generator: Source of randomness.

    Raises:
        UsageError: A share outside [0, 1].

    Source: the idea of training on damaged context, e.g. scheduled sampling (arXiv:1506.03099) and
        noised context (arXiv:2408.14837); differs: the damage is another item's tokens.
    """
    check_range("largest_share", largest_share, 0.0, 1.0)
    if not largest_share:
        return values
    batch, tokens = values.shape[:2]
    share = largest_share * uniform((batch, 1), generator)
    chosen = torch.rand((batch, tokens), generator=generator, device=generator.device) < share
    donor = torch.randint(batch, (batch, tokens), generator=generator, device=generator.device)
    place = torch.arange(tokens, device=values.device)
    other = values[donor.to(values.device), place]
    return torch.where(chosen.to(values.device)[..., None], other, values)
