"""Which learning check a recipe is measured by, told from what its file says."""

from collections.abc import Callable
from typing import Any

from ..core.recipe import Recipe
from .acting_learning import acting_learning_check
from .clip_learning import clip_learning_check
from .control_learning import control_learning_check, controls
from .learning import learning_check
from .motion_learning import motion_learning_check
from .told_learning import is_told, told_learning_check


def check_of(recipe: Recipe) -> Callable[..., Any]:
    """Choose the learning check of a recipe.

    Args:
        recipe: Any recipe.

    Returns:
        A function of the recipe (and of a number of steps) whose report has `value`, `baseline` and
        `spec()`.
    """
    if is_told(recipe):
        return told_learning_check
    if controls(recipe):
        return control_learning_check
    if recipe.acting is not None:
        return acting_learning_check
    by_modality: dict[str, Callable[..., Any]] = {
        "video": clip_learning_check,
        "motion": motion_learning_check,
    }
    return by_modality.get(recipe.modality, learning_check)
