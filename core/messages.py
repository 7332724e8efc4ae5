"""The one-line form of every message: `what; got …; allowed …; try …`.

What it does not know: which error class carries the line, or where it is printed.

Invariants: the result is one line of printable characters, so text from a file or a flag can
never move a terminal's cursor or forge a second line in a log.
"""

from typing import Any

_MAX_SHOWN = 120


def one_line(text: str) -> str:
    """Replace line breaks, control characters and unpaired surrogates by spaces.

    Args:
        text: Anything.
    """
    return "".join(c if c.isprintable() else " " for c in text)


def explain(
    what: str, *, got: Any = None, allowed: str | None = None, hint: str | None = None
) -> str:
    """Build a message that says what is wrong, with what, and what would be right.

    Args:
        what: The setting or object, in words.
        got: Value that was given, shortened to 120 characters; None leaves the part out.
        allowed: Legal values, in words.
        hint: What to try.

    Returns:
        One line.
    """
    parts = [what]
    if got is not None:
        text = got if isinstance(got, str) else repr(got)
        parts.append(f"got {text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + '...'}")
    if allowed:
        parts.append(f"allowed {allowed}")
    if hint:
        parts.append(f"try {hint}")
    return one_line("; ".join(parts))
