"""Worlds being played: who steers which one, for how long, and what a step answers.

One thread does all the model's work, so that players share the machine fairly and a session is
never touched twice at once. A world is opened under a key that nobody can guess and that works
only for the visitor who opened it; a world nobody steers for a while is forgotten.

What it does not know: HTTP, browsers or cookies.
"""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..commands import values
from ..core.errors import ResourceError, UsageError
from ..core.messages import explain
from ..pipelines.auto import num_actions
from ..pipelines.world_files import Controls, Starts, read_controls
from . import libraries, world_saves
from .answers import Gone
from .shelf import Shelf

MAX_WORLDS, MAX_OF_ONE = 48, 6
"""Worlds open at once: in all, and of one visitor."""
IDLE_SECONDS = 900.0


@dataclass
class World:
    """One world being played.

    Attributes:
        key: What its player names it by.
        visitor: Whose it is.
        name: The model.
        session: The pipeline's session.
        controls: Its keys.
        shown: Last frame, uint8 [height, width, 3]; None before the first.
        used: When it was last touched, in seconds of the clock.
        is_busy: Whether a step is under way.
    """

    key: str
    visitor: str
    name: str
    session: Any
    controls: Controls
    shown: NDArray[np.uint8] | None
    used: float
    is_busy: bool = False


class Worlds:
    """All worlds of one server."""

    def __init__(self, shelf: Shelf, clock: Callable[[], float] = time.monotonic) -> None:
        """Open none yet.

        Args:
            shelf: The models.
            clock: Seconds that only grow.
        """
        self._shelf, self._clock = shelf, clock
        self._open: dict[str, World] = {}
        self._lock = threading.Lock()

    # -- what is on offer -----------------------------------------------------------------------

    def offers(self) -> list[dict[str, Any]]:
        """Describe the worlds on the shelf from their small files, ready to be written as JSON."""
        found = []
        for name in self._shelf.names_of("world"):
            controls, starts = self.controls(name), self.starts(name)
            found.append(
                {
                    "name": name, "title": controls.title or self._shelf.label(name),
                    "keys": list(controls.keys), "fps": controls.fps,
                    "starts": 0 if starts is None else len(starts),
                }
            )  # fmt: skip
        return found

    def controls(self, name: Any) -> Controls:
        """Return a world's keys."""
        folder = self._shelf.choice(name, "world").folder
        return read_controls(folder, num_actions(folder))

    def starts(self, name: Any) -> Starts | None:
        """Return where a world can start."""
        return self._shelf.starts(name, "world")

    def picture(self, name: Any, start: Any) -> bytes:
        """Return the last frame of a start as PNG.

        Raises:
            UsageError: No such start.
        """
        starts = self.starts(name)
        if starts is None:
            raise UsageError("this world starts from nothing")
        return world_saves.png(starts.frames[_place(start, len(starts)), -1])

    # -- opening and closing ----------------------------------------------------------------------

    def open(self, visitor: str, name: Any, start: Any, seed: Any) -> World:
        """Open a world; the first time this loads its weights.

        Args:
            visitor: Whose it is.
            name: The model.
            start: Number of the start; None or a world without starts begins with nothing.
            seed: Whole number, 0 to 2**64 - 1, also as text.

        Raises:
            UsageError: A start or seed that does not exist.
            ModelError: No such model, or its files are damaged.
            ResourceError: Too many worlds are open.
        """
        chosen = _seed(seed)
        starts = self.starts(name)
        place = None if starts is None or start is None else _place(start, len(starts))
        self._check_room(visitor)
        pipe = self._pipe(name)
        if starts is None or place is None:
            return self._keep(visitor, name, pipe.start(seed=chosen), None)
        frames, actions = starts.frames[place], list(starts.actions[place])
        session = pipe.start(frames, seed=chosen, actions=actions)
        return self._keep(visitor, name, session, frames[-1])

    def find(self, visitor: str, key: Any) -> World:
        """Find a visitor's world.

        Raises:
            Gone: It is not there, or somebody else's.
        """
        self.sweep()
        with self._lock:
            world = self._open.get(key) if isinstance(key, str) else None
            if world is None or world.visitor != visitor:
                raise Gone("this world is no longer there; reset to start again")
            world.used = self._clock()
            return world

    def close(self, visitor: str, key: Any) -> None:
        """Forget a world; one that is gone already is fine."""
        with self._lock:
            world = self._open.get(key) if isinstance(key, str) else None
            if world is not None and world.visitor == visitor:
                del self._open[world.key]

    def sweep(self) -> int:
        """Forget worlds that nobody steered for a while; returns how many stay."""
        now = self._clock()
        with self._lock:
            self._open = {k: w for k, w in self._open.items() if now - w.used < IDLE_SECONDS}
            return len(self._open)

    # -- playing ----------------------------------------------------------------------------------

    def step(self, world: World, pressed: Sequence[str]) -> NDArray[np.uint8]:
        """Let a world take its next step.

        Args:
            world: From `find`.
            pressed: Names of the keys held down.

        Returns:
            The new frames, uint8 [frames, height, width, 3].
        """
        frames: NDArray[np.uint8] = world.session.step(world.controls.action(pressed))
        world.shown, world.used = frames[-1], self._clock()
        return frames

    def fork(self, world: World) -> World:
        """Open a second world that goes on from the same moment.

        Raises:
            ResourceError: Too many worlds are open.
        """
        self._check_room(world.visitor)
        return self._keep(world.visitor, world.name, world.session.fork(), world.shown)

    def save(self, world: World) -> bytes:
        """Write a world to a session file, with the frame that was shown last.

        Raises:
            ResourceError: It is larger than what could be loaded again.
        """
        return world_saves.write(world.session, world.shown)

    def load(self, visitor: str, name: Any, path: Path) -> World:
        """Go on with a world from a session file.

        Args:
            visitor: Whose it will be.
            name: The model it was played on.
            path: The file; it may hold anything.

        Raises:
            DataError: Not a session of this model.
            ModelError: No such model.
            ResourceError: Too many worlds are open.
        """
        self._check_room(visitor)
        pipe = self._pipe(name)
        session, shown = world_saves.read(pipe, path)
        return self._keep(visitor, name, session, shown)

    def _pipe(self, name: Any) -> Any:
        libraries.load()
        from ..pipelines.world import WorldPipeline

        pipe = self._shelf.pipe(name, "world")
        return (
            pipe if isinstance(pipe, WorldPipeline) else WorldPipeline(pipe.tokenizer, pipe.model)
        )

    def _check_room(self, visitor: str) -> None:
        total = self.sweep()
        with self._lock:
            mine = sum(world.visitor == visitor for world in self._open.values())
        if mine >= MAX_OF_ONE:
            raise ResourceError(
                explain("too many worlds of yours are open", allowed=f"{MAX_OF_ONE}",
                        hint="close one of them")
            )  # fmt: skip
        if total >= MAX_WORLDS:
            raise ResourceError("too many worlds are being played here; try again in a while")

    def _keep(self, visitor: str, name: str, session: Any, shown: Any) -> World:
        key = secrets.token_urlsafe(24)
        world = World(key, visitor, name, session, self.controls(name), shown, self._clock())
        with self._lock:
            self._open[key] = world
        return world


def _place(start: Any, count: int) -> int:
    if type(start) is int and 0 <= start < count:
        return start
    try:
        return values.whole("start", 0, count - 1)(str(start)[:20])
    except values.FlagError as error:
        raise UsageError(str(error)) from None


def _seed(given: Any) -> int:
    try:
        return values.whole("seed", 0, values.MAX_SEED)(str(given)[:30].strip())
    except values.FlagError as error:
        raise UsageError(str(error)) from None
