"""`blockloom demo`: the demo of `app.py` on a chosen address."""

from .arguments import Demo


def run(args: Demo) -> int:
    """Serve until interrupted.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    from ..app import main

    main(["--host", args.host, "--port", str(args.port)])
    return 0
