"""Camera poses beside tokens: which views are near, and what nearness means.

A pose is a 4 x 4 camera-to-world matrix [R t; 0 1]; translations are in units of the scene. It is
side information of a block, not of a token: masks read it through a table of blocks (the relation
POSE), attention through the positional operator (core/positions.py). It knows no models.

Invariant: nothing here changes when all poses are moved by one rigid motion.
"""

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .errors import UsageError
from .legality import POSE_NUMBERS

__all__ = ["POSE_NUMBERS", "nearest_blocks", "poses_of", "require_poses", "routes_of"]

LARGEST = 1e3
TOLERANCE = 1e-3


def poses_of(numbers: Float[Tensor, "*lead numbers"]) -> Float[Tensor, "*lead 4 4"]:
    """Read the last sixteen numbers as matrices; all zeros are the identity (nothing was said)."""
    last = numbers[..., -POSE_NUMBERS:]
    still = (last == 0).all(-1)[..., None, None]
    matrix = rearrange(last, "... (row column) -> ... row column", row=4)
    return torch.where(still, torch.eye(4, dtype=last.dtype, device=last.device), matrix)


def require_poses(numbers: Float[Tensor, "*lead numbers"]) -> None:
    """Check that the last sixteen numbers are rigid motions with translations of a sane size.

    Raises:
        UsageError: A matrix that no camera has.
    """
    pose = poses_of(numbers).double()
    turn = pose[..., :3, :3]
    square = turn @ turn.transpose(-1, -2) - torch.eye(3, dtype=pose.dtype, device=pose.device)
    last = pose[..., 3, :] - torch.tensor([0, 0, 0, 1.0], dtype=pose.dtype, device=pose.device)
    fits = bool(pose.isfinite().all()) and float(pose.abs().max()) <= LARGEST
    fits = fits and max(float(square.abs().max()), float(last.abs().max())) <= TOLERANCE
    if not fits or bool((torch.linalg.det(turn) < 0).any()):
        raise UsageError(
            "the last 16 numbers of every frame are its camera-to-world matrix, row by row: a "
            f"rotation, a translation within {LARGEST:g} scene radii and a last row 0 0 0 1; "
            "try the identity"
        )


def nearest_blocks(
    pose: Float[Tensor, "*lead blocks 4 4"], count: int
) -> Bool[Tensor, "*lead blocks blocks"]:
    """Select, for every block, the `count` earlier blocks whose poses are nearest to its own.

    Distance: Frobenius norm of the difference of the matrices, so a turn by the angle a counts as
    much as a step of 2 sqrt(2) sin(a / 2). Of equally near blocks the later one is nearer.

    Args:
        pose: One pose per block, in order of generation.
        count: At least 1.

    Returns:
        True at [query, key] where the key's block is selected; never for the own or later blocks.

    Source: the pose-based window of CausNVS (arXiv:2509.06579); its distance is not public.
    """
    exact = pose.double()
    gap = exact[..., :, None, :3, :] - exact[..., None, :, :3, :]
    distance = gap.square().sum((-1, -2))
    blocks = pose.shape[-3]
    rank = torch.arange(blocks, device=pose.device)
    is_past = rank[None, :] < rank[:, None]
    distance = distance.masked_fill(~is_past, torch.inf)
    # A stable sort from the latest block back lets the later of two equals win.
    order = distance.flip(-1).argsort(dim=-1, stable=True)
    place = torch.empty_like(order).scatter_(-1, order, rank.expand_as(order)).flip(-1)
    return (place < count) & is_past


def routes_of(
    names: frozenset[str], pose: Float[Tensor, "*lead blocks 4 4"] | None, block: Int[Tensor, " q"],
    num_blocks: int,
) -> dict[str, Bool[Tensor, "*lead q blocks"]]:  # fmt: skip
    """Build the tables that the POSE relations of a mask read.

    Args:
        names: Of `MaskTable.route_names`; those of other kinds are left out.
        pose: One pose per block; None = all alike, so that the nearest are the last ones.
        block: Block of every query row; below 0 for prompt rows, which read no past.
        num_blocks: Blocks that queries and keys may belong to.
    """
    wanted = [name for name in sorted(names) if name.startswith("pose:")]
    if not wanted:
        return {}
    if pose is None:
        pose = torch.eye(4, device=block.device).expand(num_blocks, 4, 4)
    rows = block.clamp_min(0)
    return {
        name: nearest_blocks(pose, int(name.removeprefix("pose:")))[..., rows, :] for name in wanted
    }
