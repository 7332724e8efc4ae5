"""History that a model wrote itself: what a training step looks back on instead of the data.

A model that only ever sees true frames behind it never learns to live with its own. Here the frames
of a batch are noised to one level and the model, block after block with its own cache, takes them
back to clean in one step; that is the context the same batch then trains on.

It knows neither recipes by name nor how a loss is formed.

Source: Resampling Forcing (arXiv:2512.15702), section 3.2. Differs: one level for the whole batch,
not one per item, because the rows of a batch share their schedule.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.corruption import noise_levels
from ..core.plan import DecodePlan
from ..core.rollout import Rollout, run
from ..core.sampling import item_generator
from ..core.schedulers.flow import FlowEuler
from ..models.generator import GenerativeModel, ModelDecoder
from ..models.prompts import PreparedPrompt


@torch.no_grad()
def resampled(
    model: GenerativeModel,
    plan: DecodePlan,
    values: Float[Tensor, "batch slots channels"],
    prompt: PreparedPrompt,
    actions: Float[Tensor, "batch frames actions"] | None,
    level: float,
    generators: Sequence[torch.Generator],
) -> Float[Tensor, "batch slots channels"]:
    """Let a model redraw clips from a noise level, one Euler step per block, on its own history.

    Args:
        model: The model, as it is at this step.
        plan: Its layouts and cache rule for clips of this length.
        values: Latents of the data.
        prompt: Prepared prompts, one per item.
        actions: What was done on the way to every frame; None for models without actions.
        level: Where every block starts, in (0, 1]: low keeps the data, high trusts the model.
        generators: One CPU generator per item.

    Returns:
        The redrawn latents.
    """
    kind = model.recipe.head.objective
    scheduler = FlowEuler(num_steps=1, prediction_type=kind)
    rollout = Rollout(
        plan,
        ModelDecoder(model, prompt, actions=actions),
        scheduler,
        values=values,
        is_known=torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device),
        generators=generators,
        start_level=level,
    )
    redrawn, _ = run(rollout)
    return redrawn


def history_level(shift: float, generator: torch.Generator) -> float:
    """Draw where the redrawing starts: the sigmoid of a normal number, shifted.

    Args:
        shift: Below 1 towards the data (the paper's is 0.6), above 1 towards noise.
        generator: Source of randomness.
    """
    # Level 0 would redraw nothing and divide by nothing.
    return max(float(noise_levels("logit_normal", (1,), generator, shift=shift)), 1e-3)


def history_generators(batch: int, generator: torch.Generator) -> list[torch.Generator]:
    """Make one generator per item out of a step's generator."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return [item_generator(seed, item) for item in range(batch)]
