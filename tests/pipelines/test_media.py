"""Pictures on disk: names, atomic writing, the record's round trip, hostile input."""

import json
import os
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from blockloom.core.errors import DataError, ModelError, ResourceError, UsageError
from blockloom.pipelines import media
from blockloom.pipelines.params import (
    ImageParams,
    Record,
    canonical_json,
    hash64,
    model_folder,
    weights_hash,
)

WEIGHTS = "ab" * 32


def make_record(**changes: object) -> Record:
    params = ImageParams(
        **({"prompt": "red apple", "seed": 7, "model": "blockloom/emoji"} | changes)
    )
    return Record(params=params, recipe="image/halton", weights_sha256=WEIGHTS, versions={"a": "1"})


def gradient(width: int = 6, height: int = 4) -> Image.Image:
    image = Image.new("RGB", (width, height))
    image.putdata([(x * 40 % 256, y * 60 % 256, 9) for y in range(height) for x in range(width)])
    return image


class TestNames:
    def test_plain_words_stay_readable(self) -> None:
        assert media.file_name(3, "red apple", 42) == "00003-red-apple-42.png"

    @pytest.mark.parametrize(
        "text",
        [
            "../../etc/x",
            "/abs",
            "C:\\x",
            "CON",
            "a:b",
            "trailing.",
            "x" * 5000,
            "🍎" * 50,
            "\u202eabc",
            "\ud800",
            "",
            "a\0b",
            "nul",
        ],
    )
    def test_hostile_text_gives_a_plain_short_name(self, text: str) -> None:
        name = media.slug(text)
        assert 0 < len(name) <= 40
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
        assert name not in {"con", "nul"}

    def test_lossy_names_do_not_collide(self) -> None:
        texts = ["🍎", "🍏", "é", "e\u0301", "e", "a/b", "a:b", "a b", "x" * 99, "x" * 100]
        assert len({media.slug(t) for t in texts}) == len(texts)


class TestWriting:
    def test_png_and_sidecar_carry_the_record(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        record = make_record()
        digest = media.save_png(gradient(), path, record)
        assert media.read_metadata(path) == record
        assert media.read_metadata(path.with_suffix(".json")) == record
        sidecar = json.loads(path.with_suffix(".json").read_text())
        assert sidecar["sha256"] == digest
        assert sidecar["key"] == record.params.key(WEIGHTS)
        assert media.read_image(path).tobytes() == gradient().tobytes()

    def test_same_picture_same_bytes(self, tmp_path: Path) -> None:
        for name in ("a.png", "b.png"):
            media.save_png(gradient(), tmp_path / name, make_record())
        assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

    def test_no_metadata_writes_no_text(self, tmp_path: Path) -> None:
        image = gradient()
        image.info["comment"] = "GPS 1,2"
        media.save_png(image, tmp_path / "a.png")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png"]
        assert b"tEXt" not in (tmp_path / "a.png").read_bytes()
        with pytest.raises(DataError, match="no blockloom parameters"):
            media.read_metadata(tmp_path / "a.png")

    def test_other_extension_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"\.exe.*\.png"):
            media.save_png(gradient(), tmp_path / "a.exe")

    @pytest.mark.parametrize("call", ["write", "fsync", "rename"])
    def test_disk_full_leaves_the_old_file(
        self, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "a.bin"
        path.write_bytes(b"old")

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        if call == "write":
            monkeypatch.setattr(Path, "open", fail)
        elif call == "fsync":
            monkeypatch.setattr(os, "fsync", fail)
        else:
            monkeypatch.setattr(Path, "replace", fail)
        with pytest.raises(ResourceError, match=r"a\.bin: No space"):
            media.write_bytes(path, b"new")
        monkeypatch.undo()
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]

    def test_done_needs_key_and_hash(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        record = make_record()
        key = record.params.key(WEIGHTS)
        assert not media.is_done(path, key)
        media.save_png(gradient(), path, record)
        assert media.is_done(path, key)
        assert not media.is_done(path, make_record(seed=8).params.key(WEIGHTS))
        path.write_bytes(path.read_bytes() + b"x")
        assert not media.is_done(path, key)


class TestReading:
    @pytest.mark.parametrize("size", [(1, 1), (1, 4000)])
    def test_extreme_shapes(self, size: tuple[int, int], tmp_path: Path) -> None:
        gradient(*size).save(tmp_path / "a.png")
        assert media.read_image(tmp_path / "a.png").size == size

    def test_transparency_lies_on_white(self, tmp_path: Path) -> None:
        Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "a.png")
        assert media.read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 255, 255)

    def test_sixteen_bit_grey_is_scaled(self, tmp_path: Path) -> None:
        image = Image.new("I;16", (2, 2), 257 * 100)
        image.save(tmp_path / "a.png")
        assert media.read_image(tmp_path / "a.png").getpixel((0, 0)) == (100, 100, 100)

    def test_cmyk_and_rotation(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("CMYK", (4, 2), (0, 0, 0, 0)).save(tmp_path / "a.jpg", exif=exif)
        image = media.read_image(tmp_path / "a.jpg")
        assert image.size == (2, 4)
        assert image.getpixel((0, 0)) == (255, 255, 255)
        assert not image.info

    def test_header_of_a_huge_picture_is_refused_before_decoding(self, tmp_path: Path) -> None:
        body = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
        chunk = b"IHDR" + body
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk
        data += struct.pack(">I", zlib.crc32(chunk)) + struct.pack(">I", 9) + b"IDAT" + bytes(13)
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(DataError, match="too many pixels"):
            media.read_image(tmp_path / "a.png")

    def test_text_bomb_is_refused(self, tmp_path: Path) -> None:
        info = PngImagePlugin.PngInfo()
        for i in range(3):
            info.add_text(f"k{i}", "a" * 40_000_000, zip=True)
        gradient().save(tmp_path / "a.png", pnginfo=info)
        with pytest.raises(DataError):
            media.read_image(tmp_path / "a.png")

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.svg", b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
            ("a.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
            ("a.pdf", b"%PDF-1.4"),
            ("a.png", b""),
            ("a.tif", b"II*\x00\x08\x00\x00\x00"),
            ("a.png", b"<html><script>alert(1)</script>"),
        ],
    )
    def test_other_formats_are_refused(self, name: str, content: bytes, tmp_path: Path) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match="known format"):
            media.read_image(tmp_path / name)

    def test_truncated_jpeg(self, tmp_path: Path) -> None:
        gradient(64, 64).save(tmp_path / "a.jpg")
        content = (tmp_path / "a.jpg").read_bytes()
        (tmp_path / "a.jpg").write_bytes(content[: len(content) // 2])
        with pytest.raises(DataError, match=r"a\.jpg"):
            media.read_image(tmp_path / "a.jpg")

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
    def test_fifo_and_folder_do_not_hang(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe.png")
        for path in (tmp_path / "pipe.png", tmp_path, tmp_path / "missing.png"):
            with pytest.raises(DataError):
                media.read_image(path)

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[]",
            "[" * 100_000,
            '{"format": 2, "params": {}}',
            '{"format": 1, "params": {"a": 1}}',
        ],
    )
    def test_bad_sidecars(self, text: str, tmp_path: Path) -> None:
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(DataError):
            media.read_metadata(tmp_path / "a.json")


class TestParams:
    def test_key_is_stable_and_depends_on_everything(self) -> None:
        base = make_record().params
        assert base.key(WEIGHTS) == make_record().params.key(WEIGHTS)
        keys = {base.key(WEIGHTS), base.key("cd" * 32)}
        keys |= {
            make_record(**{k: v}).params.key(WEIGHTS) for k, v in {"seed": 8, "top_k": 3}.items()
        }
        assert len(keys) == 4

    def test_hash64_is_a_fixed_function(self) -> None:
        assert hash64(0, "a") == hash64(0, "a")
        assert hash64(0, "a") != hash64(1, "a") != hash64(1, "b")
        assert 0 <= hash64(2**64 - 1, "\ud800") < 2**64

    def test_unknown_key_names_the_nearest(self) -> None:
        record = make_record().params.to_dict() | {"promt": "x"}
        with pytest.raises(DataError, match=r"promt.*prompt"):
            ImageParams.from_dict(record)

    @pytest.mark.parametrize(
        "change",
        [
            {"seed": -1},
            {"seed": 2**64},
            {"seed": True},
            {"prompt": 3},
            {"top_p": "1"},
            {"model": None},
        ],
    )
    def test_wrong_values(self, change: dict[str, object]) -> None:
        with pytest.raises(DataError, match=next(iter(change))):
            ImageParams.from_dict(make_record().params.to_dict() | change)

    def test_canonical_json(self) -> None:
        assert canonical_json({"b": 1, "a": "é"}) == '{"a":"\\u00e9","b":1}'
        with pytest.raises(ValueError, match="Out of range"):
            canonical_json(float("nan"))


class TestModelFolder:
    @pytest.mark.parametrize("name", ["", "  ", "http://x/y", "no/such", "../..", "a\0b", "/"])
    def test_bad_names(self, name: str) -> None:
        with pytest.raises(ModelError):
            model_folder(name)

    def test_file_and_pickle(self, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("x")
        with pytest.raises(ModelError, match="not a file"):
            model_folder(str(tmp_path / "a.txt"))
        (tmp_path / "model_index.json").write_text("{}")
        assert model_folder(str(tmp_path)) == tmp_path
        (tmp_path / "model.bin").write_bytes(b"x")
        with pytest.raises(ModelError, match="pickle"):
            model_folder(str(tmp_path))

    def test_hash_sees_names_and_contents(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no safetensors"):
            weights_hash(tmp_path)
        (tmp_path / "a.safetensors").write_bytes(b"1")
        first = weights_hash(tmp_path)
        (tmp_path / "notes.md").write_text("ignored")
        assert weights_hash(tmp_path) == first
        (tmp_path / "a.safetensors").write_bytes(b"2")
        assert weights_hash(tmp_path) != first
