"""From what stands in the page's boxes to checked parameters of pictures.

What it does not know: models or browsers. Every value passes the same parsers as the command
line's flags, because a browser's own limits bind nobody who talks to the server directly.
"""

import secrets
from dataclasses import replace
from typing import Any

from ..commands import values
from ..core.errors import UsageError
from ..core.messages import explain
from ..pipelines.params import ImageParams

STYLES = ("noto", "blobmoji", "twemoji", "openmoji", "fluent-3d", "fluent-flat", "none")
MAX_PICTURES = 9
MAX_STEPS = 64
MAX_GUIDANCE = 10.0
EXAMPLES = (
    ("red apple", "noto"),
    ("grinning face", "fluent-3d"),
    ("cat face", "twemoji"),
    ("rainbow", "openmoji"),
    ("birthday cake", "blobmoji"),
)


def new_seed() -> str:
    """Throw the dice: 32 random bits, short enough to type again."""
    return str(secrets.randbits(32))


def text(value: Any) -> str:
    """Write a box's value the way a person would type it as a flag."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def wished_pictures(
    *,
    prompt: Any,
    style: Any,
    seed: Any,
    number: Any,
    steps: Any,
    guidance: Any,
    model: str,
    region: Any = None,
) -> list[ImageParams]:
    """Check everything and list one set of parameters per picture.

    Args:
        prompt: What to draw; not blank.
        style: One of `STYLES`; "none" adds no style words.
        seed: Whole number as text; blank or -1 throws the dice. Picture k has seed + k.
        number: Pictures, 1..9.
        steps: Rows per block, 1..64.
        guidance: Weight of the prompt, 0..10; 1 is off.
        model: A model's name, already checked.
        region: Half to redraw (left, right, top, bottom), or None for pictures from nothing.

    Raises:
        UsageError: A value outside its range, in one line that names the nearest legal one.
    """
    try:
        words = values.prompt(prompt if isinstance(prompt, str) else "").strip()
        if not words:
            raise UsageError(explain("the prompt is empty", hint=EXAMPLES[0][0]))
        chosen = values.one_of("style", STYLES)(text(style))
        first = values.whole("seed", 0, values.MAX_SEED, also=-1)(text(seed or "").strip() or "-1")
        count = values.whole("number of pictures", 1, MAX_PICTURES)(text(number))
        params = ImageParams(
            prompt=words,
            seed=secrets.randbits(32) if first == -1 else first,
            model=model,
            style=None if chosen == "none" else chosen,
            num_inference_steps=values.whole("steps", 1, MAX_STEPS)(text(steps)),
            guidance_scale=values.real("guidance", 0.0, MAX_GUIDANCE)(text(guidance)),
            region=None
            if region is None
            else values.one_of("part to redraw", values.REGIONS)(text(region)),
        )
    except values.FlagError as error:
        raise UsageError(str(error)) from None
    return [replace(params, seed=(params.seed + k) % 2**64) for k in range(count)]
