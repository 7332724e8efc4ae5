"""Reconstruction loss of the trained image tokenizers: pixels plus edges at several scales.

It needs no pretrained network, so it runs offline. It does not know the quantiser.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def edge_loss(
    pixels: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
    num_scales: int = 3,
) -> Float[Tensor, ""]:
    """Average the absolute error of horizontal and vertical differences over halved scales.

    A blurred edge has small pixel error but a wrong slope; this term prices the slope.

    Args:
        pixels: Reconstruction, about [-1, 1].
        target: Original in [-1, 1].
        num_scales: Scales, each half the size of the last.
    """
    error = pixels - target
    total = error.new_zeros(())
    for scale in range(num_scales):
        if scale:
            error = F.avg_pool2d(error, 2)
        total = total + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return total / (2 * num_scales)


def reconstruction_loss(
    pixels: Float[Tensor, "batch channels height width"],
    target: Float[Tensor, "batch channels height width"],
    *,
    absolute_weight: float = 1.0,
    square_weight: float = 1.0,
    edge_weight: float = 1.0,
) -> tuple[Float[Tensor, ""], dict[str, float]]:
    """Weigh absolute, squared and edge error, in float32.

    Args:
        pixels: Reconstruction, about [-1, 1].
        target: Original in [-1, 1].
        absolute_weight: Weight of the mean absolute error.
        square_weight: Weight of the mean squared error.
        edge_weight: Weight of `edge_loss`.

    Returns:
        The weighted sum, and the terms as floats: "l1", "mse", "edge", and "psnr" in dB of the
        mean squared error.
    """
    pixels, target = pixels.float(), target.float()
    absolute = F.l1_loss(pixels, target)
    square = F.mse_loss(pixels, target)
    edge = edge_loss(pixels, target)
    total = absolute_weight * absolute + square_weight * square + edge_weight * edge
    with torch.no_grad():
        decibels = 10 * torch.log10(4 / square.clamp_min(1e-12))
    metrics = {"l1": absolute, "mse": square, "edge": edge, "psnr": decibels}
    return total, {name: float(value.detach()) for name, value in metrics.items()}
