"""Repeat the learning check of recipes and print their `learns` sections as YAML.

Usage: python docs/measure_recipes.py image/maskgit image/givt
"""

import sys
from typing import Any

import torch
import yaml

from blockloom.core.recipe import load_recipe
from blockloom.training.acting_learning import acting_learning_check
from blockloom.training.clip_learning import clip_learning_check
from blockloom.training.learning import learning_check


def section(name: str) -> str:
    """Measure one recipe and shape the result as the section of its file."""
    recipe = load_recipe(name)
    check: Any = clip_learning_check if recipe.modality == "video" else learning_check
    check = check if recipe.acting is None else acting_learning_check
    learns = check(recipe).spec().model_dump()
    return yaml.safe_dump({"learns": learns}, sort_keys=False, width=1000)


if __name__ == "__main__":
    torch.set_num_threads(1)  # another number rounds differently, and training amplifies it
    for name in sys.argv[1:]:
        sys.stdout.write(f"# {name}\n{section(name)}")
