"""The addresses worlds are played through: what they answer, whom they let in, what they bear."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blockloom import app
from blockloom.core.errors import DataError, ModelError, ResourceError, UsageError
from blockloom.demo import answers, gate, world_page, world_routes, world_saves, worlds
from blockloom.demo.shelf import Shelf
from blockloom.pipelines.auto import AutoPipeline
from blockloom.pipelines.guard import check_folder
from blockloom.pipelines.world_files import Controls, default_controls, read_controls, read_starts

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
LEFT, RIGHT = ["ArrowLeft"], ["ArrowRight"]


@pytest.fixture(scope="module", autouse=True)
def loops(event_loops: None) -> None:
    """Every page of this module leaves event loops behind."""


@pytest.fixture(scope="module")
def page(tiny_world: Path, free_port: Callable[[], int]) -> Iterator[gr.Blocks]:
    served = app.start([str(tiny_world)], listen="127.0.0.1", port=free_port())
    yield served
    served.close(verbose=False)


@pytest.fixture
def player(page: gr.Blocks) -> Iterator["Player"]:
    one = Player(page)
    yield one
    one.leave()


class Player:
    """A browser as the server sees one: a cookie, and the keys it was given."""

    def __init__(self, page: gr.Blocks) -> None:
        self.http = httpx.Client(base_url=str(page.local_url).rstrip("/"), timeout=120)
        self.http.get("/")
        self.keys: list[str] = []

    def post(self, path: str, **asked: Any) -> httpx.Response:
        return self.http.post(f"/world/{path}", json=asked)

    def frames(self, answer: httpx.Response) -> tuple[dict[str, Any], np.ndarray]:
        assert answer.status_code == 200, answer.text
        about = json.loads(answer.headers["x-world"])
        shape = (about["frames"], about["height"], about["width"], 3)
        return about, np.frombuffer(answer.content, np.uint8).reshape(shape)

    def new(self, **change: Any) -> tuple[str, np.ndarray]:
        asked = {"model": "tiny-world", "start": 0, "seed": 7} | change
        about, frames = self.frames(self.post("new", **asked))
        self.keys.append(about["key"])
        return about["key"], frames

    def step(self, key: str, pressed: list[str]) -> np.ndarray:
        return self.frames(self.post("step", key=key, keys=pressed))[1]

    def leave(self) -> None:
        for key in self.keys:
            self.post("close", key=key)
        self.http.close()


@pytest.fixture(scope="module")
def pipe(tiny_world: Path) -> Any:
    return AutoPipeline.from_pretrained(str(tiny_world))


class TestPlaying:
    def test_frames_are_those_of_the_pipeline(
        self, player: Player, pipe: Any, tiny_world: Path
    ) -> None:
        starts = read_starts(tiny_world, 3)
        assert starts is not None
        key, shown = player.new(start=1, seed="7")
        assert np.array_equal(shown[0], starts.frames[1, -1])
        session = pipe.start(starts.frames[1], seed=7, actions=list(starts.actions[1]))
        for pressed, action in ((LEFT, [-1, 0, 0]), ([], [0, 0, 0]),
                                (["ArrowRight", "ArrowUp"], [1, 0.3, 0])):  # fmt: skip
            assert np.array_equal(player.step(key, pressed), session.step(action))

    def test_two_players_do_not_mix(self, page: gr.Blocks, player: Player) -> None:
        other = Player(page)
        mine, _ = player.new()
        theirs, _ = other.new()
        assert mine != theirs and len(mine) == 32
        alone = [player.step(mine, LEFT) for _ in range(3)]
        again, _ = player.new()
        for frame in alone:
            assert not np.array_equal(other.step(theirs, RIGHT), frame)
            assert np.array_equal(player.step(again, LEFT), frame)
        for path in ("step", "fork", "save"):
            answer = other.post(path, key=mine)
            assert (answer.status_code, "no longer there" in answer.text) == (410, True)
        other.post("close", key=mine)
        assert player.post("step", key=mine).status_code == 200
        other.leave()

    def test_a_fork_and_a_saved_file_go_on_alike(
        self, player: Player, pipe: Any, tmp_path: Path
    ) -> None:
        key, _ = player.new()
        last = player.step(key, LEFT)
        about, shown = player.frames(player.post("fork", key=key))
        player.keys.append(about["key"])
        assert about["key"] != key and about["at"] == 5 and np.array_equal(shown, last)
        content = player.post("save", key=key).content
        on = [player.step(key, RIGHT) for _ in range(2)]
        assert np.array_equal([player.step(about["key"], RIGHT) for _ in range(2)], on)
        loaded = player.http.post("/world/load?model=tiny-world", content=content)
        about, shown = player.frames(loaded)
        player.keys.append(about["key"])
        assert about["at"] == 5 and np.array_equal(shown, last)
        assert np.array_equal([player.step(about["key"], RIGHT) for _ in range(2)], on)
        path = tmp_path / "session.safetensors"
        path.write_bytes(content)
        session = pipe.resume(path)  # the file is the library's own
        assert np.array_equal([session.step([1, 0, 0]) for _ in range(2)], on)

    def test_a_start_is_a_picture(self, player: Player, tiny_world: Path) -> None:
        starts = read_starts(tiny_world, 3)
        assert starts is not None
        answer = player.http.get("/world/start", params={"model": "tiny-world", "start": 1})
        with Image.open(BytesIO(answer.content)) as image:
            assert np.array_equal(np.asarray(image), starts.frames[1, -1])

    def test_one_opens_a_bounded_number(self, player: Player) -> None:
        for _ in range(worlds.MAX_OF_ONE):
            player.new()
        answer = player.post("new", model="tiny-world", start=0, seed=1)
        assert answer.status_code == 429 and "allowed 6" in answer.text
        assert player.post("fork", key=player.keys[0]).status_code == 429
        player.post("close", key=player.keys[0])
        player.new()


class TestWhoMayPlay:
    @pytest.mark.parametrize(
        "headers",
        [{"origin": "https://evil.example"}, {"host": "evil.example"},
         {"sec-fetch-site": "cross-site", "sec-fetch-mode": "cors"}],
    )  # fmt: skip
    @pytest.mark.parametrize("path", ["new", "step", "fork", "save", "load", "close"])
    def test_no_foreign_page(self, player: Player, path: str, headers: dict[str, str]) -> None:
        key, _ = player.new()
        asked = {"key": key, "model": "tiny-world"}
        answer = player.http.post(f"/world/{path}", json=asked, headers=headers)
        assert answer.status_code in (400, 403) and "x-world" not in answer.headers
        assert player.post("step", key=key).status_code == 200  # nor was it closed

    def test_no_one_without_the_password(
        self, tiny_world: Path, free_port: Callable[[], int]
    ) -> None:
        page = app.start(
            [str(tiny_world)], listen="127.0.0.1", port=free_port(), auth=("ada", "lovelace")
        )
        try:
            player = Player(page)
            for path in ("new", "step", "fork", "save", "load", "close"):
                assert player.post(path, model="tiny-world").status_code == 401
            assert player.http.get("/world/start?model=tiny-world").status_code == 401
            player.http.post("/login", data={"username": "ada", "password": "lovelace"})
            key, _ = player.new()
            assert player.step(key, LEFT).shape == (1, 16, 16, 3)
            player.leave()
        finally:
            page.close(verbose=False)


class TestNonsense:
    @pytest.mark.parametrize(
        ("path", "body", "status", "words"),
        [
            ("new", {"model": "/etc/passwd"}, 404, "no such model"),
            ("new", {"model": None}, 404, "no such model"),
            ("new", {"model": "tiny-world", "start": 2, "seed": 1}, 422, "try 1"),
            ("new", {"model": "tiny-world", "start": "x", "seed": 1}, 422, "start; got x"),
            ("new", {"model": "tiny-world", "start": True, "seed": 1}, 422, "start"),
            ("new", {"model": "tiny-world", "start": [0], "seed": 1}, 422, "start"),
            ("new", {"model": "tiny-world", "start": 0, "seed": "1e5"}, 422, "try 100000"),
            ("new", {"model": "tiny-world", "start": 0, "seed": -1}, 422, "try 0"),
            ("new", {"model": "tiny-world", "start": 0, "seed": 2**64}, 422, "seed"),
            ("new", {"model": "tiny-world", "start": 0, "seed": {"a": 1}}, 422, "seed"),
            ("step", {"key": "x" * 32}, 410, "no longer there"),
            ("step", {"key": None}, 410, "no longer there"),
            ("step", {"key": ["a"]}, 410, "no longer there"),
            ("step", {"key": "k", "keys": "ArrowLeft"}, 422, "keys"),
            ("step", {"key": "k", "keys": [1]}, 422, "keys"),
            ("step", {"key": "k", "keys": ["a"] * 17}, 422, "keys"),
            ("step", b"", 422, "no JSON object"),
            ("step", b"\xff\xfe", 422, "no JSON object"),
            ("step", b"[1]", 422, "no JSON object"),
            ("step", b"[" * 4000, 422, "no JSON object"),
            ("step", b" " * 5000, 422, "too long"),
            ("load?model=nothing", b"x", 404, "no such model"),
            ("load?model=tiny-world", b"", 422, "no session"),
            ("load?model=tiny-world", b"\x89PNG" * 1000, 422, "no session"),
            ("load?model=tiny-world", b"\xff" * 8 + b"{}", 422, "no session"),
        ],
    )
    def test_one_line_says_what_is_wrong(
        self, player: Player, path: str, body: Any, status: int, words: str
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = player.http.post(f"/world/{path}", content=content)
        assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.text
        assert "\n" not in answer.json()["detail"] and ".py" not in answer.text

    @pytest.mark.parametrize("keys", [["nothing"], ["__proto__", "\0"], ["ArrowLeft"] * 16])
    def test_odd_keys_are_no_worse_than_none(self, player: Player, keys: list[str]) -> None:
        key, _ = player.new()
        same, _ = player.new()
        wanted = player.step(same, LEFT if "ArrowLeft" in keys else [])
        assert np.array_equal(player.step(key, keys), wanted)

    def test_files_of_wrong_contents_are_refused(self, player: Player, tmp_path: Path) -> None:
        key, _ = player.new()
        path = tmp_path / "s.safetensors"
        path.write_bytes(player.post("save", key=key).content)
        with safe_open(path, "pt") as file:
            about = file.metadata()
        for change in (
            lambda s: s | {"values": s["values"].double()},
            lambda s: s | {"values": s["values"] * float("nan")},
            lambda s: s | {"generator.0": s["generator.0"] * 0},
            lambda s: {k: v for k, v in s.items() if k != "block"},
            lambda s: s | {"values": s["values"][:, :-1].contiguous()},
        ):
            save_file(change(load_file(path)), tmp_path / "bad.safetensors", about)
            content = (tmp_path / "bad.safetensors").read_bytes()
            answer = player.http.post("/world/load?model=tiny-world", content=content)
            assert (answer.status_code, "no session of this model" in answer.text) == (422, True)
        for settings in (
            {"steps": 10**9},
            {"guidance": 1e9},
            {"prompt": "x" * 9999},
            {"steps": []},
        ):
            told = json.dumps(json.loads(about["session"]) | settings)
            save_file(load_file(path), tmp_path / "bad.safetensors", about | {"session": told})
            content = (tmp_path / "bad.safetensors").read_bytes()
            answer = player.http.post("/world/load?model=tiny-world", content=content)
            assert (answer.status_code, "no session of a world" in answer.text) == (422, True)
        save_file(load_file(path), path, about | {"shown": "AAAA"})  # no picture: loads without
        answer = player.http.post("/world/load?model=tiny-world", content=path.read_bytes())
        assert json.loads(answer.headers["x-world"])["frames"] == 0

    def test_a_file_may_be_larger_than_other_requests(self, player: Player) -> None:
        size = gate.MAX_BODY + 2**16
        answer = player.http.post("/world/load?model=tiny-world", content=b"x" * size)
        assert answer.status_code == 422  # let in, and no session

    def test_a_body_without_end_is_cut_off(self, player: Player) -> None:
        def endless() -> Iterator[bytes]:
            for _ in range(70 * 16):
                yield b" " * 2**16

        answer = player.http.post("/world/load?model=tiny-world", content=endless())
        assert answer.status_code == 413


class TestShelfOfWorlds:
    def test_worlds_are_offered_apart_from_pictures(
        self, tiny_world: Path, tiny_model: Path
    ) -> None:
        shelf = Shelf([str(tiny_world), str(tiny_model)])
        assert "tiny-world" in shelf.names_of("world") and "tiny" in shelf.names
        assert "tiny-world" not in shelf.names and "tiny" not in shelf.names_of("world")
        offer = worlds.Worlds(shelf).offers()[0]
        assert offer == {
            "name": "tiny-world", "title": "Tiny world", "fps": 12.5, "starts": 2,
            "keys": ["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"],
        }  # fmt: skip
        for name in (str(tiny_world), "tiny", None):
            with pytest.raises(ModelError, match="no such model"):
                worlds.Worlds(shelf).open("v", name, 0, 0)

    def test_texts_of_a_world_are_escaped(self) -> None:
        offer = {"name": "a", "title": '"><script>alert(1)</script>', "keys": [], "fps": 9}
        assert "<script" not in world_page.markup([offer])

    def test_a_world_without_starts_begins_with_nothing(
        self, tiny_world: Path, tmp_path: Path
    ) -> None:
        bare = bare_copy(tiny_world, tmp_path)
        arcade = worlds.Worlds(Shelf([str(bare)]))
        offer = arcade.offers()[0]
        assert (offer["starts"], offer["keys"], offer["fps"]) == (0, ["1", "2", "3"], 12.5)
        world = arcade.open("v", "bare", 0, 3)
        assert world.shown is None and world.session.num_frames == 0
        frame = arcade.step(world, ["2"])
        assert world.shown is not None and np.array_equal(frame[0], world.shown)
        with pytest.raises(UsageError, match="from nothing"):
            arcade.picture("bare", 0)

    def test_idle_worlds_are_forgotten(self, tiny_world: Path) -> None:
        now = 0.0
        arcade = worlds.Worlds(Shelf([str(tiny_world)]), clock=lambda: now)
        old = arcade.open("v", "tiny-world", 0, 0)
        now = 600.0
        young = arcade.open("v", "tiny-world", 0, 0)
        now = worlds.IDLE_SECONDS + 1
        assert arcade.sweep() == 1
        assert arcade.find("v", young.key) is young
        with pytest.raises(answers.Gone):
            arcade.find("v", old.key)

    def test_all_together_open_a_bounded_number(
        self, tiny_world: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(worlds, "MAX_WORLDS", 2)
        arcade = worlds.Worlds(Shelf([str(tiny_world)]))
        for visitor in "ab":
            arcade.open(visitor, "tiny-world", 0, 0)
        with pytest.raises(ResourceError, match="too many worlds"):
            arcade.open("c", "tiny-world", 0, 0)


def bare_copy(folder: Path, where: Path) -> Path:
    """Copy a world without its starts and keys."""
    import shutil

    bare = where / "bare"
    shutil.copytree(folder, bare)
    for name in ("starts.npz", "world.json"):
        (bare / name).unlink()
    return bare


class TestFilesOfAWorld:
    def test_pressed_keys_add_up_within_their_reach(self) -> None:
        keys = {"l": (-1.0, 0.1), "r": (1.0, 0.1), "g": (0.0, 0.3), "t": (0.5, 0.5)}
        controls = Controls(keys, (0.0, 0.1))
        assert controls.action([]) == [0.0, 0.1]
        assert controls.action(["l", "r"]) == [0.0, 0.1]
        assert controls.action(["r", "g", "g", "?"]) == [1.0, pytest.approx(0.3)]
        assert controls.action(["r", "t"]) == [1.0, 0.5]
        assert default_controls(2).action(["2"]) == [0.0, 1.0]
        assert list(default_controls(30).keys) == list("123456789")

    @pytest.mark.parametrize(
        ("told", "words"),
        [
            ({"controls": {"a": [1, 2]}}, "allowed 3 numbers"),
            ({"controls": {"a": [1, 2, True]}}, "allowed 3 numbers"),
            ({"controls": {"a": [1, 2, 1e9]}}, "allowed 3 numbers"),
            ({"controls": {"": [1, 2, 3]}}, "name of a key"),
            ({"controls": [1]}, "names of keys"),
            ({"idle": "none"}, "idle"),
            ({"fps": 0}, "1 to 60"),
            ({"fps": "12"}, "1 to 60"),
            ({"title": "a\nb"}, "title"),
            ({"keys": {}}, "unknown key"),
        ],
    )
    def test_keys_that_make_no_sense_are_refused(
        self, tmp_path: Path, told: dict[str, Any], words: str
    ) -> None:
        (tmp_path / "world.json").write_text(json.dumps(told))
        with pytest.raises(ModelError, match=words):
            read_controls(tmp_path, 3)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"frames": np.zeros((2, 4, 8, 16, 3), np.uint8)}, "frames; got uint8"),
            ({"frames": np.zeros((2, 4, 16, 16, 3), np.float32)}, "frames; got float32"),
            ({"frames": np.zeros((0, 4, 16, 16, 3), np.uint8)}, "frames; got"),
            ({"actions": np.zeros((2, 4, 2), np.float32)}, "actions; got"),
            ({"actions": np.full((2, 4, 3), np.nan, np.float32)}, "finite"),
            ({"actions": np.array([[None]], dtype=object)}, "cannot be read"),
            ({"more": np.zeros(1)}, "not made of"),
        ],
    )
    def test_starts_that_make_no_sense_are_refused(
        self, tmp_path: Path, change: dict[str, Any], words: str
    ) -> None:
        good = {"frames": np.zeros((2, 4, 16, 16, 3), np.uint8),
                "actions": np.zeros((2, 4, 3), np.float32)}  # fmt: skip
        np.savez(tmp_path / "starts.npz", **(good | change))
        with pytest.raises(ModelError, match=words):
            read_starts(tmp_path, 3, (16, 16))

    def test_only_this_archive_may_lie_in_a_model_folder(
        self, tiny_world: Path, tmp_path: Path
    ) -> None:
        check_folder(tiny_world)
        bare = bare_copy(tiny_world, tmp_path)
        np.savez(bare / "other.npz", frames=np.zeros(1))
        with pytest.raises(ModelError, match=r"other\.npz is a pickle"):
            check_folder(bare)
        (bare / "other.npz").unlink()
        (bare / "model" / "starts.npz").write_bytes(b"x")
        with pytest.raises(ModelError, match=r"model/starts\.npz is a pickle"):
            check_folder(bare)
        (bare / "model" / "starts.npz").unlink()
        (bare / "starts.npz").write_bytes(b"PK" + struct.pack("<I", 7) * 9)
        with pytest.raises(ModelError, match=r"starts\.npz is no archive"):
            check_folder(bare)


def test_too_many_at_once_are_sent_away(tiny_world: Path) -> None:
    import asyncio

    routes = world_routes.WorldRoutes(worlds.Worlds(Shelf([str(tiny_world)])))

    async def story() -> int:
        import threading

        gate_opens = threading.Event()
        jobs = [asyncio.create_task(routes._work(gate_opens.wait)) for _ in range(70)]
        await asyncio.sleep(0.05)
        refused = [job for job in jobs if job.done()]
        assert all(isinstance(job.exception(), answers.Busy) for job in refused)
        gate_opens.set()
        await asyncio.gather(*jobs, return_exceptions=True)
        return len(refused)

    assert asyncio.run(story()) == 70 - world_routes.MAX_WAITING


def test_a_session_file_must_say_how_it_was_played(tmp_path: Path) -> None:
    import torch

    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(DataError, match="no session of a world"):
        world_saves.check_session(path)
