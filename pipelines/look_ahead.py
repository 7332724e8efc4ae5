"""Speculative frames: a world dreams on while nobody has decided yet, and takes it back if wrong.

`LookAhead` holds frames dreamt under the guess that what was done last goes on, and a snapshot of
the session from before each. A step that guessed right hands its frame out at once; one that did
not goes back to its snapshot, so the frames are those of a session that never guessed, bit for bit.

It knows neither models nor tokenizers; the session steps.

Source: speculative generation of Next-Frame Diffusion (arXiv:2506.01380), section 3.4. Differs:
frames are dreamt while the player decides, not in one batch with the frame that was asked for.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

State = dict[str, Tensor]


@dataclass(frozen=True)
class _Guess:
    """A frame that nobody asked for yet, and the state a step would have found instead."""

    action: Any
    frames: np.ndarray
    before: State


def same_action(one: Any, other: Any) -> bool:
    """Tell whether two actions, as a player gives them, are the same (None = nothing is done)."""
    if one is None or other is None:
        return one is other
    return np.array_equal(np.asarray(one), np.asarray(other))


class LookAhead:
    """Frames ahead of what was asked for, in order.

    Attributes:
        hits: Steps that found their frame.
        misses: Steps that had to take guesses back.
    """

    def __init__(self) -> None:
        """Start without guesses."""
        self._guesses: deque[_Guess] = deque()
        self.hits = self.misses = 0

    def __len__(self) -> int:
        """Return the number of steps dreamt ahead."""
        return len(self._guesses)

    def dream(
        self, action: Any, count: int, step: Callable[[Any], np.ndarray],
        snapshot: Callable[[], State],
    ) -> None:  # fmt: skip
        """Dream until `count` steps lie ahead.

        Args:
            action: What is guessed to go on.
            count: Steps ahead wanted, those that are there already included.
            step: Steps the session.
            snapshot: Returns its state.
        """
        while len(self._guesses) < count:
            before = snapshot()
            self._guesses.append(_Guess(action, step(action), before))

    def take(self, action: Any, restore: Callable[[State], None]) -> np.ndarray | None:
        """Hand out the frames of a step if they were guessed right, else take all guesses back.

        Args:
            action: What is really done.
            restore: Puts the session back into a state.

        Returns:
            The frames, or None when the session has to step.
        """
        if not self._guesses:
            return None
        if same_action(action, self._guesses[0].action):
            self.hits += 1
            return self._guesses.popleft().frames
        self.misses += 1
        self.drop(restore)
        return None

    def drop(self, restore: Callable[[State], None]) -> None:
        """Take back whatever nobody asked for."""
        if self._guesses:
            restore(self._guesses[0].before)
            self._guesses.clear()
