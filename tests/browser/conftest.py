"""The browser of the module, and pages of its own for every test."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.browser.chromium import CHROMIUM, FLAGS


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def new_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open pages, each of a visitor who shares nothing with the others; narrow ones are phones."""
    contexts = []

    def enter(width: int = 1280, height: int = 1000) -> Any:
        is_phone = width < 700
        context = browser.new_context(
            viewport={"width": width, "height": height}, is_mobile=is_phone, has_touch=is_phone
        )
        contexts.append(context)
        return context.new_page()

    yield enter
    for context in contexts:
        context.close()
