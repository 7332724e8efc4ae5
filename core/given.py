"""Given slots: which ones a recipe is always given, and what must hold before a request is decoded.

It does not know models or schedules.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from .errors import UsageError
from .plan import DecodePlan


def is_given(source: Int[Tensor, "*rows"], per_frame: int, given: int) -> Bool[Tensor, "*rows"]:
    """Tell which data slots hold tokens that are always given: the first ones of every frame.

    Args:
        source: Data slots; negative ones are prompt rows, which are no tokens.
        per_frame: Slots of a frame.
        given: Of `layout.given`.
    """
    return (source >= 0) & (source % per_frame < given)


def require_equal_counts(plan: DecodePlan, is_known: Bool[Tensor, "batch slots"]) -> None:
    """Refuse given slots that differ in number from item to item, or in place where that matters.

    Rows of a block are planned for its open slots, so all items must have equally many. Where rows
    say whether they are known, and where given slots come first, all must have the same ones.

    Args:
        plan: Layouts of the request.
        is_known: Which slots are given.

    Raises:
        UsageError: They differ; the first block that does is named.
    """
    if plan.order == "any" and bool((is_known != is_known[:1]).any()):
        raise UsageError(
            "given slots differ from item to item, and this recipe's rows are ordered by them; "
            "try one request per item"
        )
    block = plan.content.block.to(is_known.device)
    source = plan.content.source.to(is_known.device)
    laid_out = len(plan.rows_of_block)
    counts = torch.zeros(len(is_known), laid_out, dtype=torch.int64, device=is_known.device)
    counts.index_add_(1, block, is_known[:, source].long())
    differs = (counts != counts[:1]).any(0)
    if bool(differs.any()):
        worst = int(differs.nonzero()[0, 0])
        raise UsageError(
            f"given slots of block {worst}: {counts[:, worst].tolist()} per item; items of one "
            "request must have equally many; try one request per item"
        )
