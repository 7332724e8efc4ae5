"""Which items a step trains on, and seeds: pure functions of (seed, step).

A shuffle kept in memory would be lost on a resume; one that is computed is not.
"""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor


def seed_for(*parts: int | str) -> int:
    """Hash parts to a seed in [0, 2^32), stable over machines and Python versions.

    Args:
        parts: For instance the run's seed, a purpose and a step.
    """
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big")


def batch_indices(seed: int, step: int, batch_size: int, num_items: int) -> Tensor:
    """Choose the items of one step: consecutive places of endlessly reshuffled epochs.

    Args:
        seed: The run's seed.
        step: Step from 0.
        batch_size: Items per step; may exceed `num_items`.
        num_items: Items in an epoch; each comes once per epoch.

    Returns:
        int64 [batch_size].
    """
    places = torch.arange(step * batch_size, (step + 1) * batch_size)
    epochs, within = places // num_items, places % num_items
    parts = [
        _epoch_order(seed, int(epoch), num_items)[within[epochs == epoch]]
        for epoch in epochs.unique()
    ]
    return torch.cat(parts)


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, num_items: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_for(seed, "epoch", epoch))
    return torch.randperm(num_items, generator=generator)
