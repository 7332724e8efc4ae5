"""Answers of any length: a thousand frames, and memory that a window keeps constant."""

import pytest
import torch

from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start

FRAMES = 1000


def talk(model, frames, **settings):
    rng = torch.Generator().manual_seed(0)
    actions = torch.randn(1, FRAMES, model.recipe.condition.actions, generator=rng)[:, :frames]
    request = Request(["speaker ada"], [item_generator(0, 0)], frames=frames, actions=actions)
    rollout = start(model, request)
    most = 0
    with torch.no_grad():
        for _ in rollout.events():
            most = max(most, int(rollout.cache.written[0]))
    return rollout, most


def test_a_thousand_frames_at_constant_memory(tiny):
    model = tiny.model("motion/faceformer", "layout.frames=20", "cache.window=21")
    long, most = talk(model, FRAMES)
    short, least = talk(model, 60)
    assert long.cache.capacity == short.cache.capacity < 30
    assert most == least == 21  # twenty rows behind the one that runs, and the start row
    # No table of places, no longest mask: the first frames know nothing of the length.
    assert torch.equal(long.values[:, :60], short.values)
    assert bool(torch.isfinite(long.values).all())
    assert float(long.values[:, 900:].std(1).min()) > 0.01  # and it still moves


@pytest.mark.slow
def test_without_a_window_memory_grows_by_a_row_per_frame(tiny):
    model = tiny.model("motion/faceformer", "layout.frames=20", "cache.window=null")
    long, most = talk(model, FRAMES)
    short, least = talk(model, 60)
    assert (most, least) == (FRAMES, 60)
    assert torch.equal(long.values[:, :60], short.values)
