"""Models as movers of arms: what is seen goes in, what is drawn is done.

`StreamMover` lets a model with actions among its tokens act at every step; `ChunkMover` lets a
model of torque codes draw a chunk at a time, told what is observed before it. It trains nothing.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.sampling import item_generator
from ..models.acting import ActingRollout
from ..models.generator import GenerativeModel
from ..models.live import LiveRollout
from .reaching import NUM_TORQUES, Arms, Observed


def _generators(seed: int, arms: Arms) -> list[torch.Generator]:
    return [item_generator(seed, number) for number in range(len(arms.instructions))]


class StreamMover:
    """Lets a model that acts move; it may imagine every observation before it is made.

    Attributes:
        imagined: Number of imagined observations, and the sums of squared errors of these and of
            the observation before kept in their place, standardised and averaged over features.
    """

    def __init__(
        self, model: GenerativeModel, tokenizer: Any, seed: int, imagines: bool = False
    ) -> None:
        """Bind a model.

        Args:
            model: A model that acts by numbers, in eval mode.
            tokenizer: Its tokenizer of observations.
            seed: Of all that is drawn.
            imagines: Whether to draw every next observation first; what is then observed replaces
                it.
        """
        self.model, self.tokenizer, self._seed, self._imagines = model, tokenizer, seed, imagines
        self.imagined = np.zeros(3)

    def begin(self, arms: Arms) -> None:
        """Open a stream."""
        generators = _generators(self._seed, arms)
        self._stream = ActingRollout(self.model, arms.instructions, generators)
        self._before: Tensor | None = None

    @torch.no_grad()
    def act(self, observed: Observed) -> NDArray[np.floating]:
        """See the observations, draw torques."""
        rows = torch.from_numpy(observed)[..., None].to(self.model.device, self.model.dtype)
        seen = self.tokenizer.encode(rows)[:, 0]
        if self._imagines and self._before is not None:
            guess = self._stream.imagine()
            errors = [float((g - seen).square().mean(-1).sum()) for g in (guess, self._before)]
            self.imagined += (len(seen), *errors)
        self._before = seen
        self._stream.see(seen)
        return self._stream.act().float().cpu().numpy()


class ChunkMover:
    """Lets a model of torque codes move, a chunk at a time."""

    def __init__(self, model: GenerativeModel, tokenizer: Any, seed: int) -> None:
        """Bind a model.

        Args:
            model: A model of codes that is told observations, in eval mode.
            tokenizer: Its tokenizer of torques.
            seed: Of all that is drawn.
        """
        self.model, self.tokenizer, self._seed = model, tokenizer, seed

    @torch.no_grad()
    def begin(self, arms: Arms) -> None:
        """Open a stream with a chunk of rest."""
        self._live = LiveRollout(self.model, arms.instructions, _generators(self._seed, arms))
        count, size = len(arms.instructions), self.tokenizer.step_frames
        rest = torch.zeros(count, NUM_TORQUES, size, device=self.model.device)
        codes = self.tokenizer.encode(rest)
        width = self.model.recipe.condition.actions
        self._live.observe(codes[:, 0], torch.zeros(count, 1, width, device=self.model.device))
        self._state = self.tokenizer.decode_chunk(codes)[1]
        self._queue: list[NDArray[np.floating]] = []

    @torch.no_grad()
    def act(self, observed: Observed) -> NDArray[np.floating]:
        """Return the next torques; where a chunk is used up, draw another."""
        if not self._queue:
            told = torch.from_numpy(observed)[:, None].to(self.model.device, self.model.dtype)
            codes = self._live.step(told)[:, None]
            torques, self._state = self.tokenizer.decode_chunk(codes, self._state)
            self._queue = list(torques.float().cpu().numpy().transpose(2, 0, 1))
        return self._queue.pop(0)
