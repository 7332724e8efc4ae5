"""Videos on disk and on the wire: every file decodes again, whole or not at all, caps hold."""

import hashlib
import math
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from blockloom.core.errors import DataError, ResourceError, UsageError
from blockloom.pipelines import video_input, video_media
from blockloom.pipelines.params import ImageParams, Record
from blockloom.pipelines.video_input import read_video
from blockloom.pipelines.video_media import (
    frame_strip,
    read_video_metadata,
    save_video,
    spread,
    video_codecs,
)
from blockloom.pipelines.video_stream import FragmentedWriter, boxes

KINDS = ("mp4", "webm", "gif")


def moving(count: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    """A bright disc that drifts over a soft gradient: uint8 [count, height, width, 3]."""
    y, x = np.mgrid[:height, :width] + 0.5
    frames = []
    for t in range(count):
        distance = np.hypot(x - 8 - 4 * t, y - height / 2) - 6
        share = np.clip(0.5 - distance / 2, 0, 1)[..., None]
        ground = np.stack([60 + 2 * x, 80 + 3 * y, 140 - x], axis=-1)
        frames.append(share * np.array([235, 190, 60]) + (1 - share) * ground)
    return np.stack(frames).clip(0, 255).round().astype(np.uint8)


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    """Peak signal to noise ratio in dB."""
    error = ((one.astype(np.float64) - two) ** 2).mean()
    return 10 * math.log10(255**2 / error) if error else math.inf


def record() -> Record:
    params = ImageParams(prompt='a "red" ball\nété 🍎', seed=7, model="blockloom/balls")
    return Record(params, recipe="video/tiny", weights_sha256="ab" * 32, versions={"a": "1"})


# ---- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fps", [8, 12.5, 15, 30000 / 1001])
def test_every_file_decodes_to_the_same_clip(tmp_path, kind, fps):
    frames = moving()
    path = tmp_path / f"a.{kind}"
    digest = save_video(frames, path, fps=fps)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    got = read_video(path)
    assert got.frames.shape == frames.shape
    # A GIF counts hundredths of a second, so its average is a little off.
    assert got.fps == pytest.approx(fps, rel=0.035 if kind == "gif" else 1e-6)
    for t in range(len(frames)):
        assert psnr(got.frames[t], frames[t]) > 32
        assert psnr(got.frames[t], frames[t]) > psnr(got.frames[t], frames[t - 1]) + 6


@pytest.mark.parametrize("kind", KINDS)
def test_equal_input_gives_equal_bytes_and_still_frames_count(tmp_path, kind):
    frames = np.repeat(moving(1), 5, axis=0)
    one = save_video(frames, tmp_path / f"a.{kind}", record(), fps=10)
    two = save_video((frame for frame in frames), tmp_path / f"b.{kind}", record(), fps=10)
    assert one == two
    assert len(read_video(tmp_path / f"a.{kind}").frames) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_colours_stay_what_they_are(tmp_path, kind):
    colors = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 64, 32)]
    frames = np.stack([np.full((16, 16, 3), color, dtype=np.uint8) for color in colors])
    save_video(frames, tmp_path / f"a.{kind}", fps=5)
    got = read_video(tmp_path / f"a.{kind}").frames
    assert abs(got.astype(int) - frames).max() <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_is_inside_and_beside(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    digest = save_video(moving(2), path, record(), fps=10)
    assert read_video_metadata(path) == record().to_dict()
    beside = read_video_metadata(path.with_suffix(".json"))
    assert beside == record().to_dict() | {"file": path.name, "sha256": digest}
    assert len(read_video(path).frames) == 2
    save_video(moving(2), tmp_path / f"b.{kind}", {"prompt": "x" * 3000}, fps=10)
    assert read_video_metadata(tmp_path / f"b.{kind}") == {"prompt": "x" * 3000}


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_can_stay_outside(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    save_video(moving(2), path, record(), fps=10, in_file=False)
    assert b"red" not in path.read_bytes()
    assert read_video_metadata(path.with_suffix(".json"))["seed"] == 7
    with pytest.raises(DataError, match=f"a.{kind} holds no blockloom parameters"):
        read_video_metadata(path)


def test_foreign_comments_and_broken_sidecars(tmp_path):
    image = Image.new("RGB", (4, 4))
    image.save(tmp_path / "a.gif", comment=b'{"blockloom": 3}')
    image.save(tmp_path / "b.gif", comment=b"made by hand")
    for name in ("a.gif", "b.gif"):
        with pytest.raises(DataError, match="no blockloom parameters"):
            read_video_metadata(tmp_path / name)
    (tmp_path / "c.json").write_text("{")
    with pytest.raises(DataError, match=r"c\.json: the record is not JSON"):
        read_video_metadata(tmp_path / "c.json")
    (tmp_path / "d.json").write_text("[]")
    with pytest.raises(DataError, match="no blockloom parameters"):
        read_video_metadata(tmp_path / "d.json")


def test_an_mp4_has_its_index_in_front_and_a_gif_loops(tmp_path):
    save_video(moving(2), tmp_path / "a.mp4", fps=10)
    names = [name for name, _ in boxes((tmp_path / "a.mp4").read_bytes())]
    assert names.index(b"moov") < names.index(b"mdat")
    save_video(moving(3), tmp_path / "a.gif", record(), fps=10)
    with Image.open(tmp_path / "a.gif") as image:
        assert image.n_frames == 3 and image.info["loop"] == 0 and image.info["duration"] == 100


def test_mpeg4_takes_over_where_x264_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(video_media._ENCODERS, "mp4", ("no-such-codec", "mpeg4"))
    assert video_codecs() == {"mp4": "mpeg4", "webm": "libvpx-vp9", "gif": "gif"}
    save_video(moving(), tmp_path / "a.mp4", record(), fps=12.5)
    got = read_video(tmp_path / "a.mp4")
    assert got.fps == 12.5 and psnr(got.frames, moving()) > 32
    monkeypatch.setitem(video_media._ENCODERS, "webm", ("no-such-codec",))
    with pytest.raises(UsageError, match="cannot write webm; allowed mp4, gif"):
        save_video(moving(), tmp_path / "a.webm", fps=10)
    with pytest.raises(UsageError, match=r"h264 is not in this PyAV; try codec='vp9'"):
        FragmentedWriter(fps=10, codec="h264")
    assert "vp09" in _after_one_block(FragmentedWriter(fps=10)).mime


def _after_one_block(writer: FragmentedWriter) -> FragmentedWriter:
    writer.add(moving(1))
    return writer


def test_odd_sizes_are_refused_padded_or_enlarged(tmp_path):
    frames = moving(8, 15, 33)[6:]  # the disc has left: what remains is smooth
    with pytest.raises(UsageError, match=r"got 33x15; allowed even .*; try 34x16 \(pad=True\)"):
        save_video(frames, tmp_path / "a.mp4", fps=10)
    assert not list(tmp_path.iterdir())
    save_video(frames, tmp_path / "a.mp4", fps=10, pad=True)
    got = read_video(tmp_path / "a.mp4").frames
    assert got.shape == (2, 16, 34, 3) and psnr(got[:, :15, :33], frames) > 32
    assert abs(got[:, 15].astype(int) - got[:, 14]).max() < 12
    save_video(frames, tmp_path / "b.mp4", fps=10, scale=2)
    assert read_video(tmp_path / "b.mp4").frames.shape == (2, 30, 66, 3)
    for kind in ("webm", "gif"):
        save_video(frames, tmp_path / f"a.{kind}", fps=10)
        assert read_video(tmp_path / f"a.{kind}").frames.shape == frames.shape


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_clips_of_one_frame(tmp_path, kind):
    frame = np.full((1, 2, 2, 3), 90, dtype=np.uint8)
    save_video([Image.fromarray(frame[0])], tmp_path / f"a.{kind}", fps=1)
    assert abs(read_video(tmp_path / f"a.{kind}").frames.astype(int) - frame).max() <= 3


def test_enlarging_saves_coloured_edges(tmp_path):
    frames = np.zeros((2, 16, 16, 3), dtype=np.uint8)
    frames[:, ::2, ::2] = (255, 0, 0)
    save_video(frames, tmp_path / "a.mp4", fps=5)
    save_video(frames, tmp_path / "b.mp4", fps=5, scale=2)
    assert psnr(read_video(tmp_path / "a.mp4").frames, frames) < 15
    assert psnr(read_video(tmp_path / "b.mp4").frames[:, ::2, ::2], frames) > 20


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "a.avi"}, r"output extension; got .avi; allowed .mp4, .webm, .gif"),
        ({"fps": 0}, "fps"),
        ({"fps": math.nan}, "fps"),
        ({"fps": math.inf}, "fps"),
        ({"fps": 60, "path": "a.gif"}, r"allowed \[0.1, 50\]; try 50"),
        ({"scale": 0}, "scale"),
        ({"frames": []}, "no frames to write"),
        ({"frames": np.zeros((2, 4, 4), dtype=np.uint8)}, r"got uint8 \[4, 4\]"),
        ({"frames": np.zeros((2, 4, 4, 3))}, r"float64 \[4, 4, 3\]; allowed uint8"),
        ({"frames": ["a"]}, "a frame is not a picture"),
        ({"frames": [moving(1, 4, 4)[0], moving(1, 6, 4)[0]]}, "frames differ in size"),
    ],
)
def test_bad_settings_write_nothing(tmp_path, changes, message):
    settings = {"frames": moving(2), "path": "a.mp4", "fps": 10} | changes
    path = tmp_path / settings.pop("path")
    with pytest.raises(UsageError, match=message):
        save_video(settings.pop("frames"), path, **settings)
    assert not list(tmp_path.iterdir())


# ---- whole or not at all ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_failing_source_leaves_the_old_file(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    path.write_bytes(b"old")

    def frames():
        yield from moving(3)
        raise KeyError("source broke")

    with pytest.raises(KeyError, match="source broke"):
        save_video(frames(), path, record(), fps=10)
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("call", ["fsync", "replace", "folder"])
def test_a_full_disk_is_a_resource_error(tmp_path, monkeypatch, call):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "a.mp4"
    if call == "fsync":
        monkeypatch.setattr(video_media.os, "fsync", fail)
    elif call == "replace":
        monkeypatch.setattr(Path, "replace", fail)
    else:
        path = tmp_path / "missing" / "a.mp4"
    with pytest.raises(ResourceError, match=r"cannot write a\.mp4: No s(pace|uch)"):
        save_video(moving(2), path, fps=10)
    assert not list(tmp_path.iterdir())


WRITER = """
import sys
import numpy as np
from blockloom.pipelines.video_media import save_video

def frames():
    yield from np.zeros((40, 64, 64, 3), dtype=np.uint8)
    sys.stdout.write("half\\n")
    sys.stdout.flush()
    sys.stdin.read()

save_video(frames(), sys.argv[1], fps=10)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_writer_leaves_no_file_under_the_final_name(tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], **pipes) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
    assert path.read_bytes() == b"old"
    left = [p.name for p in tmp_path.iterdir() if p != path]
    assert all(name.startswith(".a.mp4.") and name.endswith(".part") for name in left)


# ---- reading what others wrote ---------------------------------------------------------------


def with_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def many_streams(path: Path) -> Path:
    import av

    with av.open(str(path), "w", format="matroska") as container:
        for _ in range(20):
            stream = container.add_stream("mpeg4", rate=5)
            stream.width = stream.height = 16
        for stream in container.streams:
            container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
            container.mux(stream.encode())
    return path


def only_sound(path: Path) -> Path:
    import av

    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono"
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def hostile(tmp_path: Path, kind: str) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    suffix = kind.rpartition(" ")[2] if kind.rpartition(" ")[2] in KINDS else "mp4"
    path = tmp_path / f"bad.{suffix}"
    save_video(noise, path, fps=10)
    content = path.read_bytes()
    if kind.startswith("cut"):
        return with_bytes(path, content[: len(content) * 2 // 3])
    if kind.startswith("header of"):
        return with_bytes(path, content[:40])
    if kind.startswith("damaged"):
        middle = len(content) // 2
        return with_bytes(path, content[:middle] + b"\xff" * 600 + content[middle + 600 :])
    if kind == "huge gif":
        return with_bytes(path, content[:6] + struct.pack("<HH", 8192, 8192) + content[10:])
    if kind == "no index":
        return with_bytes(path, content.replace(b"moov", b"junk"))
    if kind == "folder":
        return tmp_path
    if kind == "fifo":
        os.mkfifo(tmp_path / "pipe.mp4")
        return tmp_path / "pipe.mp4"
    if kind == "many streams":
        return many_streams(path)
    if kind == "only sound":
        return only_sound(path)
    texts = {
        "empty": b"",
        "playlist": b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n",
        "concat": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "words": b"these are only words, no video",
        "picture": b"\x89PNG\r\n\x1a\n" + b"\0" * 40,
    }
    return with_bytes(path, texts[kind]) if kind in texts else tmp_path / "missing.mp4"


HOSTILE = {
    "missing": "cannot read missing.mp4: No such file",
    "folder": "not a regular file",
    "fifo": "not a regular file",
    "empty": "not a video of a known format; allowed MP4, WebM or GIF",
    "playlist": "not a video of a known format",
    "concat": "not a video of a known format",
    "words": "not a video of a known format",
    "picture": "not a video of a known format",
    "only sound": "holds no video",
    "many streams": "20 streams; allowed up to 16",
    "no index": "cannot decode|holds no video",
    "huge gif": "8192 x 8192; allowed at most",
    "cut mp4": "is cut short|cannot decode",
    "cut webm": r"bad.webm is cut short; got 0.3 of 0.5 s",
    "cut gif": "is cut short",
    "header of mp4": "cannot decode|holds no video",
    "header of webm": "cannot decode|holds no (video|frames)",
    "header of gif": "is cut short",
    "damaged mp4": "cannot decode|is damaged|is cut short",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_bad_files_end_in_one_line(tmp_path, kind):
    if kind == "fifo" and not hasattr(os, "mkfifo"):
        pytest.skip("no pipes with names here")
    path = hostile(tmp_path, kind)
    with pytest.raises(DataError, match=HOSTILE[kind]) as error:
        read_video(path)
    assert "\n" not in error.value.message and str(tmp_path) not in error.value.message


def test_a_lying_header_changes_nothing(tmp_path):
    path = tmp_path / "a.mp4"
    save_video(moving(3), path, fps=10)
    content = path.read_bytes()
    place = content.index(b"avc1", content.index(b"stsd")) + 28
    lie = struct.pack(">HH", 16384, 16384)
    path.write_bytes(content[:place] + lie + content[place + 4 :])
    got = read_video(path).frames
    assert got.shape == (3, 32, 48, 3) and psnr(got, moving(3)) > 32


def test_caps_hold(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    save_video(moving(5), path, fps=10)
    assert len(read_video(path, 5).frames) == 5
    with pytest.raises(DataError, match=r"a\.mp4 is too long; allowed 4 frames"):
        read_video(path, 4)
    with pytest.raises(DataError, match="48 x 32; allowed at most 1535"):
        read_video(path, max_pixels=1535)
    with pytest.raises(DataError, match="is too large; got"):
        read_video(path, max_bytes=100)
    monkeypatch.setattr(video_input, "MAX_DECODED_BYTES", 2 * 32 * 48 * 3)
    with pytest.raises(DataError, match="too large; allowed at most 9216 bytes when decoded"):
        read_video(path)


def test_without_pyav_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"need PyAV; try pip install 'blockloom\[video\]'"):
        save_video(moving(1), tmp_path / "a.mp4", fps=10)


# ---- streaming -------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["h264", "vp9"])
def test_a_stream_cut_after_any_fragment_decodes(tmp_path, codec):
    frames = moving(9)
    writer = FragmentedWriter(fps=12.5, codec=codec)
    blocks = [frames[:1], frames[1:4], frames[4:8], frames[8:]]
    content, seen = b"", 0
    path = tmp_path / "a.mp4"
    for number, (block, piece) in enumerate(zip(blocks, writer.stream(blocks), strict=True)):
        names = [name for name, _ in boxes(piece)]
        assert names == ([b"ftyp", b"moov"] if number == 0 else []) + [b"moof", b"mdat"]
        content, seen = content + piece, seen + len(block)
        path.write_bytes(content)
        got = read_video(path)
        assert len(got.frames) == writer.num_frames == seen
        assert min(psnr(a, b) for a, b in zip(got.frames, frames, strict=False)) > 33
    assert got.fps == pytest.approx(12.5)
    assert writer.num_fragments == 4
    assert writer.mime.startswith(f'video/mp4; codecs="{"avc1.64" if codec == "h264" else "vp09"}')


@pytest.mark.parametrize("fps", [8, 12.5, 30000 / 1001, 0.5, 60])
def test_frames_of_a_stream_come_at_their_times(fps):
    import io

    import av

    writer = FragmentedWriter(fps=fps)
    content = b"".join(writer.stream([moving(2), moving(3), moving(1)]))
    with av.open(io.BytesIO(content), format="mp4") as container:
        frames = list(container.decode(video=0))
    assert [frame.time for frame in frames] == pytest.approx([t / fps for t in range(6)])
    assert [frame.key_frame for frame in frames] == [True, False, True, False, False, True]


def test_bad_blocks_leave_the_stream_usable(tmp_path):
    writer = FragmentedWriter(fps=10)
    content = writer.add(moving(2))
    with pytest.raises(UsageError, match="blocks differ in size; got 32x32; allowed 48x32"):
        writer.add(moving(2, 32, 32))
    with pytest.raises(UsageError, match="no frames"):
        writer.add(moving(2)[:0])
    with pytest.raises(UsageError, match="even width"):
        writer.add(moving(2, 33, 48))
    (tmp_path / "a.mp4").write_bytes(content + writer.add(moving(1)))
    assert len(read_video(tmp_path / "a.mp4").frames) == 3
    padded = FragmentedWriter(fps=10, pad=True, scale=3)
    (tmp_path / "b.mp4").write_bytes(padded.add(moving(1, 5, 7)))
    assert read_video(tmp_path / "b.mp4").frames.shape == (1, 16, 22, 3)
    with pytest.raises(UsageError, match="codec"):
        FragmentedWriter(fps=10, codec="h265")


# ---- contact sheets --------------------------------------------------------------------------


def test_a_strip_shows_the_frames_in_reading_order():
    frames = np.zeros((5, 3, 4, 3), dtype=np.uint8)
    frames[:, :, :, 0] = np.arange(5)[:, None, None] * 20
    sheet = np.asarray(frame_strip(frames, columns=3, scale=2, gap=1))
    assert sheet.shape == (1 + 2 * 7, 1 + 3 * 9, 3)
    assert sheet[0].tolist() == [[255] * 3] * 28
    for number in range(5):
        row, column = divmod(number, 3)
        tile = sheet[1 + 7 * row : 7 + 7 * row, 1 + 9 * column : 9 + 9 * column]
        assert tile.shape == (6, 8, 3)
        assert (tile == (20 * number, 0, 0)).all()
    assert (sheet[8:, 19:] == 255).all()


def test_a_strip_of_many_frames_keeps_first_and_last():
    assert spread(9, 3) == [0, 4, 8] and spread(2, 5) == [0, 1] and spread(7, 1) == [0]
    frames = np.zeros((30, 2, 2, 3), dtype=np.uint8)
    frames[29] = 200
    sheet = frame_strip(frames, max_frames=4, gap=0)
    assert sheet.size == (8, 2) and sheet.getpixel((7, 0)) == (200,) * 3
    with pytest.raises(UsageError, match="no frames"):
        frame_strip(frames[:0])
    with pytest.raises(UsageError, match="columns"):
        frame_strip(frames, columns=0)
