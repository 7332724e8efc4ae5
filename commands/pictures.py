"""Pictures of what `inspect` computes, drawn with Pillow alone.

What it does not know: recipes. It sees plain records and a boolean matrix.

Invariants: one cell is one token pair or one (row, position); nothing is averaged away, a large
view only gets smaller cells.
"""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

_MAX_SIDE = 1024
_MARGIN = 28
_INK = (24, 28, 36)
_PAPER = (250, 250, 247)
_SEES = (38, 84, 124)
_BLIND = (232, 233, 228)
_LINE = (255, 176, 46)
_COPY_COLOURS = ((86, 130, 89), (190, 90, 70), (120, 100, 170))  # clean, noisy, draft
_PALETTE = ((38, 84, 124), (86, 130, 89), (190, 90, 70), (214, 154, 45), (120, 100, 170))


def picture(what: str, rows: list[dict[str, Any]], mask: Any = None) -> Image.Image:
    """Draw one view.

    Args:
        what: layout, mask, schedule or cache.
        rows: Records of that view.
        mask: Boolean matrix [queries, keys] when the view is the mask.

    Returns:
        RGB picture, at most about 1100 pixels wide.
    """
    if what == "mask":
        return mask_picture(mask, rows)
    if what == "layout":
        return layout_picture(rows)
    if what == "schedule":
        return schedule_picture(rows)
    return log_picture(rows)


def _cell(count: int) -> int:
    return max(1, min(24, _MAX_SIDE // max(1, count)))


def _canvas(columns: int, lines: int, cell: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    size = (2 * _MARGIN + columns * cell, 2 * _MARGIN + lines * cell)
    image = Image.new("RGB", (max(size[0], 320), size[1]), _PAPER)
    return image, ImageDraw.Draw(image)


def mask_picture(mask: Any, tokens: list[dict[str, Any]]) -> Image.Image:
    """Draw a mask: dark = the query (row) sees the key (column); lines part blocks and copies."""
    count = len(mask)
    cell = _cell(count)
    image, draw = _canvas(count, count, cell)
    colours = [[_SEES if sees else _BLIND for sees in line] for line in mask]
    flat = [colour for line in colours for colour in line]
    grid = Image.new("RGB", (count, count))
    grid.putdata(flat)
    size = (count * cell, count * cell)
    image.paste(grid.resize(size, Image.Resampling.NEAREST), (_MARGIN, _MARGIN))
    for i in range(1, count):
        before, here = tokens[i - 1], tokens[i]
        if (before["block"], before["copy"]) != (here["block"], here["copy"]) and cell >= 3:
            at = _MARGIN + i * cell
            is_copy = before["copy"] != here["copy"]
            width = 2 if is_copy else 1
            draw.line((_MARGIN, at, _MARGIN + size[0], at), fill=_LINE, width=width)
            draw.line((at, _MARGIN, at, _MARGIN + size[1]), fill=_LINE, width=width)
    draw.text(
        (_MARGIN, 8), f"{count} tokens: rows ask, columns answer; blue = may attend", fill=_INK
    )
    return image


def layout_picture(tokens: list[dict[str, Any]]) -> Image.Image:
    """Draw a layout: one column per token; rows copy, block and order."""
    cell = _cell(len(tokens))
    names = ("copy", "block", "order")
    height = 24
    image = Image.new(
        "RGB",
        (max(2 * _MARGIN + len(tokens) * cell, 320), 2 * _MARGIN + len(names) * height),
        _PAPER,
    )
    draw = ImageDraw.Draw(image)
    top_order = max([abs(int(token["order"])) for token in tokens], default=1) or 1
    for x, token in enumerate(tokens):
        shade = int(230 - 200 * abs(int(token["order"])) / top_order)
        colours = (
            _COPY_COLOURS[int(token["copy"]) % len(_COPY_COLOURS)],
            _PALETTE[int(token["block"]) % len(_PALETTE)],
            (shade, shade, shade),
        )
        for y, colour in enumerate(colours):
            left, top = _MARGIN + x * cell, _MARGIN + y * height
            draw.rectangle((left, top, left + cell - 1, top + height - 3), fill=colour)
    draw.text((_MARGIN, 8), f"{len(tokens)} tokens; rows: {', '.join(names)}", fill=_INK)
    return image


def schedule_picture(rows: list[dict[str, Any]]) -> Image.Image:
    """Draw a schedule: one line per row; pale = predicted, dark = accepted in this row."""
    columns = 1 + max([max(_positions(row), default=0) for row in rows], default=0)
    cell = _cell(max(columns, len(rows)))
    image, draw = _canvas(columns, len(rows), cell)
    for y, row in enumerate(rows):
        for key, colour in (("predicted", _BLIND), ("accepted", _SEES)):
            for x in row.get(key) or ():
                left, top = _MARGIN + int(x) * cell, _MARGIN + y * cell
                draw.rectangle((left, top, left + cell - 1, top + cell - 1), fill=colour)
    draw.text((_MARGIN, 8), f"{len(rows)} rows; pale = predicted, blue = accepted", fill=_INK)
    return image


def _positions(row: dict[str, Any]) -> Sequence[int]:
    return [int(x) for key in ("predicted", "accepted") for x in row.get(key) or ()]


def log_picture(events: list[dict[str, Any]], line_height: int = 14) -> Image.Image:
    """Draw a log as lines of text, one per event (the first 400)."""
    lines = [
        "  ".join(f"{key}={_short(value)}" for key, value in event.items())
        for event in events[:400]
    ]
    width = 2 * _MARGIN + 7 * max([len(line) for line in lines], default=40)
    size = (min(max(width, 320), 1400), 2 * _MARGIN + line_height * len(lines))
    image = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(image)
    for i, line in enumerate(lines):
        draw.text((_MARGIN, _MARGIN + i * line_height), line, fill=_INK)
    return image


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."
