"""Repeat the learning check of recipes and print their `learns` sections as YAML.

Usage: python docs/measure_recipes.py image/maskgit image/givt
"""

import sys

import torch
import yaml

from blockloom.core.recipe import load_recipe
from blockloom.training.checks import check_of


def section(name: str) -> str:
    """Measure one recipe and shape the result as the section of its file."""
    recipe = load_recipe(name)
    learns = check_of(recipe)(recipe).spec().model_dump()
    return yaml.safe_dump({"learns": learns}, sort_keys=False, width=1000)


if __name__ == "__main__":
    torch.set_num_threads(1)  # another number rounds differently, and training amplifies it
    for name in sys.argv[1:]:
        sys.stdout.write(f"# {name}\n{section(name)}")
