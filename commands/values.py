"""How one flag's text becomes a value, with its range and the nearest legal value in the error.

What it does not know: which command a flag belongs to, or any model. Limits that depend on a
model (vocabulary, picture size) are checked by `commands.models` once its configuration is read.

Invariants: every parser either returns a legal value or raises `FlagError` with a message that
names the flag, the text, the range and, for numbers, the nearest legal value.
"""

import math
import re
from collections.abc import Callable
from typing import Any

from tyro.constructors import PrimitiveConstructorSpec

from ..core.errors import nearest
from ..core.messages import explain

MAX_STEPS = 1000
MAX_SEED = 2**64 - 1
MAX_NUM = 10_000
MAX_FRAMES = 1_000_000
MAX_PROMPT = 10_000
SIZE_STEP = 8
MAX_SIZE = 4096
DTYPES = ("float32", "bfloat16", "float16")
REGIONS = ("left", "right", "top", "bottom")


class FlagError(Exception):
    """A flag's text is not legal.

    Not a `ValueError` on purpose: tyro turns those into its own message, this one passes through.
    """


def whole(flag: str, low: int, high: int, *, also: int | None = None, step: int = 1) -> Callable:
    """Make a parser of whole numbers.

    Args:
        flag: Name shown in messages, with its dashes.
        low: Smallest legal value.
        high: Largest legal value.
        also: One further legal value outside the range (such as -1).
        step: Values must be multiples of this.
    """
    extra = f" or {also}" if also is not None else ""
    kind = f"multiples of {step}" if step > 1 else "whole numbers"
    allowed = f"{kind} from {low} to {high}{extra}"

    def parse(text: str) -> int:
        try:
            # Python refuses to read numbers of more than 4300 digits; so do we, the same way.
            value = int(text)
        except ValueError:
            hint = _whole_hint(text, low, high, step)
            raise FlagError(explain(flag, got=text, allowed=allowed, hint=hint)) from None
        if value == also or (low <= value <= high and value % step == 0):
            return value
        raise FlagError(
            explain(flag, got=text, allowed=allowed, hint=_whole_hint(text, low, high, step))
        )

    return parse


def _whole_hint(text: str, low: int, high: int, step: int) -> str | None:
    try:
        number = float(text)
    except ValueError:
        return None
    if math.isnan(number):
        return None
    inside = min(max(number, low), high)
    below = max(low, math.floor(inside / step) * step)
    above = min(high, math.ceil(inside / step) * step)
    return str(below) if below == above else f"{below} or {above}"


def real(flag: str, low: float, high: float, *, open_low: bool = False) -> Callable:
    """Make a parser of finite real numbers.

    Args:
        flag: Name shown in messages, with its dashes.
        low: Smallest value.
        high: Largest legal value.
        open_low: The smallest value itself is not legal.
    """
    allowed = f"numbers {'above' if open_low else 'from'} {low:g} to {high:g}"

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise FlagError(explain(flag, got=text, allowed=allowed)) from None
        if math.isfinite(value) and low <= value <= high and not (open_low and value == low):
            return value
        inside = None if math.isnan(value) else min(max(value, low), high)
        hint = f"{inside:g}" if inside is not None and not (open_low and inside == low) else None
        raise FlagError(explain(flag, got=text, allowed=allowed, hint=hint))

    return parse


def one_of(flag: str, names: tuple[str, ...]) -> Callable:
    """Make a parser of a fixed list of names.

    Args:
        flag: Name shown in messages, with its dashes.
        names: Legal names.
    """

    def parse(text: str) -> str:
        if text in names:
            return text
        raise FlagError(
            explain(flag, got=text, allowed=", ".join(names), hint=nearest(text, names))
        )

    return parse


def prompt(text: str) -> str:
    """Check a prompt: at most 10,000 characters, no control characters, no lone surrogates."""
    return checked_text("prompt", text)


def checked_text(name: str, text: str) -> str:
    """Check free text that a model reads and a record stores.

    Args:
        name: Field name for the message.
        text: The text.

    Returns:
        The text unchanged.

    Raises:
        FlagError: Too long, a NUL, or bytes that were not UTF-8.
    """
    if len(text) > MAX_PROMPT:
        raise FlagError(
            explain(f"{name} is too long", got=f"{len(text)} characters", allowed=f"{MAX_PROMPT}")
        )
    if "\0" in text:
        raise FlagError(explain(f"{name} holds a NUL character", got=text))
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise FlagError(explain(f"{name} is not valid UTF-8", got=text))
    return text


def device(text: str) -> str:
    """Check the form of a device name; whether the machine has it is asked later."""
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", text):
        return text
    names = ("auto", "cpu", "cuda", "cuda:0", "mps")
    raise FlagError(
        explain("--device", got=text, allowed=", ".join(names), hint=nearest(text, names))
    )


def region(text: str) -> str:
    """Check the form of a region; the picture's own size is compared later."""
    if text in REGIONS:
        return text
    allowed = "left, right, top, bottom or x0,y0,x1,y1 in pixels"
    parts = text.split(",")
    if len(parts) != 4 or not all(re.fullmatch(r"\d{1,6}", part.strip()) for part in parts):
        raise FlagError(explain("--region", got=text, allowed=allowed, hint=nearest(text, REGIONS)))
    x0, y0, x1, y1 = (int(part) for part in parts)
    if x0 >= x1 or y0 >= y1:
        raise FlagError(explain("--region is empty", got=text, allowed="x0 < x1 and y0 < y1"))
    return f"{x0},{y0},{x1},{y1}"


def span(text: str) -> str:
    """Check the form of a span in seconds; the motion's own length is compared later."""
    match = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)-(\d{1,6}(?:\.\d{1,6})?)", text)
    if not match:
        raise FlagError(explain("--span", got=text, allowed="START-END in seconds", hint="2.0-4.0"))
    if not float(match[1]) < float(match[2]):
        raise FlagError(explain("--span is empty", got=text, allowed="START before END"))
    return text


def names_of(flag: str, legal: tuple[str, ...]) -> Callable:
    """Make a parser of a list of names, commas between them; each counts once.

    Args:
        flag: Name shown in messages, with its dashes.
        legal: Legal names.
    """

    def parse(text: str) -> tuple[str, ...]:
        parts = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",")))
        for part in parts:
            if part not in legal:
                allowed, hint = ", ".join(legal), nearest(part, legal)
                raise FlagError(explain(flag, got=part, allowed=allowed, hint=hint))
        return parts

    return parse


def shard(text: str) -> str:
    """Check `i/n`: shard i, counted from 0, of n."""
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if not match or not int(match[1]) < int(match[2]):
        raise FlagError(
            explain("--shard", got=text, allowed="i/n with 0 <= i < n", hint="0/2 and 1/2")
        )
    return f"{int(match[1])}/{int(match[2])}"


def auth(text: str) -> str:
    """Check `user:password`, both with something in them; the password is never repeated."""
    user, colon, password = checked_text("--auth", text).partition(":")
    if not (user and colon and password):
        hint = "--auth me:a-long-password"
        raise FlagError(explain("--auth", allowed="USER:PASSWORD", hint=hint))
    return text


def override(text: str) -> str:
    """Check the form of one `--set a.b=c`."""
    if re.fullmatch(r"[A-Za-z_][\w]*(\.[A-Za-z_][\w]*)*=.*", text, re.DOTALL):
        return text
    raise FlagError(explain("--set", got=text, allowed="section.key=value"))


def spec(
    parse: Callable[[str], Any], metavar: str, absent: str = "none"
) -> PrimitiveConstructorSpec:
    """Tell tyro how to read one value.

    Args:
        parse: One of this file's parsers.
        metavar: What the help shows in place of the value.
        absent: What the help shows when the default is None.
    """
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: parse(texts[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [absent if value is None else str(value)],
    )
