"""The small network of the per-token diffusion heads: an MLP modulated by the trunk state.

Knows vectors and scalars per token; does not know objectives, paths or solvers. Invariant: the
output is zero at initialisation. Source: head of MAR (arXiv:2406.11838) and LatentLM
(arXiv:2412.08635), adaLN-zero of DiT (arXiv:2212.09748).
"""

import math
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ...core.numerics import RowStableActivation, RowStableLinear, row_stable_activation
from .base import check_sizes, zero_init

FOURIER_DIM = 128
FOURIER_PERIOD = 10000.0
SCALAR_RANGE = 1000.0


def fourier_features(
    scalar: Float[Tensor, "*rows"], dim: int = FOURIER_DIM
) -> Float[Tensor, "*rows features"]:
    """Spread a scalar over cosines and sines of geometric frequencies.

    Args:
        scalar: Numbers in about [0, 1].
        dim: Features, even.

    Returns:
        `dim` numbers in [-1, 1] per scalar: all cosines, then all sines.
    """
    exponent = torch.arange(dim // 2, device=scalar.device, dtype=torch.float32) / (dim // 2)
    frequency = torch.exp(-math.log(FOURIER_PERIOD) * exponent)
    angle = SCALAR_RANGE * scalar.float()[..., None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class ScalarEmbedder(nn.Sequential):
    """Embed a noise level or a step size: Fourier features, then a two-layer MLP.

    Args:
        width: Output features.
    """

    def __init__(self, width: int) -> None:
        super().__init__(
            RowStableLinear(FOURIER_DIM, width),
            RowStableActivation("silu"),
            RowStableLinear(width, width),
        )

    def forward(self, scalar: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows width"]:
        """Embed each scalar.

        Args:
            scalar: Numbers in about [0, 1].

        Returns:
            One vector per scalar.
        """
        first = cast(nn.Linear, self[0])
        return super().forward(fourier_features(scalar).to(first.weight.dtype))


class AdaLNLayer(nn.Module):
    """Residual SwiGLU layer whose scale, shift and gate come from the condition.

    Args:
        width: Features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_init(RowStableLinear(width, 3 * width))
        self.expand = RowStableLinear(width, 2 * width)
        self.shrink = RowStableLinear(width, width)

    def forward(
        self, x: Float[Tensor, "*rows width"], condition: Float[Tensor, "*rows width"]
    ) -> Float[Tensor, "*rows width"]:
        """Update every row.

        Args:
            x: Features.
            condition: Modulating vector of the same row.

        Returns:
            Updated features; equal to `x` at initialisation.
        """
        shift, scale, gate = self.modulation(row_stable_activation("silu", condition)).chunk(
            3, dim=-1
        )
        value, switch = self.expand(self.norm(x) * (1 + scale) + shift).chunk(2, dim=-1)
        return x + gate * self.shrink(value * row_stable_activation("silu", switch))


class AdaLNMLP(nn.Module):
    """Predict one vector per token from a noisy vector, the trunk state and scalars.

    Args:
        dim: Width of the trunk states.
        channels: Latent channels per token.
        width: Hidden features.
        depth: Residual layers.
        num_scalars: Scalars per token, e.g. 1 for the noise level, 2 with the step size.

    Raises:
        UsageError: A size is not positive.
    """

    def __init__(
        self, dim: int, channels: int, width: int, depth: int, num_scalars: int = 1
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, channels=channels, width=width, depth=depth)
        self.norm_hidden = nn.LayerNorm(dim)
        self.from_hidden = RowStableLinear(dim, width)
        self.from_noisy = RowStableLinear(channels, width)
        self.scalars = nn.ModuleList([ScalarEmbedder(width) for _ in range(num_scalars)])
        self.layers = nn.ModuleList([AdaLNLayer(width) for _ in range(depth)])
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.modulation = zero_init(RowStableLinear(width, 2 * width))
        self.out = zero_init(RowStableLinear(width, channels))

    def condition(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows width"]:
        """Project trunk states once, so that solver steps do not repeat it.

        Args:
            hidden: Trunk states.

        Returns:
            Condition without the scalars.
        """
        return self.from_hidden(self.norm_hidden(hidden))

    def forward(
        self,
        noisy: Float[Tensor, "*rows channels"],
        condition: Float[Tensor, "*rows width"],
        *scalars: Float[Tensor, "*rows"],
    ) -> Float[Tensor, "*rows channels"]:
        """Predict from noisy vectors.

        Args:
            noisy: Noisy latents.
            condition: Output of `condition` for the same rows.
            *scalars: One tensor per embedder, a number per row.

        Returns:
            Prediction, zero at initialisation.
        """
        for embed, scalar in zip(self.scalars, scalars, strict=True):
            condition = condition + embed(scalar)
        x = self.from_noisy(noisy)
        for layer in self.layers:
            x = layer(x, condition)
        shift, scale = self.modulation(row_stable_activation("silu", condition)).chunk(2, dim=-1)
        return self.out(self.norm_out(x) * (1 + scale) + shift)
