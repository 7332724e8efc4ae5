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
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

from .core.errors import BlockloomError, UsageError, nearest
from .core.messages import explain, one_line


class _Terminated(BaseException):
    """SIGTERM arrived; a BaseException so that no handler for ordinary errors keeps it."""


class _Signals:
    """Turns SIGINT and SIGTERM into exceptions, and remembers them when a library eats those."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._report: Any = None

    def __enter__(self) -> "_Signals":
        self._report, sys.unraisablehook = sys.unraisablehook, self._again
        with contextlib.suppress(ValueError):  # not the main thread: the host owns the signals
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        sys.unraisablehook = self._report

    def _again(self, ignored: Any) -> None:
        """Send the signal once more when it fell into code that cannot raise, as finalisers."""
        if self.received is None or ignored.exc_type not in (KeyboardInterrupt, _Terminated):
            self._report(ignored)
            return
        # A real signal to this, the main thread: a simulated one wakes nobody from a system call.
        again = (threading.get_ident(), self.received)
        timer = threading.Timer(0.01, signal.pthread_kill, again)
        timer.daemon = True
        timer.start()

    def _stop(self, signum: int, frame: FrameType | None) -> NoReturn:
        self.received = signum
        raise _Terminated if signum == signal.SIGTERM else KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program name; the process's own when None.

    Returns:
        Exit code, as listed in this file's docstring.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    is_debug = "--debug" in arguments
    signals = _Signals()
    try:
        with signals:
            status = _dispatch(arguments)
        if signals.received is not None:  # an import swallowed the exception
            return _stopped(signals.received)
        return status
    except KeyboardInterrupt:
        return _stopped(signal.SIGINT)
    except _Terminated:
        return _stopped(signal.SIGTERM)
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
                description="Pictures, videos, worlds block by block; train your own, look inside.",
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
    sections = _sections(box)
    text = " ".join(sections[0]) if sections else "cannot read the arguments"
    flag = next((line for part in sections[1:] for line in part if line.startswith("--")), None)
    hint = flag.split()[0] if "Unrecognized" in text and flag else None
    command = f"blockloom {arguments[0]} --help" if arguments[0] in COMMANDS else "blockloom --help"
    return explain(text.rstrip("."), hint=f"{hint} (see {command})" if hint else command)


def _sections(box: str) -> list[list[str]]:
    """Split tyro's box at its rules; its title is left out."""
    is_framed = "╭" in box  # without UTF-8 the frame is missing and the title is a section
    sections: list[list[str]] = [[]]
    for line in (line.strip(" │") for line in box.splitlines()):
        if line and set(line) <= set("─-"):
            sections.append([])
        elif line and line[0] not in "╭╰":
            sections[-1].append(line)
    return [part for part in sections[0 if is_framed else 1 :] if part]


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


def _stopped(signum: int) -> int:
    word = "terminated" if signum == signal.SIGTERM else "interrupted"
    return _fail("E-SIGNAL", f"{word}; finished files are kept", 128 + signum)


def _close_quietly() -> int:
    # The reader went away (`| head`): point stdout elsewhere so that the interpreter's own flush
    # at exit does not complain.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
