"""Regression head: one answer per token, trained on its squared error.

For systems that answer instead of drawing: the same trunk state always gives the same latent. Knows
single tokens only. Invariant: the answer is zero at initialisation. Source: the vertex regression
of FaceFormer (arXiv:2112.05329), the action regression of humanoid locomotion (arXiv:2402.19469).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from ...core.numerics import RowStableLinear
from .base import HeadSample, TokenHead, check_sizes, guided, zero_init


class RegressionHead(TokenHead):
    """Map trunk states to latents by one linear map.

    Args:
        dim: Width of the trunk states.
        channels: Latent channels per token.

    Raises:
        UsageError: A size is not positive.
    """

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        check_sizes(dim=dim, channels=channels)
        self.channels = channels
        self.out = zero_init(RowStableLinear(dim, channels))

    def predict(
        self, hidden: Float[Tensor, "batch tokens dim"]
    ) -> Float[Tensor, "batch tokens channels"]:
        """Answer with one latent per token, in the units of the standardised latents.

        Args:
            hidden: Trunk states.
        """
        return self.out(hidden)

    def loss(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        target: Float[Tensor, "batch tokens channels"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Return the squared error per token, averaged over channels.

        Args:
            hidden: Trunk states.
            target: True latents.
            generator: Unused; the loss draws nothing.

        Returns:
            Mean squared error, float32.
        """
        return squared_error(self.predict(hidden), target)

    def sample(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        generators: Sequence[torch.Generator],
        *,
        uncond_hidden: Float[Tensor, "batch tokens dim"] | None = None,
        guidance_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
    ) -> HeadSample:
        """Answer with one latent per token; differentiable.

        Args:
            hidden: Trunk states under the prompt.
            generators: Unused; nothing is drawn.
            uncond_hidden: Trunk states without the prompt, or None for no guidance.
            guidance_scale: Guidance of the answer, one number or [batch, tokens].
            temperature: Unused; an answer has no spread.

        Returns:
            Latents; no statistics, because the head has no density.
        """
        uncond = None if uncond_hidden is None else self.predict(uncond_hidden)
        return HeadSample(guided(self.predict(hidden), uncond, guidance_scale))


def squared_error(
    answer: Float[Tensor, "batch tokens channels"], target: Float[Tensor, "batch tokens channels"]
) -> Float[Tensor, "batch tokens"]:
    """Average the squared error of every token over its channels, float32.

    Args:
        answer: Predicted latents.
        target: True latents.
    """
    return (answer.float() - target.float()).square().mean(dim=-1)
