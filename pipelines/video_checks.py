"""What a caller says about a video, checked and put in the form the models take.

Every refusal is one line that names the nearest legal value. It runs no model.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional

from ..core.errors import UsageError, check_count, check_range, describe
from ..tokenizers.structure import structure_map
from .base import MAX_PROMPT
from .clip_frames import checked_frames, fit_frames, to_clip
from .world import action_vector

MAX_VIDEOS = 64
MAX_FRAMES = 1_000_000
_LIMITS = {"guidance_scale": (0.0, 100.0), "temperature": (0.0, 100.0)}


def check_numbers(given: dict[str, Any], copies: str = "num_videos_per_prompt") -> None:
    """Check the settings that are plain numbers.

    Args:
        given: Settings by name; None = the recipe's own.
        copies: Name of the setting that says how many are made per prompt.

    Raises:
        UsageError: one outside its range.
    """
    check_count(copies, given[copies], 1, MAX_VIDEOS)
    if given["num_inference_steps"] is not None:
        check_count("num_inference_steps", given["num_inference_steps"], 1, 1000)
    for name, (low, high) in _LIMITS.items():
        if given[name] is not None:
            check_range(name, given[name], low, high)


def prompt_plan(prompt: Any) -> list[list[str]]:
    """Turn what `prompt` may be into one list of texts per video.

    Args:
        prompt: A text; a list of texts, one per block of new frames; or a list of such lists, one
            per video.

    Raises:
        UsageError: anything else, an empty list, or a text that is too long.
    """
    legal = "text, a list of texts (one per block), or a list of such lists (one per video)"
    if isinstance(prompt, str):
        videos: list[Any] = [[prompt]]
    elif isinstance(prompt, list | tuple) and prompt:
        nested = [isinstance(part, list | tuple) for part in prompt]
        videos = list(prompt) if all(nested) else [list(prompt)]
    else:
        raise UsageError(describe("prompt", type(prompt).__name__, legal))
    for texts in videos:
        if not texts:
            raise UsageError(describe("prompts of a video", "none", "at least one text"))
        for text in texts:
            if not isinstance(text, str):
                raise UsageError(describe("prompt item", type(text).__name__, legal))
            if len(text) > MAX_PROMPT:
                most = f"at most {MAX_PROMPT} characters"
                raise UsageError(describe("prompt length", len(text), most))
    return [list(texts) for texts in videos]


def first_frames(
    image: Any, video: Any, videos: int, size: tuple[int, int]
) -> list[NDArray[np.uint8]] | None:
    """Read what a video starts with.

    Args:
        image: A picture or uint8 [height, width, 3]; a list has one per video.
        video: uint8 [frames, height, width, 3], or [videos, frames, height, width, 3].
        videos: How many videos are made.
        size: Height and width of the model's frames; others are resampled.

    Returns:
        Frames uint8 [frames, height, width, 3] for all videos (one entry) or one entry each; None
        where nothing is given.

    Raises:
        UsageError: both given, another number of them, or something that is no picture.
    """
    if image is not None and video is not None:
        raise UsageError("image and video both give first frames; pass one of them")
    if image is not None:
        images = list(image) if isinstance(image, list | tuple) else [image]
        clips = [checked_frames("image", _picture(one)[None]) for one in images]
    elif video is not None:
        is_batch = isinstance(video, np.ndarray) and video.ndim == 5
        clips = [checked_frames("video", clip) for clip in (video if is_batch else [video])]
    else:
        return None
    if len(clips) not in (1, videos):
        raise UsageError(describe("number of first frames", len(clips), f"1 or {videos}"))
    return [fit_frames(clip, size) for clip in clips]


def structure_maps(
    structure: Any, videos: int, kind: str, size: tuple[int, int]
) -> Float[Tensor, "videos frames height width"] | None:
    """Read the structure that guides videos.

    Args:
        structure: uint8 [frames, height, width, 3] or a list of pictures, of which the map is
            taken; or maps, float [frames, height, width] in [0, 1]. One more axis in front has one
            per video.
        videos: How many videos are made.
        kind: The recipe's `condition.structure`; "none" = the model takes none.
        size: Height and width of the model's frames; others are resampled.

    Raises:
        UsageError: missing, unwanted, another number of them, or something that is neither.
    """
    if kind == "none" and structure is not None:
        raise UsageError("this model takes no structure; leave it out")
    if kind == "none":
        return None
    if structure is None:
        raise UsageError(
            f"this model is guided by structure ({kind}); give a clip of as many frames, or maps"
        )
    array = structure if isinstance(structure, np.ndarray | Tensor) else None
    if isinstance(array, Tensor) or (array is not None and array.dtype.kind == "f"):
        maps = _maps(torch.as_tensor(array, dtype=torch.float32), size)
    else:
        is_batch = array is not None and array.ndim == 5
        clips = [checked_frames("structure", c) for c in (structure if is_batch else [structure])]
        pixels = torch.cat([to_clip(fit_frames(clip, size)) for clip in clips])
        maps = structure_map(kind, pixels)
    if len(maps) not in (1, videos):
        raise UsageError(describe("number of structures", len(maps), f"1 or {videos}"))
    return maps.expand(videos, -1, -1, -1)


def _maps(maps: Tensor, size: tuple[int, int]) -> Float[Tensor, "videos frames height width"]:
    """Check maps and bring them to a model's size by areas."""
    is_legal = maps.ndim in (3, 4) and 0 not in maps.shape
    if not is_legal or not bool(((maps >= 0) & (maps <= 1)).all()):
        legal = "numbers in [0, 1] (frames, height, width)"
        raise UsageError(describe("structure", tuple(maps.shape), legal))
    maps = maps[None] if maps.ndim == 3 else maps
    same = tuple(maps.shape[2:]) == size
    return maps if same else functional.adaptive_avg_pool2d(maps, size)


def _picture(image: Any) -> NDArray[np.uint8]:
    if isinstance(image, Image.Image):
        return np.asarray(image.convert("RGB"))
    return np.asarray(image)


def near_counts(tokenizer: Any, per_block: int, count: int) -> list[int]:
    """List the legal numbers of frames nearest to one: itself, or the ones below and above.

    Args:
        tokenizer: Says which numbers of frames its steps fill (often 4n + 1).
        per_block: Latent frames the model makes together; their number must be a multiple.
        count: The number asked about.
    """
    first, step = tokenizer.first_frames, tokenizer.step_frames

    def fits(steps: int) -> bool:
        latents = tokenizer.first_latents + steps * tokenizer.step_latents
        return latents % per_block == 0

    at = (count - first) / step
    low = next((n for n in range(math.floor(at), -1, -1) if fits(n)), None)
    start = max(0, math.ceil(at))
    high = next((n for n in range(start, start + per_block + 1) if fits(n)), None)
    return sorted({first + n * step for n in (low, high) if n is not None})


def check_frames(name: str, tokenizer: Any, per_block: int, count: int, above: int = 0) -> None:
    """Check a number of frames.

    Args:
        name: How the message calls it.
        tokenizer: As in `near_counts`.
        per_block: As in `near_counts`.
        count: The number.
        above: It must be more than this many, which are given.

    Raises:
        UsageError: Not legal; the message names the nearest legal numbers.
    """
    if isinstance(count, bool) or not isinstance(count, int):
        raise UsageError(describe(name, count, "a whole number"))
    near = near_counts(tokenizer, per_block, min(max(count, above + 1), MAX_FRAMES))
    if near == [count]:
        return
    step = tokenizer.step_frames * per_block // math.gcd(per_block, tokenizer.step_latents)
    rest = near[-1] % step
    form = "whole numbers" if step == 1 else f"{step}n" + (f"+{rest}" if rest else "")
    more = f" above the {above} given" if above else ""
    near = [number for number in near if number > above] or near
    raise UsageError(f"{name} is {count}; legal {form}{more}; try {' or '.join(map(str, near))}")


def told_actions(actions: Any, videos: int, latents: int, given: int, width: int) -> Tensor | None:
    """Put actions in the form the models take.

    Args:
        actions: Per latent frame `width` numbers, the number of the one that is 1, or None for
            nothing; [videos, latents, width] for several videos. Those of given frames may be left
            out. None = nothing is done at all.
        videos: How many videos.
        latents: Latent frames, the given ones included.
        given: Latent frames that are given.
        width: Numbers an action is made of; 0 = the model takes none.

    Returns:
        float32 [videos, latents, width]; None for models that take none.

    Raises:
        UsageError: unwanted, another count, or an action the model does not know.
    """
    if not width:
        if actions is not None:
            raise UsageError("this model takes no actions; leave them out")
        return None
    told = torch.zeros(videos, latents, width)
    if actions is None:
        return told
    is_batch = isinstance(actions, np.ndarray | Tensor) and actions.ndim == 3
    rows = list(actions) if is_batch else [actions] * videos
    if len(rows) != videos:
        raise UsageError(describe("number of action lists", len(rows), str(videos)))
    for row, taken in zip(told, rows, strict=True):
        _tell(row, list(taken), given, width)
    return told


def _tell(row: Tensor, taken: Sequence[Any], given: int, width: int) -> None:
    latents = len(row)
    if len(taken) not in (latents, latents - given):
        legal = f"{latents} (one per latent frame)" + (f" or {latents - given}" if given else "")
        raise UsageError(describe("number of actions", len(taken), legal))
    for place, action in enumerate(taken, latents - len(taken)):
        if action is not None:
            row[place] = action_vector(action, width)
