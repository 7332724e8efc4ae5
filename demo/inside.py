"""What the second tab shows of a recipe: its mask, its decode order as an animation, its cache log.

What it does not know: models. Everything follows from the recipe, with seeded random scores where
a model's confidence would decide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..commands import values
from ..commands.pictures import mask_picture
from ..core.errors import UsageError
from ..core.recipe import Recipe, list_recipes, load_recipe
from . import views

OWN_BLOCK = "recipe's own"
BLOCKS = (OWN_BLOCK, "token", "row", "all", "2", "3", "4", "6", "8")
MIN_LENGTH, MAX_LENGTH = 4, 64
_MAX_FRAMES = 150
_MAX_LOG = 300
_PAPER, _INK, _EMPTY = (250, 250, 247), (24, 28, 36), (232, 233, 228)
_EARLY, _LATE, _FRESH, _NOISE = (166, 199, 219), (22, 58, 92), (255, 176, 46), (205, 190, 160)


@dataclass(frozen=True)
class Inside:
    """Four pieces of HTML."""

    about: str
    mask: str
    order: str
    log: str


def recipes() -> list[str]:
    """Names of all image recipes."""
    return list_recipes("image")


@lru_cache(maxsize=64)
def look(name: str, length: int | str, block: str) -> Inside:
    """Compute everything the tab shows.

    Args:
        name: A recipe, as `recipes` lists them.
        length: Picture tokens, 4..64.
        block: One of `BLOCKS`.

    Raises:
        UsageError: A value outside its range.
        ModelError: The recipe does not allow that block.
    """
    from ..core import inspection

    try:
        values.one_of("recipe", tuple(recipes()))(name)
        count = values.whole("length", MIN_LENGTH, MAX_LENGTH)(str(length))
        values.one_of("block", BLOCKS)(block)
    except values.FlagError as error:
        raise UsageError(str(error)) from None
    recipe = load_recipe(name, [] if block == OWN_BLOCK else [f"layout.block={block}"])
    mask, tokens = inspection.mask_matrix(recipe, count)
    rows = inspection.schedule_rows(recipe, count)
    grid = inspection.grid_of(count)
    frames, times = order_frames(rows, grid, recipe.layout.text_tokens)
    return Inside(
        about=_about(recipe),
        mask=views.picture(views.data_uri(_cropped(mask_picture(mask, tokens))), f"mask of {name}")
        + views.paragraph(_mask_words(recipe, tokens)),
        order=views.picture(views.gif_uri(frames, times), f"decode order of {name}")
        + views.paragraph(_order_words(recipe, rows)),
        log=_log(recipe, inspection.cache_log(recipe, count)),
    )


# -- words ------------------------------------------------------------------------------------


def _about(recipe: Recipe) -> str:
    exact = (
        "Its cache is exact: cached and recomputed pictures are equal."
        if recipe.cache.exact
        else "It keeps no exact cache."
    )
    differs = recipe.system.differs
    return (
        views.paragraph(f"{recipe.system.title}. {exact}")
        + f'<p class="bl-text bl-quiet">Here, unlike the paper: {views.escape(differs)}.</p>'
    )


def _cropped(mask: Image.Image) -> Image.Image:
    """Cut off the margin with its line of text, which the page says in larger letters."""
    edge = 22
    return mask.crop((edge, edge, mask.height - edge, mask.height - edge))


def _mask_words(recipe: Recipe, tokens: Sequence[dict[str, Any]]) -> str:
    prompt = " The first rows are the words of the prompt." if tokens[0]["block"] < 0 else ""
    second = (
        "An orange line parts two blocks; the thick one parts the finished copy of the picture "
        "(first half) from the copy that is being drawn (second half), which sees only its own "
        "block and finished ones."
        if recipe.layout.copies == 2
        else "An orange line parts two blocks: what lies to the right of a block is its future."
        if len({token["block"] for token in tokens if token["block"] >= 0}) > 1
        else "Nothing is hidden from anything: the whole picture is one block."
    )
    return (
        "Each line is a token that asks and each column a token that may answer: blue means it "
        f"may look there. {second}{prompt}"
    )


def _order_words(recipe: Recipe, rows: Sequence[dict[str, Any]]) -> str:
    blocks = 1 + max(row["block"] for row in rows)
    total = f"{len(rows)} steps in {blocks} {'block' if blocks == 1 else 'blocks'}"
    if recipe.head.kind == "patch":
        return (
            f"Every square is a piece of the picture. A block starts as noise (sand), loses noise "
            f"step by step, and is fixed (orange, then blue) in its last step: {total}."
        )
    decides = recipe.schedule.order not in ("raster", "halton", "random") and blocks < len(rows)
    scores = (
        " Where a model would put the surest squares first, seeded random scores decide here."
        if decides
        else ""
    )
    return (
        "Every square is a piece of the picture and lights up orange in the step that fixes it; "
        f"the number is that step, {total}.{scores}"
    )


def _log(recipe: Recipe, log: Sequence[dict[str, Any]]) -> str:
    if not log:
        return views.paragraph(
            "This recipe keeps no cache. Any token may still change how all others look, so every "
            "step computes the whole picture again."
        )
    words = views.paragraph(
        "What a step has computed about finished tokens is written down once and read by every "
        "later step, instead of being computed again. A write becomes permanent with its commit."
    )
    columns = ("", "what", "tokens", "which", "in the cache", "permanent")
    lines = [
        (k, entry["op"], _count(entry.get("tokens")), _span(entry.get("source")),
         _count(entry.get("written")), _count(entry.get("committed")))
        for k, entry in enumerate(log[:_MAX_LOG], 1)
    ]  # fmt: skip
    return words + views.table(columns, lines)


def _count(value: Any) -> str:
    return "" if value is None else str(value[0] if isinstance(value, list) else value)


def _span(sources: Sequence[int] | None) -> str:
    """Name tokens in few words: the prompt, one token, a run, or a list."""
    if not sources:
        return ""
    known = [source for source in sources if source >= 0]
    prompt = ["prompt"] if len(known) < len(sources) else []
    if len(known) > 2 and known == list(range(known[0], known[-1] + 1)):
        return ", ".join([*prompt, f"{known[0]} to {known[-1]}"])
    return ", ".join([*prompt, *map(str, known)])


# -- animation --------------------------------------------------------------------------------


def order_frames(
    rows: Sequence[dict[str, Any]], grid: tuple[int, int], text_tokens: int = 0
) -> tuple[list[Image.Image], list[int]]:
    """Draw one picture per step of the schedule.

    Args:
        rows: Records of `schedule_rows`.
        grid: Height and width in tokens.
        text_tokens: Caption slots in front of the picture's; they stand in a strip above it.

    Returns:
        Frames of one size, and how long each stands in milliseconds.
    """
    places = _places(grid, text_tokens, 1 + max(max(row["predicted"]) for row in rows))
    taken: dict[int, int] = {}
    frames = []
    every = max(1, -(-len(rows) // _MAX_FRAMES))
    for step, row in enumerate(rows, 1):
        fresh = set(row["accepted"])
        taken |= dict.fromkeys(row["accepted"], step)
        if step % every == 0 or step == len(rows):
            noise = {} if fresh else dict.fromkeys(row["predicted"], row["level_next"])
            title = f"step {step} of {len(rows)}, block {row['block'] + 1}"
            frames.append(_order_frame(places, taken, fresh, noise, len(rows), title))
    pause = max(60, min(450, 7000 // len(frames)))
    return frames, [pause] * (len(frames) - 1) + [2500]


def _places(
    grid: tuple[int, int], text_tokens: int, slots: int
) -> dict[int, tuple[int, int, int, int]]:
    """Map data slots to boxes (left, top, right, bottom): caption strip, picture, then the rest."""
    height, width = grid
    cell = min(96, 384 // max(height, width))
    across, strip = max(1, width * cell // 20), 20
    boxes, top = {}, 34
    for slot in range(text_tokens):
        left, up = 12 + slot % across * strip, top + slot // across * strip
        boxes[slot] = (left, up, left + strip - 3, up + strip - 3)
    top += (-(-text_tokens // across) * strip + 8) if text_tokens else 0
    for k in range(height * width):
        left, up = 12 + k % width * cell, top + k // width * cell
        boxes[text_tokens + k] = (left, up, left + cell - 3, up + cell - 3)
    top += height * cell + 8
    for k, slot in enumerate(range(text_tokens + height * width, slots)):
        left, up = 12 + k % across * strip, top + k // across * strip
        boxes[slot] = (left, up, left + strip - 3, up + strip - 3)
    return boxes


def _order_frame(
    places: dict[int, tuple[int, int, int, int]],
    taken: dict[int, int],
    fresh: set[int],
    noise: dict[int, float],
    total: int,
    title: str,
) -> Image.Image:
    size = (max(b[2] for b in places.values()) + 12, max(b[3] for b in places.values()) + 12)
    image = Image.new("RGB", (max(size[0], 220), size[1]), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((12, 9), title, fill=_INK, font=ImageFont.load_default(14))
    for slot, box in places.items():
        side = box[2] - box[0]
        colour = _EMPTY
        if slot in noise:
            colour = _blend(_EARLY, _NOISE, noise[slot])
        if slot in taken:
            late = (taken[slot] - 1) / max(1, total - 1)
            colour = _FRESH if slot in fresh else _blend(_EARLY, _LATE, late)
        draw.rounded_rectangle(box, radius=min(5, side // 6), fill=colour)
        if slot in taken and side >= 14:
            ink = _INK if sum(colour) > 380 else _PAPER
            centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
            font = ImageFont.load_default(max(8, min(16, side // 3)))
            draw.text(centre, str(taken[slot]), fill=ink, font=font, anchor="mm")
    return image


def _blend(
    one: tuple[int, int, int], other: tuple[int, int, int], share: float
) -> tuple[int, int, int]:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue
