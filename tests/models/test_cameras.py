"""A model that is told cameras: what reaches it of them, with and without a cache."""

import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.plan import build_plan
from blockloom.core.proof import decode_forward, training_forward
from blockloom.core.rollout import run
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start
from blockloom.models.generator import split_poses
from blockloom.models.video import WholeBlocks, goes_on
from blockloom.pipelines.auto import num_actions
from blockloom.training.objective import ModelStage

VIEWS = ("video/diffusion_forcing", "condition.actions=16", "condition.poses=true",
         "backbone.position=pose", "layout.frames=6", "cache.window=null",
         "cache.nearest=2", "cache.sink=1")  # fmt: skip
WORDS = ["a red ball", "a box"]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def motion(seed):
    rng = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(3, 3, generator=rng, dtype=torch.float64))
    pose = torch.eye(4, dtype=torch.float64)
    pose[:3, :3] = turn * torch.linalg.det(turn).sign()
    pose[:3, 3] = torch.randn(3, generator=rng, dtype=torch.float64)
    return pose


def cameras(items=2, views=6):
    return torch.stack([
        torch.stack([motion(100 * item + view) for view in range(views)]) for item in range(items)
    ])  # fmt: skip


def states(tiny, poses, *more):
    model = tiny.model(*VIEWS, *more, dtype=torch.float64, std=0.3)
    plan = build_plan(model.recipe, 4, 4)
    decoder = tiny.decoder(model, WORDS)
    decoder.actions = poses.flatten(-2)
    contents = tiny.contents(model, plan)
    return training_forward(plan, decoder, contents, 5)[1], decode_forward(plan, decoder, contents)


def test_a_rigid_motion_of_all_cameras_changes_no_state(tiny):
    own, passes = states(tiny, cameras())
    moved, moved_passes = states(tiny, motion(7) @ cameras())
    assert (own - moved).abs().max() < 1e-10
    assert all((a[1] - b[1]).abs().max() < 1e-10 for a, b in zip(passes, moved_passes, strict=True))
    other = cameras()
    other[:, 3] = motion(8)
    assert (own - states(tiny, other)[0]).abs().max() > 1e-2


def test_a_view_that_is_not_selected_does_not_reach_a_row(tiny):
    """The camera steps away for view 1; the last views are near each other."""
    poses = torch.eye(4, dtype=torch.float64).repeat(2, 6, 1, 1)
    poses[:, :, 0, 3] = torch.tensor([0.0, 50.0, 1.0, 1.1, 1.2, 1.3], dtype=torch.float64)
    own, _ = states(tiny, poses, "backbone.layers=1")
    poses[:, 1, 1, 3] = 20.0
    other, _ = states(tiny, poses, "backbone.layers=1")
    moved = (own - other).abs().amax((0, 2)).reshape(6, 16).amax(1) > 1e-12
    # View 2 takes both before it, view 3 takes 0 and 2; later ones have two nearer ones.
    assert moved.tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize("keys", ["rotated", "unrotated"])
def test_keys_may_be_transformed_when_written_or_when_read(tiny, keys):
    model = tiny.model(*VIEWS, f"cache.keys={keys}", std=0.3)
    actions = cameras().flatten(-2).float()
    rollout = start(model, request(actions))
    values, _ = run(rollout)
    kept = rollout.cache.layout.source[0, : int(rollout.cache.committed[0])]
    assert kept.tolist() == list(range(80))  # all views but the last, which nobody reads
    slow, _ = run(start(model, request(actions, use_cache=False)))
    assert torch.allclose(values, slow, atol=2e-4 * float(values.abs().max()))
    for item in range(2):
        alone, _ = run(start(model, request(actions[item : item + 1], item)))
        assert torch.equal(alone[0], values[item])


def request(actions, first=0, **more):
    items = len(actions)
    generators = [item_generator(3, first + k) for k in range(items)]
    words = WORDS[first : first + items]
    return Request(words, generators, actions=actions, frames=actions.shape[1], **more)


def test_guided_branches_see_the_views_of_their_item(tiny):
    model = tiny.model(*VIEWS, std=0.3)
    actions = cameras().flatten(-2).float()
    together, _ = run(start(model, request(actions, guidance_scale=2.0)))
    alone, _ = run(start(model, request(actions[1:], 1, guidance_scale=2.0)))
    assert torch.equal(alone[0], together[1])


def test_matrices_that_no_camera_has_are_refused(tiny):
    model = tiny.model(*VIEWS)
    with pytest.raises(UsageError, match="camera-to-world"):
        start(model, request(torch.randn(2, 6, 16)))
    start(model, request(torch.zeros(2, 6, 16)))  # nothing said: all views alike


def test_all_views_are_kept_so_videos_are_laid_out_whole(tiny):
    from blockloom.models.video import VideoRequest, video_blocks

    model = tiny.model(*VIEWS)
    assert not goes_on(model)
    blocks = video_blocks(model, VideoRequest(["a"], [item_generator(0, 0)], 6,
                                              actions=torch.zeros(1, 6, 16)))  # fmt: skip
    assert isinstance(blocks, WholeBlocks)


def test_numbers_before_the_camera_are_told_as_actions(tiny):
    recipe = tiny.recipe(*VIEWS, "condition.actions=19")
    numbers = torch.randn(2, 6, 19)
    told, poses = split_poses(recipe, numbers)
    assert torch.equal(told, numbers[..., :3]) and torch.equal(poses.flatten(-2), numbers[..., 3:])
    assert split_poses(tiny.recipe(*VIEWS), numbers[..., :16])[0] is None
    plain = tiny.recipe("video/diffusion_forcing")
    assert split_poses(plain, numbers)[0] is numbers and split_poses(plain, numbers)[1] is None


def test_cameras_do_not_make_a_world(tmp_path):
    import json

    (tmp_path / "model").mkdir()
    for actions, poses, count in ((16, True, 0), (19, True, 3), (4, False, 4)):
        config = {"recipe": {"condition": {"actions": actions, "poses": poses}}}
        (tmp_path / "model" / "config.json").write_text(json.dumps(config))
        assert num_actions(tmp_path) == count


def test_training_selects_views_item_by_item(tiny):
    model = tiny.model(*VIEWS, dtype=torch.float64, std=0.3)
    values = torch.randn(2, 96, tiny.channels, generator=torch.Generator().manual_seed(0)).double()
    actions = cameras().flatten(-2)
    ids = model.text_encoder.tokenize(WORDS)
    stage, rng = ModelStage(model, values, ids, WORDS, actions), torch.Generator().manual_seed(1)
    plan, layout, lowered = stage.plan(rng)
    batch = stage.corrupt(values, plan, layout, rng)
    never = torch.zeros(2, dtype=torch.bool)
    both = stage.hidden_states(torch.arange(2), never, batch, layout, lowered)
    from dataclasses import replace

    one = replace(batch, values=batch.values[1:], is_masked=batch.is_masked[1:],
                  level=batch.level[1:])  # fmt: skip
    alone = stage.hidden_states(torch.tensor([1]), never[:1], one, layout, lowered)
    assert torch.allclose(both[1:], alone, atol=1e-12)
    assert float(stage.loss(torch.arange(2), rng, 0)[0]) > 0
