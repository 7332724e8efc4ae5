"""Pick the pipeline class that a saved model names."""

import json
from pathlib import Path
from typing import Any

from ..core.errors import ModelError
from ..core.legality import POSE_NUMBERS
from .guard import read_json
from .params import model_folder


class AutoPipeline:
    """Loads any Blockloom pipeline by the class its `model_index.json` names."""

    def __init__(self) -> None:
        raise TypeError("AutoPipeline is not built; call AutoPipeline.from_pretrained(name)")

    @staticmethod
    def from_pretrained(name: str, **kwargs: Any) -> Any:
        """Load a pipeline; video models that take actions are worlds.

        Args:
            name: Bundled name or folder.
            **kwargs: Passed to the pipeline's `from_pretrained`.

        Raises:
            ModelError: no such model, or its index names no pipeline of this package.
        """
        from .image import ImagePipeline
        from .motion import MotionPipeline
        from .video import VideoPipeline
        from .world import WorldPipeline

        classes: dict[str, Any] = {
            "ImagePipeline": ImagePipeline,
            "MotionPipeline": MotionPipeline,
            "VideoPipeline": VideoPipeline,
            "WorldPipeline": WorldPipeline,
        }
        folder = model_folder(name)
        try:
            index = json.loads((folder / "model_index.json").read_bytes())
            kind = index["_class_name"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(
                f"model_index.json of {folder.name} is not a pipeline index"
            ) from error
        if kind not in classes:
            raise ModelError(
                f"model_index.json names {kind!r}; allowed {', '.join(classes)}; "
                "try a folder written by blockloom train"
            )
        if kind in ("VideoPipeline", "WorldPipeline"):  # the model says if it can be steered
            kind = "WorldPipeline" if num_actions(folder) else "VideoPipeline"
        return classes[kind].from_pretrained(name, **kwargs)


def num_actions(folder: Path) -> int:
    """Read how many numbers steer a saved model, the poses of its cameras apart; 0 = none.

    Args:
        folder: A pipeline folder.

    Raises:
        ModelError: the model's configuration cannot be read.
    """
    path = folder / "model" / "config.json"
    recipe = read_json(path, "model/config.json").get("recipe") if path.is_file() else None
    condition = recipe.get("condition") if isinstance(recipe, dict) else None
    if not isinstance(condition, dict):
        return 0
    count = condition.get("actions", 0)
    posed = POSE_NUMBERS if condition.get("poses") is True else 0
    return max(count - posed, 0) if isinstance(count, int) else 0
