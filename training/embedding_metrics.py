"""Measure generated items by their vectors in a space that text and items share.

Works on numpy arrays of vectors [items, dim] and knows neither motions nor encoders. Invariant:
what the literature estimates on random pools and pairs is computed exactly over all of them.

Source: metrics of Guo et al., CVPR 2022, section 5 (R-precision, multimodal distance, diversity,
multimodality), after Guo et al., ACM MM 2020 (diversity, multimodality). Differs: expected values
over all pools and pairs instead of 32-item batches, 300 and 10 random pairs; pools hold different
texts only.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from ..core.errors import DataError
from .evaluation import Z_95, bootstrap_interval

POOL = 32
"""Texts of a pool, as published, where there are as many different ones."""
RANKS = (1, 2, 3)

Vectors = Float[np.ndarray, "items dim"]


def distances(items: Vectors, others: Vectors) -> Float[np.ndarray, "items others"]:
    """Return the Euclidean distance of every item to every other."""
    difference = items[:, None].astype(np.float64) - others[None].astype(np.float64)
    return np.linalg.norm(difference, axis=-1)


def precision_hits(
    items: Vectors, texts: Vectors, target: Int[np.ndarray, " items"], pool: int = POOL
) -> dict[int, Float[np.ndarray, " items"]]:
    """Return the chance of each item that its text is among the k nearest of a random pool.

    A pool is the right text and `pool - 1` others, all sets being equally likely. With B of the D
    others at most as far as the right one, that is P(X < k) for the hypergeometric X of pool - 1
    draws from D with B marked. A tie counts against the item.

    Args:
        items: One vector per item.
        texts: One vector per different text.
        target: Number of each item's text.
        pool: Texts per pool; all of them where there are fewer.

    Returns:
        For k = 1, 2, 3 a number in [0, 1] per item.

    Raises:
        DataError: Not one target per item, or no such text.
    """
    if len(target) != len(items) or not len(items):
        raise DataError(f"{len(target)} targets for {len(items)} items; needed one for each")
    if target.min() < 0 or target.max() >= len(texts):
        raise DataError(f"targets {target.min()}..{target.max()} of {len(texts)} texts")
    far = distances(items, texts)
    right = far[np.arange(len(items)), target]
    nearer = (far <= right[:, None]).sum(1) - 1
    others = len(texts) - 1
    drawn = min(pool, len(texts)) - 1
    total = math.comb(others, drawn)

    def chance(marked: int, k: int) -> float:
        ways = [math.comb(marked, j) * math.comb(others - marked, drawn - j)
                for j in range(min(k, drawn + 1))]  # fmt: skip
        return sum(ways) / total

    return {k: np.array([chance(int(b), k) for b in nearer]) for k in RANKS}


def matched_distances(
    items: Vectors, texts: Vectors, target: Int[np.ndarray, " items"]
) -> Float[np.ndarray, " items"]:
    """Return the distance of every item to its own text (multimodal distance)."""
    return np.linalg.norm(items.astype(np.float64) - texts[target], axis=-1)


def diversity(items: Vectors) -> float | None:
    """Average the distance over all pairs of items; None for fewer than two items."""
    if len(items) < 2:
        return None
    return float(distances(items, items)[np.triu_indices(len(items), 1)].mean())


def multimodality(groups: Sequence[Vectors]) -> Float[np.ndarray, " groups"]:
    """Average, in each group of items of one text, the distance over all pairs.

    Args:
        groups: Vectors of at least two items each.

    Raises:
        DataError: A group of one item.
    """
    for number, group in enumerate(groups):
        if len(group) < 2:
            raise DataError(f"group {number} has {len(group)} item; a pair needs two")
    return np.array([diversity(group) for group in groups], dtype=np.float64)


def with_interval(values: NDArray[np.float64], clusters: Sequence[Any]) -> dict[str, Any]:
    """Return a mean, its 95 % interval (whole clusters resampled) and the number of items."""
    low, high = bootstrap_interval(values, clusters)
    return {"value": float(values.mean()), "interval": [low, high], "n": len(values)}


def ratio_interval(
    values: NDArray[np.float64], base: NDArray[np.float64], clusters: Sequence[Any]
) -> dict[str, Any]:
    """Return the ratio of two means over the same items, with a paired cluster bootstrap.

    Args:
        values: One number per item.
        base: The same items, measured on what is compared with.
        clusters: Label of dependent items.

    Returns:
        `value` and its 95 % percentile `interval`; None where the base is 0.
    """
    if not base.sum():
        return {"value": None, "interval": None, "n": len(values)}
    interval = bootstrap_interval(values, clusters, base=base)
    value = float(values.sum() / base.sum())
    return {"value": value, "interval": list(interval), "n": len(values)}


def jackknife_interval(
    measure: Callable[[NDArray[np.bool_]], float], clusters: Sequence[Any]
) -> tuple[float, float] | None:
    """Return an interval of +-1.96 standard errors, each cluster left out once.

    Fit for smooth statistics of a whole set, such as a Frechet distance, that a bootstrap biases.

    Args:
        measure: Takes bool [items], True where an item is kept.
        clusters: Cluster of every item.

    Returns:
        Lower (at least 0) and upper end; None for fewer than two clusters.

    Source: Efron and Stein (1981), delete-one standard error, over clusters.
    """
    labels = np.asarray(clusters)
    kinds = np.unique(labels)
    if len(kinds) < 2:
        return None
    value = measure(np.ones(len(labels), bool))
    without = np.array([measure(labels != kind) for kind in kinds])
    count = len(kinds)
    error = math.sqrt((count - 1) / count * np.square(without - without.mean()).sum())
    return max(0.0, value - Z_95 * error), value + Z_95 * error
