"""Level matrices: which noise level every block has before and after every row.

What it is: M[rows + 1, blocks]; row s runs the model with blocks at M[s] and leaves them at
M[s + 1] (1 = noise or masked, 0 = clean), for the published shapes.
What it does not know: update rules, counts, models, caches.
Invariants: row 0 is all 1, the last row all 0, no block ever rises, every row moves a block.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from .errors import UsageError, check_count, check_divisible, check_one_of, describe


@dataclass(frozen=True)
class LevelRow:
    """One row of a level matrix.

    Attributes:
        index: Row number from 0.
        blocks: Blocks whose level changes, ascending.
        levels: Their levels before, in [0, 1].
        levels_next: Their levels after.
        steps: How many times each of them has moved before this row.
        finished: Blocks that reach 0 in this row.
    """

    index: int
    blocks: tuple[int, ...]
    levels: tuple[float, ...]
    levels_next: tuple[float, ...]
    steps: tuple[int, ...]
    finished: tuple[int, ...]


def check_levels(levels: Sequence[float | int]) -> list[float]:
    """Require a per-block level list that falls strictly from 1 to 0.

    Raises:
        UsageError: It does not.
    """
    values = [float(level) for level in levels]
    falls = all(a > b for a, b in pairwise(values))
    if len(values) < 2 or values[0] != 1.0 or values[-1] != 0.0 or not falls:
        raise UsageError(describe("levels", values, "a list that falls strictly from 1 to 0"))
    return values


def diagonal(
    levels: Sequence[float | int], num_blocks: int, delay: int = 1
) -> Float[Tensor, "rows blocks"]:
    """Start block b `delay` rows after block b - 1; delay 1 is the pyramid.

    Args:
        levels: Levels of one block, S + 1 numbers from 1 to 0.
        num_blocks: Blocks.
        delay: Rows between the starts of neighbours, >= 0.

    Returns:
        S + delay * (num_blocks - 1) + 1 rows, float64.

    Source: Diffusion Forcing (arXiv:2407.01392), pyramid sampling.

    Example:
        >>> diagonal([1, 0.5, 0], 2).tolist()
        [[1.0, 1.0], [0.5, 1.0], [0.0, 0.5], [0.0, 0.0]]
    """
    check_count("num_blocks", num_blocks)
    check_count("delay", delay, 0)
    table = torch.tensor(check_levels(levels), dtype=torch.float64)
    num_steps = len(table) - 1
    rows = torch.arange(num_steps + delay * (num_blocks - 1) + 1)
    step = rows[:, None] - delay * torch.arange(num_blocks)
    return table[step.clamp(0, num_steps)]


def flat(levels: Sequence[float | int], num_blocks: int) -> Float[Tensor, "rows blocks"]:
    """Move all blocks together: S + 1 rows.

    Args:
        levels: Levels of one block.
        num_blocks: Blocks.
    """
    return diagonal(levels, num_blocks, 0)


def staircase(levels: Sequence[float | int], num_blocks: int) -> Float[Tensor, "rows blocks"]:
    """Finish one block before the next begins: S * num_blocks + 1 rows.

    Args:
        levels: Levels of one block.
        num_blocks: Blocks.
    """
    return diagonal(levels, num_blocks, len(levels) - 1)


def sliding(
    levels: Sequence[float | int], num_blocks: int, window: int
) -> Float[Tensor, "rows blocks"]:
    """Keep at most `window` blocks in flight, evenly spread over the levels.

    Args:
        levels: Levels of one block; S must be a multiple of `window`.
        num_blocks: Blocks.
        window: Blocks between noise and clean at the same time.

    Raises:
        UsageError: S is not a multiple of `window`.

    Source: Rolling Forcing (arXiv:2509.25161); MAGI-1 (arXiv:2505.13211).
    """
    check_count("window", window)
    check_divisible("number of steps of a sliding window", len(levels) - 1, window)
    return diagonal(levels, num_blocks, (len(levels) - 1) // window)


def trapezoid(
    levels: Sequence[float | int], num_blocks: int, delay: int = 1
) -> Float[Tensor, "rows blocks"]:
    """Start at both ends and move inwards, `delay` rows between neighbours.

    Args:
        levels: Levels of one block.
        num_blocks: Blocks.
        delay: Rows between the starts of neighbours, >= 0.

    Source: Diffusion Forcing (arXiv:2407.01392), trapezoid sampling of its released code.

    Example:
        >>> trapezoid([1, 0.5, 0], 3).tolist()
        [[1.0, 1.0, 1.0], [0.5, 1.0, 0.5], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]]
    """
    half = diagonal(levels, (num_blocks + 1) // 2, delay)
    return torch.cat((half, half[:, : num_blocks // 2].flip(1)), 1)


def level_matrix(
    kind: str, levels: Sequence[float | int], num_blocks: int, *, delay: int = 1, flight: int = 1
) -> Float[Tensor, "rows blocks"]:
    """Build the matrix a recipe's `schedule.matrix` names.

    Args:
        kind: "autoregressive", "pyramid", "trapezoid", "full" or "rolling".
        levels: Levels of one block.
        num_blocks: Blocks.
        delay: Of "pyramid" and "trapezoid".
        flight: Blocks in flight of "rolling".

    Raises:
        UsageError: Unknown kind, or sizes the kind does not take.
    """
    kinds: dict[str, Callable[[], Tensor]] = {
        "autoregressive": lambda: staircase(levels, num_blocks),
        "pyramid": lambda: diagonal(levels, num_blocks, delay),
        "trapezoid": lambda: trapezoid(levels, num_blocks, delay),
        "full": lambda: flat(levels, num_blocks),
        "rolling": lambda: sliding(levels, num_blocks, flight),
    }
    check_one_of("schedule.matrix", kind, tuple(kinds))
    return kinds[kind]()


def check_matrix(matrix: Float[Tensor, "rows blocks"]) -> None:
    """Require the invariants of a level matrix.

    Raises:
        UsageError: A block rises, a row changes nothing, or the ends are not 1 and 0.
    """
    change = matrix[1:] - matrix[:-1]
    if not bool((matrix[0] == 1).all()) or not bool((matrix[-1] == 0).all()):
        raise UsageError(describe("level matrix", "open ends", "first row all 1, last row all 0"))
    if bool((change > 0).any()):
        raise UsageError(describe("level matrix", "a rising block", "levels that never rise"))
    if bool((change == 0).all(dim=-1).any()):
        raise UsageError(describe("level matrix", "an idle row", "rows that move a block"))


def level_rows(matrix: Float[Tensor, "rows blocks"]) -> list[LevelRow]:
    """Read a level matrix as the rows a decode loop runs.

    Args:
        matrix: A level matrix.

    Raises:
        UsageError: The matrix breaks an invariant.
    """
    check_matrix(matrix)
    table = matrix.tolist()
    steps = [0] * matrix.shape[1]
    rows = []
    for index, (before, after) in enumerate(pairwise(table)):
        moved = tuple(b for b in range(len(before)) if after[b] != before[b])
        rows.append(
            LevelRow(
                index=index,
                blocks=moved,
                levels=tuple(before[b] for b in moved),
                levels_next=tuple(after[b] for b in moved),
                steps=tuple(steps[b] for b in moved),
                finished=tuple(b for b in moved if after[b] == 0),
            )
        )
        for b in moved:
            steps[b] += 1
    return rows
