"""The addresses a page makes motions through: one long answer that carries poses as they are made.

The answer is a row of messages (`streams.py`): `J` what happens as JSON, `F` joints of the next
frames as float32, little end first, [frames, joints, 3] in metres. It knows neither models nor
what is asked for.
"""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..core.errors import UsageError
from ..core.messages import explain
from .answers import asked_for, guarded, visitor_who_asks
from .motion_files import MAX_UPLOAD, MEDIA
from .motions import Motions, Take
from .streams import Streams, message, safely, thinned, told

PREFIX = "/motion/"
LARGE = {PREFIX + "open": MAX_UPLOAD}
"""Addresses that take more than the gate's usual number of bytes."""
MAX_WAITING = 16
_MAX_ASKED = 2**15


class MotionRoutes:
    """The handlers; one set per server."""

    def __init__(self, motions: Motions) -> None:
        """Make handlers over a server's motions."""
        self._motions = motions
        self._streams = Streams("motions", MAX_WAITING)
        # Files are drawn and read beside the model's work: a long MP4 must not stop a stream.
        self._files = ThreadPoolExecutor(1, thread_name_prefix="motion-files")

    def routes(self) -> list[Route]:
        """List the routes for the server."""
        posts = {"new": self.new, "stop": self.stop, "file": self.file, "open": self.open}
        return [Route(PREFIX + n, guarded(f), methods=["POST"]) for n, f in posts.items()]

    async def new(self, request: Request) -> Response:
        """Make or change a motion: see `Motions.order`."""
        asked = await asked_for(request, _MAX_ASKED)
        self._streams.check_room()
        return self._streamed(self._motions.order(visitor_who_asks(request), asked))

    async def open(self, request: Request) -> Response:
        """Take in a BVH file, the body of the request: `model` stands in the address."""
        content = await request.body()
        if len(content) > MAX_UPLOAD:
            raise UsageError(explain("this file is too large", allowed=f"{MAX_UPLOAD} bytes"))
        self._streams.check_room()
        loop, name = asyncio.get_running_loop(), request.query_params.get("model")
        take_in = partial(self._motions.open, visitor_who_asks(request), name, content)
        return self._streamed(await loop.run_in_executor(self._files, take_in))

    def _streamed(self, take: Take) -> Response:
        made = self._streams.messages(take, partial(messages, self._motions, take))
        return StreamingResponse(made, media_type="application/octet-stream")

    async def stop(self, request: Request) -> Response:
        """Stop a motion: `key`; what is there stays."""
        asked = await asked_for(request)
        self._motions.find(visitor_who_asks(request), asked.get("key")).is_stopped = True
        return JSONResponse({"stopped": True})

    async def file(self, request: Request) -> Response:
        """Answer a motion as a file with its record: `key`, `form`."""
        asked = await asked_for(request)
        take = self._motions.find(visitor_who_asks(request), asked.get("key"))
        loop, form = asyncio.get_running_loop(), asked.get("form")
        content = await loop.run_in_executor(self._files, self._motions.file, take, form)
        return Response(content, media_type=MEDIA[str(form)])


def messages(motions: Motions, take: Take) -> Iterator[bytes]:
    """Make a motion and write what happens as messages; an error is the last one.

    Args:
        motions: Makes it.
        take: What to make.
    """
    yield from safely(_written(motions, take))


def _written(motions: Motions, take: Take) -> Iterator[bytes]:
    for part in thinned(motions.make(take)):
        if isinstance(part, np.ndarray):
            yield message(b"F", np.ascontiguousarray(part, dtype="<f4").tobytes())
        else:
            yield told(**part)
