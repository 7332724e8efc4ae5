"""Which blocks of the past a row reads, chosen by content: top-k routing.

A mask says who may be read; routing reads less of it. Every query scores the finished blocks before
its own by its product with their mean key, keeps the best few, and reads those and its own block.
It has no parameters. It knows neither caches nor models.

Invariant: the choice depends on the query and on the keys of blocks before its own alone, so rows
decoded with a cache that kept all blocks choose as rows of one masked pass do.

Source: MoBA (arXiv:2502.13189); history routing of Resampling Forcing (arXiv:2512.15702), section
3.3. Differs: prompt rows are always read.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import check_count, check_one_of
from .layout import Copy, Layout

PER = ("query", "block")


@dataclass(frozen=True, eq=False)
class Routing:
    """What one pass needs to route: made once, used by every layer.

    Attributes:
        top: Finished blocks a row reads.
        mean: [blocks, keys], the share of every key in the mean key of its block.
        is_past: [queries, blocks], blocks that finished before the row's own.
        block_of_key: [keys], row of `mean` a key belongs to; -1 = always read.
        same_block: [queries, queries], rows that choose together, by their mean query, as shares of
            1; None = every row and head chooses alone.
    """

    top: int
    mean: Float[Tensor, "blocks keys"]
    is_past: Bool[Tensor, "queries blocks"]
    block_of_key: Int[Tensor, " keys"]
    same_block: Float[Tensor, "queries queries"] | None

    def bias(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
    ) -> Float[Tensor, "batch heads queries keys"]:
        """Return 0 for keys a row reads and -inf for others.

        Args:
            query: Queries as they meet the keys (rotated).
            key: Keys likewise.
        """
        chosen = self.chosen(query, key)
        reads = chosen[..., self.block_of_key.clamp_min(0)] | (self.block_of_key < 0)
        return torch.zeros_like(reads, dtype=query.dtype).masked_fill(~reads, -torch.inf)

    def chosen(self, query: Tensor, key: Tensor) -> Bool[Tensor, "batch heads queries blocks"]:
        """Tell which blocks every row reads; blocks that are not past count as read.

        Args:
            query: As for `bias`.
            key: As for `bias`.
        """
        means = torch.einsum("nk,bhkd->bhnd", self.mean.to(key.dtype), key)
        means = means.repeat_interleave(query.shape[1] // key.shape[1], 1)
        if self.same_block is not None:
            query = torch.einsum("pq,bhqd->bhpd", self.same_block.to(query.dtype), query)
        score = torch.einsum("bhqd,bhnd->bhqn", query, means.to(query.dtype))
        score = score.masked_fill(~self.is_past, -torch.inf)
        best = score.topk(min(self.top, score.shape[-1]), dim=-1).indices
        chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
        return chosen | ~self.is_past


def routing(queries: Layout, keys: Layout, top: int, per: str = "query") -> Routing | None:
    """Prepare to route the rows of one pass; None when all of them may read all of the past.

    Args:
        queries: Active rows, one layout for the batch.
        keys: Cached and active rows.
        top: Finished blocks a row reads, at least 1.
        per: "query": every row and head chooses; "block": the rows of a block choose together.

    Raises:
        UsageError: `top` below 1, or an unknown `per`.
    """
    check_count("route", top)
    check_one_of("route_per", per, PER)
    is_clean = keys.copy == Copy.CLEAN
    # Noisy rows of a block that also stands clean among the keys are not what later rows read.
    has_clean = torch.isin(keys.block, keys.block[is_clean])
    counts = (keys.block >= 0) & (is_clean | ~has_clean)
    names = keys.block[counts].unique()
    belongs = (keys.block[None] == names[:, None]) & counts
    mean = belongs / belongs.sum(-1, keepdim=True).clamp_min(1)
    is_past = names[None] < queries.block[:, None]
    if int(is_past.sum(-1).max()) <= top:
        return None
    block_of_key = torch.where(counts, torch.searchsorted(names, keys.block.contiguous()), -1)
    same = None
    if per == "block":
        equal = (queries.block[:, None] == queries.block[None]) & (
            queries.copy[:, None] == queries.copy[None]
        )
        same = equal / equal.sum(-1, keepdim=True)
    return Routing(top, mean, is_past, block_of_key, same)
