"""Continuous heads against closed forms: Gaussian optima, torch distributions, tiny fits."""

import math

import pytest
import torch
from torch import distributions as dist

from blockloom.models.heads import (
    DiffusionHead,
    GaussianMixtureHead,
    ShortcutHead,
    build_head,
)
from blockloom.models.heads.gmm import guide_gaussian, squareplus
from blockloom.models.heads.solvers import alpha_bar_table, solve_ddpm, solve_dpm, solve_euler

# diffusers 0.42 converts tensors in a way that numpy 2 warns about.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DIM = 16
MEAN, DEVIATION = 0.7, 0.4
# 4000 draws: the mean is known to 0.4 / sqrt(4000) = 0.006 and the solver bias adds a little.
MOMENT_TOLERANCE = 0.03


def _generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + row) for row in range(count)]


def _randomise(head: torch.nn.Module, scale: float = 0.3) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return head.eval()


def _hidden(batch: int, tokens: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(batch, tokens, DIM, generator=torch.Generator().manual_seed(seed))


def _optimal_velocity(sample: torch.Tensor, level: float) -> torch.Tensor:
    power = (1 - level) ** 2 * DEVIATION**2 + level**2
    offset = (sample - (1 - level) * MEAN) / power
    return level * offset - (MEAN + (1 - level) * DEVIATION**2 * offset)


def _optimal_noise(sample: torch.Tensor, level: float) -> torch.Tensor:
    power = float(alpha_bar_table()[round(level * 999)])
    spread = power * DEVIATION**2 + 1 - power
    return (1 - power) ** 0.5 * (sample - power**0.5 * MEAN) / spread


@pytest.mark.parametrize("solver", ["euler", "dpm-velocity", "dpm-eps", "ddpm"])
def test_optimal_predictor_recovers_a_gaussian(solver):
    noise = torch.randn(4, 1000, 1, generator=torch.Generator().manual_seed(0))
    got = {
        "euler": lambda: solve_euler(_optimal_velocity, noise, 100),
        "dpm-velocity": lambda: solve_dpm(_optimal_velocity, noise, 20, "velocity"),
        "dpm-eps": lambda: solve_dpm(_optimal_noise, noise, 20, "eps"),
        "ddpm": lambda: solve_ddpm(_optimal_noise, noise, 100, _generators(4, 50)),
    }[solver]()
    assert abs(float(got.mean()) - MEAN) < MOMENT_TOLERANCE
    assert abs(float(got.std()) - DEVIATION) < MOMENT_TOLERANCE


def test_ddpm_temperature_narrows_the_draws():
    noise = torch.randn(4, 1000, 1, generator=torch.Generator().manual_seed(0))
    cold = solve_ddpm(_optimal_noise, noise, 100, _generators(4, 50), temperature=0.8)
    warm = solve_ddpm(_optimal_noise, noise, 100, _generators(4, 50), temperature=1.0)
    assert float(cold.std()) < 0.95 * float(warm.std())
    assert abs(float(cold.mean()) - MEAN) < MOMENT_TOLERANCE


@pytest.mark.parametrize("objective", ["velocity", "eps"])
def test_diffusion_starts_at_the_energy_of_its_target(objective):
    head = DiffusionHead(DIM, 3, width=8, depth=1, objective=objective, draws=64)
    target = torch.full((2, 50, 3), 2.0)
    loss = head.loss(_hidden(2, 50), target, torch.Generator().manual_seed(0))
    assert loss.shape == (2, 50)
    # The untrained prediction is zero: E[(eps - 2)^2] = 5 and E[eps^2] = 1.
    want = 5.0 if objective == "velocity" else 1.0
    assert abs(float(loss.detach().mean()) - want) < 0.1


@pytest.mark.parametrize("objective", ["velocity", "eps"])
def test_corrupt_mixes_along_the_path(objective):
    head = DiffusionHead(DIM, 1, width=8, depth=1, objective=objective)
    clean, noise = torch.full((1, 1), 3.0), torch.full((1, 1), -1.0)
    noisy, level, wanted = head.corrupt(clean, noise, torch.tensor([0.25]))
    if objective == "velocity":
        assert (noisy.item(), level.item(), wanted.item()) == (2.0, 0.25, -4.0)
        return
    power = float(alpha_bar_table()[250])
    assert math.isclose(level.item(), 250 / 999, rel_tol=1e-6) and wanted.item() == -1.0
    assert math.isclose(noisy.item(), 3 * power**0.5 - (1 - power) ** 0.5, rel_tol=1e-6)
    # Closed form of the cosine table, arXiv:2102.09672 eq. 17.
    angle = [math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (251, 0)]
    assert math.isclose(power, angle[0] / angle[1], rel_tol=1e-4)


HEADS = {
    "euler": lambda: (DiffusionHead(DIM, 3, width=16, depth=2, steps=4), {}),
    "dpm": lambda: (DiffusionHead(DIM, 3, width=16, depth=2, steps=4, solver="dpm"), {}),
    "ddpm": lambda: (DiffusionHead(DIM, 3, width=16, depth=2, objective="eps", steps=5), {}),
    "shortcut": lambda: (ShortcutHead(DIM, 3, width=16, depth=2), {}),
    "gmm": lambda: (GaussianMixtureHead(DIM, 3, num_mixtures=4), {}),
}


@pytest.mark.parametrize("name", HEADS)
def test_bits_do_not_depend_on_the_batch_or_on_guided_neighbours(name):
    head, settings = HEADS[name]()
    _randomise(head, 0.2)
    hidden, uncond = _hidden(5, 3), _hidden(5, 3, 8)
    scale = torch.linspace(0.5, 3.0, 15).reshape(5, 3)
    with torch.no_grad():
        together = head.sample(
            hidden, _generators(5), uncond_hidden=uncond, guidance_scale=scale, **settings
        ).values
        assert together.isfinite().all()
        for row in range(5):
            pick = slice(row, row + 1)
            alone = head.sample(
                hidden[pick],
                _generators(5)[pick],
                uncond_hidden=uncond[pick],
                guidance_scale=scale[pick],
                **settings,
            ).values
            assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("name", HEADS)
def test_guidance_one_is_no_guidance_and_seeds_repeat(name):
    head, _ = HEADS[name]()
    _randomise(head, 0.2)
    hidden = _hidden(2, 3)
    with torch.no_grad():
        plain = head.sample(hidden, _generators(2)).values
        again = head.sample(hidden, _generators(2)).values
        one = head.sample(hidden, _generators(2), uncond_hidden=_hidden(2, 3, 8)).values
        other = head.sample(hidden, _generators(2, 90)).values
    assert torch.equal(plain, again) and not torch.equal(plain, other)
    torch.testing.assert_close(one, plain, atol=1e-5, rtol=1e-5)


def test_euler_head_is_the_euler_loop_with_guided_velocity():
    head = _randomise(DiffusionHead(DIM, 3, width=16, depth=2, steps=3), 0.2)
    cond, uncond = _hidden(1, 2), _hidden(1, 2, 8)
    noise = torch.randn(2, 3, generator=_generators(1)[0])[None]
    with torch.no_grad():
        x = noise
        for level in (1.0, 2 / 3, 1 / 3):
            levels = torch.full((1, 2), level)
            c, u = (head.net(x, head.net.condition(h), levels) for h in (cond, uncond))
            x = x - (u + 2.5 * (c - u)) / 3
        got = head.sample(cond, _generators(1), uncond_hidden=uncond, guidance_scale=2.5).values
    torch.testing.assert_close(got, x)


def test_shortcut_single_step_is_one_euler_step():
    head, hidden = _randomise(ShortcutHead(DIM, 3, width=16, depth=2), 0.2), _hidden(1, 2)
    noise = torch.randn(2, 3, generator=_generators(1)[0])[None]
    with torch.no_grad():
        whole = head.predict(noise, head.net.condition(hidden), torch.ones(1, 2), torch.zeros(1, 2))
        got = head.sample(hidden, _generators(1), steps=1).values
    torch.testing.assert_close(got, noise - whole)


def test_shortcut_target_is_the_mean_of_two_half_steps():
    head = _randomise(ShortcutHead(DIM, 2, width=16, depth=1), 0.2)
    condition = head.net.condition(_hidden(1, 3)[0]).detach()
    noisy = torch.randn(3, 2, generator=torch.Generator().manual_seed(4))
    level, halvings = torch.tensor([1.0, 0.5, 0.75]), torch.tensor([0.0, 1.0, 2.0])
    with torch.no_grad():
        first = head.predict(noisy, condition, level, halvings + 1)
        half = 2 ** -(halvings + 1)
        second = head.predict(noisy - half[:, None] * first, condition, level - half, halvings + 1)
    want = ((first + second) / 2).clamp(-4, 4)
    torch.testing.assert_close(head.consistent_target(noisy, condition, level, halvings), want)


def test_shortcut_flow_rows_start_at_the_energy_of_the_velocity():
    head = ShortcutHead(DIM, 3, width=8, depth=1, draws=64, bootstrap=0.0)
    loss = head.loss(_hidden(2, 50), torch.full((2, 50, 3), 2.0), torch.Generator().manual_seed(0))
    assert abs(float(loss.detach().mean()) - 5.0) < 0.1
    # A zero network agrees with itself, so bootstrapped rows cost nothing.
    half = ShortcutHead(DIM, 3, width=8, depth=1, draws=64, bootstrap=0.5)
    loss = half.loss(_hidden(2, 50), torch.full((2, 50, 3), 2.0), torch.Generator().manual_seed(0))
    assert abs(float(loss.detach().mean()) - 2.5) < 0.1


def test_gmm_loss_is_torch_distributions_nll():
    head, hidden = _randomise(GaussianMixtureHead(DIM, 3, num_mixtures=5)), _hidden(2, 4)
    target = _hidden(2, 4, 11)[..., :3]
    mixture = head.mixture(hidden)
    reference = dist.MixtureSameFamily(
        dist.Categorical(logits=mixture.log_weight),
        dist.Independent(dist.Normal(mixture.mean, mixture.deviation), 1),
    )
    torch.testing.assert_close(head.loss(hidden, target), -reference.log_prob(target))


def test_gmm_starts_independent_of_the_trunk_with_distinct_means():
    head = GaussianMixtureHead(DIM, 3, num_mixtures=4)
    one, two = head.mixture(_hidden(1, 1)), head.mixture(_hidden(1, 1, 5))
    assert torch.equal(one.mean, two.mean) and (one.deviation == 1).all()
    assert torch.equal(one.log_weight, torch.full((1, 1, 4), 0.25).log())
    assert len(one.mean[0, 0, :, 0].unique()) == 4


def test_squareplus():
    z = torch.tensor([-1.5, 0.0, 1.5])
    torch.testing.assert_close(squareplus(z), torch.tensor([0.5, 1.0, 2.0]))


def test_gmm_samples_follow_the_mixture_and_temperature_scales_them():
    head = GaussianMixtureHead(DIM, 1, num_mixtures=2)
    with torch.no_grad():
        weight, means, spread = [math.log(0.25), math.log(0.75)], [-2.0, 2.0], [-1.5, -1.5]
        head.out.bias.copy_(torch.tensor(weight + means + spread))  # deviation 0.5
        got = head.sample(_hidden(2, 4000), _generators(2))
        cold = head.sample(_hidden(2, 4000), _generators(2), temperature=0.0).values
    assert abs(float((got.values > 0).float().mean()) - 0.75) < 0.02
    assert abs(float(got.values[got.values > 0].std()) - 0.5) < 0.02
    assert cold.unique().tolist() == [-2.0, 2.0]
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.25, 0.75])),
        dist.Normal(torch.tensor([-2.0, 2.0]), torch.tensor([0.5, 0.5])),
    )
    torch.testing.assert_close(got.log_prob, mixture.log_prob(got.values[..., 0]))


def test_guided_gaussian_is_the_normalised_power_product():
    mean, deviation = guide_gaussian(*torch.tensor([[1.0], [0.5], [0.0], [1.0]]), torch.tensor(1.4))
    grid = torch.linspace(-8, 8, 160_001, dtype=torch.float64)
    log_density = 1.4 * dist.Normal(1.0, 0.5).log_prob(grid) - 0.4 * dist.Normal(0.0, 1.0).log_prob(
        grid
    )
    density = log_density.softmax(0)
    want = (density * grid).sum()
    spread = (density * (grid - want) ** 2).sum().sqrt()
    assert math.isclose(mean.item(), want.item(), rel_tol=1e-5)
    assert math.isclose(deviation.item(), spread.item(), rel_tol=1e-5)


def test_guided_gaussian_falls_back_where_no_density_exists():
    # Precision 3 / 1 - 2 / 0.25 is negative.
    mean, deviation = guide_gaussian(*torch.tensor([[1.0], [1.0], [0.0], [0.5]]), torch.tensor(3.0))
    assert (mean.item(), deviation.item()) == (1.0, 1.0)


@pytest.mark.parametrize("kind", ["diffusion", "shortcut", "gmm"])
def test_a_tiny_head_fits_two_points(kind):
    torch.manual_seed(0)
    config = {"kind": kind} | ({} if kind == "gmm" else {"width": 32, "depth": 2, "steps": 8})
    head = build_head(config, DIM, latent_channels=2)
    points = torch.tensor([[1.5, -1.0], [-1.0, 1.0]])
    hidden, generator = _hidden(1, 1).expand(8, 16, DIM), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(250):
        choice = torch.randint(0, 2, (8, 16), generator=generator)
        loss = head.loss(hidden, points[choice], generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        values = head.eval().sample(hidden, _generators(8)).values
    distance = torch.cdist(values.reshape(-1, 2), points)
    near, which = distance.min(-1)
    assert near.median() < 0.35
    assert 0.25 < which.float().mean() < 0.75


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match=r"solver of the velocity.*got 'ddpm'.*euler, dpm"):
        DiffusionHead(DIM, 3, solver="ddpm")
    with pytest.raises(ValueError, match=r"objective is not legal; got 'x0'"):
        DiffusionHead(DIM, 3, objective="x0")
    with pytest.raises(ValueError, match=r"steps is not legal; got 0.*\[1, 1000\].*try 1"):
        DiffusionHead(DIM, 3).sample(_hidden(1, 1), _generators(1), steps=0)
    with pytest.raises(ValueError, match=r"steps is not legal; got 5.*try 4"):
        ShortcutHead(DIM, 3, steps=5)
    with pytest.raises(ValueError, match=r"bootstrap is not legal; got 1.0.*try 0.99"):
        ShortcutHead(DIM, 3, bootstrap=1.0)
    with pytest.raises(ValueError, match=r"num_mixtures is not legal; got 0"):
        GaussianMixtureHead(DIM, 3, num_mixtures=0)
