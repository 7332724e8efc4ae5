"""Data sets load with the right pixels and texts, and hostile files end in one clear message."""

import io
import json
import logging
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blockloom.core.errors import DataError, UsageError
from blockloom.training import archive, images
from blockloom.training.data import ImageDataset, convert, load_images
from blockloom.training.images import read_image


def save(path: Path, color, size=(8, 8), mode="RGB", **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


def pixel(path: Path) -> list[int]:
    return read_image(path)[0, 0].tolist()


# ---- one image -------------------------------------------------------------------------------


def test_transparency_lies_on_white(tmp_path):
    assert pixel(save(tmp_path / "a.png", (0, 0, 0, 0), mode="RGBA")) == [255, 255, 255]
    assert pixel(save(tmp_path / "b.png", (255, 0, 0, 255), mode="RGBA")) == [255, 0, 0]
    half = pixel(save(tmp_path / "c.png", (0, 0, 0, 128), mode="RGBA"))
    assert half == [127, 127, 127]
    assert pixel(save(tmp_path / "d.png", (10, 0), mode="LA")) == [255, 255, 255]


def test_palettes_with_transparency(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([9, 8, 7, 1, 2, 3])
    image.save(tmp_path / "plain.png")
    image.save(tmp_path / "clear.png", transparency=0)
    assert pixel(tmp_path / "plain.png") == [9, 8, 7]
    assert pixel(tmp_path / "clear.png") == [255, 255, 255]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    grey = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0, :, 1].tolist() == [0, 1, 128, 255]


def test_cmyk_grey_and_one_bit(tmp_path):
    cyan = pixel(save(tmp_path / "a.jpg", (255, 0, 0, 0), mode="CMYK"))
    assert cyan[0] < 10 and min(cyan[1:]) > 245
    assert pixel(save(tmp_path / "b.png", 77, mode="L")) == [77, 77, 77]
    assert pixel(save(tmp_path / "c.png", 1, mode="1")) == [255, 255, 255]


def test_rotation_tag_is_applied(tmp_path):
    image = Image.new("RGB", (16, 8), (0, 0, 0))
    image.paste((255, 255, 255), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned a quarter clockwise
    image.save(tmp_path / "a.png", exif=exif)
    turned = read_image(tmp_path / "a.png")
    assert turned.shape == (16, 8, 3)
    assert turned[0, 0].tolist() == [255, 255, 255]
    assert turned[-1, 0].tolist() == [0, 0, 0]


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixel(tmp_path / "a.gif") == [255, 0, 0]


def test_scaling_crops_the_middle(tmp_path):
    image = Image.new("RGB", (32, 8), (0, 0, 0))
    image.paste((255, 255, 255), (12, 0, 20, 8))
    image.save(tmp_path / "a.png")
    scaled = read_image(tmp_path / "a.png", image_size=4)
    assert scaled.shape == (4, 4, 3)
    assert scaled.min() > 200


def test_other_formats_and_lies_are_refused(tmp_path):
    bitmap = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(bitmap, format="BMP")
    with pytest.raises(DataError, match=r"a\.png: not an image of type PNG"):
        read_image(bitmap)
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"b\.png: not an image"):
        read_image(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"c\.png: cannot be read"):
        read_image(tmp_path / "c.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_cut_files_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(DataError, match=rf"a\.{suffix}: "):
        read_image(path)


def test_bombs_are_refused_before_decoding(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", 0, size=(3000, 3000), mode="1")
    monkeypatch.setattr(images, "MAX_PIXELS", 1_000_000)
    with pytest.raises(DataError, match="3000x3000 pixels; at most 1000000"):
        read_image(path)
    monkeypatch.setattr(images, "MAX_FILE_BYTES", 10)
    with pytest.raises(DataError, match="bytes; at most 10"):
        read_image(path)


# ---- folders ---------------------------------------------------------------------------------


def test_folder_with_texts_and_splits(tmp_path):
    save(tmp_path / "train" / "a.png", (255, 0, 0))
    save(tmp_path / "test" / "b.PNG", (0, 255, 0))
    (tmp_path / "train" / "a.txt").write_text("  a red square\n")
    data = load_images(tmp_path)
    assert data.captions == ["", "a red square"]
    assert data.split == ["test", "train"]
    assert data.images[:, 0, 0].tolist() == [[0, 255, 0], [255, 0, 0]]
    assert data.only("train").captions == ["a red square"]


def test_metadata_file(tmp_path):
    save(tmp_path / "a.png", (1, 2, 3))
    save(tmp_path / "sub" / "b.png", (4, 5, 6))
    save(tmp_path / "unlisted.png", (7, 8, 9))
    rows = [
        {"file_name": "sub/b.png", "text": "second", "split": "test"},
        {"file_name": "a.png", "caption": "first"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    data = load_images(tmp_path)
    assert data.captions == ["second", "first"]
    assert data.split == ["test", "train"]
    assert data.images[:, 0, 0].tolist() == [[4, 5, 6], [1, 2, 3]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1: not JSON"),
        ("[" * 100_000, "line 1: not JSON"),
        ('{"text": "a"}', "line 1: needs an object with 'file_name'"),
        ('{"file_name": 5}', "line 1: needs an object"),
        ('{"file_name": "../secret.png"}', "leads outside the folder"),
        ('{"file_name": "/etc/hostname"}', "leads outside the folder"),
        ('{"file_name": "a\\u0000.png"}', "not a usable file name"),
        ('{"file_name": "a.png", "text": 7}', "text is 7, not a text"),
        ('{"file_name": "none.png"}', "none.png: cannot be read"),
    ],
)
def test_hostile_metadata(tmp_path, line, message):
    save(tmp_path / "secret.png", 0)
    save(tmp_path / "data" / "a.png", 0)
    (tmp_path / "data" / "metadata.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "data")


def test_links_cannot_lead_outside(tmp_path):
    save(tmp_path / "secret.png", 0)
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "secret.png", tmp_path / "data" / "a.png")
    with pytest.raises(DataError, match="leads outside"):
        load_images(tmp_path / "data")


def test_long_captions_are_refused(tmp_path):
    save(tmp_path / "a.png", 0)
    (tmp_path / "a.txt").write_text("x" * 5000)
    with pytest.raises(DataError, match="longer than 2000"):
        load_images(tmp_path)


def test_mixed_sizes_need_an_image_size(tmp_path):
    save(tmp_path / "a.png", 0, size=(8, 8))
    save(tmp_path / "b.png", 0, size=(16, 8))
    with pytest.raises(DataError, match=r"a\.png has 8x8 pixels but b\.png 16x8"):
        load_images(tmp_path)
    assert load_images(tmp_path, 4).images.shape == (2, 4, 4, 3)


def test_one_bad_file_in_a_thousand_is_skipped(tmp_path, caplog):
    good = save(tmp_path / "metadata.png", 0, size=(2, 2))
    lines = [{"file_name": good.name}] * 1000 + [{"file_name": "bad.png"}]
    (tmp_path / "bad.png").write_bytes(b"not an image")
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with caplog.at_level(logging.WARNING):
        assert len(load_images(tmp_path)) == 1000
    assert "bad.png" in caplog.text
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines[-3:])))
    with pytest.raises(DataError, match=r"1 of 3 items are bad: .*bad.png"):
        load_images(tmp_path)


def test_nothing_to_load(tmp_path):
    with pytest.raises(DataError, match="holds no images"):
        load_images(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        load_images(tmp_path / "none")
    (tmp_path / "a.zip").write_bytes(b"")
    with pytest.raises(DataError, match="unknown kind"):
        load_images(tmp_path / "a.zip")


# ---- archives --------------------------------------------------------------------------------


def test_archive_with_numbered_texts(tmp_path):
    pictures = np.arange(3 * 4 * 4 * 3, dtype=np.uint8).reshape(3, 4, 4, 3)
    np.savez_compressed(
        tmp_path / "a.npz",
        images=pictures,
        captions=np.array(["x", "y", "z"]),
        split=np.array([0, 1, 0], np.uint8),
        split_names=np.array(["train", "test_name"]),
        keywords=np.array([{}], dtype=object),  # never touched
    )
    data = load_images(tmp_path / "a.npz")
    assert np.array_equal(data.images, pictures)
    assert data.captions == ["x", "y", "z"]
    assert data.split == ["train", "test_name", "train"]


def test_archive_of_bare_greys(tmp_path):
    np.savez(tmp_path / "a.npz", images=np.full((2, 4, 4), 9, np.uint8))
    data = load_images(tmp_path / "a.npz")
    assert data.images.shape == (2, 4, 4, 3)
    assert (data.captions, data.split) == (["", ""], ["train", "train"])


def _npz(path, **arrays):
    np.savez(path, **arrays)
    return path


PICTURES = np.zeros((2, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"captions": np.array(["a"])}, "no array 'images'"),
        ({"images": PICTURES.astype(np.float32)}, "float32.*needed uint8"),
        ({"images": PICTURES[:0]}, "holds no images"),
        ({"images": np.uint8(3)}, "holds no images"),
        (
            {"images": PICTURES, "captions": np.array(["a"])},
            r"'captions' has shape \[1\], not \[2\]",
        ),
        ({"images": PICTURES, "captions": np.array([1, 2])}, "numbers but no texts"),
        (
            {"images": PICTURES, "split": np.array([0, 5]), "split_names": np.array(["train"])},
            r"'split' is not in 0\.\.0",
        ),
        ({"images": np.array([{}, {}], dtype=object)}, "holds objects"),
    ],
)
def test_bad_archives_are_named(tmp_path, arrays, message):
    with pytest.raises(DataError, match=f"a.npz.*{message}"):
        load_images(_npz(tmp_path / "a.npz", **arrays))


def test_a_lying_header_allocates_nothing(tmp_path):
    header = io.BytesIO()
    shape = (10**6, 10**6, 64, 3)
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as file:
        file.writestr("images.npy", header.getvalue() + b"\0" * 16)
    with pytest.raises(DataError, match="claims 192000000000000 bytes"):
        load_images(tmp_path / "a.npz")


def test_size_cap(tmp_path, monkeypatch):
    monkeypatch.setattr(archive, "MAX_ARRAY_BYTES", 10)
    with pytest.raises(DataError, match="at most 10 are read"):
        load_images(_npz(tmp_path / "a.npz", images=PICTURES))


def test_cut_and_foreign_archives(tmp_path):
    path = _npz(tmp_path / "a.npz", images=PICTURES)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"a\.npz: not a readable"):
        load_images(path)
    path.write_bytes(b"\x80\x04N.")
    with pytest.raises(DataError, match=r"a\.npz: not a readable"):
        load_images(path)


def test_fortran_order_is_kept(tmp_path):
    pictures = np.asfortranarray(np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8))
    data = load_images(_npz(tmp_path / "a.npz", images=pictures))
    assert np.array_equal(data.images, pictures)


# ---- Parquet ---------------------------------------------------------------------------------


def _png(color) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def test_parquet_bytes_and_records(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [_png((1, 2, 3)), _png((4, 5, 6))]
    for name, column in (("bytes", rows), ("records", [{"bytes": r, "path": None} for r in rows])):
        table = pyarrow.table({"image": column, "text": ["a", None], "extra": [1, 2]})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        data = load_images(tmp_path / f"{name}.parquet")
        assert data.captions == ["a", ""]
        assert data.images[:, 0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_bad_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="not a readable Parquet"):
        load_images(path)
    parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(DataError, match="no column 'image'"):
        load_images(path)
    parquet.write_table(pyarrow.table({"image": [5]}), path)
    with pytest.raises(DataError, match="row 0: column 'image' holds no bytes"):
        load_images(path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r"blockloom\[train\]"):
        load_images(tmp_path / "a.parquet")


# ---- conversion and selection -----------------------------------------------------------------


def test_convert_keeps_everything(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    first = tmp_path / "first"
    for number, folder in enumerate(("train", "train", "val", "val")):
        (first / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[number]).save(first / folder / f"{number}.png")
        (first / folder / f"{number}.txt").write_text(f"picture {number}, émoji \U0001f600")
    assert len(convert(first, tmp_path / "out.npz", image_size=16)) == 4
    loaded = load_images(tmp_path / "out.npz")
    assert np.array_equal(loaded.images, pictures)
    assert loaded.captions == [f"picture {i}, émoji \U0001f600" for i in range(4)]
    assert loaded.split == ["train", "train", "val", "val"]
    again = convert(tmp_path / "out.npz", tmp_path / "again.npz")
    assert np.array_equal(again.images, loaded.images)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.npz", "first", "out.npz"]


def test_objects_are_not_written(tmp_path):
    with pytest.raises(DataError, match="holds objects"):
        archive.write_arrays(tmp_path / "a.npz", {"x": np.array([{}], dtype=object)})
    assert not list(tmp_path.iterdir())


def test_pixels_and_selection():
    pictures = np.zeros((3, 2, 2, 3), np.uint8)
    pictures[1], pictures[2, ..., 0] = 255, 51
    data = ImageDataset(pictures, ["a", "b", "c"], ["train", "test", "train"])
    taken = data.pixels(torch.tensor([2, 1]))
    assert taken.shape == (2, 3, 2, 2)
    torch.testing.assert_close(taken[0, :, 0, 0], torch.tensor([-0.6, -1.0, -1.0]))
    assert float(taken[1].min()) == 1
    assert data.take([2, 0]).captions == ["c", "a"]
    with pytest.raises(DataError, match="'val'; splits present: test, train"):
        data.only("val")
    with pytest.raises(DataError, match="3 images but 2 captions"):
        ImageDataset(pictures, ["a", "b"], ["train"] * 3)
