"""Retrieval baselines that copy training pictures: what a generator must beat to have learned more.

Works on captions and numpy arrays; knows no models. Invariant: baselines are measured by the same
`evaluation.target_ranks` as generated pictures.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError, check_one_of
from ..models.text import split_words
from .evaluation import RECALLS, Images, recall_report, target_ranks

TIE_TOLERANCE = 1e-9
PICKS = ("mean", "best")


def copied_retrieval(
    sources: Sequence[NDArray[np.int64]],
    source_images: Images,
    target_index: Sequence[int],
    gallery: Images,
    gallery_style: Sequence[Any] | None = None,
    *,
    pick: str = "mean",
    clusters: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Measure retrieval when every answer is copied from a list of pictures.

    Args:
        sources: For every item the numbers of the pictures it may copy, at least one.
        source_images: uint8 [pictures, height, width, 3] the numbers refer to.
        target_index: Gallery number of the right picture of every item.
        gallery: As in `evaluation.retrieval`.
        gallery_style: As in `evaluation.retrieval`.
        pick: "mean" copies a random source (hits are averaged over them); "best" copies the one
            nearest to the right picture, an upper bound that looks at the answer.
        clusters: As in `evaluation.retrieval`.

    Returns:
        JSON dictionary as from `evaluation.retrieval`, plus `pick` and `mean_sources`.

    Raises:
        DataError: Lengths that do not fit, or an item without sources.
    """
    check_one_of("pick", pick, PICKS)
    if len(sources) != len(target_index):
        raise DataError(f"{len(sources)} lists of sources for {len(target_index)} targets")
    count = np.array([len(numbers) for numbers in sources])
    if (count == 0).any():
        raise DataError(f"item {int(count.argmin())} has no picture to copy")
    owner = np.repeat(np.arange(len(sources)), count)
    starts = np.cumsum(count) - count
    targets = np.asarray(target_index, dtype=np.int64)[owner]
    shown = source_images[np.concatenate(list(sources))]
    ranks, sizes = target_ranks(shown, targets, gallery, gallery_style)
    best = np.minimum.reduceat(ranks, starts)
    hits = {}
    for k in RECALLS:
        mean = np.add.reduceat((ranks <= k).astype(np.float64), starts) / count
        hits[k] = mean if pick == "mean" else (best <= k).astype(np.float64)
    report = recall_report(hits, sizes[starts], clusters)
    return report | {"pick": pick, "mean_sources": float(count.mean())}


def same_name_baseline(
    target_index: Sequence[int],
    gallery: Images,
    gallery_style: Sequence[Any],
    gallery_name: Sequence[Any],
    is_train: Sequence[bool],
    *,
    pick: str = "mean",
) -> dict[str, Any]:
    """Measure copying a training picture of the same name, which is in another style.

    Only meaningful for held-out pairs of a known name and a known style. Intervals resample names.

    Args:
        target_index: Gallery numbers of the held-out pictures.
        gallery: uint8 [pictures, height, width, 3].
        gallery_style: Style of every picture.
        gallery_name: Name of every picture.
        is_train: True for pictures the model was trained on.
        pick: "mean" over the other styles, or "best" of them, see `copied_retrieval`.

    Returns:
        JSON dictionary as from `copied_retrieval`, plus `baseline`.

    Raises:
        DataError: Lengths that do not fit, or a name without any training picture.
    """
    names, trained = np.asarray(gallery_name), np.asarray(is_train, dtype=bool)
    if len(names) != len(gallery) or len(trained) != len(gallery):
        raise DataError(
            f"{len(names)} names and {len(trained)} split marks for {len(gallery)} pictures"
        )
    wanted = names[np.asarray(target_index, dtype=np.int64)]
    sources = [np.flatnonzero(trained & (names == name)) for name in wanted]
    report = copied_retrieval(
        sources, gallery, target_index, gallery, gallery_style, pick=pick, clusters=wanted.tolist()
    )
    return report | {"baseline": "same-name-other-style"}


def nearest_captions(
    queries: Sequence[str], captions: Sequence[str]
) -> list[tuple[float, NDArray[np.int64]]]:
    """Find the captions most similar to each query; all that tie for the best are returned.

    Similarity is the cosine between sets of words weighted by log((1 + n) / (1 + df)), where df
    counts the captions that hold the word: rare words (the name) outweigh common ones (the style).

    Args:
        queries: Captions to look up.
        captions: Captions to search.

    Returns:
        For every query the similarity in [0, 1] and the ascending numbers of the tied captions.

    Raises:
        DataError: Nothing to search.
    """
    if not captions:
        raise DataError("no captions to search; pass at least one training caption")
    words = [frozenset(split_words(caption)) for caption in captions]
    count = Counter(word for bag in words for word in bag)
    weight = {word: math.log((1 + len(captions)) / (1 + n)) ** 2 for word, n in count.items()}
    unseen = math.log(1 + len(captions)) ** 2
    # Sorted: a set's order changes from process to process and with it the last bits of a sum.
    norms = np.array([math.sqrt(sum(weight[word] for word in sorted(bag))) for bag in words])
    holders: dict[str, list[int]] = {}
    for number, bag in enumerate(words):
        for word in bag:
            holders.setdefault(word, []).append(number)
    return [_best_matches(query, holders, weight, unseen, norms) for query in queries]


def _best_matches(
    query: str,
    holders: dict[str, list[int]],
    weight: dict[str, float],
    unseen: float,
    norms: NDArray[np.float64],
) -> tuple[float, NDArray[np.int64]]:
    """Score one query against all captions through the inverted index."""
    bag = sorted(set(split_words(query)))
    dots = np.zeros(len(norms))
    for word in bag:
        dots[holders.get(word, [])] += weight.get(word, 0.0)
    norm = math.sqrt(sum(weight.get(word, unseen) for word in bag))
    scores = dots / np.maximum(norms * norm, 1e-12)
    return float(scores.max()), np.flatnonzero(scores >= scores.max() - TIE_TOLERANCE)


def caption_baseline(
    queries: Sequence[str],
    target_index: Sequence[int],
    train_captions: Sequence[str],
    train_images: Images,
    gallery: Images,
    gallery_style: Sequence[Any] | None = None,
    *,
    clusters: Sequence[Any] | None = None,
) -> dict[str, Any]:
    """Measure copying the training picture with the nearest caption, see `nearest_captions`.

    Needs no names or styles, so it also answers prompts with unknown names. For a held-out pair it
    mostly finds the same name in another style; which style depends on how common its word is, so
    for such pairs `same_name_baseline` is the fairer number.

    Args:
        queries: Prompts.
        target_index: Gallery number of the picture each prompt names.
        train_captions: Captions the model was trained on.
        train_images: Their pictures, uint8 [captions, height, width, 3].
        gallery: As in `evaluation.retrieval`.
        gallery_style: As in `evaluation.retrieval`.
        clusters: As in `evaluation.retrieval`.

    Returns:
        JSON dictionary as from `copied_retrieval`, plus `baseline` and `mean_similarity`.

    Raises:
        DataError: Arrays of the wrong kind or lengths that do not fit.
    """
    if len(train_captions) != len(train_images):
        raise DataError(f"{len(train_captions)} captions with {len(train_images)} pictures")
    found = nearest_captions(queries, train_captions)
    sources = [numbers for _, numbers in found]
    report = copied_retrieval(
        sources, train_images, target_index, gallery, gallery_style, clusters=clusters
    )
    return report | {
        "baseline": "nearest-training-caption-idf-cosine",
        "mean_similarity": float(np.mean([score for score, _ in found])),
    }
