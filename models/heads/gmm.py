"""Gaussian-mixture head: a closed density per token over continuous latents.

Knows single tokens only. Invariants: standard deviations are at least 1e-6; at initialisation the
output does not depend on the trunk. Source: GIVT (arXiv:2312.02116); differs: see `GaussianMixture`
and `GaussianMixtureHead.sample`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ...core.numerics import RowStableLinear
from ...core.sampling import per_item_gumbel, per_item_randn
from .base import HeadSample, TokenHead, check_sizes, zero_init

MIN_DEVIATION = 1e-6
WIDEST_GUIDED = 2.0


def squareplus(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Map real numbers smoothly to positive ones: (z + sqrt(z^2 + 4)) / 2.

    Args:
        z: Any real numbers.

    Returns:
        Positive numbers; 1 at zero.
    """
    return (z + (z * z + 4).sqrt()) / 2


@dataclass
class GaussianMixture:
    """Mixture of diagonal Gaussians for each token, float32.

    Attributes:
        log_weight: Log mixture weights, summing to one over the components.
        mean: Component means.
        deviation: Component standard deviations, at least 1e-6.
    """

    log_weight: Float[Tensor, "batch tokens mixtures"]
    mean: Float[Tensor, "batch tokens mixtures channels"]
    deviation: Float[Tensor, "batch tokens mixtures channels"]

    def log_prob(
        self, values: Float[Tensor, "batch tokens channels"]
    ) -> Float[Tensor, "batch tokens"]:
        """Return the log density of one vector per token, in nats.

        Args:
            values: Latents.

        Returns:
            Log density.
        """
        offset = (values[:, :, None].float() - self.mean) / self.deviation
        log_norm = self.deviation.log() + 0.5 * math.log(2 * math.pi)
        component = -(0.5 * offset.square() + log_norm).sum(dim=-1)
        return torch.logsumexp(self.log_weight + component, dim=-1)

    def pick(self, component: Int[Tensor, "batch tokens"]) -> tuple[Tensor, Tensor]:
        """Return mean and deviation of one component per token.

        Args:
            component: Component number in [0, mixtures).

        Returns:
            Two tensors [batch, tokens, channels].
        """
        index = component[..., None, None].expand(*component.shape, 1, self.mean.shape[-1])
        return self.mean.gather(2, index)[:, :, 0], self.deviation.gather(2, index)[:, :, 0]


def guide_gaussian(
    mean: Float[Tensor, "*rows"],
    deviation: Float[Tensor, "*rows"],
    uncond_mean: Float[Tensor, "*rows"],
    uncond_deviation: Float[Tensor, "*rows"],
    scale: Float[Tensor, "..."],
) -> tuple[Tensor, Tensor]:
    """Return the normalised density `cond^scale / uncond^(scale - 1)` of two Gaussians.

    A product of powers of Gaussians is a Gaussian wherever its precision is positive, so no
    rejection sampling is needed. Channels where the precision is not positive, or the result is
    more than twice as wide as the wider input, keep the conditional Gaussian.

    Args:
        mean: Conditional mean.
        deviation: Conditional standard deviation.
        uncond_mean: Unconditional mean.
        uncond_deviation: Unconditional standard deviation.
        scale: Guidance scale, 1 = conditional.

    Returns:
        Mean and standard deviation.
    """
    share, uncond_share = scale / deviation.square(), (scale - 1) / uncond_deviation.square()
    precision = share - uncond_share
    widest = WIDEST_GUIDED * torch.maximum(deviation, uncond_deviation)
    is_sound = precision > widest.square().reciprocal()
    precision = torch.where(is_sound, precision, 1.0)
    guided_mean = (share * mean - uncond_share * uncond_mean) / precision
    return (
        torch.where(is_sound, guided_mean, mean),
        torch.where(is_sound, precision.rsqrt(), deviation),
    )


class GaussianMixtureHead(TokenHead):
    """Predict a mixture of diagonal Gaussians per token.

    Output weights start at zero, but the means get spread-out biases: components that start equal
    receive equal gradients and would stay equal for ever.

    Args:
        dim: Width of the trunk states.
        channels: Latent channels per token.
        num_mixtures: Components.

    Raises:
        UsageError: A size is not positive.
    """

    def __init__(self, dim: int, channels: int, num_mixtures: int = 16) -> None:
        super().__init__()
        check_sizes(dim=dim, channels=channels, num_mixtures=num_mixtures)
        self.channels = channels
        self.num_mixtures = num_mixtures
        self.norm = nn.LayerNorm(dim)
        self.out = zero_init(RowStableLinear(dim, num_mixtures * (1 + 2 * channels)))
        if num_mixtures > 1:
            means = slice(num_mixtures, num_mixtures * (1 + channels))
            nn.init.normal_(self.out.bias.data[means])

    def mixture(self, hidden: Float[Tensor, "batch tokens dim"]) -> GaussianMixture:
        """Predict the density of every token.

        Args:
            hidden: Trunk states.

        Returns:
            Mixtures in the units of the standardised latents.
        """
        raw = self.out(self.norm(hidden)).float()
        size = self.num_mixtures * self.channels
        weight, mean, spread = raw.split([self.num_mixtures, size, size], dim=-1)
        return GaussianMixture(
            weight.log_softmax(dim=-1),
            rearrange(mean, "b m (k c) -> b m k c", c=self.channels),
            squareplus(rearrange(spread, "b m (k c) -> b m k c", c=self.channels)).clamp_min(
                MIN_DEVIATION
            ),
        )

    def loss(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        target: Float[Tensor, "batch tokens channels"],
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Return the negative log likelihood per token.

        Args:
            hidden: Trunk states.
            target: Clean standardised latents.
            generator: Unused; the loss draws no noise.

        Returns:
            Nats per token, summed over channels, float32; can be negative.
        """
        return -self.mixture(hidden).log_prob(target)

    def sample(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        generators: Sequence[torch.Generator],
        *,
        uncond_hidden: Float[Tensor, "batch tokens dim"] | None = None,
        guidance_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
    ) -> HeadSample:
        """Draw one latent per token.

        The component comes from the conditional mixture; guidance then sharpens that component
        channel by channel against the unconditional one of the same number, see `guide_gaussian`.
        GIVT draws from the same density by rejection and, where it cannot be normalised, on a
        bounded grid; here such channels fall back to the conditional Gaussian.

        Args:
            hidden: Trunk states under the prompt.
            generators: One CPU generator per item.
            uncond_hidden: Trunk states without the prompt, or None for no guidance.
            guidance_scale: Exponent of the conditional density (1 + w in GIVT), one number or
                [batch, tokens].
            temperature: Multiplies the standard deviations; 0 returns component means.

        Returns:
            Latents and their log density under the conditional mixture, unscaled and unguided.
        """
        cond = self.mixture(hidden)
        tokens = hidden.shape[1]
        gumbel = per_item_gumbel((tokens, self.num_mixtures), generators, hidden.device)
        component = (cond.log_weight + gumbel).argmax(dim=-1)
        mean, deviation = cond.pick(component)
        if uncond_hidden is not None:
            scale = torch.as_tensor(guidance_scale, dtype=mean.dtype, device=mean.device)
            scale = scale.reshape(*scale.shape, *[1] * (mean.ndim - scale.ndim))
            uncond = self.mixture(uncond_hidden).pick(component)
            mean, deviation = guide_gaussian(mean, deviation, *uncond, scale)
        noise = per_item_randn((tokens, self.channels), generators, hidden.device)
        values = mean + temperature * deviation * noise
        return HeadSample(values, log_prob=cond.log_prob(values))
