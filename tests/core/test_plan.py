"""Plans: which rows a recipe trains together and decodes when."""

import pytest
import torch

from blockloom.core.layout import Copy, Role
from blockloom.core.plan import build_plan, grid_of, num_prompt_rows
from blockloom.core.recipe import list_recipes, load_recipe


def plan_of(name, *overrides, **how):
    return build_plan(load_recipe(name, list(overrides)), 4, 4, **how)


@pytest.mark.parametrize("name", list_recipes())
def test_content_lists_every_slot_once_and_blocks_have_no_gaps(name):
    plan = plan_of(name, generator=torch.Generator().manual_seed(3))
    assert sorted(plan.content.source.tolist()) == list(range(plan.num_slots))
    assert plan.content.order.tolist() == list(range(plan.num_slots))
    block = plan.content.block
    assert block.unique().tolist() == list(range(plan.num_blocks))
    assert torch.equal(block, block.sort().values)
    sources = torch.cat([plan.sources(b) for b in range(plan.num_blocks)])
    assert torch.equal(sources, plan.content.source)


def test_training_layout_is_prompt_then_clean_then_noisy():
    plan = plan_of("causalfusion")
    layout, rows = plan.training_layout(), plan.num_prompt_rows
    assert rows == num_prompt_rows(load_recipe("causalfusion")) == 9
    assert layout.copy.tolist() == [0] * (rows + 16) + [1] * 16
    assert layout.block[:rows].tolist() == [-1] * rows and layout.order[0] == -rows
    assert layout.source.tolist() == [-1] * rows + [*range(16), *range(16)]
    assert layout.level.tolist() == [0.0] * (rows + 16) + [1.0] * 16
    shifted = plan_of("llamagen")
    assert shifted.training_layout().source.tolist() == [-1] * 9 + list(range(15))
    single = plan_of("maskgit").training_layout()
    assert single.copy.unique().tolist() == [int(Copy.NOISY)] and single.num_tokens == 16


def test_random_orders_and_splits_are_seeded_and_need_a_generator():
    def drawn(seed):
        return plan_of("causalfusion", generator=torch.Generator().manual_seed(seed)).content

    assert torch.equal(drawn(1).source, drawn(1).source)
    assert not torch.equal(drawn(1).source, drawn(2).source)
    plain = plan_of("causalfusion").content
    assert plain.source.tolist() == list(range(16)) and plain.block.bincount().tolist() == [4] * 4
    # A slot keeps its place in the picture wherever it stands in the order.
    row = int((drawn(1).source == 6).nonzero()[0])
    assert drawn(1).position[row].tolist() == [1.0, 2.0]


def test_moved_spans_go_to_the_end_with_marks_and_keep_their_positions():
    plan = plan_of("cm3", "layout.text_tokens=5", span=(7, 10))
    content = plan.content
    marks = [21, 22, 23]
    expected = [*range(7), marks[0], *range(10, 21), marks[1], 7, 8, 9, marks[2]]
    assert content.source.tolist() == expected and plan.num_slots == 24
    assert content.order.tolist() == content.block.tolist() == list(range(24))
    where = {int(s): content.position[i].tolist() for i, s in enumerate(content.source)}
    assert where[7] == [0.0, 2.0] and where[0] == [-5.0, -5.0]
    assert where[marks[0]] == where[marks[1]] == where[7] and where[marks[2]] == where[10]
    assert [bool(r & int(Role.TEXT)) for r in content.role[:6].tolist()] == [True] * 5 + [False]
    assert plan_of("cm3", "layout.text_tokens=5").num_slots == 21


def test_windows_pin_the_prompt_and_mark_the_sinks():
    plan = plan_of("causalfusion", "cache.window=2", "cache.sink=1")
    assert bool((plan.prompt.role & int(Role.SINK)).all())
    is_sink = (plan.content.role & int(Role.SINK)) > 0
    assert torch.equal(is_sink, plan.content.block == 0)
    layout = plan.training_layout()
    seen = plan.table.visible(layout, layout)
    last = seen[-1]  # a noisy row of block 3: the prompt, the sink, block 2, itself
    assert {int(b) for b in layout.block[last]} == {-1, 0, 2, 3}
    assert plan.capacity() == plan.num_prompt_rows + 4 * 4
    assert plan_of("causalfusion").capacity() == plan.num_prompt_rows + 16


def test_layouts_and_lowered_masks_are_remembered():
    plan = plan_of("acdit")
    assert plan.noisy_rows(1) is plan.noisy_rows(1)
    parts = [plan.clean_rows(0), plan.noisy_rows(1)]
    joined = plan.joined(parts)
    assert plan.joined(parts) is joined and plan.joined(parts[:1]) is parts[0]
    assert plan.lowered(joined, None) is plan.lowered(joined, None)


def test_videos_of_tokens_and_of_one_block():
    tokens = build_plan(load_recipe("video/causal_lm"), 2, 3, frames=2)
    assert tokens.num_blocks == 12 and tokens.content.block.tolist() == list(range(12))
    assert tokens.content.position[7].tolist() == [1.0, 0.0, 1.0]
    whole = ["layout.block=all", "cache.window=null", "cache.write=none", "cache.exact=false"]
    together = build_plan(load_recipe("video/diffusion_forcing", whole), 2, 3)
    assert together.num_blocks == 1 and together.num_slots == 30


def test_lengths_become_the_squarest_grid():
    assert [grid_of(n) for n in (1, 12, 144, 7)] == [(1, 1), (3, 4), (12, 12), (1, 7)]
    with pytest.raises(ValueError, match="length = 0 tokens; legal >= 1; try 1"):
        grid_of(0)
