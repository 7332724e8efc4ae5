"""What all tests share: no network, and shape checks at run time when asked for."""

import os
import socket
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest

# `BLOCKLOOM_CHECK_SHAPES=1 python -m pytest` checks every signature's shapes and types on every
# call, before anything imports these rooms. Off by default: tests that hand in wrong values on
# purpose would then see the checker's error and not ours.
if os.environ.get("BLOCKLOOM_CHECK_SHAPES") == "1":
    jaxtyping.install_import_hook(
        ["blockloom.core", "blockloom.models", "blockloom.tokenizers"], "beartype.beartype"
    )

_LOCAL = {"127.0.0.1", "::1", "localhost", "0.0.0.0"}


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse connections that leave this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in _LOCAL:
            raise OSError(f"tests have no network; tried {address}")
        connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]
