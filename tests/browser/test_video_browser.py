"""Videos made in headless Chromium: they play while they are made; see `test_demo_browser.py`."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tests.browser.chromium import MARKS, Tab, demo

from blockloom.pipelines.video_media import read_video_metadata

STATE = """() => {
  const root = document.querySelector('.bv'), film = root.querySelector('video');
  const seconds = film.buffered.length ? film.buffered.end(film.buffered.length - 1) : 0;
  return {kind: root.dataset.kind, line: root.querySelector('.bv-line').textContent,
          seconds, at: film.currentTime, width: film.videoWidth, is_film: !film.hidden,
          shown: Number(root.dataset.shown || 0), loops: film.loop};
}"""

pytestmark = MARKS


@pytest.fixture(scope="module")
def address(tiny_clips: Path, free_port: Callable[[], int]) -> Iterator[str]:
    with demo(free_port(), [str(tiny_clips)]) as url:
        yield url


@pytest.fixture
def visit(new_page: Callable[..., Any], address: str) -> Callable[..., "Viewer"]:
    return lambda *size, **sizes: Viewer(new_page(*size, **sizes), address)


class Viewer(Tab):
    """One person in front of one Video tab."""

    STATE = STATE

    def __init__(self, page: Any, address: str) -> None:
        super().__init__(page, address, "Video", ".bv[data-ready]")

    def wish(self, prompt: str, frames: int, seed: int = 7) -> None:
        self.page.locator(".bv-frames").fill(str(frames))
        self.page.locator(".bv-seed").fill(str(seed))
        self.page.locator(".bv-prompt").fill(prompt)
        self.page.locator(".bv-prompt").press("Enter")


def test_a_video_plays_while_it_is_made(visit: Callable[..., Viewer], tmp_path: Path) -> None:
    viewer = visit()
    viewer.shot("video_start")
    viewer.wish("a fox <script>", 120)
    early = viewer.until(lambda s: s["seconds"] > 0, "nothing arrives")
    assert early["kind"] == "making" and early["is_film"]
    moving = viewer.until(lambda s: s["at"] > 0, "it does not play")
    assert moving["seconds"] < 15
    viewer.shot("video_making")
    done = viewer.until(lambda s: s["kind"] == "done", "never done")
    assert done["line"].startswith("120 frames in ") and "seed 7" in done["line"]
    assert viewer.until(lambda s: s["seconds"] >= 14.9, "not whole")["width"] == 128
    viewer.shot("video_done")
    with viewer.page.expect_download() as download:
        viewer.page.locator(".bv-get").click()
    assert download.value.suggested_filename == "a-fox-script-.mp4"
    download.value.save_as(tmp_path / "a.mp4")
    assert read_video_metadata(tmp_path / "a.mp4")["seed"] == 7
    assert viewer.errors == []


def test_stop_keeps_what_is_there_and_errors_are_one_line(visit: Callable[..., Viewer]) -> None:
    viewer = visit()
    viewer.wish("a fox", 240)
    viewer.until(lambda s: s["seconds"] > 0.5, "nothing arrives")
    viewer.page.locator(".bv-stop").click()
    stopped = viewer.until(lambda s: s["kind"] == "stopped", "never stops")
    assert 0 < int(stopped["line"].split()[0]) < 240
    viewer.wish("a fox", 241)
    failed = viewer.until(lambda s: s["kind"] == "failed", "no error")
    assert "try 240" in failed["line"]
    viewer.shot("video_error")
    viewer.wish("a fox", 4)
    viewer.until(lambda s: s["kind"] == "done", "never done")
    viewer.until(lambda s: s["loops"], "it does not play again and again")
    assert viewer.errors == []


def test_frames_where_no_mp4_plays(visit: Callable[..., Viewer], tmp_path: Path) -> None:
    viewer = visit()
    viewer.page.evaluate("() => { document.querySelector('.bv').dataset.form = 'frames'; }")
    pixels = np.zeros((40, 60, 3), np.uint8) + np.uint8([250, 120, 0])
    Image.fromarray(pixels).save(tmp_path / "first.png")
    with viewer.page.expect_file_chooser() as chooser:
        viewer.page.get_by_text("upload …").click()
    chooser.value.set_files(tmp_path / "first.png")
    viewer.page.get_by_role("button", name="your picture").wait_for()
    viewer.wish("a fox", 5)
    viewer.until(lambda s: s["kind"] == "done", "never done")
    state = viewer.until(lambda s: s["shown"] >= 6, "it does not go on")
    assert not state["is_film"]
    viewer.shot("video_frames")


def test_a_phone(visit: Callable[..., Viewer]) -> None:
    viewer = visit(390, 844)
    viewer.wish("a fox", 8)
    viewer.until(lambda s: s["kind"] == "done", "never done")
    width = "() => [document.documentElement.scrollWidth, innerWidth]"
    assert viewer.page.evaluate(width) == [390, 390]
    viewer.shot("video_phone")
