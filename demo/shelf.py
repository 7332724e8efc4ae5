"""The models the demo offers: found at the start, loaded once when first asked for, then shared.

What it does not know: who asks. Loaded pipelines are only read; the queue lets one run at a time.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..commands import models
from ..core.errors import ModelError, nearest
from ..core.messages import explain
from ..pipelines.auto import num_actions
from ..pipelines.guard import read_json
from ..pipelines.params import bundled_models
from ..pipelines.world_files import Starts, read_starts

HUMAN_SIZE = 263
"""Features per frame of models that move a human body."""


class Shelf:
    """Bundled models, and one folder that whoever started the demo named."""

    def __init__(self, named: Sequence[str] = ()) -> None:
        """Look at the models' small files; no weights load.

        Args:
            named: Further model folders or names; they come first.

        Raises:
            ModelError: One of them is no saved pipeline.
        """
        choices = [models.choose(name, None) for name in (*named, *bundled_models())]
        self._choices = {choice.name: choice for choice in choices}
        self._abilities = {choice.name: abilities(choice.folder) for choice in choices}
        self._loaded: dict[str, Any] = {}
        self._starts: dict[str, Starts | None] = {}
        self._lock = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Names of the models that draw pictures, the default first."""
        return self.names_of("image")

    def names_of(self, ability: str) -> list[str]:
        """List the models that can do one thing, in the order of the shelf.

        Args:
            ability: image, video, world or motion.
        """
        return [name for name, has in self._abilities.items() if ability in has]

    @property
    def folders(self) -> list[str]:
        """Where the models lie; the web server must not serve these."""
        return [str(choice.folder.resolve()) for choice in self._choices.values()]

    def choice(self, name: Any, ability: str = "image") -> models.Choice:
        """Look up a model by name; a path from a browser is no name.

        Args:
            name: What the browser sent.
            ability: What the model must be able to do: image, video, world or motion.

        Raises:
            ModelError: No such model.
        """
        names = self.names_of(ability)
        if not names:
            raise ModelError(
                explain("no model is installed", hint="blockloom train, then demo --model FOLDER")
            )
        if not isinstance(name, str) or name not in names:
            close = nearest(str(name), names)
            raise ModelError(
                explain("no such model", got=str(name), allowed=", ".join(names), hint=close)
            )
        return self._choices[name]

    def label(self, name: str) -> str:
        """Name of the model with the recipe it was trained from."""
        recipe = self._choices[name].recipe
        return f"{name}  ·  {recipe}" if recipe else name

    def defaults(self, name: str) -> tuple[int, float]:
        """Return the recipe's own (steps, guidance scale) without loading weights."""
        path = self.choice(name).folder / "model" / "config.json"
        recipe = read_json(path, "model/config.json").get("recipe")
        schedule = recipe.get("schedule", {}) if isinstance(recipe, dict) else {}
        return int(schedule.get("steps", 8)), float(schedule.get("guidance_scale", 1.0))

    def starts(self, name: Any, ability: str) -> Starts | None:
        """Return the frames that come with a video model; read once.

        Raises:
            ModelError: No such model, or its starts make no sense.
        """
        choice = self.choice(name, ability)
        if choice.name not in self._starts:
            self._starts[choice.name] = read_starts(choice.folder, num_actions(choice.folder))
        return self._starts[choice.name]

    def pipe(self, name: Any, ability: str = "image") -> Any:
        """Return the pipeline, loading it the first time.

        Args:
            name: What the browser sent.
            ability: As in `choice`.

        Raises:
            ModelError: No such model, or its files are damaged.
        """
        choice = self.choice(name, ability)
        with self._lock:
            if choice.name not in self._loaded:
                device = models.pick_device("auto")
                self._loaded[choice.name] = models.open_model(choice, device)
            return self._loaded[choice.name]


def abilities(folder: Path) -> frozenset[str]:
    """Tell from its small files what a model can do.

    Args:
        folder: A saved pipeline.

    Returns:
        Of image, video, world and motion; a world is a video that takes actions, a motion is one of
        the human body.
    """
    modality = models.recipe_of(folder).get("modality", "image")
    if modality == "motion":
        features = read_json(folder / "tokenizer" / "config.json", "tokenizer/config.json")
        is_human = features.get("features") == HUMAN_SIZE and not num_actions(folder)
        return frozenset({"motion"} if is_human else ())
    if modality != "video":
        return frozenset({"image"})
    return frozenset({"video", "world"} if num_actions(folder) else {"video"})


def takes_words(folder: Path) -> bool:
    """Tell from its small file whether a model is told what happens.

    Args:
        folder: A saved pipeline.
    """
    condition = models.recipe_of(folder).get("condition")
    ways = ("prefix", "adaln", "cross")
    return isinstance(condition, dict) and any(condition.get(way) for way in ways)
