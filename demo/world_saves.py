"""Session files of worlds as they leave for a browser and come back from one.

They are what `WorldSession.save` writes, with the frame that was shown last beside it. What comes
back may hold anything: everything is checked, and a copy takes a step, before it is played.
"""

import base64
import json
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..core.errors import DataError, ResourceError
from ..core.messages import explain

MAX_SESSION_BYTES = 64 * 2**20
_SHOWN = "shown"


def write(session: Any, shown: NDArray[np.uint8] | None) -> bytes:
    """Write a session.

    Args:
        session: A `WorldSession`.
        shown: The frame that was shown last, uint8 [height, width, 3], if any.

    Returns:
        The file: safetensors, also read by `WorldPipeline.resume`.

    Raises:
        ResourceError: It is larger than what could be loaded again.
    """
    from safetensors import safe_open
    from safetensors.torch import save

    with tempfile.TemporaryDirectory(prefix="blockloom-world-") as folder:
        path = session.save(Path(folder) / "session.safetensors")
        with safe_open(path, "pt") as file:
            about = dict(file.metadata() or {})
            state = {name: file.get_tensor(name) for name in file.keys()}
    if shown is not None:
        about[_SHOWN] = base64.b64encode(png(shown)).decode()
    content = save(state, about)
    if len(content) > MAX_SESSION_BYTES:
        raise ResourceError(explain("this session is too large for a file from the page"))
    return content


def read(pipe: Any, path: Path) -> tuple[Any, NDArray[np.uint8] | None]:
    """Read a session and the frame that was shown last.

    Args:
        pipe: The `WorldPipeline` it was played on.
        path: The file; it may hold anything.

    Raises:
        DataError: Not a session of this model.
    """
    check_session(path)
    session = _resumed(pipe, path)
    return session, _shown(path, tuple(pipe.tokenizer.frame_size))


def png(frame: NDArray[np.uint8]) -> bytes:
    """Write a frame, uint8 [height, width, 3], as PNG."""
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


def check_session(path: Path) -> None:
    """Refuse settings in a session file that nobody could have played with.

    The file comes from a browser; `WorldPipeline.resume` trusts whoever calls it to know it.

    Raises:
        DataError: Not a session file, or with settings out of range.
    """
    from safetensors import SafetensorError, safe_open

    wrong = DataError("this file is no session of a world")
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["session"])
        prompt, steps, guidance = about["prompt"], about["steps"], about["guidance"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RecursionError):
        raise wrong from None
    is_count = type(steps) is int and 1 <= steps <= 64
    is_weight = type(guidance) in (int, float) and 0 <= guidance <= 20
    if not isinstance(prompt, str) or len(prompt) > 2000:
        raise wrong
    if not (steps is None or is_count) or not (guidance is None or is_weight):
        raise wrong


def _resumed(pipe: Any, path: Path) -> Any:
    """Resume a session and let a copy of it take a step: what cannot is refused here.

    Raises:
        DataError: Not a session of this model.
    """
    wrong = DataError("this file is no session of this model")
    try:
        session = pipe.resume(path)
        own, given = pipe.start().snapshot(), session.snapshot()
        for name, part in given.items():
            is_odd = name in own and own[name].dtype != part.dtype
            if is_odd or (part.is_floating_point() and not bool(part.isfinite().all())):
                raise wrong
        count = pipe.model.config.codebook_size
        codes = given["values"]
        if count and not bool(((codes >= 0) & (codes < count)).all()):
            raise wrong  # a graphics card would never recover from a code that does not exist
        session.fork().step()
    except (RuntimeError, IndexError, OverflowError, TypeError, ValueError, KeyError):
        raise wrong from None
    return session


def _shown(path: Path, size: tuple[int, ...]) -> NDArray[np.uint8] | None:
    """Read the frame that was shown last, if the file has a sound one."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(_SHOWN)
    if text is None or len(text) > 2**22:
        return None
    try:
        with Image.open(BytesIO(base64.b64decode(text, validate=True)), formats=("PNG",)) as image:
            if (image.height, image.width) != size:
                return None
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
