"""Stages of a block: levels in turn, and what training shows of them."""

import pytest
import torch

from blockloom.core.stages import draw_levels, level_mask, residual_level, stages_of


def test_residual_levels_are_those_published():
    u = torch.tensor([0.0, 0.25, 0.5, 0.75, 0.999])
    assert residual_level(u, 6).tolist() == [1, 1, 2, 3, 5]
    assert residual_level(u, 2).tolist() == [1] * 5
    with pytest.raises(ValueError, match="num_levels"):
        residual_level(u, 1)


def test_half_of_the_draws_are_the_lowest_level_and_low_ones_lead_the_rest():
    drawn = draw_levels((20_000,), 6, torch.Generator().manual_seed(0))
    counts = drawn.bincount(minlength=6) / len(drawn)
    assert abs(float(counts[0]) - 0.5) < 0.01
    # Level 1 takes u up to where (1 - cos) * 4 = 1/2: arccos(7/8) / (pi/2) = 0.3217 of the rest.
    assert abs(float(counts[1]) - 0.5 * 0.3217) < 0.01
    assert bool((counts[1:-1] > counts[2:]).all())
    assert draw_levels((3,), 1, torch.Generator()).tolist() == [0, 0, 0]


def test_stages_take_the_levels_of_a_block_in_turn():
    stages = stages_of(torch.arange(6, 12), [4, 2, 1])
    assert [stage.tokens.tolist() for stage in stages] == [
        [True, False, False, True, False, False],
        [False, True, False, False, True, False],
        [False, False, True, False, False, True],
    ]
    assert [stage.steps for stage in stages] == [4, 2, 1]
    assert [s.steps for s in stages_of(torch.arange(6), [4, 1], num_steps=9)] == [9, 1]
    (alone,) = stages_of(torch.arange(3), ())
    slots = torch.tensor([[True, False, True]])
    assert alone.steps is None and torch.equal(alone.among(slots), slots)
    first = stages_of(torch.arange(4), [1, 1])[0]
    assert first.among(torch.ones(1, 4, dtype=torch.bool)).tolist() == [[True, False, True, False]]


def test_a_level_is_hidden_by_its_share_and_all_above_it_whole():
    source = torch.arange(8 * 3)
    block = torch.zeros(24, dtype=torch.long)
    drawn = torch.tensor([[0], [1], [2]])
    ratio = torch.full((3, 1), 0.5)
    hidden, is_drawn = level_mask(
        ratio, drawn, block, source, [4, 4, 1], torch.Generator().manual_seed(1)
    )
    by_level = hidden.unflatten(1, (8, 3)).sum(1)
    assert by_level.tolist() == [[4, 8, 8], [0, 4, 8], [0, 0, 8]]  # one row: hidden whole
    assert is_drawn.unflatten(1, (8, 3)).sum(1).tolist() == [[8, 0, 0], [0, 8, 0], [0, 0, 8]]


def test_every_block_has_a_level_of_its_own():
    source, block = torch.arange(8), torch.arange(8) // 4
    hidden, is_drawn = level_mask(
        torch.ones(1, 2), torch.tensor([[1, 0]]), block, source, [1, 1], torch.Generator()
    )
    assert hidden[0].tolist() == [False, True, False, True, True, True, True, True]
    assert is_drawn[0].tolist() == [False, True, False, True, True, False, True, False]
