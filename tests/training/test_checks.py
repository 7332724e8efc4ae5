"""The learning check of a recipe is chosen by what its file says."""

import pytest

from blockloom.core.recipe import load_recipe
from blockloom.training.acting_learning import acting_learning_check
from blockloom.training.checks import check_of
from blockloom.training.clip_learning import clip_learning_check
from blockloom.training.control_learning import control_learning_check
from blockloom.training.learning import learning_check
from blockloom.training.motion_learning import motion_learning_check
from blockloom.training.told_learning import told_learning_check

EXPECTED = {
    "image/mar": learning_check,
    "video/far": clip_learning_check,
    "video/par": acting_learning_check,
    "motion/t2m_gpt": motion_learning_check,
    "motion/timar": told_learning_check,
    "motion/faceformer": told_learning_check,
    "motion/control": control_learning_check,
    "motion/star": control_learning_check,
}


@pytest.mark.parametrize("name", EXPECTED)
def test_checks_are_chosen_by_fields(name: str) -> None:
    assert check_of(load_recipe(name)) is EXPECTED[name]
