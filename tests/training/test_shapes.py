"""Procedural pictures and the closed-form baselines of the learning checks."""

import numpy as np
import pytest
import torch

from blockloom.training.predictors import CodeTable, Path, SlotGaussians
from blockloom.training.shapes import (
    COLORS,
    GROUNDS,
    draw_shapes,
    held_out_prompts,
    nearest_prompts,
    shape_prompts,
    shapes,
)


def test_a_picture_shows_its_prompt() -> None:
    prompts = shape_prompts()
    pictures = draw_shapes(prompts, seed=3)
    for prompt, picture in zip(prompts, pictures.astype(int), strict=True):
        _, color, _, _, ground = prompt.split()
        assert abs(picture[8, 8] - COLORS[color]).max() < 40
        assert abs(picture[0, 0] - GROUNDS[ground]).max() < 40
    assert nearest_prompts(pictures) == prompts


def test_held_out_prompts_are_unseen_but_their_words_are_not() -> None:
    data = shapes(train=96, held_out=12)
    seen, unseen = set(data.only("train").captions), set(data.only("held_out").captions)
    assert unseen == set(held_out_prompts()) and not seen & unseen
    assert {w for p in unseen for w in p.split()} <= {w for p in seen for w in p.split()}


def test_pictures_are_a_function_of_the_seed() -> None:
    first, again, other = shapes(8, 2), shapes(8, 2), shapes(8, 2, seed=1)
    assert np.array_equal(first.images, again.images)
    assert not np.array_equal(first.images, other.images)


def test_the_code_table_reaches_the_entropy() -> None:
    values = torch.tensor([0, 0, 0, 1]).repeat(2000)[:, None, None]
    loss = CodeTable(values, 2).loss(values, torch.tensor([0])).mean()
    expected = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert float(loss) == pytest.approx(expected, abs=1e-4)


def gaussian_values() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.tensor([[1.0, 0.5], [0.0, 0.2]])
    return torch.randn(20_000, 1, 2, generator=generator) @ mixing + 1.0


def test_the_slot_gaussian_reaches_the_entropy_of_a_gaussian() -> None:
    values = gaussian_values()
    loss = SlotGaussians(values).density_loss(values, torch.tensor([0])).mean()
    expected = 0.5 * np.log((2 * np.pi * np.e) ** 2 * 0.2**2)
    assert float(loss) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("target", ["noise", "velocity"])
def test_no_linear_prediction_beats_the_slot_gaussian(target: str) -> None:
    values = gaussian_values()
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    share = torch.full((len(values), 1, 1), 0.6)
    path = Path(1 - share, share, share * 0 - float(target == "velocity"), share * 0 + 1)
    sample = path.signal * values + path.noise * noise
    wanted = path.clean_share * values + path.noise_share * noise
    predicted = SlotGaussians(values).predict(sample, path, torch.tensor([0]))
    rows = torch.cat((sample, torch.ones(len(values), 1, 1)), -1)[:, 0]
    best = rows @ torch.linalg.lstsq(rows, wanted[:, 0]).solution
    ours = (predicted - wanted).square().mean()
    assert float(ours) == pytest.approx(float((best - wanted[:, 0]).square().mean()), rel=2e-3)
