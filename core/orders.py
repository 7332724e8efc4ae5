"""Orders in which slots are revealed that do not look at the model's output.

What it is: raster, random and Halton orders as ranks (lower is revealed earlier).
What it does not know: counts, confidence, schedulers.
Invariants: a rank row is a permutation of 0..n-1; a random rank depends on the item's own
generator only.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import check_count, check_one_of
from .sampling import per_item_rand

RANK_ORDERS = ("random", "raster", "halton")


def raster_order(height: int, width: int) -> Int[Tensor, " cells"]:
    """List the cells of a grid row by row, as raster indices."""
    return torch.arange(height * width)


def radical_inverse(
    index: Int[Tensor, " points"], base: int, extent: int
) -> Int[Tensor, " points"]:
    """Find the cell of each point of a van der Corput sequence, in whole numbers.

    The cell is floor(extent * phi), with phi the index mirrored around the point.

    Args:
        index: Point numbers >= 0.
        base: Digits are mirrored around the point in this base.
        extent: Number of cells along the axis.

    Returns:
        Cells in [0, extent). Whole numbers, because 1/3 of 3 cells is 0.999... in floats.
    """
    digits, numerator, denominator = index.clone(), torch.zeros_like(index), 1
    while bool((digits > 0).any()):
        numerator = numerator * base + digits % base
        digits = digits // base
        denominator *= base
    return numerator * extent // denominator


def halton_order(height: int, width: int) -> Int[Tensor, " cells"]:
    """List the cells of a grid in the order a two-dimensional Halton sequence visits them.

    Row = base 2, column = base 3, starting at point 1; only the first visit of a cell counts.

    Args:
        height: Rows.
        width: Columns.

    Returns:
        Raster index (row * width + column) of every cell, a permutation.

    Source: Halton-MaskGIT (arXiv:2503.17076), section 3.2; differs: exact integer arithmetic.

    Example:
        >>> [divmod(cell, 16) for cell in halton_order(16, 16)[:3].tolist()]
        [(8, 5), (4, 10), (12, 1)]
    """
    check_count("grid height", height)
    check_count("grid width", width)
    num_cells = height * width
    num_points = max(16, 4 * num_cells)
    while True:
        index = torch.arange(1, num_points + 1)
        cells = radical_inverse(index, 2, height) * width + radical_inverse(index, 3, width)
        first_visit = torch.full((num_cells,), num_points)
        first_visit.scatter_reduce_(0, cells, index - 1, "amin")
        if bool((first_visit < num_points).all()):
            return first_visit.argsort()
        # Every cell holds a whole elementary box of the sequence, so this ends.
        num_points *= 2


def order_to_rank(order: Int[Tensor, "*batch cells"]) -> Int[Tensor, "*batch cells"]:
    """Invert a visiting order: rank[order[i]] = i."""
    return order.argsort(dim=-1)


def random_rank(length: int, generators: Sequence[torch.Generator]) -> Int[Tensor, "batch cells"]:
    """Draw a uniformly random order for every item.

    Args:
        length: Slots.
        generators: One CPU generator per item.
    """
    keys = per_item_rand((length,), generators, dtype=torch.float64)
    return order_to_rank(keys.argsort(dim=-1, stable=True))


def make_rank(
    kind: str,
    height: int,
    width: int,
    generators: Sequence[torch.Generator],
    *,
    roll: bool = False,
    device: torch.device | str | None = None,
) -> Float[Tensor, "batch cells"]:
    """Make the reveal rank of every cell and item; lower is earlier.

    Args:
        kind: "random" (a fresh permutation per item), "raster" or "halton".
        height: Grid rows (1 for a plain sequence).
        width: Grid columns.
        generators: One CPU generator per item; only "random" and `roll` consume numbers.
        roll: Start the order at a random place per item, wrapping around.
        device: Where the rank goes.

    Returns:
        float32 ranks; columns follow raster cells.

    Raises:
        UsageError: Unknown kind.
    """
    check_one_of("rank order", kind, RANK_ORDERS)
    num_cells, batch = height * width, len(generators)
    if kind == "random":
        rank = random_rank(num_cells, generators)
    else:
        order = halton_order(height, width) if kind == "halton" else raster_order(height, width)
        rank = order_to_rank(order).expand(batch, num_cells)
    if roll:
        offset = (per_item_rand((1,), generators, dtype=torch.float64) * num_cells).long()
        rank = (rank - offset) % num_cells
    return rank.to(device, torch.float32)
