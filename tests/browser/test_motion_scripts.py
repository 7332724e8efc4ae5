"""The numbers behind the Motion tab's player: projection, playing, time line; in a bare page."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.browser.chromium import MARKS

from blockloom.demo import motion_page

pytestmark = MARKS
SCRIPTS = Path(motion_page.__file__).parent


@pytest.fixture
def run(new_page: Callable[..., Any]) -> Callable[..., Any]:
    page = new_page()
    for name in ("motion_view.js", "motion_paint.js"):
        page.add_script_tag(content=(SCRIPTS / name).read_text(encoding="utf-8"))
    return lambda script, *args: page.evaluate(f"(args) => {{ {script} }}", list(args))


def test_projection(run: Callable[..., Any]) -> None:
    camera = {"target": [1.0, 0.9, -2.0], "yaw": 0.7, "pitch": 0.3, "distance": 4.0}
    rng = np.random.default_rng(0)
    places = rng.normal(size=(6, 3)).tolist()
    script = "const lens = MotionView.aim(args[0], 600, 400);" \
        "return args[1].map((p) => MotionView.project(lens, p));"  # fmt: skip
    got = np.array(run(script, camera, [camera["target"], *places]))
    assert np.allclose(got[0], [300, 200, 1.55 * 400 / 4, 4])
    # The same, by turning the world instead of the camera: about Y, then about X.
    yaw, pitch = camera["yaw"], camera["pitch"]
    about_y = np.array([[math.cos(yaw), 0, -math.sin(yaw)], [0, 1, 0],
                        [math.sin(yaw), 0, math.cos(yaw)]])  # fmt: skip
    about_x = np.array([[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)],
                        [0, math.sin(pitch), math.cos(pitch)]])  # fmt: skip
    local = (np.array(places) - camera["target"]) @ (about_x @ about_y).T
    far = 4 - local[:, 2]
    in_front = far > 0.05
    wanted = np.stack([300 + 620 * local[:, 0] / far, 200 - 620 * local[:, 1] / far], 1)
    assert in_front.sum() >= 4 and np.allclose(got[1:][in_front, :2], wanted[in_front])
    # With the pitch up, the floor in front of the target is lower in the picture.
    assert got[0][1] < run(
        "return MotionView.project(MotionView.aim(args[0], 600, 400), args[1]);",
        camera, [1.0, 0.0, -2.0],
    )[1]  # fmt: skip


def test_lines_behind_the_eye_are_cut(run: Callable[..., Any]) -> None:
    script = "const lens = MotionView.aim({target: [0, 0, 0], yaw: 0, pitch: 0, distance: 2}, " \
        "100, 100); return MotionView.line(lens, args[0], args[1]);"  # fmt: skip
    assert run(script, [0, 0, 3], [1, 0, 5]) is None
    (near, far) = run(script, [0, 1, 5], [0, 1, -1])
    assert near[3] == pytest.approx(0.05) and far[3] == pytest.approx(3)
    assert far[1] == pytest.approx(50 - 155 / 3)


def test_turning_and_zooming_keep_their_limits(run: Callable[..., Any]) -> None:
    camera = {"target": [0, 0, 0], "yaw": 0, "pitch": 0.2, "distance": 4}
    script = "return MotionView.orbit(args[0], args[1], args[2]);"
    turned = run(script, camera, 100, 50)
    assert turned["yaw"] == pytest.approx(-0.8) and turned["pitch"] == pytest.approx(0.5)
    assert run(script, camera, 0, 10**4)["pitch"] == 1.5
    assert run(script, camera, 0, -(10**4))["pitch"] == -0.02
    zoom = "return MotionView.zoom(args[0], args[1], 2).distance;"
    assert [run(zoom, camera, factor) for factor in (0.5, 1e-9, 1e9)] == [2, 1.8, 28]


def test_a_clip_grows_and_is_read_between_frames(run: Callable[..., Any]) -> None:
    script = """
      const clip = MotionView.clip(2);
      for (let k = 0; k < 200; k++) clip.append(new Float32Array([k, 0, 0, 0, k, 1]));
      return [clip.count, clip.pose(99.25), clip.pose(500), clip.pose(-3), clip.place(7, 1),
              MotionView.about(clip, 100, 5), MotionView.ground(clip, 2)];"""
    count, between, over, under, place, about, ground = run(script)
    assert count == 200 and between == [[99.25, 0, 0], [0, 99.25, 1]]
    assert over == [[199, 0, 0], [0, 199, 1]] and under == [[0, 0, 0], [0, 0, 1]]
    assert place == [0, 7, 1] and about == pytest.approx([100, 0, 0]) and ground == 0


def test_playing_goes_round_or_waits(run: Callable[..., Any]) -> None:
    state = {"fps": 20, "speed": 1, "count": 41, "loops": True, "grows": False}
    script = "return MotionView.next(args[0], args[1], args[2]);"
    assert run(script, 10, 0.1, state) == {"at": 12, "over": False}
    assert run(script, 10, 0.1, state | {"speed": 0.5})["at"] == 11
    assert run(script, 39, 0.1, state) == {"at": 1, "over": False}
    assert run(script, 39, 0.1, state | {"loops": False}) == {"at": 40, "over": True}
    assert run(script, 39, 0.1, state | {"grows": True}) == {"at": 40, "over": False}
    assert run(script, 0, 0.1, state | {"count": 0, "grows": True}) == {"at": 0, "over": False}
    # Nothing has come yet: the moment that will be played from stays.
    assert run(script, 40, 0.1, state | {"count": 0, "grows": True}) == {"at": 40, "over": False}
    assert run(script, 40, 0.1, state | {"count": 0}) == {"at": 0, "over": True}


def test_the_time_line(run: Callable[..., Any]) -> None:
    tick = "return MotionView.tick(args[0], args[1]);"
    assert [run(tick, *pair) for pair in ((4, 560), (60, 560), (600, 300), (1, 560))] == [
        0.5, 10, 120, 0.25
    ]  # fmt: skip
    snap = "return MotionView.snap(args[0], args[1], 4, args[2]);"
    assert run(snap, 5, 13, 40) == [4, 12]
    assert run(snap, 13, 5, 40) == [4, 12]
    assert run(snap, 39, 41, 42) == [36, 40]
    assert run(snap, 6, 6, 40) == [8, 12] and run(snap, -5, 99, 40) == [0, 40]


def test_painting_shows_the_figure_in_light_and_dark(run: Callable[..., Any]) -> None:
    script = """
      const sheet = new OffscreenCanvas(200, 200), paper = sheet.getContext("2d");
      const body = {parents: [-1, 0, 1], height: 1.7, head: 2, headRadius: 0.12, bones: [
        {joint: 1, parent: 0, radius: 0.06, side: "left"},
        {joint: 2, parent: 1, radius: 0.06, side: "right"}]};
      const frames = MotionView.clip(3);
      frames.append(new Float32Array([0, 0.1, 0, 0, 0.8, 0, 0, 1.5, 0]));
      const camera = {target: [0, 0.8, 0], yaw: 0, pitch: 0.1, distance: 4};
      const lens = MotionView.aim(camera, 200, 200);
      return [false, true].map((dark) => {
        MotionPaint.scene(paper, lens, {frames, at: 0, body, level: 0}, MotionPaint.palette(dark));
        const seen = (y) => [...paper.getImageData(100, y, 1, 1).data].slice(0, 3);
        return [seen(128), seen(72), seen(5)];
      });"""
    for lower, upper, sky in run(script):
        assert lower[2] > lower[0] + 60  # left is blue
        assert upper[0] > upper[2] + 60  # right is orange
        assert max(sky) - min(sky) < 16
