"""Layouts: defaults, row selection, batching, joining."""

import pytest
import torch

from blockloom.core.layout import ATTRIBUTES, Copy, Layout, Role


def test_make_fills_defaults_and_broadcasts_scalars():
    layout = Layout.make(3, block=7, level=0.5)
    assert layout.block.tolist() == [7, 7, 7]
    assert layout.order.tolist() == layout.source.tolist() == [0, 1, 2]
    assert layout.position.tolist() == [[0.0], [1.0], [2.0]]
    assert layout.level.tolist() == [0.5, 0.5, 0.5]
    assert layout.document.tolist() == layout.copy.tolist() == [0, 0, 0]
    assert layout.block.dtype == torch.int64
    assert layout.level.dtype == torch.float32


def test_position_defaults_to_the_order_given():
    assert Layout.make(3, order=[5, 1, 2]).position[:, 0].tolist() == [5.0, 1.0, 2.0]


def test_one_batched_attribute_makes_the_layout_batched():
    layout = Layout.make(3, block=torch.tensor([[0, 0, 1], [0, 1, 1]]))
    assert layout.is_batched
    assert layout.order.tolist() == [[0, 1, 2], [0, 1, 2]]
    assert layout.position.shape == (2, 3, 1)


def test_square_position_is_read_as_rows_by_axes():
    layout = Layout.make(2, position=torch.tensor([[0, 1], [2, 3]]))
    assert layout.num_axes == 2
    assert layout.position.tolist() == [[0.0, 1.0], [2.0, 3.0]]


def test_take_keeps_every_attribute_of_the_chosen_rows():
    layout = Layout.make(5, block=torch.arange(5) // 2, level=torch.arange(5) / 5)
    picked = layout.take(torch.tensor([4, 0]))
    assert picked.block.tolist() == [2, 0]
    assert picked.order.tolist() == [4, 0]
    assert picked.level.tolist() == pytest.approx([0.8, 0.0])
    assert layout.take(slice(1, 3)).position[:, 0].tolist() == [1.0, 2.0]


def test_take_rows_gathers_per_sequence():
    layout = Layout.make(4, position=torch.arange(8).reshape(4, 2))
    picked = layout.take_rows(torch.tensor([[3, 0], [1, 1]]))
    assert picked.order.tolist() == [[3, 0], [1, 1]]
    assert picked.position.tolist() == [[[6.0, 7.0], [0.0, 1.0]], [[2.0, 3.0], [2.0, 3.0]]]


def test_replace_and_expand_do_not_touch_the_original():
    layout = Layout.make(2)
    assert layout.replace(copy=Copy.NOISY, level=1.0).copy.tolist() == [1, 1]
    assert layout.copy.tolist() == [0, 0]
    assert layout.expand(3).order.tolist() == [[0, 1]] * 3
    assert layout.expand(1).expand(2).block.shape == (2, 2)


def test_cat_joins_rows_and_expands_flat_parts():
    joined = Layout.cat([Layout.make(1, block=-1), Layout.make(2).expand(2)])
    assert joined.block.tolist() == [[-1, 0, 0]] * 2
    assert joined.position[0, :, 0].tolist() == [0.0, 0.0, 1.0]


def test_records_are_plain_numbers():
    layout = Layout.make(2, role=int(Role.SINK | Role.TEXT), position=torch.ones(2, 2))
    assert layout.records()[1] == {
        "block": 0, "copy": 0, "order": 1, "role": 6, "position": [1.0, 1.0],
        "document": 0, "source": 1, "level": 0.0, "group": 0,
    }  # fmt: skip
    batched = layout.expand(2).records()
    assert [row["batch"] for row in batched] == [0, 0, 1, 1]


def test_moving_to_the_same_device_is_free():
    layout = Layout.make(2)
    assert layout.to("cpu") is layout
    assert layout.to("meta").block.device.type == "meta"


def test_errors_name_the_value():
    with pytest.raises(ValueError, match=r"unknown layout attribute.*colour"):
        Layout.make(2, colour=1)
    with pytest.raises(ValueError, match=r"block has 3 rows.*has 2"):
        Layout.make(2, block=[0, 1, 2])
    with pytest.raises(ValueError, match="2 sequences, asked for 3"):
        Layout.make(2).expand(2).expand(3)
    with pytest.raises(ValueError, match=r"axes, got \[1, 2\]"):
        Layout.cat([Layout.make(1), Layout.make(1, position=torch.zeros(1, 2))])
    layout = Layout.make(2)
    with pytest.raises(ValueError, match="share one shape"):
        Layout(**{name: getattr(layout, name) for name in ATTRIBUTES} | {"block": torch.zeros(3)})
