"""The addresses videos are made through: what streams, what is refused, what can be fetched."""

import base64
import json
import struct
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
import pytest
from PIL import Image

from blockloom import app
from blockloom.commands.clips import digest
from blockloom.core.errors import ResourceError
from blockloom.demo import answers, video_routes, videos
from blockloom.demo.shelf import Shelf
from blockloom.pipelines.auto import AutoPipeline
from blockloom.pipelines.params import VideoParams, read_record
from blockloom.pipelines.video_input import read_video
from blockloom.pipelines.video_media import read_video_metadata

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
WISH: dict[str, Any] = {
    "model": "tiny-clips", "prompt": "a fox", "seed": "7", "frames": 5, "form": "frames"
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def loops(event_loops: None) -> None:
    """Every page of this module leaves event loops behind."""


@pytest.fixture(scope="module")
def page(tiny_clips: Path, free_port: Callable[[], int]) -> Iterator[gr.Blocks]:
    served = app.start([str(tiny_clips)], listen="127.0.0.1", port=free_port())
    yield served
    served.close(verbose=False)


@pytest.fixture
def http(page: gr.Blocks) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=str(page.local_url).rstrip("/"), timeout=120) as client:
        client.get("/")
        yield client


@pytest.fixture(scope="module")
def made(tiny_clips: Path) -> np.ndarray:
    """The frames of `WISH` as the library makes them."""
    pipe = AutoPipeline.from_pretrained(str(tiny_clips))
    frames: np.ndarray = pipe("a fox", seed=7, num_frames=5).frames[0]
    return frames


def parts(content: bytes) -> list[tuple[str, Any]]:
    """Split an answer into its messages."""
    found, place = [], 0
    while place < len(content):
        kind, size = chr(content[place]), struct.unpack_from(">I", content, place + 1)[0]
        body = content[place + 5 : place + 5 + size]
        assert len(body) == size
        found.append((kind, json.loads(body) if kind == "J" else body))
        place += 5 + size
    return found


def told(messages: list[tuple[str, Any]], kind: str) -> dict[str, Any]:
    return next(body for letter, body in messages if letter == "J" and body["kind"] == kind)


def picture(size: tuple[int, int] = (20, 20), form: str = "PNG") -> str:
    buffer = BytesIO()
    Image.new("RGB", size, (200, 30, 10)).save(buffer, form)
    return base64.b64encode(buffer.getvalue()).decode()


class TestMaking:
    def test_frames_stream_and_are_those_of_the_pipeline(
        self, http: httpx.Client, made: np.ndarray
    ) -> None:
        messages = parts(http.post("/video/new", json=WISH).content)
        blocks = [np.frombuffer(body, np.uint8) for letter, body in messages if letter == "F"]
        assert len(blocks) == 5  # one message per block
        assert np.array_equal(np.concatenate(blocks).reshape(5, 16, 16, 3), made)
        about = told(messages, "about")
        assert (about["form"], about["frames"], about["width"]) == ("frames", 5, 16)
        done = told(messages, "done")
        assert done["whole"] is True and done["frames"] == 5

    @pytest.mark.parametrize("form", ["h264", "vp9"])
    def test_an_mp4_grows(self, http: httpx.Client, tmp_path: Path, form: str) -> None:
        messages = parts(http.post("/video/new", json=WISH | {"form": form}).content)
        pieces = [body for letter, body in messages if letter == "M"]
        assert told(messages, "about")["form"] == "mp4" and len(pieces) == 5
        assert told(messages, "mime")["mime"].startswith('video/mp4; codecs="')
        for count in (1, 5):  # what came so far is a video
            (tmp_path / "a.mp4").write_bytes(b"".join(pieces[:count]))
            assert len(read_video(tmp_path / "a.mp4").frames) == count

    def test_the_file_carries_its_record(
        self, http: httpx.Client, tmp_path: Path, made: np.ndarray
    ) -> None:
        key = told(parts(http.post("/video/new", json=WISH).content), "about")["key"]
        path = tmp_path / "a.mp4"
        path.write_bytes(http.post("/video/file", json={"key": key}).content)
        params = read_record(read_video_metadata(path), VideoParams, "a.mp4").params
        assert (params.prompt, params.seed, params.num_frames) == ("a fox", 7, 5)
        video = read_video(path).frames
        assert video.shape == (5, 128, 128, 3) and params.scale == 8
        small = video.reshape(5, 16, 8, 16, 8, 3).mean((2, 4))
        assert np.abs(small - made).mean() < 12  # coded, with halved colour

    @pytest.mark.parametrize("form", ["PNG", "JPEG"])
    def test_a_picture_is_the_first_frame(self, http: httpx.Client, form: str) -> None:
        asked = WISH | {"picture": picture(form=form)}
        messages = parts(http.post("/video/new", json=asked).content)
        first = next(np.frombuffer(body, np.uint8) for letter, body in messages if letter == "F")
        assert np.abs(first.reshape(16, 16, 3).astype(int) - [200, 30, 10]).max() < 6

    def test_stop_keeps_what_is_there(self, tiny_clips: Path) -> None:
        made = videos.Videos(Shelf([str(tiny_clips)]))
        film = made.order("v", WISH)
        kinds = []
        for message in video_routes.messages(made, film, "frames"):
            kinds.append(chr(message[0]))
            if kinds.count("F") == 2:
                made.find("v", film.key).is_stopped = True
        assert kinds.count("F") == 2 and sum(map(len, film.parts)) == 2
        end = json.loads(message[5:])
        assert (end["kind"], end["whole"], end["frames"]) == ("done", False, 2)
        assert made.file(film)[4:8] == b"ftyp"

    def test_stop_in_time_makes_nothing(self, http: httpx.Client) -> None:
        with http.stream("POST", "/video/new", json=WISH | {"frames": 240}) as answer:
            chunks = answer.iter_raw()
            chunk = next(chunks)
            key = told(parts(chunk[: 5 + struct.unpack_from(">I", chunk, 1)[0]]), "waiting")["key"]
            assert http.post("/video/stop", json={"key": key}).status_code == 200
            rest = b"".join(chunks)
        assert b'"whole": false' in rest

    def test_worlds_make_videos_too(self, tiny_world: Path) -> None:
        made = videos.Videos(Shelf([str(tiny_world)]))
        offer = next(o for o in made.offers() if o["name"] == "tiny-world")
        assert (offer["acts"], offer["starts"], offer["frames"]) == (True, 2, 6)
        film = made.order("v", WISH | {"model": "tiny-world", "start": 1})
        parts = [part for part in made.make(film) if isinstance(part, np.ndarray)]
        starts = made.starts("tiny-world")
        assert starts is not None and np.array_equal(parts[0][0], starts.frames[1, -1])
        assert film.params.input_sha256 == digest(parts[0][:1]) and film.params.fps == 12.5


class TestWhoMay:
    @pytest.mark.parametrize("path", ["new", "stop", "file"])
    def test_no_foreign_page(self, http: httpx.Client, path: str) -> None:
        for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
            answer = http.post(f"/video/{path}", json=WISH, headers=headers)
            assert answer.status_code in (400, 403) and len(answer.content) < 100

    def test_a_video_is_its_visitors(self, page: gr.Blocks, http: httpx.Client) -> None:
        key = told(parts(http.post("/video/new", json=WISH).content), "about")["key"]
        with httpx.Client(base_url=str(http.base_url), timeout=60) as thief:
            thief.get("/")
            for path in ("stop", "file"):
                answer = thief.post(f"/video/{path}", json={"key": key})
                assert (answer.status_code, "no longer there" in answer.text) == (410, True)
        assert http.post("/video/file", json={"key": key}).status_code == 200

    def test_no_one_without_the_password(
        self, tiny_clips: Path, free_port: Callable[[], int]
    ) -> None:
        page = app.start(
            [str(tiny_clips)], listen="127.0.0.1", port=free_port(), auth=("ada", "lovelace")
        )
        try:
            with httpx.Client(base_url=str(page.local_url).rstrip("/"), timeout=60) as http:
                for path in ("new", "stop", "file"):
                    assert http.post(f"/video/{path}", json=WISH).status_code == 401
        finally:
            page.close(verbose=False)

    def test_two_at_once_are_enough(self, tiny_clips: Path) -> None:
        made = videos.Videos(Shelf([str(tiny_clips)]))
        films = [made.order("v", WISH) for _ in range(2)]
        with pytest.raises(ResourceError, match="two videos of yours"):
            made.order("v", WISH)
        made.order("w", WISH)
        films[0].is_over = True
        made.order("v", WISH)

    def test_old_videos_are_forgotten(self, tiny_clips: Path) -> None:
        now = 0.0
        made = videos.Videos(Shelf([str(tiny_clips)]), clock=lambda: now)
        films = []
        for _ in range(videos.MAX_OF_ONE + 1):
            films.append(made.order("v", WISH))
            films[-1].is_over = True
        for film in films[1:]:
            made.find("v", film.key)
        with pytest.raises(answers.Gone):
            made.find("v", films[0].key)
        now = videos.KEEP_SECONDS + 1
        with pytest.raises(answers.Gone):
            made.find("v", films[-1].key)


class TestNonsense:
    @pytest.mark.parametrize(
        ("change", "status", "words"),
        [
            ({"model": "/etc/passwd"}, 404, "no such model"),
            ({"model": None}, 404, "no such model"),
            ({"prompt": "x" * 10**5}, 422, "too long"),
            ({"prompt": "a\0b"}, 422, "NUL"),
            ({"seed": "1e5"}, 422, "try 100000"),
            ({"seed": -1}, 422, "try 0"),
            ({"seed": [1]}, 422, "seed"),
            ({"frames": 1}, 422, "try 2"),
            ({"frames": 10**9}, 422, "try 240"),
            ({"frames": None}, 422, "frames"),
            ({"start": 0}, 422, "no first frames"),
            ({"picture": "x"}, 422, "no picture"),
            ({"picture": 5}, 422, "no picture"),
            ({"picture": base64.b64encode(b"\x89PNG" * 99).decode()}, 422, "no picture"),
            ({"picture": picture((2000, 2000))}, 422, "too large"),
            ({"picture": "A" * (2**20 + 4)}, 422, "no picture"),
            ({"picture": "A" * (2**20 + 2**15)}, 422, "too long"),
        ],
    )
    def test_one_line_says_what_is_wrong(
        self, http: httpx.Client, change: dict[str, Any], status: int, words: str
    ) -> None:
        answer = http.post("/video/new", json=WISH | change)
        assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.text
        assert "\n" not in answer.json()["detail"]

    def test_an_unknown_form_gets_frames(self, http: httpx.Client) -> None:
        messages = parts(http.post("/video/new", json=WISH | {"form": {"a": 1}}).content)
        assert told(messages, "about")["form"] == "frames"

    def test_a_fault_of_ours_is_a_number(
        self, tiny_clips: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("/secret/path")

        monkeypatch.setattr(videos, "as_video", broken)
        made = videos.Videos(Shelf([str(tiny_clips)]))
        film = made.order("v", WISH)
        (last,) = video_routes.messages(made, film, "frames")
        line = json.loads(last[5:])["line"]
        assert line.startswith("something broke here (error ") and film.is_over
        assert line[-9:-1] in caplog.text
