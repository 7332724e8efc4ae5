"""Captioned clips in memory, with the actions that move them, and windows cut out of them.

A frame is a picture, or a row of numbers (a pose, an observation): a *feature frame*.

The one convention of actions: the action of frame t moves frame t to frame t + 1. So the action of
a clip's last frame leads nowhere and is stored as "none" (-1, or zeros for vectors), whatever the
file said. It does not know files, tokenizers or training.

Invariants: frames of all clips lie end to end and clip i is `frames[offsets[i]:offsets[i + 1]]`;
a window never crosses the border of its clip.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import DataError, check_count, check_one_of

NO_ACTION = -1
DEFAULT_FPS = 10.0
"""Frames per second where a source has no natural rate, for instance one frame per move."""


@dataclass(frozen=True)
class Windows:
    """Equally long pieces of clips.

    Attributes:
        frames: uint8 [items, length, height, width, 3], or float32 [items, length, features].
        is_real: bool [items, length]; False where a short clip's last frame is held.
        start: int64 [items], number of the window's first frame within its clip.
        actions: int64 [items, length] or float32 [items, length, parts]: the action at j moves
            frame j to frame j + 1. None without actions.
        has_action: bool [items, length]; False where the clip has no next frame or nobody recorded
            the action, which is -1 or zeros there.
        action_before: int64 [items] or float32 [items, parts], the action that led to the first
            frame of the window.
        has_action_before: bool [items]; False where the window starts with its clip, or nobody
            recorded that action.
    """

    frames: Tensor
    is_real: Tensor
    start: Tensor
    actions: Tensor | None = None
    has_action: Tensor | None = None
    action_before: Tensor | None = None
    has_action_before: Tensor | None = None

    def pixels(self) -> Tensor:
        """Return the frames as a tokenizer takes them, see `tokenizer_input`."""
        return tokenizer_input(self.frames)

    def leading(self) -> tuple[Tensor, Tensor]:
        """Return, for every frame, the action that LED to it, and whether it is known.

        Returns:
            Actions shaped like `actions`, and bool [items, length]. Position j holds the action
            of frame j - 1; position 0 holds `action_before`.

        Raises:
            DataError: The clips have no actions.
        """
        if self.actions is None or self.has_action is None:
            raise DataError("these clips have no actions")
        assert self.action_before is not None and self.has_action_before is not None
        shifted = torch.cat([self.action_before[:, None], self.actions[:, :-1]], dim=1)
        known = torch.cat([self.has_action_before[:, None], self.has_action[:, :-1]], dim=1)
        return shifted, known


@dataclass(frozen=True)
class ClipDataset:
    """Captioned clips of one frame shape and one frame rate, of any lengths.

    Attributes:
        frames: uint8 [frames of all clips, height, width, 3], RGB; or finite float32
            [frames of all clips, features].
        offsets: int64 [items + 1], from 0 to the number of frames, rising.
        captions: One text per clip; may be empty texts.
        split: Split of every clip, for instance "train".
        fps: Frames per second.
        actions: Integer [frames] (ids from 0; -1 = none, on last frames only) or float32
            [frames, parts] (a row of nan where nobody recorded it), the action of every frame, or
            None.
        action_names: Names of the ids; may be empty.
    """

    frames: NDArray[np.uint8] | NDArray[np.float32]
    offsets: NDArray[np.int64]
    captions: list[str]
    split: list[str]
    fps: float = DEFAULT_FPS
    actions: NDArray | None = None
    action_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check that all parts fit each other.

        Raises:
            DataError: They do not; the first fault found is named.
        """
        shape, dtype = self.frames.shape, self.frames.dtype
        is_picture = dtype == np.uint8 and len(shape) == 4 and shape[3] == 3 and 0 not in shape[1:3]
        if not is_picture and (dtype != np.float32 or len(shape) != 2 or not shape[1]):
            raise DataError(
                f"frames are {dtype} {list(shape)}; needed uint8 [frames, height, width, 3] or "
                "float32 [frames, features]"
            )
        check_offsets(self.offsets, shape[0])
        if not is_picture:
            _check_finite(self.frames, self.offsets)
        for name in ("captions", "split"):
            if len(getattr(self, name)) != len(self):
                raise DataError(f"{len(self)} clips but {len(getattr(self, name))} {name}")
        if not (np.isfinite(self.fps) and self.fps > 0):
            raise DataError(f"fps is {self.fps}; allowed any number above 0")
        if self.actions is not None:
            _check_actions(self.actions, self.offsets, len(self.action_names))

    def __len__(self) -> int:
        """Return the number of clips."""
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Frames of every clip, int64 [items]."""
        return np.diff(self.offsets)

    @property
    def num_actions(self) -> int:
        """Number of action ids (at least the largest seen plus one); 0 for vectors or none."""
        if self.actions is None or self.actions.dtype.kind != "i":
            return 0
        return max(len(self.action_names), int(self.actions.max()) + 1)

    @property
    def num_features(self) -> int:
        """Numbers of a feature frame; 0 for pictures."""
        return self.frames.shape[1] if self.frames.ndim == 2 else 0

    def clip(self, index: int) -> NDArray:
        """Return the frames of one clip, [frames, height, width, 3] or [frames, features].

        They are not copied.
        """
        return self.frames[self.offsets[index] : self.offsets[index + 1]]

    def clip_actions(self, index: int) -> NDArray:
        """Return the actions of one clip, one per frame, the last one being none.

        Raises:
            DataError: The clips have no actions.
        """
        if self.actions is None:
            raise DataError("these clips have no actions")
        return self.actions[self.offsets[index] : self.offsets[index + 1]]

    def take(self, indices: Sequence[int] | NDArray[np.int64]) -> "ClipDataset":
        """Select clips by number, in the order given; frames are copied.

        Raises:
            DataError: No clip is selected.
        """
        index = np.asarray(indices, dtype=np.int64)
        if not index.size:
            raise DataError("no clip is selected")
        pieces = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in index]
        rows = np.concatenate(pieces)
        return ClipDataset(
            self.frames[rows],
            np.concatenate([[0], np.cumsum(self.lengths[index])]),
            [self.captions[i] for i in index],
            [self.split[i] for i in index],
            self.fps,
            None if self.actions is None else self.actions[rows],
            self.action_names,
        )

    def only(self, split: str) -> "ClipDataset":
        """Select the clips of one split.

        Raises:
            DataError: No clip has it; the splits present are named.
        """
        chosen = [i for i, name in enumerate(self.split) if name == split]
        if not chosen:
            present = ", ".join(sorted(set(self.split)))
            raise DataError(f"no clip is in split {split!r}; splits present: {present}")
        return self.take(chosen)

    def window(
        self,
        indices: Tensor,
        length: int,
        generator: torch.Generator | None = None,
        *,
        short: str = "error",
    ) -> Windows:
        """Cut one window out of each of the given clips.

        Args:
            indices: int64 [items], numbers of clips; a number may repeat.
            length: Frames per window.
            generator: Draws every window's place, all places of a clip being equally likely;
                None starts every window with its clip.
            short: What to do with clips shorter than `length`: "error", or "hold" to repeat the
                last frame (`is_real` tells).

        Raises:
            DataError: A number that is no clip, or a clip shorter than `length`.
            UsageError: A bad `length` or `short`.
        """
        check_count("window length", length)
        check_one_of("short", short, ("error", "hold"))
        index = indices.numpy().astype(np.int64)
        if index.size and not 0 <= index.min() <= index.max() < len(self):
            raise DataError(
                f"clip numbers {index.min()}..{index.max()}; allowed 0..{len(self) - 1}"
            )
        sizes = self.lengths[index]
        if short == "error" and index.size and sizes.min() < length:
            worst = index[sizes.argmin()]
            raise DataError(
                f"clip {worst} has {sizes.min()} frames and the window {length}; "
                f"try length {sizes.min()}, or short='hold'"
            )
        share = np.zeros(len(index))
        if generator is not None:
            share = torch.rand(len(index), generator=generator, dtype=torch.float64).numpy()
        start = (share * np.maximum(sizes - length + 1, 1)).astype(np.int64)
        return self._cut(index, start, start[:, None] + np.arange(length))

    def _cut(
        self, index: NDArray[np.int64], start: NDArray[np.int64], time: NDArray[np.int64]
    ) -> Windows:
        """Gather frames and actions at times [items, length] within the clips `index`."""
        first, size = self.offsets[index][:, None], self.lengths[index][:, None]
        row = first + np.minimum(time, size - 1)
        frames = torch.from_numpy(self.frames[row])
        is_real = torch.from_numpy(time < size)
        if self.actions is None:
            return Windows(frames, is_real, torch.from_numpy(start))
        actions = self._actions_at(row)
        has_action = torch.from_numpy(time + 1 < size) & _is_recorded(actions)
        none = NO_ACTION if actions.dtype == torch.int64 else 0.0
        actions[~has_action] = none
        before = self._actions_at(np.maximum(row[:, 0] - 1, 0))
        has_before = torch.from_numpy(start > 0) & _is_recorded(before)
        before[~has_before] = none
        place = torch.from_numpy(start)
        return Windows(frames, is_real, place, actions, has_action, before, has_before)

    def _actions_at(self, row: NDArray[np.int64]) -> Tensor:
        assert self.actions is not None
        dtype = np.int64 if self.actions.dtype.kind == "i" else np.float32
        return torch.from_numpy(self.actions[row].astype(dtype))


def _is_recorded(actions: Tensor) -> Tensor:
    """Tell of which actions something is known; ids of middle frames always are."""
    if not actions.is_floating_point():
        return torch.ones_like(actions, dtype=torch.bool)
    return ~actions.isnan().any(-1)


def tokenizer_input(frames: Tensor) -> Float[Tensor, "batch channels frames *sides"]:
    """Bring frames into the form that tokenizers take: the one place where that happens.

    Args:
        frames: Pictures, uint8 [batch, frames, height, width, 3], or feature frames, float
            [batch, frames, features].

    Returns:
        float32: pixels [batch, 3, frames, height, width] in [-1, 1], or features
        [batch, features, frames] as they are.

    Raises:
        DataError: Frames of neither form.
    """
    if frames.ndim == 5 and frames.dtype == torch.uint8:
        return rearrange(frames, "b t h w c -> b c t h w").float() / 127.5 - 1
    if frames.ndim == 3 and frames.is_floating_point():
        return rearrange(frames, "b t f -> b f t").float()
    raise DataError(
        f"frames are {frames.dtype} {list(frames.shape)}; needed uint8 [batch, frames, height, "
        "width, 3] or floats [batch, frames, features]"
    )


def _check_finite(frames: NDArray, offsets: NDArray[np.int64]) -> None:
    is_good = np.isfinite(frames).all(axis=1)
    if not is_good.all():
        row = int(is_good.argmin())
        clip = int(np.searchsorted(offsets, row, side="right")) - 1
        feature = int(np.isfinite(frames[row]).argmin())
        raise DataError(
            f"clip {clip}, frame {row - offsets[clip]}: feature {feature} is "
            f"{frames[row, feature]}; needed finite numbers"
        )


def check_offsets(offsets: NDArray, num_frames: int) -> None:
    """Require offsets that cut `num_frames` frames into clips of at least one frame.

    Raises:
        DataError: Not whole numbers in one row, not from 0 to `num_frames`, or not rising.
    """
    if offsets.dtype.kind not in "iu" or offsets.ndim != 1 or len(offsets) < 2:
        raise DataError(
            f"offsets are {offsets.dtype} {list(offsets.shape)}; needed whole numbers [clips + 1]"
        )
    if offsets[0] != 0 or offsets[-1] != num_frames:
        raise DataError(
            f"offsets run from {offsets[0]} to {offsets[-1]}; needed 0 to {num_frames}, "
            "the number of frames"
        )
    steps = np.diff(offsets.astype(np.int64))
    if steps.min() < 1:
        worst = int(steps.argmin())
        raise DataError(f"clip {worst} has {steps[worst]} frames; every clip needs at least 1")


def align_actions(
    actions: NDArray, offsets: NDArray[np.int64], num_names: int = 0
) -> NDArray[np.generic]:
    """Bring actions of a file into the one form: one per frame, none on every last frame.

    Args:
        actions: Whole numbers [n] or numbers [n, parts], where n is the number of frames, or the
            number of frames minus the number of clips (files that store transitions only).
        offsets: As in `ClipDataset`.
        num_names: Number of named ids, 0 when ids have no names.

    Returns:
        int64 [frames] or float32 [frames, parts].

    Raises:
        DataError: Another number of actions, or values that `ClipDataset` refuses.
    """
    total, clips = int(offsets[-1]), len(offsets) - 1
    kind = actions.dtype.kind
    if kind not in "biuf" or actions.ndim != (2 if kind == "f" else 1):
        raise DataError(
            f"actions are {actions.dtype} {list(actions.shape)}; needed whole numbers [frames] "
            "or floats [frames, parts]"
        )
    values = actions.astype(np.float32 if kind == "f" else np.int64)
    last = offsets[1:] - 1
    if len(values) == total - clips:
        full = np.zeros((total, *values.shape[1:]), dtype=values.dtype)
        full[np.setdiff1d(np.arange(total), last)] = values
        values = full
    elif len(values) != total:
        raise DataError(
            f"{len(values)} actions for {total} frames in {clips} clips; allowed {total}, or "
            f"{total - clips} without those of last frames"
        )
    values[last] = NO_ACTION if kind != "f" else 0.0
    _check_actions(values, offsets, num_names)
    return values


def _check_actions(actions: NDArray, offsets: NDArray[np.int64], num_names: int) -> None:
    if len(actions) != offsets[-1]:
        raise DataError(f"{len(actions)} actions for {offsets[-1]} frames")
    if actions.dtype.kind == "f":
        if actions.ndim != 2:
            raise DataError(f"actions are {list(actions.shape)}; needed [frames, parts]")
        is_odd = ~np.isfinite(actions).all(axis=1) & ~np.isnan(actions).all(axis=1)
        if is_odd.any():
            row = int(is_odd.argmax())
            raise DataError(
                f"the action of frame {row} is {actions[row].tolist()}; needed finite numbers, or "
                "none (all nan) where it was not recorded"
            )
        return
    if actions.dtype.kind != "i" or actions.ndim != 1:
        raise DataError(f"actions are {actions.dtype} {list(actions.shape)}; needed ids [frames]")
    low = np.zeros(len(actions), dtype=np.int64)
    low[offsets[1:] - 1] = NO_ACTION
    is_bad = actions < low
    if num_names:
        is_bad |= actions >= num_names
    if is_bad.any():
        row = int(is_bad.argmax())
        clip = int(np.searchsorted(offsets, row, side="right")) - 1
        top = f"0..{num_names - 1}" if num_names else "0 and above"
        raise DataError(
            f"clip {clip}, frame {row - offsets[clip]}: action {actions[row]}; allowed {top}"
        )
