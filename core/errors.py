"""Errors a user can act on, and the small checks that raise them.

What it is: one exception family with the exit code and the short code the command line prints,
and helpers that name the setting, the value given, what is allowed and the nearest legal value.
What it does not know: torch, recipes, the command line's layout.
Invariants: importing this file imports nothing heavy; every class that reports a bad value is
also a `ValueError`, so callers that only know Python's own errors still catch it.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from typing import Any

from .messages import explain


class BlockloomError(Exception):
    """Base of every error Blockloom raises on purpose.

    Args:
        message: What went wrong, the value given, what is allowed and what to try.
        exit_code: Process exit status; the class default when None.
    """

    exit_code: int = 1
    code: str = "E-FAILED"

    def __init__(self, message: str, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        if exit_code is not None:
            self.exit_code = exit_code


class UsageError(BlockloomError, ValueError):
    """A setting or argument the user gave is not legal."""

    exit_code = 2
    code = "E-USAGE"


class DataError(BlockloomError, ValueError):
    """A data set, image or caption file cannot be used."""

    exit_code = 3
    code = "E-DATA"


class ModelError(BlockloomError, ValueError):
    """A recipe or a set of weights does not describe a model that can run."""

    exit_code = 4
    code = "E-MODEL"


class ResourceError(BlockloomError):
    """The machine lacks memory, disk or a device that the request needs."""

    exit_code = 5
    code = "E-RESOURCE"


def nearest(value: Any, legal: Iterable[Any]) -> Any | None:
    """Find the legal value closest to a rejected one, for a did-you-mean hint.

    Args:
        value: What the user gave: a number or a name.
        legal: The values that would be accepted.

    Returns:
        The numerically closest number (ties go to the smaller), or the most similar name, or
        None when nothing is similar enough to be worth suggesting.

    Example:
        >>> nearest(30, [8, 16, 32]), nearest("confidance", ["confidence", "random"])
        (32, 'confidence')
    """
    choices = list(legal)
    if _is_number(value):
        numbers = sorted(choice for choice in choices if _is_number(choice))
        return min(numbers, key=lambda choice: abs(choice - value)) if numbers else None
    by_name = {str(choice).lower(): choice for choice in choices}
    close = difflib.get_close_matches(str(value).lower(), by_name, n=1, cutoff=0.5)
    return by_name[close[0]] if close else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def describe(setting: str, value: Any, allowed: str, hint: Any | None = None) -> str:
    """Write the one-line message all checks share: what, got, allowed, try.

    Args:
        setting: Name of the setting as the user writes it.
        value: The value that was given.
        allowed: What would be accepted, in words.
        hint: A value to try, or None.
    """
    shown = None if hint is None else repr(hint)
    return explain(f"{setting} is not legal", got=repr(value), allowed=allowed, hint=shown)


def check_one_of(setting: str, value: Any, legal: Sequence[Any]) -> None:
    """Require a value to be one of a list.

    Raises:
        UsageError: It is not; the message names the closest legal value.
    """
    if value not in legal:
        allowed = ", ".join(str(choice) for choice in legal)
        raise UsageError(describe(setting, value, allowed, nearest(value, legal)))


def check_range(
    setting: str,
    value: Any,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    *,
    open_low: bool = False,
) -> None:
    """Require a finite number inside [low, high], or (low, high] with `open_low`.

    Raises:
        UsageError: Outside, or not a finite number; the message names the nearest bound.
    """
    fine = _is_number(value) and math.isfinite(value) and low <= value <= high
    if not fine or (open_low and value == low):
        hint = min(max(value, low), high) if _is_number(value) else None
        shown = hint if hint is not None and math.isfinite(hint) and hint != value else None
        raise UsageError(describe(setting, value, _interval(low, high, open_low), shown))


def _interval(low: float | int, high: float | int, open_low: bool = False) -> str:
    if math.isinf(high):
        return f"{'>' if open_low else '>='} {low}" if math.isfinite(low) else "a finite number"
    return f"{'(' if open_low else '['}{low}, {high}]"


def check_count(setting: str, value: Any, low: int = 1, high: float | int = math.inf) -> None:
    """Require a whole number inside [low, high].

    Raises:
        UsageError: Not an int, or outside; the message names the nearest bound.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise UsageError(describe(setting, value, f"a whole number, {_interval(low, high)}"))
    check_range(setting, value, low, high)


def check_divisible(setting: str, value: int, divisor: int) -> None:
    """Require `value` to be a whole positive multiple of `divisor`.

    Raises:
        UsageError: It is not; the message names the nearest multiple.
    """
    if value <= 0 or value % divisor:
        closest = max(divisor, round(value / divisor) * divisor)
        raise UsageError(describe(setting, value, f"multiples of {divisor}", closest))


def check_shape(setting: str, shape: Sequence[int], expected: Sequence[int | None]) -> None:
    """Require a tensor shape; None in `expected` matches any extent.

    Raises:
        UsageError: Number of axes or an extent differs.
    """
    given = tuple(shape)
    fits = len(given) == len(expected) and all(
        want is None or want == got for want, got in zip(expected, given, strict=True)
    )
    if not fits:
        wanted = "[" + ", ".join("any" if want is None else str(want) for want in expected) + "]"
        raise UsageError(describe(f"shape of {setting}", list(given), wanted))


def check_known_keys(where: str, given: Iterable[str], legal: Iterable[str]) -> None:
    """Require every key to be known, so that a misspelt setting is never silently ignored.

    Raises:
        UsageError: An unknown key; the message names it and the closest known one.
    """
    known = sorted(legal)
    for key in given:
        if key not in known:
            hint = nearest(key, known)
            raise UsageError(describe(f"{where} setting", key, ", ".join(known), hint))
