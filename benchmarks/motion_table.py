"""All text-to-motion recipes beside each other: same data, tokenizers and seconds of training.

Every recipe gets a model of one size, the trained tokenizer of its kind, and one budget of CPU
seconds; then `blockloom eval`'s figures are taken with one evaluator. Recipes that act or are told
what is sensed are about other tasks and are left out.

From the repository's root:
`python benchmarks/motion_table.py --data motion_text.npz --tokenizers FOLDER --out report.json`
where FOLDER holds `motion_rvq/`, `motion_vq/` and `motion_sigma/` as `blockloom train` stores them.
"""

import argparse
import copy
import json
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from blockloom.core.recipe import Recipe, list_recipes, load_recipe
from blockloom.training.checks import check_of
from blockloom.training.loop import Trainer
from blockloom.training.motion_evaluation import MotionSettings, evaluate_motions
from blockloom.training.motion_learning import motion_learning_check
from blockloom.training.objective import ModelStage
from blockloom.training.run import (
    initial_model,
    load_pipeline_parts,
    medium_of,
    save_pipeline,
    train_config,
)

SIZE = (
    "backbone.dim=192", "backbone.layers=5", "backbone.heads=6", "backbone.mlp_ratio=2.6667",
    "text.dim=96", "text.layers=1", "text.words=12", "head.width=192", "layout.frames=16",
    "train.ema=0.998", "train.warmup=50", "train.balance=caption", "train.mirror=true",
)  # fmt: skip
"""One size for all."""
FRAMES = 64
"""Feature frames of every motion that is judged: what recipes without a window train on."""
TOLERANCE = 0.05
"""Share of the budget by which a run may miss it."""
TIMED_STEPS = (6, 30)
"""Steps of the two runs that tell how long a step takes."""
SHOWN = ("r_precision_top_1", "r_precision_top_3", "recognised", "frechet_distance", "mm_distance",
         "diversity", "foot_skating_ratio", "jerk_m_s3")  # fmt: skip
BESIDE = ("real_held_out", "nearest_training_text", "standing_still")


def candidates() -> list[str]:
    """List the recipes that turn a text into a motion."""
    names = list_recipes("motion")
    return [name for name in names if check_of(load_recipe(name)) is motion_learning_check]


def sized(name: str, tokenizers: Path, overrides: tuple[str, ...] = SIZE) -> Recipe:
    """Load a recipe at the common size with the trained tokenizer of its kind."""
    plain = load_recipe(name)
    kind = plain.tokenizer["kind"]
    path, changes = tokenizers / str(kind), list(overrides)
    if granted := plain.schedule.levels:
        tokens = medium_of(plain).load(path).grid[1]
        changes.append(f"schedule.levels={[granted[0], *[1] * (tokens - 1)]}")
    return load_recipe(name, [*changes, f"tokenizer={{kind: {kind}, path: {path}}}"])


def fitted(recipe: Recipe, data: Any, seconds: float, out: Path) -> dict[str, Any]:
    """Train a recipe for so many seconds of this process and store it in `out/final`.

    Where the timed steps misjudged the run, as on a machine with other jobs, it is run once more
    with as many steps as the first run says fit.
    """
    medium = medium_of(recipe)
    tokenizer = medium.load(recipe.tokenizer["path"])
    clips = medium.read(recipe, data, tokenizer)

    def new_stage() -> ModelStage:
        model = initial_model(recipe, tokenizer, recipe.train.seed)
        return medium.stage(model, tokenizer, clips, out / "cache")

    per_step = step_seconds(recipe, new_stage())
    for _ in range(2):
        stage, steps = new_stage(), max(1, round(seconds / per_step))
        config = train_config(recipe, steps, progress=False, precision="fp32")
        shutil.rmtree(out / "model", ignore_errors=True)
        before = time.process_time()
        trainer = Trainer(stage, config, out / "model")
        trainer.run()
        spent = time.process_time() - before
        if abs(spent / seconds - 1) <= TOLERANCE:
            break
        per_step = spent / steps
    with trainer.averaged_weights():
        save_pipeline(out / "final", stage.model, tokenizer)
    parameters = sum(p.numel() for p in stage.model.parameters())
    return {"steps": steps, "train_seconds": round(spent, 1), "parameters": parameters}


def step_seconds(recipe: Recipe, stage: ModelStage) -> float:
    """Time a step of the real loop, optimiser and all, on a copy that is thrown away.

    Two runs are compared, so that what a run costs once does not count.
    """
    short, long = (_run_seconds(recipe, copy.deepcopy(stage), steps) for steps in TIMED_STEPS)
    return max(long - short, 1e-6) / (TIMED_STEPS[1] - TIMED_STEPS[0])


def _run_seconds(recipe: Recipe, stage: ModelStage, steps: int) -> float:
    config = train_config(recipe, steps, progress=False, precision="fp32", save_every=10**6)
    with tempfile.TemporaryDirectory() as folder:
        before = time.process_time()
        Trainer(stage, config, Path(folder)).run()
        return time.process_time() - before


def measured(folder: Path, data: Any, settings: MotionSettings) -> dict[str, Any]:
    """Evaluate a stored model."""
    model, tokenizer = load_pipeline_parts(folder)
    clips = medium_of(model.recipe).read(model.recipe, data, tokenizer)
    return evaluate_motions(model, tokenizer, clips, folder, settings, Path(data).name)


def condensed(report: dict[str, Any]) -> dict[str, Any]:
    """Keep of every recipe what the table shows, and once what all are held against."""
    first = next(iter(report["recipes"].values()))

    def shown(table: dict[str, Any], who: str) -> dict[str, Any]:
        return {metric: table[metric][who] for metric in SHOWN if who in table.get(metric, {})}

    return report | {
        "recipes": {
            name: {key: told[key] for key in ("steps", "train_seconds", "parameters")}
            | {"generated": shown(told["table"], "generated")}
            for name, told in report["recipes"].items()
        },
        "beside": {who: shown(first["table"], who) for who in BESIDE},
        "evaluator": first["evaluator"],
        "frechet_floor_between_real_sets": first["frechet_floor_between_real_sets"],
    }


def markdown(report: dict[str, Any]) -> str:
    """Lay out one row per recipe, real motions and the baselines first."""
    lines = ["| | " + " | ".join(SHOWN) + " | steps |", "| --- |" + " --- |" * (len(SHOWN) + 1)]
    first = next(iter(report["recipes"].values()))["table"]
    for who in BESIDE:
        cells = [_cell(first.get(metric, {}).get(who)) for metric in SHOWN]
        lines.append(f"| {who.replace('_', ' ')} | " + " | ".join(cells) + " | |")
    for name, result in report["recipes"].items():
        cells = [_cell(result["table"].get(metric, {}).get("generated")) for metric in SHOWN]
        lines.append(f"| `{name}` | " + " | ".join(cells) + f" | {result['steps']} |")
    return "\n".join(lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    shown, interval = f"{value['value']:.3g}", value["interval"]
    return f"{shown} [{interval[0]:.3g}, {interval[1]:.3g}]" if interval else shown


def main(argv: list[str] | None = None) -> None:
    """Train and measure every recipe; what is measured already is kept."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokenizers", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/motion_table"))
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--recipes", nargs="*")
    parser.add_argument("--set", nargs="*", default=SIZE)
    flags = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    torch.set_num_threads(1)
    settings = MotionSettings(evaluator=flags.runs / "evaluator", variants=0, frames=FRAMES)
    report: dict[str, Any] = {"seconds": flags.seconds, "size": list(flags.set), "recipes": {}}
    for name in flags.recipes or candidates():
        out = flags.runs / name.split("/")[-1]
        record = out / "measured.json"
        if not record.is_file():
            recipe = sized(name, flags.tokenizers, tuple(flags.set))
            told = fitted(recipe, flags.data, flags.seconds, out)
            told |= measured(out / "final", flags.data, settings)
            record.write_text(json.dumps(told, indent=2, allow_nan=False) + "\n")
        report["recipes"][name] = json.loads(record.read_text())
        sys.stderr.write(markdown(report))
    if flags.out is not None:
        flags.out.write_text(json.dumps(condensed(report), indent=1, allow_nan=False) + "\n")
    sys.stdout.write(markdown(report))


if __name__ == "__main__":
    main()
