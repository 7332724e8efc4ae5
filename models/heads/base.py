"""The contract every output head keeps, and what heads share.

A head turns trunk states into a loss while training and into drawn values while decoding. It knows
nothing about masks, caches, schedules or pictures.

Invariants: the output layer starts at zero; `loss` returns one number per token; `sample` takes
its randomness from one generator per item only, so an item's bits do not depend on the batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from ...core.errors import check_count
from ...core.guidance import guide
from ...core.sampling import TokenStats


@dataclass
class HeadSample:
    """What a head drew for each token.

    Attributes:
        values: `[batch, tokens, codebooks]` int64 codes or `[batch, tokens, channels]` latents.
        stats: Confidence numbers per token, or None where the head has no tractable density.
        log_prob: `[batch, tokens]` float32 log probability (codes) or log density (latents) of
            the draw under the unfiltered, unguided-scale distribution, or None when unknown.
    """

    values: Tensor
    stats: TokenStats | None = None
    log_prob: Tensor | None = None


class Head(nn.Module, ABC):
    """Base of all heads.

    Attributes:
        value: "code" when the head yields codebook ids, "latent" for continuous vectors.
        runs: "token" when one trunk state is enough to sample, "row" when the trunk must run
            again at every noise level (patch head).
    """

    value: ClassVar[str] = "latent"
    runs: ClassVar[str] = "token"

    @abstractmethod
    def loss(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        target: Shaped[Tensor, "batch tokens channels"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Return one loss per token.

        Args:
            hidden: Trunk states.
            target: True codes or latents of the same tokens.
            generator: Source of the noise the loss needs, or None for torch's global one.

        Returns:
            Loss per token, float32, not averaged.
        """


class TokenHead(Head):
    """A head with `runs == "token"`: it draws from one trunk state."""

    @abstractmethod
    def sample(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        generators: Sequence[torch.Generator],
        *,
        uncond_hidden: Float[Tensor, "batch tokens dim"] | None = None,
        guidance_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
    ) -> HeadSample:
        """Draw one value per token.

        Args:
            hidden: Trunk states under the prompt.
            generators: One CPU generator per item.
            uncond_hidden: Trunk states without the prompt, or None for no guidance.
            guidance_scale: Guidance scale, one or per token; 1.0 turns guidance off.
            temperature: Spread of the draw; subclasses add settings of their own.

        Returns:
            The drawn values.
        """


class RowHead(Protocol):
    """What a head with `runs == "row"` offers instead of `sample`."""

    def predict(self, hidden: Tensor) -> Tensor:
        """Predict velocity or noise from the trunk states of the noisy tokens."""
        ...


def guided(
    cond: Float[Tensor, "batch tokens *rest"],
    uncond: Float[Tensor, "batch tokens *rest"] | None,
    scale: float | Tensor,
) -> Float[Tensor, "batch tokens *rest"]:
    """Combine two predictions by classifier-free guidance, with one scale or one per token.

    Args:
        cond: Prediction under the prompt.
        uncond: Prediction without it, or None for no guidance.
        scale: Guidance scale; 1.0 returns `cond`. A tensor has shape [batch] or [batch, tokens].

    Returns:
        `uncond + scale * (cond - uncond)`.
    """
    if uncond is None:
        return cond
    if isinstance(scale, Tensor):
        per_token = scale.reshape(*scale.shape, *[1] * (cond.ndim - scale.ndim)).to(cond)
        return uncond + per_token * (cond - uncond)
    return cond if scale == 1.0 else guide(uncond, cond, float(scale))


def stack_branches(
    hidden: Float[Tensor, "batch tokens dim"],
    uncond_hidden: Float[Tensor, "batch tokens dim"] | None,
    scale: float | Tensor,
) -> Float[Tensor, "rows tokens dim"]:
    """Put both guidance branches on the batch axis, or only the first when guidance is off.

    Args:
        hidden: Trunk states under the prompt.
        uncond_hidden: Trunk states without it, or None.
        scale: Guidance scale; the number 1.0 turns guidance off.

    Returns:
        One or two times as many rows as `hidden`, prompted rows first.
    """
    if uncond_hidden is None or (not isinstance(scale, Tensor) and scale == 1.0):
        return hidden
    return torch.cat([hidden, uncond_hidden])


def zero_init(layer: nn.Linear) -> nn.Linear:
    """Set a linear layer to zero, so that the head starts from a neutral output.

    Args:
        layer: Layer to clear in place.

    Returns:
        The same layer.
    """
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def check_sizes(**sizes: int) -> None:
    """Require every size to be a whole number of at least 1.

    Args:
        **sizes: Name and value of each setting.

    Raises:
        UsageError: A size is not; the message names it.
    """
    for name, size in sizes.items():
        check_count(name, size)
