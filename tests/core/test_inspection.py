"""What `inspect` shows: the mask of the training layout, the order of a decode, the cache log."""

import numpy as np
import pytest
import torch

from blockloom.core.inspection import cache_log, layout_records, mask_matrix, schedule_rows
from blockloom.core.orders import halton_order
from blockloom.core.recipe import list_recipes, load_recipe

RECIPES = list_recipes()


def test_the_skip_causal_matrix_of_acdit():
    matrix, records = mask_matrix(load_recipe("image/acdit", ["layout.block=3"]), 12)
    assert matrix.shape == (24, 24) and matrix.dtype == bool
    block = np.arange(12) // 3
    past = block[None] < block[:, None]
    own = block[None] == block[:, None]
    expected = np.block([[past | own, np.zeros((12, 12), bool)], [past, own]])
    assert np.array_equal(matrix, expected)
    assert [r["copy"] for r in records] == [0] * 12 + [1] * 12
    assert [r["block"] for r in records] == [*block, *block]
    assert records[4]["position"] == [1.0, 0.0] and records[4]["order"] == 4


@pytest.mark.parametrize("name", RECIPES)
def test_every_matrix_has_one_record_per_row(name):
    recipe = load_recipe(name)
    matrix, records = mask_matrix(recipe, 12)
    assert matrix.shape == (len(records), len(records)) and matrix.any()
    assert {"block", "copy", "order", "role", "position", "document"} <= set(records[0])
    assert records == layout_records(recipe, 12)
    assert all(isinstance(r["order"], int) and r["document"] == 0 for r in records)
    if recipe.mask == "causal":
        assert np.array_equal(matrix, np.tril(np.ones_like(matrix)))
    if recipe.mask == "bidirectional":
        rows = sum(r["block"] == -1 for r in records)
        assert matrix[rows:].all() and not matrix[:rows, rows:].any()


@pytest.mark.parametrize("name", RECIPES)
def test_accepted_sets_partition_the_predicted_slots(name):
    recipe = load_recipe(name, ["schedule.steps=12"])
    rows = schedule_rows(recipe, 144)
    slots = 144 + recipe.layout.text_tokens
    taken = [slot for row in rows for slot in row["accepted"]]
    assert sorted(taken) == list(range(slots))
    known: set[int] = set()
    for row in rows:
        assert set(row["accepted"]) <= set(row["predicted"])
        assert not known & set(row["predicted"])
        known |= set(row["accepted"])
        assert 0 <= row["level_next"] < row["level"] <= 1
        assert row["guidance"] >= 0 and row["temperature"] >= 0
    per_block = [sum(r["block"] == b for r in rows) for b in {r["block"] for r in rows}]
    assert max(per_block) <= max(12, sum(recipe.schedule.levels))
    assert schedule_rows(recipe, 144) == rows  # seeded
    chosen = recipe.schedule.order in ("confidence", "random")
    # A level whose tokens all come in one row leaves nothing to choose.
    chosen &= not recipe.schedule.levels or max(recipe.schedule.levels) > 1
    if chosen and recipe.head.kind != "patch":
        assert schedule_rows(recipe, 144, seed=1) != rows


def test_a_mask_of_windows_shows_the_first_layers_windows():
    matrix, records = mask_matrix(load_recipe("video/seedvr", ["layout.frames=4"]), 4 * 16)
    assert len(matrix) == 64 and matrix.sum() == 64 * 16  # windows of 4 x 2 x 2
    for query, row in zip(records, matrix, strict=True):
        seen = [records[k]["position"] for k in np.flatnonzero(row)]
        assert {(h // 2, w // 2) for _, h, w in seen} == {
            (query["position"][1] // 2, query["position"][2] // 2)
        }


def test_accepted_positions_stand_in_the_order_taken():
    rows = schedule_rows(load_recipe("image/halton", ["schedule.steps=10"]), 144)
    taken = [slot for row in rows for slot in row["accepted"]]
    order = torch.as_tensor(halton_order(12, 12)).flatten().tolist()
    assert taken == order and taken != sorted(taken)
    # Confidence: a row that takes two takes the surer one first, whatever its place.
    rows = schedule_rows(load_recipe("image/maskgil", ["schedule.steps=10"]), 144)
    accepted = [row["accepted"] for row in rows if len(row["accepted"]) > 3]
    assert accepted and all(a != sorted(a) for a in accepted)
    rows = schedule_rows(load_recipe("image/llamagen"), 144)
    assert [row["accepted"] for row in rows] == [[slot] for slot in range(144)]


def test_cache_logs_show_every_write_commit_and_evict():
    log = cache_log(load_recipe("image/acdit", ["cache.write=separate"]), 12)
    assert [entry["op"] for entry in log] == ["write", "commit"] * 2
    assert [entry["source"] for entry in log[::2]] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert log[-1]["committed"] == [8]
    windowed = cache_log(load_recipe("image/acdit", ["cache.window=1", "cache.write=separate"]), 16)
    assert [e["op"] for e in windowed] == ["write", "commit", "evict"] * 3
    assert [e["tokens"] for e in windowed if e["op"] == "evict"] == [4, 4, 4]
    tokens = cache_log(load_recipe("image/llamagen"), 12)
    assert [e["op"] for e in tokens] == ["write", "commit"] * 12
    prompt = cache_log(load_recipe("image/mar"), 12)
    assert [e["op"] for e in prompt] == ["write", "commit"] and prompt[0]["source"][0] == -1
    assert cache_log(load_recipe("image/maskgit"), 12) == []
