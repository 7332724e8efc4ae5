"""The addresses a page makes videos through: one long answer that carries a video as it is made.

The answer is a row of messages (`streams.py`): `J` what happens as JSON, `M` the next bytes of a
fragmented MP4, `F` frames as plain bytes for browsers that play no such file. It knows neither
models nor what is asked for.
"""

import asyncio
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ..core.errors import BlockloomError
from .answers import asked_for, guarded, visitor_who_asks
from .streams import Streams, message, safely, thinned, told
from .videos import Film, Videos

PREFIX = "/video/"
FORMS = ("h264", "vp9", "frames")
MAX_WAITING = 16
_MAX_ASKED = 2**20 + 2**14


class VideoRoutes:
    """The handlers; one set per server."""

    def __init__(self, videos: Videos) -> None:
        """Make handlers over a server's videos."""
        self._videos = videos
        self._streams = Streams("videos", MAX_WAITING)

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
        self._streams.check_room()
        form = asked.get("form")
        film = self._videos.order(visitor_who_asks(request), asked)
        form = form if form in FORMS else "frames"
        made = self._streams.messages(film, partial(messages, self._videos, film, form))
        return StreamingResponse(made, media_type="application/octet-stream")

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
        content = await loop.run_in_executor(self._streams.worker, self._videos.file, film)
        return Response(content, media_type="video/mp4")


def messages(videos: Videos, film: Film, form: str) -> Iterator[bytes]:
    """Make a video and write what happens as messages; an error is the last one.

    Args:
        videos: Makes it.
        film: What to make.
        form: h264, vp9 or frames.
    """
    yield from safely(_written(videos, film, form))


def _written(videos: Videos, film: Film, form: str) -> Iterator[bytes]:
    writer = None
    for part in thinned(videos.make(film)):
        if isinstance(part, np.ndarray):
            if writer is None:
                yield message(b"F", np.ascontiguousarray(part).tobytes())
                continue
            content = writer.add(part)
            if writer.num_fragments == 1:
                yield told(kind="mime", mime=writer.mime)
            yield message(b"M", content)
        else:
            if part["kind"] == "about":
                writer = _writer(film, form)
                part = part | {"form": "mp4" if writer else "frames"}
            yield told(**part)


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
