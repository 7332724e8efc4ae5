"""Balls move as physics says, are drawn where they are, and depend on seed and number only."""

import numpy as np
import pytest

from blockloom.core.errors import UsageError
from blockloom.training import physics
from blockloom.training.physics import (
    ACTIONS,
    COLORS,
    GRAVITY,
    GROUNDS,
    SCENES,
    World,
    held_out_kinds,
    physics_clip,
    physics_clips,
    track,
)


def world(place, speed, radius, **settings) -> World:
    place = np.array(place, dtype=np.float64)
    bounds = np.zeros_like(place), np.ones_like(place)
    return World(place, np.array(speed, float), np.array(radius, float), *bounds, **settings)


def words(caption: str) -> tuple[str, str]:
    """Colour of the first ball, and of the ground."""
    return caption.split()[1], caption.split()[-1]


@pytest.mark.parametrize("scene", [s for s in SCENES if s != "fade"])
def test_elastic_scenes_keep_their_energy(scene):
    for index in range(5):
        energies = physics_clip(scene, 3, index, num_frames=50, size=4).energies
        assert energies[0] > 1e-4
        assert np.ptp(energies) < 1e-12 * energies[0]


def test_a_lossy_ball_loses_energy_at_bounces_only_and_comes_to_rest():
    ball = world([[0.5, 0.5]], [[0.0, 0.0]], [0.1], gravity=GRAVITY, keep=0.5)
    start = ball.energy()
    assert ball.step(0.5) == 0
    assert ball.energy() == pytest.approx(start, rel=1e-12)
    assert ball.step(0.4) == 1
    assert ball.energy() == pytest.approx(start / 4, rel=1e-9)
    ball.step(20.0)
    assert ball.resting.tolist() == [True]
    assert ball.place[0].tolist() == pytest.approx([0.5, 0.9])
    assert ball.energy() == pytest.approx(0.0, abs=1e-12)


def test_free_fall_takes_the_time_of_the_formula():
    ball = world([[0.5, 0.2]], [[0.0, 0.0]], [0.1], gravity=2.0)
    # It falls 0.7 to the floor, sqrt(2 * 0.7 / 2) s, and is back where it was after twice that.
    ball.step(2 * 0.7**0.5)
    assert ball.place[0].tolist() == pytest.approx([0.5, 0.2], abs=1e-9)
    ball.step(0.7**0.5)
    assert ball.place[0, 1] == pytest.approx(0.9, abs=1e-9)


def test_equal_balls_swap_speeds_and_momentum_is_kept():
    balls = world([[0.2, 0.5], [0.8, 0.5]], [[0.5, 0.0], [-0.25, 0.0]], [0.1, 0.1])
    assert balls.step(0.4 / 0.75 + 0.1) == 1
    assert balls.speed.tolist() == [pytest.approx([-0.25, 0.0]), pytest.approx([0.5, 0.0])]
    oblique = world([[0.2, 0.45], [0.8, 0.55]], [[0.5, 0.1], [-0.5, 0.0]], [0.1, 0.15])
    momentum, energy = oblique.momentum(), oblique.energy()
    before = oblique.speed.copy()
    assert oblique.step(0.5) == 1
    assert oblique.momentum() == pytest.approx(momentum, abs=1e-12)
    assert oblique.energy() == pytest.approx(energy, rel=1e-12)
    assert abs(oblique.speed - before).min() > 0.01


@pytest.mark.parametrize("scene", SCENES)
def test_balls_stay_apart_and_inside(scene):
    for index in range(4):
        clip = physics_clip(scene, 1, index, num_frames=40, size=4, pushes=index % 2 == 1)
        assert clip.places.min() > 0.089 and clip.places.max() < 0.911
        if clip.places.shape[1] == 2:
            assert np.linalg.norm(clip.places[:, 0] - clip.places[:, 1], axis=1).min() > 0.179


def test_the_scene_collide_collides_and_the_wall_parts():
    for index in range(6):
        speeds = np.diff(physics_clip("collide", 0, index, num_frames=20, size=4).places, axis=0)
        assert speeds[0, 0, 0] > 0 > speeds[0, 1, 0]
        assert (speeds[:, 0, 0] < speeds[0, 0, 0] - 1e-6).any()
        places = physics_clip("wall", 0, index, num_frames=30, size=4).places
        assert places[:, 0, 0].max() < places[:, 1, 0].min()


@pytest.mark.parametrize("scene", SCENES)
def test_balls_are_drawn_where_they_are(scene):
    clip = physics_clip(scene, 0, 3, num_frames=12, size=48)
    found = track(clip.frames, *words(clip.caption))
    assert abs(found - clip.places[:, 0]).max() * 48 < 0.05


def test_edges_are_smooth_at_any_size():
    for size in (5, 16, 33):
        frame = physics.draw(np.full((1, 1, 2), 0.5), [((255, 255, 255), 0.3)], (0, 0, 0), size)[0]
        area = frame[..., 0].sum() / 255 / size**2
        assert area == pytest.approx(np.pi * 0.09, rel=0.06)
        assert ((frame > 0) & (frame < 255)).any()
    small = physics_clip("juggle", 0, 0, size=16)
    large = physics_clip("juggle", 0, 0, size=64)
    assert (small.places == large.places).all() and small.caption == large.caption
    box = large.frames.reshape(16, 16, 4, 16, 4, 3).mean(axis=(2, 4))
    assert abs(box - small.frames).mean() < 1.5


def test_an_action_moves_its_frame_to_the_next():
    clip = physics_clip("bounce", 5, 0, num_frames=30, size=4, fps=20, pushes=True)
    same = physics_clip("bounce", 5, 0, num_frames=30, size=4, fps=20)
    assert clip.actions is not None and clip.actions[-1] == -1
    first = int(np.flatnonzero(clip.actions > 0)[0])
    assert (clip.places[: first + 1] == same.places[: first + 1]).all()
    moved = (clip.places - same.places)[first + 1, 0]
    push = np.array(physics.PUSH[ACTIONS[clip.actions[first]]]) / 20
    assert moved == pytest.approx(push, abs=1e-9)


def test_a_push_lifts_a_resting_ball():
    ball = world([[0.5, 0.9]], [[0.0, 0.0]], [0.1], gravity=GRAVITY, keep=0.7)
    ball.step(1.0)
    assert ball.resting[0]
    ball.push(physics.PUSH["up"])
    ball.step(0.1)
    assert ball.place[0, 1] == pytest.approx(0.9 - 0.08 + 0.5 * GRAVITY * 0.01)


def test_clips_depend_on_seed_and_number_only():
    one = physics_clips(6, 2, 4, num_frames=4, size=8, pushes=True)
    two = physics_clips(6, 2, 4, num_frames=4, size=8, pushes=True)
    other = physics_clips(6, 2, 5, num_frames=4, size=8, pushes=True)
    assert (one.frames == two.frames).all() and (one.actions == two.actions).all()
    assert (one.frames != other.frames).any()
    more = physics_clips(7, 0, 4, num_frames=4, size=8, pushes=True)
    assert (more.frames[:24] == one.frames[:24]).all()
    assert one.actions[3::4].tolist() == [-1] * 8
    assert one.action_names == ACTIONS and one.num_actions == 4


def test_held_out_kinds_are_new_but_their_words_are_not():
    data = physics_clips(60, 12, num_frames=1, size=4)
    assert data.split.count("held_out") == 12
    unseen = held_out_kinds()
    assert len(unseen) == 12
    train = [words(caption) for caption in data.only("train").captions]
    assert {color for color, _ in train} == set(COLORS)
    assert {ground for _, ground in train} == set(GROUNDS)
    captions = set(data.only("train").captions)
    assert not captions & set(data.only("held_out").captions)
    assert {scene for scene, _, _ in unseen} <= set(SCENES)


def test_captions_tell_what_happens():
    clip = physics_clip("drift", 0, 0, num_frames=2, size=4, colors=("red", "navy"))
    assert clip.caption.startswith("a red ball drifts ") and clip.caption.endswith(" on navy")
    step = clip.places[1, 0] - clip.places[0, 0]
    heading = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}
    axis, sign = heading[clip.caption.split()[4]]
    assert np.sign(step[axis]) == sign and abs(step[axis]) >= abs(step[1 - axis])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scene": "bounse"}, "'bounce'"),
        ({"num_frames": 0}, "num_frames"),
        ({"size": 3}, "size"),
        ({"fps": float("nan")}, "fps"),
        ({"seed": -1}, "seed"),
        ({"colors": ("blue", "navy")}, "ball color"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UsageError, match=message):
        physics_clip(**({"scene": "drift", "seed": 0} | settings))
