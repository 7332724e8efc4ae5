"""Positional operators: only differences of places count, and only relative cameras."""

import math

import pytest
import torch

from blockloom.core.positions import (
    Cameras,
    inverse_transposed,
    rope_angles,
    rotate,
    transform_groups,
)


def test_angles_are_position_times_falling_frequencies():
    cos, sin = rope_angles(torch.tensor([[3.0]]), 8, theta=16.0)
    angles = [3 * 16.0 ** (-j / 4) for j in range(4)]
    assert cos[0].tolist() == pytest.approx([math.cos(a) for a in angles])
    assert sin[0].tolist() == pytest.approx([math.sin(a) for a in angles])


def test_axes_share_the_channels_and_the_rest_is_not_rotated():
    position = torch.tensor([[1.0, 2.0, 3.0]])
    cos, sin = rope_angles(position, 20)  # 3 pairs per axis, 1 pair left over
    assert cos.shape == (1, 10) and cos[0, 9] == 1 and sin[0, 9] == 0
    for axis in range(3):
        own, _ = rope_angles(position[:, axis : axis + 1], 6)
        assert torch.equal(cos[0, 3 * axis : 3 * axis + 3], own[0])


def test_scores_depend_on_differences_only():
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 1, 5, 16, dtype=torch.float64, generator=rng) for _ in range(2))
    position = torch.randint(0, 9, (5, 2), generator=rng).double()

    def scores(shift):
        angles = rope_angles(position + torch.tensor(shift), 16)
        return rotate(q, angles) @ rotate(k, angles).transpose(-1, -2)

    plain = scores([0.0, 0.0])
    assert (scores([7.0, -3.0]) - plain).abs().max() < 1e-12
    assert (q @ k.transpose(-1, -2) - plain).abs().max() > 0.1
    norm = rotate(q, rope_angles(position, 16)).norm(dim=-1)
    assert torch.allclose(norm, q.norm(dim=-1), atol=1e-12)


def test_batched_positions_rotate_each_item_by_its_own():
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 4, 8, generator=rng)
    position = torch.randint(0, 5, (2, 4, 1), generator=rng).float()
    both = rotate(x, rope_angles(position, 8))
    for item in range(2):
        own = rotate(x[item : item + 1], rope_angles(position[item], 8))
        assert torch.equal(own[0], both[item])


def test_odd_heads_are_refused():
    with pytest.raises(ValueError, match="head_dim = 7 must be even; try 8"):
        rope_angles(torch.zeros(1, 1), 7)


# -- cameras ----------------------------------------------------------------------------------


def cameras(items, rows, seed=0):
    """Random rigid motions [items, rows, 4, 4]."""
    rng = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(items, rows, 3, 3, generator=rng, dtype=torch.float64))
    pose = torch.eye(4, dtype=torch.float64).repeat(items, rows, 1, 1)
    pose[..., :3, :3] = turn * torch.linalg.det(turn)[..., None, None].sign()
    pose[..., :3, 3] = torch.randn(items, rows, 3, generator=rng, dtype=torch.float64)
    return pose


def test_every_group_of_four_channels_is_multiplied_by_the_rows_matrix():
    pose = cameras(2, 3)
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    got = transform_groups(x, pose)
    for item, row in ((0, 0), (1, 2)):
        wide = torch.block_diag(pose[item, row], pose[item, row])
        assert torch.allclose(got[item, :, row], x[item, :, row] @ wide.T, atol=1e-14)
    single = transform_groups(x.float(), pose.float())
    assert torch.equal(transform_groups(x[1:].float(), pose[1:].float())[0], single[1])


def test_the_inverse_of_a_rigid_motion_is_known_in_closed_form():
    pose = cameras(2, 4)
    wanted = torch.linalg.inv(pose).transpose(-1, -2)
    assert torch.allclose(inverse_transposed(pose), wanted, atol=1e-13)


def scores(pose, keys):
    rng = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 2, 5, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    op = Cameras(inverse_transposed(pose), pose, keys)
    return op.queries(q) @ op.read(k).transpose(-1, -2), op, q, k


def test_scores_know_the_key_as_seen_from_the_query_only():
    pose = cameras(1, 5)
    own, op, q, k = scores(pose, pose)
    relative = torch.linalg.inv(pose[0])[:, None] @ pose[0][None]
    for query, key in ((0, 0), (1, 4), (3, 2)):
        wide = torch.block_diag(relative[query, key], relative[query, key])
        wanted = (q[0, :, query] * (k[0, :, key] @ wide.T)).sum(-1)
        assert torch.allclose(own[0, :, query, key], wanted, atol=1e-12)
    moved = cameras(1, 1, seed=9) @ pose
    assert torch.allclose(scores(moved, moved)[0], own, atol=1e-12)
    stretched = pose * torch.tensor([2.0, 1, 1, 1]).double()
    assert not torch.allclose(scores(stretched, stretched)[0], own, atol=1e-3)
    # Transformed when written or when read, a key is the same key.
    both = op.active(torch.cat((q, k[:, :1]), 1), 2)
    assert torch.equal(both[:, :2], op.queries(q)) and torch.equal(both[:, 2:], op.read(k)[:, :1])
