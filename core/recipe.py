"""Recipes: one YAML file that names the six choices of a system.

A recipe is data. It names a layout, a mask, a corruption, a schedule, a cache rule and a head in
the words of the core languages; no code is taken from it. Every unknown key and every illegal
combination is refused with one line that names the nearest legal value.

The recipe does not know what an image is: sizes of the data come from the tokenizer at run time.
"""

from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from .errors import ModelError, UsageError
from .legality import combination_errors, frames_per_block, window_of
from .recipe_sections import (
    ActingSpec,
    BackboneSpec,
    CacheSpec,
    ConditionSpec,
    CorruptionSpec,
    DistillSpec,
    HeadSpec,
    LayoutSpec,
    LearnsSpec,
    ScheduleSpec,
    Section,
    SystemSpec,
    TextSpec,
    TrainSpec,
)

__all__ = ["Recipe", "frames_per_block", "load_recipe", "recipe_from_dict", "window_of"]

MAX_DEPTH = 16
MODALITIES = ("image", "video", "audio", "motion")


class Recipe(Section):
    """One system as six choices (plus tokenizer, size and training defaults)."""

    name: str
    system: SystemSpec
    modality: Literal["image", "video", "audio", "motion"] = "image"
    tokenizer: dict[str, Any] = Field(default_factory=lambda: {"kind": "palette"})
    backbone: BackboneSpec = BackboneSpec()
    layout: LayoutSpec = LayoutSpec()
    mask: str | dict[str, str] = "bidirectional"
    condition: ConditionSpec = ConditionSpec()
    text: TextSpec = TextSpec()
    corruption: CorruptionSpec = CorruptionSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    cache: CacheSpec = CacheSpec()
    head: HeadSpec = HeadSpec()
    acting: ActingSpec | None = None
    train: TrainSpec = TrainSpec()
    distill: DistillSpec | None = None
    learns: LearnsSpec | None = None

    @model_validator(mode="after")
    def _legal(self) -> "Recipe":
        for message in combination_errors(self):
            raise ValueError(message)
        return self


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split `a.b=value` into its path and its YAML value.

    Raises:
        UsageError: no `=` in the text, or the value is not plain YAML.
    """
    path, equals, value = text.partition("=")
    if not equals or not path.strip():
        raise UsageError(f"--set takes a.b=value; got {text!r}; try schedule.steps=8")
    try:
        return path.strip().split("."), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UsageError(f"--set {path}: the value {value!r} is not plain YAML") from None


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return a copy of `data` with dotted overrides applied (unknown keys fail in validation)."""
    result = {**data}
    for text in overrides:
        path, value = parse_override(text)
        node = result
        for key in path[:-1]:
            child = node.get(key)
            if child is not None and not isinstance(child, dict):
                raise UsageError(f"--set {'.'.join(path)}: {key} holds a value, not a section")
            node[key] = dict(child or {})
            node = node[key]
        node[path[-1]] = value
    return result


def _legal_keys(path: tuple[str | int, ...]) -> list[str]:
    model: Any = Recipe
    for key in path[:-1]:
        field = model.model_fields.get(str(key)) if hasattr(model, "model_fields") else None
        if field is None:
            return []
        options = [field.annotation, *getattr(field.annotation, "__args__", ())]
        model = next((o for o in options if hasattr(o, "model_fields")), None)
    return list(model.model_fields) if model is not None else []


def _first_line(error: ValidationError, source: str) -> str:
    """Turn pydantic's first finding into one line with the nearest legal value."""
    finding = error.errors()[0]
    where = ".".join(str(part) for part in finding["loc"])
    if finding["type"] == "extra_forbidden":
        legal = _legal_keys(finding["loc"])
        near = get_close_matches(str(finding["loc"][-1]), legal, n=1, cutoff=0.0)
        hint = f"; nearest: {near[0]}" if near else ""
        return f"{source}: unknown key {where}{hint}"
    message = finding["msg"].removeprefix("Value error, ")
    got = finding.get("input")
    shown = "" if isinstance(got, dict | BaseModel) else f"; got {got!r}"
    expected = finding.get("ctx", {}).get("expected", "")
    if expected and isinstance(got, str):
        words = [w.strip(" '\"") for w in str(expected).replace(" or ", ",").split(",")]
        shown += f"; nearest: {get_close_matches(got, words, n=1, cutoff=0.0)[0]}"
    return f"{source}: {where + ': ' if where else ''}{message}{shown}"


def recipe_from_dict(data: dict[str, Any], source: str = "recipe") -> Recipe:
    """Validate a recipe.

    Raises:
        ModelError: unknown key, wrong type, an illegal combination, or `cache.exact: true` where
            the checker disproves it (one line).
    """
    if not isinstance(data, dict):
        raise ModelError(f"{source}: a recipe is a mapping of keys; got {type(data).__name__}")
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise ModelError(_first_line(error, source)) from None
    # Imported here: the proof needs tensors, reading a recipe's words does not.
    from .exactness import require_exact

    require_exact(recipe)
    return recipe


def list_recipes(modality: str | None = None) -> list[str]:
    """Return the names of the recipes that ship with the package, sorted."""
    root = resources.files("blockloom.configs")
    names = []
    for folder in MODALITIES if modality is None else (modality,):
        directory = root / folder
        if directory.is_dir():
            names += [
                f"{folder}/{item.name.removesuffix('.yaml')}"
                for item in directory.iterdir()
                if item.name.endswith(".yaml")
            ]
    return sorted(names)


def _read_yaml(text: str, source: str) -> Any:
    if len(text) > 200_000:
        raise ModelError(f"{source}: {len(text)} characters; a recipe has at most 200000")
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:  # nesting costs quadratic time before it fails by itself
                raise ModelError(f"{source}: nested deeper than {MAX_DEPTH} levels")
            if isinstance(event, yaml.AliasEvent):  # alias bombs need aliases; recipes do not
                raise ModelError(f"{source}: YAML aliases are not allowed in a recipe")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{source}: not plain YAML ({reason})") from None


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Load a recipe by name (`image/acdit`, `acdit`) or by path, with dotted overrides.

    Raises:
        UsageError: no such recipe; the nearest name is given.
        ModelError: the file does not hold a legal recipe.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"recipe file not found: {name}")
        data = _read_yaml(path.read_text(encoding="utf-8", errors="replace"), path.name)
    else:
        known = list_recipes()
        full = name if name in known else next((k for k in known if k.split("/")[1] == name), None)
        if full is None:
            near = get_close_matches(name, [*known, *(k.split("/")[1] for k in known)], 1, 0.0)
            raise UsageError(f"unknown recipe {name!r}; nearest: {near[0] if near else 'none'}")
        item = resources.files("blockloom.configs") / f"{full}.yaml"
        data = _read_yaml(item.read_text(encoding="utf-8"), full)
    if isinstance(data, dict):  # anything else is refused by the next line
        data = apply_overrides(data, overrides or [])
    return recipe_from_dict(data, name)
