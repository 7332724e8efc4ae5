"""What happens on every click: checks, runs and the texts that answer.

Errors become one line for the visitor; whatever we did not foresee becomes a number that also
stands in the log beside its traceback.
"""

import logging
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html import escape, unescape
from typing import Any

import gradio as gr

from ..core.errors import BlockloomError, UsageError
from ..pipelines.media import pixels_sha256
from . import drawing, inside, libraries, views, wishes
from .session import Finished, Session
from .shelf import Shelf

log = logging.getLogger(__name__)
IDLE = "Type what you would like to see and press Enter."
SAVE = "Save as PNG, with its settings inside"
SAVE_STOPPED = "Save as PNG"


@contextmanager
def answered() -> Iterator[None]:
    """Turn any error into one line on the page."""
    try:
        yield
    except BlockloomError as error:
        # The page renders the text of an error as HTML.
        raise gr.Error(escape(error.message), print_exception=False) from None
    except gr.Error:
        raise
    except Exception as error:  # whatever it is, the visitor gets a number and not a traceback
        number = secrets.token_hex(4)
        log.exception("error %s", number)
        is_memory = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
        text = "not enough memory; try fewer pictures" if is_memory else "something broke here"
        raise gr.Error(f"{text} (error {number})", print_exception=False) from None


class Handlers:
    """The page's handlers; they hold the shelf of models and nothing about any visitor."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf

    # -- drawing ------------------------------------------------------------------------------

    def ask(self, session: Session) -> list[Any]:
        """Show at once that the wish was heard, and number it; the queue may be busy.

        The session goes out again because Gradio counts the time of what was put out only.
        """
        return [session, views.placeholder("waiting", "Waiting for a free turn …"), session.ask()]

    def draw(
        self, session: Session, run: Any, prompt: Any, style: Any, seed: Any, number: Any,
        steps: Any, guidance: Any, model: Any,
    ) -> Iterator[list[Any]]:  # fmt: skip
        """Draw pictures from nothing; yields updates of canvas, gallery, download and choice."""
        given = {"prompt": prompt, "style": style, "seed": seed, "number": number}
        given |= {"steps": steps, "guidance": guidance}
        yield from self._run(session, run, model, given, is_edit=False)

    def redraw(
        self, session: Session, run: Any, prompt: Any, style: Any, seed: Any, region: Any,
        steps: Any, guidance: Any, model: Any,
    ) -> Iterator[list[Any]]:  # fmt: skip
        """Redraw one half of the chosen picture and keep the other."""
        given = {"prompt": prompt, "style": style, "seed": seed, "number": 1, "region": region}
        given |= {"steps": steps, "guidance": guidance}
        yield from self._run(session, run, model, given, is_edit=True)

    def _run(
        self, session: Session, run: Any, model: Any, given: dict[str, Any], *, is_edit: bool
    ) -> Iterator[list[Any]]:
        # Whoever talks to the server without the page sends no number.
        is_known = type(run) is int and 0 < run <= session.asked
        run = run if is_known else session.ask()
        try:
            with answered():
                yield from self._frames(session, run, model, given, is_edit=is_edit)
        except gr.Error as error:
            line = f"Nothing was drawn: {unescape(error.message)}"
            yield [views.placeholder("failed", line), *_nothing()]
            raise
        finally:
            session.end(run)

    def _frames(
        self, session: Session, run: int, model: Any, given: dict[str, Any], *, is_edit: bool
    ) -> Iterator[list[Any]]:
        """Check the wish, draw it, and keep what came out."""
        edited = _picture_to_edit(session) if is_edit else None
        choice = self._shelf.choice(model)
        pictures = wishes.wished_pictures(model=choice.name, **given)
        if edited is not None:
            digest = pixels_sha256(edited.image)
            pictures = [replace(params, input_sha256=digest) for params in pictures]
        yield [views.placeholder("loading", "Getting ready …"), *_nothing()]
        libraries.load()
        frames = drawing.draw(
            self._shelf.pipe(model), pictures, lambda: session.is_stopped(run),
            None if edited is None else edited.image,
        )  # fmt: skip
        for frame in frames:
            if frame.kind == "drawing":
                yield [views.canvas(frame), *_nothing()]
                continue
            for image, params in reversed(list(zip(frame.images, pictures, strict=False))):
                record = choice.record(params) if frame.kind == "done" else None
                session.keep(image, params, record)
            if frame.images:
                yield [views.canvas(frame), *_kept(session)]
            else:
                yield [views.placeholder("stopped", frame.line), *_nothing()]

    def stop(self, session: Session) -> None:
        """Stop this visitor's runs before their next row."""
        if not session.stop():
            gr.Info("Nothing is being drawn.", title="Stop")

    def choose(self, session: Session, event: gr.SelectData) -> list[Any]:
        """Choose a picture of the gallery to download or redraw."""
        with answered():
            chosen = session.choose(int(event.index))
        return _chosen(chosen)

    def recipe_defaults(self, model: Any) -> list[Any]:
        """Set the sliders to the recipe's own values."""
        with answered():
            steps, guidance = self._shelf.defaults(model)
        return [min(steps, wishes.MAX_STEPS), min(guidance, wishes.MAX_GUIDANCE)]

    # -- looking inside -----------------------------------------------------------------------

    def look(self, recipe: Any, length: Any, block: Any) -> list[str]:
        """Compute the second tab; what a recipe does not allow is said in place."""
        try:
            with answered():
                libraries.load()
                view = inside.look(str(recipe), wishes.text(length), str(block))
        except gr.Error as error:
            return [f'<div class="bl-notice">{error.message}</div>', "", "", ""]
        return [view.about, view.mask, view.order, view.log]


def _nothing() -> list[Any]:
    """Leave everything below the canvas as it is."""
    return [gr.skip()] * 5


def _kept(session: Session) -> list[Any]:
    """Show the session's pictures, newest first, and which one is chosen."""
    pictures = [(item.path, item.caption) for item in session.finished]
    below = [gr.update(visible=True), gr.update(value=pictures, selected_index=None)]
    return [*below, *_chosen(session.finished[0])]


def _chosen(chosen: Finished) -> list[Any]:
    label = SAVE if chosen.is_complete else SAVE_STOPPED
    return [
        gr.update(value=chosen.path, label=label, interactive=True),
        views.chosen(chosen.image, chosen.caption),
        gr.update(interactive=chosen.is_complete),
    ]


def _picture_to_edit(session: Session) -> Finished:
    if session.chosen is None:
        raise UsageError("there is no picture to redraw yet; draw one first")
    if not session.chosen.is_complete:
        raise UsageError("this picture was stopped and has holes; choose a finished one")
    return session.chosen
