"""Measure pictures: reconstruction and prompt retrieval.

Works on numpy arrays and never downloads anything. It does not know models or pipelines: the
caller generates the pictures. Invariant: every result is a plain JSON dictionary that names the
descriptor it was measured with, so numbers of different descriptors cannot be mixed.

Prompt retrieval asks: among all pictures of the wanted style, is the wanted one nearest to the
generated one? Pictures are compared by the L2 distance of their 16x16 area means in RGB.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from einops import reduce
from numpy.typing import NDArray

from ..core.errors import DataError

Images = NDArray[np.uint8]
DESCRIPTOR = "rgb-16x16-area-mean-l2"
DESCRIPTOR_SIDE = 16
RECALLS = (1, 5, 10)
Z_95 = 1.959963984540054
PSNR_LIMIT_DB = 100.0


def check_images(name: str, images: Images) -> None:
    """Refuse anything but a non-empty stack of RGB pictures.

    Args:
        name: What the array is called in the message.
        images: Array to check.

    Raises:
        DataError: Not uint8 [items, height, width, 3], or no items.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not len(images):
        raise DataError(
            f"{name} must be uint8 [items, height, width, 3] with at least one item, got "
            f"{images.dtype} {list(images.shape)}"
        )


def area_means(images: Images, side: int) -> NDArray[np.float32]:
    """Shrink pictures to side x side by averaging equal areas.

    Args:
        images: uint8 [items, height, width, 3]; both extents must be multiples of `side`.
        side: Cells per axis.

    Returns:
        float32 [items, side * side * 3] in [0, 1], raster order, channels last.

    Raises:
        DataError: Wrong array, or an extent that does not split evenly.
    """
    check_images("images", images)
    height, width = images.shape[1:3]
    if height % side or width % side:
        raise DataError(
            f"pictures of {height}x{width} do not split into {side}x{side} equal cells; "
            f"use extents that are multiples of {side}"
        )
    pattern = "n (h p) (w q) c -> n (h w c)"
    # Row by row in float64 would cost eight times the memory; float32 sums of < 2^24 are exact.
    sums = reduce(images.astype(np.float32), pattern, "sum", h=side, w=side)
    return sums / np.float32(255 * (height // side) * (width // side))


def psnr(original: Images, reconstructed: Images) -> dict[str, Any]:
    """Measure the peak signal-to-noise ratio of reconstructions.

    Args:
        original: uint8 [items, height, width, 3].
        reconstructed: Same shape.

    Returns:
        `psnr_db`: mean over pictures, each capped at 100 dB; `psnr_of_mean_error_db`: of the
        pooled squared error; `num_images`.

    Raises:
        DataError: Wrong arrays or different shapes.
    """
    check_images("original", original)
    check_images("reconstructed", reconstructed)
    if original.shape != reconstructed.shape:
        raise DataError(
            f"original and reconstructed differ in shape: {list(original.shape)} and "
            f"{list(reconstructed.shape)}"
        )
    errors = [
        np.square(a.astype(np.float64) - b.astype(np.float64)).mean() / 255**2
        for a, b in zip(original, reconstructed, strict=True)
    ]
    return {
        "psnr_db": float(np.mean([_decibel(error) for error in errors])),
        "psnr_of_mean_error_db": _decibel(float(np.mean(errors))),
        "num_images": len(original),
    }


def _decibel(error: float) -> float:
    """Turn a squared error relative to the peak into dB, capped so that JSON can hold it."""
    return min(PSNR_LIMIT_DB, -10 * math.log10(max(error, 1e-30)))


def wilson_interval(hits: float, trials: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion.

    Args:
        hits: Successes, in [0, trials]; may be fractional when ties are averaged.
        trials: Independent trials, at least 1.

    Returns:
        Lower and upper end in [0, 1].

    Source: Wilson (1927), without continuity correction.
    """
    share, z2 = hits / trials, Z_95**2
    centre = share + z2 / (2 * trials)
    half = Z_95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    low, high = (centre - half) / (1 + z2 / trials), (centre + half) / (1 + z2 / trials)
    return (0.0 if hits == 0 else low, 1.0 if hits == trials else high)


def bootstrap_interval(
    values: NDArray[np.float64], clusters: Sequence[Any], *,
    base: NDArray[np.float64] | None = None, draws: int = 2000, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Return the 95 % percentile interval of a mean when values come in dependent clusters.

    Pictures of one name in several styles succeed or fail together, so whole names are resampled.

    Args:
        values: One number per item.
        clusters: Cluster label of every item.
        base: The same items measured otherwise, for the interval of the ratio of the two means;
            resamples without any of it are left out. None = the mean alone.
        draws: Resamples.
        seed: Seed of the resampling.

    Returns:
        Lower and upper end.
    """
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    totals = np.bincount(index, weights=values)
    counts = np.bincount(index, weights=base).astype(np.float64)
    picks = np.random.default_rng(seed).integers(0, len(counts), size=(draws, len(counts)))
    sums = counts[picks].sum(axis=1)
    means = totals[picks].sum(axis=1)[sums > 0] / sums[sums > 0]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def target_ranks(
    generated: Images,
    target_index: Sequence[int] | NDArray[np.int64],
    gallery: Images,
    gallery_style: Sequence[Any] | None = None,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rank the right picture among all gallery pictures of its style.

    Args:
        generated: uint8 [items, height, width, 3].
        target_index: Gallery number of the right picture of every item.
        gallery: uint8 [pictures, height, width, 3], any extent that is a multiple of 16.
        gallery_style: Style of every gallery picture; None puts all into one style.

    Returns:
        Rank of the right picture, 1 = nearest (pictures at exactly the same distance count
        against it), and the number of candidates; both int64 [items].

    Raises:
        DataError: Arrays of the wrong kind or lengths that do not fit.
    """
    target = np.asarray(target_index, dtype=np.int64)
    style = np.zeros(len(gallery), np.int64) if gallery_style is None else np.asarray(gallery_style)
    if len(target) != len(generated) or len(style) != len(gallery):
        raise DataError(
            f"{len(generated)} generated pictures with {len(target)} targets and {len(gallery)} "
            f"gallery pictures with {len(style)} styles do not fit together"
        )
    if target.min() < 0 or target.max() >= len(gallery):
        raise DataError(
            f"target_index spans {target.min()}..{target.max()}; legal values are "
            f"0..{len(gallery) - 1}"
        )
    queries = area_means(generated, DESCRIPTOR_SIDE).astype(np.float64)
    shelves = area_means(gallery, DESCRIPTOR_SIDE).astype(np.float64)
    ranks, sizes = np.empty(len(target), np.int64), np.empty(len(target), np.int64)
    for row, (query, right) in enumerate(zip(queries, target, strict=True)):
        candidates = np.flatnonzero(style == style[right])
        distance = np.square(shelves[candidates] - query).sum(axis=1)
        ranks[row] = (distance <= distance[candidates == right]).sum()
        sizes[row] = len(candidates)
    return ranks, sizes


def retrieval(
    generated: Images,
    target_index: Sequence[int],
    gallery: Images,
    gallery_style: Sequence[Any] | None = None,
    clusters: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Measure how often the generated picture is nearest to the picture its prompt names.

    Args:
        generated: uint8 [items, height, width, 3].
        target_index: Gallery number of the picture each prompt names.
        gallery: All pictures, of training and held-out names alike.
        gallery_style: Style of every gallery picture; only the prompt's style competes.
        clusters: Label of dependent items (the name), for a bootstrap over clusters; None assumes
            independent items and gives Wilson intervals.

    Returns:
        JSON dictionary: for k in 1, 5, 10 `recall_at_k`, its 95 % interval and the chance level;
        `median_rank`, `mean_candidates`, `num_items`, descriptor and interval names.

    Raises:
        DataError: Arrays of the wrong kind or lengths that do not fit.
    """
    ranks, sizes = target_ranks(generated, target_index, gallery, gallery_style)
    hits = {k: (ranks <= k).astype(np.float64) for k in RECALLS}
    result = recall_report(hits, sizes, clusters)
    return result | {"median_rank": float(np.median(ranks))}


def recall_report(
    hits: dict[int, NDArray[np.float64]],
    sizes: NDArray[np.int64],
    clusters: Sequence[Any] | None,
) -> dict[str, Any]:
    """Turn hits per item into recalls with intervals and chance levels.

    Args:
        hits: For every k a number in [0, 1] per item; fractions where ties were averaged.
        sizes: Candidates per item.
        clusters: As in `retrieval`.

    Returns:
        JSON dictionary, see `retrieval`.

    Raises:
        DataError: Not one cluster label per item.
    """
    num_items = len(sizes)
    if clusters is not None and len(clusters) != num_items:
        raise DataError(f"{len(clusters)} cluster labels for {num_items} items")
    result: dict[str, Any] = {
        "descriptor": DESCRIPTOR,
        "interval": "wilson-95" if clusters is None else "cluster-bootstrap-95",
        "num_items": num_items,
        "mean_candidates": float(sizes.mean()),
    }
    for k, values in hits.items():
        if clusters is None:
            interval = wilson_interval(float(values.sum()), num_items)
        else:
            interval = bootstrap_interval(values, clusters)
        result[f"recall_at_{k}"] = float(values.mean())
        result[f"recall_at_{k}_interval"] = list(interval)
        result[f"chance_at_{k}"] = float(np.minimum(k / sizes, 1.0).mean())
    return result
