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


def test_exact_says_nothing_about_what_training_shows():
    # Masked teacher forcing and diffusion forcing: the cache computes what the masked forward
    # computes, of contexts that training never held.
    for name in ("video/magi_mtf", "video/diffusion_forcing"):
        assert load_recipe(name).cache.exact
        with pytest.raises(ModelError, match=r"cache\.matched = true is disproved"):
            load_recipe(name, ["cache.matched=true"])
        assert load_recipe(name, ["cache.matched=true", "corruption.clean=0.1"]).cache.matched
    matched = {name for name in list_recipes("video") if load_recipe(name).cache.matched}
    assert matched >= {"video/magi_ctf", "video/far", "video/causal_lm", "video/teacher_forcing"}
    with pytest.raises(ModelError, match=r"cache\.matched"):
        load_recipe("video/far", ["corruption.clean=0", "cache.matched=true"])


@pytest.mark.parametrize("write", ["block", "fused"])
def test_one_copy_must_not_look_ahead_or_beyond_its_window(write):
    name, near = "video/far", "LE(block) & NEAR(block, 3)"
    ahead = f"mask={{C->C: LE(block), N->C: LE(block), N->N: '{near} | AHEAD(block, 2)'}}"
    assert "later block" in bad(name, ahead, f"cache.write={write}")
    far = f"mask={{C->C: LE(block), N->C: LE(block), N->N: '{near}'}}"
    assert load_recipe(name, [far, f"cache.write={write}"]).cache.exact
    assert "evicted" in bad(name, far, f"cache.write={write}", "cache.window=2")  # off by one


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
        plan = build_plan(model.recipe, *tiny.grid(model.recipe))
        decoder = tiny.decoder(model, ["a red cat"])
        assert condition_free_clean(model.recipe, plan) == decoder.shares_cache
