"""Roll trained video models out for four times their training length and print a table.

Usage: python docs/measure_drift.py DATA MODEL... [--json FILE] [--num N] [--times T]

DATA is an archive or folder of clips, or "physics:FRAMES" for balls made by a formula, with
clips that long (16 pushed held-out clips), at the models' frame size.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from blockloom.training.clip_run import load_clip_data
from blockloom.training.clips import ClipDataset
from blockloom.training.drift import CONTEXTS, TIMES, drift_markdown, drift_table
from blockloom.training.physics import physics_clips
from blockloom.training.run import load_pipeline_parts


def read(data: str, folder: Path) -> ClipDataset:
    """Read the data at the size of a model."""
    model, tokenizer = load_pipeline_parts(folder)
    if not data.startswith("physics:"):
        return load_clip_data(model.recipe, data, tokenizer)
    frames, size = int(data.partition(":")[2]), tokenizer.frame_size[0]
    pushes = model.recipe.condition.actions > 0
    return physics_clips(1, 16, seed=1, num_frames=frames, size=size, pushes=pushes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("data")
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--num", type=int, default=CONTEXTS)
    parser.add_argument("--times", type=int, default=TIMES)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    clips = read(flags.data, flags.models[0])
    table = drift_table(flags.models, clips, times=flags.times, num=flags.num)
    if flags.json is not None:
        flags.json.write_text(json.dumps(table, indent=2, allow_nan=False) + "\n")
    sys.stdout.write(drift_markdown(table))
