"""Errors that a user can act on, each with the exit code the command line answers with.

What it does not know: who prints it. Libraries raise these; only `cli.py` turns them into a
line on stderr and an exit status.

Invariants: a message is one line and names the setting, the value and what would be legal.
Usage, data and model errors are also `ValueError`, so callers of the Python interface can
catch the usual class.
"""

from difflib import get_close_matches
from typing import Any, Sequence


class BlockloomError(Exception):
    """Base of all errors raised on purpose; exit code 1 unless a subclass says otherwise.

    Attributes:
        exit_code: Process exit status used by the command line.
        code: Stable label printed between brackets, for searching.
    """

    exit_code: int = 1
    code: str = "E-1000"

    def __init__(self, message: str, *, code: str | None = None, exit_code: int | None = None):
        super().__init__(message)
        if code is not None:
            self.code = code
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(BlockloomError, ValueError):
    """A setting, flag or argument that cannot mean anything (exit 2)."""

    exit_code = 2
    code = "E-2000"


class DataError(BlockloomError, ValueError):
    """An input file or record that cannot be used (exit 3)."""

    exit_code = 3
    code = "E-3000"


class ModelError(BlockloomError, ValueError):
    """A recipe, configuration or weights that cannot be used (exit 4)."""

    exit_code = 4
    code = "E-4000"


class ResourceError(BlockloomError):
    """Memory, disk, device or lock that is not available (exit 5)."""

    exit_code = 5
    code = "E-5000"


def explain(what: str, *, got: Any = None, allowed: str | None = None, hint: str | None = None) -> str:
    """Build the one-line message form `what; got …; allowed …; try …`.

    Args:
        what: The setting or object that is wrong, in words.
        got: Value that was given; shortened to 120 characters.
        allowed: Legal values in words.
        hint: What to do, without the word "try".

    Returns:
        One line without line breaks.
    """
    parts = [what]
    if got is not None:
        text = got if isinstance(got, str) else repr(got)
        parts.append(f"got {text if len(text) <= 120 else text[:117] + '...'}")
    if allowed:
        parts.append(f"allowed {allowed}")
    if hint:
        parts.append(f"try {hint}")
    # Control characters from user input must not reach a terminal.
    return "".join(c if c.isprintable() else " " for c in "; ".join(parts))


def nearest(name: str, names: Sequence[str]) -> str | None:
    """Find the legal name closest to a misspelt one.

    Args:
        name: What was written.
        names: Legal names.

    Returns:
        The closest name, or None when nothing is similar.
    """
    matches = get_close_matches(name[:200], list(names), n=1, cutoff=0.5)
    return matches[0] if matches else None
