"""The loss of tokenizers that no optimiser trains: how far inputs come back from themselves."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


class PlainError:
    """Gives a tokenizer its `loss`: the error of encoding and decoding, with nothing beside it."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]

    def loss(
        self,
        pixels: Float[Tensor, "batch channels *sides"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the mean squared error; nothing is trained.

        Args:
            pixels: Images in [-1, 1], or feature frames.
            generator: Unused; part of the tokenizer protocol.
        """
        error = F.mse_loss(self.decode(self.encode(pixels)), pixels)
        return error, {"mse": float(error.detach())}
