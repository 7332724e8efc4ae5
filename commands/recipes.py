"""`blockloom recipes`: the table of recipes."""

from typing import TYPE_CHECKING, Any

from ..pipelines.params import bundled_models
from . import models, output
from .arguments import Recipes

if TYPE_CHECKING:
    from ..core.recipe import Recipe


def run(args: Recipes) -> int:
    """Print one row per recipe.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    from ..core.recipe import list_recipes, load_recipe

    names = list_recipes(None if args.modality == "all" else args.modality)
    trained = {models.recipe_name(path): name for name, path in bundled_models().items()}
    rows = [describe(load_recipe(name), trained.get(name)) for name in names]
    if args.format == "json":
        output.emit_json(rows)
        return 0
    width = max([len(name) for name in names], default=0)
    for row in rows:
        exact = "exact" if row["exact"] else "approximate" if row["cache"] != "none" else "no cache"
        output.say(f"{row['name']:<{width}}  {exact:<11}  {_learned(row['learns'])}")
        weights = f"; weights: {row['model']}" if row["model"] else ""
        output.say(f"{'':<{width}}  {row['system']}{weights}")
    return 0


def describe(recipe: "Recipe", model: str | None) -> dict[str, Any]:
    """Summarise a recipe as plain JSON values.

    Args:
        recipe: The recipe.
        model: Bundled model that was trained from it, or None.
    """
    return {
        "name": recipe.name,
        "modality": recipe.modality,
        "system": recipe.system.title,
        "url": recipe.system.url,
        "differs": recipe.system.differs,
        "exact": recipe.cache.exact,
        "cache": recipe.cache.write,
        "head": recipe.head.kind,
        "model": model,
        "learns": None if recipe.learns is None else recipe.learns.model_dump(),
    }


def _learned(learns: dict[str, Any] | None) -> str:
    if learns is None:
        return "learning not measured"
    return (
        f"{learns['metric']} {learns['value']:.4g} "
        f"({learns['baseline_name']} {learns['baseline']:.4g}; {learns['budget']})"
    )
