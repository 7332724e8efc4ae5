"""What every stage that distils shares: its settings, and models beside the student on its data.

It knows neither objectives nor recipes by name.
"""

from typing import Any

from ..models.generator import GenerativeModel
from .objective import ModelStage


class StudentStage(ModelStage):
    """A model stage whose recipe has a `distill` section; `teacher` is set by subclasses."""

    teacher: ModelStage

    def __init__(self, model: GenerativeModel, *data: Any, **more: Any) -> None:
        """Bind the student to its data.

        Args:
            model: The student; its recipe has a `distill` section.
            *data: As `ModelStage` takes them.
            **more: As `ModelStage` takes them.

        Raises:
            ValueError: A recipe without a `distill` section.
        """
        super().__init__(model, *data, **more)
        if self.recipe.distill is None:
            raise ValueError(f"recipe {self.recipe.name} has no distill section; add one")
        self.spec = self.recipe.distill

    def beside(self, model: GenerativeModel) -> ModelStage:
        """Bind another model to the student's data."""
        return ModelStage(model, self.values, self.prompt_ids, (), self.actions)
