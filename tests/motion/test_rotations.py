import math

import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.motion import rotations as r

ATOL = 1e-12  # float64


def random_rotations(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return r.unit(torch.randn(*shape, 4, generator=generator, dtype=torch.float64))


def same(first: torch.Tensor, second: torch.Tensor, atol: float = ATOL) -> None:
    """Compare rotations: q and -q are one."""
    turn = r.multiply(r.inverse(first), second)
    assert float(r.angle_of(turn).max()) < atol * 10


def test_a_quarter_turn_about_each_axis() -> None:
    quarter = torch.tensor(math.pi / 2, dtype=torch.float64)
    x, y, z = torch.eye(3, dtype=torch.float64)
    for axis, start, end in (("X", y, z), ("Y", z, x), ("Z", x, y)):
        turned = r.rotate(r.about_axis(axis, quarter), start)
        torch.testing.assert_close(turned, end, rtol=0, atol=ATOL)


def test_multiply_turns_by_the_right_one_first_and_inverse_undoes() -> None:
    a, b = random_rotations(2, 50)
    v = torch.randn(50, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    both = r.rotate(r.multiply(a, b), v)
    torch.testing.assert_close(both, r.rotate(a, r.rotate(b, v)), rtol=0, atol=ATOL)
    torch.testing.assert_close(r.rotate(r.inverse(a), r.rotate(a, v)), v, rtol=0, atol=ATOL)


def test_matrices_agree_with_rotating_and_come_back() -> None:
    q = random_rotations(200)
    v = torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    matrices = r.matrix_from_quaternion(q)
    turned = torch.einsum("nij,nj->ni", matrices, v)
    torch.testing.assert_close(turned, r.rotate(q, v), rtol=0, atol=ATOL)
    back = r.quaternion_from_matrix(matrices)
    assert bool((back[:, 0] >= 0).all())
    same(q, back)


@pytest.mark.parametrize("half_turn", [(0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0.6, 0.8, 0)])
def test_matrices_of_half_turns_come_back(half_turn: tuple[float, ...]) -> None:
    q = torch.tensor(half_turn, dtype=torch.float64)
    same(q, r.quaternion_from_matrix(r.matrix_from_quaternion(q)))


def test_six_d_is_the_first_column_then_the_second() -> None:
    quarter = r.about_axis("Z", torch.tensor(math.pi / 2, dtype=torch.float64))
    six = r.six_d_from_quaternion(quarter)
    expected = torch.tensor([0, 1, 0, -1, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(six, expected, rtol=0, atol=ATOL)
    q = random_rotations(200)
    same(q, r.quaternion_from_six_d(r.six_d_from_quaternion(q)))
    # Any scale and any shear of the second column towards the first is taken out.
    six = r.six_d_from_quaternion(q)
    sheared = torch.cat([3 * six[:, :3], six[:, 3:] + 0.7 * six[:, :3]], dim=-1)
    same(q, r.quaternion_from_six_d(sheared))


@pytest.mark.parametrize("six", [[0.0] * 6, [1, 2, 3, 2, 4, 6], [0, 0, 0, 0, 1, 0]])
def test_six_numbers_that_name_no_plane_still_give_a_rotation(six: list[float]) -> None:
    matrix = r.matrix_from_six_d(torch.tensor(six, dtype=torch.float64))
    eye = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-9)
    assert float(torch.linalg.det(matrix)) == pytest.approx(1)


@pytest.mark.parametrize("order", r.EULER_ORDERS)
def test_euler_angles_go_and_come_back(order: str) -> None:
    q = random_rotations(300)
    angles = r.euler_from_quaternion(q, order)
    same(q, r.quaternion_from_euler(angles, order), 1e-9)
    middle = angles[:, 1]
    low, high = (0, 180) if order[0] == order[2] else (-90, 90)
    assert float(middle.min()) >= low and float(middle.max()) <= high
    # Angles inside those ranges are found again, not others that mean the same.
    given = torch.tensor([[20.0, 35.0, -70.0], [-100.0, 80.0, 5.0]], dtype=torch.float64)
    found = r.euler_from_quaternion(r.quaternion_from_euler(given, order), order)
    torch.testing.assert_close(found, given, rtol=0, atol=1e-9)


@pytest.mark.parametrize("order", r.EULER_ORDERS)
@pytest.mark.parametrize("offset", [0.0, 1e-10, 1e-7, 1e-4])
def test_euler_angles_at_the_lock(order: str, offset: float) -> None:
    ends = (0.0, 180.0) if order[0] == order[2] else (90.0, -90.0)
    for end in ends:
        middle = end + offset if end <= 0 else end - offset
        angles = torch.tensor([[30.0, middle, -50.0]], dtype=torch.float64)
        q = r.quaternion_from_euler(angles, order)
        found = r.euler_from_quaternion(q, order)
        assert bool(torch.isfinite(found).all())
        same(q, r.quaternion_from_euler(found, order), 1e-7)


def test_an_order_is_read_left_to_right() -> None:
    angles = torch.tensor([10.0, 20.0, 30.0], dtype=torch.float64)
    z, x, y = (
        r.about_axis(axis, torch.deg2rad(angle)) for axis, angle in zip("ZXY", angles, strict=True)
    )
    same(r.quaternion_from_euler(angles, "ZXY"), r.multiply(r.multiply(z, x), y))
    same(r.quaternion_from_euler(angles[:1], "Z"), z)
    same(r.quaternion_from_euler(angles[:0], ""), r.identity(like=angles))


def test_other_orders_are_refused() -> None:
    with pytest.raises(UsageError, match=r"'XYW'.*try 'ZXY'"):
        r.euler_from_quaternion(random_rotations(1), "XYW")
    with pytest.raises(UsageError, match="'ZXY' with 2 angles"):
        r.quaternion_from_euler(torch.zeros(2), "ZXY")


def test_slerp_goes_at_constant_speed_the_shorter_way() -> None:
    a, b = random_rotations(2, 40)
    whole = r.angle_of(r.multiply(r.inverse(a), b))
    for ratio in (0.0, 0.25, 0.5, 1.0):
        for end in (b, -b):
            part = r.slerp(a, end, torch.tensor(ratio, dtype=torch.float64))
            torch.testing.assert_close(
                r.angle_of(r.multiply(r.inverse(a), part)), ratio * whole, rtol=0, atol=1e-7
            )
    same(r.slerp(a, a, torch.tensor(0.3, dtype=torch.float64)), a)


def test_between_is_the_shortest_turn() -> None:
    generator = torch.Generator().manual_seed(2)
    u, v = torch.randn(2, 200, 3, generator=generator, dtype=torch.float64)
    q = r.between(u, v)
    torch.testing.assert_close(r.unit(r.rotate(q, u)), r.unit(v), rtol=0, atol=ATOL)
    apart = torch.acos((r.unit(u) * r.unit(v)).sum(-1))
    torch.testing.assert_close(r.angle_of(q), apart, rtol=0, atol=1e-7)


def test_between_opposite_equal_and_zero_vectors() -> None:
    u = torch.randn(100, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for other in (-u, -u * (1 + 1e-9), u):
        turned = r.rotate(r.between(u, other), u)
        torch.testing.assert_close(r.unit(turned), r.unit(other), rtol=0, atol=1e-6)
    nothing = r.between(torch.zeros_like(u), u)
    torch.testing.assert_close(nothing, r.identity(100, like=u), rtol=0, atol=0)


def test_yaw_is_where_the_front_points_over_the_floor() -> None:
    angle = torch.linspace(-3, 3, 31, dtype=torch.float64)
    q = r.about_axis("Y", angle)
    torch.testing.assert_close(r.yaw(q), angle, rtol=0, atol=ATOL)
    # Leaning forward and rolling about the front do not change it.
    lean = r.about_axis("X", torch.tensor(0.7, dtype=torch.float64))
    roll = r.about_axis("Z", torch.tensor(1.2, dtype=torch.float64))
    tilted = r.multiply(q, r.multiply(lean, roll))
    torch.testing.assert_close(r.yaw(tilted), angle, rtol=0, atol=1e-9)
    down = r.about_axis("X", torch.tensor(math.pi / 2, dtype=torch.float64))
    upright = r.yaw(r.multiply(q, down))
    torch.testing.assert_close(upright, angle, rtol=0, atol=1e-6)


def test_align_signs_removes_flips_and_keeps_rotations() -> None:
    steps = torch.linspace(0, 6, 60, dtype=torch.float64)
    smooth = r.about_axis("Y", steps)
    flips = torch.where(torch.arange(60) % 7 == 3, -1.0, 1.0).to(smooth)
    aligned = r.align_signs(smooth * flips[:, None])
    torch.testing.assert_close(aligned, smooth, rtol=0, atol=0)


@pytest.mark.parametrize("axis", ["u", "six"])
def test_gradients_stay_finite_at_the_corners(axis: str) -> None:
    if axis == "u":
        u = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1, 0, 0]], dtype=torch.float64)
        v = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [1, 0, 0]], dtype=torch.float64)
        u.requires_grad_()
        r.between(u, v).sum().backward()
        assert bool(torch.isfinite(u.grad).all())
    else:
        six = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
        r.matrix_from_six_d(six).sum().backward()
        assert bool(torch.isfinite(six.grad).all())
