"""Layout builders: sizes, generation order, inverses, published length fixtures."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockloom.core.layout import Copy, Layout, Role
from blockloom.core.layouts import (
    DelayPattern,
    draft_tree,
    flat,
    frames,
    grid,
    interleave,
    lookahead_blocks,
    pack,
    prefix,
    rearrange_spans,
    rows_of_sources,
    two_copy,
)


def test_flat_cuts_blocks_and_keeps_a_short_last_one():
    assert flat(5, block_size=2).block.tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ("token", list(range(8))),
        ("row", [0, 0, 0, 0, 1, 1, 1, 1]),
        ("all", [0] * 8),
        (3, [0, 0, 0, 1, 1, 1, 2, 2]),
    ],
)
def test_grid_blocks(block, expected):
    layout = grid(2, 4, block=block)
    assert layout.block.tolist() == expected
    assert layout.source.tolist() == layout.order.tolist() == list(range(8))
    assert layout.position.tolist()[5] == [1.0, 1.0]


def test_grid_tiles_stand_in_generation_order():
    layout = grid(4, 4, block="tile:2x2")
    assert layout.source.tolist() == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]
    assert layout.block.tolist() == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4
    assert layout.order.tolist() == list(range(16))
    assert layout.position.tolist()[4] == [0.0, 2.0]


def test_grid_tile_that_is_not_square():
    layout = grid(2, 6, block="tile:2x3")
    assert layout.source.tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5, 9, 10, 11]


def test_grid_errors_name_the_nearest_value():
    with pytest.raises(ValueError, match=r"'tile:3x2'.*4x4.*'tile:2x2'"):
        grid(4, 4, block="tile:3x2")
    with pytest.raises(ValueError, match="'diagonal'; try 'row'"):
        grid(4, 4, block="diagonal")
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        grid(4, 4, block=0)


def test_frames_carry_time_and_site():
    layout = frames(3, 2, 2, frames_per_block=2)
    assert layout.block.tolist() == [0] * 8 + [1] * 4
    assert layout.position.tolist()[7] == [1.0, 1.0, 1.0]
    assert layout.group.tolist() == [0, 1, 2, 3] * 3


def test_prefix_rows_are_static_prompt():
    layout = prefix(grid(1, 2, block="token"), 2)
    assert layout.block.tolist() == [-1, -1, 0, 1]
    assert layout.order.tolist() == [-2, -1, 0, 1]
    assert layout.source.tolist() == [-1, -1, 0, 1]
    assert layout.position.tolist()[:2] == [[-2.0, -2.0], [-1.0, -1.0]]
    assert layout.role.tolist()[:3] == [int(Role.PROMPT | Role.COND)] * 2 + [0]
    plain = flat(2)
    assert prefix(plain, 0) is plain


def test_two_copy_repeats_generated_rows_only():
    layout = two_copy(prefix(grid(2, 2, block="row"), 3))
    assert layout.copy.tolist() == [0] * 7 + [1] * 4
    assert layout.level.tolist() == [0.0] * 7 + [1.0] * 4
    for name in ("block", "order", "source", "position"):
        values = getattr(layout, name)
        assert torch.equal(values[3:7], values[7:])


def test_lookahead_blocks_merges_the_first_blocks():
    assert lookahead_blocks(8, block_size=2, extra=1).block.tolist() == [1, 1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize(
    ("num_frames", "spans", "expected"),
    [(20, [(3, 7)], 36), (20, [(3, 7), (12, 15)], 47), (500, [(5, 9), (90, 95), (300, 400)], 538)],
)
def test_rearranged_length_with_delays_matches_the_published_one(num_frames, spans, expected):
    assert rearrange_spans(flat(num_frames), spans, delay=4).num_tokens == expected


def test_rearranged_rows_one_by_one():
    text = flat(2).replace(role=int(Role.TEXT), source=-1)
    layout = rearrange_spans(Layout.cat([text, flat(6)]), [(1, 3), (4, 5)])
    m, e = -2, -3
    assert layout.source.tolist() == [-1, -1, 0, m, 3, m, 5, e, m, 1, 2, e, m, 4, e]
    assert layout.group.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 0, 3, 3, 3, 1, 4, 4]
    assert layout.order.tolist() == list(range(15))
    assert layout.position[:, 0].tolist() == [0, 1, *range(13)]
    assert rows_of_sources(layout.take(slice(2, None))).tolist() == [0, 7, 8, 2, 11, 4]


def test_cm3_has_no_end_row_on_the_kept_part():
    layout = rearrange_spans(flat(4), [(1, 2)], end_kept=False)
    assert layout.source.tolist() == [0, -2, 2, 3, -2, 1, -3]


def test_rearrange_refuses_bad_spans():
    with pytest.raises(ValueError, match=r"inside \[0, 4\]"):
        rearrange_spans(flat(4), [(2, 3), (1, 2)])
    with pytest.raises(ValueError, match=r"inside \[0, 4\]"):
        rearrange_spans(flat(4), [(3, 5)])


def test_delay_pattern_rows_match_the_published_table():
    frame = DelayPattern(4).frames_at(4)
    rows = ["".join("_" if t < 0 else str(t) for t in row) for row in frame.T.tolist()]
    assert rows == ["____", "0___", "10__", "210_", "3210", "_321", "__32", "___3"]


@settings(max_examples=20, deadline=None)
@given(
    delays=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    num_frames=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_delay_pattern_inverse_is_exact(delays, num_frames, seed):
    pattern = DelayPattern(len(delays), tuple(delays))
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 50, (2, len(delays), num_frames), generator=generator)
    steps = pattern.apply(codes, special=50)
    assert steps.shape[-1] == num_frames + max(delays) + 1
    assert torch.equal(pattern.invert(steps), codes)
    assert int((steps == 50).sum()) == steps.numel() - codes.numel()
    for codebook, delay in enumerate(delays):
        assert torch.equal(steps[:, codebook, delay + 1], codes[:, codebook, 0])


def test_delay_pattern_errors():
    with pytest.raises(ValueError, match="2 numbers of at least 0"):
        DelayPattern(2, (0, -1))
    with pytest.raises(ValueError, match="has 2 codebooks, got 3"):
        DelayPattern(2).apply(torch.zeros(3, 4, dtype=torch.int64), 9)
    with pytest.raises(ValueError, match=r"at least 3.*got 2"):
        DelayPattern(2).invert(torch.zeros(2, 2, dtype=torch.int64))


def test_interleave_alternates_streams_block_by_block():
    video, action = flat(4, block_size=2), flat(2)
    woven = interleave([prefix(video, 1), action])
    assert woven.group.tolist() == [0, 0, 0, 1, 0, 0, 1]
    assert woven.block.tolist() == [-1, 0, 0, 1, 2, 2, 3]
    assert woven.order.tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert woven.source.tolist() == [-1, 0, 1, 0, 2, 3, 1]
    merged = interleave([video, action], merge_blocks=True)
    assert merged.block.tolist() == [0, 0, 0, 1, 1, 1]


def test_pack_numbers_documents_and_pads():
    packed = pack([flat(2), flat(3, block_size=2)], length=7)
    assert packed.document.tolist() == [0, 0, 1, 1, 1, -1, -1]
    assert packed.order.tolist() == [0, 1, 0, 1, 2, 0, 0]
    with pytest.raises(ValueError, match="length 1 is too small; nearest legal value 5"):
        pack([flat(2), flat(3)], length=1)


def test_draft_tree_intervals_are_depth_first():
    tree = draft_tree([-1, 0, 0, 1, -1, 4])
    assert tree.tree_in.tolist() == [0, 1, 3, 2, 4, 5]
    assert tree.tree_out.tolist() == [4, 3, 4, 3, 6, 6]
    assert tree.order.tolist() == [0, 1, 1, 2, 0, 1]
    assert tree.copy.tolist() == [int(Copy.DRAFT)] * 6
    with pytest.raises(ValueError, match=r"node 1 must lie in \[-1, 0\], got 1"):
        draft_tree([-1, 1])
