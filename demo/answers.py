"""What the page's own addresses share: who asks, what was asked, and how errors are told."""

import json
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..core.errors import BlockloomError, ModelError, ResourceError, UsageError
from ..core.messages import explain
from .gate import COOKIE, visitor_of


class Busy(ResourceError):
    """Too much is asked at once."""


class Gone(UsageError):
    """Nothing stands under this key, at least nothing of this visitor's."""


def is_logged_in(request: Request) -> bool:
    """Say whether a request may come in, by the page's own list of logins."""
    page, cookies = request.app, request.cookies
    if getattr(page, "auth", None) is None and getattr(page, "auth_dependency", None) is None:
        return True
    names = ("access-token-", "access-token-unsecure-")
    tokens = [cookies.get(f"{name}{page.cookie_id}") for name in names]
    return any(page.tokens.get(token) is not None for token in tokens if token)


def guarded(handle: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Any]:
    """Answer errors that are the asker's with one line; whatever else goes up to the gate."""

    async def answer(request: Request) -> Response:
        if not is_logged_in(request):
            return JSONResponse({"detail": "log in first"}, 401)
        try:
            response = await handle(request)
        except BlockloomError as error:
            return JSONResponse({"detail": error.message}, _status(error))
        response.headers["cache-control"] = "no-store"
        return response

    return answer


def _status(error: BlockloomError) -> int:
    if isinstance(error, Gone):
        return 410
    if isinstance(error, ResourceError):
        return 429
    return 404 if isinstance(error, ModelError) else 422


def visitor_who_asks(request: Request) -> str:
    """Name whoever sent a request, by the cookie of the gate."""
    return visitor_of(request.cookies.get(COOKIE, ""))


async def asked_for(request: Request, most: int = 4096) -> dict[str, Any]:
    """Read a small JSON object.

    Args:
        request: Holds it as its body.
        most: Bytes it may have.

    Raises:
        UsageError: Anything else.
    """
    body = await request.body()
    if len(body) > most:
        raise UsageError(explain("the request is too long", allowed=f"{most} bytes"))
    try:
        asked = json.loads(body)
    except (ValueError, RecursionError):
        asked = None
    if not isinstance(asked, dict):
        raise UsageError("the request is no JSON object")
    return asked
