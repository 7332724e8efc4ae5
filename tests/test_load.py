"""Thirty-two visitors at once: whose picture is whose, who waits how long, what stays behind."""

import asyncio
import gc
import io
import json
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import pytest
from PIL import Image

from blockloom import app
from blockloom.commands import models
from blockloom.demo import drawing, gate, wishes
from blockloom.demo.session import Session
from blockloom.demo.shelf import Shelf

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
VISITORS, CAPACITY = 32, 40
WORDS = ("red apple", "cat face", "rainbow", "star")


@pytest.fixture(scope="module", autouse=True)
def loops(event_loops: None) -> None:
    """Every page of this module leaves event loops behind."""


@pytest.fixture(scope="module")
def page(shelf: Shelf, free_port: Callable[[], int]) -> Iterator[gr.Blocks]:
    """The demo, with room for fewer sessions than the tests open."""
    port = free_port()
    page = app.build(shelf)
    settings = app.launch_settings(shelf, listen="127.0.0.1", port=port, auth=None)
    settings |= {"state_session_capacity": CAPACITY, "prevent_thread_lock": True}
    page.launch(app_kwargs=app.server_settings(page, listen="127.0.0.1"), **settings)
    yield page
    page.close(verbose=False)


class Brake:
    """Lets the test decide when a step of any run may end."""

    def __init__(self) -> None:
        self.free, self.reached, self.seconds = threading.Event(), threading.Event(), 0.0

    def hold(self) -> None:
        self.free.clear()
        self.reached.clear()


@pytest.fixture
def brake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Brake]:
    brake, see = Brake(), drawing._Progress.see

    def slowly(self: Any, event: Any) -> None:
        brake.reached.set()
        assert brake.free.wait(60)
        time.sleep(brake.seconds)
        see(self, event)

    monkeypatch.setattr(drawing._Progress, "see", slowly)
    yield brake
    brake.free.set()


class Visitor:
    """One browser: its own cookie, its own session name."""

    def __init__(self, http: httpx.AsyncClient, page: gr.Blocks, number: int) -> None:
        self.http, self.page, self.number = http, page, number
        self.session = f"visitor{number:04d}"
        self.headers = {"cookie": f"{gate.COOKIE}={number:043d}"}
        self.messages: list[dict[str, Any]] = []
        self.starts: list[float] = []

    @property
    def words(self) -> str:
        return WORDS[self.number % len(WORDS)]

    def function(self, name: str) -> int:
        return next(n for n, fn in self.page.fns.items() if name in (fn.api_name, fn.name))

    async def post(self, path: str, name: str, data: list[Any]) -> httpx.Response:
        body = {"data": data, "fn_index": self.function(name), "session_hash": self.session}
        return await self.http.post(f"/gradio_api/{path}", json=body, headers=self.headers)

    async def join(self, steps: int = 4) -> httpx.Response:
        wish = [None, None, self.words, "noto", str(self.number), 1, steps, 1.0, "tiny"]
        return await self.post("queue/join", "draw", wish)

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        asked = {"session_hash": self.session}
        async with self.http.stream(
            "GET", "/gradio_api/queue/data", params=asked, headers=self.headers
        ) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])

    async def follow(self) -> str:
        """Read until the job is over; returns the kind of the last canvas."""
        async for message in self.stream():
            self.messages.append(message)
            if message["msg"] == "process_starts":
                self.starts.append(time.monotonic())
            if message["msg"] == "process_completed":
                break
        kind = re.search(r'data-kind="(\w+)"', str(self.messages[-1]["output"]))
        return kind[1] if kind else str(self.messages[-1]["output"].get("error"))

    async def picture(self) -> Image.Image:
        """Fetch the newest picture of the gallery."""
        (newest, *_) = self.messages[-1]["output"]["data"][2]["value"]
        answer = await self.http.get(newest["image"]["url"], headers=self.headers)
        return Image.open(io.BytesIO(answer.content)).convert("RGB")


def together(page: gr.Blocks, story: Callable[[Callable[[int], Visitor]], Any]) -> Any:
    """Run a story whose visitors all talk to the page at the same time."""

    async def run() -> Any:
        limits = httpx.Limits(max_connections=200)
        base = str(page.local_url).rstrip("/")
        async with httpx.AsyncClient(base_url=base, timeout=120, limits=limits) as http:
            return await story(lambda number: Visitor(http, page, number))

    return asyncio.run(run())


async def reached(brake: Brake) -> None:
    assert await asyncio.to_thread(brake.reached.wait, 60)


def test_everybody_gets_the_picture_a_lone_visitor_gets(
    page: gr.Blocks, shelf: Shelf, brake: Brake
) -> None:
    async def story(visitor: Callable[[int], Visitor]) -> list[Visitor]:
        first, *others = (visitor(k) for k in range(VISITORS + 1))
        brake.hold()
        assert (await first.join()).status_code == 200
        follows = [asyncio.create_task(first.follow())]
        await reached(brake)  # it draws; the others come one after the other and wait
        for other in others:
            assert (await other.join()).status_code == 200
            follows.append(asyncio.create_task(other.follow()))
        surplus, began = visitor(VISITORS + 1), time.monotonic()
        refused = await surplus.join()
        assert (refused.status_code, time.monotonic() - began < 2) == (503, True)
        assert refused.json()["detail"] == "Queue is full. Max size is 32 and size is 32."
        began = time.monotonic()
        health = (await first.http.get("/healthz")).json()
        assert (health["status"], health["waiting"]) == ("ok", VISITORS)
        assert time.monotonic() - began < 2
        brake.free.set()
        assert await asyncio.gather(*follows) == ["done"] * (VISITORS + 1)
        for someone in (first, *others):
            params = wishes.wished_pictures(
                prompt=someone.words, style="noto", seed=str(someone.number), number=1, steps=4,
                guidance=1.0, model="tiny",
            )  # fmt: skip
            (alone,) = models.draw(shelf.pipe("tiny"), params)
            assert (await someone.picture()).tobytes() == alone.convert("RGB").tobytes()
        return [first, *others]

    everybody = together(page, story)
    starts = [someone.starts[0] for someone in everybody]
    assert starts == sorted(starts)  # first come, first served
    for place, someone in enumerate(everybody[1:]):
        ranks = [m["rank"] for m in someone.messages if m["msg"] == "estimation"]
        assert ranks[0] == place and ranks == sorted(ranks, reverse=True)
        assert len(ranks) >= place  # told of every step forward
    last = [m for m in everybody[-1].messages if m["msg"] == "estimation"]
    assert last[0]["queue_size"] == VISITORS


def test_a_stop_reaches_only_ones_own_run(page: gr.Blocks, brake: Brake) -> None:
    async def story(visitor: Callable[[int], Visitor]) -> list[str]:
        one, two, three = (visitor(100 + k) for k in range(3))
        brake.hold()
        follows = []
        for someone in (one, two, three):
            assert (await someone.join()).status_code == 200
            follows.append(asyncio.create_task(someone.follow()))
        await reached(brake)
        for someone in (two, three):  # neither has a run of its own yet
            assert (await someone.post("run/predict", "stop", [None])).status_code == 200
        assert (await one.post("run/predict", "stop", [None])).status_code == 200
        brake.free.set()
        return list(await asyncio.gather(*follows))

    assert together(page, story) == ["stopped", "done", "done"]


def test_a_waiting_wish_can_be_stopped_too(page: gr.Blocks, brake: Brake) -> None:
    async def story(visitor: Callable[[int], Visitor]) -> list[str]:
        one, two = visitor(110), visitor(111)
        brake.hold()
        assert (await one.join()).status_code == 200
        follows = [asyncio.create_task(one.follow())]
        await reached(brake)
        asked = (await two.post("run/predict", "ask", [None])).json()["data"]
        wish = [None, asked[2], two.words, "noto", "1", 1, 4, 1.0, "tiny"]
        assert (await two.post("queue/join", "draw", wish)).status_code == 200
        follows.append(asyncio.create_task(two.follow()))
        assert (await two.post("run/predict", "stop", [None])).status_code == 200
        brake.free.set()
        return list(await asyncio.gather(*follows))

    assert together(page, story) == ["done", "stopped"]


def test_whoever_leaves_makes_room(page: gr.Blocks, brake: Brake) -> None:
    async def story(visitor: Callable[[int], Visitor]) -> tuple[str, float]:
        gone, next_one = visitor(120), visitor(121)
        brake.free.set()
        brake.seconds = 1.0
        assert (await gone.join(steps=16)).status_code == 200
        async for message in gone.stream():
            if message["msg"] == "process_generating":
                break  # the tab is closed in the middle of a run of 16 seconds
        began = time.monotonic()
        assert (await next_one.join(steps=1)).status_code == 200
        return await next_one.follow(), time.monotonic() - began

    kind, seconds = together(page, story)
    assert kind == "done" and seconds < 10


THREADS = 56  # a pool of 40, its helpers, and those of the tests; far below 120 visitors


@pytest.mark.slow
def test_nothing_stays_behind(page: gr.Blocks, brake: Brake, tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Three times as many visitors as the page remembers: sessions, files, threads, handles."""
    import tempfile

    brake.free.set()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def round_of(first: int, count: int) -> tuple[int, int, int, int]:
        async def story(visitor: Callable[[int], Visitor]) -> None:
            for start in range(first, first + count, 20):
                some = [visitor(k) for k in range(start, start + 20)]
                for someone in some:
                    assert (await someone.join(steps=1)).status_code == 200
                kinds = await asyncio.gather(*(someone.follow() for someone in some))
                assert kinds == ["done"] * 20

        together(page, story)
        gc.collect()
        sessions = sum(type(thing) is Session for thing in gc.get_objects())
        folders = len(list(tmp_path.glob("blockloom-demo-*")))
        return sessions, folders, threading.active_count(), len(os.listdir("/proc/self/fd"))

    before = round_of(1000, 40)
    after = round_of(2000, 80)
    assert before[1] <= CAPACITY + 1 and after[1] <= CAPACITY + 1
    assert after[0] <= before[0] + 2
    # Threads belong to pools that grow to a fixed size, so they are bounded but not flat.
    assert after[2] <= THREADS and after[3] <= before[3] + 8


def test_a_closed_tab_is_forgotten_with_its_files(
    page: gr.Blocks, brake: Brake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    brake.free.set()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("GRADIO_IS_E2E_TEST", "1")  # an hour of grace becomes a second

    async def story(visitor: Callable[[int], Visitor]) -> None:
        someone = visitor(130)
        beat = f"/gradio_api/heartbeat/{someone.session}"
        async with someone.http.stream("GET", beat, headers=someone.headers):
            await someone.post("run/predict", "ask", [None])
            await someone.join()
            assert await someone.follow() == "done"
            assert len(list(tmp_path.glob("blockloom-demo-*/*.png"))) == 1

    together(page, story)
    end = time.monotonic() + 60
    while list(tmp_path.glob("blockloom-demo-*")):
        assert time.monotonic() < end, "the files stay"
        time.sleep(0.1)
