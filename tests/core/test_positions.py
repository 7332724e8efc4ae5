"""Rotary positions: only differences count, in any number of axes."""

import math

import pytest
import torch

from blockloom.core.positions import rope_angles, rotate


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
