"""The self-check passes on every recipe and catches a mask that leaks."""

import pytest
import torch

from blockloom.core.attention import NoMask
from blockloom.core.errors import ModelError
from blockloom.core.recipe import list_recipes, load_recipe
from blockloom.models.generator import GenerativeModel
from blockloom.training.objective import ModelStage
from blockloom.training.selfcheck import influence, mask_self_check

TINY = [
    "backbone.dim=32",
    "backbone.layers=2",
    "backbone.heads=2",
    "text.dim=16",
    "text.words=3",
    "head.width=16",
]


def make_stage(name: str) -> ModelStage:
    extra = ["layout.text_tokens=5"] if name == "image/cm3" else []
    recipe = load_recipe(name, [*TINY, *extra])
    is_code = recipe.head.kind == "categorical"
    sizes = {"codebook_size": 7} if is_code else {"latent_channels": 3}
    model = GenerativeModel(recipe=recipe.model_dump(mode="json"), height=3, width=4, **sizes)
    generator = torch.Generator().manual_seed(0)
    if is_code:
        values = torch.randint(7, (4, 12, 1), generator=generator)
    else:
        values = torch.randn(4, 12, 3, generator=generator)
    captions = ["red cat", "dog", "a", "blue"]
    return ModelStage(model, values, model.text_encoder.tokenize(captions), captions)


def test_influence_grows_by_one_step_a_layer():
    chain = torch.zeros(4, 4, dtype=torch.bool)
    chain[1, 0] = chain[2, 1] = chain[3, 2] = True
    assert influence(chain, 1)[2].tolist() == [False, True, True, False]
    assert influence(chain, 2)[2].tolist() == [True, True, True, False]
    assert influence(chain, 3)[3].tolist() == [True, True, True, True]


@pytest.mark.parametrize("name", list_recipes("image"))
def test_every_recipe_keeps_what_its_mask_hides(name):
    recipe = load_recipe(name, TINY)
    kept = mask_self_check(make_stage(name), torch.Generator().manual_seed(1))
    if recipe.mask == "bidirectional":  # only prompt rows, which never see the picture, can stay
        assert kept == (recipe.text.words + 1 if recipe.condition.prefix else 0)
    else:
        assert kept >= 8


@pytest.mark.parametrize("name", ["image/llamagen", "image/acdit", "image/block_masked"])
def test_a_leaking_mask_is_caught(name):
    stage = make_stage(name)
    plan, layout, _ = stage.plan(torch.Generator().manual_seed(0))
    stage._fixed = (plan, layout, NoMask(layout.num_tokens**2))
    with pytest.raises(ModelError, match="mask self-check"):
        mask_self_check(stage, torch.Generator().manual_seed(1))
