"""Measure drawn pictures against the data set they were trained on.

A caption of the form "NAME, STYLE style" names a picture and its style; captions without a comma
put all pictures in one style. Every number stands beside chance and a copying baseline.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .baselines import caption_baseline, same_name_baseline
from .checkpoint import write_atomic
from .data import ImageDataset
from .evaluation import psnr, retrieval

SHEET_COLUMNS = 12
Draw = Callable[[Sequence[str]], np.ndarray]


def name_and_style(caption: str) -> tuple[str, str]:
    """Split "red apple, noto style" into ("red apple", "noto style")."""
    name, comma, style = caption.rpartition(", ")
    return (name, style) if comma else (caption, "")


def held_out_items(dataset: ImageDataset) -> ImageDataset | None:
    """Select every item outside the training split, or None when there is none."""
    index = [i for i, split in enumerate(dataset.split) if split != "train"]
    return dataset.take(index) if index else None


def chosen_items(dataset: ImageDataset, split: str, num: int | None, seed: int) -> np.ndarray:
    """Choose up to `num` items of a split, the same for the same seed; None = all."""
    index = np.array([i for i, name in enumerate(dataset.split) if name == split])
    if num is None or num >= len(index):
        return index
    return np.sort(np.random.default_rng(seed).permutation(index)[:num])


def evaluate_pictures(
    dataset: ImageDataset, draw: Draw, num: int | None, seed: int = 0, sheet: Path | None = None
) -> dict[str, Any]:
    """Draw a picture for captions of every split and rank the right one among its style.

    Args:
        dataset: Captioned images with splits; all of them are the gallery.
        draw: Prompts to uint8 pictures [prompts, height, width, 3].
        num: Captions per split; None = all.
        seed: Chooses the captions.
        sheet: PNG to write, see `contact_sheet`; None = none.

    Returns:
        Per split: retrieval with intervals and chance, the nearest-caption baseline and, for names
        known in another style, the same-name baseline; pixel PSNR to the right picture.
    """
    names, styles = zip(*(name_and_style(c) for c in dataset.captions), strict=True)
    trained = np.array([split == "train" for split in dataset.split])
    seen_names = {name for name, is_seen in zip(names, trained, strict=True) if is_seen}
    train = np.flatnonzero(trained)
    report: dict[str, Any] = {}
    rows: list[np.ndarray] = []
    for split in dict.fromkeys(dataset.split):
        index = chosen_items(dataset, split, num, seed)
        captions = [dataset.captions[i] for i in index]
        pictures = draw(captions)
        rows += contact_rows(dataset.images[index], pictures, seed)
        clusters = [names[i] for i in index]
        target = index.tolist()
        entry: dict[str, Any] = {
            "retrieval": retrieval(pictures, target, dataset.images, styles, clusters),
            "psnr_to_target_db": psnr(dataset.images[index], pictures),
        }
        if split != "train":
            entry["nearest_caption_baseline"] = caption_baseline(
                captions, target, [dataset.captions[i] for i in train], dataset.images[train],
                dataset.images, styles, clusters=clusters,
            )  # fmt: skip
            if all(name in seen_names for name in clusters):
                entry["same_name_baseline"] = same_name_baseline(
                    target, dataset.images, styles, names, trained.tolist()
                )
        report[split] = entry
    if sheet is not None:
        write_atomic(sheet, sheet_png(rows))
    return {"prompt_retrieval": report}


def contact_rows(right: np.ndarray, drawn: np.ndarray, seed: int) -> list[np.ndarray]:
    """Line up data set pictures with what was drawn for their captions, chosen by the seed only.

    Returns:
        Two uint8 rows [height, SHEET_COLUMNS * width, 3] per half of the chosen items.
    """
    order = np.random.default_rng(seed).permutation(len(right))[: 2 * SHEET_COLUMNS]
    rows = []
    for first in range(0, len(order), SHEET_COLUMNS):
        part = order[first : first + SHEET_COLUMNS]
        for pictures in (right[part], drawn[part]):
            blank = np.full((SHEET_COLUMNS - len(part), *pictures.shape[1:]), 255, np.uint8)
            rows.append(np.concatenate([*pictures, *blank], axis=1))
    return rows


def sheet_png(rows: list[np.ndarray]) -> bytes:
    """Stack rows into one PNG, drawn rows right under the pictures they answer to."""
    line = np.full((6, rows[0].shape[1], 3), 255, np.uint8)
    stacked = [
        part for i, row in enumerate(rows) for part in ([row] if i % 2 == 0 else [row, line])
    ]
    stream = BytesIO()
    Image.fromarray(np.concatenate(stacked)).save(stream, "PNG")
    return stream.getvalue()
