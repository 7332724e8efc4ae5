"""A tiny world to act in, made on the spot: a grid, coloured goals, an instruction, an expert.

An agent (white) goes up, down, left or right on a grid of square cells; the instruction names the
colour of the goal. The expert walks straight there, rows first. Learning checks of models that act
need neither a download nor a simulator. It does not know models.

Invariant: a seed gives the same room, instruction and pixels everywhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import check_count
from .clips import NO_ACTION, ClipDataset

COLORS = {
    "red": (255, 0, 0), "green": (0, 255, 0), "yellow": (255, 255, 0), "blue": (0, 0, 255),
}  # fmt: skip
AGENT = (255, 255, 255)
MOVES = ((-1, 0), (1, 0), (0, -1), (0, 1))
MOVE_NAMES = ("up", "down", "left", "right")
GOALS = 2
"""Coloured cells of a room."""
SIDE, CELL = 3, 2
"""Cells of a side, and pixels of a cell."""
MAX_STEPS = 8
"""Steps until an episode is cut off; the longest way has four."""
HELD_OUT = 7
"""One in so many pairs of a colour and a place is never asked for in training."""


@dataclass
class GridWorld:
    """One room; satisfies the same protocol as a simulator.

    Attributes:
        instruction: What is to be done.
        max_steps: Steps until the episode is cut off.
    """

    instruction: str = ""
    max_steps: int = MAX_STEPS

    def reset(self, seed: int) -> NDArray[np.uint8]:
        """Begin an episode.

        Args:
            seed: Of the room and its instruction.

        Returns:
            The first frame, uint8 [6, 6, 3].
        """
        rng = np.random.default_rng(seed)
        places = rng.permutation(SIDE * SIDE)[: GOALS + 1]
        cells = [(int(place) // SIDE, int(place) % SIDE) for place in places]
        self._agent, *goals = cells
        colors = [list(COLORS)[i] for i in rng.permutation(len(COLORS))[:GOALS]]
        self._goals = dict(zip(colors, goals, strict=True))
        self._wanted, self._steps = colors[0], 0
        self.instruction = f"go to the {self._wanted} cell"
        return self._frame()

    @property
    def is_held_out(self) -> bool:
        """Whether the goal, a colour at a place, is one that is never asked for in training."""
        row, column = self._goals[self._wanted]
        pair = list(COLORS).index(self._wanted) * SIDE * SIDE + row * SIDE + column
        return pair % HELD_OUT == 0

    @property
    def place(self) -> int:
        """Number of the cell the agent stands in."""
        return self._agent[0] * SIDE + self._agent[1]

    def expert(self) -> int:
        """Return what the expert does: rows first, then columns."""
        row, column = (g - a for g, a in zip(self._goals[self._wanted], self._agent, strict=True))
        return (1 if row > 0 else 0) if row else (3 if column > 0 else 2)

    def step(self, action: int) -> tuple[NDArray[np.uint8], float, bool]:
        """Go one cell; walls hold the agent back.

        Args:
            action: 0..3, see `MOVE_NAMES`.

        Returns:
            The next frame, the reward (1 at the goal), and whether the episode is over: at the
            goal, or after `max_steps`. Other coloured cells are walked over.
        """
        step, here = MOVES[action], self._agent
        row, column = (min(max(a + s, 0), SIDE - 1) for a, s in zip(here, step, strict=True))
        self._agent = (row, column)
        self._steps += 1
        is_right = self._goals[self._wanted] == self._agent
        is_over = is_right or self._steps >= self.max_steps
        return self._frame(), float(is_right), is_over

    def close(self) -> None:
        """Nothing is held."""

    def _frame(self) -> NDArray[np.uint8]:
        cells = np.zeros((SIDE, SIDE, 3), np.uint8)
        for color, cell in self._goals.items():
            cells[cell] = COLORS[color]
        cells[self._agent] = AGENT
        return cells.repeat(CELL, 0).repeat(CELL, 1)


def grid_episodes(train: int, held_out: int, seed: int) -> tuple[ClipDataset, list[int]]:
    """Record the expert.

    Args:
        train: Training episodes, none of whose goals is held out.
        held_out: Episodes whose goals are.
        seed: Of the first room; further ones count up.

    Returns:
        Clips with actions, split "train" or "held_out", and the seed of every clip.
    """
    check_count("train", train)
    check_count("held_out", held_out)
    wanted = {"train": train, "held_out": held_out}
    frames: list[NDArray[np.uint8]] = []
    actions: list[int] = []
    lengths, captions, splits, seeds = [0], [], [], []
    room, number = GridWorld(), seed * 1_000_003
    while any(wanted.values()):
        number += 1
        first = room.reset(number)
        split = "held_out" if room.is_held_out else "train"
        if not wanted[split]:
            continue
        wanted[split] -= 1
        frames.append(first)
        is_over = False
        while not is_over:
            actions.append(room.expert())
            frame, _, is_over = room.step(actions[-1])
            frames.append(frame)
        actions.append(NO_ACTION)
        lengths.append(len(frames))
        captions.append(room.instruction)
        splits.append(split)
        seeds.append(number)
    clips = ClipDataset(
        np.stack(frames), np.array(lengths, np.int64), captions, splits,
        actions=np.array(actions, np.int64), action_names=MOVE_NAMES,
    )  # fmt: skip
    return clips, seeds
