"""Worlds played in headless Chromium with real key presses; see `test_demo_browser.py`."""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser.chromium import MARKS, Tab, demo, until

STATE = """() => {
  const root = document.querySelector('.bw'), canvas = root.querySelector('canvas');
  const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
  let sum = 0;
  for (let i = 0; i < pixels.length; i++) sum = (sum * 31 + pixels[i]) % 4294967291;
  return {kind: root.dataset.kind, line: root.querySelector('.bw-line').textContent,
          frames: Number(root.dataset.frames || 0), fps: Number(root.dataset.fps || 0),
          keys: root.dataset.keys, sum, width: canvas.width,
          shown: canvas.getBoundingClientRect().width};
}"""

pytestmark = MARKS


@pytest.fixture(scope="module")
def address(tiny_world: Path, free_port: Callable[[], int]) -> Iterator[str]:
    with demo(free_port(), [os.environ.get("BLOCKLOOM_WORLD") or str(tiny_world)]) as url:
        yield url


@pytest.fixture
def visit(new_page: Callable[..., Any], address: str) -> Callable[..., "Player"]:
    return lambda *size, **sizes: Player(new_page(*size, **sizes), address)


class Player(Tab):
    """One person in front of one World tab."""

    STATE = STATE

    def __init__(self, page: Any, address: str) -> None:
        super().__init__(page, address, "World", ".bw[data-ready]")
        self.started = self.until(lambda s: s["sum"], "no start picture")

    def click(self, name: str) -> None:
        self.page.locator(f".bw-{name}").click()

    def seed(self, number: int) -> None:
        self.page.locator(".bw-seed").fill(str(number))
        self.click("reset")
        self.page.locator(".bw-seed").blur()
        self.until(lambda s: s["kind"] == "idle" and s["sum"] == self.started["sum"], "no reset")

    def stands_still(self) -> bool:
        """Tell whether nothing changes for a while: a step may be underway at a stop."""
        before = self.state
        time.sleep(0.5)
        return self.state == before

    def play(self, key: str | None, frames: int) -> list[int]:
        """Hold a key for that many new frames; returns a number for the picture of each."""
        self.page.evaluate(f"""() => {{
          window.sums = []; const state = {STATE};
          window.watcher = new MutationObserver(() => window.sums.push(state().sum));
          window.watcher.observe(document.querySelector('.bw'),
                                 {{attributes: true, attributeFilter: ['data-frames']}});
        }}""")
        if key is None:
            self.click("play")
        else:
            self.page.keyboard.down(key)
        before = self.state["frames"]
        self.until(lambda s: s["frames"] >= before + frames, "no frames")
        if key is not None:
            self.page.keyboard.up(key)
        self.click("play")
        self.until(lambda s: s["kind"] == "paused", "never stops")
        until(self.stands_still, "a step that was underway never ends")
        sums: list[int] = self.page.evaluate("() => { window.watcher.disconnect(); return sums }")
        return sums


def test_frames_come_fast_enough_and_follow_the_keys(visit: Callable[..., Player]) -> None:
    player = visit()
    player.shot("world_start")
    seen = {}
    for key in ("ArrowLeft", "ArrowRight", "ArrowLeft"):
        player.seed(7)
        sums = player.play(key, 8)
        assert len(set(sums)) == len(sums)  # every frame is a new one
        if key in seen:
            assert sums[:8] == seen[key]  # same seed, same keys, same world
        seen[key] = sums[:8]
    assert not set(seen["ArrowLeft"]) & set(seen["ArrowRight"])
    player.page.keyboard.down("ArrowUp")
    # The rate is that of the last two seconds; another process may have taken the machine.
    state = player.until(
        lambda s: s["kind"] == "playing" and s["fps"] >= 10, "never ten frames per second"
    )
    player.shot("world_playing")
    assert state["keys"] == "ArrowUp"
    time.sleep(2.5)
    assert player.state["fps"] <= 13.5  # no faster than the world was recorded
    assert state["shown"] == state["width"] * (state["shown"] // state["width"]) >= 160
    assert player.page.locator(".bw-key.bw-on").get_attribute("data-key") == "ArrowUp"
    player.page.keyboard.up("ArrowUp")
    assert player.page.evaluate("() => scrollY") == 0 and player.errors == []
    assert {url.split("/")[2].split(":")[0] for url in player.requests if "//" in url} == {
        "127.0.0.1"
    }


def test_stop_and_reset(visit: Callable[..., Player]) -> None:
    player = visit()
    player.seed(3)
    first = player.play("ArrowRight", 5)
    stopped = player.state
    assert stopped["line"].startswith("Stopped at frame ") and "seed 3" in stopped["line"]
    time.sleep(0.5)
    assert player.state["frames"] == stopped["frames"] and player.state["sum"] == first[-1]
    player.click("reset")
    state = player.until(lambda s: s["kind"] == "idle", "no reset")
    player.until(lambda s: s["sum"] == player.started["sum"], "not the start")
    assert state["frames"] == 0
    assert player.play("ArrowRight", 5)[:5] == first[:5]
    player.page.locator(".bw-start").nth(1).click()
    player.until(lambda s: s["sum"] != player.started["sum"], "the same start")
    assert player.play("ArrowRight", 5)[:5] != first[:5]
    assert player.errors == []


def test_two_players_do_not_mix(visit: Callable[..., Player]) -> None:
    one, other = visit(), visit()
    for player in (one, other):
        player.seed(11)
    alone = one.play("ArrowLeft", 10)[:10]
    one.seed(11)
    other.page.keyboard.down("ArrowRight")  # goes on all the while, from the same start and seed
    other.until(lambda s: s["frames"] > 2, "no frames")
    assert one.play("ArrowLeft", 10)[:10] == alone
    assert other.state["keys"] == "ArrowRight" and other.state["kind"] == "playing"
    one.click("reset")
    frames = other.state["frames"]
    other.until(lambda s: s["frames"] > frames + 2, "somebody else's reset stopped it")


def test_fork_save_and_load(visit: Callable[..., Player], tmp_path: Path) -> None:
    player = visit()
    player.seed(5)
    player.play("ArrowUp", 3)
    here = player.state["sum"]
    with player.page.expect_download() as download:
        player.click("save")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert re.fullmatch(r"[\w-]+-frame-\d+\.safetensors", path.name)
    player.click("fork")
    player.until(lambda s: s["line"].startswith("World 2 goes on"), "no fork")
    left = player.play("ArrowLeft", 4)[:4]
    player.shot("world_fork")
    player.page.locator(".bw-pick").first.click()
    player.until(lambda s: s["sum"] == here, "the first world moved")
    assert player.play("ArrowLeft", 4)[:4] == left  # a fork goes on as the first would have
    with player.page.expect_file_chooser() as chooser:
        player.click("load")
    chooser.value.set_files(path)
    player.until(lambda s: s["line"].startswith("Loaded") and s["sum"] == here, "not loaded")
    assert player.play("ArrowLeft", 4)[:4] == left
    with player.page.expect_file_chooser() as chooser:
        player.click("load")
    chooser.value.set_files(Path(__file__))
    state = player.until(lambda s: s["kind"] == "failed", "took it")
    assert state["line"] == "this file is no session of a world"
    player.shot("world_error")
    assert player.play("ArrowLeft", 2)  # and it goes on
    assert player.errors == []


def test_a_phone_shows_picture_keys_and_buttons_at_once(visit: Callable[..., Player]) -> None:
    player = visit(390, 844)
    key = player.page.locator(".bw-key[data-key=ArrowLeft]")
    box = key.bounding_box()
    player.page.mouse.move(box["x"] + 9, box["y"] + 9)
    player.page.mouse.down()
    player.until(lambda s: s["frames"] > 20, "no frames")
    assert player.state["keys"] == "ArrowLeft"
    player.shot("world_phone")
    player.page.mouse.up()
    assert player.state["keys"] == ""
    play = player.page.locator(".bw-play").bounding_box()
    assert box["y"] + box["height"] < 844 and play["y"] + play["height"] < 844
    width = "() => [document.documentElement.scrollWidth, innerWidth]"
    assert player.page.evaluate(width) == [390, 390]
