"""What one visitor has: finished pictures, a choice among them, and a stop flag per run.

What it does not know: other visitors. Each browser session owns one `Session`; nothing here is
shared, so a stop or a picture can never reach somebody else.
"""

import shutil
import tempfile
import weakref
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..core.errors import UsageError
from ..pipelines.media import file_name, save_png
from ..pipelines.params import ImageParams, Record

MAX_KEPT = 60
"""Finished pictures a visitor keeps; the oldest go first."""


@dataclass
class Finished:
    """One picture and how it came about.

    Attributes:
        image: RGB pixels at the model's own size.
        params: Its parameters.
        path: PNG file with the record inside; a picture that was stopped carries no record,
            because its parameters would draw something else.
        is_complete: False when the run was stopped first.
    """

    image: Image.Image
    params: ImageParams
    path: str
    is_complete: bool

    @property
    def caption(self) -> str:
        """Prompt and seed, and whether it was stopped or edited."""
        style = f", {self.params.style}" if self.params.style else ""
        edited = f" · {self.params.region} half redrawn" if self.params.region else ""
        stopped = "" if self.is_complete else " · stopped"
        words = self.params.prompt
        words = words if len(words) <= 60 else words[:57] + "..."
        return f"{words}{style} · seed {self.params.seed}{edited}{stopped}"


@dataclass
class Session:
    """One visitor. Runs are numbered; stopping names the last number asked for so far.

    The number travels with the wish, so a wish that a full queue turns away leaves no trace.
    """

    finished: list[Finished] = field(default_factory=list)
    chosen: Finished | None = None
    asked: int = 0
    stopped_up_to: int = 0
    folder: str | None = None
    made: int = 0
    _removal: weakref.finalize | None = field(default=None, repr=False)

    def ask(self) -> int:
        """Give a run that waits for its turn its number, from 1."""
        self.asked += 1
        return self.asked

    def stop(self) -> bool:
        """Stop what runs and what waits; returns whether there was anything."""
        was_busy = self.stopped_up_to < self.asked
        self.stopped_up_to = self.asked
        return was_busy

    def end(self, run: int) -> None:
        """Note that a run is over, so that a later stop finds nothing to do."""
        self.stopped_up_to = max(self.stopped_up_to, run)

    def is_stopped(self, run: int) -> bool:
        """Say whether a run was told to stop."""
        return run <= self.stopped_up_to

    def keep(self, image: Image.Image, params: ImageParams, record: Record | None) -> Finished:
        """Write a finished picture and put it first.

        Args:
            image: The picture.
            params: Its parameters.
            record: Goes into the file; None when the picture is not complete.
        """
        if self.folder is None:
            self.folder = tempfile.mkdtemp(prefix="blockloom-demo-")
            # Gradio forgets the sessions of long ago without a word; then, too, the files go.
            self._removal = weakref.finalize(self, shutil.rmtree, self.folder, True)
        path = Path(self.folder) / file_name(self.made, params.prompt, params.seed)
        self.made += 1
        save_png(image, path, record)
        path.with_suffix(".json").unlink(missing_ok=True)  # nobody can fetch a sidecar here
        self.chosen = Finished(image, params, str(path), record is not None)
        self.finished.insert(0, self.chosen)
        for old in self.finished[MAX_KEPT:]:
            Path(old.path).unlink(missing_ok=True)
        del self.finished[MAX_KEPT:]
        return self.chosen

    def choose(self, index: int) -> Finished:
        """Choose the picture to download or edit.

        Args:
            index: Place in the gallery, 0 = newest.

        Raises:
            UsageError: No picture there.
        """
        if not 0 <= index < len(self.finished):
            raise UsageError("that picture is gone; draw or choose another one")
        self.chosen = self.finished[index]
        return self.chosen

    def clear(self) -> None:
        """Stop everything and remove this visitor's files."""
        self.stop()
        if self._removal is not None:
            self._removal()
        self.finished, self.chosen, self.folder = [], None, None
