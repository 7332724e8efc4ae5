"""TrigFlow: the circular path from data to noise, and its closed-form map to the straight one.

Circular path, t in [0, pi/2]: x_t = cos(t) clean + sin(t) noise. Straight path, level s in [0, 1]:
x_s = (1 - s) clean + s noise. The two are one path at two scales: x_t = (sin t + cos t) x_s with
s = sin t / (sin t + cos t), so a model of velocities on the straight path answers for the circular
one without another weight.

Latents here have deviation 1, so the deviation of the data (sigma_d) is 1 and does not appear.
It knows no models.

Source: simplified consistency models (sCM, arXiv:2410.11081), section 3.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

LAST = math.pi / 2
"""Time of pure noise."""


def time_of_level(level: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Map a level in [0, 1] of the straight path to the time in [0, pi/2] of the circular one.

    A level whose logit is a normal number (`noise_levels`) becomes the proposal of sCM:
    arctan of the exponential of that number.
    """
    return torch.atan2(level, 1 - level)


def level_of_time(time: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Map a time to its level: sin t / (sin t + cos t)."""
    return time.sin() / path_scale(time)


def path_scale(time: Float[Tensor, "*rows"]) -> Float[Tensor, "*rows"]:
    """Return x_t / x_s = sin t + cos t, in [1, sqrt(2)]."""
    return time.sin() + time.cos()


def circular_velocity(
    velocity: Float[Tensor, "*rows"], sample: Float[Tensor, "*rows"], time: Float[Tensor, "..."]
) -> Float[Tensor, "*rows"]:
    """Turn noise - clean into dx/dt = cos(t) noise - sin(t) clean.

    Args:
        velocity: Noise minus clean, as models of the straight path predict it.
        sample: On the circular path.
        time: Broadcast against `sample`.
    """
    return ((time.cos() - time.sin()) * sample + velocity) / path_scale(time)


def straight_velocity(
    velocity: Float[Tensor, "*rows"], sample: Float[Tensor, "*rows"], time: Float[Tensor, "..."]
) -> Float[Tensor, "*rows"]:
    """Turn dx/dt back into noise - clean; the inverse of `circular_velocity`."""
    return path_scale(time) * velocity - (time.cos() - time.sin()) * sample


def clean_from_circular(
    sample: Float[Tensor, "*rows"], velocity: Float[Tensor, "*rows"], time: Float[Tensor, "..."]
) -> Float[Tensor, "*rows"]:
    """Return cos(t) x - sin(t) F, the clean end: at time 0 the sample itself, whatever F says.

    It equals x_s - s v on the straight path, which is how few rows with `update: renoise` draw.
    """
    return time.cos() * sample - time.sin() * velocity
