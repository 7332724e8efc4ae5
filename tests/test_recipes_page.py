"""docs/recipes.md is what docs/make_recipes.py writes from the recipes."""

import importlib.util
from pathlib import Path

from blockloom.core.recipe import list_recipes

DOCS = Path(__file__).parents[1] / "docs"


def test_the_page_of_recipes_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("make_recipes", DOCS / "make_recipes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.page()
    assert (DOCS / "recipes.md").read_text(encoding="utf-8") == page
    assert all(f"`{name}`" in page for name in list_recipes())
