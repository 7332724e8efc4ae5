"""Samplers of the per-token diffusion head: Euler, DPM-Solver and DDPM.

They call a prediction function and know neither networks nor guidance. Levels run from 1 (noise)
to 0 (clean). Invariant: randomness comes from one generator per item and is drawn per item.

Paths: "velocity" uses the straight path `(1 - s) x0 + s eps`; "eps" uses the variance-preserving
path `sqrt(a) x0 + sqrt(1 - a) eps` with the cosine table of 1000 steps and level `t / 999`.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from diffusers.schedulers import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_ddpm import betas_for_alpha_bar
from jaxtyping import Float
from torch import Tensor

from ...core.errors import check_count, check_one_of
from ...core.sampling import per_item_randn

Predict = Callable[[Tensor, float], Tensor]
NUM_TRAIN_STEPS = 1000
SOLVERS = {"velocity": ("euler", "dpm"), "eps": ("ddpm", "dpm")}
CLEAN_LIMIT = 8.0
FAINT_SIGNAL = 1e-2


@lru_cache(maxsize=1)
def alpha_bar_table() -> Float[Tensor, " steps"]:
    """Return the share of signal power left after each of the 1000 noising steps.

    Returns:
        Float64 values, strictly falling from about 1 to about 0.

    Source: cosine schedule of Nichol and Dhariwal (arXiv:2102.09672), eq. 17.
    """
    betas = betas_for_alpha_bar(NUM_TRAIN_STEPS, alpha_transform_type="cosine").double()
    return torch.cumprod(1.0 - betas, dim=0)


def tame_noise(
    noise: Float[Tensor, "*rows"], sample: Float[Tensor, "*rows"], level: float
) -> Float[Tensor, "*rows"]:
    """Bound the clean estimate that a noise prediction implies where almost no signal is left.

    At the first steps the clean estimate divides by a number near 5e-5, so a small error of the
    network would throw the sample far off. Standardised latents never reach the bound of 8.

    Args:
        noise: Predicted noise.
        sample: Sample the prediction was made for.
        level: Its noise level, `t / 999`.

    Returns:
        The prediction, unchanged where at least 1 % of the signal power is left.
    """
    share = float(alpha_bar_table()[round(level * (NUM_TRAIN_STEPS - 1))])
    if share >= FAINT_SIGNAL:
        return noise
    clean = (sample - (1 - share) ** 0.5 * noise) / share**0.5
    return (sample - share**0.5 * clean.clamp(-CLEAN_LIMIT, CLEAN_LIMIT)) / (1 - share) ** 0.5


def check_solver(objective: str, solver: str, num_steps: int) -> None:
    """Check that the solver exists for the objective and the step count is legal.

    Args:
        objective: "velocity" or "eps".
        solver: "euler", "dpm" or "ddpm".
        num_steps: Solver steps, in [1, 1000].

    Raises:
        UsageError: One of them is not legal.
    """
    check_one_of("objective", objective, tuple(SOLVERS))
    check_one_of(f"solver of the {objective} objective", solver, SOLVERS[objective])
    check_count("steps", num_steps, 1, NUM_TRAIN_STEPS)


def solve_euler(
    predict: Predict, sample: Float[Tensor, "*rows"], num_steps: int
) -> Float[Tensor, "*rows"]:
    """Follow the velocity along the straight path in equal steps.

    Args:
        predict: Velocity of a sample at a level.
        sample: Standard normal noise.
        num_steps: Steps.

    Returns:
        Clean sample.
    """
    for index in range(num_steps):
        sample = sample - predict(sample, 1.0 - index / num_steps) / num_steps
    return sample


def solve_dpm(
    predict: Predict, sample: Float[Tensor, "*rows"], num_steps: int, objective: str
) -> Float[Tensor, "*rows"]:
    """Run second-order multistep DPM-Solver++ from diffusers, with a solver of its own per call.

    Args:
        predict: Velocity or noise of a sample at a level, as `objective` says.
        sample: Standard normal noise.
        num_steps: Steps.
        objective: "velocity" or "eps"; chooses the path.

    Returns:
        Clean sample.
    """
    is_flow = objective == "velocity"
    solver = DPMSolverMultistepScheduler(
        num_train_timesteps=NUM_TRAIN_STEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="flow_prediction" if is_flow else "epsilon",
        use_flow_sigmas=is_flow,
        final_sigmas_type="zero",
        timestep_spacing="trailing",
    )
    solver.set_timesteps(num_steps)
    for index, timestep in enumerate(solver.timesteps):
        level = float(solver.sigmas[index]) if is_flow else int(timestep) / (NUM_TRAIN_STEPS - 1)
        sample = solver.step(predict(sample, level), timestep, sample, return_dict=False)[0]
    return sample


def solve_ddpm(
    predict: Predict,
    sample: Float[Tensor, "*rows"],
    num_steps: int,
    generators: Sequence[torch.Generator],
    temperature: float = 1.0,
) -> Float[Tensor, "*rows"]:
    """Run the ancestral sampler with the small posterior variance on evenly spaced steps.

    Args:
        predict: Noise of a sample at a level.
        sample: Standard normal noise.
        num_steps: Steps, in [1, 1000].
        generators: One CPU generator per item.
        temperature: Multiplies the noise added at every reverse step; 0 follows the mean.

    Returns:
        Clean sample.

    Source: DDPM (arXiv:2006.11239), eq. 6-7, respaced as in arXiv:2102.09672; differs from MAR:
    the variance is the fixed posterior one, not learned.
    """
    table = alpha_bar_table()
    steps = torch.linspace(NUM_TRAIN_STEPS - 1, 0, num_steps, dtype=torch.float64)
    timesteps = [int(step) for step in steps.round()]
    for index, timestep in enumerate(timesteps):
        now = float(table[timestep])
        later = float(table[timesteps[index + 1]]) if index + 1 < num_steps else 1.0
        noise = predict(sample, timestep / (NUM_TRAIN_STEPS - 1))
        clean = (sample - (1 - now) ** 0.5 * noise) / now**0.5
        ratio = now / later
        clean_share = later**0.5 * (1 - ratio) / (1 - now)
        sample_share = ratio**0.5 * (1 - later) / (1 - now)
        spread = ((1 - ratio) * (1 - later) / (1 - now)) ** 0.5
        sample = clean_share * clean + sample_share * sample
        if index + 1 < num_steps and temperature > 0:
            fresh = per_item_randn(sample.shape[1:], generators, sample.device, sample.dtype)
            sample = sample + temperature * spread * fresh
    return sample
