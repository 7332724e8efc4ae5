"""Routing: the best-fitting finished blocks, by hand and in closed form."""

import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.layout import Copy
from blockloom.core.layouts import frames as frame_layout
from blockloom.core.layouts import two_copy
from blockloom.core.routing import routing


def unit_keys(layout, directions):
    """Keys that point where their block says."""
    return torch.stack([directions[int(b)] for b in layout.block])[None, None]


def test_rows_read_the_blocks_whose_mean_key_fits_best():
    rows = two_copy(frame_layout(4, 1, 2))
    eye = torch.eye(4)
    route = routing(rows, rows, top=1)
    key = unit_keys(rows, eye)
    query = torch.zeros(1, 1, rows.num_tokens, 4)
    query[..., 1] = 1.0  # everybody likes block 1
    query[..., 0] = 0.5
    chosen = route.chosen(query, key)[0, 0]
    for row in range(rows.num_tokens):
        past = range(int(rows.block[row]))
        wanted = 1 if 1 in past else 0
        assert [b for b in past if chosen[row, b]] == [b for b in past if b == wanted]
    bias = route.bias(query, key)[0, 0]
    last_noisy = int(((rows.block == 3) & (rows.copy == Copy.NOISY)).nonzero()[0])
    hidden = bias[last_noisy].isinf()
    # Clean rows of blocks 0 and 2 are left out; noisy rows are the mask's affair.
    left_out = (rows.copy == Copy.CLEAN) & ((rows.block == 0) | (rows.block == 2))
    assert torch.equal(hidden, left_out)


def test_heads_and_items_choose_alone_and_grouped_keys_are_shared():
    rows = frame_layout(3, 1, 1)
    route = routing(rows, rows, top=1)
    key = torch.eye(3)[None, None].expand(2, 1, 3, 3)
    query = torch.zeros(2, 2, 3, 3)
    query[0, 0, 2, 0] = query[0, 1, 2, 1] = query[1, 0, 2, 1] = query[1, 1, 2, 0] = 1.0
    chosen = route.chosen(query, key)[:, :, 2, :2]
    assert chosen.tolist() == [[[True, False], [False, True]], [[False, True], [True, False]]]


def test_blocks_choose_by_their_mean_query():
    rows = frame_layout(3, 1, 2)
    key = unit_keys(rows, torch.eye(3))
    query = torch.zeros(1, 1, 6, 3)
    query[0, 0, 4, 0], query[0, 0, 5, 1] = 3.0, 1.0  # on the mean, block 0 wins
    alone = routing(rows, rows, top=1).chosen(query, key)[0, 0, 4:, :2]
    together = routing(rows, rows, top=1, per="block").chosen(query, key)[0, 0, 4:, :2]
    assert alone.tolist() == [[True, False], [False, True]]
    assert together.tolist() == [[True, False], [True, False]]


def test_nothing_is_routed_where_all_of_the_past_may_be_read():
    rows = frame_layout(3, 1, 2)
    assert routing(rows, rows, top=2) is None
    assert routing(rows, rows, top=1) is not None
    assert routing(rows.take(slice(0, 4)), rows, top=1) is None


def test_bad_settings_are_refused():
    rows = frame_layout(3, 1, 2)
    with pytest.raises(UsageError, match="route"):
        routing(rows, rows, top=0)
    with pytest.raises(UsageError, match="route_per"):
        routing(rows, rows, top=1, per="token")
