"""`blockloom demo`: the page of `app.py` on a chosen address."""

import ipaddress
import socket

from ..core.errors import ResourceError, UsageError
from ..core.messages import explain
from . import output
from .arguments import Demo


def run(args: Demo) -> int:
    """Serve until interrupted.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.

    Raises:
        UsageError: An address that lets the network in, without --auth or --i-know.
        ResourceError: The port is taken or the address is not this machine's.
    """
    if not is_local(args.listen) and args.auth is None and not args.i_know:
        raise UsageError(
            explain(
                "--listen lets the network in",
                got=args.listen,
                allowed="127.0.0.1, or another address with --auth USER:PASSWORD or --i-know",
                hint="--listen 127.0.0.1",
            )
        )
    check_free(args.listen, args.port)
    from ..app import serve

    serve(
        [] if args.model is None else [args.model],
        listen=args.listen,
        port=args.port,
        auth=None if args.auth is None else tuple(args.auth.split(":", 1)),
        ready=lambda address: output.say(f"open {address} in a browser; Ctrl-C stops"),
    )
    return 0


def is_local(address: str) -> bool:
    """Say whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"


def check_free(address: str, port: int) -> None:
    """Find out early, in plain words, that a port cannot be listened on.

    Raises:
        ResourceError: It is taken, not allowed, or the address is not of this machine.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except (OSError, UnicodeError) as error:
            reason = getattr(error, "strerror", None) or "bad address"
            raise ResourceError(
                explain(f"cannot listen on {address} port {port}: {reason}", hint="--port 7861")
            ) from error
