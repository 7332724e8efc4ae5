"""Recipes: every wrong one is refused with one line that names the way out."""

import pytest

from blockloom.core.errors import ModelError, UsageError
from blockloom.core.recipe import (
    apply_overrides,
    list_recipes,
    load_recipe,
    parse_override,
    recipe_from_dict,
)

BASE = {"name": "mine", "system": {"title": "A test"}}


def refuse(data, source="mine"):
    with pytest.raises(ModelError) as caught:
        recipe_from_dict(data, source)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_shipped_recipe_loads_by_both_names():
    first: dict[str, str] = {}
    for name in list_recipes():
        short = first.setdefault(name.split("/")[1], name)  # images own the short name they share
        assert load_recipe(short) == load_recipe(name.split("/")[1])
        assert load_recipe(name).name == name
        again = recipe_from_dict(load_recipe(name).model_dump(mode="json"))
        assert again == load_recipe(name)
        assert load_recipe(name).modality == name.split("/")[0]
    assert list_recipes("audio") == []


def test_unknown_keys_name_the_nearest():
    assert refuse(BASE | {"shedule": {}}) == "mine: unknown key shedule; nearest: schedule"
    message = refuse(BASE | {"schedule": {"step": 3}})
    assert message == "mine: unknown key schedule.step; nearest: steps"
    message = refuse(BASE | {"learns": {"metrc": 1}})
    assert "nearest: metric" in message or "learns.metric" in message


def test_wrong_types_and_ranges_name_the_setting_and_the_value():
    assert "schedule.steps" in refuse(BASE | {"schedule": {"steps": "many"}})
    assert "got 0" in refuse(BASE | {"schedule": {"steps": 0}})
    assert "nearest: fused" in refuse(BASE | {"cache": {"write": "fusd"}})
    assert "layout" in refuse(BASE | {"layout": 3})
    assert refuse([1, 2]) == "mine: a recipe is a mapping of keys; got list"
    assert "name" in refuse({"system": {"title": "A test"}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layout": {"shift": 1}}, 'set "token"'),
        ({"layout": {"shift": 1, "block": "token", "copies": 2}}, "set copies to 1"),
        ({"cache": {"write": "separate"}}, "needs layout.copies = 2"),
        (
            {
                "corruption": {"kind": "flow", "context": 0.5},
                "head": {"kind": "patch"},
                "backbone": {"level": "adaln"},
            },
            "context = 0.5 of noisy latents needs layout.copies = 2",
        ),
        ({"schedule": {"levels": [4, 1]}}, 'set corruption.per to "stage"'),
        ({"corruption": {"per": "stage"}}, 'set corruption.per to "sample"'),
        (
            {"schedule": {"levels": [4, 0]}, "corruption": {"kind": "mask", "per": "stage"}},
            "try [4, 1]",
        ),
        (
            {"schedule": {"levels": [4, 1]}, "corruption": {"kind": "mask", "per": "stage"}},
            'schedule.levels needs layout.kind = "frames"',
        ),
        ({"cache": {"write": "token"}}, "needs layout.shift = 1"),
        (
            {
                "layout": {"shift": 1, "block": "token"},
                "mask": "causal",
                "cache": {"write": "prefix"},
            },
            'set "token"',
        ),
        ({"head": {"kind": "patch"}}, 'set corruption.kind to "flow"'),
        ({"corruption": {"kind": "flow"}}, 'set corruption.kind to "mask"'),
        ({"head": {"kind": "patch"}, "corruption": {"kind": "flow"}}, 'set "adaln"'),
        (
            {
                "head": {"kind": "patch"},
                "corruption": {"kind": "flow"},
                "backbone": {"level": "add"},
                "layout": {"block": "row"},
            },
            'set layout.block to "all"',
        ),
        (
            {
                "head": {"kind": "shortcut", "steps": 6},
                "layout": {"shift": 1, "block": "token"},
                "mask": "causal",
            },
            "try 4",
        ),
        ({"layout": {"split": "random"}}, 'set "fixed"'),
        ({"layout": {"kind": "stream"}}, "try 32"),
        ({"cache": {"window": 2}}, "evicts nothing"),
        ({"cache": {"sink": 2}}, "set cache.sink to 0"),
        ({"backbone": {"dim": 30, "heads": 4}}, "try 3"),
        ({"backbone": {"heads": 4, "kv_heads": 3}}, "must divide heads = 4"),
    ],
)
def test_illegal_combinations_say_what_to_set_instead(change, words):
    assert words in refuse(BASE | change)


def test_overrides_are_dotted_and_typed():
    assert parse_override("schedule.steps=3") == (["schedule", "steps"], 3)
    assert parse_override("layout.block=tile:2x2") == (["layout", "block"], "tile:2x2")
    recipe = load_recipe("acdit", ["layout.block=3", "cache.write=separate", "schedule.steps=7"])
    assert (recipe.layout.block, recipe.cache.write, recipe.schedule.steps) == (3, "separate", 7)
    data = {"schedule": {"steps": 5}}
    assert apply_overrides(data, ["schedule.steps=6"])["schedule"]["steps"] == 6
    assert data == {"schedule": {"steps": 5}}
    for bad in ("schedule.steps", "=3", "a=[", "a=!!python/object/apply:os.system [ls]"):
        with pytest.raises(UsageError):
            parse_override(bad)
    with pytest.raises(UsageError, match="mask holds a value, not a section"):
        load_recipe("acdit", ["mask.x=1"])
    with pytest.raises(ModelError, match=r"unknown key schedule\.stps; nearest: steps"):
        load_recipe("acdit", ["schedule.stps=3"])


def test_unknown_names_and_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match=r"unknown recipe 'acdt'; nearest: acdit"):
        load_recipe("acdt")
    with pytest.raises(UsageError, match="recipe file not found"):
        load_recipe(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: &x [1, 1]\nb: [*x, *x]\n", "aliases are not allowed"),
        ("name: !!python/object/apply:os.system ['echo hi']\n", "not plain YAML"),
        ("name: !!python/name:os.system\n", "not plain YAML"),
        ("name: " + "x" * 200_001, "at most 200000"),
        ("name: [", "not plain YAML"),
        ("[" * 5000, "nested deeper than 16 levels"),
        ("- 1\n- 2\n", "mapping of keys"),
        ("", "mapping of keys"),
        ("just words", "mapping of keys"),
        ("name: mine\x00\n", "not plain YAML"),
        ("a: 1\n---\nb: 2\n", "not plain YAML"),
    ],
)
def test_hostile_and_broken_files_are_refused_in_one_line(tmp_path, text, words):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ModelError) as caught:
        load_recipe(str(path))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_of_ones_own_loads(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nsystem: {title: A test}\nlayout: {block: all}\n")
    assert load_recipe(str(path), ["schedule.steps=2"]).schedule.steps == 2
