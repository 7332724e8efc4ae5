"""Positional operators: what is done to queries and keys so that scores depend on their relation.

Rotary positions in any number of axes (RoPE, arXiv:2104.09864): scores depend on differences of
positions only, which is condition (2) of the equivalence theorem: a cached key may be rotated at
read, at write, or re-based, without changing a logit. The channels of a head are split evenly among
the axes; what does not divide stays un-rotated. Camera poses (CaPE, arXiv:2402.03908): scores
depend on the pose of the key as seen from the query's camera only, so the same holds for a motion
of the whole scene.

Invariant: an operator is a pair of maps, of queries and of keys, and acts on every row by itself.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor


def rope_angles(
    position: Float[Tensor, "*batch tokens axes"], head_dim: int, theta: float = 100.0
) -> tuple[Float[Tensor, "*batch tokens half"], Float[Tensor, "*batch tokens half"]]:
    """Compute cosine and sine of the rotation angles.

    Angle of pair j on axis a: position[a] * theta^(-j / pairs), pairs = head_dim // (2 * axes).

    Args:
        position: Position ids, one per axis, in tokens; any float.
        head_dim: Channels of one head (even).
        theta: Base of the geometric frequencies; small grids want a small base.

    Returns:
        cos and sin, each over head_dim // 2 pairs; unused pairs have angle 0.

    Raises:
        ValueError: `head_dim` is odd.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim = {head_dim} must be even; try {head_dim + 1}")
    axes = position.shape[-1]
    pairs = head_dim // (2 * axes)
    step = torch.arange(pairs, dtype=torch.float64, device=position.device) / max(pairs, 1)
    frequency = theta**-step
    angles = rearrange(
        position.double()[..., None] * frequency, "... axes pairs -> ... (axes pairs)"
    )
    rest = head_dim // 2 - angles.shape[-1]
    angles = torch.nn.functional.pad(angles, (0, rest))
    return angles.cos(), angles.sin()


def rotate(
    x: Float[Tensor, "batch heads tokens head_dim"],
    angles: tuple[Tensor, Tensor],
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Rotate the pairs (j, j + half) of every head by the given angles.

    (a, b) -> (a cos - b sin, a sin + b cos). Angles are [tokens, half] or [batch, tokens, half].
    """
    cos, sin = (part.to(x.dtype) for part in angles)
    if cos.ndim == 3:
        cos, sin = cos[:, None], sin[:, None]
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (
            torch.addcmul(first * cos, second, sin, value=-1),
            torch.addcmul(second * cos, first, sin),
        ),
        dim=-1,
    )


def transform_groups(
    x: Float[Tensor, "batch heads tokens head_dim"], matrix: Float[Tensor, "batch tokens 4 4"]
) -> Float[Tensor, "batch heads tokens head_dim"]:
    """Multiply every group of four channels by the row's matrix.

    Products and sums stand one by one: a matrix kernel would round by the size of the batch.
    """
    groups = x.unflatten(-1, (-1, 4))
    wide = matrix.to(x.dtype)[:, None, :, None]
    out = wide[..., 0] * groups[..., :1]
    for column in range(1, 4):
        out = out + wide[..., column] * groups[..., column : column + 1]
    return out.flatten(-2)


class Positions(ABC):
    """What one pass does to queries and keys."""

    @abstractmethod
    def active(self, both: Tensor, heads: int) -> Tensor:
        """Transform the active rows' queries and keys, which lie behind each other in the heads.

        Args:
            both: [batch, heads + kv_heads, rows, head_dim].
            heads: How many of them are queries.
        """

    @abstractmethod
    def queries(self, query: Float[Tensor, "b h q d"]) -> Float[Tensor, "b h q d"]:
        """Transform queries of the active rows."""

    @abstractmethod
    def read(self, key: Float[Tensor, "b h k d"]) -> Float[Tensor, "b h k d"]:
        """Transform untransformed keys, cached and active."""


@dataclass(frozen=True)
class Rotary(Positions):
    """Rotary angles of the active rows and of all keys: cosines and sines as `rotate` takes."""

    rows: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]

    def active(self, both: Tensor, heads: int) -> Tensor:
        """Rotate all alike."""
        return rotate(both, self.rows)

    def queries(self, query: Float[Tensor, "b h q d"]) -> Float[Tensor, "b h q d"]:
        """Rotate by the active rows' angles."""
        return rotate(query, self.rows)

    def read(self, key: Float[Tensor, "b h k d"]) -> Float[Tensor, "b h k d"]:
        """Rotate by the keys' angles."""
        return rotate(key, self.keys)


class Unmoved(Positions):
    """Leaves queries and keys alone: places are known by what rows hold, or by a bias of scores."""

    def active(self, both: Tensor, heads: int) -> Tensor:
        """Return both as they are."""
        return both

    def queries(self, query: Float[Tensor, "b h q d"]) -> Float[Tensor, "b h q d"]:
        """Return the queries as they are."""
        return query

    def read(self, key: Float[Tensor, "b h k d"]) -> Float[Tensor, "b h k d"]:
        """Return the keys as they are."""
        return key


@dataclass(frozen=True)
class Cameras(Positions):
    """Poses: a key becomes P k, a query P^-T q, so their product is q^T P_q^-1 P_k k.

    `inverse` [batch, rows, 4, 4] holds P^-T of the active rows, `rows` their P, `keys` [batch,
    keys, 4, 4] P of all keys.

    Source: CaPE as CausNVS (arXiv:2509.06579) uses it.
    """

    inverse: Tensor
    rows: Tensor
    keys: Tensor

    def active(self, both: Tensor, heads: int) -> Tensor:
        """Transform queries by one map and keys by the other."""
        query, key = both.split_with_sizes((heads, both.shape[1] - heads), dim=1)
        return torch.cat((self.queries(query), transform_groups(key, self.rows)), 1)

    def queries(self, query: Float[Tensor, "b h q d"]) -> Float[Tensor, "b h q d"]:
        """Multiply by P^-T."""
        return transform_groups(query, self.inverse)

    def read(self, key: Float[Tensor, "b h k d"]) -> Float[Tensor, "b h k d"]:
        """Multiply by P."""
        return transform_groups(key, self.keys)


def inverse_transposed(pose: Float[Tensor, "*lead 4 4"]) -> Float[Tensor, "*lead 4 4"]:
    """Return P^-T of rigid motions [R t; 0 1], in closed form: [R 0; -(R^T t)^T 1]."""
    turn, place = pose[..., :3, :3], pose[..., :3, 3]
    back = -(turn * place[..., None]).sum(-2)
    out = torch.zeros_like(pose)
    out[..., :3, :3], out[..., 3, :3], out[..., 3, 3] = turn, back, 1.0
    return out
