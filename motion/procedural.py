"""Captioned motions made by formulas, for tests, demos and small learning checks.

A person of the 22 joints walks, runs, turns, jumps, waves and so on; each caption looks different
from all others, and each clip of a caption is a little different too. Feet are planted: the ball
of a standing foot has a fixed place in the world and the leg follows by two-bone inverse
kinematics. They are no measured motions, and look like none.

It does not know files or models.

Invariants: equal generators give equal clips; bones keep their lengths; forward kinematics holds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..core.errors import UsageError, check_count, check_one_of, describe
from .clip import Motion, motion_from_rotations
from .rotations import about_axis, multiply, quaternion_from_matrix, rotate, unit
from .skeleton import HUMAN22, local_rotations

FPS = 20.0
MIN_FRAMES, MAX_FRAMES = 40, 120
_DRAWS = 8
_GRAVITY = 9.81
_HALF_WIDTH = 0.095
"""Metres from the middle to a standing foot."""
_BALL = 0.14
"""Metres from the middle of the body forward to the balls of standing feet."""
_THIGH, _SHANK = (
    float(-HUMAN22.offsets[HUMAN22.index(name), 1]) for name in ("left_knee", "left_ankle")
)

Path = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Seconds to (x, z, heading): where the body is on the floor and where it faces."""
Sides = tuple[Tensor | float, Tensor | float]
"""A value for the left and one for the right."""


def _stay(time: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    zero = torch.zeros_like(time)
    return zero, zero, zero


@dataclass(frozen=True)
class _Controls:
    """What an action says about the body; angles in radians, lengths in metres, over time.

    Attributes:
        path: Way over the floor.
        cadence: Strides per second; 0 takes both feet along the path without a step.
        stance: Part of a stride in which a foot stands.
        swing: How high a foot is lifted.
        crouch: How far the pelvis is lower than standing.
        lift: How far the whole body is above the floor.
        tilt: Forward lean of the pelvis.
        bend, twist: Of the whole spine, forward and to the left.
        out, forward, roll, elbow: Arms: away from the body sideways, swung forward, turned about
            themselves (inward above 0 where they hang), bent.
        foot_forward, foot_up, foot_out: How far a foot is moved from its place.
    """

    path: Path = _stay
    cadence: float = 0.0
    stance: float = 0.6
    swing: float = 0.09
    crouch: Tensor | float = 0.0
    lift: Tensor | float = 0.0
    tilt: Tensor | float = 0.0
    bend: Tensor | float = 0.05
    twist: Tensor | float = 0.0
    out: Sides = (0.12, 0.12)
    forward: Sides = (0.0, 0.0)
    roll: Sides = (0.0, 0.0)
    elbow: Sides = (0.25, 0.25)
    foot_forward: Sides = (0.0, 0.0)
    foot_up: Sides = (0.0, 0.0)
    foot_out: Sides = (0.0, 0.0)


def _ease(ratio: Tensor) -> Tensor:
    """Rise from 0 to 1 with no jump in speed."""
    ratio = ratio.clamp(0, 1)
    return ratio * ratio * (3 - 2 * ratio)


def _pulse(phase: Tensor, up: float, down: float, ramp: float) -> Tensor:
    """Go from 0 to 1 at `up` and back at `down`, within a period of 1."""
    phase = phase % 1
    return _ease((phase - up) / ramp) - _ease((phase - down) / ramp)


def _on_side(side: str, value: Tensor | float, other: Tensor | float) -> Sides:
    return (value, other) if side == "left" else (other, value)


def _walk(
    time: Tensor, draw: Tensor, speed: float, stride: float, travel: float = 0.0,
    curve: float = 0.0, is_run: bool = False,
) -> _Controls:  # fmt: skip
    """Walk or run: `speed` m/s, `stride` metres, `travel` direction against the facing, rad/s."""
    speed = speed * float(0.93 + 0.14 * draw[0])
    cadence = speed / stride
    phase = 2 * math.pi * (cadence * time + draw[1])

    def path(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heading = curve * at
        if curve:
            angle = heading + travel
            x = speed / curve * (math.cos(travel) - angle.cos())
            z = speed / curve * (angle.sin() - math.sin(travel))
        else:
            x, z = speed * math.sin(travel) * at, speed * math.cos(travel) * at
        return x, z, heading

    amount = (0.25 + 0.3 * abs(math.cos(travel))) * min(speed, 1.6) / 1.2
    swing = amount * phase.cos() * (1 if math.cos(travel) >= -0.1 else -1)
    bounce = 0.5 - 0.5 * torch.cos(2 * phase)
    return _Controls(
        path, cadence, 0.38 if is_run else 0.62, 0.2 if is_run else 0.08 + 0.02 * speed,
        crouch=0.05 * bounce + (0.04 if is_run else 0.01),
        lift=0.06 * (1 - bounce) if is_run else 0.0,
        tilt=0.16 if is_run else 0.03 * math.cos(travel), twist=-0.35 * swing,
        forward=(-swing, swing),
        elbow=(1.5, 1.5) if is_run else (0.3 - 0.2 * swing, 0.3 + 0.2 * swing),
    )  # fmt: skip


def _turn(time: Tensor, draw: Tensor, angle: float) -> _Controls:
    length = float(time[-1])

    def path(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zero = torch.zeros_like(at)
        return zero, zero, angle * _ease((at - 0.15 * length) / (0.7 * length))

    swing = 0.1 * torch.sin(2 * math.pi * time)
    return _Controls(path, 1.1 + 0.2 * float(draw[0]), twist=0.2 * swing, forward=(swing, -swing))


def _wave(time: Tensor, draw: Tensor, side: str) -> _Controls:
    raised = _ease(time / 0.6)
    shake = raised * (0.45 + 0.1 * draw[1]) * torch.sin(2 * math.pi * (1.3 + 0.4 * draw[0]) * time)
    out = 0.12 + raised * (1.45 + 0.2 * draw[2])
    return _Controls(
        out=_on_side(side, out, 0.12), roll=_on_side(side, -1.6 * raised, 0.0),
        elbow=_on_side(side, 0.25 + raised * 1.3 + shake, 0.25),
    )  # fmt: skip


def _jump(time: Tensor, draw: Tensor, distance: float) -> _Controls:
    period = 1.7 + 0.2 * float(draw[0])
    flight = 0.42 + 0.06 * float(draw[1])
    phase = time % period
    start = 0.65
    inside = (phase - start).clamp(0, flight)
    lift = 0.5 * _GRAVITY * inside * (flight - inside)
    crouch = 0.25 * (_ease(phase / 0.4) - _ease((phase - 0.45) / 0.2))
    landing = (phase - start - flight).clamp(min=0)
    crouch = crouch + 0.18 * (_ease(landing / 0.12) - _ease((landing - 0.12) / 0.3))
    reach = _ease((phase - 0.35) / 0.4) - _ease((phase - start - 0.6 * flight) / 0.5)

    def path(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zero = torch.zeros_like(at)
        ratio = ((at % period - start) / flight).clamp(0, 1)
        return zero, distance * ((at / period).floor() + ratio), zero

    swing = 1.6 * reach - 0.6 * (_ease(phase / 0.3) - _ease((phase - 0.3) / 0.3))
    return _Controls(path, 0.0, crouch=crouch, lift=lift, bend=0.05 + 1.6 * crouch, tilt=crouch,
                     forward=(swing, swing))  # fmt: skip


def _squat(time: Tensor, draw: Tensor) -> _Controls:
    down = 0.5 - 0.5 * torch.cos(2 * math.pi * time / (1.8 + 0.4 * draw[0]))
    depth = (0.42 + 0.06 * draw[1]) * down
    return _Controls(crouch=depth, bend=0.05 + 0.5 * down, tilt=0.5 * down,
                     forward=(1.5 * down, 1.5 * down))  # fmt: skip


def _bow(time: Tensor, draw: Tensor) -> _Controls:
    down = _pulse(time / (2.2 + 0.4 * draw[0]), 0.1, 0.6, 0.3)
    return _Controls(bend=0.05 + 0.8 * down, tilt=(0.55 + 0.1 * draw[1]) * down, crouch=0.02 * down)


def _punch(time: Tensor, draw: Tensor, side: str) -> _Controls:
    out = _pulse(time * (0.9 + 0.2 * draw[0]), 0.3, 0.5, 0.17)
    sign = -1.0 if side == "left" else 1.0
    return _Controls(
        crouch=0.05, twist=sign * 0.5 * out, forward=_on_side(side, 0.5 + 1.05 * out, 0.5),
        elbow=_on_side(side, 2.1 - 1.95 * out, 2.1), foot_forward=_on_side(side, -0.12, 0.12),
    )  # fmt: skip


def _kick(time: Tensor, draw: Tensor, side: str) -> _Controls:
    phase = time / (1.3 + 0.2 * draw[0])
    out = _pulse(phase, 0.3, 0.55, 0.22)
    back = _pulse(phase, 0.05, 0.25, 0.18)
    return _Controls(
        crouch=0.03, tilt=-0.18 * out, out=(0.35, 0.35),
        foot_forward=_on_side(side, (0.62 + 0.06 * draw[1]) * out - 0.25 * back, 0.0),
        foot_up=_on_side(side, 0.6 * out + 0.12 * back, 0.0),
        foot_out=_on_side(side, -0.06 * out, -0.06),
    )  # fmt: skip


def _raise_arms(time: Tensor, draw: Tensor) -> _Controls:
    up = 0.5 - 0.5 * torch.cos(2 * math.pi * time / (2.0 + 0.5 * draw[0]))
    out = 0.12 + (2.7 + 0.2 * draw[1]) * up
    return _Controls(out=(out, out), elbow=(0.2, 0.2))


def _clap(time: Tensor, draw: Tensor) -> _Controls:
    apart = 0.5 - 0.5 * torch.cos(2 * math.pi * (1.6 + 0.4 * draw[0]) * time)
    roll = 1.1 - 0.8 * apart
    return _Controls(forward=(0.6, 0.6), roll=(roll, roll), elbow=(1.4, 1.4))


def _jack(time: Tensor, draw: Tensor) -> _Controls:
    phase = time * (0.9 + 0.15 * draw[0])
    open_ratio = 0.5 - 0.5 * torch.cos(2 * math.pi * phase)
    hop = torch.sin(2 * math.pi * phase) ** 2
    out = 0.12 + 2.6 * open_ratio
    return _Controls(out=(out, out), crouch=0.03 + 0.06 * open_ratio, lift=0.07 * hop,
                     foot_out=(0.25 * open_ratio, 0.25 * open_ratio))  # fmt: skip


def _stand(time: Tensor, draw: Tensor) -> _Controls:
    breath = torch.sin(2 * math.pi * 0.25 * time + 6 * draw[0])
    return _Controls(bend=0.05 + 0.015 * breath, twist=0.03 * torch.sin(time + 6 * draw[1]))


Action = Callable[[Tensor, Tensor], _Controls]
ACTIONS: dict[str, Action] = {
    "a person stands still": _stand,
    "a person walks forward slowly": partial(_walk, speed=0.55, stride=0.8),
    "a person walks forward": partial(_walk, speed=1.1, stride=1.15),
    "a person walks forward fast": partial(_walk, speed=1.65, stride=1.45),
    "a person walks backward": partial(_walk, speed=0.8, stride=0.9, travel=math.pi),
    "a person steps to the left": partial(_walk, speed=0.5, stride=0.5, travel=math.pi / 2),
    "a person steps to the right": partial(_walk, speed=0.5, stride=0.5, travel=-math.pi / 2),
    "a person walks in a circle to the left": partial(_walk, speed=1.0, stride=1.05, curve=0.9),
    "a person walks in a circle to the right": partial(_walk, speed=1.0, stride=1.05, curve=-0.9),
    "a person runs forward": partial(_walk, speed=2.8, stride=2.0, is_run=True),
    "a person turns around to the left": partial(_turn, angle=math.pi),
    "a person turns around to the right": partial(_turn, angle=-math.pi),
    "a person waves with the left hand": partial(_wave, side="left"),
    "a person waves with the right hand": partial(_wave, side="right"),
    "a person jumps up": partial(_jump, distance=0.0),
    "a person jumps forward": partial(_jump, distance=0.6),
    "a person squats": _squat,
    "a person bows": _bow,
    "a person punches with the left hand": partial(_punch, side="left"),
    "a person punches with the right hand": partial(_punch, side="right"),
    "a person kicks with the left foot": partial(_kick, side="left"),
    "a person kicks with the right foot": partial(_kick, side="right"),
    "a person raises both arms": _raise_arms,
    "a person claps": _clap,
    "a person does jumping jacks": _jack,
}
"""Caption: what it does, from seconds [frames] and eight numbers in [0, 1)."""
CAPTIONS = tuple(ACTIONS)


def procedural_motion(
    caption: str, generator: torch.Generator, frames: int | None = None
) -> Motion:
    """Make one clip of the 22 joints at 20 frames per second.

    Args:
        caption: One of `CAPTIONS`.
        generator: Source of the differences between clips, of place and of heading.
        frames: Length, 2 or more; None draws 40 to 120.

    Raises:
        UsageError: Another caption (the nearest is named) or no legal length.
    """
    check_one_of("caption", caption, CAPTIONS)
    length = torch.randint(MIN_FRAMES, MAX_FRAMES + 1, (), generator=generator).item()
    draw = torch.rand(_DRAWS, generator=generator, dtype=torch.float64)
    frames = int(length) if frames is None else frames
    check_count("frames", frames, 2)
    time = torch.arange(frames, dtype=torch.float64) / FPS
    controls = ACTIONS[caption](time, draw)
    world, root = _pose(controls, time, stride_start=float(draw[1]))
    heading = about_axis("Y", 2 * math.pi * draw[5])
    world, root = multiply(heading, world), rotate(heading, root)
    root = root + (4 * draw[[6, 7, 7]] - 2) * torch.tensor([1.0, 0.0, 1.0], dtype=root.dtype)
    rotations = local_rotations(HUMAN22, world)
    return motion_from_rotations(HUMAN22, rotations, root, FPS, caption)


def procedural_motions(
    count: int, generator: torch.Generator, captions: tuple[str, ...] = CAPTIONS,
    frames: int | None = None,
) -> list[Motion]:  # fmt: skip
    """Make clips, going through the captions in turn.

    Raises:
        UsageError: No captions, an unknown one, or an illegal count or length.
    """
    check_count("count", count)
    if not captions:
        raise UsageError(describe("captions", captions, "one or more of procedural.CAPTIONS"))
    return [
        procedural_motion(captions[number % len(captions)], generator, frames)
        for number in range(count)
    ]


def _full(value: Tensor | float, time: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=time.dtype).expand(len(time))


def _pose(controls: _Controls, time: Tensor, stride_start: float) -> tuple[Tensor, Tensor]:
    """Return world rotations [frames, joints, 4] and root places [frames, 3]."""
    x, z, heading = controls.path(time)
    facing = about_axis("Y", heading)
    feet = [_foot(controls, time, side, stride_start) for side in (0, 1)]
    pelvis = multiply(facing, about_axis("X", _full(controls.tilt, time)))
    offsets = torch.as_tensor(HUMAN22.offsets.copy())
    hips = [rotate(pelvis, offsets[HUMAN22.index(name)]) for name in ("left_hip", "right_hip")]

    standing = HUMAN22.rest_joints()[0, 1] - 0.006
    wanted = standing - _full(controls.crouch, time) + _full(controls.lift, time)
    # The pelvis leans about itself; its weight stays over the feet by moving back as it tilts.
    back = -0.35 * torch.sin(_full(controls.tilt, time))
    flat = torch.stack(
        [x + back * heading.sin(), torch.zeros_like(x), z + back * heading.cos()], -1
    )
    reach = 0.9985 * (_THIGH + _SHANK)
    for (ankle, _), hip in zip(feet, hips, strict=True):
        gap = (ankle - flat - hip)[:, [0, 2]].norm(dim=-1)
        highest = ankle[:, 1] - hip[:, 1] + (reach**2 - gap**2).clamp(min=0.01).sqrt()
        wanted = torch.minimum(wanted, highest)
    root = flat + _smooth_below(wanted)[:, None] * flat.new_tensor([0.0, 1.0, 0.0])

    world: dict[str, Tensor] = {"pelvis": pelvis, "left_hip": pelvis, "right_hip": pelvis}
    _spine_and_arms(world, controls, time)
    for side, (ankle, turn), hip in zip(("left", "right"), feet, hips, strict=True):
        thigh, shank = _leg(root + hip, ankle, rotate(facing, offsets.new_tensor([0.0, 0.0, 1.0])))
        world |= {f"{side}_knee": thigh, f"{side}_ankle": shank, f"{side}_foot": turn}
    return torch.stack([world[name] for name in HUMAN22.names], dim=1), root


def _smooth_below(height: Tensor) -> Tensor:
    """Smooth over time, staying at or below the values (up to what smoothing leaves)."""
    for width in (2, 1):
        padded = torch.nn.functional.pad(height[None], (width, width), mode="replicate")[0]
        lowest = padded.unfold(0, 2 * width + 1, 1).min(dim=-1).values
        padded = torch.nn.functional.pad(lowest[None], (width, width), mode="replicate")[0]
        height = padded.unfold(0, 2 * width + 1, 1).mean(dim=-1)
    return height


def _spine_and_arms(world: dict[str, Tensor], controls: _Controls, time: Tensor) -> None:
    third = multiply(
        about_axis("Y", _full(controls.twist, time) / 3),
        about_axis("X", _full(controls.bend, time) / 3),
    )
    turn = world["pelvis"]
    for name in ("spine1", "spine2", "spine3"):
        turn = multiply(turn, third)
        world[name] = turn
    # The head looks half as far down as the back bends.
    nod = about_axis("X", -0.25 * _full(controls.bend, time))
    world["neck"] = multiply(turn, nod)
    world["head"] = multiply(world["neck"], nod)
    for side, name, sign in ((0, "left", 1.0), (1, "right", -1.0)):
        out, ahead = _full(controls.out[side], time), _full(controls.forward[side], time)
        world[f"{name}_collar"] = world[f"{name}_shoulder"] = turn
        hang = about_axis("Z", sign * (out - math.pi / 2))
        arm = multiply(hang, about_axis("X", _full(controls.roll[side], time)))
        world[f"{name}_elbow"] = multiply(turn, multiply(about_axis("X", -ahead), arm))
        bend = about_axis("Y", -sign * _full(controls.elbow[side], time))
        world[f"{name}_wrist"] = multiply(world[f"{name}_elbow"], bend)


def _foot(
    controls: _Controls, time: Tensor, side: int, stride_start: float
) -> tuple[Tensor, Tensor]:
    """Return places [frames, 3] of an ankle and the world turn [frames, 4] of its foot."""
    sign = 1.0 if side == 0 else -1.0
    out = sign * (_HALF_WIDTH + _full(controls.foot_out[side], time))
    ahead = _BALL + _full(controls.foot_forward[side], time)

    def plant(at: Tensor) -> tuple[Tensor, Tensor]:
        x, z, heading = controls.path(at)
        sine, cosine = heading.sin(), heading.cos()
        place = torch.stack([x + out * cosine + ahead * sine, z - out * sine + ahead * cosine], -1)
        return place, heading

    up = _full(controls.lift, time) + _full(controls.foot_up[side], time)
    pitch = 2.2 * up.clamp(0, 0.25)
    if controls.cadence:
        clock = controls.cadence * time + stride_start + side / 2
        stride, phase = clock.floor(), clock % 1
        middle = (stride + controls.stance / 2 - stride_start - side / 2) / controls.cadence
        (start, turned), (end, next_turned) = plant(middle), plant(middle + 1 / controls.cadence)
        through = ((phase - controls.stance) / (1 - controls.stance)).clamp(0, 1)
        ratio = _ease(through)
        distance = (end - start).norm(dim=-1) + 0.3 * (next_turned - turned).abs()
        amount = (distance / 0.3).clamp(max=1)  # feet that go nowhere stay down
        place = torch.lerp(start, end, ratio[:, None])
        heading = torch.lerp(turned, next_turned, ratio)
        up = up + controls.swing * amount * torch.sin(math.pi * through)
        late = _ease((phase - 0.6 * controls.stance) / (0.4 * controls.stance))
        pitch = pitch + 0.75 * amount * (late - _ease((phase - controls.stance) / 0.25))
    else:
        place, heading = plant(time)
    turn = multiply(about_axis("Y", heading), about_axis("X", pitch))
    ball = torch.stack([place[:, 0], up, place[:, 1]], dim=-1)
    foot = torch.as_tensor(HUMAN22.offsets[HUMAN22.index("left_foot")].copy())
    return ball - rotate(turn, foot), turn


def _leg(hip: Tensor, ankle: Tensor, ahead: Tensor) -> tuple[Tensor, Tensor]:
    """Return world turns of thigh and shank that bring the ankle to its place, knee forward.

    Out of reach, the leg is straight and the ankle falls short.
    """
    line = ankle - hip
    distance = line.norm(dim=-1).clamp(0.15, 0.9999 * (_THIGH + _SHANK))
    along = unit(line)
    side = unit(ahead - (ahead * along).sum(-1, keepdim=True) * along)
    cosine = (_THIGH**2 + distance**2 - _SHANK**2) / (2 * _THIGH * distance)
    knee_along = _THIGH * cosine
    knee_side = (_THIGH**2 - knee_along**2).clamp(min=0).sqrt()
    knee = knee_along[:, None] * along + knee_side[:, None] * side
    turns = []
    for bone in (knee, distance[:, None] * along - knee):
        up = -unit(bone)
        front = unit(side - (side * up).sum(-1, keepdim=True) * up)
        turns.append(torch.stack([torch.linalg.cross(up, front), up, front], dim=-1))
    return quaternion_from_matrix(turns[0]), quaternion_from_matrix(turns[1])
