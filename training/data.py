"""Captioned images in memory, from an .npz archive."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..core.errors import DataError


@dataclass(frozen=True)
class ImageDataset:
    """Captioned images of one size.

    Attributes:
        images: uint8 [items, height, width, 3], RGB.
        captions: One text per item; may be empty texts.
        split: Name of the split of every item, for instance "train".
    """

    images: np.ndarray
    captions: list[str]
    split: list[str]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, indices: Sequence[int]) -> "ImageDataset":
        """Select items by number."""
        index = np.asarray(indices, dtype=np.int64)
        return ImageDataset(
            self.images[index],
            [self.captions[i] for i in index],
            [self.split[i] for i in index],
        )

    def only(self, split: str) -> "ImageDataset":
        """Select the items of one split.

        Raises:
            DataError: No item has it; the splits present are named.
        """
        chosen = [i for i, name in enumerate(self.split) if name == split]
        if not chosen:
            present = ", ".join(sorted(set(self.split))) or "none"
            raise DataError(f"no item is in split {split!r}; splits present: {present}")
        return self.take(chosen)

    def pixels(self, indices: Tensor) -> Tensor:
        """Return items as float32 [items, 3, height, width] in [-1, 1].

        Args:
            indices: int64 [items].
        """
        chosen = torch.from_numpy(self.images[indices.numpy()])
        return chosen.permute(0, 3, 1, 2).float() / 127.5 - 1


def load_npz(path: Path | str) -> ImageDataset:
    """Load an archive with `images`, `captions` and `split` arrays."""
    with np.load(path, allow_pickle=False) as archive:
        images = archive["images"]
        captions = archive["captions"].tolist()
        names = archive["split_names"].tolist()
        split = [names[i] for i in archive["split"]]
    return ImageDataset(images, captions, split)
