"""From a recipe's schedule section to a scheduler object.

Recipes whose head predicts from the trunk at every noise level get a scheduler of the level family,
all others one of the unmask family. `core.schedulers` owns the rules; this file only names them.
"""

from typing import Any

from .recipe import Recipe
from .schedulers.base import BlockScheduler
from .schedulers.build import build_scheduler


def schedule_settings(recipe: Recipe) -> dict[str, Any]:
    """Translate the schedule section into settings of `build_scheduler`."""
    spec = recipe.schedule
    common: dict[str, Any] = {
        "num_steps": spec.steps,
        "guidance_scale": spec.guidance_scale,
        "guidance_ramp": spec.guidance_ramp,
    }
    if recipe.head.kind != "patch":
        return common | {
            "kind": "unmask",
            "count": spec.count,
            "on": spec.basis,
            "order": spec.order,
            "accept": spec.accept,
            "threshold": spec.threshold,
            "gamma": spec.gamma,
            "temperature": spec.temperature,
            "choice_temperature": spec.choice_temperature,
            "top_k": spec.top_k or 0,
            "top_p": 1.0 if spec.top_p is None else spec.top_p,
        }
    common |= {"prediction_type": recipe.head.objective}
    if spec.update in ("dpm", "unipc"):
        # Only straight paths can be shifted; the noise-predicting solver keeps its training times.
        shift = {"shift": spec.level_shift} if recipe.head.objective == "velocity" else {}
        return common | shift | {"kind": "multistep", "solver": spec.update}
    kind = "flow_euler" if spec.update == "euler" else "renoise"
    return common | {"kind": kind, "shift": spec.level_shift}


def scheduler_of(recipe: Recipe, **overrides: Any) -> BlockScheduler:
    """Build the scheduler of a recipe.

    Args:
        recipe: The recipe.
        **overrides: Scheduler settings of one request (guidance_scale, temperature, ...); None
            values are ignored.
    """
    changed = {key: value for key, value in overrides.items() if value is not None}
    settings = schedule_settings(recipe)
    known = {key: value for key, value in changed.items() if key in settings}
    return build_scheduler(settings | known)
