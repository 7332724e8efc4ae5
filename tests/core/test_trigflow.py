"""The circular path and the straight one are one path at two scales."""

import math

import pytest
import torch

from blockloom.core.corruption import noise_levels
from blockloom.core.schedulers.base import Row, clean_from_velocity, flow_noise
from blockloom.core.schedulers.flow import Renoise
from blockloom.core.trigflow import (
    LAST,
    circular_velocity,
    clean_from_circular,
    level_of_time,
    path_scale,
    straight_velocity,
    time_of_level,
)


def pair(seed=0):
    rng = torch.Generator().manual_seed(seed)
    clean, noise = (torch.randn(3, 5, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    time = torch.rand(3, 5, 1, generator=rng, dtype=torch.float64) * LAST
    return clean, noise, time


def test_both_ends_and_the_middle():
    level = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    time = time_of_level(level)
    assert time.tolist() == pytest.approx([0.0, math.pi / 4, LAST])
    assert level_of_time(time).tolist() == pytest.approx([0.0, 0.5, 1.0])
    assert path_scale(time).tolist() == pytest.approx([1.0, math.sqrt(2), 1.0])
    many = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(level_of_time(time_of_level(many)), many, atol=1e-15)


def test_the_circular_sample_is_the_straight_one_at_another_scale():
    clean, noise, time = pair()
    circular = time.cos() * clean + time.sin() * noise
    straight = flow_noise(clean, noise, level_of_time(time))
    assert torch.allclose(circular, path_scale(time) * straight, atol=1e-14)


def test_velocities_are_the_derivatives_of_their_paths():
    clean, noise, time = pair()
    sample = time.cos() * clean + time.sin() * noise
    derivative = time.cos() * noise - time.sin() * clean
    assert torch.allclose(circular_velocity(noise - clean, sample, time), derivative, atol=1e-14)
    assert torch.allclose(straight_velocity(derivative, sample, time), noise - clean, atol=1e-13)
    guess = torch.randn_like(clean)
    there = circular_velocity(guess, sample, time)
    assert torch.allclose(straight_velocity(there, sample, time), guess, atol=1e-13)


def test_the_clean_end_is_one_number_on_both_paths():
    _, _, time = pair()
    rng = torch.Generator().manual_seed(1)
    sample, guess = (torch.randn(3, 5, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    level, straight = level_of_time(time), sample / path_scale(time)
    field = circular_velocity(guess, sample, time)
    end = clean_from_circular(sample, field, time)
    assert torch.allclose(end, clean_from_velocity(straight, guess, level), atol=1e-14)
    # At time 0 it is the sample, whatever the field says; at the last time the field alone.
    zero = torch.zeros_like(time)
    assert torch.equal(clean_from_circular(sample, field, zero), sample)
    assert torch.allclose(clean_from_circular(sample, field, zero + LAST), -field, atol=1e-15)
    # A row of `renoise` draws that end, then goes on from less noise: multistep consistency.
    row = Row(index=1, num_rows=2, level=float(level[0, 0]), level_next=0.0)
    own = Renoise().step(guess[:1, :1], row, straight[:1, :1], [torch.Generator()])
    assert torch.allclose(own, end[:1, :1], atol=1e-14)


def test_logit_normal_levels_are_the_proposal_of_consistency_models():
    level = noise_levels("logit_normal", (4000,), torch.Generator().manual_seed(0), shift=2.0)
    logarithm = time_of_level(level.double()).tan().log()  # tan t = exp(tau)
    assert float(logarithm.mean()) == pytest.approx(math.log(2.0), abs=0.05)
    assert float(logarithm.std()) == pytest.approx(1.0, abs=0.05)
