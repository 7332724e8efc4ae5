"""Write docs/recipes.md from the recipes that ship with the package.

Usage: python docs/make_recipes.py
"""

from pathlib import Path

from blockloom.core.exactness import context_is_trained, keeps_blocks
from blockloom.core.plan import mask_table
from blockloom.core.recipe import Recipe, list_recipes, load_recipe

HEAD = """\
# Recipes

<!-- Written by docs/make_recipes.py; change configs/ and run it again. -->

A recipe names a system as six choices; `blockloom inspect NAME` shows any of them as data.

**Mask** lists who sees whom, `query->key` over C (clean) and N (noisy or hidden) rows.
**Cache** says when rows become permanent. *Exact* means that the cached decode computes what the
training forward computes, proved for the layout before a recipe may say so; a recipe whose every
pass looks at all tokens anew keeps nothing and has nothing to prove. *Context unseen* means that
training never shows finished context as decoding keeps it, so that exact says less.
**Learns** is a tiny run on procedural data, rerun by the slow tests; lower is better. Pictures
(`training/shapes.py`): a coloured shape on a plain ground, 16x16 pixels; value and baseline are
measured on pictures whose prompts are not in the training data, and the baseline is the best
predictor that knows positions only, fitted on the training pictures. Videos
(`training/physics.py`): balls that fly, bounce, collide and are pushed, 8x8 or 12x12 pixels;
measured on clips whose scene and colours do not occur together in training, against a predictor
that also knows the frame before. *Drawn* goes on from given frames, in decibels (more is better)
against the true ones, beside keeping the last given frame or the mean of the given ones. Models
that are told cameras learn on still scenes seen from one that goes round (`training/orbits.py`),
and the frame kept is the nearest given view. A consistent student (`nfd_plus`) names where a path
ends and not the mean of all ends, which costs it decibels; it is measured by its teacher. All with
one thread: another number rounds differently and a run of seconds amplifies it (with two,
`video/teacher_forcing` came to 0.199 and 18.8 dB, below the kept last frame). Most videos after so
short a run are below the kept last frame; `magi_ctf` and the variant it rejects had one budget.
The model of `video/diffusion_forcing`, drawn by other matrices (two rows per block): one frame
after the other 17.5 dB, pyramid 17.6, trapezoid 16.3, all together 16.7; more rows lower all of
them (eight: 16.3, 16.4, 15.5, 15.8).
`video/far_long` trained alike without its coarse rows came to 0.161 and 19.4 dB, and with all eight
frames seen token by token to 0.166 and 19.1 dB: two frames say all about a ball that this run
learns. That coarse rows carry the past shows where nothing else does: with a window of the own
frame alone 0.210 and 18.2 dB, and 0.261 and 9.2 dB without them. After 64 frames its cache holds
284 KiB, with `cache.far.blocks` at 16 no more than 104, without coarse rows 32, and 1008 with all
frames token by token. `video/make_your_video` without edges came to 0.275 and 18.1 dB.
Motion that is told how others act (`motion/timar`, `motion/faceformer`) learns on dialogues and
talking mouths made by rule (`training/dialogue.py`, `training/visemes.py`); the error is that of
motion drawn for held-out clips from nothing but what is told, beside the best linear map from the
same. `motion/timar` that answers instead (`head.kind=regression`, two heads,
`backbone.decay=8`, 240 steps) came to 0.066.
"""


def table(recipes: list[Recipe]) -> list[str]:
    """Lay out the choices of every recipe, one row each."""
    lines = ["| recipe | system | mask | cache | head |", "| --- | --- | --- | --- | --- |"]
    for recipe in recipes:
        mask = "<br>".join(f"`{key}: {rule}`" for key, rule in mask_table(recipe).to_dict().items())
        exact = (
            "exact" if recipe.cache.exact else "not exact" if recipe.cache.write != "none" else ""
        )
        unseen = keeps_blocks(recipe) and not context_is_trained(recipe)
        cache = ", ".join(filter(None, (recipe.cache.write, exact, "context unseen" * unseen)))
        system = f"[{recipe.system.title}]({recipe.system.url})"
        lines.append(f"| `{recipe.name}` | {system} | {mask} | {cache} | {recipe.head.kind} |")
    return lines


def learned(recipes: list[Recipe]) -> list[str]:
    """Lay out the learning checks, one row each."""
    lines = [
        "| recipe | metric | value | baseline | which baseline | budget | drawn |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for recipe in recipes:
        if learns := recipe.learns:
            lines.append(
                f"| `{recipe.name}` | {learns.metric} | {learns.value:g} | {learns.baseline:g} "
                f"| {learns.baseline_name} | {learns.budget} | {learns.drawn} |"
            )
    return lines


def page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    recipes = [load_recipe(name) for name in list_recipes()]
    for modality in dict.fromkeys(recipe.modality for recipe in recipes):
        some = [recipe for recipe in recipes if recipe.modality == modality]
        differs = [f"- `{recipe.name}`: {recipe.system.differs}." for recipe in some]
        parts += [f"## {modality.capitalize()}\n", *table(some), "", "### Learns\n", *learned(some)]
        parts += ["", "### Where they differ from the papers\n", *differs, ""]
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("recipes.md").write_text(page(), encoding="utf-8")
