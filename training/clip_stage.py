"""Encoded clips as items of the model stage: windows of latent frames, cut out when asked for.

Frames of all clips lie end to end, once. An item is a window: `length` consecutive latent frames of
one clip. Windows overlap, so what the stage indexes are views that gather a batch: `ClipTokens` its
values, `ClipActions` what was done on the way to its frames, `ClipPrompts` its clip's prompt.

It does not know models or the loop. Invariant: a window never crosses the border of its clip.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from ..core.errors import DataError, check_count
from ..core.recipe_sections import ActingSpec
from ..tokenizers.video_frames import FrameTokenizer
from .clips import NO_ACTION, ClipDataset, tokenizer_input

ENCODE_BATCH = 128
"""Frames encoded at once, by tokenizers whose frames do not see each other or in one chunk."""
CLIP_BATCH = 256
"""Equally long clips of feature frames encoded side by side."""


class ClipWindows:
    """All windows of some clips, numbered clip after clip and start after start.

    Attributes:
        length: Frames per window.
        start: int64 [windows], row of each window's first frame.
        clip: int64 [windows], number of the clip it lies in.
    """

    def __init__(
        self,
        offsets: Int[Tensor, " ends"],
        length: int,
        stride: int = 1,
        device: torch.device | str = "cpu",
        pad: bool = False,
    ) -> None:
        """Number the windows.

        Args:
            offsets: Clip i is rows offsets[i] to offsets[i + 1].
            length: Frames per window; shorter clips have none.
            stride: Frames between the starts of two windows of a clip.
            device: Where batches are gathered.
            pad: Windows may go on behind the end of their clip, so that short clips have one and
                every frame lies in one; `rows` then says that there is no frame.

        Raises:
            DataError: No clip is long enough.
        """
        check_count("window length", length)
        check_count("window stride", stride)
        sizes = offsets.diff()
        beyond = stride - 1 if pad else 0
        counts = torch.where(sizes >= length, (sizes - length + beyond) // stride + 1, int(pad))
        counts = torch.where(sizes > 0, counts, 0)
        if not int(counts.sum()):
            raise DataError(
                f"the longest clip has {int(sizes.max())} latent frames and a window {length}; "
                f"set layout.frames to {int(sizes.max())} or less"
            )
        self.length = length
        clip = torch.repeat_interleave(torch.arange(len(sizes)), counts)
        before = torch.arange(len(clip)) - (counts.cumsum(0) - counts)[clip]
        self.clip = clip.to(device)
        self.start = (offsets[clip] + before * stride).to(device)
        self._steps = torch.arange(length, device=device)
        self._end = offsets[1:].to(device) if pad else None
        self._nowhere = int(offsets[-1])
        self.num_short = int((counts == 0).sum())

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.start)

    def take(self, indices: Int[Tensor, " chosen"]) -> "ClipWindows":
        """Select windows by number, repeats allowed."""
        chosen = copy.copy(self)
        index = indices.to(self.start.device)
        chosen.start, chosen.clip = self.start[index], self.clip[index]
        return chosen

    def rows(self, indices: Tensor | slice) -> Int[Tensor, "batch length"]:
        """Return the rows of the frames of some windows; behind a clip's end one past the last."""
        if isinstance(indices, Tensor):
            indices = indices.to(self.start.device)
        rows = self.start[indices][:, None] + self._steps
        if self._end is None:
            return rows
        return torch.where(rows < self._end[self.clip[indices]][:, None], rows, self._nowhere)


class ClipTokens:
    """The values of all windows: what `ModelStage` takes for a tensor [windows, slots, channels].

    `tokens[indices]` gathers a batch, frame after frame; nothing else is ever copied.
    """

    def __init__(
        self,
        frames: Tensor,
        offsets: Int[Tensor, " ends"],
        length: int,
        stride: int = 1,
        pad: bool = False,
    ) -> None:
        """Cut encoded clips into windows.

        Args:
            frames: Latents [frames of all clips, cells, channels] or codes [..., codebooks].
            offsets: Clip i is frames[offsets[i]:offsets[i + 1]].
            length: Latent frames per window.
            stride: Latent frames between the starts of two windows.
            pad: Windows may go on behind the end of their clip; nothing is known of what stands
                there (code -1, or latents that are not a number).

        Raises:
            DataError: No clip is long enough, or offsets of other frames.
        """
        if int(offsets[-1]) != len(frames):
            raise DataError(
                f"offsets end at {int(offsets[-1])}, but there are {len(frames)} frames"
            )
        if pad:
            nothing = float("nan") if frames.is_floating_point() else -1
            frames = torch.cat((frames, torch.full_like(frames[:1], nothing)))
        self.frames = frames
        self.windows = ClipWindows(offsets, length, stride, frames.device, pad)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    @property
    def shape(self) -> torch.Size:
        """[windows, slots of a window, channels or codebooks]."""
        cells, width = self.frames.shape[1:]
        return torch.Size((len(self), self.windows.length * cells, width))

    @property
    def device(self) -> torch.device:
        """Where the values lie and batches are gathered."""
        return self.frames.device

    def __getitem__(self, indices: Tensor | slice) -> Tensor:
        """Gather windows, [batch, slots, channels or codebooks]."""
        return rearrange(self.frames[self.windows.rows(indices)], "b f n c -> b (f n) c")


class ClipActions:
    """What was done on the way to every frame of a window, in place of a tensor."""

    def __init__(self, rows: Float[Tensor, "frames actions"], windows: ClipWindows) -> None:
        """Join actions and windows.

        Args:
            rows: One per latent frame of all clips, from `leading_actions`.
            windows: Windows of the same frames.
        """
        # Windows that go on behind a clip's end look up one row past the last.
        self._ended = torch.cat((rows, torch.zeros_like(rows[:1]))).to(windows.start.device)
        self.rows = self._ended[:-1]
        self.windows = windows

    @property
    def shape(self) -> torch.Size:
        """[windows, frames of a window, actions]."""
        return torch.Size((len(self.windows), self.windows.length, self.rows.shape[1]))

    def __getitem__(self, indices: Tensor | slice) -> Float[Tensor, "batch frames actions"]:
        """Gather the actions of windows."""
        return self._ended[self.windows.rows(indices)]


class ClipPrompts:
    """The prompt of the clip a window lies in, kept once per clip."""

    def __init__(
        self,
        ids: Int[Tensor, "clips words features"],
        windows: ClipWindows,
        wording: Int[Tensor, " windows"] | None = None,
    ) -> None:
        """Join tokenised captions and windows.

        Args:
            ids: One row per clip; of several wordings those of all clips, one wording after the
                other.
            windows: Windows of these clips.
            wording: Which wording every window is told in; None = the only one.
        """
        self.ids, self.windows = ids.to(windows.start.device), windows
        self.row = windows.clip
        if wording is not None:
            clips = len(ids) // (int(wording.max()) + 1)
            self.row = windows.clip + clips * wording.to(windows.clip.device)

    def __getitem__(self, indices: Tensor | slice) -> Int[Tensor, "batch words features"]:
        """Gather the prompts of windows."""
        if isinstance(indices, Tensor):
            indices = indices.to(self.row.device)
        return self.ids[self.row[indices]]


class PixelWindows:
    """Windows of raw frames, in the form the tokenizer stage reads images in."""

    def __init__(
        self, dataset: ClipDataset, length: int, stride: int = 1, pad: bool = False
    ) -> None:
        """Cut clips into windows; pictures are not copied.

        Args:
            dataset: The clips.
            length: Frames per window.
            stride: Frames between the starts of two windows.
            pad: Windows of feature frames may go on behind the end of their clip, where frames are
                not a number.

        Raises:
            DataError: No clip is long enough, or pictures that should be padded.
        """
        self.frames = torch.from_numpy(dataset.frames)
        if pad:
            if not dataset.num_features:
                raise DataError("windows of pictures end with their clip; only features are padded")
            nothing = torch.full_like(self.frames[:1], float("nan"))
            self.frames = torch.cat((self.frames, nothing))
        self.windows = ClipWindows(torch.from_numpy(dataset.offsets), length, stride, pad=pad)

    def __len__(self) -> int:
        """Return the number of windows."""
        return len(self.windows)

    def pixels(self, indices: Tensor) -> Float[Tensor, "batch channels frames *sides"]:
        """Gather windows as a tokenizer takes them: pixels in [-1, 1], or features."""
        return tokenizer_input(self.frames[self.windows.rows(indices)])


def leading_actions(
    dataset: ClipDataset, width: int, tokenizer: Any = None
) -> Float[Tensor, "latents actions"]:
    """List, for every latent frame, the actions that LED to it: row f holds the action of f - 1.

    Ids become one-hot rows. First frames and frames after an unknown action get zeros. A latent
    frame of several frames gets their rows side by side, in order of time; or, where `width` is
    that of one row, the row of its first frame alone: what is known before it begins.

    Args:
        dataset: Clips with actions.
        width: Numbers per latent frame, as the recipe's `condition.actions` says.
        tokenizer: The `VideoTokenizer` of the latent frames; None = one per pixel frame.

    Raises:
        DataError: No actions, or of another width.
    """
    if dataset.actions is None:
        raise DataError(
            f"condition.actions = {width}, but these clips have no actions; set it to 0"
        )
    stride = 1 if tokenizer is None else int(tokenizer.temporal_stride)
    if dataset.actions.dtype.kind == "i":
        parts, what = max(width // stride, dataset.num_actions), "ids"
        taken = torch.from_numpy(dataset.actions.astype(np.int64))
        done = F.one_hot(taken.clamp_min(0), parts).float() * (taken >= 0)[:, None]
    else:
        given = np.nan_to_num(dataset.actions.astype(np.float32), nan=0.0)
        done, what = torch.from_numpy(given), "numbers"
    if width not in (done.shape[1], done.shape[1] * stride):
        found = f"{done.shape[1]} {what}" + (f" x {stride} frames" if stride > 1 else "")
        raise DataError(
            f"condition.actions = {width}, but the actions of these clips are {found}; "
            f"set condition.actions to {done.shape[1] * stride}"
        )
    led = torch.zeros_like(done)
    led[1:] = done[:-1]
    led[torch.from_numpy(dataset.offsets[:-1])] = 0.0
    if stride == 1:
        return led
    told = stride if width == done.shape[1] * stride else 1
    frames: Tensor = _frame_rows(dataset, tokenizer, told)
    # A clip's first latent frame may be a single frame: nothing led to it.
    begin = torch.from_numpy(dataset.offsets)[_clip_of(dataset, tokenizer)]
    rows: Tensor = led[frames.clamp_min(0)] * (frames >= begin[:, None])[..., None]
    return rearrange(rows, "l s a -> l (s a)")


def _clip_of(dataset: ClipDataset, tokenizer: Any) -> Int[Tensor, " latents"]:
    """Tell which clip every latent frame belongs to."""
    counts = latent_offsets(dataset, tokenizer).diff()
    return torch.repeat_interleave(torch.arange(len(dataset)), counts)


def _frame_rows(dataset: ClipDataset, tokenizer: Any, count: int) -> Int[Tensor, "latents count"]:
    """Number the frames of every latent frame: the last of them if all are asked for, or its first.

    Args:
        dataset: The clips.
        tokenizer: Its latent frames hold `temporal_stride` frames, the first perhaps fewer.
        count: `temporal_stride`, or 1 for the first frame; frames before their clip are none of it.
    """
    clip, stride = _clip_of(dataset, tokenizer), int(tokenizer.temporal_stride)
    number = torch.arange(len(clip)) - latent_offsets(dataset, tokenizer)[clip]
    latents = getattr(tokenizer, "first_latents", 1)
    single = int(getattr(tokenizer, "first_frames", 1)) - (latents - 1) * stride
    last = single - 1 + number * stride
    first = torch.where(number > 0, last - (stride - 1), 0)
    ahead = torch.arange(1 - count, 1)
    rows = first[:, None] if count == 1 else last[:, None] + ahead
    return torch.from_numpy(dataset.offsets)[clip][:, None] + rows


def with_actions(values: Tensor, dataset: ClipDataset, acting: ActingSpec) -> Tensor:
    """Append to the tokens of every frame one that holds what was done in it.

    Args:
        values: Codes or latents [frames of all clips, cells, width], one frame per pixel frame.
        dataset: The clips.
        acting: The recipe's actions.

    Returns:
        [frames, cells + 1, width]; of unknown actions nothing is known (code -1, or latents that
        are not a number).

    Raises:
        DataError: No actions, actions of another kind or width, or clips whose latent frames hold
            several pixel frames.
    """
    if dataset.actions is None:
        raise DataError("the recipe acts, but these clips have no actions; leave acting out")
    if len(values) != len(dataset.actions):
        raise DataError(
            f"{len(values)} latent frames of {len(dataset.actions)} frames with actions; the "
            "recipe acts in every frame, so the tokenizer's temporal stride must be 1"
        )
    is_id = dataset.actions.dtype.kind == "i"
    found = dataset.num_actions if is_id else dataset.actions.shape[1]
    if is_id != (acting.codes > 0) or found > max(acting.codes, acting.numbers):
        kind = "codes" if is_id else "numbers"
        raise DataError(
            f"acting.codes = {acting.codes} and acting.numbers = {acting.numbers}, but the actions "
            f"of these clips are {found} {kind}; set acting.{kind} to {found}"
        )
    done = torch.from_numpy(dataset.actions).to(values)
    done = done[:, None] if is_id else done
    row = values.new_zeros(len(values), 1, values.shape[-1])
    row[:, 0, : done.shape[1]] = done
    unknown = dataset_unknown(dataset)
    row[unknown] = float("nan") if values.is_floating_point() else NO_ACTION
    return torch.cat((values, row), 1)


def dataset_unknown(dataset: ClipDataset) -> Bool[Tensor, " frames"]:
    """Tell in which frames nobody knows what is done: those marked so, and the last of clips."""
    assert dataset.actions is not None
    is_id = dataset.actions.dtype.kind == "i"
    unknown = torch.from_numpy(dataset.actions < 0 if is_id else np.isnan(dataset.actions).any(1))
    unknown[torch.from_numpy(dataset.offsets[1:]) - 1] = True
    return unknown


def latent_offsets(dataset: ClipDataset, tokenizer: Any) -> Int[Tensor, " ends"]:
    """Return where clips start and end among the latent frames of `encode_clips`.

    Args:
        dataset: The clips.
        tokenizer: A `VideoTokenizer`.
    """
    first, step = (getattr(tokenizer, f"{part}_frames", 1) for part in ("first", "step"))
    sizes = torch.from_numpy(dataset.lengths)
    later = (sizes - first) // step * getattr(tokenizer, "step_latents", 1)
    counts = torch.where(sizes >= first, getattr(tokenizer, "first_latents", 1) + later, 0)
    return torch.cat((torch.zeros(1, dtype=torch.long), counts.cumsum(0)))


@torch.no_grad()
def encode_clips(tokenizer: Any, dataset: ClipDataset, cache: Path) -> Tensor:
    """Encode all clips once, kept on disk under a hash of frames, clips and tokenizer.

    Frames at a clip's end that do not fill a step of the tokenizer are left out.

    Args:
        tokenizer: A `VideoTokenizer` in eval mode.
        dataset: Clips of its frame size.
        cache: Folder of the latent cache; created when missing.

    Returns:
        Codes [latents, cells, codebooks] (int64) or latents [latents, cells, channels] (float32);
        `latent_offsets` says which belong to which clip.
    """
    digest = hashlib.sha256(dataset.frames.tobytes() + dataset.offsets.tobytes())
    return remembered(cache, digest, tokenizer, lambda: _encode(tokenizer, dataset))


def _encode(tokenizer: Any, dataset: ClipDataset) -> Tensor:
    frames = torch.from_numpy(dataset.frames)
    device = next(iter(tokenizer.state_dict().values()), torch.zeros(0)).device
    if isinstance(tokenizer, FrameTokenizer):
        # Frames do not see each other, so clips need not be told apart.
        pictures = (rearrange(tokenizer_input(p[None]), "1 c t h w -> t c h w")
                    for p in _chunks(frames))  # fmt: skip
        return torch.cat([tokenizer.inner.encode(part.to(device)).cpu() for part in pictures])
    parts: dict[int, list[Tensor]] = {index: [] for index in range(len(dataset))}
    for together in _alike(dataset):
        state, clips = None, torch.stack([torch.from_numpy(dataset.clip(i)) for i in together])
        for chunk in clips.split(ENCODE_BATCH, dim=1):
            values, state = tokenizer.encode_chunk(tokenizer_input(chunk).to(device), state)
            for index, part in zip(together, values.cpu(), strict=True):
                parts[index].append(part)
    return torch.cat([part for clip in parts.values() for part in clip])


def _alike(dataset: ClipDataset) -> list[list[int]]:
    """List clips that are encoded together: equally long ones of features, pictures one by one."""
    if not dataset.num_features:
        return [[index] for index in range(len(dataset))]
    order = np.argsort(dataset.lengths, kind="stable")
    alike = np.split(order, np.flatnonzero(np.diff(dataset.lengths[order])) + 1)
    return [
        group[first : first + CLIP_BATCH].tolist()
        for group in alike
        for first in range(0, len(group), CLIP_BATCH)
    ]


def _chunks(frames: Tensor) -> list[Tensor]:
    return list(frames.split(ENCODE_BATCH))


def remembered(cache: Path, digest: Any, tokenizer: Any, encode: Callable[[], Tensor]) -> Tensor:
    """Return what `encode` gives, from disk if it ran before on the same data and tokenizer.

    Args:
        cache: Folder of the cache; created when missing.
        digest: A hash object that has read the data; it goes on to read the tokenizer.
        tokenizer: The module that encodes.
        encode: Called when nothing is on disk.

    Returns:
        The values, int64 or float32.
    """
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    digest.update(json.dumps(dict(tokenizer.config), sort_keys=True, default=str).encode())
    path = cache / f"{digest.hexdigest()[:32]}.safetensors"
    if path.is_file():
        return _widen(load_file(path)["values"])
    values = encode()
    cache.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    save_file({"values": values.contiguous()}, partial)
    os.replace(partial, path)
    return _widen(values)


def _widen(values: Tensor) -> Tensor:
    return values.float() if values.is_floating_point() else values.long()
