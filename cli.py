"""The command line `blockloom`: parse, call one command, answer with an exit code.

What it does not know: how any command works; each lives in `commands/` and loads only when asked.

Invariants: exit codes are 0 done, 1 bug, 2 usage, 3 input data, 4 model or configuration,
5 resource, 6 some batch items failed, 130 and 143 signals; an error is one line on stderr and
never a traceback unless `--debug` is given; nothing heavy is imported before flags are checked.
"""

import contextlib
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

from .core.errors import BlockloomError, UsageError, nearest
from .core.messages import explain, one_line


class _Terminated(BaseException):
    """SIGTERM arrived; a BaseException so that no handler for ordinary errors keeps it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program name; the process's own when None.

    Returns:
        Exit code, as listed in this file's docstring.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    try:
        with _sigterm_as_exception():
            return _dispatch(arguments)
    except KeyboardInterrupt:
        return _fail("E-SIGNAL", "interrupted; finished files are kept", 130)
    except _Terminated:
        return _fail("E-SIGNAL", "terminated; finished files are kept", 143)
    except BrokenPipeError:
        return _close_quietly()
    except Exception as error:
        if is_debug:
            raise
        code, message, status = _classify(error)
        return _fail(code, message, status)


def _dispatch(arguments: list[str]) -> int:
    if not arguments:
        with contextlib.redirect_stdout(sys.stderr):
            _parse(["--help"])
        return _fail("E-USAGE", "no command given; try blockloom generate image --help", 2)
    command = _parse(arguments)
    if command is None:
        return 0
    module = import_module(f".commands.{type(command).__name__.lower()}", __package__)
    status: int = module.run(command)
    sys.stdout.flush()
    return status


def _parse(arguments: list[str]) -> Any:
    """Turn arguments into a command object; None after help was printed."""
    import tyro

    from .commands.arguments import command_union
    from .commands.values import FlagError

    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(
                command_union(),
                prog="blockloom",
                description="Draw pictures block by block, train your own, look inside.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
            )
    except FlagError as error:
        raise UsageError(str(error)) from None
    except SystemExit as error:
        if not error.code:
            return None
        raise UsageError(_condense(captured.getvalue(), arguments)) from None


def _condense(box: str, arguments: list[str]) -> str:
    """Rewrite tyro's framed message as one line with the nearest legal name."""
    from .commands.arguments import COMMANDS

    if arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        return explain(
            "unknown command",
            got=arguments[0],
            allowed=", ".join(COMMANDS),
            hint=nearest(arguments[0], COMMANDS),
        )
    lines = [line.strip(" │|") for line in box.splitlines()]
    lines = [line for line in lines if line and not re.match(r"[╭╰+]", line)]
    rules = [i for i, line in enumerate(lines) if set(line) <= set("─-")]
    text = " ".join(lines[: rules[0] if rules else None])
    flag = next((line for line in lines[rules[0] + 1 :] if line.startswith("--")), None)
    hint = flag.split()[0] if "Unrecognized" in text and flag else None
    command = f"blockloom {arguments[0]} --help" if arguments[0] in COMMANDS else "blockloom --help"
    return explain(text.rstrip("."), hint=f"{hint} (see {command})" if hint else command)


def _classify(error: Exception) -> tuple[str, str, int]:
    """Give an exception its label, its line and its exit code."""
    if isinstance(error, BlockloomError):
        return error.code, str(error), error.exit_code
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        hint = "try a smaller --num or --batch-size, or --dtype bfloat16"
        return "E-RESOURCE", f"out of memory; {hint}", 5
    if isinstance(error, OSError) and error.errno in _RESOURCE_ERRNOS:
        return "E-RESOURCE", f"{error.strerror}", 5
    hint = "this is a bug; try --debug for the details and report it"
    return "E-BUG", f"{type(error).__name__}: {error}; {hint}", 1


_RESOURCE_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
    errno.ENOMEM,
}


def _fail(code: str, message: str, status: int) -> int:
    with contextlib.suppress(OSError, ValueError):  # stderr may be closed too
        print(f"error[{code}] {one_line(message)}", file=sys.stderr)
    return status


def _close_quietly() -> int:
    # The reader went away (`| head`): point stdout elsewhere so that the interpreter's own flush
    # at exit does not complain.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


@contextlib.contextmanager
def _sigterm_as_exception() -> Any:
    def stop(signum: int, frame: FrameType | None) -> NoReturn:
        raise _Terminated

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # Not the main thread: the host owns the signals.
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
