"""The addresses a page makes videos through: one long answer that carries a video as it is made.

The answer is a row of messages, each a letter, its length (4 bytes, big end first) and its content:
`J` what happens as JSON, `M` the next bytes of a fragmented MP4, `F` frames as plain bytes for
browsers that play no such file. It knows neither models nor what is asked for.
"""

import asyncio
import json
import logging
import secrets
import struct
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..core.errors import BlockloomError
from .answers import Busy, asked_for, guarded, visitor_who_asks
from .videos import Film, Videos

log = logging.getLogger(__name__)
PREFIX = "/video/"
FORMS = ("h264", "vp9", "frames")
MAX_WAITING = 16
_MAX_ASKED = 2**20 + 2**14
_SECONDS_BETWEEN_ROWS = 0.2


class VideoRoutes:
    """The handlers; one set per server."""

    def __init__(self, videos: Videos) -> None:
        """Make handlers over a server's videos."""
        self._videos = videos
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="videos")
        self._waiting = 0

    def routes(self) -> list[Route]:
        """List the routes for the server."""
        posts = {"new": self.new, "stop": self.stop, "file": self.file}
        found = [Route(PREFIX + n, guarded(f), methods=["POST"]) for n, f in posts.items()]
        return [Route(PREFIX + "start", guarded(self.start)), *found]

    async def start(self, request: Request) -> Response:
        """Answer a frame that comes with a model as PNG."""
        query = request.query_params
        content = self._videos.picture(query.get("model"), query.get("start", "0"))
        return Response(content, media_type="image/png")

    async def new(self, request: Request) -> Response:
        """Make a video: see `Videos.order`; `form` says what the browser plays."""
        asked = await asked_for(request, _MAX_ASKED)
        if self._waiting >= MAX_WAITING:
            raise Busy("too many videos are waiting; try again in a moment")
        form = asked.get("form")
        film = self._videos.order(visitor_who_asks(request), asked)
        form = form if form in FORMS else "frames"
        return StreamingResponse(self._messages(film, form), media_type="application/octet-stream")

    async def stop(self, request: Request) -> Response:
        """Stop a video: `key`; what is there stays."""
        asked = await asked_for(request)
        self._videos.find(visitor_who_asks(request), asked.get("key")).is_stopped = True
        return JSONResponse({"stopped": True})

    async def file(self, request: Request) -> Response:
        """Answer a video as MP4 with its record: `key`."""
        asked = await asked_for(request)
        film = self._videos.find(visitor_who_asks(request), asked.get("key"))
        loop = asyncio.get_running_loop()
        content = await loop.run_in_executor(self._worker, self._videos.file, film)
        return Response(content, media_type="video/mp4")

    async def _messages(self, film: Film, form: str) -> AsyncIterator[bytes]:
        """Make a video in the worker and pass on what comes; whoever leaves stops it."""
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[bytes | None] = asyncio.Queue()

        def put(message: bytes | None) -> None:
            with suppress(RuntimeError):  # the server is closing
                loop.call_soon_threadsafe(queue.put_nowait, message)

        def work() -> None:
            try:
                for message in messages(self._videos, film, form):
                    put(message)
            finally:
                put(None)

        self._waiting += 1
        try:
            yield _told(kind="waiting", key=film.key, ahead=self._waiting - 1)
            loop.run_in_executor(self._worker, work)
            while (message := await queue.get()) is not None:
                yield message
        finally:
            self._waiting -= 1
            film.is_stopped = film.is_stopped or not film.is_over


def messages(videos: Videos, film: Film, form: str) -> Iterator[bytes]:
    """Make a video and write what happens as messages; an error is the last one.

    Args:
        videos: Makes it.
        film: What to make.
        form: h264, vp9 or frames.
    """
    writer, seen = None, 0.0
    try:
        for part in videos.make(film):
            if isinstance(part, np.ndarray):
                if writer is None:
                    yield _message(b"F", np.ascontiguousarray(part).tobytes())
                    continue
                content = writer.add(part)
                if writer.num_fragments == 1:
                    yield _told(kind="mime", mime=writer.mime)
                yield _message(b"M", content)
            elif part["kind"] == "row":
                now = time.monotonic()
                if now - seen > _SECONDS_BETWEEN_ROWS:
                    seen = now
                    yield _told(**part)
            else:
                if part["kind"] == "about":
                    writer = _writer(film, form)
                    part = part | {"form": "mp4" if writer else "frames"}
                yield _told(**part)
    except BlockloomError as error:
        yield _told(kind="failed", line=error.message)
    except Exception as error:  # whatever it is, the visitor gets a number and not a traceback
        number = secrets.token_hex(4)
        log.warning("error %s", number, exc_info=error)
        yield _told(kind="failed", line=f"something broke here (error {number})")


def _writer(film: Film, form: str) -> Any:
    """Open what turns blocks into MP4; None where frames go out plain."""
    from ..pipelines.video_stream import FragmentedWriter

    if form == "frames":
        return None
    try:
        return FragmentedWriter(
            fps=film.params.fps or 8.0, codec=form, scale=film.params.scale, pad=True
        )
    except BlockloomError:  # no PyAV here, or not this codec
        return None


def _told(**what: Any) -> bytes:
    return _message(b"J", json.dumps(what).encode())


def _message(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack(">I", len(content)) + content
