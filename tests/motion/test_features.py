"""Features against a plain second writing of HumanML3D's published steps, and back."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d

from blockloom.core.errors import DataError, UsageError
from blockloom.motion import features as f
from blockloom.motion.clip import Motion, fk_error, motion_from_rotations, motion_world_rotations
from blockloom.motion.procedural import procedural_motion, procedural_motions
from blockloom.motion.rotations import angle_of, inverse, multiply, unit
from blockloom.motion.skeleton import HUMAN22, Skeleton


@pytest.fixture(scope="module")
def circle() -> Motion:
    """A walk in circles, 240 frames: the heading passes half a turn away from +Z."""
    generator = torch.Generator().manual_seed(1)
    return procedural_motion("a person walks in a circle to the left", generator, 240)


def wild(frames: int, skeleton: Skeleton = HUMAN22) -> Motion:
    """Smooth random rotations everywhere: twist at every bone, any heading."""
    generator = torch.Generator().manual_seed(4)
    size = len(skeleton)
    noise = torch.randn(frames + 40, size, 4, generator=generator, dtype=torch.float64)
    weights = torch.hann_window(40, dtype=torch.float64)
    smooth = torch.einsum("fjqw,w->fjq", noise.unfold(0, 40, 1), weights)[:frames]
    root = torch.randn(frames + 40, 3, generator=generator, dtype=torch.float64)
    root = torch.einsum("fxw,w->fx", root.unfold(0, 40, 1), weights)[:frames] / 4
    return motion_from_rotations(skeleton, unit(smooth), root)


def turn_y(points: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Turn points [frames, n, 3] about Y by the angle of each frame, written out."""
    c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
    x, y, z = points[..., 0], points[..., 1], points[..., 2]
    return np.stack([c * x + s * z, y, -s * x + c * z], axis=-1)


def by_hand(motion: Motion) -> dict[str, np.ndarray]:
    p = motion.joints.astype(np.float64)
    across = (p[:, 2] - p[:, 1]) + (p[:, 17] - p[:, 16])
    across /= np.linalg.norm(across, axis=-1, keepdims=True)
    forward = np.cross([[0.0, 1.0, 0.0]], across)
    forward = gaussian_filter1d(forward, 20, axis=0, mode="nearest")
    heading = np.arctan2(forward[:, 0], forward[:, 2])
    step = np.diff(heading)
    step = np.arctan2(np.sin(step), np.cos(step))
    way = np.diff(p, axis=0)
    local = p.copy()
    local[..., [0, 2]] -= p[:, :1, [0, 2]]
    squared = (way**2).sum(-1)
    return {
        "turn": -step[:, None] / 2,
        "way": turn_y(way[:, :1], -heading[1:])[:, 0, [0, 2]],
        "height": p[:-1, 0, 1:2],
        "places": turn_y(local, -heading)[:-1, 1:].reshape(len(p) - 1, -1),
        "ways": turn_y(way, -heading[:-1]).reshape(len(p) - 1, -1),
        "contacts": (squared[:, [7, 10, 8, 11]] < 0.002).astype(float),
    }


def test_the_263_numbers_are_humanml3ds(circle: Motion) -> None:
    got, want = f.human_features(circle), by_hand(circle)
    assert got.shape == (239, 263) and got.dtype == np.float32
    parts = {
        "turn": slice(0, 1), "way": slice(1, 3), "height": slice(3, 4), "places": slice(4, 67),
        "ways": slice(193, 259), "contacts": slice(259, 263),
    }  # fmt: skip
    for name, part in parts.items():
        np.testing.assert_allclose(got[:, part], want[name], atol=2e-6, err_msg=name)
    assert 0 < want["contacts"].mean() < 1  # both kinds occur


def test_the_turn_is_half_the_angle_with_its_sign_reversed(circle: Motion) -> None:
    heading = f.headings(circle).numpy()
    assert np.ptp(heading) > math.pi  # so it passes the far side, where a sign could flip
    np.testing.assert_allclose(f.human_features(circle)[:, 0], -np.diff(heading) / 2, atol=1e-7)
    assert np.all(f.human_features(circle)[:, 0] < 0)  # to the left, heading grows


def test_six_d_is_relative_to_the_parent_and_the_heading() -> None:
    motion = wild(30)
    rotations = f.human_features(motion)[:, 67:193].reshape(29, 21, 6)
    knee = HUMAN22.index("left_knee")
    local = torch.from_numpy(motion.rotations.astype(np.float64))[:-1, knee]
    own = np.stack([rotations[:, knee - 1, :3], rotations[:, knee - 1, 3:]], axis=-1)
    w, x, y, z = local.numpy().T
    first = np.stack([1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)], axis=-1)
    np.testing.assert_allclose(own[..., 0], first, atol=1e-5)


@pytest.mark.parametrize("smoothing", [1.0, 0.0])
@pytest.mark.parametrize("make", ["circle", "wild"])
def test_recover_inverts_the_features(circle: Motion, make: str, smoothing: float) -> None:
    motion = circle if make == "circle" else wild(260)
    numbers = f.human_features(motion, smoothing)
    back = f.recover(numbers, f.start_of(motion, smoothing_seconds=smoothing)).numpy()
    assert back.shape == (len(motion) - 1, 22, 3)
    assert np.abs(back - motion.joints[:-1]).max() < 1e-4
    # Only the root's part and the places are read.
    numbers[:, 67:] = np.nan
    again = f.recover(numbers, f.start_of(motion, smoothing_seconds=smoothing)).numpy()
    np.testing.assert_array_equal(again, back)


def test_without_a_start_the_clip_begins_at_the_origin_facing_z(circle: Motion) -> None:
    back = f.recover(f.human_features(circle, 0.0), None).numpy()
    np.testing.assert_allclose(back[0, 0, [0, 2]], 0, atol=1e-7)
    across = (back[0, 1] - back[0, 2]) + (back[0, 16] - back[0, 17])
    assert abs(across[2]) < 1e-5 and across[0] > 0


def test_pieces_recovered_in_order_have_the_bits_of_the_whole(circle: Motion) -> None:
    numbers = torch.from_numpy(f.human_features(circle))
    start = f.start_of(circle)
    whole = f.recover(numbers, start)
    pieces = []
    for piece in numbers.split(7):
        pieces.append(f.recover(piece, start))
        start = f.advance(piece, start)
    assert torch.equal(torch.cat(pieces), whole)
    batch = torch.stack([numbers, numbers.flip(0)])
    assert torch.equal(f.recover(batch)[0], f.recover(numbers))


def test_recover_is_differentiable(circle: Motion) -> None:
    numbers = torch.from_numpy(f.human_features(circle)[:20]).requires_grad_()
    f.recover(numbers)[-1].sum().backward()
    assert bool((numbers.grad[:-1, 1:3].abs() > 0).all())
    assert float(numbers.grad[-1, 1:3].abs().sum()) == 0  # it leads to a pose that is not there


def test_a_piece_has_the_features_of_the_whole_without_smoothing(circle: Motion) -> None:
    whole = f.human_features(circle, 0.0)
    part = f.human_features(circle.cut(50, 90), 0.0)
    np.testing.assert_allclose(part, whole[50:89], rtol=0, atol=1e-12)
    assert np.abs(f.human_features(circle.cut(50, 90)) - f.human_features(circle)[50:89]).max() > 0


def test_moving_and_turning_a_clip_changes_no_feature(circle: Motion) -> None:
    joints = turn_y(circle.joints.astype(np.float64), np.full(240, 2.1))
    joints = joints + np.array([3.0, 0.0, -7.0])
    moved = Motion(joints, HUMAN22, text="")
    placed = dataclasses.replace(circle, rotations=None)
    difference = np.abs(f.human_features(moved) - f.human_features(placed))
    assert difference[:, :259].max() < 2e-5  # contacts are thresholds


@pytest.mark.parametrize("make", ["circle", "wild"])
def test_features_become_a_clip_whose_joints_and_rotations_agree(circle: Motion, make: str) -> None:
    motion = circle if make == "circle" else wild(120)
    start = f.start_of(motion)
    numbers = f.human_features(motion)
    back = f.features_to_motion(numbers, start=start, text="again")
    assert back.text == "again" and fk_error(back)[1] < 0.01
    assert f.body_error(back, numbers, start)[1] < 0.02  # millimetres; lengths are HUMAN22's
    np.testing.assert_allclose(back.joints, motion.joints[:-1], atol=1e-4)
    # Twist comes back too, for every bone.
    turned = multiply(inverse(motion_world_rotations(back)), motion_world_rotations(motion)[:-1])
    assert float(angle_of(turned)[:, 1:].max()) < 1e-3


def test_bones_of_other_lengths_are_put_right_and_the_rest_is_said(circle: Motion) -> None:
    numbers = f.human_features(circle)
    numbers[:, 4:67] *= 1.1  # a body a tenth larger than its legs and arms can be
    back = f.features_to_motion(numbers)
    lengths = np.linalg.norm(back.joints[:, 4] - back.joints[:, 1], axis=-1)
    np.testing.assert_allclose(lengths, 0.4112, atol=1e-4)
    mean, largest = f.body_error(back, numbers)
    assert 10 < mean < largest < 200


def test_garbage_still_gives_a_body() -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(12, 263, generator=generator)
    numbers[3] = 0
    back = f.features_to_motion(numbers)
    assert len(back) == 12 and fk_error(back)[1] < 0.1


def test_any_skeleton_has_features_and_comes_back() -> None:
    snake = Skeleton(
        tuple("abcde"), (-1, 0, 1, 2, 3), np.array([[0, 0.2, 0], *[[0, 0, 0.3]] * 4]), feet=("e",)
    )
    motion = wild(80, snake)
    numbers = f.motion_features(motion)
    assert numbers.shape == (79, 12 * 5 - 5 + 1) == (79, f.layout_of(snake).size)
    start = f.start_of(motion)
    back = f.recover(numbers, start, joints=5).numpy()
    assert np.abs(back - motion.joints[:-1]).max() < 1e-4
    body = f.features_to_motion(numbers, snake, start=start)
    np.testing.assert_allclose(body.joints, motion.joints[:-1], atol=1e-4)


def test_a_skeleton_without_sides_needs_rotations() -> None:
    snake = Skeleton(("a", "b"), (-1, 0), np.array([[0, 0, 0], [0, 0, 1.0]]))
    places = Motion(np.ones((4, 2, 3)), snake)
    with pytest.raises(DataError, match="heading unknown"):
        f.motion_features(places)


def test_what_cannot_be_described_is_refused(circle: Motion) -> None:
    with pytest.raises(DataError, match="two frames"):
        f.human_features(circle.cut(0, 1))
    other = Motion(np.ones((4, 1, 3)), Skeleton(("a",), (-1,), np.zeros((1, 3))))
    with pytest.raises(DataError, match="22 joints of human22"):
        f.human_features(other)
    with pytest.raises(UsageError, match=r"\[5, 60\].*259 or more"):
        f.recover(torch.zeros(5, 60))
    with pytest.raises(UsageError, match=r"\[5, 260\].*263"):
        f.features_to_motion(torch.zeros(5, 260))
    with pytest.raises(UsageError, match="smoothing_seconds"):
        f.headings(circle, -1)


def test_all_procedural_clips_come_back() -> None:
    for motion in procedural_motions(25, torch.Generator().manual_seed(5), frames=41):
        back = f.recover(f.human_features(motion), f.start_of(motion)).numpy()
        assert np.abs(back - motion.joints[:-1]).max() < 1e-4, motion.text
