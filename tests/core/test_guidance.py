import math
from itertools import pairwise

import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.guidance import RAMPS, guidance_at, guide


def test_guide_is_linear_and_exact_at_zero_and_one():
    uncond, cond = torch.tensor([0.1, 2.0]), torch.tensor([0.3, 1.0])
    assert torch.equal(guide(uncond, cond, 0.0), uncond)
    assert torch.equal(guide(uncond, cond, 1.0), cond)
    # (1 + w) c - w u with w = 2 is scale 3
    assert torch.allclose(guide(uncond, cond, 3.0), 3 * cond - 2 * uncond)


@pytest.mark.parametrize("ramp", RAMPS)
def test_ramps_end_at_the_scale_and_never_fall(ramp):
    values = [guidance_at(ramp, 5.0, i / 20) for i in range(21)]
    assert values[-1] == pytest.approx(5.0)
    assert values[0] == (5.0 if ramp == "constant" else 1.0)
    assert all(a <= b for a, b in pairwise(values))


def test_published_values():
    # MAR: 1 + (s - 1) * revealed share
    assert guidance_at("mar_linear", 2.9, 64 / 256) == pytest.approx(1 + 1.9 * 0.25)
    # D-AR: from 1.2 to 8 over positions
    assert guidance_at("linear", 8.0, 0.5, start=1.2) == pytest.approx(4.6)
    # RAR-B: s = 16, p = 2.75
    expected = 1 + 15 * (1 - math.cos(math.pi * 0.5**2.75)) / 2
    assert guidance_at("cosine_power", 16.0, 0.5) == pytest.approx(expected)


def test_errors():
    with pytest.raises(UsageError, match=r"cosine_pow.*cosine_power"):
        guidance_at("cosine_pow", 2.0, 0.0)
    with pytest.raises(UsageError, match=r"progress.*1\.5"):
        guidance_at("linear", 2.0, 1.5)
