"""One long answer that carries something as it is made: messages one behind the other.

A message is a letter, its length (4 bytes, big end first) and its content; `J` says what happens
as JSON, other letters carry bytes. What is made is made in one thread, in the order it was asked
for. It knows neither models nor what is made.
"""

import asyncio
import json
import logging
import secrets
import struct
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from ..core.errors import BlockloomError
from .answers import Busy
from .kept import Made

log = logging.getLogger(__name__)
SECONDS_BETWEEN_ROWS = 0.2
T = TypeVar("T")


class Streams:
    """What is being made for one kind of route, and who waits."""

    def __init__(self, name: str, most: int) -> None:
        """Start with nothing to make.

        Args:
            name: Of what is made, in the plural.
            most: How many may wait or run at once.
        """
        self.worker = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._name, self._most, self._waiting = name, most, 0

    def check_room(self) -> None:
        """Refuse when too many wait.

        Raises:
            Busy: They do.
        """
        if self._waiting >= self._most:
            raise Busy(f"too many {self._name} are waiting; try again in a moment")

    async def messages(
        self, made: Made, make: Callable[[], Iterator[bytes]]
    ) -> AsyncIterator[bytes]:
        """Make something in the worker and pass on what comes; whoever leaves stops it.

        Args:
            made: What is made.
            make: Gives its messages, called in the worker when its turn has come.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()

        def put(message: bytes | None) -> None:
            with suppress(RuntimeError):  # the server is closing
                loop.call_soon_threadsafe(queue.put_nowait, message)

        def work() -> None:
            try:
                for message in make():
                    put(message)
            finally:
                put(None)

        self._waiting += 1
        try:
            # Begun before the first word goes out, so that whoever leaves then leaves nothing half.
            loop.run_in_executor(self.worker, work)
            yield told(kind="waiting", key=made.key, ahead=self._waiting - 1)
            while (message := await queue.get()) is not None:
                yield message
        finally:
            self._waiting -= 1
            made.is_stopped = made.is_stopped or not made.is_over


def safely(messages: Iterator[bytes]) -> Iterator[bytes]:
    """Pass messages on; an error becomes the last one, in one line."""
    try:
        yield from messages
    except BlockloomError as error:
        yield told(kind="failed", line=error.message)
    except Exception as error:  # whatever it is, the visitor gets a number and not a traceback
        number = secrets.token_hex(4)
        log.warning("error %s", number, exc_info=error)
        yield told(kind="failed", line=f"something broke here (error {number})")


def thinned(events: Iterator[T]) -> Iterator[T]:
    """Pass on what is made, but of `row` events only one every fifth of a second."""
    seen = 0.0
    for event in events:
        if isinstance(event, dict) and event["kind"] == "row":
            now = time.monotonic()
            if now - seen < SECONDS_BETWEEN_ROWS:
                continue
            seen = now
        yield event


def told(**what: Any) -> bytes:
    """Write a message that says what happens."""
    return message(b"J", json.dumps(what).encode())


def message(kind: bytes, content: bytes) -> bytes:
    """Write a message.

    Args:
        kind: One letter.
        content: Less than 4 GiB.
    """
    return kind + struct.pack(">I", len(content)) + content
