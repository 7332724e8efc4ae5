"""Which model a command uses, loading it, and drawing with it.

What it does not know: flags' texts, file names, batch files. Top-level imports are light; torch
arrives in `open_model`.

Invariants: everything that can be refused from names and small configuration files is refused
before weights load; picture k depends on its own seed only, never on what it was drawn with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import BlockloomError, ModelError, UsageError, nearest
from ..core.messages import explain, one_line
from ..pipelines.guard import check_configs, read_json
from ..pipelines.params import (
    ImageParams,
    P,
    Record,
    bundled_models,
    canonical_json,
    model_folder,
    package_versions,
    weights_hash,
)

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

DEFAULT_MODEL = "blockloom/emoji"


@dataclass(frozen=True)
class Choice:
    """A model that was found but not loaded.

    Attributes:
        name: Bundled name, or the folder's own name.
        folder: Where it lies.
        recipe: Name of the recipe it was trained from.
        weights_sha256: Hash of its weights.
    """

    name: str
    folder: Path
    recipe: str
    weights_sha256: str

    def record(self, params: P) -> Record[P]:
        """Build the record that a picture or video of this model carries."""
        return Record(params, self.recipe, self.weights_sha256, package_versions())


def choose(model: str | None, recipe: str | None) -> Choice:
    """Find the model that the flags name.

    Args:
        model: `--model`.
        recipe: `--recipe`, a recipe that a bundled model was trained from.

    Raises:
        UsageError: Both flags, or an unknown recipe.
        ModelError: No such model, no weights for the recipe, or a folder that is not a pipeline.
    """
    if model is not None and recipe is not None:
        raise UsageError(explain("--model and --recipe both name a model", hint="one of them"))
    if recipe is not None:
        model = _bundled_for(recipe)
    name = DEFAULT_MODEL if model is None else model
    path = model_folder(name)
    shown = name if name in bundled_models() else path.resolve().name
    return Choice(shown, path, recipe_name(path), weights_hash(path))


_MADE = {"ImagePipeline": "image", "MotionPipeline": "motion"}


def check_makes(choice: Choice, wanted: str) -> None:
    """Refuse a model that makes something else, before its weights load.

    Args:
        choice: The model.
        wanted: image, video or motion.

    Raises:
        ModelError: It makes another.
    """
    index = read_json(choice.folder / "model_index.json", "model_index.json")
    made = _MADE.get(str(index.get("_class_name")), "video")
    if made != wanted:
        raise ModelError(
            explain(
                f"model {choice.name} makes {made}s",
                allowed=f"a model that makes {wanted}s",
                hint=f"blockloom generate {made}, or another --model",
            )
        )


def _bundled_for(recipe: str) -> str:
    names = {recipe_name(path): name for name, path in bundled_models().items()}
    found = names.get(recipe) or names.get(f"image/{recipe}")
    if found:
        return found
    from ..core.recipe import list_recipes

    known = list_recipes()
    if recipe not in known and f"image/{recipe}" not in known:
        raise UsageError(
            explain(
                "unknown --recipe",
                got=recipe,
                allowed=", ".join(names),
                hint=nearest(recipe, known),
            )
        )
    raise ModelError(
        explain(
            f"recipe {recipe} has no bundled weights",
            allowed=", ".join(sorted(names)),
            hint=f"blockloom train {recipe} --data FOLDER --out FOLDER, then --model FOLDER",
        )
    )


def recipe_name(folder: Path) -> str:
    """Read the recipe's name from a saved pipeline; empty when it does not say.

    Raises:
        ModelError: The model's configuration is too large or not a JSON object.
    """
    name = recipe_of(folder).get("name")
    return name if isinstance(name, str) else ""


def recipe_of(folder: Path) -> dict[str, Any]:
    """Read the recipe of a saved pipeline; empty when it does not say.

    Raises:
        ModelError: The model's configuration is too large or not a JSON object.
    """
    recipe = _config_of(folder, "model").get("recipe")
    return recipe if isinstance(recipe, dict) else {}


def layout_of(folder: Path) -> dict[str, Any]:
    """Read the layout in the recipe of a saved pipeline; empty when it does not say."""
    layout = recipe_of(folder).get("layout")
    return layout if isinstance(layout, dict) else {}


def sees_the_end(folder: Path) -> bool:
    """Tell from its small file what `models.video.sees_the_end` tells of a loaded model."""
    layout = layout_of(folder)
    return layout.get("block") == "all" or layout.get("permute") == "any"


def _config_of(folder: Path, component: str) -> dict[str, Any]:
    path = folder / component / "config.json"
    return read_json(path, f"{component}/config.json") if path.is_file() else {}


def pick_device(name: str, dtype: str = "float32") -> "torch.device":
    """Turn a device name into a device this machine has.

    Args:
        name: auto, cpu, mps, cuda or cuda:N.
        dtype: Number format that must work there.

    Raises:
        UsageError: No such device here, or the format does not work on it.
    """
    import torch

    available = ["cpu"]
    available += [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        available.append("mps")
    if name == "auto":
        name = available[1] if len(available) > 1 else "cpu"
    if name == "cuda":
        name = "cuda:0"
    if name not in available:
        raise UsageError(
            explain("--device is not here", got=name, allowed=", ".join(["auto", *available]))
        )
    if dtype == "float16" and name == "cpu":
        raise UsageError(
            explain("--dtype on the CPU", got=dtype, allowed="float32, bfloat16", hint="float32")
        )
    return torch.device(name)


def open_model(choice: Choice, device: "torch.device", dtype: str = "float32") -> Any:
    """Load a pipeline.

    Args:
        choice: What `choose` found.
        device: Where to put it.
        dtype: Number format of the weights.

    Returns:
        The pipeline that the folder names, progress bar set for the terminal at hand.

    Raises:
        ModelError: The folder cannot be loaded.
    """
    import sys

    import torch
    from diffusers.utils import logging
    from safetensors import SafetensorError

    from ..pipelines.auto import AutoPipeline

    logging.disable_progress_bar()  # loading a small model needs no bar; drawing has its own
    check_configs(choice.folder)
    try:
        pipe = AutoPipeline.from_pretrained(str(choice.folder), dtype=getattr(torch, dtype))
    except BlockloomError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = one_line(str(error))[:300].replace(str(choice.folder), choice.name)
        raise ModelError(explain(f"cannot load model {choice.name}: {reason}")) from error
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())
    return pipe.to(device)


def check_model_limits(params: ImageParams, choice: Choice) -> None:
    """Compare settings with the tokenizer's configuration, before weights load.

    Args:
        params: Settings of one picture.
        choice: The model.

    Raises:
        UsageError: top_k over the vocabulary, or a size that the tokenizer cannot draw.
    """
    vocabulary = _config_of(choice.folder, "model").get("codebook_size")
    if params.top_k and isinstance(vocabulary, int) and params.top_k > max(vocabulary, 1):
        raise UsageError(
            explain(
                "--top-k", got=str(params.top_k), allowed=f"1 to {vocabulary}", hint=str(vocabulary)
            )
        )
    size = _config_of(choice.folder, "tokenizer").get("image_size")
    for flag, value in (("--height", params.height), ("--width", params.width)):
        if value and isinstance(size, int) and value != size:
            raise UsageError(
                explain(f"{flag} of model {choice.name}", got=str(value), allowed=str(size))
            )


_CALL_NAMES = (
    "num_inference_steps",
    "guidance_scale",
    "temperature",
    "top_k",
    "top_p",
    "height",
    "width",
)


def call_settings(params: ImageParams) -> dict[str, Any]:
    """Return the settings that pictures drawn in one call must share."""
    return {
        name: getattr(params, name) for name in _CALL_NAMES if getattr(params, name) is not None
    }


def group_key(params: ImageParams) -> tuple[str, bool]:
    """Name what pictures drawn in one call must agree on.

    A missing negative prompt and an empty one are different things, so they never share a call.
    """
    return canonical_json(call_settings(params)), params.negative_prompt is None


def draw(pipe: Any, group: Sequence[ImageParams], **context: Any) -> "list[Image]":
    """Draw pictures that share their settings in one call.

    Args:
        pipe: From `open_model`.
        group: Parameters with the same `group_key`.
        context: Further arguments of the pipeline (`image`, `keep`).

    Returns:
        One picture per entry, in order.

    Raises:
        UsageError: The pipeline refused a setting.
    """
    from ..core.sampling import item_generator

    settings = call_settings(group[0])
    if group[0].negative_prompt is not None:
        settings["negative_prompt"] = [params.negative_prompt for params in group]
    try:
        result = pipe(
            prompt=[params.full_prompt for params in group],
            generator=[item_generator(params.seed, 0) for params in group],
            output_type="pil",
            **settings,
            **context,
        )
    except BlockloomError:
        raise
    except ValueError as error:
        raise UsageError(one_line(str(error))) from error
    images: list[Image] = result.images
    return images
