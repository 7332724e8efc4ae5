"""Clips load with the right frames, texts and actions; bad ones end in one clear message."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blockloom.core.errors import DataError, UsageError
from blockloom.pipelines.video_media import save_video
from blockloom.training import clip_folder, clip_video
from blockloom.training.clip_archive import save_clip_archive
from blockloom.training.clip_folder import convert_clips, load_clips, natural_key
from blockloom.training.clip_video import nearest_in_time, read_video_clip
from blockloom.training.clips import ClipDataset, align_actions, tokenizer_input
from blockloom.training.physics import physics_clips


def numbered(*lengths: int, side: int = 4) -> np.ndarray:
    """Frames of clips end to end; frame t of clip i is filled with 50 i + t."""
    values = [50 * i + t for i, length in enumerate(lengths) for t in range(length)]
    frames = np.zeros((len(values), side, side, 3), dtype=np.uint8)
    frames += np.array(values, dtype=np.uint8)[:, None, None, None]
    return frames


def made(*lengths: int, **parts) -> ClipDataset:
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    texts = [f"clip {i}" for i in range(len(lengths))], ["train"] * len(lengths)
    return ClipDataset(numbered(*lengths), offsets, *texts, **parts)


def archive(path: Path, drop: tuple[str, ...] = (), **changes) -> Path:
    """Write an archive in the layout of `video_babyai.npz`: clips of 3 and 2 frames."""
    arrays = {
        "frames": numbered(3, 2),
        "offsets": np.array([0, 3, 5]),
        "actions": np.array([2, 0, -1, 1, -1], dtype=np.int8),
        "action_names": np.array(["left", "right", "go"]),
        "mission": np.array(["go to the ball", "fetch a key"]),
        "split": np.array(["train", "test_comp"]),
        "rewards": np.zeros(5, dtype=np.float32),
    }
    np.savez(path, **{k: v for k, v in (arrays | changes).items() if k not in drop})
    return path


def video(path: Path, frames: np.ndarray, fps: float = 10.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_video(frames, path, fps=fps)
    return path


def pictures(folder: Path, values: list[int], side: int = 4) -> Path:
    folder.mkdir(parents=True)
    for number, value in enumerate(values, 1):
        Image.new("RGB", (side, side), (value, value, value)).save(folder / f"frame{number}.png")
    return folder


def first_values(frames) -> list[int]:
    return [int(frame[0, 0, 0]) for frame in frames]


# ---- windows ---------------------------------------------------------------------------------


def test_a_window_has_the_frames_and_the_actions_between_them():
    actions = np.array([10, 11, 12, -1, 20, 21, 22, 23, -1])
    data = made(4, 5, actions=actions)
    got = data.window(torch.tensor([1, 0]), 3)
    assert got.frames.dtype == torch.uint8
    assert got.frames[..., 0, 0, 0].tolist() == [[50, 51, 52], [0, 1, 2]]
    assert got.actions.tolist() == [[20, 21, 22], [10, 11, 12]]
    assert got.has_action.all() and got.is_real.all()
    assert got.action_before.tolist() == [-1, -1] and not got.has_action_before.any()
    whole = data.window(torch.tensor([0]), 4)
    assert whole.actions.tolist() == [[10, 11, 12, -1]]
    assert whole.has_action.tolist() == [[True, True, True, False]]


def test_leading_gives_the_action_that_led_to_each_frame():
    data = made(6, actions=np.array([10, 11, 12, 13, 14, -1]))
    seen = set()
    for seed in range(20):
        got = data.window(torch.tensor([0]), 3, torch.Generator().manual_seed(seed))
        start = int(got.start[0])
        seen.add(start)
        leading, known = got.leading()
        assert got.frames[0, :, 0, 0, 0].tolist() == [start, start + 1, start + 2]
        before = 9 + start if start else -1
        assert leading.tolist() == [[before, 10 + start, 11 + start]]
        assert known.tolist() == [[start > 0, True, True]]
    assert seen == {0, 1, 2, 3}


def test_vectors_are_aligned_too_and_missing_ones_are_zero():
    actions = np.arange(10, dtype=np.float32).reshape(5, 2) + 1
    data = made(3, 2, actions=align_actions(actions, np.array([0, 3, 5])))
    got = data.window(torch.tensor([0, 1]), 2, short="hold")
    assert got.actions.tolist() == [[[1, 2], [3, 4]], [[7, 8], [0, 0]]]
    assert got.has_action.tolist() == [[True, True], [True, False]]
    leading, _ = got.leading()
    assert leading.tolist() == [[[0, 0], [1, 2]], [[0, 0], [7, 8]]]


def test_short_clips_hold_their_last_frame_or_are_refused():
    data = made(2, 4, actions=np.array([7, -1, 1, 2, 3, -1]))
    got = data.window(torch.tensor([0, 1]), 4, torch.Generator().manual_seed(0), short="hold")
    assert got.frames[..., 0, 0, 0].tolist() == [[0, 1, 1, 1], [50, 51, 52, 53]]
    assert got.is_real.tolist() == [[True, True, False, False], [True] * 4]
    assert got.actions.tolist() == [[7, -1, -1, -1], [1, 2, 3, -1]]
    with pytest.raises(DataError, match="clip 0 has 2 frames and the window 4; try length 2"):
        data.window(torch.tensor([1, 0]), 4)


def test_places_of_windows_are_even_and_follow_the_generator():
    data = made(8)
    index = torch.zeros(600, dtype=torch.int64)
    got = data.window(index, 5, torch.Generator().manual_seed(0)).start
    again = data.window(index, 5, torch.Generator().manual_seed(0)).start
    assert (got == again).all()
    counts = torch.bincount(got)
    assert len(counts) == 4 and 110 < counts.min() and counts.max() < 190


def test_pixels_are_channels_first_in_minus_one_to_one():
    frames = np.zeros((2, 3, 5, 3), dtype=np.uint8)
    frames[1, 2, 4] = (255, 0, 51)
    data = ClipDataset(frames, np.array([0, 2]), ["a"], ["train"])
    pixels = data.window(torch.tensor([0]), 2).pixels()
    assert pixels.shape == (1, 3, 2, 3, 5)
    assert pixels[0, :, 1, 2, 4].tolist() == pytest.approx([1, -1, -0.6])
    assert (pixels[0, :, 0] == -1).all()


def test_bad_windows_are_refused():
    data = made(3)
    with pytest.raises(DataError, match=r"clip numbers 0\.\.1; allowed 0\.\.0"):
        data.window(torch.tensor([0, 1]), 1)
    with pytest.raises(UsageError, match="window length"):
        data.window(torch.tensor([0]), 0)
    with pytest.raises(UsageError, match="short"):
        data.window(torch.tensor([0]), 1, short="pad")
    with pytest.raises(DataError, match="no actions"):
        data.window(torch.tensor([0]), 1).leading()


def test_take_and_only_keep_everything_together():
    data = made(2, 3, 1, actions=np.array([5, -1, 6, 7, -1, -1]), action_names=("a",) * 8, fps=12.5)
    part = data.take([2, 1])
    assert first_values(part.frames) == [100, 50, 51, 52]
    assert part.offsets.tolist() == [0, 1, 4] and part.captions == ["clip 2", "clip 1"]
    assert part.actions.tolist() == [-1, 6, 7, -1] and part.fps == 12.5
    assert part.clip_actions(1).tolist() == [6, 7, -1] and part.num_actions == 8
    with pytest.raises(DataError, match="splits present: train"):
        data.only("test")


# ---- archives --------------------------------------------------------------------------------


def test_the_layout_of_offsets_loads(tmp_path):
    data = load_clips(archive(tmp_path / "a.npz", fps=np.array([12.5], dtype=np.float32)))
    assert data.lengths.tolist() == [3, 2] and first_values(data.clip(1)) == [50, 51]
    assert data.captions == ["go to the ball", "fetch a key"]
    assert data.split == ["train", "test_comp"] and data.fps == 12.5
    assert data.actions.tolist() == [2, 0, -1, 1, -1]
    assert data.action_names == ("left", "right", "go")


def test_the_layout_of_equal_clips_loads(tmp_path):
    frames = numbered(3, 3).reshape(2, 3, 4, 4, 3)
    actions = np.arange(12, dtype=np.float16).reshape(2, 3, 2) + 1
    path = tmp_path / "a.npz"
    np.savez(path, frames=frames, actions=actions, is_test=np.array([False, True]))
    data = load_clips(path)
    assert data.offsets.tolist() == [0, 3, 6] and data.split == ["train", "test"]
    # The last frame's action leads out of the clip: nobody knows what it did.
    assert data.actions.tolist() == [[1, 2], [3, 4], [0, 0], [7, 8], [9, 10], [0, 0]]
    assert data.captions == ["", ""] and data.fps == 10.0
    only_between = actions[:, :2]
    np.savez(path, frames=frames, actions=only_between)
    assert (load_clips(path).actions == data.actions).all()


def test_frames_shrink_by_whole_pixels(tmp_path):
    frames = numbered(3, 2)
    frames[0, :2, :2, 0] = [[1, 2], [3, 5]]
    path = archive(tmp_path / "a.npz", frames=frames)
    data = load_clips(path, 2)
    assert data.frames.shape == (5, 2, 2, 3)
    assert data.frames[0, 0, 0].tolist() == [3, 0, 0] and data.frames[4, 1, 1].tolist() == [51] * 3
    with pytest.raises(DataError, match=r"a\.npz: frames are 4x4; image size 3 .*; try 4"):
        load_clips(path, 3)


def test_clips_are_cut_to_a_number_of_frames(tmp_path):
    data = load_clips(archive(tmp_path / "a.npz"), max_frames=2)
    assert data.lengths.tolist() == [2, 2] and first_values(data.frames) == [0, 1, 50, 51]
    assert data.actions.tolist() == [2, -1, 1, -1]


def test_converting_keeps_every_value(tmp_path):
    source = physics_clips(3, 1, num_frames=3, size=8, pushes=True)
    clip_folder.save_clip_archive(source, tmp_path / "a.npz")
    convert_clips(tmp_path / "a.npz", tmp_path / "b.npz")
    got = load_clips(tmp_path / "b.npz")
    for name in ("captions", "split", "fps", "action_names"):
        assert getattr(got, name) == getattr(source, name)
    assert (got.frames == source.frames).all() and (got.actions == source.actions).all()


HALF = np.tile(np.array([np.nan, 0], dtype=np.float32), (5, 1))
BAD_ARCHIVES = [
    ({"drop": ("frames",)}, "has no array 'frames'"),
    ({"drop": ("offsets",)}, "no array 'offsets'"),
    ({"frames": numbered(3, 2).astype(np.float32)}, "frames are float32"),
    ({"frames": numbered(3, 2)[..., 0]}, "needed uint8"),
    ({"frames": np.array([None] * 5)}, "holds objects"),
    ({"mission": np.array(["a", None])}, "holds objects"),
    ({"offsets": np.array([0, 3, 6])}, "run from 0 to 6; needed 0 to 5"),
    ({"offsets": np.array([1, 3, 5])}, "run from 1 to 5"),
    ({"offsets": np.array([0, 5, 3, 5])}, "clip 1 has -2 frames"),
    ({"offsets": np.array([0, 3, 3, 5])}, "clip 1 has 0 frames"),
    ({"offsets": np.array([0.0, 3.0, 5.0])}, "offsets are float64"),
    ({"offsets": np.array([5])}, "needed whole numbers"),
    ({"frames": numbered(6).reshape(2, 3, 4, 4, 3)}, "5 axes"),
    ({"actions": np.array([0, 1, 2, 0])}, "4 actions for 5 frames in 2 clips; allowed 5, or 3"),
    ({"actions": np.array([2, 3, -1, 1, -1])}, r"clip 0, frame 1: action 3; allowed 0\.\.2"),
    ({"actions": np.array([2, -1, -1, 1, -1])}, "clip 0, frame 1: action -1"),
    ({"actions": HALF}, "action of frame 0 is .nan, 0.0.; needed finite numbers"),
    ({"actions": np.zeros(5, dtype=np.float32)}, r"needed whole numbers \[frames\] or floats"),
    ({"actions": np.array(["a"] * 5)}, "actions are <U1"),
    ({"mission": np.array(["a"])}, r"'mission' has shape \[1\], not \[2\]"),
    ({"fps": np.array([0.0])}, "fps is 0.0"),
    ({"fps": np.array([1.0, 2.0])}, "needed one number"),
    ({"drop": ("split",), "is_test": np.array([0, 1])}, "needed bool"),
    ({"action_names": np.array([1, 2])}, "'action_names' is not"),
]


@pytest.mark.parametrize(("changes", "message"), BAD_ARCHIVES)
def test_bad_archives_are_named(tmp_path, changes, message):
    path = archive(tmp_path / "a.npz", **changes)
    with pytest.raises(DataError, match=message) as error:
        load_clips(path)
    assert "a.npz" in error.value.message and "\n" not in error.value.message


def test_a_damaged_archive_is_named(tmp_path):
    path = archive(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.npz: not a readable \.npz archive"):
        load_clips(path)


# ---- folders ---------------------------------------------------------------------------------


def levels(frames) -> list[int]:
    return [round(float(frame.mean()) / 10) * 10 for frame in frames]


def ramp(*values: int, side: int = 16) -> np.ndarray:
    return np.stack([np.full((side, side, 3), value, dtype=np.uint8) for value in values])


def test_a_folder_of_videos_with_metadata(tmp_path):
    video(tmp_path / "b" / "one.mp4", ramp(0, 100, 200))
    video(tmp_path / "two.webm", ramp(200, 50))
    video(tmp_path / "three.gif", ramp(30, 60, 90))
    rows = [
        {"file_name": "b/one.mp4", "text": "up", "split": "test"},
        {"file_name": "three.gif", "caption": "slow"},
        {"file_name": "two.webm"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    data = load_clips(tmp_path)
    assert data.captions == ["up", "slow", ""] and data.split == ["test", "train", "train"]
    assert data.lengths.tolist() == [3, 3, 2] and data.fps == pytest.approx(10)
    assert levels(data.frames) == [0, 100, 200, 30, 60, 90, 200, 50]
    assert levels(load_clips(tmp_path, 8, max_frames=1).frames) == [0, 30, 200]


def test_a_folder_of_picture_folders(tmp_path):
    pictures(tmp_path / "train" / "a", list(range(0, 110, 10)))
    pictures(tmp_path / "test" / "b", [7, 8])
    (tmp_path / "train" / "a.txt").write_text("brighter\n")
    np.save(tmp_path / "train" / "a" / "actions.npy", np.arange(10))
    (tmp_path / "test" / "b" / "actions.jsonl").write_text("4\n5\n")
    data = load_clips(tmp_path, fps=8)
    assert data.captions == ["", "brighter"] and data.split == ["test", "train"]
    # frame2 comes before frame10.
    assert first_values(data.clip(1)) == list(range(0, 110, 10)) and data.fps == 8
    assert data.clip_actions(0).tolist() == [4, -1]
    assert data.clip_actions(1).tolist() == [*range(10), -1]


def test_actions_beside_a_video(tmp_path):
    video(tmp_path / "a.mp4", ramp(0, 100, 200))
    (tmp_path / "a.actions.jsonl").write_text("[0.5, 1]\n[2, 3]\n[4, 5]\n")
    data = load_clips(tmp_path, max_frames=2)
    assert data.actions.tolist() == [[0.5, 1], [0, 0]]
    with pytest.raises(DataError, match="cannot be resampled from 10 to 5"):
        load_clips(tmp_path, fps=5)


def test_resampling_takes_the_nearest_frame(tmp_path):
    assert nearest_in_time(np.arange(6) / 10, 5).tolist() == [0, 2, 4]
    assert nearest_in_time(np.arange(3) / 10 + 7, 20).tolist() == [0, 0, 1, 1, 2, 2]
    assert nearest_in_time(np.array([0, 0.1, 0.5, 0.6]), 10).tolist() == [0, 1, 1, 1, 2, 2, 3, 3]
    video(tmp_path / "a.mp4", ramp(0, 50, 100, 150, 200, 250), fps=10)
    data = load_clips(tmp_path, fps=5)
    assert levels(data.frames) == [0, 100, 200] and data.fps == 5


def test_natural_order():
    names = ["f10.png", "f2.png", "f1b.png", "a.png", "f1.png"]
    assert sorted(names, key=natural_key) == ["a.png", "f1.png", "f1b.png", "f2.png", "f10.png"]


def bad_folder(root: Path, kind: str) -> None:
    if kind in ("cut", "short", "text", "empty", "playlist", "middle"):
        noise = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        path = video(root / ("bad.webm" if kind == "short" else "bad.mp4"), noise)
        content = path.read_bytes()
        middle = len(content) * 2 // 3
        path.write_bytes({
            "cut": content[:middle],
            "short": content[:middle],
            "text": b"not a video at all, only words",
            "empty": b"",
            "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
            "middle": content[:middle] + b"\xff" * 900 + content[middle + 900 :],
        }[kind])  # fmt: skip
    elif kind == "count":
        pictures(root / "bad", [1, 2, 3])
        np.save(root / "bad" / "actions.npy", np.arange(5))
    elif kind == "sizes":
        pictures(root / "bad", [1, 2])
        Image.new("RGB", (5, 4)).save(root / "bad" / "frame3.png")
    elif kind in ("other size", "other rate", "no actions", "mixed"):
        video(root / "bad.mp4", ramp(1, 2, side=8 if kind == "other size" else 16))
        video(root / "good.mp4", ramp(1, 2), fps=25 if kind == "other rate" else 10)
        if kind in ("no actions", "mixed"):
            (root / "good.actions.jsonl").write_text("1\n")
        if kind == "mixed":
            (root / "bad.actions.jsonl").write_text("[1]\n")
    elif kind == "outside":
        (root / "metadata.jsonl").write_text('{"file_name": "../bad.mp4"}')
    elif kind == "missing":
        (root / "metadata.jsonl").write_text('{"file_name": "bad.mp4"}')
    elif kind == "no pictures":
        (root / "bad").mkdir()
        (root / "metadata.jsonl").write_text('{"file_name": "bad"}')
    elif kind == "fps":
        pictures(root / "bad", [1])
        (root / "metadata.jsonl").write_text('{"file_name": "bad", "fps": 0}')
    else:
        pictures(root / "bad", [1, 2])
        actions = root / "bad" / ("actions.npy" if "npy" in kind else "actions.jsonl")
        if kind == "npy objects":
            np.save(actions, np.array([None, 1]), allow_pickle=True)
        elif kind == "npy cut":
            np.save(actions, np.arange(400))
            actions.write_bytes(actions.read_bytes()[:300])
        elif kind == "npy link":
            (root.parent / "secret.npy").write_bytes(b"x")
            os.symlink(root.parent / "secret.npy", actions)
        else:
            actions.write_text(
                {"json": "1\nx\n", "ragged": "[1]\n[1, 2]\n", "words": '"up"\n'}[kind]
            )


BAD_FOLDERS = {
    "short": r"bad\.webm: is cut short: 0\.\d of 0\.6 seconds",
    "cut": r"bad\.mp4: (is cut short|cannot be decoded)",
    "text": r"bad\.mp4: not a video of type MP4, WebM or GIF",
    "empty": r"bad\.mp4: not a video",
    "playlist": r"bad\.mp4: not a video",
    "middle": r"bad\.mp4: (frame \d is damaged|cannot be decoded|is cut short)",
    "count": "bad: 5 actions for 3 frames in 1 clips; allowed 3, or 2",
    "sizes": r"frame1\.png has 4x4 pixels but frame3\.png 5x4",
    "other size": r"bad\.mp4 has 8x8 pixels but good\.mp4 16x16; give an image size",
    "other rate": r"bad\.mp4 has 10 frames per second but good\.mp4 25; give fps",
    "no actions": r"good\.mp4 has actions but bad\.mp4 has none",
    "mixed": "unlike actions",
    "outside": "leads outside the folder",
    "missing": r"bad\.mp4",
    "no pictures": "bad: holds no frames",
    "fps": "fps is 0; allowed",
    "npy objects": "holds objects",
    "npy cut": "less than its header says",
    "npy link": "leads outside the folder",
    "json": r"actions\.jsonl, line 2: not JSON",
    "ragged": "line 2: 2 numbers, before 1",
    "words": "line 1: needed a number",
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders_are_named(tmp_path, kind):
    root = tmp_path / "clips"
    root.mkdir()
    bad_folder(root, kind)
    with pytest.raises(DataError, match=BAD_FOLDERS[kind]) as error:
        load_clips(root)
    assert "\n" not in error.value.message and error.value.exit_code == 3


def test_nothing_and_unknown_kinds(tmp_path):
    with pytest.raises(DataError, match="holds no clips"):
        load_clips(tmp_path)
    with pytest.raises(DataError, match="no such file"):
        load_clips(tmp_path / "x")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match=r"allowed a folder of clips or \.npz"):
        load_clips(tmp_path / "a.zip")
    with pytest.raises(UsageError, match="fps"):
        load_clips(tmp_path, fps=float("nan"))


def test_caps_and_a_varying_rate(tmp_path, monkeypatch):
    path = video(tmp_path / "a.gif", ramp(1, 2, 3))
    content = bytearray(path.read_bytes())
    places = [i for i in range(len(content)) if content[i : i + 3] == b"\x21\xf9\x04"]
    content[places[0] + 4] = 200
    (tmp_path / "b.gif").write_bytes(content)
    with pytest.raises(DataError, match=r"b\.gif: the frame rate varies .* give fps"):
        read_video_clip(tmp_path / "b.gif")
    assert len(read_video_clip(tmp_path / "b.gif", fps=10)[0]) > 20
    monkeypatch.setattr(clip_video, "MAX_FRAME_PIXELS", 255)
    with pytest.raises(DataError, match="frames of 16x16 pixels; at most 255"):
        read_video_clip(path)
    monkeypatch.undo()
    monkeypatch.setattr(clip_video, "MAX_CLIP_BYTES", 1600)
    with pytest.raises(DataError, match="decodes to more than 1600 bytes"):
        read_video_clip(path)
    assert len(read_video_clip(path, max_frames=2)[0]) == 2


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    path = video(tmp_path / "a.gif", ramp(1))
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(UsageError, match=r"pip install 'blockloom\[video\]'"):
        load_clips(tmp_path)
    assert path.exists()


def poses(*lengths: int, features: int = 3) -> ClipDataset:
    """Feature frames of clips end to end; feature k of frame t of clip i is 50 i + t + k / 10."""
    values = [50 * i + t for i, length in enumerate(lengths) for t in range(length)]
    frames = np.array(values, np.float32)[:, None] + np.arange(features, dtype=np.float32) / 10
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return ClipDataset(frames, offsets, [""] * len(lengths), ["train"] * len(lengths))


def test_feature_frames_are_clips_too(tmp_path):
    data = poses(4, 6)
    assert data.num_features == 3 and made(2).num_features == 0
    given = data.window(torch.tensor([1]), 2).pixels()
    assert given.shape == (1, 3, 2) and given.dtype == torch.float32
    torch.testing.assert_close(given[0, :, 1], torch.tensor([51.0, 51.1, 51.2]))
    assert np.array_equal(data.take([1]).frames, data.clip(1))
    save_clip_archive(data, tmp_path / "poses.npz")
    again = load_clips(tmp_path / "poses.npz")
    assert np.array_equal(again.frames, data.frames) and again.frames.dtype == np.float32
    with pytest.raises(DataError, match="image size 4, but frames have no height"):
        load_clips(tmp_path / "poses.npz", 4)


def test_what_is_no_feature_frame_is_refused():
    data = poses(4, 6)
    for value in (np.nan, np.inf, -np.inf):
        frames = data.frames.copy()
        frames[7, 1] = value
        with pytest.raises(DataError, match=rf"clip 1, frame 3: feature 1 is {value}; needed fin"):
            ClipDataset(frames, data.offsets, data.captions, data.split)
    for frames in (data.frames.astype(np.float64), data.frames[:, :0], data.frames[..., None]):
        with pytest.raises(DataError, match=r"or float32 \[frames, features\]"):
            ClipDataset(frames, data.offsets, data.captions, data.split)
    with pytest.raises(DataError, match="or floats"):
        tokenizer_input(torch.zeros(1, 2, 3, dtype=torch.int64))
