"""What strangers can do to the running demo: foreign pages, borrowed sessions, wrong passwords,
files they may not have, and requests that make no sense."""

import asyncio
import json
import re
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from blockloom import __version__, app
from blockloom.demo import gate
from blockloom.demo.patience import Crowded, Patience
from blockloom.demo.shelf import Shelf

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
GOOD: list[Any] = [None, None, "red apple", "noto", "7", 1, 4, 1.0, "tiny"]
INNER = re.compile(r"Traceback|site-packages|/work|/home|/tmp|0x[0-9a-f]{6}|\.py\b")


@pytest.fixture(scope="module", autouse=True)
def loops(event_loops: None) -> Iterator[None]:
    """Every page of this module leaves event loops behind, and its visitors connections."""
    yield
    for client in Someone.clients:
        client.close()


@pytest.fixture(scope="module")
def page(tiny_model: Path, free_port: Callable[[], int]) -> Iterator[gr.Blocks]:
    served = app.start([str(tiny_model)], listen="127.0.0.1", port=free_port())
    yield served
    served.close(verbose=False)


@pytest.fixture(scope="module")
def address(page: gr.Blocks) -> str:
    return str(page.local_url).rstrip("/")


def number_of(page: gr.Blocks, name: str) -> int:
    return next(n for n, fn in page.fns.items() if name in (fn.api_name, fn.name))


class Someone:
    """A browser, as the server sees one: a cookie and a session name."""

    clients: ClassVar[list[httpx.Client]] = []

    def __init__(self, page: gr.Blocks, session: str, *, has_cookie: bool = True) -> None:
        self.page, self.session = page, session
        self.http = httpx.Client(base_url=str(page.local_url).rstrip("/"), timeout=120)
        self.clients.append(self.http)
        if has_cookie:
            assert gate.COOKIE in self.http.get("/").cookies

    def body(self, name: str, data: list[Any], **more: Any) -> dict[str, Any]:
        number = number_of(self.page, name)
        return {"data": data, "session_hash": self.session, "fn_index": number} | more

    def join(self, name: str, data: list[Any]) -> str:
        content = json.dumps(self.body(name, data))  # httpx itself refuses to write NaN
        kind = {"content-type": "application/json"}
        answer = self.http.post("/gradio_api/queue/join", content=content, headers=kind)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["event_id"])

    def messages(self) -> list[dict[str, Any]]:
        """Everything that the queue has for this session until its jobs are over."""
        text = self.http.get("/gradio_api/queue/data", params={"session_hash": self.session}).text
        return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]

    def draws(self, data: list[Any]) -> dict[str, Any]:
        self.join("draw", data)
        return self.completed()

    def completed(self) -> dict[str, Any]:
        return next(m for m in self.messages() if m["msg"] == "process_completed")

    def run(self, name: str, data: list[Any], **more: Any) -> httpx.Response:
        return self.http.post("/gradio_api/run/predict", json=self.body(name, data, **more))


class TestWhoMayAsk:
    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 200),
            ({"host": "localhost:7860"}, 200),
            ({"host": "[::1]:7860"}, 200),
            ({"host": "evil.example"}, 400),
            ({"host": "127.0.0.1.evil.example:7860"}, 400),
            ({"host": ""}, 400),
            ({"origin": "https://evil.example"}, 403),
            ({"origin": "null"}, 403),
            ({"origin": "http://localhost:3000", "host": "localhost:7860"}, 403),
            ({"origin": "http://localhost:7860", "host": "localhost:7860"}, 200),
            ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}, 403),
            ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
            ({"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}, 200),
        ],
    )
    def test_only_this_machine_and_this_page(
        self, address: str, headers: dict[str, str], status: int
    ) -> None:
        answer = httpx.get(f"{address}/config", headers=headers)
        assert answer.status_code == status
        if status != 200:
            assert len(answer.text) < 100 and not INNER.search(answer.text)

    def test_a_foreign_page_starts_no_job(self, page: gr.Blocks, address: str) -> None:
        for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
            body = {"data": GOOD}
            answer = httpx.post(f"{address}/gradio_api/call/draw", json=body, headers=headers)
            assert answer.status_code in (400, 403) and "event_id" not in answer.text

    def test_a_foreign_page_is_not_told_it_may(self, address: str) -> None:
        asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        answer = httpx.options(f"{address}/gradio_api/queue/join", headers=asked)
        assert "access-control-allow-origin" not in answer.headers

    def test_the_host_is_not_checked_where_it_has_many_names(self, tiny_model: Path) -> None:
        page = app.build(Shelf([str(tiny_model)]))
        names = {
            listen: [m.cls.__name__ for m in app.server_settings(page, listen=listen)["middleware"]]
            for listen in ("127.0.0.1", "0.0.0.0")
        }
        assert names == {"127.0.0.1": ["TrustedHostMiddleware", "Gate"], "0.0.0.0": ["Gate"]}


class TestSessions:
    def test_the_cookie_is_for_the_server_only(self, address: str) -> None:
        with httpx.Client() as http:
            given = http.get(address).headers["set-cookie"]
            assert re.fullmatch(
                rf"{gate.COOKIE}=[\w-]{{43}}; Path=/; HttpOnly; SameSite=Lax", given
            )
            assert "set-cookie" not in http.get(address).headers  # one is enough

    @pytest.mark.parametrize("has_cookie", [True, False])
    def test_a_borrowed_session_name_opens_nothing(self, page: gr.Blocks, has_cookie: bool) -> None:
        owner = Someone(page, "abcdefghijk")
        done = owner.draws(GOOD)
        assert done["success"]
        picture = done["output"]["data"][2]["value"][0]["image"]["url"]
        assert owner.http.get(picture).content[:4] == b"\x89PNG"
        chosen = owner.run("choose", [None], event_data={"index": 0, "value": None})
        assert chosen.status_code == 200 and "red apple" in chosen.text

        thief = Someone(page, "abcdefghijk", has_cookie=has_cookie)
        chosen = thief.run("choose", [None], event_data={"index": 0, "value": None})
        assert chosen.status_code != 200 and "red apple" not in chosen.text
        assert "that picture is gone" in chosen.text
        redraw = [None, None, "cat face", "noto", "1", "left", 4, 1.0, "tiny"]
        thief.join("redraw", redraw)
        last = thief.completed()
        assert not last["success"] and "draw one first" in last["output"]["error"]

    def test_a_stranger_reads_no_running_job_and_stops_none(self, page: gr.Blocks) -> None:
        owner, thief = Someone(page, "samesession"), Someone(page, "samesession")
        job = owner.join("draw", GOOD)
        stolen = thief.messages()
        assert [m["msg"] for m in stolen] == ["unexpected_error"]
        assert "red apple" not in str(stolen)
        asked = {"session_hash": "samesession", "fn_index": number_of(page, "draw")}
        answer = thief.http.post("/gradio_api/cancel", json=asked | {"event_id": job})
        assert (answer.status_code, answer.json()) == (403, {"detail": "that job is not yours"})
        assert thief.http.get(f"/gradio_api/call/draw/{job}").status_code == 403
        # Without the number of the job, the name of the session alone stops nothing either.
        thief.http.post("/gradio_api/cancel", json=asked | {"event_id": "x"})
        thief.run("stop", [None])
        done = owner.completed()
        assert done["success"] and 'data-kind="done"' in str(done["output"]["data"])

    def test_cancelling_twice_or_nothing_is_harmless(self, page: gr.Blocks) -> None:
        owner = Someone(page, "cancelling1")
        job = owner.join("draw", GOOD)
        asked = {"session_hash": owner.session, "fn_index": number_of(page, "draw")}
        for event in (job, job, "unknown"):
            answer = owner.http.post("/gradio_api/cancel", json=asked | {"event_id": event})
            assert answer.status_code == 200
        assert owner.draws(GOOD)["success"]

    def test_a_job_of_the_plain_interface_is_its_owners(self, page: gr.Blocks) -> None:
        owner, thief = Someone(page, "a"), Someone(page, "b")
        answer = owner.http.post("/gradio_api/call/draw", json={"data": GOOD})
        job = answer.json()["event_id"]
        assert thief.http.get(f"/gradio_api/call/draw/{job}").status_code == 403
        assert "event: complete" in owner.http.get(f"/gradio_api/call/draw/{job}").text

    @pytest.mark.parametrize("session", ["x" * 65, "../../etc", "x" * 10**6])
    def test_odd_session_names_are_refused(self, address: str, session: str) -> None:
        body = {"data": GOOD, "session_hash": session, "fn_index": 0}
        answer = httpx.post(f"{address}/gradio_api/queue/join", json=body)
        assert answer.status_code in (404, 422) and len(answer.text) < 100


class TestFiles:
    @pytest.mark.parametrize(
        "form", ["{}", "{}/", "../../../../..{}", "{}%00", "//host{}", "\\\\{}"]
    )
    @pytest.mark.parametrize("route", ["file=", "file/"])
    def test_what_exists_looks_like_what_does_not(
        self, address: str, route: str, form: str
    ) -> None:
        answers = [
            httpx.get(f"{address}/gradio_api/{route}{form.format(path)}")
            for path in ("/etc/passwd", "/etc/nothing")
        ]
        assert {answer.status_code for answer in answers} <= {400, 403, 404}
        assert answers[0].status_code == answers[1].status_code
        texts = [answer.text.replace("passwd", "nothing") for answer in answers]
        assert texts[0] == texts[1] and "root:" not in texts[0]

    @pytest.mark.parametrize("path", ["..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd",
                                      "http://169.254.169.254/", "file:///etc/passwd"])  # fmt: skip
    @pytest.mark.parametrize("route", ["file=", "file/", "proxy=", "../static/", "../assets/"])
    def test_no_path_leads_outside(self, address: str, route: str, path: str) -> None:
        answer = httpx.get(f"{address}/gradio_api/{route}{path}")
        assert answer.status_code in (400, 403, 404) and "root:" not in answer.text

    def test_a_visitors_own_folder_and_a_link_are_not_served(
        self, page: gr.Blocks, address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        link = tmp_path / "link.png"
        link.symlink_to("/etc/passwd")
        someone = Someone(page, "ownfolder12")
        someone.draws(GOOD)
        (picture,) = tmp_path.glob("blockloom-demo-*/*.png")
        for path in (link, picture):
            assert httpx.get(f"{address}/gradio_api/file={path}").status_code in (403, 404)

    @pytest.mark.parametrize("size", [10, 21 * 2**20])
    def test_uploads_are_refused(self, address: str, size: int) -> None:
        began = time.monotonic()
        files = {"files": ("../../x.png", b"x" * size)}
        answer = httpx.post(f"{address}/gradio_api/upload", files=files, timeout=30)
        assert answer.status_code == (403 if size < gate.MAX_BODY else 413)
        assert time.monotonic() - began < 10 and len(answer.text) < 100

    @pytest.mark.parametrize(
        "kind", ["multipart/form-data", "multipart/form-data; boundary=" + "x" * 5000]
    )
    def test_uploads_without_sense_are_refused(self, address: str, kind: str) -> None:
        for door in ("upload", "process_recording", "component_server"):
            answer = httpx.post(
                f"{address}/gradio_api/{door}", content=b"--x", headers={"content-type": kind}
            )
            assert answer.status_code == 403

    def test_a_body_that_lies_about_its_size_is_cut_off(self, address: str) -> None:
        def endless() -> Iterator[bytes]:
            for _ in range(80):
                yield b" " * 2**16

        answer = httpx.post(f"{address}/gradio_api/queue/join", content=endless(), timeout=30)
        assert (answer.status_code, answer.json()) == (
            413, {"detail": f"too large; allowed {gate.MAX_BODY} bytes"}
        )  # fmt: skip


class TestNonsense:
    @pytest.mark.parametrize(
        ("place", "value", "words"),
        [
            (2, "x" * 10**6, "too long"),
            (2, None, "the prompt is empty"),
            (2, "a\0b", "NUL"),
            (2, "\ud800", "UTF-8"),
            (3, "nto", "try noto"),
            (3, None, "style"),
            (4, "1e5", "try 100000"),
            (4, float("nan"), "seed; got nan"),
            (4, 2**70, "seed"),
            (4, "🎲", "seed"),
            (4, "9" * 5000, "seed"),
            (5, 1e9, "try 9"),
            (5, "many", "number of pictures; got many"),
            (5, None, "number of pictures"),
            (6, 1e9, "try 64"),
            (6, -1, "try 1"),
            (6, float("inf"), "steps; got inf"),
            (6, 1e300, "steps"),
            (6, True, "steps"),
            (7, float("nan"), "guidance; got nan"),
            (7, 1e308, "try 10"),
            (7, "x", "guidance; got x"),
            (8, "/etc/passwd", "no such model"),
            (8, None, "no such model"),
        ],
    )
    def test_one_line_says_what_is_wrong(
        self, page: gr.Blocks, place: int, value: Any, words: str
    ) -> None:
        someone = Someone(page, f"nonsense{place}", has_cookie=False)
        last = someone.draws([*GOOD[:place], value, *GOOD[place + 1 :]])
        error = last["output"]["error"]
        assert not last["success"] and words in error
        assert "\n" not in error and len(error) < 400
        assert not INNER.search(error.replace("/etc/passwd", ""))

    @pytest.mark.parametrize("run", ["abc", -5, 1e300, True, float("nan"), 10**400])
    def test_an_odd_run_number_is_a_new_run(self, page: gr.Blocks, run: Any) -> None:
        someone = Someone(page, "oddnumber12", has_cookie=False)
        assert someone.draws([None, run, *GOOD[2:]])["success"]

    @pytest.mark.parametrize(
        ("path", "body", "status"),
        [
            ("queue/join", b"", 422),
            ("queue/join", b"{", 422),
            ("queue/join", b"\xff\xfe", (400, 422)),
            ("queue/join", b"[1]", 422),
            ("queue/join", b"[" * 10**5 + b"]" * 10**5, 400),
            ("queue/join", b'{"data": [1], "fn_index": ' + b"9" * 5000 + b"}", (400, 422)),
            ("queue/join", {"data": GOOD}, 422),
            ("queue/join", {"data": GOOD, "fn_index": 10**6, "session_hash": "s"}, 404),
            ("queue/join", {"data": GOOD, "fn_index": True, "session_hash": "s"}, 404),
            ("queue/join", {"data": GOOD, "fn_index": "0", "session_hash": "s"}, 404),
            ("queue/join", {"data": GOOD, "fn_index": [0], "session_hash": "s"}, 404),
            ("queue/join", {"data": GOOD, "fn_index": 0, "session_hash": {"a": 1}}, 422),
            ("call/draw", {"data": GOOD[:3]}, 422),
            ("call/draw", {"data": GOOD + GOOD}, 422),
            ("call/draw", {"data": {"a": 1}}, 422),
            ("call/draw", {"data": [*GOOD[:2], {"path": "/etc/passwd"}, *GOOD[3:]]}, 422),
            ("call/draw", {"data": [*GOOD[:8], ["tiny"]]}, 422),
            ("call/nothing", {"data": GOOD}, 404),
            ("call/stop", {"data": [None]}, 404),
            ("call/v2/nothing", {"a": 1}, 400),
            ("call/v2/draw", {"no_such_argument": 1}, 400),
            ("run/predict", {"data": []}, 404),
            ("cancel", {"session_hash": 1}, 422),
            ("reset", {}, 422),
        ],
    )
    def test_what_cannot_be_read_is_refused(
        self, address: str, path: str, body: Any, status: Any
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body)
        answer = httpx.post(
            f"{address}/gradio_api/{path}", content=content,
            headers={"content-type": "application/json"},
        )  # fmt: skip
        assert answer.status_code in (status if isinstance(status, tuple) else (status,))
        assert answer.json()["detail"] and not INNER.search(answer.text[:2000])

    def test_a_hundred_thousand_headers_are_refused(self, address: str) -> None:
        port, began = int(address.rsplit(":", 1)[1]), time.monotonic()
        with socket.create_connection(("127.0.0.1", port), timeout=10) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n")
            try:
                for _ in range(1000):
                    raw.sendall(b"x: y\r\n" * 100)
                raw.sendall(b"\r\n")
            except OSError:
                pass  # it stopped listening
            try:
                answer = raw.recv(100)
            except OSError:
                answer = b""
        assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
        assert time.monotonic() - began < 5

    def test_an_unknown_address_is_404(self, address: str) -> None:
        assert httpx.get(f"{address}/gradio_api/nothing").status_code == 404

    def test_the_server_lives_on(self, page: gr.Blocks) -> None:
        assert Someone(page, "afterwards1").draws(GOOD)["success"]


class TestHealth:
    def test_it_says_what_runs_and_who_waits(self, address: str) -> None:
        answer = httpx.get(f"{address}/healthz")
        assert answer.json() == {
            "status": "ok", "version": __version__, "waiting": 0, "limit": 32
        }  # fmt: skip

    def test_a_fault_of_ours_is_a_number(self, caplog: pytest.LogCaptureFixture) -> None:
        async def broken(scope: Any, receive: Any, send: Any) -> None:
            raise RuntimeError("/secret/path")

        answer = asyncio.run(fetch(gate.Gate(broken), "GET", "/"))
        number = re.search(r"error ([0-9a-f]{8})", answer.text)
        assert answer.status_code == 400 and number and number[1] in caplog.text
        assert "secret" not in answer.text


async def fetch(inner: Any, method: str, path: str, **more: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=inner, client=more.pop("client", ("10.0.0.1", 1)))
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as http:
        return await http.request(method, path, **more)


class TestPassword:
    def test_waits_grow_and_are_forgiven(self) -> None:
        waits: list[float] = []

        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        async def story() -> list[int]:
            async def login(request: Request) -> Response:
                form = (await request.body()).decode()
                return PlainTextResponse("", 200 if "right" in form else 400)

            inner = Starlette(routes=[Route("/login", login, methods=["POST"])])
            door = gate.Gate(inner, patience=Patience(sleep))
            words = ["wrong"] * 20 + ["right", "wrong"]
            answers = [await fetch(door, "POST", "/login", content=word) for word in words]
            other = await fetch(door, "POST", "/login", content="x", client=("10.0.0.2", 1))
            return [answer.status_code for answer in (*answers, other)]

        assert asyncio.run(story()) == [400] * 20 + [200, 400, 400]
        assert waits[:9] == [0, 0, 0, 1, 2, 4, 8, 16, 30]
        assert waits[9:21] == [30] * 12 and waits[21:] == [0, 0]

    def test_many_at_once_do_not_get_around_the_wait(self) -> None:
        async def story() -> tuple[int, int]:
            patience, through = Patience(), 0

            async def attempt() -> None:
                nonlocal through
                async with patience.turn("10.0.0.1"):
                    through += 1
                    patience.note("10.0.0.1", was_right=False)

            tasks = [asyncio.create_task(attempt()) for _ in range(50)]
            await asyncio.sleep(0.2)
            crowded = sum(t.done() and isinstance(t.exception(), Crowded) for t in tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            return crowded, through

        assert asyncio.run(story()) == (46, 3)  # four stand in line, the fourth waits a second

    def test_a_household_is_one_address(self) -> None:
        patience = Patience()
        for last in range(5):
            patience.note(f"2001:db8::{last}", was_right=False)
        assert patience.seconds("2001:db8::ffff") == 4.0
        assert patience.seconds("2001:db8:1::1") == 0.0

    def test_nothing_is_shown_without_the_password(
        self, tiny_model: Path, free_port: Callable[[], int]
    ) -> None:
        page = app.start(
            [str(tiny_model)], listen="127.0.0.1", port=free_port(), auth=("ada", "löve:lace")
        )
        try:
            with httpx.Client(base_url=str(page.local_url).rstrip("/"), timeout=60) as http:
                assert http.get("/config").status_code == 401
                assert "bl-prompt" not in http.get("/").text
                body = {"data": GOOD, "session_hash": "s", "fn_index": number_of(page, "draw")}
                assert http.post("/gradio_api/queue/join", json=body).status_code == 401
                assert http.get("/gradio_api/queue/status").status_code == 401
                assert http.get("/healthz").json()["status"] == "ok"
                for user, word in (("ada", ""), ("ada", "love"), ("eve", "löve:lace")):
                    wrong = http.post("/login", data={"username": user, "password": word})
                    assert wrong.status_code in (400, 422) and not INNER.search(wrong.text)
                right = http.post("/login", data={"username": "ada", "password": "löve:lace"})
                assert right.status_code == 200
                assert http.get("/config").status_code == 200
                assert "bl-prompt" in http.get("/").text
        finally:
            page.close(verbose=False)
