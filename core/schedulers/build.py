"""Schedulers by name: the classes, and published decoders as settings of the unmask family.

What it is: a table of classes, a table of presets, one factory.
What it does not know: recipes, models.
Invariants: every preset builds; a preset is plain JSON and can be overridden key by key. Presets
name the plan, the order and the accept rule; two published details are not reproduced: TiTok ranks
by raw logits (here log-probabilities), and Halton-MaskGIT raises its logits by up to 1.2 over the
rows (set `temperature_end` for that).
"""

from collections.abc import Mapping
from typing import Any

from ..errors import check_one_of
from .base import BlockScheduler
from .flow import FlowEuler, Renoise
from .multistep import Multistep
from .unmask import UnmaskScheduler

SCHEDULERS: dict[str, type[BlockScheduler]] = {
    "unmask": UnmaskScheduler,
    "flow_euler": FlowEuler,
    "renoise": Renoise,
    "multistep": Multistep,
}

UNMASK_PRESETS: dict[str, dict[str, Any]] = {
    "maskgit": {"count": "cosine", "choice_temperature": 4.5},
    "maskgil": {
        "count": "arccos",
        "on": "counts",
        "choice_temperature": 4.5,
        "choice_ramp": "linspace",
        "guidance_scale": 4.0,  # their w = 3 in (1 + w) c - w u
        "guidance_ramp": "linear",
    },
    "titok": {"count": "arccos", "choice_temperature": 4.5},
    "amused": {"num_steps": 12, "choice_temperature": 2.0, "choice_ramp": "linspace"},
    "mar": {"num_steps": 64, "order": "random", "guidance_ramp": "mar_linear"},
    "halton": {"num_steps": 32, "count": "arccos", "on": "revealed", "order": "halton"},
    "llada": {"num_steps": 32, "count": "even", "temperature": 0.0, "gumbel": False},
    "dream": {
        "num_steps": 32,
        "count": "dream",
        "order": "entropy",
        "conf_from": "filtered",
        "choice_ramp": "constant",
    },
    "fast_dllm": {"num_steps": 32, "count": "even", "accept": "threshold", "threshold": 0.9},
    "fast_dllm_factor": {"num_steps": 32, "count": "even", "accept": "factor", "factor": 1.0},
    "llada2": {"num_steps": 32, "count": "even", "accept": "quota", "threshold": 0.95},
    "entropy_bounded": {
        "num_steps": 32,
        "count": "even",
        "order": "entropy",
        "accept": "entropy_budget",
        "gamma": 0.1,
    },
    "wedlm": {
        "num_steps": 16,
        "count": "even",
        "order": "entropy",
        "accept": "low_entropy",
        "threshold": 0.4,
        "distance_weight": 0.02,
        "temperature": 0.2,
    },
    "card": {"num_steps": 16, "count": "even", "accept": "confident_prefix", "threshold": 0.9},
    "first_hitting": {"count": "first_hitting", "order": "random"},
    "ancestral": {"num_steps": 32, "count": "binomial", "order": "random"},
    "ascending": {"count": "doubling"},
    "next_token": {"count": "one", "order": "raster"},
}


def build_scheduler(config: Mapping[str, Any]) -> BlockScheduler:
    """Build a scheduler from plain settings.

    Args:
        config: `kind` names a class of `SCHEDULERS` (default "unmask"); `preset` names a decoder
            of `UNMASK_PRESETS`; every other key is a setting and overrides the preset.

    Raises:
        UsageError: Unknown kind, preset or setting; the message suggests the closest.

    Example:
        >>> build_scheduler({"preset": "halton", "num_steps": 8}).config.order
        'halton'
    """
    settings = dict(config)
    kind = settings.pop("kind", "unmask")
    check_one_of("scheduler kind", kind, tuple(SCHEDULERS))
    preset = settings.pop("preset", None)
    if preset is not None:
        check_one_of("scheduler preset", preset, tuple(UNMASK_PRESETS))
        settings = {**UNMASK_PRESETS[preset], **settings}
    return SCHEDULERS[kind].from_config(settings)
