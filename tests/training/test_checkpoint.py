"""Checkpoints are whole or absent, damage is noticed, and only their own names are deleted."""

import json
import logging

import pytest
import torch

from blockloom.core.errors import DataError
from blockloom.training import checkpoint as module
from blockloom.training.checkpoint import CheckpointStore, read, write_atomic


def save(store, step):
    tensors = {"model": {"w": torch.arange(6.0).view(2, 3) + step, "n": torch.tensor(step)}}
    return store.save(step, tensors, {"state": {"step": step, "rate": 0.1}})


def test_contents_come_back_bit_for_bit(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 7)
    loaded = store.load()
    assert loaded.step == 7
    assert torch.equal(loaded.tensors["model"]["w"], torch.arange(6.0).view(2, 3) + 7)
    assert loaded.tensors["model"]["n"].item() == 7
    assert loaded.documents == {"state": {"step": 7, "rate": 0.1}}
    assert (tmp_path / "latest").read_text() == "step_00000007\n"


def test_empty_folder_gives_none(tmp_path):
    assert CheckpointStore(tmp_path / "new").load() is None


def test_tied_and_strided_tensors_are_stored(tmp_path):
    weight = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    CheckpointStore(tmp_path).save(1, {"model": {"a": weight, "b": weight}}, {})
    loaded = CheckpointStore(tmp_path).load().tensors["model"]
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["b"], weight)


def test_rotation_keeps_the_last_and_foreign_names(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=2)
    (tmp_path / "step_best").mkdir()
    (tmp_path / "step_00000001_copy").mkdir()
    for step in (1, 2, 3, 4):
        save(store, step)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == [
        "latest",
        "step_00000001_copy",
        "step_00000003",
        "step_00000004",
        "step_best",
    ]


def test_leftovers_of_a_killed_run_are_removed(tmp_path):
    (tmp_path / "step_00000009.tmp-123").mkdir(parents=True)
    (tmp_path / "notes.tmp-123").mkdir()
    store = CheckpointStore(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.tmp-123"]
    assert store.load() is None


def _truncate(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])


def _flip(path):
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flip,
        lambda path: (path / "model.safetensors").unlink(),
        lambda path: (path / "manifest.json").unlink(),
        lambda path: (path / "manifest.json").write_text("{"),
        lambda path: (path / "manifest.json").write_text('{"sha256": 5}'),
        lambda path: (path / "state.json").write_text('{"step": 8}'),
    ],
)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, damage, caplog):
    store = CheckpointStore(tmp_path)
    save(store, 1)
    damage(save(store, 2))
    with caplog.at_level(logging.WARNING):
        assert store.load().step == 1
    assert "step_00000002 is damaged" in caplog.text


def test_all_damaged_is_an_error(tmp_path):
    store = CheckpointStore(tmp_path)
    _flip(save(store, 1))
    with pytest.raises(DataError, match="all 1 checkpoints"):
        store.load()


def test_manifest_cannot_point_outside(tmp_path):
    store = CheckpointStore(tmp_path / "run")
    path = save(store, 1)
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["../../secret.json"] = module._digest(secret)
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"secret.json: missing"):
        read(path)


@pytest.mark.parametrize("stage", ["save_file", "_digest", "_sync_folder"])
def test_failed_save_leaves_the_old_one(tmp_path, monkeypatch, stage):
    store = CheckpointStore(tmp_path)
    save(store, 1)

    def fail(*arguments, **named):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, stage, fail)
        with pytest.raises(OSError, match="No space"):
            save(store, 2)
    assert [p.name for p in store.list()] == ["step_00000001"]
    assert not list(tmp_path.glob("*.tmp-*"))
    assert store.load().step == 1


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path)
    save(store, 3)
    store.save(3, {"model": {"w": torch.zeros(1)}}, {})
    assert store.load().tensors["model"]["w"].tolist() == [0.0]


def test_write_atomic_replaces(tmp_path):
    file = tmp_path / "a.json"
    for content in (b"one", b"two"):
        write_atomic(file, content)
        assert file.read_bytes() == content
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_keep_last_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep_last is 0"):
        CheckpointStore(tmp_path, keep_last=0)


def test_read_refuses_other_folders(tmp_path):
    with pytest.raises(DataError, match="not a checkpoint directory"):
        read(tmp_path)
