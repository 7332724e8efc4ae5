"""Per-token diffusion head: a small network denoises each latent given its trunk state.

Knows single tokens only; does not know the order in which tokens are generated. Invariants: the
trunk runs once per token and the head many times; guidance combines two trunk states inside the
head. Source: MAR (arXiv:2406.11838) and LatentLM (arXiv:2412.08635).
"""

from collections.abc import Sequence

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from ...core.sampling import per_item_randn
from .adaln import AdaLNMLP
from .base import HeadSample, TokenHead, check_sizes, guided, stack_branches
from .solvers import (
    NUM_TRAIN_STEPS,
    alpha_bar_table,
    check_solver,
    solve_ddpm,
    solve_dpm,
    solve_euler,
    tame_noise,
)


def draw_normal(
    shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Float[Tensor, "..."]:
    """Draw training noise on the generator's device and move it next to the data.

    Args:
        shape: Shape wanted.
        like: Tensor whose device is used.
        generator: Source, or None for torch's global one.

    Returns:
        Standard normal float32 numbers.
    """
    device = like.device if generator is None else generator.device
    return torch.randn(tuple(shape), generator=generator, device=device).to(like.device)


def draw_uniform(
    shape: Sequence[int], like: Tensor, generator: torch.Generator | None
) -> Float[Tensor, "..."]:
    """Draw training levels on the generator's device and move them next to the data.

    Args:
        shape: Shape wanted.
        like: Tensor whose device is used.
        generator: Source, or None for torch's global one.

    Returns:
        Uniform float32 numbers in [0, 1).
    """
    device = like.device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=device).to(like.device)


class DiffusionHead(TokenHead):
    """Denoise one latent vector per token.

    Args:
        dim: Width of the trunk states.
        channels: Latent channels per token.
        width: Hidden features of the network.
        depth: Residual layers of the network.
        objective: "velocity" (straight path) or "eps" (cosine variance-preserving path).
        draws: Independent noise levels per token and training step.
        steps: Default solver steps.
        solver: Default solver: "euler" or "dpm" for velocity, "ddpm" or "dpm" for eps; None picks
            the first of these.

    Raises:
        UsageError: A size is not positive, or objective, solver or steps are not legal.
    """

    def __init__(
        self,
        dim: int,
        channels: int,
        width: int = 256,
        depth: int = 3,
        objective: str = "velocity",
        *,
        draws: int = 4,
        steps: int = 20,
        solver: str | None = None,
    ) -> None:
        super().__init__()
        check_sizes(draws=draws)
        solver = solver or {"velocity": "euler", "eps": "ddpm"}.get(objective, "euler")
        check_solver(objective, solver, steps)
        self.channels = channels
        self.objective = objective
        self.draws = draws
        self.steps = steps
        self.solver = solver
        self.net = AdaLNMLP(dim, channels, width, depth)

    def loss(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        target: Float[Tensor, "batch tokens channels"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Return the denoising error per token, averaged over channels and noise draws.

        Args:
            hidden: Trunk states.
            target: Clean standardised latents.
            generator: Source of levels and noise.

        Returns:
            Mean squared error of the velocity or of the noise, float32.
        """
        clean = repeat(target.float(), "b m c -> r b m c", r=self.draws)
        condition = repeat(self.net.condition(hidden), "b m w -> r b m w", r=self.draws)
        level = draw_uniform(clean.shape[:-1], clean, generator)
        noise = draw_normal(clean.shape, clean, generator)
        noisy, level, wanted = self.corrupt(clean, noise, level)
        error = self.net(noisy.to(hidden.dtype), condition, level).float() - wanted
        return error.square().mean(dim=-1).mean(dim=0)

    def corrupt(
        self,
        clean: Float[Tensor, "*rows channels"],
        noise: Float[Tensor, "*rows channels"],
        level: Float[Tensor, "*rows"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Mix noise into clean latents along the objective's path.

        Args:
            clean: Clean latents.
            noise: Standard normal noise.
            level: Wanted level per row, in [0, 1).

        Returns:
            Noisy latents, the level the network is told (for eps snapped to the 1000-step table)
            and the regression target.
        """
        if self.objective == "velocity":
            share = level[..., None]
            return (1 - share) * clean + share * noise, level, noise - clean
        step = (level * NUM_TRAIN_STEPS).long().clamp_max(NUM_TRAIN_STEPS - 1)
        power = alpha_bar_table().to(clean.device)[step][..., None]
        noisy = (power.sqrt() * clean + (1 - power).sqrt() * noise).to(clean.dtype)
        return noisy, step.to(clean.dtype) / (NUM_TRAIN_STEPS - 1), noise

    def sample(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        generators: Sequence[torch.Generator],
        *,
        uncond_hidden: Float[Tensor, "batch tokens dim"] | None = None,
        guidance_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
        steps: int | None = None,
        solver: str | None = None,
    ) -> HeadSample:
        """Draw one latent per token.

        Args:
            hidden: Trunk states under the prompt.
            generators: One CPU generator per item.
            uncond_hidden: Trunk states without the prompt, or None for no guidance.
            guidance_scale: Guidance of the prediction, one number or [batch, tokens].
            temperature: Multiplies the noise of every reverse step (ddpm) or the starting noise
                (euler and dpm, which add no other noise).
            steps: Solver steps, or None for the head's own.
            solver: Solver, or None for the head's own.

        Returns:
            Latents; no statistics, because the head has no tractable density.

        Raises:
            UsageError: Solver or steps are not legal.
        """
        steps = self.steps if steps is None else steps
        solver = solver or self.solver
        check_solver(self.objective, solver, steps)
        noise = per_item_randn((hidden.shape[1], self.channels), generators, hidden.device)
        condition = self.net.condition(stack_branches(hidden, uncond_hidden, guidance_scale))

        def predict(sample: Tensor, level: float) -> Tensor:
            return self._predict(sample, level, condition, guidance_scale)

        if solver == "ddpm":
            return HeadSample(solve_ddpm(predict, noise, steps, generators, temperature))
        start = temperature * noise
        if solver == "dpm":
            return HeadSample(solve_dpm(predict, start, steps, self.objective))
        return HeadSample(solve_euler(predict, start, steps))

    def _predict(
        self, sample: Tensor, level: float, condition: Tensor, guidance_scale: float | Tensor
    ) -> Tensor:
        """Run the network on one or both guidance branches at one level."""
        branches = condition.shape[0] // sample.shape[0]
        rows = torch.cat([sample] * branches).to(condition.dtype)
        levels = torch.full(rows.shape[:-1], level, device=rows.device)
        parts = self.net(rows, condition, levels).float().chunk(branches)
        prediction = guided(parts[0], parts[1] if branches > 1 else None, guidance_scale)
        if self.objective == "eps":
            return tame_noise(prediction, sample, level)
        return prediction
