"""HTML of the moving parts: the canvas with its progress bar, notices and tables.

Invariants: every text is escaped; pictures stand inside the page as data, so nothing is fetched
from anywhere and nothing lands on disk.
"""

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from typing import Any

from PIL import Image

from .drawing import Frame

CANVAS_PIXELS = 384


def data_uri(image: Image.Image, side: int | None = None) -> str:
    """Write a picture into the page.

    Args:
        image: Any picture.
        side: Width in pixels to enlarge to, or None to leave it. Smoothly, but for pictures of so
            few pixels that smoothing would invent halos: those show their pixels.
    """
    if side is not None and image.width < side:
        height = round(image.height * side / image.width)
        few = image.width * 8 < side
        how = Image.Resampling.NEAREST if few else Image.Resampling.LANCZOS
        image = image.resize((side, height), how)
    buffer = BytesIO()
    image.save(buffer, format="PNG", compress_level=3)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def gif_uri(frames: Sequence[Image.Image], milliseconds: Sequence[int]) -> str:
    """Write an endless animation into the page.

    Args:
        frames: Pictures of one size.
        milliseconds: How long each one stands.
    """
    buffer = BytesIO()
    frames[0].save(
        buffer, format="GIF", save_all=True, append_images=list(frames[1:]),
        duration=list(milliseconds), loop=0, optimize=False,
    )  # fmt: skip
    return "data:image/gif;base64," + base64.b64encode(buffer.getvalue()).decode()


def canvas(frame: Frame) -> str:
    """Show a frame: its pictures in a square, the share of rows done, and where it is."""
    columns = max(1, next(c for c in range(1, 100) if c * c >= len(frame.images)))
    side = CANVAS_PIXELS // columns
    cells = "".join(
        f'<img src="{data_uri(image, side)}" alt="picture {k}">'
        for k, image in enumerate(frame.images, 1)
    )
    grid = f'<div class="bl-grid" style="--columns:{columns}">{cells}</div>'
    return _frame(frame.kind, grid, frame.line, frame.done, frame.total)


def placeholder(kind: str, line: str) -> str:
    """Show an empty canvas.

    Args:
        kind: idle, waiting, loading or failed.
        line: What it waits for.
    """
    return _frame(kind, '<div class="bl-grid bl-empty"></div>', line, 0, 1)


def _frame(kind: str, grid: str, line: str, done: int, total: int) -> str:
    percent = 100 * done / max(total, 1)
    return (
        f'<div class="bl-canvas" data-kind="{escape(kind)}">{grid}'
        f'<div class="bl-bar" role="progressbar" aria-valuemin="0" aria-valuemax="{total}" '
        f'aria-valuenow="{done}"><div style="width:{percent:.2f}%"></div></div>'
        f'<div class="bl-line" aria-live="polite">{escape(line)}</div></div>'
    )


def notice(text: str) -> str:
    """Show one calm paragraph in a box."""
    return f'<div class="bl-notice">{escape(text)}</div>'


def paragraph(text: str) -> str:
    """Show an explanation."""
    return f'<p class="bl-text">{escape(text)}</p>'


def chosen(image: Image.Image, caption: str) -> str:
    """Show the picture that can be saved or redrawn."""
    thumbnail = f'<img src="{data_uri(image, 144)}" alt="chosen picture">'
    return f'<div class="bl-chosen">{thumbnail}<span>{escape(caption)}</span></div>'


def picture(uri: str, alt: str) -> str:
    """Show a picture at its own size, or smaller where the page is narrow."""
    return f'<img class="bl-picture" src="{uri}" alt="{escape(alt)}">'


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Show rows of numbers and words."""
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        '<div class="bl-scroll"><table class="bl-table">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
