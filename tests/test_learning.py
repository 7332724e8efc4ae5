"""Every recipe learns: the run its file describes is repeated and beats its baseline.

Short runs of two recipes stand in for all of them in the default suite.
"""

import pytest

from blockloom.core.recipe import list_recipes, load_recipe
from blockloom.training.checks import check_of
from blockloom.training.clip_learning import clip_learning_check
from blockloom.training.learning import learning_check
from blockloom.training.motion_learning import motion_learning_check

# Other processors round differently, and a run of seconds amplifies it.
SLACK = 0.15
# What a recipe draws is told in its file and tested elsewhere; drawing it again costs as much as
# learning, and nothing below reads it.
UNDRAWN = {
    learning_check: {"pictures": 0},
    clip_learning_check: {"draw": False},
    motion_learning_check: {"draw": False},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list_recipes())
def test_the_recipe_reaches_what_its_file_says(name: str) -> None:
    recipe = load_recipe(name)
    learns = recipe.learns
    assert learns is not None and learns.budget.startswith(f"{recipe.train.steps} steps")
    check = check_of(recipe)
    report = check(recipe, **UNDRAWN.get(check, {}))
    gain = learns.baseline - learns.value
    assert report.baseline == pytest.approx(learns.baseline, abs=0.05 * abs(gain))
    assert report.value < learns.value + SLACK * gain


@pytest.mark.parametrize("name", list_recipes())
def test_the_stated_value_beats_the_stated_baseline_clearly(name: str) -> None:
    learns = load_recipe(name).learns
    assert learns is not None
    assert learns.baseline - learns.value > 0.2 * abs(learns.baseline)


@pytest.mark.parametrize(("name", "gain"), [("llamagen", 0.4), ("maskgit", 0.2)])
def test_a_shorter_run_already_beats_the_baseline(name: str, gain: float) -> None:
    report = learning_check(load_recipe(name), 40, pictures=0)
    assert report.baseline - report.value > gain
