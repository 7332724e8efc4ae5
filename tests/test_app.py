"""The demo without a browser: how the server is set up, what the handlers answer, whose is what."""

import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from blockloom import app, cli
from blockloom.commands import models
from blockloom.commands.demo import is_local
from blockloom.core.errors import ModelError, UsageError
from blockloom.core.recipe import load_recipe
from blockloom.demo import drawing, handlers, inside, views, wishes
from blockloom.demo.session import MAX_KEPT, Session
from blockloom.demo.shelf import Shelf
from blockloom.pipelines.media import read_metadata
from blockloom.pipelines.params import bundled_models

WISH: dict[str, Any] = {
    "prompt": "red apple", "style": "noto", "seed": "7", "number": 1, "steps": 4, "guidance": 1.0,
}  # fmt: skip
EDIT = {k: v for k, v in WISH.items() if k != "number"} | {"region": "right"}


@pytest.fixture(scope="module", autouse=True)
def loops(event_loops: None) -> None:
    """Every page of this module leaves event loops behind."""


@pytest.fixture
def does(shelf: Shelf) -> handlers.Handlers:
    return handlers.Handlers(shelf)


@pytest.fixture
def session() -> Iterator[Session]:
    visitor = Session()
    yield visitor
    visitor.clear()


def numbers(html: str) -> tuple[str, int, int]:
    """Kind, rows done and rows in all of a canvas."""
    kind = re.search(r'data-kind="(\w+)"', html)
    done = re.search(r'aria-valuenow="(\d+)"', html)
    total = re.search(r'aria-valuemax="(\d+)"', html)
    assert kind and done and total
    return kind[1], int(done[1]), int(total[1])


class TestServer:
    def test_defaults_keep_the_demo_on_this_machine(self, shelf: Shelf) -> None:
        settings = app.launch_settings(shelf, listen="127.0.0.1", port=7860, auth=None)
        wanted = {
            "server_name": "127.0.0.1", "share": False, "show_error": False,
            "max_file_size": "20mb", "allowed_paths": [], "max_threads": 16, "strict_cors": True,
            "state_session_capacity": 200, "run_history": False, "enable_monitoring": False,
            "mcp_server": False, "pwa": False, "ssr_mode": False,
        }  # fmt: skip
        assert {name: settings[name] for name in wanted} == wanted

    def test_model_folders_and_home_are_not_served(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HOME", "/home/someone")
        settings = app.launch_settings(shelf, listen="127.0.0.1", port=7860, auth=None)
        assert {"/home/someone", *shelf.folders} <= set(settings["blocked_paths"])

    def test_queue_lets_one_run_at_a_time(self, shelf: Shelf) -> None:
        page = app.build(shelf)
        assert page.max_size == 32 if hasattr(page, "max_size") else page._queue.max_size == 32
        assert page.delete_cache == (600, 3600)
        assert page.analytics_enabled is False
        assert page.api_open is False
        runs = [fn for fn in page.fns.values() if fn.concurrency_id == "gpu"]
        assert len(runs) == 2 + len(wishes.EXAMPLES)
        assert {fn.concurrency_limit for fn in runs} == {1}
        stop = next(fn for fn in page.fns.values() if fn.name == "stop")
        assert stop.queue is False  # it must get through while a run holds the only turn

    def test_no_box_takes_a_file_or_an_address(self, shelf: Shelf) -> None:
        inputs = {block for fn in app.build(shelf).fns.values() for block in fn.inputs}
        kinds = {type(block).__name__ for block in inputs}
        assert kinds == {"State", "Number", "Textbox", "Dropdown", "Slider", "Radio"}

    @pytest.mark.parametrize(
        ("letters", "paper"),
        [("#6b6560", "#fafaf7"), ("#78716c", "#ffffff"), ("#a3341f", "#fafaf7"),
         ("#ffffff", "#26547c"), ("#44403c", "#fafaf7"), ("#3d3420", "#fff8e9")],
    )  # fmt: skip
    def test_letters_stand_out(self, letters: str, paper: str) -> None:
        def light(colour: str) -> float:
            parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
            flat = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
            return 0.2126 * flat[0] + 0.7152 * flat[1] + 0.0722 * flat[2]

        bright, dark = sorted([light(letters), light(paper)], reverse=True)
        assert (bright + 0.05) / (dark + 0.05) >= 4.5  # WCAG AA

    def test_fonts_are_the_visitors_own(self) -> None:
        from blockloom.demo import look

        assert "@import" not in look.theme()._get_theme_css()
        assert look.theme()._font_css == [] and look.theme()._stylesheets == []

    def test_analytics_are_off_before_gradio_loads(self) -> None:
        code = (
            "import os, sys, blockloom.app;"
            "print(os.environ['GRADIO_ANALYTICS_ENABLED'], 'torch' in sys.modules)"
        )
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
        )
        assert result.stdout.split()[0] == "False"

    @pytest.mark.parametrize(
        ("address", "expected"),
        [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False),
         ("192.168.1.5", False), ("example.org", False)],
    )  # fmt: skip
    def test_local_addresses(self, address: str, expected: bool) -> None:
        assert is_local(address) is expected

    def test_the_network_needs_a_password_or_a_clear_word(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["demo", "--listen", "0.0.0.0"]) == 2
        error = capsys.readouterr().err
        assert "--auth" in error and "--i-know" in error and "Traceback" not in error

    def test_a_password_is_not_repeated(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["demo", "--auth", "secretwithoutcolon"]) == 2
        assert "secretwithoutcolon" not in capsys.readouterr().err

    def test_a_taken_port_is_one_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        import socket

        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            assert cli.main(["demo", "--port", str(other.getsockname()[1])]) == 5
        assert capsys.readouterr().err.startswith("error[E-RESOURCE] cannot listen on 127.0.0.1")


class TestWishes:
    def test_pictures_count_their_seeds_up(self) -> None:
        pictures = wishes.wished_pictures(**(WISH | {"number": 3}), model="m")
        assert [p.seed for p in pictures] == [7, 8, 9]
        assert pictures[0].full_prompt == "red apple, noto style"
        plain = wishes.wished_pictures(**(WISH | {"style": "none"}), model="m")
        assert plain[0].full_prompt == "red apple"

    @pytest.mark.parametrize("seed", ["", "  ", "-1", None])
    def test_an_empty_seed_throws_the_dice(self, seed: Any) -> None:
        drawn = {wishes.wished_pictures(**(WISH | {"seed": seed}), model="m")[0].seed
                 for _ in range(4)}  # fmt: skip
        assert len(drawn) == 4 and max(drawn) < 2**32

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"prompt": "  "}, ["empty", "red apple"]),
            ({"prompt": None}, ["empty"]),
            ({"prompt": {"a": 1}}, ["empty"]),
            ({"prompt": "x" * 10**6}, ["too long", "10000"]),
            ({"prompt": "\ud800"}, ["UTF-8"]),
            ({"prompt": "a\0b"}, ["NUL"]),
            ({"seed": "1e5"}, ["seed", "try 100000"]),
            ({"seed": "🎲"}, ["seed"]),
            ({"seed": str(2**64)}, [str(2**64 - 1)]),
            ({"number": 10}, ["1 to 9", "try 9"]),
            ({"number": {"a": 1}}, ["number of pictures"]),
            ({"steps": 0}, ["1 to 64", "try 1"]),
            ({"steps": 4.5}, ["try 4 or 5"]),
            ({"steps": 10**9}, ["try 64"]),
            ({"guidance": float("nan")}, ["nan"]),
            ({"guidance": 1e308}, ["try 10"]),
            ({"guidance": -5}, ["try 0"]),
            ({"style": "nto"}, ["try noto"]),
            ({"region": "lefft"}, ["try left"]),
        ],
    )
    def test_limits_are_checked_again(self, change: dict[str, Any], words: list[str]) -> None:
        with pytest.raises(UsageError) as caught:
            wishes.wished_pictures(**(WISH | change), model="m")
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert "\n" not in str(caught.value)


class TestShelf:
    def test_a_path_from_outside_is_no_model(self, shelf: Shelf, tiny_model: Path) -> None:
        for name in (str(tiny_model), "../x", "http://a/b", None, {"a": 1}):
            with pytest.raises(ModelError, match="no such model"):
                shelf.choice(name)

    def test_a_model_loads_once(self, shelf: Shelf, tiny_model: Path) -> None:
        assert shelf.pipe(tiny_model.name) is shelf.pipe(tiny_model.name)

    def test_defaults_are_the_recipes(self, shelf: Shelf, tiny_model: Path) -> None:
        schedule = load_recipe("image/maskgit").schedule
        expected = (schedule.steps, schedule.guidance_scale)
        assert shelf.defaults(tiny_model.name) == expected
        assert shelf.label(tiny_model.name) == "tiny  ·  image/maskgit"

    def test_bundled_models_are_offered(self, shelf: Shelf, tiny_model: Path) -> None:
        assert shelf.names[0] == tiny_model.name
        offered = {
            name for can in ("image", "video", "world", "motion") for name in shelf.names_of(can)
        }
        assert offered == {tiny_model.name, *bundled_models()}

    def test_without_any_model_the_page_still_builds(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("blockloom.demo.shelf.bundled_models", dict)
        empty = Shelf()
        with pytest.raises(ModelError, match="no model is installed"):
            empty.choice("x")
        page = app.build(empty)
        texts = [str(block.value) for block in page.blocks.values() if isinstance(block, gr.HTML)]
        assert any("No model is installed" in text for text in texts)
        draw = next(b for b in page.blocks.values() if getattr(b, "elem_id", "") == "bl-draw")
        assert draw.interactive is False


class TestDrawing:
    def wish(self, **change: Any) -> dict[str, Any]:
        return WISH | {"model": "tiny"} | change

    def test_a_run_shows_its_steps_and_ends_in_a_file(
        self, does: handlers.Handlers, session: Session, shelf: Shelf,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(drawing, "MIN_SECONDS_BETWEEN_FRAMES", 0.0)
        updates = list(does.draw(session, None, **self.wish()))
        seen = [numbers(update[0]) for update in updates]
        assert [kind for kind, _, _ in seen] == ["loading", *["drawing"] * 4, "done"]
        assert [done for _, done, _ in seen[1:]] == [1, 2, 3, 4, 4]
        assert {total for _, _, total in seen[1:]} == {4}
        sources = [re.findall(r'src="([^"]+)"', update[0]) for update in updates[1:]]
        assert len({tuple(source) for source in sources}) >= 3
        finished = session.finished[0]
        record = read_metadata(finished.path)
        assert record.params == finished.params
        assert (record.params.prompt, record.params.seed) == ("red apple", 7)

    def test_the_command_line_draws_the_same_picture(
        self, does: handlers.Handlers, session: Session, shelf: Shelf
    ) -> None:
        list(does.draw(session, None, **self.wish(number=2)))
        for finished in session.finished:
            again = models.draw(shelf.pipe("tiny"), [finished.params])[0]
            assert again.tobytes() == finished.image.tobytes()

    def test_stop_keeps_what_is_there_without_a_record(
        self, does: handlers.Handlers, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(drawing, "MIN_SECONDS_BETWEEN_FRAMES", 0.0)
        session.ask()
        run = does.draw(session, 1, **self.wish())
        frames = [next(run), next(run), next(run)]
        does.stop(session)
        frames += list(run)
        assert numbers(frames[-1][0]) == ("stopped", 2, 4)
        assert not session.finished[0].is_complete
        assert "stopped" in session.finished[0].caption
        with Image.open(session.finished[0].path) as image:
            assert image.text == {}  # type: ignore[attr-defined]

    def test_stop_reaches_waiting_runs_but_no_later_one(
        self, does: handlers.Handlers, session: Session
    ) -> None:
        _, _, number = does.ask(session)
        does.stop(session)
        last = list(does.draw(session, number, **self.wish()))[-1]
        assert numbers(last[0])[0] == "stopped" and session.finished == []
        _, _, number = does.ask(session)
        assert numbers(list(does.draw(session, number, **self.wish()))[-1][0])[0] == "done"

    def test_a_wish_lost_in_a_full_queue_changes_nothing(
        self, does: handlers.Handlers, session: Session
    ) -> None:
        does.ask(session)  # the queue was full: no run follows
        _, _, number = does.ask(session)
        assert numbers(list(does.draw(session, number, **self.wish()))[-1][0])[0] == "done"

    def test_stopping_one_visitor_leaves_the_other(
        self, does: handlers.Handlers, session: Session
    ) -> None:
        other = Session()
        try:
            run = does.draw(other, None, **self.wish(seed="9"))
            next(run)
            session.ask()
            does.stop(session)
            assert numbers(list(run)[-1][0])[0] == "done"
            assert session.finished == [] and len(other.finished) == 1
        finally:
            other.clear()

    def test_redrawing_keeps_the_other_half(
        self, does: handlers.Handlers, session: Session
    ) -> None:
        list(does.draw(session, None, **self.wish()))
        before = session.finished[0]
        list(does.redraw(session, None, **EDIT, model="tiny"))
        after = session.finished[0]
        left = (0, 0, before.image.width // 2, before.image.height)
        assert after.image.crop(left).tobytes() == before.image.crop(left).tobytes()
        assert after.params.region == "right" and after.params.input_sha256
        assert "right half redrawn" in after.caption

    def test_redrawing_nothing_is_one_line(self, does: handlers.Handlers, session: Session) -> None:
        run = does.redraw(session, None, **EDIT, model="tiny")
        first = next(run)[0]
        assert numbers(first)[0] == "failed" and "draw one first" in first
        with pytest.raises(gr.Error, match="draw one first"):
            next(run)

    def test_a_picture_with_holes_is_not_redrawn(
        self, does: handlers.Handlers, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(drawing, "MIN_SECONDS_BETWEEN_FRAMES", 0.0)
        run = does.draw(session, None, **self.wish())
        updates = [next(run), next(run)]
        does.stop(session)
        updates += list(run)
        assert updates[-1][-1]["interactive"] is False  # the button
        with pytest.raises(gr.Error, match="choose a finished one"):
            list(does.redraw(session, None, **EDIT, model="tiny"))
        assert list(does.draw(session, None, **self.wish()))[-1][-1]["interactive"] is True

    def test_time_is_limited(
        self, does: handlers.Handlers, session: Session, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(drawing, "MAX_SECONDS", -1.0)
        assert numbers(list(does.draw(session, None, **self.wish()))[-1][0])[0] == "stopped"

    def test_a_fault_of_ours_is_a_number_and_a_log_entry(
        self, does: handlers.Handlers, session: Session, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("/secret/path at 0x7f")

        with monkeypatch.context() as patch:
            patch.setattr(drawing, "draw", broken)
            with pytest.raises(gr.Error) as caught:
                list(does.draw(session, None, **self.wish()))
        number = re.search(r"error ([0-9a-f]{8})", caught.value.message)
        assert number and number[1] in caplog.text
        assert "secret" not in caught.value.message and "0x" not in caught.value.message
        assert numbers(list(does.draw(session, None, **self.wish()))[-1][0])[0] == "done"

    def test_texts_are_escaped(self, does: handlers.Handlers, session: Session) -> None:
        prompt = "<script>alert(1)</script>"
        last = list(does.draw(session, None, **self.wish(prompt=prompt)))[-1]
        assert all("<script>" not in str(part) for part in (last[0], last[4]))
        updates = []
        with pytest.raises(gr.Error) as caught:
            updates += does.draw(session, None, **self.wish(seed="<img src=x>"))
        assert "<img" not in caught.value.message
        failed = next(does.draw(session, None, **self.wish(seed="<img src=x>")))[0]
        assert "<img" not in failed and "&lt;img src=x&gt;" in failed

    def test_a_visitor_keeps_a_bounded_number_of_files(self, session: Session) -> None:
        params = wishes.wished_pictures(**WISH, model="m")[0]
        image = Image.new("RGB", (8, 8))
        for _ in range(MAX_KEPT + 3):
            session.keep(image, params, None)
        assert session.folder is not None
        assert len(session.finished) == len(list(Path(session.folder).iterdir())) == MAX_KEPT
        folder = Path(session.folder)
        session.clear()
        assert not folder.exists()

    def test_files_go_with_a_forgotten_session(self) -> None:
        forgotten = Session()
        forgotten.keep(Image.new("RGB", (8, 8)), wishes.wished_pictures(**WISH, model="m")[0], None)
        assert forgotten.folder is not None
        folder = Path(forgotten.folder)
        assert folder.exists()
        del forgotten
        gc.collect()
        assert not folder.exists()

    def test_choosing_what_is_not_there_is_refused(self, session: Session) -> None:
        for index in (-1, 0, 5):
            with pytest.raises(UsageError):
                session.choose(index)


def test_libraries_load_in_one_thread_at_a_time() -> None:
    code = """
import sys, threading, time
import blockloom.app
from blockloom.demo import handlers, libraries
from blockloom.demo.session import Session
from blockloom.demo.shelf import Shelf
does = handlers.Handlers(Shelf())
def draw():
    wish = ('red apple', 'noto', '1', 1, 1, 1.0, does._shelf.names[0])
    ends.append(list(does.draw(Session(), None, *wish))[-1][0])
def look():
    ends.append(does.look('image/maskgit', 16, "recipe's own")[0])
ends, threads = [], [threading.Thread(target=draw), threading.Thread(target=look)]
with libraries.LOCK:
    for thread in threads: thread.start()
    time.sleep(0.5)
    print(sorted({'torch', 'diffusers'} & set(sys.modules)))
for thread in threads: thread.join()
print(sorted({'torch', 'diffusers'} & set(sys.modules)))
print(sum('data-kind="done"' in end or 'MaskGIT' in end for end in ends))
"""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split("\n")[:3] == ["[]", "['diffusers', 'torch']", "2"]


class TestInside:
    @pytest.mark.parametrize("name", inside.recipes())
    def test_every_recipe_can_be_looked_at(self, name: str) -> None:
        view = inside.look(name, 12, inside.OWN_BLOCK)
        assert "data:image/png" in view.mask and "data:image/gif" in view.order
        writes = load_recipe(name).cache.write != "none"
        assert ("<table" in view.log) is writes
        assert ("no cache" in view.log) is not writes

    def test_frames_light_up_what_was_accepted(self) -> None:
        rows = [
            {"block": 0, "predicted": [0, 1], "accepted": [1], "level_next": 0.5},
            {"block": 0, "predicted": [0], "accepted": [0], "level_next": 0.0},
        ]
        frames, times = inside.order_frames(rows, (1, 2))
        assert len(frames) == len(times) == 2
        left, right = (20, 44), (116, 44)
        assert [frame.getpixel(right) == inside._FRESH for frame in frames] == [True, False]
        assert [frame.getpixel(left) for frame in frames] == [inside._EMPTY, inside._FRESH]

    def test_long_schedules_stay_small(self) -> None:
        rows = [
            {"block": 0, "predicted": [0], "accepted": [], "level_next": 0.5} for _ in range(1000)
        ]
        assert len(inside.order_frames(rows, (1, 1))[0]) <= 150

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            (("image/maksgit", 12, inside.OWN_BLOCK), "image/maskgit"),
            (("image/maskgit", 10**6, inside.OWN_BLOCK), "4 to 64"),
            (("image/maskgit", {"a": 1}, inside.OWN_BLOCK), "length"),
            (("image/maskgit", float("nan"), inside.OWN_BLOCK), "length"),
            (("image/maskgit", 1e9, inside.OWN_BLOCK), "4 to 64"),
            (("image/maskgit", 12, "__import__"), "block"),
            (("image/llamagen", 12, "row"), "token"),
        ],
    )
    def test_what_is_not_allowed_is_said_in_place(
        self, given: tuple[Any, ...], words: str, does: handlers.Handlers
    ) -> None:
        about, *rest = does.look(*given)
        assert "bl-notice" in about and words in about
        assert rest == ["", "", ""]

    def test_log_names_tokens_in_few_words(self) -> None:
        assert inside._span([-1, -1, 0, 1, 2]) == "prompt, 0 to 2"
        assert inside._span([4, 6]) == "4, 6"
        assert inside._span(None) == ""


def test_tables_are_escaped() -> None:
    assert "<td>&lt;b&gt;</td>" in views.table(["a"], [["<b>"]])


@pytest.fixture(scope="module")
def address(tiny_model: Path, free_port: Callable[[], int]) -> Iterator[str]:
    port = free_port()
    page = app.start([str(tiny_model)], listen="127.0.0.1", port=port)
    yield f"http://127.0.0.1:{port}"
    page.close()


class TestHttp:
    """What a client that is no browser gets from the running server."""

    @pytest.mark.parametrize(
        "path", ["/etc/passwd", "/etc/nothing-here", "..%2f..%2fetc%2fpasswd", "/etc/passwd%00",
                 "http://169.254.169.254/"],
    )  # fmt: skip
    def test_no_file_is_served(self, address: str, path: str) -> None:
        import httpx

        answer = httpx.get(f"{address}/gradio_api/file={path}")
        assert answer.status_code in (400, 403, 404)
        assert "root:" not in answer.text

    def test_model_weights_are_not_served(self, address: str, tiny_model: Path) -> None:
        import httpx

        path = next(tiny_model.rglob("*.safetensors"))
        assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)

    def test_the_page_names_no_other_host(self, address: str) -> None:
        import httpx

        page = httpx.get(address).text
        fetched = re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page)
        assert [url for url in fetched if not url.startswith(address)] == []
        config = json.loads(httpx.get(f"{address}/config").text)
        assert config["analytics_enabled"] is False

    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ([None, "apple", "noto", "1", 9999, 4, 1.0, "tiny"], "9"),
            ([None, "apple", "noto", "1", 1, 4, 1.0, "/etc"], "no such model"),
            ([None, "apple", "noto", "1e5", 1, 4, 1.0, "tiny"], "100000"),
        ],
    )
    def test_limits_hold_without_the_page(
        self, address: str, values: list[Any], words: str
    ) -> None:
        import httpx

        call = f"{address}/gradio_api/call/draw"
        event = httpx.post(call, json={"data": values}).json()["event_id"]
        answer = httpx.get(f"{call}/{event}", timeout=60).text
        assert "event: error" in answer
        assert "Traceback" not in answer
