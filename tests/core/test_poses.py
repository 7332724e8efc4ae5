"""Views selected by camera pose, and what selection needs of masks, caches and the checker."""

import math

import pytest
import torch

from blockloom.core.closure import check_exact
from blockloom.core.errors import ModelError, UsageError
from blockloom.core.exactness import violations
from blockloom.core.layout import Layout
from blockloom.core.masks import MaskTable, parse_relation
from blockloom.core.plan import build_plan
from blockloom.core.poses import nearest_blocks, poses_of, require_poses, routes_of
from blockloom.core.recipe import load_recipe
from blockloom.core.rules import rule

POSED = ["condition.actions=16", "condition.poses=true", "backbone.position=pose",
         "cache.window=null", "cache.nearest=2"]  # fmt: skip


def at(*places, turns=None):
    """Cameras on the x axis, each turned about y."""
    pose = torch.eye(4, dtype=torch.float64).repeat(len(places), 1, 1)
    pose[:, 0, 3] = torch.tensor(places, dtype=torch.float64)
    for view, turn in enumerate(turns or ()):
        c, s = math.cos(turn), math.sin(turn)
        pose[view, :3, :3] = torch.tensor([[c, 0, s], [0, 1, 0], [-s, 0, c]], dtype=torch.float64)
    return pose


def chosen(pose, count):
    return [row.nonzero()[:, 0].tolist() for row in nearest_blocks(pose, count)]


def test_the_nearest_earlier_views_are_chosen():
    pose = at(0.0, 5.0, 1.0, 4.5, 0.4)
    assert chosen(pose, 1) == [[], [0], [0], [1], [0]]
    assert chosen(pose, 2) == [[], [0], [0, 1], [1, 2], [0, 2]]
    assert chosen(pose, 9) == [[], [0], [0, 1], [0, 1, 2], [0, 1, 2, 3]]
    # A turn by a right angle is as far as a step of 2.
    turned = at(0.0, 0.0, 1.9, 0.0, turns=[0.0, math.pi / 2, 0.0, 0.0])
    assert chosen(turned[[1, 2, 3]], 1) == [[], [0], [1]]


def test_of_equally_near_views_the_later_one_is_nearer():
    assert chosen(at(0.0, 0.0, 0.0, 0.0), 2) == [[], [0], [0, 1], [1, 2]]
    assert chosen(at(1.0, -1.0, 0.0), 1) == [[], [0], [1]]


def test_a_rigid_motion_of_everything_changes_nothing():
    rng = torch.Generator().manual_seed(0)
    angle = torch.rand(9, generator=rng).double() * 6
    pose = at(*torch.randn(9, generator=rng).tolist(), turns=angle.tolist())
    motion = at(3.0, turns=[1.1])[0]
    motion[1, 3] = -7.0
    assert torch.equal(nearest_blocks(motion @ pose, 3), nearest_blocks(pose, 3))
    other = pose.clone()
    other[:, 0, 3] *= 10  # no rigid motion
    assert not torch.equal(nearest_blocks(other, 3), nearest_blocks(pose, 3))


def test_items_of_a_batch_are_chosen_for_by_themselves():
    pose = torch.stack((at(0.0, 5.0, 1.0, 4.5), at(0.0, 1.0, 9.0, 8.0)))
    both = nearest_blocks(pose, 1)
    assert torch.equal(both[0], nearest_blocks(pose[0], 1))
    assert torch.equal(both[1], nearest_blocks(pose[1], 1)) and not torch.equal(both[0], both[1])


def test_numbers_are_read_as_matrices():
    numbers = torch.arange(1.0, 20.0)
    assert poses_of(numbers).tolist() == torch.arange(4.0, 20.0).reshape(4, 4).tolist()
    assert torch.equal(poses_of(torch.zeros(2, 3, 16)), torch.eye(4).expand(2, 3, 4, 4))
    require_poses(at(1.0, 2.0, turns=[0.3, 2.0]).flatten(-2))
    require_poses(torch.zeros(2, 18))
    bad = {
        "stretched": at(0.0) * torch.tensor([2.0, 1, 1, 1]).double(),
        "mirrored": at(0.0) * torch.tensor([-1.0, 1, 1, 1]).double(),
        "far": at(2000.0),
        "nan": at(math.nan),
    }
    for matrix in bad.values():
        with pytest.raises(UsageError, match="camera-to-world"):
            require_poses(matrix.flatten(-2))


# -- the relation -----------------------------------------------------------------------------


def test_the_relation_is_read_and_written():
    text = "LE(block) & (POSE(2) | k.SINK)"
    assert str(parse_relation(text)) == text
    assert parse_relation(text).route_names() == {"pose:2"}
    assert str(rule("block_causal", nearest=2, sink=True)).endswith(f"N->N {text}")
    for wrong in ("POSE(0)", "POSE(near)", "POSE(1,2)", "POSE()"):
        with pytest.raises(ValueError, match=r"POSE|argument"):
            parse_relation(wrong)


def test_rows_see_their_own_view_the_nearest_and_the_first():
    block = torch.arange(4).repeat_interleave(2)
    layout = Layout.make(8, block=block, role=(block == 0).long() * 4)
    table = MaskTable.parse({"C->C": "LE(block) & (POSE(1) | k.SINK)"})
    pose = at(0.0, 5.0, 6.0, 5.1)
    routes = routes_of(table.route_names(), pose, layout.block, 4)
    seen = table.visible(layout, layout, routes=routes)
    views = [sorted(set(block[row].tolist())) for row in seen]
    assert views == [[0], [0], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 3], [0, 1, 3]]
    with pytest.raises(ValueError, match="routing table 'pose:1' is missing"):
        table.visible(layout, layout)


# -- recipes ----------------------------------------------------------------------------------


def test_the_checker_proves_selection_by_pose_and_disproves_looking_ahead():
    recipe = load_recipe("video/diffusion_forcing", POSED)
    assert recipe.cache.exact and violations(recipe) == []
    plan = build_plan(recipe, 1, 2, frames=6)
    assert plan.capacity() == 12  # nothing is forgotten
    layout, pose = plan.training_layout(), at(0.0, 5.0, 1.0, 4.5, 0.4, 2.0)
    ahead = MaskTable.parse({"N->N": "POSE(2)"})
    report = check_exact(ahead, layout, commit="block", routes=plan.routes(layout, pose))
    assert not report.exact and "later block" in report.violations[0]
    # A window would forget views that a later one is near to.
    report = check_exact(
        plan.table, layout, commit="block", window=2, routes=plan.routes(layout, pose)
    )
    assert not report.exact and "evicted before its last reader" in report.violations[0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("condition.actions=12", "needs 16 actions or more"),
        ("layout.block=frames:5", "needs 16 actions or more and"),
        ("backbone.position=rope", 'set backbone.position to "pose"'),
        ("condition.poses=false", 'set backbone.position to "rope"'),
        ("backbone.heads=32", "multiple of 4"),
        ("cache.window=3", "no cache.window"),
        ("mask=bidirectional", "nearest"),
    ],
)
def test_what_cameras_need_is_said(change, words):
    with pytest.raises(ModelError, match=words):
        load_recipe("video/diffusion_forcing", [*POSED, change])
