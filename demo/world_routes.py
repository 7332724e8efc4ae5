"""The addresses a page plays worlds through: small requests and raw frames instead of page events.

A frame goes out as its plain bytes with one header that says what they are, because a page event
per frame would cost more than most worlds. Foreign pages and hosts are refused by the gate in
front; who is not logged in is refused here.
"""

import asyncio
import json
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..core.errors import UsageError
from ..core.messages import explain
from .answers import Busy, asked_for, guarded, visitor_who_asks
from .world_saves import MAX_SESSION_BYTES
from .worlds import IDLE_SECONDS, World, Worlds

PREFIX = "/world/"
LARGE = {PREFIX + "load": MAX_SESSION_BYTES}
"""Addresses that take more than the gate's usual number of bytes."""
ABOUT = "x-world"
MAX_WAITING, MAX_LOADING = 64, 4
_MAX_PRESSED = 16

Answer = TypeVar("Answer")


class WorldRoutes:
    """The handlers; one set per server."""

    def __init__(self, worlds: Worlds) -> None:
        """Make handlers over a server's worlds."""
        self._worlds = worlds
        # One thread: torch keeps a pool of its own for every thread that ever computed.
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="worlds")
        self._waiting = self._loading = 0
        self._is_sweeping = False

    def routes(self) -> list[Route]:
        """List the routes for the server."""
        posts = {"new": self.new, "step": self.step, "fork": self.fork, "save": self.save,
                 "load": self.load, "close": self.close}  # fmt: skip
        found = [Route(PREFIX + n, guarded(f), methods=["POST"]) for n, f in posts.items()]
        return [Route(PREFIX + "start", guarded(self.start)), *found]

    async def start(self, request: Request) -> Response:
        """Answer a start's last frame as PNG."""
        query = request.query_params
        content = self._worlds.picture(query.get("model"), query.get("start", "0"))
        return Response(content, media_type="image/png")

    async def new(self, request: Request) -> Response:
        """Open a world: `model`, `start` (a number or null), `seed`."""
        asked, visitor = await asked_for(request), visitor_who_asks(request)
        model, start, seed = asked.get("model"), asked.get("start"), asked.get("seed", 0)
        world = await self._work(lambda: self._worlds.open(visitor, model, start, seed))
        self._sweep_later()
        return _frames(world, None)

    async def step(self, request: Request) -> Response:
        """Take a step: `key`, and `keys`, the names of the keys held down."""
        asked = await asked_for(request)
        pressed = asked.get("keys", [])
        is_list = isinstance(pressed, list) and len(pressed) <= _MAX_PRESSED
        if not is_list or not all(isinstance(name, str) for name in pressed):
            raise UsageError(explain("keys", allowed=f"at most {_MAX_PRESSED} names of keys"))
        world = self._worlds.find(visitor_who_asks(request), asked.get("key"))
        if world.is_busy:
            raise Busy("one step at a time")
        world.is_busy = True
        try:
            frames = await self._work(lambda: self._worlds.step(world, pressed))
        finally:
            world.is_busy = False
        return _frames(world, frames)

    async def fork(self, request: Request) -> Response:
        """Open a second world that goes on from here: `key`."""
        asked = await asked_for(request)
        world = self._worlds.find(visitor_who_asks(request), asked.get("key"))
        return _frames(await self._work(lambda: self._worlds.fork(world)), None)

    async def save(self, request: Request) -> Response:
        """Answer a session file: `key`."""
        asked = await asked_for(request)
        world = self._worlds.find(visitor_who_asks(request), asked.get("key"))
        content = await self._work(lambda: self._worlds.save(world))
        return Response(content, media_type="application/octet-stream")

    async def load(self, request: Request) -> Response:
        """Go on from a session file, which is the body; `model` stands in the address."""
        model, visitor = request.query_params.get("model"), visitor_who_asks(request)
        if self._loading >= MAX_LOADING:
            raise Busy("others are loading; try again in a moment")
        self._loading += 1
        try:
            with tempfile.TemporaryDirectory(prefix="blockloom-world-") as folder:
                path = Path(folder) / "session.safetensors"
                with path.open("wb") as file:
                    async for chunk in request.stream():
                        file.write(chunk)
                world = await self._work(lambda: self._worlds.load(visitor, model, path))
        finally:
            self._loading -= 1
        self._sweep_later()
        return _frames(world, None)

    async def close(self, request: Request) -> Response:
        """Forget a world: `key`."""
        asked = await asked_for(request)
        self._worlds.close(visitor_who_asks(request), asked.get("key"))
        return JSONResponse({"closed": True})

    async def _work(self, job: Callable[[], Answer]) -> Answer:
        """Run a job of the model's thread and wait for it."""
        if self._waiting >= MAX_WAITING:
            raise Busy("too many people are playing here; try again in a moment")
        self._waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._worker, job)
        finally:
            self._waiting -= 1

    def _sweep_later(self) -> None:
        """Forget idle worlds also when nobody asks for anything any more."""
        if not self._is_sweeping:
            self._is_sweeping = True
            asyncio.get_running_loop().call_later(IDLE_SECONDS / 4, self._sweep)

    def _sweep(self) -> None:
        self._is_sweeping = False
        if self._worlds.sweep():
            self._sweep_later()


def _frames(world: World, frames: "np.ndarray | None") -> Response:
    """Write frames as bytes: red, green, blue, row by row, frame by frame.

    Args:
        world: Where they come from.
        frames: New ones, or None for the one that is shown already, if any.
    """
    if frames is None and world.shown is not None:
        frames = world.shown[None]
    if frames is None:
        frames = np.zeros((0, 0, 0, 3), dtype=np.uint8)
    count, height, width, _ = frames.shape
    about = {"key": world.key, "frames": count, "height": height, "width": width,
             "at": world.session.num_frames}  # fmt: skip
    content = np.ascontiguousarray(frames).tobytes()
    kind = "application/octet-stream"
    return Response(content, media_type=kind, headers={ABOUT: json.dumps(about)})
