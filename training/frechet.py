"""Frechet distance between two sets of pictures, under an extractor that is always named.

Knows two extractors of its own that need no download; anybody's function from pictures to features
works too. Invariant: the result carries the extractor's name and never says FID, because that word
promises the Inception network.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import DataError, ResourceError, UsageError
from .evaluation import Images, area_means, check_images

Extractor = Callable[[Images], NDArray[np.float64]]
PIXEL_EXTRACTOR = "blockloom-pixels-8x8"
TOKENIZER_EXTRACTOR = "blockloom-tokenizer-features"
FEATURE_BATCH = 64


class FeatureTokenizer(Protocol):
    """The part of a tokenizer that feature extraction needs."""

    value: str
    grid: tuple[int, int]

    def encode(self, pixels: Tensor) -> Tensor:
        """Turn pixels in [-1, 1] into codes or latents."""
        ...


def pixel_features(images: Images) -> NDArray[np.float64]:
    """Extract 8x8 area means in RGB, the extractor named "blockloom-pixels-8x8".

    Args:
        images: uint8 [items, height, width, 3].

    Returns:
        float64 [items, 192].
    """
    return area_means(images, 8).astype(np.float64)


def tokenizer_features(tokenizer: FeatureTokenizer) -> Extractor:
    """Make an extractor from a tokenizer, named "blockloom-tokenizer-features".

    Features are mean and standard deviation over the token grid, and the means of its four
    quarters, of the latents (for code tokenizers: of the codebook vectors).

    Args:
        tokenizer: A trained tokenizer; code tokenizers must offer `lookup(codes)`.

    Returns:
        Function from uint8 pictures to float64 [items, 6 * channels].

    Raises:
        UsageError: A code tokenizer without codebook vectors.
    """
    has_codes = tokenizer.value == "code"
    lookup: Callable[[Tensor], Tensor] | None = None
    if has_codes:
        lookup = getattr(tokenizer, "lookup", None)
    if has_codes and lookup is None:
        raise UsageError(
            f"{type(tokenizer).__name__} has codes but no lookup(codes); use a latent tokenizer "
            f"or the {PIXEL_EXTRACTOR} extractor"
        )
    height, width = tokenizer.grid

    @torch.no_grad()
    def extract(images: Images) -> NDArray[np.float64]:
        check_images("images", images)
        parts = []
        for start in range(0, len(images), FEATURE_BATCH):
            pixels = torch.from_numpy(images[start : start + FEATURE_BATCH])
            values = tokenizer.encode(rearrange(pixels, "b h w c -> b c h w").float() / 127.5 - 1)
            vectors = values if lookup is None else lookup(values)
            cells = rearrange(vectors.double(), "b (h w) c -> b h w c", h=height, w=width)
            parts.append(_pool_grid(cells))
        return torch.cat(parts).cpu().numpy()

    return extract


def _pool_grid(cells: Tensor) -> Tensor:
    """Concatenate mean, deviation and quarter means of a [batch, height, width, channels] grid."""
    middle = (max(cells.shape[1] // 2, 1), max(cells.shape[2] // 2, 1))
    rows = (slice(None, middle[0]), slice(-middle[0], None))
    columns = (slice(None, middle[1]), slice(-middle[1], None))
    quarters = [cells[:, row, column].mean(dim=(1, 2)) for row in rows for column in columns]
    spread = cells.std(dim=(1, 2), unbiased=False)
    return torch.cat([cells.mean(dim=(1, 2)), spread, *quarters], dim=1)


class _Identity(torch.nn.Module):
    """Let torchmetrics take features where it expects pictures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(
    real: Images, generated: Images, extract: Extractor, extractor: str
) -> dict[str, Any]:
    """Measure the Frechet distance between two sets of pictures under a named extractor.

    Args:
        real: uint8 [items, height, width, 3].
        generated: uint8 [items, height, width, 3].
        extract: Function from pictures to features [items, features].
        extractor: Name of the extractor, stored with the number.

    Returns:
        JSON dictionary: `frechet_distance`, `extractor`, `num_real`, `num_generated`,
        `num_features` and `is_rank_deficient` (fewer pictures than features: biased upwards).

    Raises:
        DataError: Wrong arrays, or fewer than two pictures on a side.
        ResourceError: torchmetrics is not installed.
    """
    check_images("real", real)
    check_images("generated", generated)
    if min(len(real), len(generated)) < 2:
        raise DataError(
            f"a Frechet distance needs at least 2 pictures a side, got {len(real)} real and "
            f"{len(generated)} generated"
        )
    features = [np.asarray(extract(x), np.float64) for x in (real, generated)]
    return frechet_of_features(features[0], features[1], extractor)


def frechet_of_features(
    real: NDArray[np.float64], generated: NDArray[np.float64], extractor: str
) -> dict[str, Any]:
    """Measure the Frechet distance between two sets of feature vectors.

    Args:
        real: [items, features].
        generated: [items, features].
        extractor: Name of what made the features, stored with the number.

    Returns:
        JSON dictionary as from `frechet_distance`.

    Raises:
        DataError: Fewer than two items on a side, or different numbers of features.
        ResourceError: torchmetrics is not installed.
    """
    if min(len(real), len(generated)) < 2 or real.shape[1:] != generated.shape[1:]:
        raise DataError(
            "a Frechet distance needs at least 2 items of equally many features a side, got "
            f"{list(real.shape)} real and {list(generated.shape)} generated"
        )
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError as error:
        raise ResourceError(
            "the Frechet distance needs torchmetrics, which is not installed; "
            "try: pip install torchmetrics"
        ) from error
    num_features = int(real.shape[1])
    metric = FrechetInceptionDistance(feature=_Identity(num_features)).set_dtype(torch.float64)
    metric.update(torch.from_numpy(real), real=True)
    metric.update(torch.from_numpy(generated), real=False)
    return {
        "frechet_distance": max(0.0, float(metric.compute())),
        "extractor": extractor,
        "num_real": len(real),
        "num_generated": len(generated),
        "num_features": num_features,
        "is_rank_deficient": min(len(real), len(generated)) <= num_features,
    }
