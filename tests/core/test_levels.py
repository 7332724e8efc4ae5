import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.levels import (
    check_matrix,
    diagonal,
    flat,
    level_matrix,
    level_rows,
    sliding,
    staircase,
    trapezoid,
)

LEVELS = [1.0, 0.75, 0.5, 0.25, 0.0]


def test_flat_moves_all_blocks_together():
    matrix = flat(LEVELS, 3)
    assert matrix.tolist() == [[level] * 3 for level in LEVELS]


def test_staircase_finishes_a_block_before_the_next():
    matrix = staircase([1, 0.5, 0], 2)
    assert matrix.tolist() == [[1, 1], [0.5, 1], [0, 1], [0, 0.5], [0, 0]]
    for row in level_rows(staircase(LEVELS, 5)):
        assert len(row.blocks) == 1


def test_one_step_staircase_is_plain_autoregression():
    rows = level_rows(staircase([1, 0], 4))
    assert [(row.blocks, row.finished) for row in rows] == [((b,), (b,)) for b in range(4)]


def test_diagonal_delays_each_block():
    matrix = diagonal(LEVELS, 3, 2)
    assert matrix.shape == (4 + 2 * 2 + 1, 3)
    for b in range(3):
        assert matrix[2 * b : 2 * b + 5, b].tolist() == LEVELS
        assert (matrix[: 2 * b, b] == 1).all() and (matrix[2 * b + 5 :, b] == 0).all()


@pytest.mark.parametrize("window", [1, 2, 4])
def test_sliding_keeps_at_most_window_blocks_in_flight(window):
    rows = level_rows(sliding(LEVELS, 6, window))
    assert max(len(row.blocks) for row in rows) == window
    middle = rows[len(rows) // 2]
    assert len(middle.blocks) == window
    assert list(middle.levels) == sorted(middle.levels)  # the oldest block is the cleanest
    if window == 1:
        assert torch.equal(sliding(LEVELS, 6, 1), staircase(LEVELS, 6))


def test_trapezoid_moves_both_ends_first():
    matrix = trapezoid(LEVELS, 5)
    assert torch.equal(matrix, matrix.flip(1))
    assert torch.equal(matrix[:, :3], diagonal(LEVELS, 3))
    assert [row.finished for row in level_rows(matrix)][-3:] == [(0, 4), (1, 3), (2,)]


def test_matrices_by_the_name_a_recipe_gives_them():
    wanted = {
        "autoregressive": staircase(LEVELS, 4),
        "pyramid": diagonal(LEVELS, 4, 2),
        "trapezoid": trapezoid(LEVELS, 4, 2),
        "full": flat(LEVELS, 4),
        "rolling": sliding(LEVELS, 4, 2),
    }
    for kind, matrix in wanted.items():
        assert torch.equal(level_matrix(kind, LEVELS, 4, delay=2, flight=2), matrix)
    with pytest.raises(UsageError, match="pyramid"):
        level_matrix("pyramide", LEVELS, 4)


@pytest.mark.parametrize("shape", [flat, staircase, diagonal, lambda v, n: sliding(v, n, 2)])
def test_rows_replay_the_matrix(shape):
    matrix = shape(LEVELS, 4)
    check_matrix(matrix)
    state, moves = [1.0] * 4, [0] * 4
    for row in level_rows(matrix):
        assert row.levels == tuple(state[b] for b in row.blocks)
        assert row.steps == tuple(moves[b] for b in row.blocks)
        for b, level in zip(row.blocks, row.levels_next, strict=True):
            state[b] = level
            moves[b] += 1
        assert all(state[b] == 0 for b in row.finished)
    assert state == [0.0] * 4 and moves == [4] * 4


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: flat([1.0, 0.5], 2), r"\[1\.0, 0\.5\]"),
        (lambda: flat([1.0, 1.0, 0.0], 2), "strictly"),
        (lambda: sliding(LEVELS, 4, 3), "4.*multiples of 3.*3"),
        (lambda: flat(LEVELS, 0), "num_blocks.*0"),
        (lambda: check_matrix(torch.tensor([[1.0], [0.5]])), "open ends"),
        (lambda: check_matrix(torch.tensor([[1.0], [0.5], [0.5], [0.0]])), "idle"),
        (lambda: check_matrix(torch.tensor([[1.0], [0.5], [0.6], [0.0]])), "rising"),
    ],
)
def test_errors(call, match):
    with pytest.raises(UsageError, match=match):
        call()
