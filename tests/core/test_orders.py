import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.orders import (
    halton_order,
    make_rank,
    order_to_rank,
    radical_inverse,
    random_rank,
    raster_order,
)
from blockloom.core.sampling import item_generator


def streams(*keys):
    return [item_generator(0, key) for key in keys]


def test_first_halton_cells():
    cells = [divmod(cell, 16) for cell in halton_order(16, 16)[:8].tolist()]
    expected = [(8, 5), (4, 10), (12, 1), (2, 7), (10, 12), (6, 3), (14, 8), (1, 14)]
    assert cells == expected


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (5, 1), (3, 3), (16, 16), (6, 20)])
def test_halton_visits_every_cell_once(height, width):
    assert sorted(halton_order(height, width).tolist()) == list(range(height * width))


def test_radical_inverse_is_exact_where_floats_are_not():
    # 1/3, 2/3, 1/9 of three cells
    assert radical_inverse(torch.tensor([0, 1, 2, 3]), 3, 3).tolist() == [0, 1, 2, 0]
    assert radical_inverse(torch.tensor([1, 2, 3, 4]), 2, 16).tolist() == [8, 4, 12, 2]


def test_halton_spreads_early_cells_better_than_raster():
    quarters = {(cell // 16 // 8, cell % 16 // 8) for cell in halton_order(16, 16)[:6].tolist()}
    assert len(quarters) == 4


def test_rank_inverts_order():
    order = halton_order(4, 5)
    rank = order_to_rank(order)
    assert rank[order].tolist() == list(range(20))


def test_random_rank_is_a_uniform_permutation_per_item():
    rank = random_rank(6, streams(*range(3000)))
    assert (rank.sort(dim=-1).values == torch.arange(6)).all()
    assert torch.allclose(rank.float().mean(dim=0), torch.full((6,), 2.5), atol=0.15)
    assert torch.equal(rank[11:12], random_rank(6, streams(11)))


def test_make_rank_kinds_and_roll():
    raster = make_rank("raster", 2, 3, streams(0, 1))
    assert raster.tolist() == [[0, 1, 2, 3, 4, 5]] * 2 and raster.dtype == torch.float32
    halton = make_rank("halton", 16, 16, streams(0))
    assert halton[0, 8 * 16 + 5] == 0 and halton[0, 4 * 16 + 10] == 1
    rolled = make_rank("halton", 16, 16, streams(*range(8)), roll=True)
    assert (rolled.sort(dim=-1).values == torch.arange(256)).all()
    shifts = (rolled - halton) % 256
    assert (shifts == shifts[:, :1]).all() and len(set(shifts[:, 0].tolist())) > 4
    assert torch.equal(rolled[3:4], make_rank("halton", 16, 16, streams(3), roll=True))
    assert torch.equal(raster_order(2, 2), torch.arange(4))


def test_errors():
    with pytest.raises(UsageError, match=r"haltn.*halton"):
        make_rank("haltn", 2, 2, streams(0))
    with pytest.raises(UsageError, match=r"height.*0"):
        halton_order(0, 4)
