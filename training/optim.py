"""Optimisers of a run: which weights each one moves, the learning rate curve, and plain state.

AdamW moves everything, or Muon the hidden matrices and AdamW the rest. State goes to flat named
tensors and JSON numbers, so checkpoints need no pickle. It does not know the training loop.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

ADAMW_NAMES = ("embed", "position", "head", "output", "mask_token", "table", "buckets")


def learning_rate_at(
    step: int,
    *,
    peak: float,
    num_steps: int,
    warmup_steps: int = 0,
    curve: Literal["cosine", "constant"] = "cosine",
    final_ratio: float = 0.0,
) -> float:
    """Compute the learning rate of one step.

    Rises linearly to `peak` over the warm-up (step 0 already gets peak / warmup_steps), then stays
    or falls on half a cosine to `peak * final_ratio` at the last step.

    Args:
        step: Step about to be taken, from 0.
        peak: Largest rate.
        num_steps: Steps of the run.
        warmup_steps: Steps of the linear rise.
        curve: Shape after the rise.
        final_ratio: Rate of the last step over `peak`, in [0, 1]; cosine only.

    Example:
        >>> [learning_rate_at(i, peak=1.0, num_steps=6, warmup_steps=2) for i in (0, 1, 2, 5)]
        [0.5, 1.0, 1.0, 0.0]
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if curve == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, num_steps - 1 - warmup_steps))
    return peak * (final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Say whether Muon moves this weight: a matrix that is neither embedding nor output layer.

    Args:
        name: Dotted name of the parameter.
        parameter: The weight.
    """
    return parameter.ndim == 2 and not any(part in name for part in ADAMW_NAMES)


def build_optimizers(
    module: nn.Module,
    *,
    kind: Literal["adamw", "muon"],
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[Optimizer]:
    """Build the optimisers of a module's trainable weights.

    Args:
        module: Weights with `requires_grad` are moved.
        kind: "adamw" for all, or "muon" for hidden matrices with AdamW for the rest.
        learning_rate: First rate; the loop sets it anew each step.
        weight_decay: Decoupled decay of weights with two or more axes; others get none.
        betas: AdamW's moment decays.

    Source: Muon (kellerjordan.github.io/posts/muon); its update is scaled to AdamW's size, so one
    learning rate serves both.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    optimizers: list[Optimizer] = []
    if kind == "muon":
        hidden = [p for name, p in named if is_hidden_matrix(name, p)]
        named = [(name, p) for name, p in named if not is_hidden_matrix(name, p)]
        if hidden:
            optimizers.append(
                Muon(
                    hidden,
                    lr=learning_rate,
                    weight_decay=weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(AdamW(groups, lr=learning_rate, betas=betas, fused=True))
    return optimizers


def set_learning_rate(optimizers: Iterable[Optimizer], rate: float) -> None:
    """Give every parameter group the same learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def optimizer_state(
    optimizers: Iterable[Optimizer], module: nn.Module
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Flatten optimiser state to tensors and numbers keyed "<parameter name>|<state name>".

    Args:
        optimizers: Optimisers over `module`'s parameters, each parameter in one of them.
        module: Gives the names.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                target = tensors if isinstance(value, Tensor) else numbers
                target[f"{names[id(parameter)]}|{key}"] = value
    return tensors, numbers


def load_optimizer_state(
    optimizers: Iterable[Optimizer],
    module: nn.Module,
    tensors: dict[str, Tensor],
    numbers: dict[str, Any],
) -> None:
    """Restore what `optimizer_state` gave.

    Args:
        optimizers: Freshly built optimisers over `module`'s parameters.
        module: Gives the names.
        tensors: Flat tensors.
        numbers: Flat numbers.

    Raises:
        ValueError: State names a parameter that no optimiser moves.
    """
    parameters = dict(module.named_parameters())
    owner = {id(p): opt for opt in optimizers for g in opt.param_groups for p in g["params"]}
    for flat, value in [*tensors.items(), *numbers.items()]:
        name, key = flat.rsplit("|", 1)
        parameter = parameters.get(name)
        if parameter is None or id(parameter) not in owner:
            raise ValueError(f"optimizer state names {name!r}, which this run does not train")
        if isinstance(value, Tensor):
            value = _like(parameter, value)
        owner[id(parameter)].state[parameter][key] = value


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    # Same strides as the run that was never stopped: other strides take other vector kernels,
    # which may round differently.
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device).clone()
