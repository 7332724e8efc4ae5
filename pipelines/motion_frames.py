"""Values of motion models as moving bodies: decoded, joined to what is given, placed in the world.

Everything that goes on from chunk to chunk (the decoder's past, where the body stands, how far it
is from what was given) lives here, so a stream needs constant memory. It knows no prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..motion.features import Start, advance, features_to_motion, start_of
from ..motion.seams import REACH, Border, arriving, border, take_out
from ..motion.skeleton import HUMAN22, Skeleton
from ..tokenizers.video_base import StreamState
from .blocks import Frames
from .motion_input import FPS, Given, features_of, lengthened


@dataclass
class _Body:
    """One motion in the making.

    Attributes:
        given: What is kept of an earlier motion, or None.
        shown: Features of what is kept, as the model was shown them.
        start: Where the next frame stands; None until the first frame is placed.
        lacking: What the first new frames should be, less what the model says they are.
        done: New frames so far.
    """

    given: Given | None
    shown: Tensor | None
    start: Start | None = field(default_factory=Start)
    lacking: Border | None = None
    done: int = 0

    def place(self, frame: int) -> Start:
        """Return where a kept frame stands, in the clip whose features were shown.

        Headings are smoothed over time, so another clip with the same frame may say another one.
        """
        assert self.given is not None and self.shown is not None
        return start_of(lengthened(self.given.seen, len(self.shown)), frame)

    @property
    def skeleton(self) -> Skeleton:
        return HUMAN22 if self.given is None else self.given.motion.skeleton


class Bodies(Frames):
    """Turns values into joints and rotations; kept frames stand as they were given."""

    def __init__(
        self, tokenizer: Any, given: Sequence[Given | None], shown: Sequence[Tensor | None],
        values: Tensor | None,
    ) -> None:  # fmt: skip
        """Begin.

        Args:
            tokenizer: Of feature frames.
            given: Per motion; all alike in their numbers of frames.
            shown: Their features, per motion.
            values: Those of the latent frames that are given at the beginning, or None.
        """
        self._tokenizer, self._values = tokenizer, values
        self._bodies = [_Body(*pair) for pair in zip(given, shown, strict=True)]
        self._state: StreamState | None = None
        self._cursor = 0  # decoded frames so far

    @property
    def skeletons(self) -> list[Skeleton]:
        """The body of each motion."""
        return [body.skeleton for body in self._bodies]

    def given(self) -> dict[str, Any] | None:
        """Hand out the frames kept at the beginning; the decoder takes them in as its past."""
        if self._values is not None:
            self._decode(self._values)
        first = self._bodies[0].given
        if first is None:
            return None
        for body in self._bodies:
            assert body.given is not None and body.shown is not None
            left = body.given.left
            place = body.place(0)
            body.start = advance(body.shown[:left], place) if left else None
        if first.before + first.left == 0:
            return None
        return _joined([_kept(b.given, 0, first.before + first.left) for b in self._bodies])

    def made(self, values: Tensor, *, is_last: bool) -> dict[str, Any]:
        """Decode the next values and place them behind what there is."""
        begin = self._cursor
        features = self._decode(values)
        pieces = []
        for body, rows in zip(self._bodies, features, strict=True):
            given = body.given
            skipped = max(0, (given.left if given else 0) - begin)
            piece = self._placed(body, rows[skipped:], begin + skipped)
            if given is not None and given.right is not None:
                kept = _kept(given, given.before + given.right, given.before + given.frames)
                joints, rotations = (np.concatenate(p) for p in zip(piece, kept, strict=True))
                piece = (joints, rotations)
            elif given is not None:
                room = given.frames - begin - skipped
                piece = (piece[0][:room], piece[1][:room])
            pieces.append(piece)
        return _joined(pieces)

    def _decode(self, values: Tensor) -> Tensor:
        """Decode values to float64 features [motions, frames, features] on the CPU."""
        frames, self._state = self._tokenizer.decode_chunk(values, self._state)
        features = frames.transpose(1, 2).double().cpu()
        self._cursor += features.shape[1]
        return features

    def _placed(self, body: _Body, rows: Tensor, begin: int) -> tuple[NDArray, NDArray]:
        """Turn new features into joints and rotations that go on from where the body stands."""
        given, shift = body.given, None
        if given is not None and body.shown is not None and given.left and len(rows):
            if body.lacking is None:
                body.lacking = border(body.shown[: given.left], rows)
            rows = take_out(rows, body.lacking, body.done, _reach(given))
        if given is not None and given.right is not None and body.shown is not None:
            back = rows[: given.right - begin].flip(0)  # counted away from what is kept behind
            lacking = border(body.shown[given.right : given.frames].flip(0), back)
            rows = take_out(back, lacking, 0, _reach(given)).flip(0)
            rows, body.start, shift = arriving(rows, body.start, body.place(given.right))
        moved = features_to_motion(rows, body.skeleton, FPS, body.start)
        body.start, body.done = advance(rows, body.start), body.done + len(rows)
        joints = moved.joints if shift is None else moved.joints + shift[:, None]
        assert moved.rotations is not None
        return joints, moved.rotations


def _reach(given: Given) -> int:
    """Return over how many frames a seam is let go: in a short span not as far as the other end."""
    return REACH if given.right is None else max(1, min(REACH, (given.right - given.left) // 2))


def _kept(given: Given | None, start: int, stop: int) -> tuple[NDArray, NDArray]:
    assert given is not None and given.motion.rotations is not None
    return given.motion.joints[start:stop], given.motion.rotations[start:stop]


def _joined(pieces: Sequence[tuple[NDArray, NDArray]]) -> dict[str, Any]:
    joints, rotations = (np.stack(parts) for parts in zip(*pieces, strict=True))
    return {"joints": joints, "rotations": rotations}


def shown_values(
    tokenizer: Any, given: Sequence[Given], device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Describe and encode what a model is shown of motions.

    Returns:
        Features per motion, and their values [motions, latent frames, cells, channels].
    """
    step = tokenizer.step_frames
    features = []
    for one in given:
        count = one.left if one.right is None else one.frames
        features.append(features_of(one.seen, -(-count // step) * step))
    frames = torch.stack(features).transpose(1, 2).to(device, dtype)
    return features, tokenizer.encode(frames)
