"""Values that nobody knows are found and filled."""

import pytest
import torch

from blockloom.core.missing import split_unknown, unknown_slots

NAN = float("nan")


@pytest.mark.parametrize(
    ("values", "unknown", "filled"),
    [
        ([[[3, -1], [0, 2]]], [[True, False]], [[[0, 0], [0, 2]]]),
        ([[[1.0, NAN], [NAN, NAN], [2.0, -1]]], [[True, True, False]], [[[0, 0], [0, 0], [2, -1]]]),
    ],
)  # fmt: skip
def test_a_slot_with_any_unknown_part_is_unknown_and_filled_with_zeros(values, unknown, filled):
    given = torch.tensor(values)
    before = given.clone()
    got, found = split_unknown(given)
    assert found.tolist() == unknown == unknown_slots(given).tolist()
    assert got.tolist() == filled and got.dtype == given.dtype
    assert torch.equal(given.nan_to_num(9.0), before.nan_to_num(9.0))  # the argument is left alone
