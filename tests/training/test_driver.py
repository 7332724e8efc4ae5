"""A cloned driver: found again where it is linear, and driving a dream as its recording did."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError
from blockloom.training.clips import ClipDataset
from blockloom.training.dreams import Beginnings
from blockloom.training.driver import clone_driver, driver_of, explained, habits, steered_by


def recording(clips=6, frames=40, noise=0.0, seed=0):
    """A bright square whose place tells the action: left of the middle steers right."""
    rng = np.random.default_rng(seed)
    pixels = np.full((clips * frames, 16, 16, 3), 40, dtype=np.uint8)
    column = rng.integers(0, 14, clips * frames)
    for row, left in enumerate(column):
        pixels[row, 6:9, left : left + 3] = 240
    steer = (6.5 - column) / 6.5 + noise * rng.standard_normal(len(column))
    actions = np.stack((steer, np.zeros(len(column))), 1).astype(np.float32)
    offsets = np.arange(clips + 1) * frames
    actions[offsets[1:] - 1] = 0.0
    split = ["train"] * (clips - 1) + ["test"]
    return ClipDataset(pixels, offsets, [""] * clips, split, actions=actions)


def test_a_linear_driver_is_found_again():
    clips = recording()
    driver = clone_driver(clips.only("train"))
    shares = explained(driver, clips.only("test"))
    assert shares[0] > 0.98 and shares[1] is None  # the second number never varies
    left, right = (
        torch.from_numpy(clips.frames[clips.actions[:, 0] * sign > 0.5][:2])[None]
        for sign in (1, -1)
    )
    assert driver(left)[0, 0] > 0.4 and driver(right)[0, 0] < -0.4
    assert driver(left)[0, 1] == 0.0


def test_actions_that_were_not_recorded_teach_nothing():
    clips = recording()
    actions = clips.actions.copy()
    actions[5:25] = np.nan
    driver = clone_driver(replace(clips, actions=actions).only("train"))
    assert bool(torch.isfinite(driver.weights).all())
    assert explained(driver, clips.only("test"))[0] > 0.98


def test_actions_stay_within_what_was_recorded():
    clips = recording()
    driver = clone_driver(clips)
    extreme = torch.full((1, 2, 16, 16, 3), 255, dtype=torch.uint8)
    said = driver(extreme)
    assert (said >= driver.low).all() and (said <= driver.high).all()
    pushed = steered_by(driver, extreme[:, :1], torch.tensor([[9.0, 9.0]]), 3)
    assert torch.equal(pushed, driver.high.expand(1, 3, 2))


def test_on_the_true_road_clone_and_habit_are_the_recorded_driver():
    clips = recording(noise=0.2, seed=1)
    driver = clone_driver(clips.only("train"))
    rows = torch.arange(10)
    led = torch.from_numpy(clips.actions)[rows - 1]
    after = Beginnings(torch.from_numpy(clips.frames)[rows][None], led[None], [""], [0], 4)
    beyond = habits(driver, after)
    assert beyond.shape == (1, 6, 2) and beyond.abs().max() > 0.05
    for place, frame in enumerate(range(4, 10)):
        said = steered_by(driver, after.frames[:, frame - 2 : frame], beyond[:, place], 1)
        assert torch.allclose(said[:, 0], after.actions[:, frame], atol=1e-5)


def test_ids_and_short_clips_are_refused():
    clips = recording()
    ids = ClipDataset(
        clips.frames, clips.offsets, clips.captions, clips.split,
        actions=np.where(np.isin(np.arange(240), clips.offsets[1:] - 1), -1, 1),
    )  # fmt: skip
    assert driver_of(ids) is None
    with pytest.raises(DataError, match="numbers"):
        clone_driver(ids)
    short = ClipDataset(
        clips.frames[:4], np.array([0, 2, 4]), ["", ""], ["train", "test"],
        actions=np.zeros((4, 2), dtype=np.float32),
    )  # fmt: skip
    with pytest.raises(DataError, match="needs 3"):
        clone_driver(short)
    assert driver_of(short) is None
