"""`cache.exact: true` is granted only where the checker can prove it."""

import pytest

from blockloom.core.errors import ModelError
from blockloom.core.exactness import condition_free_clean, require_exact, violations
from blockloom.core.plan import build_plan
from blockloom.core.recipe import list_recipes, load_recipe

TABLE = "{C->C: LE(block), N->C: LT(block), N->N: EQ(block)}"


def bad(name, *overrides):
    with pytest.raises(ModelError, match=r"cache\.exact = true is disproved") as caught:
        load_recipe(name, list(overrides))
    return str(caught.value)


def test_every_shipped_claim_holds():
    for name in list_recipes():
        recipe = load_recipe(name)
        require_exact(recipe)
        if recipe.cache.exact:
            assert violations(recipe) == []
    assert violations(load_recipe("maskgit")) == ['nothing is cached with cache.write = "none"']


@pytest.mark.parametrize("write", ["separate", "fused"])
@pytest.mark.parametrize(
    ("table", "letter"),
    [
        ("{C->C: LE(block), C->N: EQ(block), N->C: LT(block), N->N: EQ(block)}", "(a)"),
        ("{C->C: ALL, N->C: LT(block), N->N: EQ(block)}", "(b)"),
        ("{C->C: LE(block), N->C: LE(block), N->N: EQ(block)}", "(c)"),
        ("{C->C: LE(block), N->C: LT(block), N->N: LE(block)}", "(c)"),
    ],
)
def test_wrong_tables_are_refused_at_construction(table, letter, write):
    assert letter in bad("acdit", f"mask={table}", f"cache.write={write}")
    # Without the claim the recipe is legal: somebody may want to look at it.
    assert load_recipe("acdit", [f"mask={table}", "cache.exact=false"]).cache.exact is False


def test_windows_must_be_trained_with():
    assert "evicted before its last reader" in bad("acdit", f"mask={TABLE}", "cache.window=2")
    near = TABLE.replace("LE(block)", "'LE(block) & NEAR(block, 3)'")
    near = near.replace("LT(block)", "'LT(block) & NEAR(block, 3)'")
    assert "evicted" in bad("acdit", f"mask={near}", "cache.window=2")  # one block early
    assert load_recipe("acdit", [f"mask={near}", "cache.window=3"]).cache.window == 3
    assert load_recipe("acdit", ["cache.window=2", "cache.sink=1"]).cache.exact
    assert load_recipe("llamagen", ["cache.window=3"]).cache.exact
    assert "evicted" in bad("llamagen", "mask={C->C: LE(order)}", "cache.window=3")
    with pytest.raises(ModelError, match=r"leave cache\.window out"):
        load_recipe("acdit", ["mask=nbdiff", "cache.window=2"])


def test_bidirectional_models_keep_nothing_but_their_prompt():
    assert "nothing is cached" in bad("maskgit", "cache.exact=true")
    everything = "mask={C->C: ALL, C->N: ALL, N->C: ALL, N->N: ALL}"
    assert "prompt rows see" in bad("maskgil", everything)
    assert "has none" in bad("maskgit", "cache.write=prefix", "cache.exact=true")
    assert "later order" in bad("cm3", "mask={C->C: 'ALL & ~q.PROMPT'}")


def test_unknown_masks_are_refused_with_the_nearest():
    with pytest.raises(ModelError, match="unknown mask rule 'block_difusion'; nearest: block_dif"):
        load_recipe("acdit", ["mask=block_difusion"])
    with pytest.raises(ModelError, match="mask"):
        load_recipe("acdit", ["mask={C->X: ALL}"])
    with pytest.raises(ModelError, match="mask"):
        load_recipe("acdit", ["mask={C->C: __import__('os')}"])


def test_the_plan_and_the_model_agree_on_who_is_told_the_prompt(tiny):
    extra = [
        ("image/acdit", "condition.modulate=[clean, noisy]"),
        ("image/block_masked", "condition.cross=true"),
        ("image/block_masked", "condition.cross=true", "condition.modulate=[clean, noisy]"),
    ]
    for setup in [*[(name,) for name in list_recipes()], *extra]:
        model = tiny.model(*setup)
        plan = build_plan(model.recipe, 4, 4)
        decoder = tiny.decoder(model, ["a red cat"])
        assert condition_free_clean(model.recipe, plan) == decoder.shares_cache
