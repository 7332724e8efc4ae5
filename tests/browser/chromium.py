"""What tests that drive a browser share: where Chromium is, waiting, and a demo of one's own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 180
SHORT = 3000
"""Milliseconds for a click that may be in vain."""
MARKS = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(CHROMIUM).exists(),
        reason=f"no Chromium at {CHROMIUM}: install it (apt-get install chromium) or set CHROMIUM",
    ),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def until(holds: Callable[[], Any], complaint: str) -> Any:
    """Wait until something holds and return it."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        result = holds()
        if result:
            return result
        time.sleep(0.02)
    raise AssertionError(complaint)


def answers(url: str) -> bool:
    """Tell whether an address answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextlib.contextmanager
def demo(port: int, models: Sequence[str]) -> Iterator[str]:
    """Run the demo in a process of its own, as a person would; yields its address."""
    command = [sys.executable, "-m", "blockloom", "demo", "--port", str(port)]
    for model in models:
        command += ["--model", model]
    server = subprocess.Popen(command)
    url = f"http://127.0.0.1:{port}/"
    try:
        until(lambda: answers(url), "the demo does not answer")
        yield url
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 130


def open_tab(page: Any, name: str) -> None:
    """Click a tab, or its entry behind the button where a phone has no room for it.

    Which of both it is can change while the page is laid out, so neither is waited for long.
    """
    from playwright.sync_api import TimeoutError as InVain

    row = page.get_by_role("tab", name=name)
    behind = page.locator(".overflow-dropdown button", has_text=name)

    def opened() -> bool:
        with contextlib.suppress(InVain):
            row.click(timeout=SHORT)
            return True
        with contextlib.suppress(InVain):
            if not behind.is_visible():
                page.locator(".overflow-menu > button").click(timeout=SHORT)
            behind.click(timeout=SHORT)
            return True
        return False

    until(opened, f"the tab {name} cannot be clicked")


class Tab:
    """One person in front of one tab of the demo; `STATE` is the script that reads the page."""

    STATE = ""

    def __init__(self, page: Any, address: str, name: str, ready: str) -> None:
        """Open the page and the tab, and wait until it is ready."""
        self.page, self.errors, self.requests = page, [], []
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", lambda request: self.requests.append(request.url))
        page.goto(address)
        page.get_by_role("tab", name="Image").wait_for()
        open_tab(page, name)
        page.wait_for_selector(ready)

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.page.evaluate(self.STATE)
        return state

    def until(self, holds: Callable[[dict[str, Any]], Any], complaint: str) -> dict[str, Any]:
        return until(lambda: (s := self.state) and holds(s) and s, complaint)

    def shot(self, name: str) -> None:
        folder = os.environ.get("BLOCKLOOM_SHOTS")
        if folder:
            time.sleep(0.5)
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)
