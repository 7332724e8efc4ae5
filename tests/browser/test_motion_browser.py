"""Motions made in headless Chromium: they move while they are made; see `test_demo_browser.py`."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.browser.chromium import MARKS, Tab, demo, until

from blockloom.motion.bvh import read_bvh
from blockloom.motion.bvh_motion import bvh_to_motion

STATE = """() => {
  const root = document.querySelector('.bm'), canvas = root.querySelector('.bm-canvas');
  const paper = canvas.getContext('2d'), time = root.querySelector('.bm-time');
  let sum = 0;
  if (canvas.width) {
    const {data} = paper.getImageData(0, 0, canvas.width, canvas.height);
    for (let k = 0; k < data.length; k += 4) sum = (31 * sum + data[k] + 7 * data[k + 2]) % 1e9;
  }
  return {kind: root.dataset.kind, line: root.querySelector('.bm-line').textContent, sum,
          at: Number(root.dataset.shown || 0), frames: Number(root.dataset.frames || 0),
          total: Number(time.getAttribute('aria-valuemax') || -1) + 1,
          what: root.querySelector('.bm-what').textContent};
}"""
WIDTH = "() => [document.documentElement.scrollWidth, innerWidth]"

pytestmark = MARKS


@pytest.fixture(scope="module")
def address(tiny_motion: Path, free_port: Callable[[], int]) -> Iterator[str]:
    with demo(free_port(), [str(tiny_motion)]) as url:
        yield url


@pytest.fixture
def infill_address(tiny_infill: Path, free_port: Callable[[], int]) -> Iterator[str]:
    with demo(free_port(), [str(tiny_infill)]) as url:
        yield url


@pytest.fixture
def visit(new_page: Callable[..., Any], address: str) -> Callable[..., "Mover"]:
    return lambda *size, **sizes: Mover(new_page(*size, **sizes), address)


class Mover(Tab):
    """One person in front of one Motion tab."""

    STATE = STATE

    def __init__(self, page: Any, address: str) -> None:
        super().__init__(page, address, "Motion", ".bm[data-ready]")
        page.locator(".bm-details summary").click()

    def wish(self, *parts: tuple[str, float], seed: int = 7) -> None:
        self.page.locator(".bm-seed").fill(str(seed))
        for k, (text, seconds) in enumerate(parts):
            if k:
                self.page.locator(".bm-add").click()
            row = self.page.locator(".bm-part").nth(k)
            row.locator(".bm-text").fill(text)
            row.locator(".bm-seconds").fill(str(seconds))
        self.page.locator(".bm-make").click()

    def done(self) -> dict[str, Any]:
        state = self.until(lambda s: s["kind"] in ("done", "failed", "stopped"), "never over")
        assert state["kind"] == "done", state
        # The bar of time is painted a frame after the words beside it.
        return self.until(lambda s: s["frames"] == s["total"], "the bar never has the length")

    def still(self) -> int:
        """Wait until nothing moves any more; returns what is then painted."""
        last = -1

        def rests() -> bool:
            nonlocal last
            before, last = last, self.state["sum"]
            self.page.wait_for_timeout(200)
            return before == last

        until(rests, "it does not come to rest")
        return last

    def saved(self, form: str, path: Path) -> str:
        with self.page.expect_download() as download:
            self.page.locator(f"[data-form={form}]").click()
        download.value.save_as(path)
        name: str = download.value.suggested_filename
        return name

    def joints(self, path: Path) -> np.ndarray:
        """Save as BVH and read it."""
        self.saved("bvh", path)
        joints: np.ndarray = bvh_to_motion(read_bvh(path), scale=0.01).joints
        return joints


def test_the_figure_moves_while_it_is_made(visit: Callable[..., Mover], tmp_path: Path) -> None:
    mover = visit()
    mover.shot("motion_start")
    mover.wish(("walk <script>alert(1)</script>", 30), ("bend down", 20))
    early = mover.until(lambda s: s["frames"] > 8, "nothing arrives")
    assert early["kind"] == "making" and early["frames"] < early["total"] == 1000
    later = mover.until(lambda s: s["sum"] != early["sum"] and s["at"] > early["at"], "it is still")
    assert later["kind"] == "making" and later["frames"] < 1000
    mover.shot("motion_making")
    state = mover.done()
    assert (
        state["line"].startswith("50.0 s of motion, 1000 frames, in ") and "seed 7" in state["line"]
    )
    mover.shot("motion_done")
    assert mover.saved("bvh", tmp_path / "a.bvh") == "walk-script-alert-1-script-bend-down.bvh"
    motion = bvh_to_motion(read_bvh(tmp_path / "a.bvh"), scale=0.01)
    assert len(motion) == 1000 and motion.fps == 20
    for form, magic in (("glb", b"glTF"), ("npz", b"PK")):
        mover.saved(form, tmp_path / f"a.{form}")
        assert magic in (tmp_path / f"a.{form}").read_bytes()[:12]
    assert mover.errors == []
    hosts = {re.sub(r"^(\w+://[^/:]+).*", r"\1", url) for url in mover.requests}
    assert {host for host in hosts if host.startswith("http")} == {"http://127.0.0.1"}


def test_stop_keeps_what_is_there_and_errors_are_one_line(visit: Callable[..., Mover]) -> None:
    mover = visit()
    mover.wish(("walk", 60))
    mover.until(lambda s: s["frames"] >= 8, "nothing arrives")
    mover.page.locator(".bm-stop").click()
    mover.until(lambda s: s["kind"] == "stopped", "never stops")
    stopped = mover.until(lambda s: s["frames"] == s["total"], "the bar never has the length")
    assert 8 <= stopped["frames"] == stopped["total"] < 1200
    mover.wish(("walk", 61))
    failed = mover.until(lambda s: s["kind"] == "failed", "no error")
    assert "try 60" in failed["line"] and failed["frames"] == stopped["frames"]
    mover.shot("motion_error")
    mover.wish(("walk", 1))
    assert mover.done()["total"] == 20
    mover.page.locator(".bm-back").click()
    assert mover.until(lambda s: s["frames"] != 20, "no way back")["frames"] == stopped["frames"]
    assert mover.errors == []


def test_the_hand_moves_time_and_view(visit: Callable[..., Mover]) -> None:
    mover = visit()
    page = mover.page
    mover.wish(("walk", 2))
    mover.done()
    page.locator(".bm-play").click()  # pause
    box = page.locator(".bm-time").bounding_box()
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 40)
    still = mover.until(lambda s: abs(s["at"] - 20) < 1, "it does not jump there")
    page.keyboard.press("ArrowRight")
    after = mover.until(lambda s: s["at"] > still["at"], "no next frame")
    assert after["at"] == pytest.approx(still["at"] + 1, abs=0.02)
    page.keyboard.press("ArrowLeft")
    back = mover.until(lambda s: s["at"] == still["at"], "not back")
    canvas = page.locator(".bm-canvas").bounding_box()
    middle = (canvas["x"] + canvas["width"] / 2, canvas["y"] + canvas["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(middle[0] + 120, middle[1] + 30, steps=4)
    page.mouse.up()
    mover.until(lambda s: s["sum"] != back["sum"], "the view does not turn")
    turned = mover.still()
    page.mouse.wheel(0, 300)
    mover.until(lambda s: s["sum"] != turned, "no zoom")
    assert mover.still() != back["sum"]
    page.locator(".bm-home").click()
    home = mover.until(lambda s: s["sum"] == back["sum"], "no way back to the first view")
    assert home["at"] == still["at"]
    page.locator(".bm-speed").select_option("2")
    page.locator(".bm-loop").click()  # off
    page.locator(".bm-play").click()
    assert mover.until(lambda s: s["at"] == 39, "it does not end")["frames"] == 40
    assert mover.errors == []


def test_a_span_is_redrawn(
    new_page: Callable[..., Any], infill_address: str, tmp_path: Path
) -> None:
    mover = Mover(new_page(), infill_address)
    page = mover.page
    mover.wish(("walk", 2))
    mover.done()
    old = mover.joints(tmp_path / "a.bvh")
    page.locator(".bm-play").click()
    page.locator(".bm-time").focus()
    page.keyboard.press("Home")
    for _ in range(12):
        page.keyboard.press("ArrowRight")
    mover.until(lambda s: s["at"] == 12, "the moment stays")
    page.locator("[data-mode=span]").click()
    assert mover.state["what"].startswith("0.60 s to 1.20 s is made anew")
    box = page.locator(".bm-time").bounding_box()
    end = box["x"] + 24 / 40 * box["width"]
    page.mouse.move(end, box["y"] + 34)
    page.mouse.down()
    page.mouse.move(box["x"] + 28 / 40 * box["width"], box["y"] + 34, steps=3)
    page.mouse.up()
    assert mover.state["what"].startswith("0.60 s to 1.40 s")
    page.locator(".bm-words").fill("wave")
    mover.shot("motion_span")
    page.locator(".bm-do").click()
    mover.done()
    new = mover.joints(tmp_path / "b.bvh")
    assert len(new) == len(old) == 40
    assert np.abs(new[:12] - old[:12]).max() < 1e-5 and np.abs(new[28:] - old[28:]).max() < 1e-5
    assert np.abs(new[12:28] - old[12:28]).max() > 1e-3
    mover.shot("motion_redrawn")
    assert mover.errors == []


def test_an_opened_bvh_is_gone_on_with(visit: Callable[..., Mover], tmp_path: Path) -> None:
    mover = visit()
    page = mover.page
    mover.wish(("walk", 1))
    mover.done()
    old = mover.joints(tmp_path / "a.bvh")
    page.locator(".bm-file").set_input_files(tmp_path / "a.bvh")
    opened = mover.until(lambda s: "a.bvh" in s["line"] and s["kind"] == "done", "not opened")
    assert opened["frames"] == 20
    assert page.locator("[data-mode=span]").is_hidden()  # this model makes frames in order
    page.locator(".bm-play").click()
    page.locator(".bm-time").focus()
    page.keyboard.press("End")
    mover.until(lambda s: s["at"] == 19, "not at the end")
    page.locator("[data-mode=on]").click()
    assert mover.state["what"].startswith("Everything up to 1.00 s stays")
    page.locator(".bm-more").fill("0.6")
    page.locator(".bm-words").fill("jump")
    page.locator(".bm-words").press("Enter")
    mover.until(lambda s: s["total"] == 32, "it does not begin")
    mover.done()
    new = mover.joints(tmp_path / "b.bvh")
    assert len(new) == 32
    shift = new[0, 0] - old[0, 0]  # an opened motion is put on the floor
    assert np.abs(new[:20] - old - shift).max() < 1e-4
    (tmp_path / "bad.bvh").write_text("HIERARCHY\nROOT a\n{\n")
    page.locator(".bm-file").set_input_files(tmp_path / "bad.bvh")
    failed = mover.until(lambda s: s["kind"] == "failed", "no error")
    assert "bvh" in failed["line"].lower() and failed["frames"] == 32
    assert mover.errors == []


def test_two_people_do_not_mix(visit: Callable[..., Mover], tmp_path: Path) -> None:
    one, other = visit(), visit()
    one.wish(("walk", 2), seed=1)
    other.wish(("jump", 1), seed=2)
    assert (one.done()["total"], other.done()["total"]) == (40, 20)
    assert "seed 1" in one.state["line"] and "seed 2" in other.state["line"]
    assert one.saved("bvh", tmp_path / "a.bvh") == "walk.bvh"
    assert len(other.joints(tmp_path / "b.bvh")) == 20
    assert one.errors == other.errors == []


def test_a_phone_in_the_dark(visit: Callable[..., Mover]) -> None:
    mover = visit(390, 844)
    page = mover.page
    mover.wish(("walk", 2))
    mover.done()
    assert page.evaluate(WIDTH) == [390, 390]
    mover.shot("motion_phone")
    page.locator(".bm-play").click()  # pause: from now on only the colours change
    light = mover.still()
    page.evaluate("() => document.body.classList.add('dark')")
    mover.until(lambda s: s["sum"] != light, "it does not turn dark")
    page.locator("[data-mode=on]").click()
    mover.shot("motion_phone_dark")
    assert page.evaluate(WIDTH) == [390, 390] and mover.errors == []
