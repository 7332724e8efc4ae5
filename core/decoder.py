"""What the decode loop asks of a model, and what it tells those who watch it.

The loop is in rollout.py; models/generator.py has the decoder of every recipe. It knows neither
models nor pictures.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .attention import Lowered
from .cache import CacheView, KVCache
from .grouping import PerLayer
from .layout import Layout
from .plan import DecodePlan
from .sampling import TokenStats
from .schedulers.base import Row


class Draw(NamedTuple):
    """Values drawn for the active slots, and how sure the model was (None if it cannot say)."""

    values: Tensor
    stats: TokenStats | None


class Decoder(Protocol):
    """What the loop needs of a model."""

    def new_cache(self, plan: DecodePlan, batch: int) -> KVCache:
        """Allocate a cache for `batch` items."""
        ...

    def forward(
        self, values: Tensor, is_masked: Tensor, layout: Layout, level: Tensor,
        lowered: Lowered | PerLayer, view: CacheView | None,
    ) -> Tensor:  # fmt: skip
        """Run the active rows of every guidance branch; returns hidden states."""
        ...

    def draw(
        self, hidden: Tensor, row: Row, generators: Sequence[torch.Generator], source: Tensor
    ) -> Draw:
        """Sample values for the data slots `source` (heads that need one trunk state)."""
        ...

    def predict(self, hidden: Tensor, row: Row) -> Tensor:
        """Predict velocity or noise from hidden states, guided (heads that run per row)."""
        ...

    @property
    def per_level(self) -> bool:
        """True when the trunk runs again at every noise level."""
        ...

    @property
    def poses(self) -> Tensor | None:
        """Camera pose of every block [batch, blocks, 4, 4], which some masks select by."""
        ...


@dataclass
class Event:
    """One thing that happened: kind row | commit | decoded | done."""

    kind: str
    path: str
    block: int
    of_blocks: int
    data: dict[str, Any] = field(default_factory=dict)
