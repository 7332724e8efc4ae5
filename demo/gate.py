"""The door in front of the page: which requests come in, and as whom.

Every browser gets a secret cookie, and every session name it sends is put behind a hash of that
cookie. A session name that somebody overheard therefore names an empty session of their own, and
the number of somebody else's job is refused.

What it does not know: pictures, models, or Gradio's objects; only its addresses.
"""

import hashlib
import json
import logging
import re
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders, QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .patience import Crowded, Patience

log = logging.getLogger(__name__)
COOKIE = "blockloom_visitor"
MAX_BODY = 2 * 2**20
"""Bytes of the largest request; the longest legal prompt is far below."""
_MAX_JOBS = 4096
_API = "/gradio_api/"
# The page takes no files, has no streamed media, no component with a server of its own.
_CLOSED = tuple(
    _API + name
    for name in ("upload", "process_recording", "component_server", "stream/", "proxy=", "vibe",
                 "undo-vibe", "deep_link", "dev/", "profiling", "run-history", "custom_component")
)  # fmt: skip
_JOB = re.compile(r"/gradio_api/call/(?:v2/)?[^/]+/([^/]+)/?")
_ASKS = re.compile(r"/gradio_api/(?:queue/join|(?:run|api|call)/(?!v2/)([^/]+))/?")
_COOKIE_FORM = re.compile(r"[A-Za-z0-9_-]{43}")


class _Refused(Exception):
    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True)
class Doors:
    """What can be asked for, and with how many values.

    Attributes:
        by_number: Function number -> allowed lengths of `data`.
        by_name: Public name -> the same.
    """

    by_number: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    by_name: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def check(self, name: str | None, data: Mapping[str, Any]) -> None:
        """Refuse what no function can answer.

        Raises:
            _Refused: No such function, or not its number of values.
        """
        number = data.get("fn_index")
        if number is None and name is None:
            raise _Refused(422, "fn_index is missing")
        known: Mapping[Any, tuple[int, ...]] = self.by_name if number is None else self.by_number
        key = name if number is None else number
        if isinstance(key, bool) or not isinstance(key, int | str) or key not in known:
            raise _Refused(404, "no such function")
        values = data.get("data")
        if not isinstance(values, list) or len(values) not in known[key]:
            wanted = " or ".join(map(str, known[key]))
            got = len(values) if isinstance(values, list) else type(values).__name__
            raise _Refused(422, f"data; got {got}; allowed a list of {wanted} values")
        for place, value in enumerate(values):
            if isinstance(value, list | dict):  # no box of the page holds one
                got = "a list" if isinstance(value, list) else "an object"
                raise _Refused(422, f"data[{place}]; got {got}; allowed text, a number or null")


class Gate:
    """ASGI middleware; one per server."""

    def __init__(
        self, app: ASGIApp, doors: Doors | None = None, patience: Patience | None = None,
        large: Mapping[str, int] | None = None,
    ) -> None:  # fmt: skip
        """Stand in front of an app.

        Args:
            app: The page's server.
            doors: Its functions; None lets every function number pass.
            patience: Delays of logins.
            large: Addresses with files for bodies, and how many bytes these may have; the gate
                counts them as they pass and keeps none.
        """
        self._app, self._doors, self._large = app, doors, large or {}
        self._patience = patience or Patience()
        self._jobs: OrderedDict[str, str] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        has_begun = False

        async def sending(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        try:
            await self._admit(scope, receive, sending)
        except _Refused as refusal:
            answer = JSONResponse({"detail": refusal.message}, refusal.status)
            await answer(scope, receive, send)
        except ClientDisconnect:
            pass
        except Exception as error:  # nobody outside sees what broke; the log does
            number = secrets.token_hex(4)
            if has_begun:  # a stream whose session is gone ends this way
                log.info("error %s ended an answer: %s", number, type(error).__name__)
                with suppress(Exception):  # an answer of announced length cannot be rounded off
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                return
            log.warning("error %s", number, exc_info=error)
            text = f"this request cannot be answered (error {number})"
            await JSONResponse({"detail": text}, 400)(scope, receive, send)

    async def _admit(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check where a request comes from and what it wants, then pass it on."""
        headers, path = Headers(scope=scope), scope["path"]
        if is_foreign(headers):
            raise _Refused(403, "this page answers only its own origin")
        limit = self._large.get(path, MAX_BODY)
        if _number(headers.get("content-length")) > limit:
            raise _Refused(413, f"too large; allowed {limit} bytes")
        if path.startswith(_CLOSED):
            raise _Refused(403, "this page takes no files and has no such door")
        cookie = Request(scope).cookies.get(COOKIE, "")
        visitor = visitor_of(cookie)
        if visitor == "guest" and path == "/" and scope["method"] in ("GET", "HEAD"):
            send = _giving_cookie(send)
        scope = _scoped_address(scope, visitor)
        self._check_job(_JOB.fullmatch(path), visitor)
        if path in self._large:
            await self._app(scope, _counted(receive, limit), send)
        elif scope["method"] in ("POST", "PUT", "PATCH", "DELETE"):
            await self._post(scope, receive, send, visitor)
        else:
            await self._app(scope, receive, send)

    async def _post(self, scope: Scope, receive: Receive, send: Send, visitor: str) -> None:
        """Pass on a request with a body, the session it names put behind its visitor."""
        path, body = scope["path"], await _read(scope, receive)
        if path.rstrip("/") == "/login":
            await self._log_in(scope, _again(body, receive), send)
            return
        if path.startswith(_API) and not path.startswith(_API + "call/v2/"):
            body = self._scoped_body(path, body, visitor)
        asks = _ASKS.fullmatch(path) or path.startswith(_API + "call/v2/")
        if asks:
            send = self._remembering(send, visitor)
        headers = MutableHeaders(scope=scope)
        headers["content-length"] = str(len(body))
        await self._app(scope, _again(body, receive), send)

    def _scoped_body(self, path: str, body: bytes, visitor: str) -> bytes:
        try:
            data = json.loads(body)
        except RecursionError:
            raise _Refused(400, "the body is nested too deeply") from None
        except ValueError:
            return body  # the router answers what is no JSON
        if not isinstance(data, dict):
            return body
        asks = _ASKS.fullmatch(path)
        if asks and self._doors is not None:
            self._doors.check(asks[1], data)
        self._check_job(data.get("event_id"), visitor)
        if isinstance(data.get("session_hash"), str):
            data["session_hash"] = _scoped(data["session_hash"], visitor)
        return json.dumps(data).encode()

    def _check_job(self, job: Any, visitor: str) -> None:
        job = job[1] if isinstance(job, re.Match) else job
        if isinstance(job, str) and self._jobs.get(job, visitor) != visitor:
            raise _Refused(403, "that job is not yours")

    def _remembering(self, send: Send, visitor: str) -> Send:
        """Note to whom a job's number is given."""

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.body":
                found = re.search(rb'"event_id":\s*"([^"]+)"', message.get("body", b"")[:200])
                if found:
                    self._jobs[found[1].decode()] = visitor
                    if len(self._jobs) > _MAX_JOBS:
                        self._jobs.popitem(last=False)
            await send(message)

        return sending

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        address = (scope.get("client") or ("unknown",))[0]
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            async with self._patience.turn(address):
                await self._app(scope, receive, sending)
                self._patience.note(address, was_right=status < 400)
        except Crowded:
            raise _Refused(429, "too many logins from here are waiting; try again later") from None


def is_foreign(headers: Headers) -> bool:
    """Say whether another site's page sent a request; opening the page from a link is fine."""
    origin = headers.get("origin")
    if origin is not None:
        return origin.partition("://")[2].lower() != headers.get("host", "").lower()
    is_cross = headers.get("sec-fetch-site") == "cross-site"
    return is_cross and headers.get("sec-fetch-mode") != "navigate"


def visitor_of(cookie: str) -> str:
    """Name the visitor who holds a cookie; whoever has none is a guest among guests."""
    if not _COOKIE_FORM.fullmatch(cookie):
        return "guest"
    return hashlib.sha256(cookie.encode()).hexdigest()[:32]


def _number(text: str | None) -> int:
    """Read a header's number; 0 when it is none."""
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else 0


def _scoped(session: str, visitor: str) -> str:
    if len(session) > 64 or "/" in session:
        raise _Refused(422, "session_hash; allowed at most 64 characters without a slash")
    return f"{visitor}.{session}"


def _scoped_address(scope: Scope, visitor: str) -> Scope:
    """Return the scope with the session in its path or query put behind the visitor."""
    beat = _API + "heartbeat/"
    path: str = scope["path"]
    if path.startswith(beat):
        path = beat + _scoped(path.removeprefix(beat).rstrip("/"), visitor)
        return {**scope, "path": path, "raw_path": path.encode()}
    query = Request(scope).query_params
    if "session_hash" not in query:
        return scope
    pairs = [(k, _scoped(v, visitor) if k == "session_hash" else v) for k, v in query.multi_items()]
    return {**scope, "query_string": str(QueryParams(pairs)).encode()}


async def _read(scope: Scope, receive: Receive) -> bytes:
    """Read a body of at most `MAX_BODY` bytes, whatever its headers promise."""
    body = bytearray()
    async for chunk in Request(scope, receive).stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise _Refused(413, f"too large; allowed {MAX_BODY} bytes")
    return bytes(body)


def _counted(receive: Receive, limit: int) -> Receive:
    """Pass a body on piece by piece, up to a number of bytes."""
    total = 0

    async def receiving() -> Message:
        nonlocal total
        message = await receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise _Refused(413, f"too large; allowed {limit} bytes")
        return message

    return receiving


def _again(body: bytes, receive: Receive) -> Receive:
    """Hand out a body that was read already; later calls wait for the client to leave."""
    is_read = False

    async def receiving() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving


def _giving_cookie(send: Send) -> Send:
    cookie = f"{COOKIE}={secrets.token_urlsafe(32)}; Path=/; HttpOnly; SameSite=Lax"

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).append("set-cookie", cookie)
        await send(message)

    return sending
