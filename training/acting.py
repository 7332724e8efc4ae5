"""Measure a model that acts where it acts: episodes in the real simulator, beside simple players.

Held-out episodes are begun anew from their environment and seed; a player sees frames and the
instruction and says what is done, until the instruction is followed or the environment's own steps
are used up. Everything is seeded, counted and ready for JSON. It knows no model by name.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import DataError, UsageError
from ..core.sampling import item_generator
from ..models.acting import ActingRollout
from ..models.generator import GenerativeModel
from .babyai import NUM_ACTIONS, BabyAISimulator

BATCH = 64
"""Episodes played side by side; changes speed, never outcomes."""
Z95 = 1.959963984540054
Frames = NDArray[np.uint8]


@dataclass(frozen=True)
class Episodes:
    """How episodes are begun anew, and how they began when they were recorded.

    Attributes:
        env: Environment of each.
        seed: Seed of each.
        instruction: What was to be done.
        split: Split of each.
        first: First frames, uint8 [episodes, height, width, 3].
        actions: Counts of the recorded actions of training episodes.
    """

    env: list[str]
    seed: list[int]
    instruction: list[str]
    split: list[str]
    first: Frames
    actions: NDArray[np.int64]

    def chosen(self, split: str, num: int | None, seed: int) -> list[int]:
        """List the episodes of a split, or some of them in an order that a seed gives."""
        found = [i for i, name in enumerate(self.split) if name == split]
        if num is None or num >= len(found):
            return found
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(seed))
        return sorted(found[i] for i in order[:num].tolist())


def read_episodes(path: Path | str) -> Episodes:
    """Read what the simulator needs from a recorded data set.

    Args:
        path: An .npz with `env`, `seed`, `mission`, `split`, `frames`, `actions` and `offsets`.

    Raises:
        DataError: Another kind of file, or one of the arrays is missing.
    """
    needed = ("env", "seed", "mission", "split", "frames", "actions", "offsets")
    try:
        with np.load(path, allow_pickle=False) as file:
            parts = {name: file[name] for name in needed if name in file.files}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{Path(path).name} is no .npz of recorded episodes") from error
    missing = [name for name in needed if name not in parts]
    if missing:
        raise DataError(
            f"{Path(path).name} has no array {missing[0]!r}; episodes are begun anew from "
            f"{', '.join(needed)}"
        )
    is_train = np.repeat(parts["split"] == "train", np.diff(parts["offsets"]))
    done = parts["actions"][is_train].astype(np.int64)
    return Episodes(
        [str(e) for e in parts["env"]],
        [int(s) for s in parts["seed"]],
        [str(m) for m in parts["mission"]],
        [str(s) for s in parts["split"]],
        parts["frames"][parts["offsets"][:-1]],
        np.bincount(done[done >= 0], minlength=NUM_ACTIONS),
    )


class Player(Protocol):
    """Somebody who plays a batch of episodes in step."""

    def begin(self, instructions: Sequence[str], numbers: Sequence[int]) -> None:
        """Begin new episodes; `numbers` are their places in the data set."""
        ...

    def act(self, frames: Frames) -> Sequence[int]:
        """Say what is done in each of the frames."""
        ...

    def keep(self, places: Sequence[int]) -> None:
        """Go on with these episodes of the batch only; the others are over."""
        ...


class RandomPlayer:
    """Draws every action with the same chances."""

    def __init__(self, chances: Sequence[float], seed: int) -> None:
        """Take the chances.

        Args:
            chances: One number of at least 0 per action; they need not add up to 1.
            seed: Of all episodes.
        """
        self._chances, self._seed = torch.tensor(chances, dtype=torch.float64), seed
        self._streams: list[torch.Generator] = []

    def begin(self, instructions: Sequence[str], numbers: Sequence[int]) -> None:
        """Start a random stream per episode."""
        self._streams = [item_generator(self._seed, number) for number in numbers]

    def act(self, frames: Frames) -> Sequence[int]:
        """Draw."""
        return [int(torch.multinomial(self._chances, 1, generator=g)) for g in self._streams]

    def keep(self, places: Sequence[int]) -> None:
        """Drop the streams of episodes that are over."""
        self._streams = [self._streams[place] for place in places]


class ModelPlayer:
    """Lets a model act; it may imagine every next frame before it sees it.

    Attributes:
        imagined: Cells of imagined frames, those that were right, and those in which the frame
            before was right; then the same three counts for whole frames.
    """

    def __init__(
        self, model: GenerativeModel, tokenizer: Any, seed: int, temperature: float | None = None,
        imagines: bool = False,
    ) -> None:  # fmt: skip
        """Bind a model.

        Args:
            model: A model that acts, in eval mode.
            tokenizer: Its tokenizer.
            seed: Of all episodes.
            temperature: 0 = the likeliest action; None = the recipe's.
            imagines: Whether to draw every next frame first.
        """
        self.model, self.tokenizer, self._seed = model, tokenizer, seed
        self._temperature, self._imagines = temperature, imagines
        self.imagined = np.zeros((2, 3), np.int64)
        self._stream: ActingRollout | None = None
        self._before: Tensor | None = None

    def begin(self, instructions: Sequence[str], numbers: Sequence[int]) -> None:
        """Open a stream."""
        generators = [item_generator(self._seed, number) for number in numbers]
        self._before = None
        self._stream = ActingRollout(
            self.model, instructions, generators, temperature=self._temperature
        )

    @torch.no_grad()
    def act(self, frames: Frames) -> Sequence[int]:
        """See the frames, draw what is done."""
        assert self._stream is not None
        pixels = torch.from_numpy(frames.astype(np.float32)) / 127.5 - 1
        clips = rearrange(pixels, "b h w c -> b c 1 h w")
        seen = self.tokenizer.encode(clips.to(self.model.device, self.model.dtype))[:, 0]
        if self._imagines and self._before is not None:
            self._score(self._stream.imagine(), seen, self._before)
        self._before = seen
        self._stream.see(seen)
        return self._stream.act().tolist()

    def keep(self, places: Sequence[int]) -> None:
        """Let the players of episodes that are over leave."""
        assert self._stream is not None and self._before is not None
        index = torch.tensor(places)
        self._stream.keep(index)
        self._before = self._before[index]

    def _score(self, guess: Tensor, seen: Tensor, before: Tensor) -> None:
        for place, right in enumerate((guess == seen, before == seen)):
            self.imagined[0, place + 1] += int(right.sum())
            self.imagined[1, place + 1] += int(right.flatten(1).all(1).sum())
        self.imagined[:, 0] += (seen.numel(), len(seen))


@dataclass
class Played:
    """How episodes ended: followed or not, after how many steps."""

    success: NDArray[np.bool_]
    steps: NDArray[np.int64]


class Room(Protocol):
    """What is acted in: a simulator, one episode at a time.

    Attributes:
        instruction: What is to be done, once an episode has begun.
    """

    instruction: str

    def reset(self, seed: int) -> Frames:
        """Begin an episode; returns its first frame."""
        ...

    def step(self, action: int) -> tuple[Frames, float, bool]:
        """Do something; returns the next frame, the reward and whether the episode is over."""
        ...

    def close(self) -> None:
        """Free what is held."""
        ...


def play(
    numbers: Sequence[int], begin: Callable[[int], tuple[Room, Frames]], player: Player
) -> Played:
    """Play episodes to their end.

    Args:
        numbers: Which episodes; neighbours are played side by side.
        begin: Number of an episode to its room and first frame.
        player: Who plays.

    Returns:
        One outcome per number.
    """
    success, steps = np.zeros(len(numbers), bool), np.zeros(len(numbers), np.int64)
    for first in range(0, len(numbers), BATCH):
        going = list(range(first, min(first + BATCH, len(numbers))))
        rooms: dict[int, Room] = {}
        frames: dict[int, Frames] = {}
        for at in going:
            rooms[at], frames[at] = begin(numbers[at])
        player.begin([rooms[at].instruction for at in going], [numbers[at] for at in going])
        while going:
            actions = player.act(np.stack([frames[at] for at in going]))
            left = []
            for place, at in enumerate(going):
                frames[at], reward, is_over = rooms[at].step(int(actions[place]))
                steps[at] += 1
                success[at] |= reward > 0
                if is_over:
                    rooms[at].close()
                else:
                    left.append(place)
            if left and len(left) < len(going):
                player.keep(left)
            going = [going[place] for place in left]
    return Played(success, steps)


def begin_recorded(episodes: Episodes, number: int) -> tuple[BabyAISimulator, Frames]:
    """Begin a recorded episode anew.

    Raises:
        DataError: The simulator gives another instruction than was recorded.
    """
    room = BabyAISimulator(episodes.env[number])
    frame = room.reset(episodes.seed[number])
    if room.instruction != episodes.instruction[number]:
        raise DataError(
            f"episode {number} was recorded with {episodes.instruction[number]!r}, the simulator "
            f"says {room.instruction!r}; recorded with Minigrid 3.2.0, installed {_minigrid()}"
        )
    return room, frame


def _minigrid() -> str:
    return version("minigrid")


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Compute the 95 % interval of a share of successes.

    Args:
        successes: 0..trials.
        trials: At least 1.

    Returns:
        Lower and upper end, in [0, 1].

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927) 209.
    """
    share, z2 = successes / trials, Z95**2 / trials
    middle = (share + z2 / 2) / (1 + z2)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials)) / (1 + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def rate(played: Played) -> dict[str, Any]:
    """Report how many episodes were followed, JSON-ready."""
    won, total = int(played.success.sum()), len(played.success)
    low, high = wilson(won, total)
    steps = played.steps[played.success]
    return {
        "episodes": total,
        "successes": won,
        "success_rate": round(won / total, 4),
        "wilson_95": [round(low, 4), round(high, 4)],
        "mean_steps_when_successful": round(float(steps.mean()), 2) if won else None,
    }


@torch.no_grad()
def evaluate_acting(
    model: GenerativeModel, tokenizer: Any, data: Path | str, *, num: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Play every held-out split in the simulator.

    Args:
        model: A model that acts by codes, in eval mode.
        tokenizer: Its tokenizer, for frames of 64 x 64 pixels.
        data: See `read_episodes`.
        num: Episodes per split; None = all.
        seed: Of everything drawn and of the choice of episodes.

    Returns:
        JSON-ready numbers: success rates with 95 % intervals of the model (drawn as the recipe
        says, and greedy), and of two random players: all actions alike, and as often as in the
        training episodes; how right imagined frames are, where the model learned any.

    Raises:
        UsageError: A model with other actions or frames than the simulator has.
        DataError: Not recorded episodes, or no held-out split.
    """
    acting = model.recipe.acting
    if acting is None or acting.codes != NUM_ACTIONS:
        got = 0 if acting is None else acting.codes
        raise UsageError(f"acting.codes = {got}; the BabyAI simulator takes {NUM_ACTIONS}")
    if tuple(tokenizer.frame_size) != (64, 64):
        raise UsageError(f"frames of {tokenizer.frame_size}; the BabyAI simulator draws (64, 64)")
    episodes = read_episodes(data)
    splits = [name for name in dict.fromkeys(episodes.split) if name != "train"]
    if not splits:
        raise DataError("every episode is in the training split; eval needs others")
    learned = acting.frame_weight > 0
    report = {}
    for split in sorted(splits):
        numbers = episodes.chosen(split, num, seed)
        drawn = ModelPlayer(model, tokenizer, seed, imagines=learned)
        players: dict[str, Player] = {
            "model": drawn,
            "model_greedy": ModelPlayer(model, tokenizer, seed, temperature=0.0),
            "random": RandomPlayer([1.0] * NUM_ACTIONS, seed),
            "random_as_often_as_in_training": RandomPlayer(episodes.actions.tolist(), seed),
        }
        report[split] = _split_report(episodes, numbers, players)
        if learned:
            report[split]["imagined_frames"] = _imagined(drawn.imagined)
    return {"simulator": f"minigrid {_minigrid()}", "splits": report}


def _split_report(
    episodes: Episodes, numbers: list[int], players: dict[str, Player]
) -> dict[str, Any]:
    # Episodes of one environment are cut off after about as many steps: they are played together.
    numbers = sorted(numbers, key=lambda number: episodes.env[number])
    kinds = np.array([episodes.env[number] for number in numbers])

    def begin(number: int) -> tuple[Room, Frames]:
        return begin_recorded(episodes, number)

    same = sum(np.array_equal(begin(number)[1], episodes.first[number]) for number in numbers)
    result: dict[str, Any] = {"episodes": len(numbers), "first_frames_as_recorded": same}
    for name, player in players.items():
        played = play(numbers, begin, player)
        result[name] = rate(played)
        result[name]["by_environment"] = {
            str(kind): rate(Played(played.success[kinds == kind], played.steps[kinds == kind]))
            for kind in np.unique(kinds)
        }
    return result


def _imagined(counts: NDArray[np.int64]) -> dict[str, Any]:
    """Report how often imagined cells and whole frames were right, beside the frame before."""
    cells, frames = counts.astype(float)
    return {
        "frames": int(frames[0]),
        "cells_right": round(cells[1] / cells[0], 5),
        "cells_right_frame_before": round(cells[2] / cells[0], 5),
        "frames_right": round(frames[1] / frames[0], 4),
        "frames_right_frame_before": round(frames[2] / frames[0], 4),
    }
