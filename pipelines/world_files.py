"""What lies beside a world's weights: where one can start, and which keys do what.

`starts.npz` holds `frames` uint8 [starts, frames, height, width, 3] and `actions` float32
[starts, frames, numbers]; row f of the actions is what led to frame f. `world.json` holds
`controls` (key name to action), `idle` (the action of no key), `fps` and `title`, and may hold
`steering`, which only evaluation reads. Both may be missing. It knows neither torch nor who plays.
"""

import math
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import ModelError
from ..core.messages import explain
from .guard import STARTS, check_starts, read_json

CONTROLS = "world.json"
DEFAULT_FPS = 12.5
MAX_KEYS, MAX_STARTS = 24, 64
_MAX_NUMBER = 1e3
_KNOWN = ("controls", "idle", "fps", "title", "steering")

Action = tuple[float, ...]


@dataclass(frozen=True)
class Controls:
    """Which keys do what in a world.

    Attributes:
        keys: Name of a key as browsers call it ("ArrowLeft", "a") -> the action it stands for.
        idle: The action of no key.
        fps: Frames per second the world was recorded at, 1 to 60.
        title: What the world is called; "" = nothing given.
    """

    keys: dict[str, Action] = field(default_factory=dict)
    idle: Action = ()
    fps: float = DEFAULT_FPS
    title: str = ""

    def action(self, pressed: Iterable[str]) -> list[float]:
        """Join pressed keys: what each changes from idle adds up, within what single keys reach.

        Args:
            pressed: Names of keys; others than this world's count for nothing.

        Returns:
            The action, as many numbers as the world takes.
        """
        told = [self.keys[key] for key in dict.fromkeys(pressed) if key in self.keys]
        reach = [self.idle, *self.keys.values()]
        joined = []
        for place, rest in enumerate(self.idle):
            value = rest + sum(action[place] - rest for action in told)
            sides = [action[place] for action in reach]
            joined.append(min(max(value, min(sides)), max(sides)))
        return joined


def default_controls(width: int) -> Controls:
    """Give every number of an action a digit key of its own that sets it to 1.

    Args:
        width: Numbers an action is made of; beyond 9 they have no key.
    """
    rows = [tuple(float(k == place) for k in range(width)) for place in range(min(width, 9))]
    return Controls({str(place + 1): row for place, row in enumerate(rows)}, (0.0,) * width)


def read_controls(folder: Path, width: int) -> Controls:
    """Read a world's keys, or give it the default ones.

    Args:
        folder: The pipeline's folder.
        width: Numbers an action of the model is made of.

    Raises:
        ModelError: A `world.json` that does not fit the model or makes no sense.
    """
    path = folder / CONTROLS
    if not path.is_file():
        return default_controls(width)
    told = read_json(path, CONTROLS)
    unknown = sorted(set(told) - set(_KNOWN))
    if unknown:
        raise _wrong("unknown key", unknown[0], ", ".join(_KNOWN))
    base = default_controls(width)
    keys, idle = base.keys, base.idle
    if "controls" in told:
        keys = _keys(told["controls"], width)
    if "idle" in told:
        idle = _vector("idle", told["idle"], width)
    fps, title = told.get("fps", DEFAULT_FPS), told.get("title", "")
    if not _is_number(fps) or not 1 <= fps <= 60:
        raise _wrong("fps", fps, "1 to 60")
    if not isinstance(title, str) or len(title) > 80 or not title.isprintable():
        raise _wrong("title", title, "at most 80 letters")
    return Controls(keys, idle, float(fps), title)


def _keys(given: Any, width: int) -> dict[str, Action]:
    if not isinstance(given, dict) or len(given) > MAX_KEYS:
        raise _wrong("controls", given, f"at most {MAX_KEYS} names of keys with their actions")
    for key in given:
        if not 1 <= len(key) <= 32 or not key.isprintable():
            raise _wrong("name of a key", key, "1 to 32 letters")
    return {key: _vector(key, action, width) for key, action in given.items()}


def _vector(name: str, given: Any, width: int) -> Action:
    is_list = isinstance(given, list) and len(given) == width
    if not is_list or not all(_is_number(x) and abs(x) <= _MAX_NUMBER for x in given):
        raise _wrong(name, given, f"{width} numbers within {_MAX_NUMBER:.0f}")
    return tuple(float(x) for x in given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(what: str, got: Any, allowed: str) -> ModelError:
    return ModelError(explain(f"{CONTROLS}: {what}", got=str(got)[:60], allowed=allowed))


@dataclass(frozen=True)
class Starts:
    """Moments a world can start from.

    Attributes:
        frames: uint8 [starts, frames, height, width, 3].
        actions: float32 [starts, frames, numbers]: what led to each frame.
    """

    frames: NDArray[np.uint8]
    actions: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.frames)


def read_starts(folder: Path, width: int, size: tuple[int, int] | None = None) -> Starts | None:
    """Read where a world can start.

    Args:
        folder: The pipeline's folder.
        width: Numbers an action is made of.
        size: Height and width of its frames; None takes any.

    Returns:
        The starts, or None where the folder has none.

    Raises:
        ModelError: Arrays of another shape or type, too many starts, or a damaged archive.
    """
    path = folder / STARTS
    if not path.is_file():
        return None
    check_starts(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            frames, actions = archive["frames"], archive["actions"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(explain(f"{STARTS} cannot be read")) from error
    starts, size = frames.shape[:2], size or frames.shape[2:4]
    fits = frames.ndim == 5 and frames.dtype == np.uint8 and frames.shape[2:] == (*size, 3)
    if not fits or not 1 <= starts[0] <= MAX_STARTS or not starts[1]:
        allowed = f"uint8 (1 to {MAX_STARTS}, frames, {', '.join(map(str, size))}, 3)"
        got = f"{frames.dtype} {frames.shape}"
        raise ModelError(explain(f"{STARTS}: frames", got=got, allowed=allowed))
    fits = actions.shape == (*starts, width) and actions.dtype == np.float32
    if not fits or not np.isfinite(actions).all():
        allowed = f"finite float32 {(*starts, width)}"
        got = f"{actions.dtype} {actions.shape}"
        raise ModelError(explain(f"{STARTS}: actions", got=got, allowed=allowed))
    return Starts(frames, actions)
