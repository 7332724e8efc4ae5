"""The demo driven in headless Chromium: type, watch, stop, edit, look inside, two people at once.

Run with `python -m pytest -m slow tests/browser`. Set CHROMIUM to the browser's path when it is
not /usr/bin/chromium; without one these tests are skipped and say so. Screenshots go to the folder
that BLOCKLOOM_SHOTS names, if any.
"""

import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser.chromium import MARKS, PATIENCE, demo, open_tab, until

from blockloom.pipelines.media import read_metadata

BUSY, OVER = ("waiting", "loading", "drawing"), ("done", "stopped", "failed")
STATE = """() => {
  const box = document.querySelector('#bl-canvas .bl-canvas');
  return {kind: box.dataset.kind, line: box.querySelector('.bl-line').textContent,
          done: Number(box.querySelector('.bl-bar').getAttribute('aria-valuenow')),
          sources: [...box.querySelectorAll('img')].map(image => image.src)};
}"""

# A small model is done within a few frames: the page itself notes every change, polling would not.
RECORD = f"""() => {{
  window.seen = []; window.kinds = [];
  const note = () => {{
    const state = ({STATE})();
    window.kinds.push(state.kind);
    const source = state.sources[0];
    if (source && !window.seen.some(pair => pair[0] === source))
      window.seen.push([source, state.done]);
  }};
  if (window.recorder) window.recorder.disconnect();
  window.recorder = new MutationObserver(note);
  window.recorder.observe(document.body, {{subtree: true, childList: true, attributes: true}});
}}"""

pytestmark = MARKS


@pytest.fixture(scope="module")
def row_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pipeline of 8 blocks of 4 rows; untrained, but slow enough to be watched."""
    import torch

    from blockloom.core.recipe import load_recipe
    from blockloom.models.generator import GenerativeModel
    from blockloom.pipelines.image import ImagePipeline
    from blockloom.tokenizers.build import build_tokenizer

    sizes = ["backbone.dim=384", "backbone.layers=12", "backbone.heads=6", "schedule.steps=4"]
    recipe = load_recipe("image/block_masked", sizes)
    tokenizer: Any = build_tokenizer({"kind": "palette", "image_size": 64, "patch": 8})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GenerativeModel(
            recipe.model_dump(mode="json"),
            *tokenizer.grid,
            num_codebooks=tokenizer.num_codebooks,
            codebook_size=tokenizer.codebook_size,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    folder = tmp_path_factory.mktemp("models") / "rows"
    ImagePipeline(tokenizer, model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def address(row_model: Path, free_port: Callable[[], int]) -> Iterator[str]:
    with demo(free_port(), [str(row_model)]) as url:
        yield url


@pytest.fixture
def visit(new_page: Callable[..., Any], address: str) -> Callable[..., "Visitor"]:
    return lambda *size, **sizes: Visitor(new_page(*size, **sizes), address)


class Visitor:
    """One person in front of one page."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.requests, self.errors = page, [], []
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: self.errors.append("a script ran") or dialog.dismiss())
        page.goto(address)
        page.wait_for_selector("#bl-canvas .bl-canvas", timeout=1000 * PATIENCE)

    def write(self, box: str, text: str) -> Any:
        field = self.page.locator(f"#{box} textarea, #{box} input").first
        field.fill(text)
        return field

    def click(self, button: str) -> None:
        if button != "bl-stop":  # stopping is a race with the run: nothing may come first
            self.page.evaluate(RECORD)
        self.page.locator(f"#{button}").click()

    @property
    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = self.page.evaluate(STATE)
        return state

    def draw(self, prompt: str, seed: int) -> None:
        self.write("bl-seed", str(seed))
        field = self.write("bl-prompt", prompt)
        self.page.evaluate(RECORD)
        field.press("Enter")

    def until(self, *kinds: str) -> dict[str, Any]:
        return until(lambda: (s := self.state)["kind"] in kinds and s, f"never {kinds}")

    def watch(self) -> tuple[list[str], list[int], dict[str, Any]]:
        """Follow a run: distinct picture sources, rows done, last state."""
        kinds = "() => window.kinds"
        until(lambda: set(BUSY) & set(self.page.evaluate(kinds)), "the run never starts")
        last = self.until(*OVER)
        seen = self.page.evaluate("() => window.seen")
        return [source for source, _ in seen], [done for _, done in seen], last

    def captions(self, count: int) -> list[str]:
        images = self.page.locator("#bl-gallery img")
        until(lambda: images.count() == count, f"the gallery never shows {count} pictures")
        return [images.nth(k).get_attribute("alt") for k in range(count)]

    def shot(self, name: str) -> None:
        folder = os.environ.get("BLOCKLOOM_SHOTS")
        if folder:
            time.sleep(1)
            self.page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def test_a_picture_appears_block_by_block(visit: Callable[[], Visitor], tmp_path: Path) -> None:
    visitor = visit()
    visitor.draw("red apple <script>alert(1)</script>", 7)
    sources, done, last = visitor.watch()
    assert last["kind"] == "done" and last["line"].startswith("Done: 1 picture in")
    assert len(sources) >= 3
    assert done == sorted(done) and done[0] < done[-1] == 32
    (caption,) = visitor.captions(1)
    shown = visitor.page.locator("#bl-canvas img").bounding_box()
    assert (shown["width"], shown["height"]) == (384, 384)  # drawn pixel for pixel
    assert "<script>" in caption and "seed 7" in caption
    visitor.shot("done")
    with visitor.page.expect_download() as download:
        visitor.click("bl-download")
    path = tmp_path / download.value.suggested_filename
    download.value.save_as(path)
    assert read_metadata(path).params.seed == 7
    assert visitor.errors == []
    hosts = {re.sub(r"^(\w+://[^/:]+).*", r"\1", url) for url in visitor.requests}
    assert {host for host in hosts if host.startswith("http")} == {"http://127.0.0.1"}


def test_stop_keeps_what_is_there_and_the_next_run_works(visit: Callable[[], Visitor]) -> None:
    visitor = visit()
    visitor.draw("cat face", 1)
    visitor.until("drawing")
    visitor.click("bl-stop")
    last = visitor.until(*OVER)
    assert last["kind"] == "stopped" and 0 < last["done"] < 32
    assert "stopped" in visitor.captions(1)[0]
    assert visitor.page.locator("#bl-redraw").is_disabled()  # it has holes
    visitor.shot("stopped")
    visitor.draw("cat face", 2)
    assert visitor.watch()[2]["kind"] == "done"
    assert len(visitor.captions(2)) == 2


def test_a_half_is_redrawn(visit: Callable[[], Visitor]) -> None:
    visitor = visit()
    visitor.draw("rainbow", 3)
    visitor.watch()
    visitor.captions(1)
    visitor.page.get_by_label("left", exact=True).check()
    visitor.write("bl-seed", "4")
    visitor.click("bl-redraw")
    assert visitor.watch()[2]["kind"] == "done"
    assert "left half redrawn" in visitor.captions(2)[0]
    visitor.shot("redrawn")


def test_an_illegal_seed_is_one_line(visit: Callable[[], Visitor]) -> None:
    visitor = visit()
    visitor.write("bl-seed", "1e5")
    visitor.write("bl-prompt", "star").press("Enter")
    failed = visitor.until(*OVER)
    assert failed["kind"] == "failed" and "try 100000" in failed["line"]
    visitor.page.get_by_text("try 100000").first.wait_for()
    visitor.shot("error")


def test_an_example_runs_at_once_and_the_dice_fill_the_seed(visit: Callable[[], Visitor]) -> None:
    visitor = visit()
    visitor.click("bl-dice")
    seed = visitor.page.locator("#bl-seed textarea, #bl-seed input").first
    until(lambda: seed.input_value().isdigit(), "the dice give no number")
    visitor.page.get_by_role("button", name="rainbow, openmoji").click()
    assert visitor.watch()[2]["kind"] == "done"
    assert visitor.captions(1)[0] == f"rainbow, openmoji · seed {seed.input_value()}"


def test_two_people_at_once_get_their_own_pictures(visit: Callable[[], Visitor]) -> None:
    one, other = visit(), visit()
    one.draw("red apple", 11)
    other.draw("birthday cake", 22)
    ends = [one.until(*OVER), other.until(*OVER)]
    assert [end["kind"] for end in ends] == ["done", "done"]
    assert one.captions(1) == ["red apple, noto · seed 11"]
    assert other.captions(1) == ["birthday cake, noto · seed 22"]
    assert ends[0]["sources"] != ends[1]["sources"]
    other.draw("birthday cake", 11)
    one.click("bl-stop")  # stops nobody else's run
    assert other.watch()[2]["kind"] == "done"


def test_whoever_waits_sees_the_place_in_the_queue(visit: Callable[[], Visitor]) -> None:
    one, other = visit(), visit()
    one.draw("red apple", 11)
    one.until("drawing")
    other.page.evaluate(
        "() => { window.places = []; new MutationObserver(() => window.places.push("
        "document.querySelector('#bl-turn').innerText)).observe(document.body, "
        "{subtree: true, childList: true, characterData: true}); }"
    )
    other.draw("cat face", 12)
    assert other.watch()[2]["kind"] == "done"
    places = other.page.evaluate("() => window.places")
    assert any(place.startswith("queue: 1/1") for place in places), sorted(set(places))[:9]
    assert one.page.locator("#bl-turn").inner_text() == ""


def test_a_phone_shows_the_picture_below_the_button(visit: Callable[..., Visitor]) -> None:
    visitor = visit(390, 844)
    visitor.draw("red apple", 7)
    assert visitor.watch()[2]["kind"] == "done"
    visitor.captions(1)
    boxes = {name: visitor.page.locator(name).first.bounding_box()
             for name in ("#bl-draw", "#bl-stop", "#bl-canvas img", ".bl-examples")}  # fmt: skip
    draw, stop, picture, examples = boxes.values()
    assert draw["y"] == stop["y"] and draw["x"] < stop["x"]
    assert draw["y"] < picture["y"] < 844 - 0.9 * picture["height"]  # in sight without scrolling
    assert picture["width"] > 290 and picture["y"] + picture["height"] < examples["y"]
    width = "() => [document.documentElement.scrollWidth, innerWidth]"
    assert visitor.page.evaluate(width) == [390, 390]
    visitor.shot("phone")
    open_tab(visitor.page, "Look inside")
    visitor.page.locator("#bl-mask img").wait_for(timeout=1000 * PATIENCE)
    assert visitor.page.evaluate(width) == [390, 390]
    visitor.shot("phone_inside")


def test_the_second_tab_shows_mask_order_and_cache(visit: Callable[[], Visitor]) -> None:
    visitor = visit()
    page = visitor.page
    open_tab(page, "Look inside")
    mask = page.locator("#bl-mask img")
    mask.wait_for(timeout=1000 * PATIENCE)
    first = mask.get_attribute("src")
    assert "blue means it may look there" in page.locator("#bl-mask").inner_text()
    assert page.locator("#bl-order img").get_attribute("src").startswith("data:image/gif")
    assert page.locator("#bl-log td", has_text="commit").count() == 3
    visitor.shot("inside")
    page.locator("#bl-recipe input").click()
    page.get_by_role("option", name="image/maskgit").click()
    until(lambda: mask.get_attribute("src") != first, "the mask never changes")
    until(lambda: "keeps no cache" in page.locator("#bl-log").inner_text(), "no word of the cache")
    visitor.shot("inside_maskgit")
