"""Learning from one's own answers: the loss of windows that the model draws itself.

Teacher forcing shows true frames behind every answer; a model that decodes sees its own. Here a
training step runs the decode loop over the whole window, with its cache, and the gradient of the
error goes back through every answer to those before it. It knows neither recipes by name nor data.

Source: FaceFormer (arXiv:2112.05329), section 3.4, whose released training rolls out so.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..core.plan import DecodePlan
from ..core.rollout import Rollout, run
from ..core.schedule import scheduler_of
from ..models.generator import GenerativeModel, ModelDecoder
from ..models.heads.regression import squared_error
from ..models.prompts import PreparedPrompt
from .history import history_generators


def rolled_out(
    model: GenerativeModel,
    plan: DecodePlan,
    items: int,
    prompt: PreparedPrompt,
    actions: Float[Tensor, "batch frames actions"] | None,
    generator: torch.Generator,
) -> Float[Tensor, "batch slots channels"]:
    """Draw whole windows from nothing but prompts and actions; differentiable.

    Args:
        model: A model whose head is differentiable.
        plan: Its layouts and cache rule for windows of this length.
        items: Number of windows.
        prompt: Prepared prompts, one per item.
        actions: What was done on the way to every frame; None for models without actions.
        generator: All randomness of the step.

    Returns:
        The latents, with the graph of all passes behind them.
    """
    decoder = ModelDecoder(model, prompt, actions=actions)
    decoder.differentiable = torch.is_grad_enabled()
    shape = (items, plan.num_slots, model.config.latent_channels)
    rollout = Rollout(
        plan, decoder, scheduler_of(model.recipe),
        values=torch.zeros(shape, device=model.device),
        is_known=torch.zeros(shape[:2], dtype=torch.bool, device=model.device),
        generators=history_generators(items, generator),
    )  # fmt: skip
    drawn, _ = run(rollout)
    return drawn


def rollout_loss(
    model: GenerativeModel, plan: DecodePlan, values: Float[Tensor, "batch slots channels"],
    prompt: PreparedPrompt, actions: Float[Tensor, "batch frames actions"] | None,
    generator: torch.Generator,
) -> tuple[Float[Tensor, ""], dict[str, float]]:  # fmt: skip
    """Compute the mean squared error of windows that the model draws itself.

    Args:
        model: See `rolled_out`.
        plan: See `rolled_out`.
        values: The data.
        prompt: See `rolled_out`.
        actions: See `rolled_out`.
        generator: See `rolled_out`.

    Returns:
        The error, and the same as metric.
    """
    drawn = rolled_out(model, plan, len(values), prompt, actions, generator)
    loss = squared_error(drawn, values).mean()
    return loss, {"token_loss": float(loss.detach())}
