"""Frames that a video model draws after given ones, for many held-out beginnings at once.

`Beginnings` are pieces of held-out clips: frames that are given, frames that truly followed, and
the actions that led to each. A `Dream` goes on from them, frame by frame at constant memory, under
any actions. It measures nothing.

Invariant: what is drawn after a beginning depends on the beginning, its key, the seed and the
actions, not on which others are drawn beside it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor

from ..core.errors import DataError, UsageError, check_count
from ..core.sampling import item_generator
from ..models.generator import GenerativeModel
from ..models.live import LiveRollout
from .clip_stage import leading_actions
from .clips import ClipDataset

BATCH = 24
"""Beginnings that are drawn on side by side."""


@dataclass(frozen=True)
class Beginnings:
    """Pieces of clips, all equally long.

    Attributes:
        frames: uint8 [items, given + ahead, height, width, 3].
        actions: float32 [items, given + ahead, numbers], what led to every frame; None without.
        prompts: One per item.
        keys: One whole number per item; seeds its noise.
        given: Frames that are shown to the model.
    """

    frames: UInt8[Tensor, "items frames height width 3"]
    actions: Float[Tensor, "items frames numbers"] | None
    prompts: list[str]
    keys: list[int]
    given: int

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.frames)

    @property
    def future(self) -> UInt8[Tensor, "items ahead height width 3"]:
        """The frames that truly followed."""
        return self.frames[:, self.given :]

    @property
    def last(self) -> UInt8[Tensor, "items 1 height width 3"]:
        """The last given frame."""
        return self.frames[:, self.given - 1 : self.given]

    def take(self, rows: slice) -> "Beginnings":
        """Select some items."""
        actions = None if self.actions is None else self.actions[rows]
        return replace(
            self, frames=self.frames[rows], actions=actions, prompts=self.prompts[rows],
            keys=self.keys[rows],
        )  # fmt: skip


def given_frames(model: GenerativeModel, tokenizer: Any) -> int:
    """Return how many frames fill a model's window up to the block it draws.

    Raises:
        UsageError: A model without a window, or a tokenizer with several frames per latent frame.
    """
    if tokenizer.temporal_stride != 1:
        raise UsageError(
            f"eval draws frame after frame; tokenizer.temporal_stride = {tokenizer.temporal_stride}"
            ", try 1"
        )
    window, live = model.recipe.cache.window, _live(model, [""], 0, [0], None)
    assert window is not None  # the live rollout refuses models without
    return max(1, window - 1) * live.frames_per_block


def beginnings(
    clips: ClipDataset, width: int, given: int, ahead: int, num: int, tokenizer: Any = None
) -> Beginnings:
    """Cut beginnings out of clips: every clip in turn, their starts spread over the clip.

    Args:
        clips: Held-out clips; too short ones are left out.
        width: Numbers per action that the model takes; 0 = none.
        given: Frames shown to the model.
        ahead: Frames that follow.
        num: Beginnings; fewer where the clips do not have as many different ones.
        tokenizer: The `VideoTokenizer` whose frames the actions lead to.

    Raises:
        DataError: No clip is long enough, or actions of another width.
    """
    check_count("num", num)
    places = clips.lengths - (given + ahead) + 1
    long_enough = [i for i in range(len(clips)) if places[i] > 0]
    if not long_enough:
        raise DataError(
            f"the longest clip has {int(clips.lengths.max())} frames and {given} + {ahead} are "
            "needed"
        )
    turns = -(-num // len(long_enough))
    chosen = []
    for turn in range(turns):
        for clip in long_enough:
            start = int((turn + 0.5) * places[clip] / turns)
            if turns <= places[clip] or turn < places[clip]:
                chosen.append((clip, min(start, int(places[clip]) - 1)))
    chosen = chosen[:num]
    steps = torch.arange(given + ahead)
    rows = torch.stack([int(clips.offsets[clip]) + start + steps for clip, start in chosen])
    led = leading_actions(clips, width, tokenizer)[rows] if width else None
    prompts = [clips.captions[clip] for clip, _ in chosen]
    frames = torch.from_numpy(clips.frames[rows.numpy()])
    return Beginnings(frames, led, prompts, list(range(len(chosen))), given)


def _live(
    model: GenerativeModel, prompts: Sequence[str], seed: int, keys: Sequence[int],
    steps: int | None,
) -> LiveRollout:  # fmt: skip
    generators = [item_generator(seed, key) for key in keys]
    return LiveRollout(model, prompts, generators, num_steps=steps)


class Dream:
    """What a model draws after some beginnings, block by block."""

    def __init__(
        self, model: GenerativeModel, tokenizer: Any, after: Beginnings, *, seed: int = 0,
        steps: int | None = None, told: bool = True,
    ) -> None:  # fmt: skip
        """Show the model the given frames.

        Args:
            model: A video model whose cache has a window, in eval mode.
            tokenizer: Its tokenizer, one latent frame per frame.
            after: The beginnings.
            seed: Seed of all noise.
            steps: Rows per block; None = the recipe's.
            told: Whether the model hears the actions that led to the given frames.
        """
        self._model, self._tokenizer = model, tokenizer
        self._live = _live(model, after.prompts, seed, after.keys, steps)
        self.per_block = self._live.frames_per_block
        self._state: Any = None
        if after.given % self.per_block:
            raise UsageError(f"{after.given} given frames in blocks of {self.per_block}")
        values = self._encoded(after.frames[:, : after.given])
        for first in range(0, after.given, self.per_block):
            part = slice(first, first + self.per_block)
            actions = None if after.actions is None else after.actions[:, part]
            if actions is not None and not told:
                actions = torch.zeros_like(actions)
            self._live.observe(values[:, part].flatten(1, 2), actions)
            with torch.no_grad():  # the decoder must have seen what came before
                _, self._state = tokenizer.decode_chunk(values[:, part], self._state)

    @torch.no_grad()
    def _encoded(self, frames: Tensor) -> Tensor:
        pixels = frames.to(self._model.device, self._model.dtype) / 127.5 - 1
        return self._tokenizer.encode(rearrange(pixels, "b f h w c -> b c f h w"))

    @torch.no_grad()
    def step(
        self, actions: Float[Tensor, "items block_frames numbers"] | None = None
    ) -> UInt8[Tensor, "items block_frames height width 3"]:
        """Draw the next block of frames, on the CPU.

        Args:
            actions: What leads to each of them; for models with actions.
        """
        values = self._live.step(actions)
        values = rearrange(values, "b (f n) c -> b f n c", f=self.per_block)
        pixels, self._state = self._tokenizer.decode_chunk(values, self._state)
        return as_bytes(pixels)

    @property
    def num_bytes(self) -> int:
        """Bytes of everything that going on depends on."""
        parts = self._live.snapshot().values()
        kept = 0 if self._state is None else self._state.num_bytes
        return kept + sum(part.numel() * part.element_size() for part in parts)


def as_bytes(
    pixels: Float[Tensor, "items 3 frames height width"],
) -> UInt8[Tensor, "items frames height width 3"]:
    """Round pixels in [-1, 1] to the 256 levels of a picture."""
    pixels = rearrange(pixels.float().clamp(-1, 1), "b c f h w -> b f h w c")
    return ((pixels + 1) * 127.5).round().byte().cpu()


def dreamed(
    model: GenerativeModel, tokenizer: Any, after: Beginnings, ahead: int, *,
    actions: Tensor | None = None, seed: int = 0, steps: int | None = None, told: bool = True,
    batch_size: int = BATCH,
) -> UInt8[Tensor, "items ahead height width 3"]:  # fmt: skip
    """Draw frames after beginnings.

    Args:
        model: As for `Dream`.
        tokenizer: As for `Dream`.
        after: The beginnings.
        ahead: Frames to draw.
        actions: What leads to each drawn frame [items, ahead, numbers]; None = what truly did.
        seed: Seed of all noise.
        steps: Rows per block; None = the recipe's.
        told: False tells the model no actions at all: zeros, for the given frames too.
        batch_size: Beginnings at once; changes no picture.
    """
    if actions is None and after.actions is not None:
        actions = after.actions[:, after.given : after.given + ahead]
    if actions is not None and not told:
        actions = torch.zeros_like(actions)
    parts = []
    for first in range(0, len(after), batch_size):
        rows = slice(first, first + batch_size)
        dream = Dream(model, tokenizer, after.take(rows), seed=seed, steps=steps, told=told)
        script = None if actions is None else actions[rows]
        parts.append(_followed(dream, script, ahead))
    return torch.cat(parts)


def _followed(dream: Dream, script: Tensor | None, ahead: int) -> Tensor:
    """Draw `ahead` frames; a last block that is longer than needed is cut."""
    size, drawn = dream.per_block, []
    for first in range(0, ahead, size):
        actions = None
        if script is not None:
            actions = script[:, first : first + size]
            if actions.shape[1] < size:
                last = actions[:, -1:].expand(-1, size - actions.shape[1], -1)
                actions = torch.cat((actions, last), 1)
        drawn.append(dream.step(actions))
    return torch.cat(drawn, 1)[:, :ahead]


@torch.no_grad()
def drawn_from_text(
    model: GenerativeModel, tokenizer: Any, captions: Sequence[str], num_frames: int, *,
    seed: int = 0, steps: int | None = None, batch_size: int = BATCH,
) -> UInt8[Tensor, "items frames height width 3"]:  # fmt: skip
    """Draw clips from captions alone; no frame is given.

    Args:
        model: A video model whose cache has a window and that takes no actions, in eval mode.
        tokenizer: Its tokenizer, one latent frame per frame.
        captions: One per clip.
        num_frames: Frames per clip.
        seed: Seed of all noise; clip k is item k of it.
        steps: Rows per block; None = the recipe's.
        batch_size: Clips at once; changes no picture.
    """
    parts = []
    for first in range(0, len(captions), batch_size):
        told = captions[first : first + batch_size]
        live = _live(model, told, seed, range(first, first + len(told)), steps)
        drawn, state = [], None
        for _ in range(0, num_frames, live.frames_per_block):
            values = rearrange(live.step(), "b (f n) c -> b f n c", f=live.frames_per_block)
            pixels, state = tokenizer.decode_chunk(values, state)
            drawn.append(as_bytes(pixels))
        parts.append(torch.cat(drawn, 1)[:, :num_frames])
    return torch.cat(parts)
