"""Which masked slots a row reveals: scores, score transforms and accept rules.

What it is: pure functions of tensors, one per published rule, vectorised over batch rows.
What it does not know: schedulers, models, caches.
Invariants: the result is a subset of `is_masked`; every item that still has masks gets at least
one slot; counts are exact under ties (lower slot index first), because selection is by rank and
not by a cut-off value; rows never influence one another.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import check_one_of
from .sampling import TokenStats, per_item_gumbel

STAT_SCORES = ("confidence", "max_prob", "margin", "entropy")


def base_score(name: str, stats: TokenStats, *, log: bool = False) -> Float[Tensor, "batch slots"]:
    """Turn token statistics into a score, higher = reveal first.

    Args:
        name: "confidence" (probability of the drawn code), "max_prob", "margin", or "entropy"
            (its negative).
        stats: Statistics of the drawn codes.
        log: Take the logarithm of a probability, the scale on which MaskGIT adds its noise.

    Raises:
        UsageError: Unknown name.
    """
    check_one_of("score", name, STAT_SCORES)
    if name == "entropy":
        return -stats.entropy
    score = {"confidence": stats.prob, "max_prob": stats.max_prob, "margin": stats.margin}[name]
    # float64: the vector and scalar float32 logarithms differ in the last bit, by batch position.
    safe = score.double().clamp(min=torch.finfo(torch.float32).tiny)
    return safe.log().float() if log else score


def add_choice_noise(
    score: Float[Tensor, "batch slots"],
    choice_temperature: float,
    generators: Sequence[torch.Generator],
) -> Float[Tensor, "batch slots"]:
    """Perturb scores with Gumbel noise times a temperature.

    With scores on a log scale this draws slots without replacement in proportion to
    exp(score / choice_temperature), so Dream's multinomial choice is the same function.

    Args:
        score: Higher = earlier.
        choice_temperature: 0 adds nothing and consumes no random numbers.
        generators: One CPU generator per item.
    """
    if choice_temperature == 0.0:
        return score
    return score + choice_temperature * per_item_gumbel(score.shape[1:], generators, score.device)


def scale_eos(
    score: Float[Tensor, "batch slots"],
    is_eos: Bool[Tensor, "batch slots"],
    gamma: float | int,
) -> Float[Tensor, "batch slots"]:
    """Hold back slots that predict the end token: multiply their (positive) score by gamma.

    Args:
        score: Probabilities in [0, 1].
        is_eos: Slots whose drawn code is the end token.
        gamma: In [0, 1], see `eos_gamma`.
    """
    return torch.where(is_eos, score * gamma, score)


def eos_gamma(progress: float, low: float = 0.4, high: float = 1.0) -> float:
    """Look up the end-token factor: low + (high - low) * progress.

    Args:
        progress: s / (S - 1) with S the rows of the WHOLE canvas; a per-block step index would
            restart the factor in every block.
        low: Factor at the first row.
        high: Factor at the last row.

    Source: EOSER (arXiv:2509.23924).
    """
    return low + (high - low) * progress


def restrict_first(
    is_masked: Bool[Tensor, "batch slots"], first_k: int
) -> Bool[Tensor, "batch slots"]:
    """Keep the first k masked slots of every item as candidates, in slot order.

    Args:
        is_masked: Candidates so far.
        first_k: How many to keep; 0 keeps all.
    """
    if first_k <= 0:
        return is_masked
    return is_masked & (is_masked.long().cumsum(dim=-1) <= first_k)


def _score_rank(
    score: Float[Tensor, "batch slots"], is_masked: Bool[Tensor, "batch slots"]
) -> Int[Tensor, "batch slots"]:
    """Rank slots by falling score, masked slots before all others, ties by slot index."""
    floor = torch.finfo(score.dtype).min
    # A masked slot with score -inf or nan still comes before a slot that may not be chosen.
    usable = score.nan_to_num(nan=floor, neginf=floor).masked_fill(~is_masked, -torch.inf)
    return usable.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


def accept_top_n(
    score: Float[Tensor, "batch slots"],
    is_masked: Bool[Tensor, "batch slots"],
    count: int | Int[Tensor, " batch"],
) -> Bool[Tensor, "batch slots"]:
    """Accept exactly the `count` best slots of every item, or all that are left if fewer.

    Args:
        score: Higher = better.
        is_masked: Candidates.
        count: Per item or shared; values below 1 act as 1.
    """
    limit = torch.as_tensor(count, device=score.device).clamp(min=1)
    return is_masked & (_score_rank(score, is_masked) < limit.reshape(-1, 1))


def accept_threshold(
    confidence: Float[Tensor, "batch slots"],
    is_masked: Bool[Tensor, "batch slots"],
    threshold: float | int,
) -> Bool[Tensor, "batch slots"]:
    """Accept every slot whose confidence reaches the threshold, and always the best one.

    Source: Fast-dLLM (arXiv:2505.22618), confidence-aware parallel decoding.
    """
    return (is_masked & (confidence >= threshold)) | accept_top_n(confidence, is_masked, 1)


def accept_quota(
    confidence: Float[Tensor, "batch slots"],
    is_masked: Bool[Tensor, "batch slots"],
    threshold: float | int,
    quota: int | Int[Tensor, " batch"],
) -> Bool[Tensor, "batch slots"]:
    """Accept the slots above the threshold, or the best `quota` when those are fewer.

    Source: LLaDA2 block decoding: max(threshold set, quota).
    """
    return accept_threshold(confidence, is_masked, threshold) | accept_top_n(
        confidence, is_masked, quota
    )


def accept_entropy_budget(
    score: Float[Tensor, "batch slots"],
    entropy: Float[Tensor, "batch slots"],
    is_masked: Bool[Tensor, "batch slots"],
    gamma: float | int,
) -> Bool[Tensor, "batch slots"]:
    """Accept the longest prefix U, by falling score, with sum_U H - max_U H <= gamma.

    Args:
        score: Negative error proxy; -entropy by default in the paper.
        entropy: H in nats, >= 0.
        is_masked: Candidates.
        gamma: Budget in nats; 0 accepts one slot (and further slots of zero entropy).

    Source: EB-Sampler (arXiv:2505.24857), eq. 6.
    """
    rank = _score_rank(score, is_masked)
    order = rank.argsort(dim=-1)
    sorted_entropy = entropy.gather(-1, order).double()
    spent = sorted_entropy.cumsum(dim=-1) - sorted_entropy.cummax(dim=-1).values
    # Tolerance: entropies are float32 sums, and a budget equal to one of them should admit it.
    return _accept_prefix(spent <= gamma + 1e-6, rank, is_masked)


def _accept_prefix(
    fits: Bool[Tensor, "batch slots"],
    rank: Int[Tensor, "batch slots"],
    is_masked: Bool[Tensor, "batch slots"],
) -> Bool[Tensor, "batch slots"]:
    """Accept ranks up to the first that does not fit; `fits` is in rank order."""
    length = fits.long().cumprod(dim=-1).sum(dim=-1, keepdim=True).clamp(min=1)
    return is_masked & (rank < length)


def accept_factor(
    confidence: Float[Tensor, "batch slots"],
    is_masked: Bool[Tensor, "batch slots"],
    factor: float | int = 1.0,
) -> Bool[Tensor, "batch slots"]:
    """Accept the n best slots for the largest n with (n + 1) (1 - c_(n)) <= factor.

    With factor 1 the greedy parallel draw equals the greedy sequential one (Theorem 1).

    Args:
        confidence: Probabilities in [0, 1].
        is_masked: Candidates.
        factor: > 0; larger is bolder.

    Source: Fast-dLLM (arXiv:2505.22618), Theorem 1.
    """
    rank = _score_rank(confidence, is_masked)
    sorted_confidence = confidence.gather(-1, rank.argsort(dim=-1)).double()
    size = torch.arange(1, confidence.shape[-1] + 1, device=confidence.device)
    fits = (size + 1) * (1 - sorted_confidence) <= factor + 1e-6
    # Not a prefix rule: a later n may fit where an earlier one does not.
    fits &= size <= is_masked.sum(dim=-1, keepdim=True)
    length = (fits * size).amax(dim=-1, keepdim=True).clamp(min=1)
    return is_masked & (rank < length)


def accept_confident_prefix(
    confidence: Float[Tensor, "batch slots"],
    is_masked: Bool[Tensor, "batch slots"],
    threshold: float | int,
    rank: Float[Tensor, "*batch slots"] | None = None,
) -> Bool[Tensor, "batch slots"]:
    """Accept masked slots in order up to the first unsure one, and always the first.

    Args:
        confidence: Probabilities in [0, 1].
        is_masked: Candidates.
        threshold: Least confidence.
        rank: Reveal order, lower first; slot index when None.

    Source: CARD (arXiv:2601.22031).
    """
    slots = torch.arange(confidence.shape[-1], device=confidence.device, dtype=torch.float32)
    order_score = -(slots if rank is None else rank.float()).expand_as(confidence)
    place = _score_rank(order_score, is_masked)
    return _accept_prefix(
        confidence.gather(-1, place.argsort(dim=-1)) >= threshold, place, is_masked
    )


def distance_entropy(
    entropy: Float[Tensor, "batch slots"],
    is_masked: Bool[Tensor, "batch slots"],
    weight: float,
) -> Float[Tensor, "batch slots"]:
    """Add `weight` nats per slot of distance from the item's first mask.

    Source: WeDLM (arXiv:2512.22737): H + lambda * distance.
    """
    first = is_masked.long().argmax(dim=-1, keepdim=True)
    slots = torch.arange(entropy.shape[-1], device=entropy.device)
    return entropy + weight * (slots - first).clamp(min=0)


def accept_low_entropy(
    entropy: Float[Tensor, "batch slots"],
    is_masked: Bool[Tensor, "batch slots"],
    threshold: float | int,
    *,
    distance_weight: float = 0.0,
) -> Bool[Tensor, "batch slots"]:
    """Accept every slot whose distance-weighted entropy is below the threshold, or the lowest.

    Args:
        entropy: H in nats.
        is_masked: Candidates.
        threshold: tau in nats; strict.
        distance_weight: lambda in nats per slot from the first mask.

    Source: WeDLM (arXiv:2512.22737).
    """
    cost = distance_entropy(entropy, is_masked, distance_weight)
    return (is_masked & (cost < threshold)) | accept_top_n(-cost, is_masked, 1)


def longest_match(
    draft: Int[Tensor, "batch slots"], target: Int[Tensor, "batch slots"]
) -> Int[Tensor, " batch"]:
    """Count the leading slots where a draft equals the verifier's codes (Jacobi decoding)."""
    return (draft == target).long().cumprod(dim=-1).sum(dim=-1)


def accept_rejection(
    draft_prob: Float[Tensor, "batch slots"],
    target_prob: Float[Tensor, "batch slots"],
    uniform: Float[Tensor, "batch slots"],
) -> Int[Tensor, " batch"]:
    """Count the leading draft codes that pass u < p / q.

    Args:
        draft_prob: q, probability the draft gave its own code, > 0.
        target_prob: p, probability the verifier gives that code.
        uniform: u in [0, 1).

    Source: speculative sampling (arXiv:2302.01318), algorithm 2.
    """
    return (uniform * draft_prob < target_prob).long().cumprod(dim=-1).sum(dim=-1)


def longest_path(parents: Sequence[int], is_right: Bool[Tensor, "batch nodes"]) -> list[list[int]]:
    """Find each item's longest root path of right nodes in a draft tree.

    Args:
        parents: Parent of every node, -1 for roots; parents come before children.
        is_right: Whether the verifier agrees with a node given its own path.

    Returns:
        Node indices from the root down, per item; [] when no root is right.
    """
    paths = []
    for right in is_right.tolist():
        depth = [0] * len(parents)
        for node, parent in enumerate(parents):
            above = 0 if parent < 0 else depth[parent]
            depth[node] = above + 1 if right[node] and (parent < 0 or above > 0) else 0
        node = max(range(len(parents)), key=depth.__getitem__, default=-1)
        path: list[int] = []
        while node >= 0 and depth[node] > 0:
            path.append(node)
            node = parents[node]
        paths.append(path[::-1])
    return paths
