"""Groups of video rows: places, frames, windows, and layers that take them in turn."""

import pytest
import torch

from blockloom.core.errors import ModelError
from blockloom.core.grouping import PROMPT_GROUP, PerLayer, lower_layers, regroup
from blockloom.core.layout import Copy
from blockloom.core.layouts import frames, prefix
from blockloom.core.lowering import lower
from blockloom.core.masks import EQ, MaskTable
from blockloom.core.plan import build_plan
from blockloom.core.proof import compare
from blockloom.core.recipe import load_recipe, window_of
from blockloom.core.rules import rule


def members(group, num_frames=4, height=4, width=6):
    """Sets of (frame, row, column) that share a group."""
    layout = regroup(frames(num_frames, height, width), group, height, width)
    sets = {}
    for number, place in zip(layout.group.tolist(), layout.position.long().tolist(), strict=True):
        sets.setdefault(number, set()).add(tuple(place))
    return list(sets.values())


def box(start, stop):
    axes = [range(a, b) for a, b in zip(start, stop, strict=True)]
    return {(t, h, w) for t in axes[0] for h in axes[1] for w in axes[2]}


def test_places_and_frames():
    sites, single = members("site"), members("frame")
    assert len(sites) == 24 and {(t, 1, 2) for t in range(4)} in sites
    assert len(single) == 4 and box((2, 0, 0), (3, 4, 6)) in single


def test_windows_tile_the_clip():
    windows = members("window:2x2x3")
    assert len(windows) == 2 * 2 * 2
    assert all(len(w) == 12 for w in windows)
    assert box((2, 0, 3), (4, 2, 6)) in windows
    uneven = members("window:3x4x4")  # neither frames nor columns divide
    assert sorted(len(w) for w in uneven) == [1 * 4 * 2, 1 * 4 * 4, 3 * 4 * 2, 3 * 4 * 4]


def test_shifted_windows_are_short_at_the_edges():
    windows = members("window:2x2x2:shifted")
    assert box((1, 1, 1), (3, 3, 3)) in windows and box((0, 0, 0), (1, 1, 1)) in windows
    assert len(windows) == 3 * 3 * 4 and sum(len(w) for w in windows) == 4 * 4 * 6


def test_prompt_rows_stand_alone():
    layout = regroup(prefix(frames(2, 2, 2), 2), "window:2x2x2", 2, 2)
    assert layout.group.tolist() == [PROMPT_GROUP] * 2 + [layout.group[2].item()] * 8
    assert layout.group[2] >= 0


def test_layers_take_groupings_in_turn():
    table, layout = MaskTable.parse({"N->N": "EQ(group)"}), frames(2, 2, 2).replace(copy=1)
    both = lower_layers(table, layout, layout, ("site", "frame"), 2, 2, backend="dense")
    assert isinstance(both, PerLayer)
    for layer, group in enumerate(("site", "frame", "site")):
        wanted = lower(table, *[regroup(layout, group, 2, 2)] * 2, backend="dense")
        assert torch.equal(both.of(layer).may_attend, wanted.may_attend)
    assert int(both.of(0).may_attend.sum()) == 8 * 2 and int(both.of(1).may_attend.sum()) == 8 * 4
    alone = lower_layers(table, layout, layout, ("frame",), 2, 2, backend="dense")
    assert torch.equal(alone.may_attend, both.of(1).may_attend)


@pytest.mark.parametrize("name", ["video/walt", "video/seedvr", "video/make_your_video"])
def test_one_layer_reaches_its_window_and_two_reach_further(tiny, name):
    """Change one frame's content: exactly the rows that may look there change."""
    reached = {}
    for layers in (1, 2):
        model = tiny.model(name, f"backbone.layers={layers}", dtype=torch.float64, std=0.3)
        plan = build_plan(model.recipe, 4, 4)
        layout, prompt = plan.training_layout(), model.unprompted(1)
        values = torch.randn(1, layout.num_tokens, tiny.channels).double()
        changed = values.clone()
        changed[:, 37] += 1.0  # frame 2, row 1, column 1
        hidden, lowered = layout.level[None] > 1, plan.lower(layout, layout)
        told = torch.zeros(1, layout.num_tokens, 4).double()
        with torch.no_grad():
            a, b = (
                model.backbone(v, hidden, layout, layout.level[None], prompt, lowered, actions=told)
                for v in (values, changed)
            )
        moved = ((a - b).abs().amax(-1) > 1e-9)[0]
        reached[layers] = moved
        seen = plan.table.visible(*[regroup(layout, plan.groups[0], 4, 4)] * 2)[:, 37]
        assert torch.equal(moved, seen) or layers == 2
    assert bool((reached[1] <= reached[2]).all())
    assert int(reached[2].sum()) > int(reached[1].sum()) > 1


def test_names_are_read_and_others_refused():
    assert window_of("window:5x2x3") == (5, 2, 3, False)
    assert window_of("window:5x2x3:shifted") == (5, 2, 3, True)
    assert window_of("window:0x2x3") is None and window_of("frame") is None
    with pytest.raises(ModelError, match="nearest legal value 'frame'"):
        load_recipe("video/walt", ["layout.group=fram"])
    with pytest.raises(ModelError, match='"block" stands alone'):
        load_recipe("video/walt", ["layout.group=[block, frame]"])
    with pytest.raises(ModelError, match=r'needs layout\.kind = "frames"'):
        load_recipe("image/acdit", ["layout.group=frame"])
    assert rule("window_attention").entries == {(Copy.NOISY, Copy.NOISY): EQ("group")}


def test_split_attention_is_proved_for_every_layer(tiny):
    split = ["layout.group=[site, frame]", "cache.window=null"]
    near = "mask={C->C: 'EQ(group) & LE(block)', N->C: 'EQ(group) & LT(block)', N->N: EQ(block)}"
    assert load_recipe("video/teacher_forcing", [*split, near]).cache.exact
    model = tiny.model("video/teacher_forcing", *split, near, dtype=torch.float64, std=0.3)
    plan, decoder = build_plan(model.recipe, 4, 4), tiny.decoder(model, ["a red cat", "sun"])
    decoder.actions = torch.zeros(2, 5, 4).double()
    with torch.no_grad():
        parity = compare(plan, decoder, tiny.contents(model, plan))
    assert parity.max_error < 1e-10 and parity.scale > 1
    late = near.replace("LT(block)", "LE(block)")
    with pytest.raises(ModelError, match=r"cache\.exact = true is disproved"):
        load_recipe("video/teacher_forcing", [*split, late])
