"""Drift tables: the same beginnings for every model, lines at known times, and Markdown of it."""

import json

import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.core.recipe import load_recipe
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.clip_statistics import byte_psnr, sharpness
from blockloom.training.clips import ClipDataset
from blockloom.training.dreams import beginnings, dreamed
from blockloom.training.drift import drift_markdown, drift_table
from blockloom.training.physics import physics_clips
from blockloom.training.run import initial_model, save_pipeline

SETTINGS = (
    "modality=video", "layout.kind=frames", "layout.block=frame", "cache.window=3",
    "backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16", "text.buckets=32",
    "text.words=3", "schedule.steps=1", "corruption.kind=flow", "head.objective=velocity",
    "schedule.update=euler", "condition.actions=4",
    "tokenizer={kind: frames, image: {kind: patch, image_size: 16, patch: 8}}",
)  # fmt: skip


def saved(folder, seed, frames=4):
    recipe = load_recipe("image/acdit", [*SETTINGS, f"layout.frames={frames}"])
    tokenizer = build_video_tokenizer(dict(recipe.tokenizer)).eval()
    model = initial_model(recipe, tokenizer, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        parameter.data = parameter.data.half().float()  # as a saved folder keeps them
    save_pipeline(folder, model.eval(), tokenizer)
    return model, tokenizer


@pytest.fixture(scope="module")
def clips() -> ClipDataset:
    return physics_clips(1, 2, num_frames=12, size=16, pushes=True)


def test_a_table_of_two_models(clips, tmp_path):
    model, tokenizer = saved(tmp_path / "one" / "final", 0)
    saved(tmp_path / "two", 1)
    table = drift_table([tmp_path / "one" / "final", tmp_path / "two"], clips, num=2)
    json.dumps(table, allow_nan=False)
    assert (table["trained_frames"], table["drawn_frames"], table["contexts"]) == (4, 16, 2)
    assert list(table["models"]) == ["one", "two"]
    lines = table["models"]["one"]["lines"]
    assert [line["frame"] for line in lines] == [1, 2, 4, 8, 12, 16]
    after = beginnings(clips.take([1, 2]), 4, 2, 10, 2, tokenizer)
    drawn = dreamed(model, tokenizer, after, 10)
    psnr = byte_psnr(drawn, after.future)
    assert lines[0]["psnr_db"] == pytest.approx(float(psnr[:, 0].mean()), abs=1e-3)
    assert lines[3]["psnr_db"] == pytest.approx(float(psnr[:, 5:10].mean()), abs=1e-3)
    ratio = sharpness(drawn)[:, :1].mean() / sharpness(after.future).mean()
    assert lines[0]["sharpness_ratio"] == pytest.approx(float(ratio), abs=1e-3)
    assert lines[4]["psnr_db"] is None  # ten true frames follow, no more
    assert table["models"]["two"]["lines"] != lines
    text = drift_markdown(table)
    assert text.count("| one |") == text.count("| two |") == 4
    assert "| frame 1 | frame 2 | frame 4 |" in text
    assert f"| one | {lines[0]['psnr_db']:.2f} |" in text


def test_models_of_different_lengths_are_not_compared(clips, tmp_path):
    saved(tmp_path / "short", 0)
    saved(tmp_path / "long", 0, frames=5)
    with pytest.raises(UsageError, match=r"trained at \[4, 5\] frames"):
        drift_table([tmp_path / "short", tmp_path / "long"], clips)
