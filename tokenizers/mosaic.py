"""Discrete image tokenizer for pictures made of few kinds of cells: every code is a picture.

A cell is a square of pixels; its code names the nearest of a small set of cell pictures, which are
picked from data in one pass, not trained. Worlds on a grid lose next to nothing that way. It does
not know what the pictures show.

Invariant: codes of a token are those of its `merge` x `merge` cells in raster order, one codebook
each; all codebooks hold the same pictures. A margin that always looks the same has no tokens.
"""

from collections.abc import Iterable

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.errors import DataError
from .base import check_codes, check_pixels
from .untrained import PlainError

MOST_CELLS = 400_000
"""Cells the pictures are picked from; the first ones where there are more."""
ROUNDS = 4
"""How often pictures move to the mean of their cells."""


class MosaicTokenizer(ModelMixin, ConfigMixin, PlainError):
    """Codes of the nearest cell pictures, several cells to a token."""

    value = "code"
    latent_channels = 0

    @register_to_config
    def __init__(
        self,
        image_size: int = 64,
        cell: int = 8,
        merge: int = 2,
        codebook_size: int = 32,
        border: int = 1,
        margin: int = 0,
    ):
        """Start with grey pictures; `fit` picks real ones.

        Args:
            image_size: Side of the image in pixels.
            cell: Side of a cell in pixels.
            merge: Cells per side of a token; a token has merge^2 codes.
            codebook_size: Cell pictures, at least 2.
            border: Pixels at a cell's edge that are not compared: scaled pictures bleed there.
            margin: Pixels along the image's edges that always look the same, walls for instance;
                they are kept as one picture.

        Raises:
            ValueError: Sizes that do not fit, or a border that leaves nothing to compare.
        """
        super().__init__()
        side, inner = cell * merge, image_size - 2 * margin
        if cell < 1 or merge < 1 or margin < 0 or inner < side or inner % side:
            near = max(side, round(inner / max(side, 1)) * side) + 2 * margin
            raise ValueError(
                f"image_size is {image_size}; without margins it must be a multiple of cell x "
                f"merge = {side}, nearest {near}"
            )
        if codebook_size < 2:
            raise ValueError(f"codebook_size is {codebook_size}; it must be at least 2")
        if not 0 <= 2 * border < cell:
            raise ValueError(
                f"border is {border}; a cell of {cell} pixels allows 0 to {(cell - 1) // 2}"
            )
        self.image_size = image_size
        self.num_codebooks, self.codebook_size = merge**2, codebook_size
        self.grid = (inner // side, inner // side)
        self.edge = nn.Parameter(torch.zeros(3, image_size, image_size))
        self.pictures = nn.Parameter(torch.zeros(codebook_size, 3, cell, cell))

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]

    def _compared(self, cells: Float[Tensor, "cells 3 side side"]) -> Float[Tensor, "cells parts"]:
        """Cut off what is not compared."""
        border, size = self.config["border"], self.config["cell"]
        kept = slice(border, size - border)
        return cells[:, :, kept, kept].float().flatten(1)

    def _cells(self, pixels: Float[Tensor, "batch 3 height width"]) -> Tensor:
        """Cut images into cells, [batch, tokens, merge^2, 3, cell, cell]."""
        merge, size, margin = (self.config[name] for name in ("merge", "cell", "margin"))
        inner = slice(margin, self.image_size - margin)
        return rearrange(
            pixels[:, :, inner, inner],
            "b c (h m p) (w n q) -> b (h w) (m n) c p q",
            m=merge,
            n=merge,
            p=size,
            q=size,
        )

    def _nearest(self, compared: Float[Tensor, "cells parts"]) -> Int[Tensor, " cells"]:
        pictures = self._compared(self.pictures)
        # Squared distances without the cell's own length, which is the same for all pictures.
        return (pictures.square().sum(1) - 2 * compared @ pictures.T).argmin(1)

    @torch.no_grad()
    def encode(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Int[Tensor, "batch tokens codebooks"]:
        """Name the nearest picture of every cell; ties go to the lower code.

        Args:
            pixels: Images in [-1, 1].

        Raises:
            ValueError: The image has another size.
        """
        check_pixels(pixels, self.image_size)
        cells = self._cells(pixels)
        codes = self._nearest(self._compared(cells.flatten(0, 2)))
        return codes.view(cells.shape[:3])

    def decode(
        self, values: Int[Tensor, "batch tokens codebooks"]
    ) -> Float[Tensor, "batch 3 height width"]:
        """Paste the pictures side by side.

        Args:
            values: Codes in [0, codebook_size).

        Raises:
            ValueError: Codes of another shape or outside the codebook.
        """
        check_codes(values, self.num_tokens, self.num_codebooks, self.codebook_size)
        inner = rearrange(
            self.pictures[values], "b (h w) (m n) c p q -> b c (h m p) (w n q)",
            h=self.grid[0], m=self.config["merge"],
        )  # fmt: skip
        margin = self.config["margin"]
        if not margin:
            return inner
        whole = self.edge.expand(len(values), -1, -1, -1).clone()
        whole[:, :, margin:-margin, margin:-margin] = inner
        return whole

    @torch.no_grad()
    def fit(self, batches: Iterable[Float[Tensor, "_ 3 _ _"]]) -> int:
        """Pick the cell pictures from images.

        First the most frequent cell, then again and again the cell that is worst served by those
        picked so far; then pictures move to the mean of the cells they stand for. The result
        depends on the images and their order only.

        Args:
            batches: Images in [-1, 1].

        Returns:
            Number of pictures in use; the others repeat the first one.

        Raises:
            DataError: No images.

        Source: farthest-first traversal (Gonzalez 1985), Lloyd's iteration.
        """
        cells, counts = self._different(batches)
        compared = self._compared(cells)
        first = int(counts.argmax())
        chosen = [first]
        distance = (compared - compared[first]).square().sum(1)
        while len(chosen) < self.codebook_size and float(distance.max()) > 0:
            chosen.append(int(distance.argmax()))
            distance = torch.minimum(distance, (compared - compared[chosen[-1]]).square().sum(1))
        self.pictures.copy_(cells[first].expand_as(self.pictures))
        self.pictures[: len(chosen)] = cells[torch.tensor(chosen)]
        weight = counts.to(cells)[:, None]
        for _ in range(ROUNDS):
            nearest = self._nearest(compared)
            total = torch.zeros(self.codebook_size, 1).index_add_(0, nearest, weight)
            mean = torch.zeros_like(self.pictures.flatten(1))
            mean.index_add_(0, nearest, cells.flatten(1) * weight)
            used = total[:, 0] > 0
            self.pictures[used] = (mean / total.clamp_min(1)).view_as(self.pictures)[used]
        self.pictures[len(chosen) :] = self.pictures[0]
        return len(chosen)

    def _different(self, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Collect the different cells of some images and how often each occurs; set the edge."""
        parts: list[Tensor] = []
        left, seen, total = MOST_CELLS, 0, torch.zeros_like(self.edge)
        for images in batches:
            check_pixels(images, self.image_size)
            seen, total = seen + len(images), total + images.sum(0).to(total)
            part = self._cells(images).flatten(0, 2)[:left].cpu()
            # Bytes are what images hold; rounding makes equal cells equal again.
            parts.append(((part + 1) * 127.5).round().byte().flatten(1))
            left -= len(part)
            if left <= 0:
                break
        if not parts:
            raise DataError("no images to pick cell pictures from; at least one is needed")
        self.edge.copy_(total / seen)
        cells, counts = torch.unique(torch.cat(parts), dim=0, return_counts=True)
        size = self.config["cell"]
        return cells.view(-1, 3, size, size).float() / 127.5 - 1, counts
