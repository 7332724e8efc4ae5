"""The addresses motions are made through: what streams, what is kept, refused, and fetched."""

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import gradio as gr
import httpx
import numpy as np
import pytest
from tests.tiny_motion import tiny_joints

from blockloom import app
from blockloom.core.errors import ResourceError
from blockloom.demo import answers, motion_files, motion_plan, motion_routes, motions
from blockloom.demo.shelf import Shelf
from blockloom.motion.bvh import parse_bvh
from blockloom.motion.bvh_motion import bvh_to_motion, motion_to_bvh
from blockloom.motion.bvh_write import bvh_text
from blockloom.motion.clip import Motion, fk_error, resample
from blockloom.motion.skeleton import HUMAN22
from blockloom.pipelines.auto import AutoPipeline
from blockloom.pipelines.video_input import read_video

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PARTS = [{"text": "a person walks", "seconds": 0.6}, {"text": "it bends", "seconds": 0.4}]
WISH: dict[str, Any] = {"model": "tiny-motion", "seed": "7", "parts": PARTS}
INFILL = WISH | {"model": "tiny-infill"}


@pytest.fixture(scope="module", autouse=True)
def loops(event_loops: None) -> None:
    """Every page of this module leaves event loops behind."""


@pytest.fixture(scope="module")
def page(tiny_motion: Path, tiny_infill: Path, free_port: Callable[[], int]) -> Iterator[gr.Blocks]:
    named = [str(tiny_motion), str(tiny_infill)]
    served = app.start(named, listen="127.0.0.1", port=free_port())
    yield served
    served.close(verbose=False)


@pytest.fixture
def http(page: gr.Blocks) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=str(page.local_url).rstrip("/"), timeout=120) as client:
        client.get("/")
        yield client


@pytest.fixture(scope="module")
def offered(tiny_motion: Path, tiny_infill: Path) -> Shelf:
    return Shelf([str(tiny_motion), str(tiny_infill)])


def parts_of(content: bytes) -> tuple[dict[str, dict[str, Any]], list[np.ndarray]]:
    """Split an answer into what was told, by kind, and frames."""
    told, frames, place = {}, [], 0
    while place < len(content):
        kind, size = chr(content[place]), struct.unpack_from(">I", content, place + 1)[0]
        body = content[place + 5 : place + 5 + size]
        assert len(body) == size
        if kind == "J":
            words = json.loads(body)
            told[words["kind"]] = words
        else:
            assert kind == "F"
            frames.append(np.frombuffer(body, "<f4").reshape(-1, 22, 3))
        place += 5 + size
    return told, frames


def ask(http: httpx.Client, wish: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], np.ndarray]:
    answer = http.post("/motion/new", json=wish)
    assert answer.status_code == 200, answer.text
    told, frames = parts_of(answer.content)
    assert told["done"]["whole"] is True, told
    return told, np.concatenate(frames)


def fetched(http: httpx.Client, key: str, form: str) -> bytes:
    answer = http.post("/motion/file", json={"key": key, "form": form})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == motion_files.MEDIA[form]
    return answer.content


def walk(frames: int = 40) -> Motion:
    """A walk as a motion with rotations."""
    from blockloom.motion.features import features_to_motion, human_features

    still = np.zeros((frames + 1, 22, 4), np.float32)
    still[..., 0] = 1
    joints = tiny_joints("a person walks forward", frames + 1)
    return features_to_motion(human_features(Motion(joints, HUMAN22, 20.0, still)))


class TestMaking:
    def test_poses_stream_and_are_those_of_the_pipeline(
        self, http: httpx.Client, tiny_motion: Path
    ) -> None:
        told, frames = parts_of(http.post("/motion/new", json=WISH).content)
        assert len(frames) == 5  # one message per block of 4 frames
        pipe = AutoPipeline.from_pretrained(str(tiny_motion))
        texts = [part["text"] for part in PARTS]
        made = pipe(texts, seed=7, num_frames=20, segment_seconds=[0.6, 0.4]).motions[0]
        assert np.array_equal(np.concatenate(frames), made.joints)
        about = told["about"]
        assert (about["fps"], about["frames"], about["from"]) == (20, 20, 0)
        assert about["parts"] == [
            {"from": 0, "to": 12, "text": "a person walks", "given": False},
            {"from": 12, "to": 20, "text": "it bends", "given": False},
        ]
        assert told["done"]["frames"] == 20 and told["row"]["of"] == 5
        assert about["body"]["parents"] == list(HUMAN22.parents)
        sides = {bone["joint"]: bone["side"] for bone in about["body"]["bones"]}
        assert (sides[20], sides[21], sides[3]) == ("left", "right", "middle")

    def test_models_of_all_frames_together_make_part_after_part(
        self, http: httpx.Client, tiny_infill: Path
    ) -> None:
        told, frames = parts_of(http.post("/motion/new", json=INFILL).content)
        assert [len(piece) for piece in frames] == [12, 8]
        pipe = AutoPipeline.from_pretrained(str(tiny_infill))
        first = pipe("a person walks", seed=7, num_frames=12).motions[0]
        both = pipe("it bends", motion=first, seed=8, num_frames=20).motions[0]
        assert np.array_equal(np.concatenate(frames), both.joints)
        assert told["done"]["parts"][1]["from"] == 12

    def test_settings_reach_the_model(self, http: httpx.Client) -> None:
        wish = WISH | {"parts": PARTS[:1]}
        _, plain = ask(http, wish)
        _, again = ask(http, wish | {"guidance": "1"})
        _, guided = ask(http, wish | {"guidance": "3.5"})
        assert np.array_equal(plain, again) and not np.array_equal(plain, guided)
        assert not np.array_equal(plain, ask(http, wish | {"seed": 8})[1])

    def test_stop_keeps_what_is_there(self, offered: Shelf) -> None:
        made = motions.Motions(offered)
        take = made.order("v", WISH)
        kinds = []
        for message in motion_routes.messages(made, take):
            kinds.append(chr(message[0]))
            if kinds.count("F") == 2:
                made.find("v", take.key).is_stopped = True
        end = json.loads(message[5:])
        assert (end["kind"], end["whole"], end["frames"]) == ("done", False, 8)
        assert end["parts"] == [{"from": 0, "to": 8, "text": "a person walks", "given": False}]
        motion = bvh_to_motion(parse_bvh(made.file(take, "bvh").decode()), scale=0.01)
        assert len(motion) == 8
        assert str(np.load(BytesIO(made.file(take, "npz")))["record"]) == ""

    def test_stop_between_two_calls_ends_the_motion(self, offered: Shelf) -> None:
        made = motions.Motions(offered)
        take = made.order("v", INFILL)
        for message in motion_routes.messages(made, take):
            if message[:1] == b"F":  # the model is asked no more in this call
                made.find("v", take.key).is_stopped = True
        end = json.loads(message[5:])
        assert (end["kind"], end["whole"], end["frames"]) == ("done", False, 12)
        assert [part["text"] for part in end["parts"]] == ["a person walks"]
        assert motions.record_of(take) is None

    def test_what_fails_half_way_has_no_record(
        self, offered: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made, real = motions.Motions(offered), motion_plan.Call.events

        def fails(call: motion_plan.Call, *args: Any) -> Iterator[Any]:
            if call.goes_on:
                raise ResourceError("no memory left")
            return real(call, *args)

        monkeypatch.setattr(motion_plan.Call, "events", fails)
        take = made.order("v", INFILL)
        assert b"no memory left" in list(motion_routes.messages(made, take))[-1]
        assert take.is_over and take.frames == 12 and motions.record_of(take) is None
        assert str(np.load(BytesIO(made.file(take, "npz")))["record"]) == ""

    def test_a_stop_that_comes_too_late_leaves_a_whole_motion(self, offered: Shelf) -> None:
        made = motions.Motions(offered)
        take = made.order("v", INFILL | {"parts": PARTS[:1]})
        for message in motion_routes.messages(made, take):
            if message[:1] == b"F":
                made.find("v", take.key).is_stopped = True
        end = json.loads(message[5:])
        assert (end["kind"], end["whole"], end["frames"]) == ("done", True, 12)


class TestChanging:
    def test_going_on_keeps_what_was_before(self, http: httpx.Client) -> None:
        told, old = ask(http, WISH)
        more = {"base": told["about"]["key"], "from": 10, "parts": [{"text": "x", "seconds": 1}]}
        after, new = ask(http, WISH | more)
        assert after["about"]["from"] == 8  # whole blocks of 4 frames
        assert np.array_equal(new[:8], old[:8]) and len(new) == 28
        assert not np.array_equal(new[8:20], old[8:20])
        spans = [(p["from"], p["to"], p["given"]) for p in after["done"]["parts"]]
        assert spans == [(0, 8, True), (8, 28, False)]

    def test_a_span_is_redrawn_and_all_else_stays(self, http: httpx.Client) -> None:
        told, old = ask(http, INFILL)
        change = {"base": told["about"]["key"], "span": [6, 14], "parts": [{"text": "y"}]}
        after, new = ask(http, INFILL | change)
        assert np.array_equal(new[:6], old[:6]) and np.array_equal(new[14:], old[14:])
        assert not np.array_equal(new[6:14], old[6:14])
        spans = [(p["from"], p["to"], p["given"]) for p in after["done"]["parts"]]
        assert spans == [(0, 6, True), (6, 14, False), (14, 20, True)]
        again = bvh_to_motion(parse_bvh(fetched(http, after["about"]["key"], "bvh").decode()), 0.01)
        assert len(again) == 20

    def test_models_in_order_say_that_they_cannot(self, http: httpx.Client) -> None:
        told, _ = ask(http, WISH)
        change = {"base": told["about"]["key"], "span": [4, 12]}
        answer, _ = parts_of(http.post("/motion/new", json=WISH | change).content)
        assert "makes frames in order" in answer["failed"]["line"]

    def test_a_bvh_is_opened_gone_on_with_and_comes_back(self, http: httpx.Client) -> None:
        motion = walk().on_floor()
        content = bvh_text(motion_to_bvh(motion)).encode()
        answer = http.post("/motion/open?model=tiny-motion", content=content)
        told, frames = parts_of(answer.content)
        assert told["done"]["frames"] == 40 and told["about"]["parts"][0]["given"] is True
        joints = np.concatenate(frames)
        assert np.abs(joints - motion.joints).max() < 1e-4
        more = {"base": told["about"]["key"], "from": 40, "parts": [{"text": "x", "seconds": 0.4}]}
        after, new = ask(http, WISH | more)
        assert np.array_equal(new[:40], joints) and len(new) == 48
        back = bvh_to_motion(parse_bvh(fetched(http, after["about"]["key"], "bvh").decode()), 0.01)
        names = [back.skeleton.index(name) for name in HUMAN22.names]
        assert np.abs(back.joints[:, names] - new).max() < 1e-4

    def test_another_rate_and_another_make_are_brought_to_the_model(self) -> None:
        motion = resample(walk(), 60)
        bvh = motion_to_bvh(motion)
        names = {"pelvis": "Hips", "left_hip": "LeftUpLeg", "right_hip": "RightUpLeg"}
        styles = dict(zip(HUMAN22.names, _MIXAMO, strict=True)) | names
        joints = tuple(replace(j, name=styles.get(j.name, j.name)) for j in bvh.joints)
        read = motion_files.read(bvh_text(replace(bvh, joints=joints)).encode())
        assert read.skeleton.names == HUMAN22.names and read.fps == 20
        assert len(read) == 39 or len(read) == 40
        turned = read.joints[:, 20] - read.joints[:, 0]
        wanted = walk().joints[: len(read), 20] - walk().joints[: len(read), 0]
        assert np.abs(turned - wanted).max() < 0.03


_MIXAMO = (
    "Hips", "LeftUpLeg", "RightUpLeg", "Spine", "LeftLeg", "RightLeg", "Spine1", "LeftFoot",
    "RightFoot", "Spine2", "LeftToeBase", "RightToeBase", "Neck", "LeftShoulder",
    "RightShoulder", "Head", "LeftArm", "RightArm", "LeftForeArm", "RightForeArm", "LeftHand",
    "RightHand",
)  # fmt: skip


class TestFiles:
    @pytest.fixture
    def made(self, http: httpx.Client) -> tuple[str, np.ndarray]:
        told, frames = ask(http, WISH)
        return told["about"]["key"], frames

    def test_bvh(self, http: httpx.Client, made: tuple[str, np.ndarray]) -> None:
        motion = bvh_to_motion(parse_bvh(fetched(http, made[0], "bvh").decode()), scale=0.01)
        order = [motion.skeleton.index(name) for name in HUMAN22.names]
        assert np.abs(motion.joints[:, order] - made[1]).max() < 1e-3
        assert motion.fps == 20 and fk_error(motion)[1] < 1

    def test_glb(self, http: httpx.Client, made: tuple[str, np.ndarray]) -> None:
        import pygltflib

        content = fetched(http, made[0], "glb")
        file = pygltflib.GLTF2.load_from_bytes(content)
        assert len(file.animations) == 1 and len(content) > 10_000
        assert file.asset.extras["blockloom"]["seed"] == 7

    def test_npz(self, http: httpx.Client, made: tuple[str, np.ndarray]) -> None:
        arrays = np.load(BytesIO(fetched(http, made[0], "npz")), allow_pickle=False)
        assert np.array_equal(arrays["joints"], made[1]) and arrays["fps"] == 20
        assert tuple(arrays["names"]) == HUMAN22.names
        record = json.loads(str(arrays["record"]))["blockloom"]
        assert (record["kind"], record["seed"], record["recipe"]) == (
            "motion", 7, "motion/block_flow"
        )  # fmt: skip

    def test_mp4(self, http: httpx.Client, made: tuple[str, np.ndarray], tmp_path: Path) -> None:
        (tmp_path / "a.mp4").write_bytes(fetched(http, made[0], "mp4"))
        video = read_video(tmp_path / "a.mp4")
        assert len(video.frames) == 20 and video.fps == 20
        assert np.abs(video.frames[0].astype(int) - video.frames[-1]).max() > 50

    def test_no_other_form(self, http: httpx.Client, made: tuple[str, np.ndarray]) -> None:
        for form in ("exe", None, {"a": 1}, "../bvh"):
            answer = http.post("/motion/file", json={"key": made[0], "form": form})
            assert answer.status_code == 422 and "bvh, glb, mp4, npz" in answer.json()["detail"]


class TestWhoMay:
    @pytest.mark.parametrize("path", ["new", "stop", "file", "open"])
    def test_no_foreign_page(self, http: httpx.Client, path: str) -> None:
        for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
            answer = http.post(f"/motion/{path}", json=WISH, headers=headers)
            assert answer.status_code in (400, 403) and len(answer.content) < 100

    def test_a_motion_is_its_visitors(self, http: httpx.Client) -> None:
        told, _ = ask(http, WISH)
        key = told["about"]["key"]
        with httpx.Client(base_url=str(http.base_url), timeout=60) as thief:
            thief.get("/")
            theft = [("stop", {"key": key}), ("file", {"key": key, "form": "bvh"}),
                     ("new", WISH | {"base": key, "from": 8})]  # fmt: skip
            for path, body in theft:
                answer = thief.post(f"/motion/{path}", json=body)
                assert (answer.status_code, "no longer there" in answer.text) == (410, True)
        assert fetched(http, key, "bvh").startswith(b"HIERARCHY")

    def test_no_one_without_the_password(
        self, tiny_motion: Path, free_port: Callable[[], int]
    ) -> None:
        page = app.start(
            [str(tiny_motion)], listen="127.0.0.1", port=free_port(), auth=("ada", "lovelace")
        )
        try:
            with httpx.Client(base_url=str(page.local_url).rstrip("/"), timeout=60) as http:
                for path in ("new", "stop", "file", "open"):
                    assert http.post(f"/motion/{path}", json=WISH).status_code == 401
        finally:
            page.close(verbose=False)

    def test_two_at_once_are_enough_and_old_ones_are_forgotten(self, offered: Shelf) -> None:
        now = 0.0
        made = motions.Motions(offered, clock=lambda: now)
        takes = [made.order("v", WISH) for _ in range(2)]
        with pytest.raises(ResourceError, match="two motions of yours"):
            made.order("v", WISH)
        made.order("w", WISH)
        for take in takes:
            take.is_over = True
        for _ in range(motions.MAX_OF_ONE):
            now += 1
            made.order("v", WISH).is_over = True
        with pytest.raises(answers.Gone):
            made.find("v", takes[0].key)
        last = made.order("v", WISH)
        last.is_over = True
        now += motions.KEEP_SECONDS + 1
        with pytest.raises(answers.Gone):
            made.find("v", last.key)


class TestNonsense:
    @pytest.mark.parametrize(
        ("change", "status", "words"),
        [
            ({"model": "/etc/passwd"}, 404, "no such model"),
            ({"parts": None}, 422, "parts"),
            ({"parts": []}, 422, "1 to 8"),
            ({"parts": PARTS * 5}, 422, "1 to 8"),
            ({"parts": ["a"]}, 422, "text and seconds"),
            ({"parts": [{"text": "x" * 10_001}]}, 422, "too long"),
            ({"parts": [{"text": "a\0b"}]}, 422, "NUL"),
            ({"parts": [{"text": "a", "seconds": 0}]}, 422, "try 0.2"),
            ({"parts": [{"text": "a", "seconds": "nan"}]}, 422, "seconds"),
            ({"parts": [{"text": "a", "seconds": 10**9}]}, 422, "try 60"),
            ({"parts": [{"text": "a", "seconds": 40}] * 2}, 422, "at most 60"),
            ({"seed": "1e5"}, 422, "try 100000"),
            ({"seed": -1}, 422, "try 0"),
            ({"guidance": "strong"}, 422, "guidance"),
            ({"temperature": 11}, 422, "try 10"),
            ({"base": "x", "from": 4}, 410, "no longer there"),
            ({"junk": "A" * 2**16}, 422, "too long"),
        ],
    )
    def test_one_line_says_what_is_wrong(
        self, http: httpx.Client, change: dict[str, Any], status: int, words: str
    ) -> None:
        answer = http.post("/motion/new", json=WISH | change)
        assert (answer.status_code, words in answer.json()["detail"]) == (status, True), answer.text
        assert "\n" not in answer.json()["detail"]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"from": 0}, "try 1"),
            ({"from": 21}, "try 20"),
            ({"from": None}, "from"),
            ({"span": [3]}, "two frames"),
            ({"span": [0, 99]}, "try 20"),
            ({"span": [9, 9]}, "span"),
        ],
    )
    def test_changes_outside_the_motion(
        self, http: httpx.Client, change: dict[str, Any], words: str
    ) -> None:
        told, _ = ask(http, WISH)
        answer = http.post("/motion/new", json=WISH | {"base": told["about"]["key"]} | change)
        assert (answer.status_code, words in answer.json()["detail"]) == (422, True), answer.text

    def test_the_whole_is_no_span(self, http: httpx.Client) -> None:
        told, _ = ask(http, INFILL)
        change = {"base": told["about"]["key"], "span": [0, 20]}
        failed, _ = parts_of(http.post("/motion/new", json=INFILL | change).content)
        assert "whole motion" in failed["failed"]["line"]

    @pytest.mark.parametrize(
        "content",
        [b"", b"\x00\xff" * 100, b"HIERARCHY\nROOT a\n{\n", b"hello " * 10**5],
        ids=["empty", "bytes", "broken", "text"],
    )
    def test_a_file_that_is_no_bvh(self, http: httpx.Client, content: bytes) -> None:
        answer = http.post("/motion/open?model=tiny-motion", content=content)
        assert answer.status_code == 422 and "\n" not in answer.json()["detail"], answer.text
        assert len(answer.json()["detail"]) < 300

    def test_a_strange_body_and_a_huge_file_are_refused(self, http: httpx.Client) -> None:
        bvh = motion_to_bvh(walk(8))
        joints = tuple(replace(j, name=f"bit{k}") for k, j in enumerate(bvh.joints))
        content = bvh_text(replace(bvh, joints=joints)).encode()
        answer = http.post("/motion/open?model=tiny-motion", content=content)
        assert answer.status_code == 422 and "\n" not in answer.json()["detail"], answer.text
        huge = http.post("/motion/open?model=tiny-motion", content=b" " * (8 * 2**20 + 1))
        assert huge.status_code == 413

    def test_a_fault_of_ours_is_a_number(
        self, offered: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_: Any) -> Any:
            raise RuntimeError("/secret/path")

        monkeypatch.setattr(motions, "planned", broken)
        made = motions.Motions(offered)
        take = made.order("v", WISH)
        (last,) = motion_routes.messages(made, take)
        line = json.loads(last[5:])["line"]
        assert line.startswith("something broke here (error ") and take.is_over
        assert line[-9:-1] in caplog.text


class TestParts:
    OLD = ({"from": 0, "to": 10, "text": "a", "given": False},
           {"from": 10, "to": 20, "text": "b", "given": False})  # fmt: skip

    def test_new_parts_take_the_place_of_a_span(self) -> None:
        new = [{"from": 8, "to": 12, "text": "c", "given": False}]
        parts = motion_plan.around(self.OLD, (8, 12), new)
        assert [(p["from"], p["to"], p["text"], p["given"]) for p in parts] == [
            (0, 8, "a", True), (8, 12, "c", False), (12, 20, "b", True)
        ]  # fmt: skip

    def test_nothing_old_comes_after_going_on(self) -> None:
        new = [{"from": 4, "to": 40, "text": "c", "given": False}]
        parts = motion_plan.around(self.OLD, (4, 40), new, is_end=True)
        assert [(p["from"], p["to"]) for p in parts] == [(0, 4), (4, 40)]

    def test_a_short_part_still_gets_a_step(self, offered: Shelf) -> None:
        pipe = offered.pipe("tiny-motion", "motion")
        wish = motion_plan.Wish(("a", "b", "c"), (0.21, 0.2, 0.2), 0)
        plan = motion_plan.planned(pipe, wish)
        assert [(p["from"], p["to"]) for p in plan.parts] == [(0, 4), (4, 8), (8, 12)]
        assert plan.calls[0].settings["num_frames"] == plan.frames == 12


def test_only_models_of_the_human_body_are_offered(offered: Shelf, tmp_path: Path) -> None:
    assert offered.names_of("motion")[:2] == ["tiny-motion", "tiny-infill"]
    offers = {offer["name"]: offer for offer in motions.Motions(offered).offers()}
    assert offers["tiny-infill"]["both"] and not offers["tiny-motion"]["both"]
    assert offers["tiny-motion"]["unit"] == offers["tiny-motion"]["step"] == 4
    (tmp_path / "model").mkdir()
    config = tmp_path / "model" / "config.json"
    for block, count in (("frames:3", 3), ("frame", 1), ("all", 1)):
        config.write_text(json.dumps({"recipe": {"layout": {"block": block}}}))
        assert motions._together(tmp_path) == count
    assert offers["tiny-motion"]["words"] and offers["tiny-infill"]["guidance"] == "4"
    assert "tiny-motion" not in offered.names_of("image")
