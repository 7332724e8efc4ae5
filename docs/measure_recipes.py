"""Repeat the learning check of recipes and print their `learns` sections as YAML.

Usage: python docs/measure_recipes.py image/maskgit image/givt
"""

import sys

import yaml

from blockloom.core.recipe import load_recipe
from blockloom.training.learning import learning_check


def section(name: str) -> str:
    """Measure one recipe and shape the result as the section of its file."""
    learns = learning_check(load_recipe(name)).spec().model_dump()
    return yaml.safe_dump({"learns": learns}, sort_keys=False, width=1000)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        sys.stdout.write(f"# {name}\n{section(name)}")
