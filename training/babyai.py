"""The BabyAI simulator, drawn as the recorded data set is: 64 x 64 pixels, eight to a cell.

Rooms of Minigrid 3.2.0 (arXiv:2306.13831; BabyAI: arXiv:1810.08272), seen whole and from above.
Optional: it is imported where a simulator is made. It knows neither models nor data sets.

Invariant: an environment and a seed give the same episode as when it was recorded, pixel by pixel.
"""

import contextlib
import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.errors import UsageError
from ..core.messages import explain

FRAME_SIZE = 64
DRAWN_CELL = 16
"""Pixels of a cell as Minigrid draws it, before frames are halved (Lanczos)."""
NUM_ACTIONS = 7


class BabyAISimulator:
    """One episode after another in one environment."""

    def __init__(self, name: str) -> None:
        """Make the environment.

        Args:
            name: For instance "BabyAI-GoToLocal-v0".

        Raises:
            UsageError: Minigrid is not installed, or has no such environment.
        """
        try:
            import gymnasium
            import minigrid  # noqa: F401  registers its environments
        except ImportError:
            raise UsageError(
                explain(
                    "the BabyAI simulator is not installed", hint="pip install blockloom[babyai]"
                )
            ) from None
        try:
            made = gymnasium.make(name, disable_env_checker=True)
        except gymnasium.error.Error:
            raise UsageError(explain("unknown simulator", got=name)) from None
        self._env: Any = made.unwrapped
        self.instruction, self.max_steps = "", 0

    def reset(self, seed: int) -> NDArray[np.uint8]:
        """Begin an episode.

        Args:
            seed: Seed of the room and the instruction.

        Returns:
            The first frame, uint8 [64, 64, 3]; `instruction` and `max_steps` are the episode's.
        """
        with contextlib.redirect_stdout(io.StringIO()):  # rooms thrown away are announced
            seen, _ = self._env.reset(seed=seed)
        self.instruction, self.max_steps = seen["mission"], int(self._env.max_steps)
        return self._frame()

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool]:
        """Do something.

        Args:
            action: 0..6: turn left, turn right, forward, pick up, drop, toggle, done.

        Returns:
            The next frame, the reward (above 0 = the instruction was followed), and whether the
            episode is over, because of that or because its steps are used up.

        Raises:
            UsageError: An action outside 0..6.
        """
        if not 0 <= action < NUM_ACTIONS:
            raise UsageError(explain("action", got=action, allowed=f"0 to {NUM_ACTIONS - 1}"))
        _, reward, ended, cut, _ = self._env.step(action)
        return self._frame(), float(reward), bool(ended or cut)

    def close(self) -> None:
        """Free what the environment holds."""
        self._env.close()

    def _frame(self) -> NDArray[np.uint8]:
        drawn = self._env.get_frame(highlight=False, tile_size=DRAWN_CELL, agent_pov=False)
        small = Image.fromarray(drawn).resize((FRAME_SIZE, FRAME_SIZE), Image.Resampling.LANCZOS)
        return np.asarray(small)
