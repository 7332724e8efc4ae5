"""Models guided by structure: who is told, that caching stays exact, and training sees the maps."""

import pytest
import torch

from blockloom.core.errors import ModelError, UsageError
from blockloom.core.plan import build_plan
from blockloom.core.proof import compare
from blockloom.core.rollout import run
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start
from blockloom.models.live import LiveRollout
from blockloom.models.video import VideoRequest, WholeBlocks, video_blocks

EDGES = ("condition.actions=0", "condition.structure=edges", "condition.structure_size=2")
CASES = [
    ("video/teacher_forcing", ("layout.frames=5",)),
    ("video/acdit", ("layout.frames=5", "cache.far.patch=2", "cache.window=2")),
    ("video/diffusion_forcing", ("schedule.guidance_scale=2.0",)),
    ("video/magi_ctf", ()),
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def maps(frames, items=2, seed=0):
    return torch.rand(items, frames, 16, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(("name", "extra"), CASES)
def test_cached_rows_equal_the_masked_forward(tiny, name, extra):
    model = tiny.model(name, *EDGES, *extra, dtype=torch.float64, std=0.3)
    plan = build_plan(model.recipe, 4, 4)
    guided = model.recipe.schedule.guidance_scale != 1
    decoder = tiny.decoder(model, ["a red cat", "sun"], guided=guided)
    decoder.structure = maps(model.recipe.layout.frames).flatten(1, 2).double()
    parity = compare(plan, decoder, tiny.contents(model, plan))
    assert parity.max_error < 1e-10 and parity.scale > 0.1


def draw(model, structure, frames=5):
    request = Request(
        ["", ""], [item_generator(0, k) for k in range(2)], frames=frames, structure=structure
    )
    return run(start(model, request))[0].unflatten(1, (frames, 16))


def test_a_map_reaches_its_own_frame_and_later_ones_only(tiny):
    model = tiny.model("video/teacher_forcing", *EDGES, std=0.3)
    first = maps(5)
    second = first.clone()
    second[1, 3] *= -1
    one, other = draw(model, first), draw(model, second)
    assert torch.equal(one[0], other[0]) and torch.equal(one[1, :3], other[1, :3])
    assert all(not torch.equal(one[1, k], other[1, k]) for k in (3, 4))


def test_clean_rows_are_told_nothing(tiny):
    """So guidance branches share their cache, and given frames need no map of their own."""
    model = tiny.model("video/teacher_forcing", *EDGES, std=0.3)
    plan = build_plan(model.recipe, 4, 4)
    decoder = tiny.decoder(model, ["", ""])
    rows = plan.clean_rows(0)
    values = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
    nothing, states = torch.zeros(2, 16, dtype=torch.bool), []
    for seed in (0, 1):
        decoder.structure = maps(5, seed=seed).flatten(1, 2)
        lowered = plan.lower(rows, rows)
        states.append(decoder.forward(values, nothing, rows, nothing.float(), lowered, None))
    assert torch.equal(*states)


def test_wrong_maps_are_refused(tiny):
    model = tiny.model("video/teacher_forcing", *EDGES, std=0.3)
    shape = r"\(2, 5, 16, 4\), a map per frame; got "
    with pytest.raises(UsageError, match=shape + "None"):
        draw(model, None)
    with pytest.raises(UsageError, match=shape + r"\(2, 4, 16, 4\)"):
        draw(model, maps(4))
    plain = tiny.model("video/teacher_forcing", "condition.actions=0", std=0.3)
    with pytest.raises(UsageError, match="takes no structure"):
        draw(plain, maps(5))


def test_videos_of_so_many_frames_and_none_without_end(tiny):
    model = tiny.model("video/teacher_forcing", *EDGES, std=0.3)
    streams = [item_generator(0, k) for k in range(2)]
    with pytest.raises(UsageError, match="frames to come have no map"):
        LiveRollout(model, ["", ""], streams)
    blocks = video_blocks(model, VideoRequest(["", ""], streams, 5, structure=maps(5)))
    assert isinstance(blocks, WholeBlocks)
    parts = []
    for part in range(blocks.num_parts):
        for _ in blocks.events(part):
            pass
        parts.append(blocks.values(part))
        blocks.set_prompts(["", ""])  # other words, the same maps
    assert torch.equal(torch.cat(parts, 1), draw(model, maps(5)))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("image/acdit", ("condition.structure=luma",), r'needs layout\.kind = "frames"'),
        ("video/causal_lm", ("condition.structure=luma",), r"layout\.shift = 0"),
        ("video/par", ("condition.structure=luma",), r"no acting"),
        ("video/self_forcing", ("condition.structure=luma",), r"videos have no map"),
        ("video/acdit", ("condition.structure=edge",), r"condition\.structure: .*nearest: edges"),
        ("video/acdit", ("condition.structure_size=0",), r"greater than or equal to 1"),
    ],
)
def test_what_structure_needs(tiny, name, settings, message):
    with pytest.raises(ModelError, match=message):
        tiny.recipe(name, *settings)
