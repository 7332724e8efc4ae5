"""Shortcut head: a per-token flow that knows its own step size and needs few steps.

Knows single tokens only. The network predicts the average velocity over the next step of size d,
trained by flow matching at the smallest size and by self-consistency (two half steps make one
whole step) at larger ones. Invariant: with k steps it runs k Euler updates of size 1/k.

Source: shortcut models (arXiv:2410.12557), used per token by FAR (arXiv:2504.18391); differs:
level 1 is noise here, and the path has no 1e-5 of remaining noise.
"""

import math
from collections.abc import Sequence

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from ...core.errors import check_one_of, check_range
from ...core.sampling import per_item_randn
from .adaln import AdaLNMLP
from .base import HeadSample, TokenHead, check_sizes, guided, stack_branches
from .diffusion import draw_normal, draw_uniform

MAX_HALVINGS = 7
TARGET_LIMIT = 4.0


class ShortcutHead(TokenHead):
    """Flow with step sizes 1, 1/2, ..., 1/128.

    Args:
        dim: Width of the trunk states.
        channels: Latent channels per token.
        width: Hidden features of the network.
        depth: Residual layers of the network.
        draws: Independent noise levels per token and training step.
        steps: Default sampling steps, a power of two up to 128.
        bootstrap: Share of the rows trained by self-consistency, in [0, 0.99].

    Raises:
        UsageError: A size is not positive, steps is no power of two, or bootstrap is not legal.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        width: int = 256,
        depth: int = 3,
        *,
        draws: int = 4,
        steps: int = 4,
        bootstrap: float = 0.25,
    ) -> None:
        super().__init__()
        check_sizes(draws=draws)
        check_range("bootstrap", bootstrap, 0.0, 0.99)
        self.channels = channels
        self.draws = draws
        self.steps = _check_steps(steps)
        self.bootstrap = bootstrap
        self.net = AdaLNMLP(dim, channels, width, depth, num_scalars=2)

    def predict(
        self,
        noisy: Float[Tensor, "*rows channels"],
        condition: Float[Tensor, "*rows width"],
        level: Float[Tensor, "*rows"],
        halvings: Float[Tensor, "*rows"],
    ) -> Float[Tensor, "*rows channels"]:
        """Predict the average velocity over the next step.

        Args:
            noisy: Noisy latents.
            condition: Output of the network's `condition`.
            level: Noise level per row, in (0, 1].
            halvings: log2 of one over the step size, in 0..7.

        Returns:
            Average of `eps - x0` over the step, float32.
        """
        size = halvings / MAX_HALVINGS
        return self.net(noisy.to(condition.dtype), condition, level, size).float()

    def loss(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        target: Float[Tensor, "batch tokens channels"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Return the error per token: flow matching, or self-consistency on a random share.

        Args:
            hidden: Trunk states.
            target: Clean standardised latents.
            generator: Source of levels, step sizes and noise.

        Returns:
            Mean squared error over channels and draws, float32.
        """
        batch, tokens = target.shape[:2]
        clean = repeat(target.float(), "b m c -> (r b m) c", r=self.draws)
        condition = repeat(self.net.condition(hidden), "b m w -> (r b m) w", r=self.draws)
        noise = draw_normal(clean.shape, clean, generator)
        draw = draw_uniform((3, len(clean)), clean, generator)
        is_boot = _smallest(draw[0], int(self.bootstrap * len(clean)))
        # A self-consistent step of size d starts on a multiple of d; flow rows on one of 1/128.
        halvings = torch.where(is_boot, (draw[1] * MAX_HALVINGS).floor(), MAX_HALVINGS)
        grid = torch.exp2(halvings)
        level = ((draw[2] * grid).floor() + 1) / grid
        noisy = (1 - level[:, None]) * clean + level[:, None] * noise
        wanted = noise - clean
        boot = is_boot.nonzero()[:, 0]
        if len(boot):
            rows = (noisy[boot], condition[boot], level[boot], halvings[boot])
            wanted = wanted.index_copy(0, boot, self.consistent_target(*rows))
        error = self.predict(noisy, condition, level, halvings) - wanted
        per_row = error.square().mean(dim=-1)
        return rearrange(per_row, "(r b m) -> r b m", b=batch, m=tokens).mean(dim=0)

    @torch.no_grad()
    def consistent_target(
        self,
        noisy: Float[Tensor, "rows channels"],
        condition: Float[Tensor, "rows width"],
        level: Float[Tensor, " rows"],
        halvings: Float[Tensor, " rows"],
    ) -> Float[Tensor, "rows channels"]:
        """Average the velocities of two half steps, the target of one whole step.

        Args:
            noisy: Noisy latents.
            condition: Condition of the same rows.
            level: Noise level, at least the step size.
            halvings: log2 of one over the whole step size.

        Returns:
            Target without gradient, bounded to [-4, 4].
        """
        half = torch.exp2(-halvings - 1)
        first = self.predict(noisy, condition, level, halvings + 1)
        middle = noisy - half[:, None] * first
        second = self.predict(middle, condition, level - half, halvings + 1)
        return ((first + second) / 2).clamp(-TARGET_LIMIT, TARGET_LIMIT)

    def sample(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        generators: Sequence[torch.Generator],
        *,
        uncond_hidden: Float[Tensor, "batch tokens dim"] | None = None,
        guidance_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
        steps: int | None = None,
    ) -> HeadSample:
        """Draw one latent per token in a few Euler steps.

        Args:
            hidden: Trunk states under the prompt.
            generators: One CPU generator per item.
            uncond_hidden: Trunk states without the prompt, or None for no guidance.
            guidance_scale: Guidance of the velocity, one number or [batch, tokens].
            temperature: Multiplies the starting noise.
            steps: Power of two up to 128, or None for the head's own.

        Returns:
            Latents; no statistics, because the head has no tractable density.

        Raises:
            UsageError: `steps` is no power of two in [1, 128].
        """
        steps = _check_steps(self.steps if steps is None else steps)
        shape = (hidden.shape[1], self.channels)
        sample = temperature * per_item_randn(shape, generators, hidden.device)
        condition = self.net.condition(stack_branches(hidden, uncond_hidden, guidance_scale))
        branches = condition.shape[0] // hidden.shape[0]
        halvings = torch.full(condition.shape[:-1], math.log2(steps), device=hidden.device)
        for index in range(steps):
            level = torch.full_like(halvings, 1.0 - index / steps)
            both = self.predict(torch.cat([sample] * branches), condition, level, halvings)
            parts = both.chunk(branches)
            velocity = guided(parts[0], parts[1] if branches > 1 else None, guidance_scale)
            sample = sample - velocity / steps
        return HeadSample(sample)


def _check_steps(steps: int) -> int:
    """Return `steps` if it is a power of two in [1, 128], else say which one is nearest."""
    check_one_of("steps", steps, [2**power for power in range(MAX_HALVINGS + 1)])
    return steps


def _smallest(values: Tensor, count: int) -> Tensor:
    """Mark the `count` smallest values, an exact-size random subset for uniform values."""
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.argsort()[:count]] = True
    return chosen
