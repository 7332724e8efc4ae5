"""Reading a script of actions: what somebody does in a world, one line per step.

What it does not know: models; it is told how many numbers an action has and what the keys do.
Nothing here loads torch.

Invariant: every line that is not an action is refused with its number before anything is played.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import DataError, nearest
from ..core.messages import explain, one_line
from . import values
from .prompts import check_file, decoded, raw_lines

if TYPE_CHECKING:
    from ..pipelines.world_files import Controls

MAX_STEPS = 1_000_000
_REPEAT = re.compile(r"\s+[xX](\d{1,9})$")
_WHOLE = re.compile(r"[+-]?\d+")
_NOTHING = ("-", "none")


@dataclass(frozen=True)
class Step:
    """One line of a script.

    Attributes:
        action: As many numbers as the world takes; None where it takes none.
        repeat: How often it is done, at least 1.
        prompt: What the world is from here on; None = as before.
    """

    action: tuple[float, ...] | None
    repeat: int = 1
    prompt: str | None = None


def read_script(path: Path, width: int, keys: "Controls") -> list[Step]:
    """Read a script of actions.

    Args:
        path: Text, CSV (a first line of names is skipped) or JSON lines.
        width: Numbers an action is made of; 0 = the world takes none, and every line is nothing.
        keys: What the names of keys stand for.

    Returns:
        The steps in order, at least one.

    Raises:
        DataError: No such file, no actions in it, too many, or a line that is no action.
    """
    check_file(path, "script")
    steps: list[Step] = []
    total, is_first = 0, True
    for number, raw in raw_lines(path):
        text = decoded(path, number, raw)
        if not text or text.startswith("#"):
            continue
        if is_first and path.suffix.lower() == ".csv" and _is_header(text, keys):
            is_first = False
            continue
        is_first = False
        try:
            step = _step(text, width, keys)
        except (ValueError, RecursionError, values.FlagError) as error:
            raise DataError(f"{path.name} line {number}: {one_line(str(error))}") from error
        total += step.repeat
        if total > MAX_STEPS:
            raise DataError(explain(f"{path.name} line {number}: too long a script",
                                    allowed=f"{MAX_STEPS} steps"))  # fmt: skip
        steps.append(step)
    if not steps:
        raise DataError(explain(f"{path.name} holds no actions", allowed="one action per line"))
    return steps


def _is_header(text: str, keys: "Controls") -> bool:
    cells = [cell.strip() for cell in re.split(r"[,;]", text)]
    return not any(_number(cell) is not None or cell in keys.keys for cell in cells)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _step(text: str, width: int, keys: "Controls") -> Step:
    if text[0] in '[{"' or text == "null":
        return _json_step(json.loads(text), width, keys)
    match = _REPEAT.search(text)
    repeat = _repeat(int(match[1])) if match else 1
    text = text[: match.start()].strip() if match else text
    return Step(_spoken(text, width, keys), repeat)


def _json_step(value: Any, width: int, keys: "Controls") -> Step:
    if not isinstance(value, dict):
        return Step(_told(value, width, keys))
    known = ("action", "repeat", "prompt")
    for key in value:
        if key not in known:
            raise ValueError(explain("unknown key", got=key, allowed=", ".join(known),
                                     hint=nearest(key, known)))  # fmt: skip
    prompt = value.get("prompt")
    if prompt is not None:
        if not isinstance(prompt, str):
            raise ValueError(explain("prompt", got=prompt, allowed="text"))
        values.checked_text("prompt", prompt)
    action = _told(value.get("action"), width, keys)
    return Step(action, _repeat(value.get("repeat", 1)), prompt)


def _repeat(count: Any) -> int:
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_STEPS:
        raise ValueError(explain("repeat", got=count, allowed=f"1 to {MAX_STEPS}", hint="x1"))
    return count


def _told(value: Any, width: int, keys: "Controls") -> tuple[float, ...] | None:
    """Read an action from JSON."""
    if value is None:
        return keys.idle if width else None
    if isinstance(value, str):
        return _spoken(value, width, keys)
    if isinstance(value, int) and not isinstance(value, bool):
        return _one_of(value, width)
    if isinstance(value, float):
        value = [value]
    is_list = isinstance(value, list) and all(type(part) in (int, float) for part in value)
    if not is_list:
        raise ValueError(explain("action", got=str(value)[:60], allowed=_legal(width)))
    return _vector([float(part) for part in value], width)


def _spoken(text: str, width: int, keys: "Controls") -> tuple[float, ...] | None:
    """Read an action from text."""
    if text.lower() in _NOTHING:
        return keys.idle if width else None
    if _WHOLE.fullmatch(text):
        return _one_of(int(text), width)
    cells = [cell for cell in re.split(r"[,;\s]+", text) if cell]
    numbers = [_number(cell) for cell in cells]
    if all(number is not None for number in numbers):
        return _vector([number for number in numbers if number is not None], width)
    names = [name.strip() for name in text.split("+")]
    for name in names:
        if name not in keys.keys:
            raise ValueError(explain("action", got=name, allowed=_legal(width, keys),
                                     hint=nearest(name, list(keys.keys))))  # fmt: skip
    return tuple(keys.action(names))


def _one_of(number: int, width: int) -> tuple[float, ...]:
    """Read a lone whole number: the place of the 1, or the value where there is only one place."""
    if width == 1:
        return (float(number),)
    if not 0 <= number < width:
        near = str(min(max(number, 0), width - 1)) if width else None
        raise ValueError(explain("action", got=str(number), allowed=_legal(width), hint=near))
    return tuple(float(place == number) for place in range(width))


def _vector(numbers: list[float], width: int) -> tuple[float, ...]:
    if len(numbers) != width or not all(map(math.isfinite, numbers)):
        got = " ".join(f"{number:g}" for number in numbers)
        raise ValueError(explain("action", got=got, allowed=_legal(width)))
    return tuple(numbers)


def _legal(width: int, keys: "Controls | None" = None) -> str:
    if not width:
        return "- (this world takes no actions)"
    legal = f"{width} finite numbers, or one of 0 to {width - 1}"
    if width == 1:
        legal = "one finite number"
    names = ", ".join(keys.keys) if keys is not None else ""
    return f"{legal}, or {names}" if names else legal
