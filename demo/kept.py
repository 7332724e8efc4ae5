"""What is made for visitors, kept for a while: found by its key, let go of when old or too many.

What it does not know: what is made, HTTP, cookies.
"""

import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from ..core.errors import ResourceError
from .answers import Gone

MAX_RUNNING = 2
"""What one visitor may have in the making at once."""


class Made(Protocol):
    """One thing that is made or was made.

    Attributes:
        key: What its visitor names it by.
        visitor: Whose it is.
        used: When it was last touched, in seconds of the clock.
        is_stopped: Whether it should end, or ended early.
        is_over: Whether nothing more will come.
    """

    key: str
    visitor: str
    used: float
    is_stopped: bool
    is_over: bool


M = TypeVar("M", bound=Made)


class Kept(Generic[M]):
    """All of one kind that one server keeps."""

    def __init__(
        self, name: str, most: int, of_one: int, seconds: float, clock: Callable[[], float]
    ) -> None:
        """Keep nothing yet.

        Args:
            name: What one of them is called.
            most: Finished ones in all.
            of_one: Finished ones of one visitor.
            seconds: How long one is kept after it was last touched.
            clock: Seconds that only grow.
        """
        self._name, self._most, self._of_one, self._seconds = name, most, of_one, seconds
        self._clock = clock
        self._all: dict[str, M] = {}
        self._lock = threading.Lock()

    def add(self, made: M) -> M:
        """Keep one more.

        Raises:
            ResourceError: Too many are being made for its visitor.
        """
        with self._lock:
            self._forget()
            running = [m for m in self._all.values() if m.visitor == made.visitor and not m.is_over]
            if not made.is_over and len(running) >= MAX_RUNNING:
                raise ResourceError(f"two {self._name}s of yours are being made; stop one first")
            self._all[made.key] = made
        return made

    def find(self, visitor: str, key: Any) -> M:
        """Find one of a visitor's.

        Raises:
            Gone: It is not there, or somebody else's.
        """
        with self._lock:
            self._forget()
            made = self._all.get(key) if isinstance(key, str) else None
            if made is None or made.visitor != visitor:
                raise Gone(f"this {self._name} is no longer there; make it again")
            made.used = self._clock()
            return made

    def _forget(self) -> None:
        """Let go of what is old, what is too many of one visitor, and what is too many in all."""
        now = self._clock()
        finished = sorted((m for m in self._all.values() if m.is_over), key=lambda m: m.used)
        gone = [made for made in finished if now - made.used > self._seconds]
        for visitor in {made.visitor for made in finished}:
            gone += [made for made in finished if made.visitor == visitor][: -self._of_one]
        gone += finished[: max(0, len(finished) - self._most)]
        for made in gone:
            self._all.pop(made.key, None)
