"""Where output goes and how commands speak: stderr for people, stdout for results.

What it does not know: what is drawn. Nothing here loads torch.

Invariants: a wrong or unwritable output place is refused before a model loads; an existing file
that holds something else is never replaced without `--overwrite`.
"""

import json
import secrets
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import ResourceError, UsageError
from ..core.messages import explain, one_line
from ..pipelines.media import file_name, is_done
from ..pipelines.params import Params

DEFAULT_FOLDER = "outputs"


def note(text: str) -> None:
    """Tell the person at the terminal something; stdout stays clean for results."""
    print(one_line(text), file=sys.stderr)


def say(text: str) -> None:
    """Print one line of result."""
    print(text)


def emit_json(value: Any) -> None:
    """Print a JSON result."""
    print(json.dumps(value, indent=2, allow_nan=False, default=str))


def pick_seed(seed: int) -> int:
    """Return the seed, or for -1 a random one of 32 bits (short enough to type again)."""
    if seed != -1:
        return seed
    chosen = secrets.randbits(32)
    note(f"seed {chosen}")
    return chosen


@dataclass(frozen=True)
class Target:
    """Where pictures and videos go.

    Attributes:
        folder: Folder of all files.
        file: The one file, or None when names are made from prompt and seed.
        extension: Of names that are made, without the dot.
    """

    folder: Path
    file: Path | None = None
    extension: str = "png"

    def path(self, index: int, params: Params) -> Path:
        """Name output `index` of the run."""
        name = file_name(index, params.prompt, params.seed, self.extension)
        return self.file or self.folder / name


def plan(out: str | None, num: int, extensions: Sequence[str] = (".png",)) -> Target:
    """Decide whether --out is a file or a folder.

    Args:
        out: The flag's text; None means the default folder.
        num: Number of pictures or videos.
        extensions: Of the files that can be written, with the dot; the first is the default.

    Raises:
        UsageError: Empty, an unknown extension, a file for several pictures, or a file where a
            folder is needed and the reverse.
    """
    text = DEFAULT_FOLDER if out is None else out
    first, legal = extensions[0], ", ".join(extensions)
    if not text.strip() or "\0" in text:
        raise UsageError(explain("--out", got=text, allowed=f"a {first} file or a folder"))
    path = Path(text).expanduser()
    if path.is_dir() or not path.suffix:
        if path.suffix.lower() in extensions:
            raise UsageError(explain("--out names a folder", got=text, allowed="a file"))
        return Target(folder(path), extension=first[1:])
    if path.suffix.lower() not in extensions:
        raise UsageError(
            explain("--out extension", got=path.suffix, allowed=f"{legal}, or a folder", hint=first)
        )
    if num > 1:
        raise UsageError(
            explain(f"--out is one file for --num {num}", got=text, hint="--out with a folder")
        )
    return Target(folder(path.parent), folder(path.parent) / path.name)


def folder(path: Path) -> Path:
    """Resolve a folder once, say so when a link leads elsewhere, refuse files on the way.

    Raises:
        UsageError: The path, or a part of it, is a file.
    """
    resolved = path.resolve()
    for part in (resolved, *resolved.parents):
        if part.exists():
            if not part.is_dir():
                raise UsageError(explain("--out leads through a file", got=part.name))
            break
    if path.is_symlink():
        note(f"output folder {path} is a link to {resolved}")
    return resolved


def ensure_writable(path: Path) -> None:
    """Create a folder and write a byte there, so that failure comes before the work.

    Raises:
        ResourceError: It cannot be created or written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as stream:
            stream.write(b"x")
    except OSError as error:
        raise ResourceError(
            explain(f"cannot write to folder {path}: {error.strerror}", hint="another --out")
        ) from error


def refuse_overwriting(pairs: Iterable[tuple[Path, str]], *, overwrite: bool) -> None:
    """Refuse when a name is taken by anything but the very same picture.

    Args:
        pairs: Path and key of each picture to come.
        overwrite: The user allowed it.

    Raises:
        UsageError: A file would be lost.
    """
    for path, key in pairs:
        if path.is_dir():
            raise UsageError(explain("output name is a folder", got=path.name))
        is_taken = path.exists() or path.with_suffix(".json").exists()
        if is_taken and not overwrite and not is_done(path, key):
            raise UsageError(
                explain(
                    "output exists and holds something else",
                    got=path.name,
                    hint="--overwrite or another --out",
                )
            )


def refuse_flags(args: Any, names: Iterable[str], command: str) -> None:
    """Refuse flags that a command's other kind takes.

    Args:
        args: Parsed flags.
        names: Fields that must have been left alone.
        command: Shown in the message.

    Raises:
        UsageError: One of them was given.
    """
    for name in names:
        if getattr(args, name) != type(args).__dataclass_fields__[name].default:
            flag = "--" + name.removesuffix("_frames").replace("_", "-")
            raise UsageError(
                explain(f"{flag} is no flag of {command}", hint=f"{command} without it")
            )
