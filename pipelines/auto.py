"""Pick the pipeline class that a saved model names."""

import json
from typing import Any

from ..core.errors import ModelError
from .params import model_folder


class AutoPipeline:
    """Loads any Blockloom pipeline by the class its `model_index.json` names."""

    def __init__(self) -> None:
        raise TypeError("AutoPipeline is not built; call AutoPipeline.from_pretrained(name)")

    @staticmethod
    def from_pretrained(name: str, **kwargs: Any) -> Any:
        """Load a pipeline.

        Args:
            name: Bundled name or folder.
            **kwargs: Passed to the pipeline's `from_pretrained`.

        Raises:
            ModelError: no such model, or its index names no pipeline of this package.
        """
        from .image import ImagePipeline
        from .world import WorldPipeline

        classes: dict[str, Any] = {"ImagePipeline": ImagePipeline, "WorldPipeline": WorldPipeline}
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
        return classes[kind].from_pretrained(name, **kwargs)
