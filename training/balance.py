"""Rare kinds of items more often: in what order a run goes through unevenly filled data.

The kind of an item is read off its caption. An epoch repeats the items of rare kinds, so that the
shares of the kinds are closer than in the data. It does not know pictures, clips or the loop.

Source: square-root sampling of long-tailed data, as compared in arXiv:1910.09217, section 3, in the
repeated form of arXiv:1908.03195. Differs: the repeats of an epoch are fixed, not drawn.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from ..core.errors import check_one_of

KINDS = ("none", "caption", "subject")


def kind_of(caption: str, balance: str) -> str:
    """Name what is balanced: the whole caption, or its subject, the part before the first comma."""
    return caption if balance == "caption" else caption.partition(",")[0].strip()


def balanced_order(captions: Sequence[str], balance: str) -> Int[Tensor, " places"] | None:
    """List the items of one epoch, those of rare kinds several times.

    A kind of n items fills a share in proportion to the square root of n. Items of the largest kind
    come once; of a kind that needs r times as many, item k comes floor((k + 1) r) - floor(k r)
    times, so all its items come about equally often.

    Args:
        captions: One per item.
        balance: "none", "caption" or "subject".

    Returns:
        Numbers of items, ascending; None for "none".

    Raises:
        UsageError: Another word.
    """
    check_one_of("train.balance", balance, KINDS)
    if balance == "none":
        return None
    kinds = [kind_of(caption, balance) for caption in captions]
    count = Counter(kinds)
    largest, seen = max(count.values()), Counter[str]()
    repeats = []
    for kind in kinds:
        rate = (largest / count[kind]) ** 0.5
        k = seen[kind]
        repeats.append(int((k + 1) * rate) - int(k * rate))
        seen[kind] += 1
    return torch.repeat_interleave(torch.arange(len(kinds)), torch.tensor(repeats))
