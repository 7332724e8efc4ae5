"""Worlds one plays: a model dreams the next frames while somebody says what is done.

`WorldPipeline.start` opens a `WorldSession`; `session.step(action)` returns the next frame. A
session runs at constant memory for as long as it is played, can be forked, and can be written to a
file and gone on with elsewhere, bit for bit. It knows neither masks nor schedules.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..core.errors import DataError, UsageError, check_count, describe
from ..core.sampling import item_generator
from ..models.live import LiveRollout
from ..tokenizers.video_base import StreamState
from .base import TokenPipeline
from .clip_frames import to_clip, to_frames
from .look_ahead import LookAhead
from .world_files import read_starts

MAX_SESSION_BYTES = 2**31
"""Larger session files are refused unread."""

Frames = UInt8[np.ndarray, "frames height width 3"]
Action = int | float | Sequence[float] | np.ndarray


class WorldPipeline(TokenPipeline):
    """Opens sessions of a video model that may be steered."""

    @property
    def num_actions(self) -> int:
        """Numbers an action is made of; 0 for worlds that only go on."""
        return self.model.recipe.condition.actions

    def starts(self) -> list[tuple[Frames, np.ndarray]]:
        """List moments the world can start from, which its folder brings; often none.

        Returns:
            Pairs for `start`: uint8 frames [frames, height, width, 3], and the float32 actions
            [frames, numbers] that led to them.

        Raises:
            ModelError: a damaged `starts.npz`.
        """
        size = tuple(self.tokenizer.frame_size)
        found = None
        if self._folder is not None:
            found = read_starts(self._folder, self.num_actions, (size[0], size[1]))
        return [] if found is None else list(zip(found.frames, found.actions, strict=True))

    def start(
        self, frames: Frames | None = None, *, prompt: str = "", seed: int = 0,
        actions: Sequence[Action] | None = None, num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
    ) -> "WorldSession":  # fmt: skip
        """Open a session.

        Args:
            frames: Frames that came before, uint8 [frames, height, width, 3]; None starts from
                nothing.
            prompt: What the world is.
            seed: Same seed, same frames, same actions, same world.
            actions: What led to each of `frames`; None = nothing was done.
            num_inference_steps: Rows per step; None = the recipe's.
            guidance_scale: 1 = off; None = the recipe's.

        Returns:
            The session, standing behind the given frames.

        Raises:
            UsageError: frames of another size or number than the model takes, or odd actions.
        """
        live = LiveRollout(
            self.model, [prompt], [item_generator(seed, 0)], num_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        )  # fmt: skip
        about = {"prompt": prompt, "steps": num_inference_steps, "guidance": guidance_scale}
        session = WorldSession(self, live, about)
        if frames is not None:
            session.show(frames, actions)
        return session

    def resume(self, path: Path | str) -> "WorldSession":
        """Open a session that `WorldSession.save` wrote.

        Args:
            path: The file.

        Raises:
            DataError: no such file, or not a session of this model.
        """
        path = Path(path)
        try:
            if path.stat().st_size > MAX_SESSION_BYTES:
                raise DataError(f"{path.name}: larger than any session ({MAX_SESSION_BYTES} bytes)")
            with safe_open(path, "pt") as file:
                about = json.loads((file.metadata() or {})["session"])
                state = {name: file.get_tensor(name) for name in file.keys()}
            session = self.start(
                prompt=about["prompt"], num_inference_steps=about["steps"],
                guidance_scale=about["guidance"],
            )  # fmt: skip
            session.restore(state)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"{path.name} is no session of this model: {reason}") from error
        return session


class WorldSession:
    """One world being played; made by `WorldPipeline.start`."""

    def __init__(self, pipe: WorldPipeline, live: LiveRollout, about: dict[str, Any]) -> None:
        self._pipe, self._live, self._about = pipe, live, about
        self._stream: StreamState | None = None
        self._ahead = LookAhead()
        self._last: Action | None = None

    @property
    def num_frames(self) -> int:
        """Latent frames so far, the shown ones included, those dreamt ahead not."""
        return (self._live.block - len(self._ahead)) * self._live.frames_per_block

    @property
    def guesses(self) -> tuple[int, int]:
        """Steps whose frames `look_ahead` had ready, and steps for which it took guesses back."""
        return self._ahead.hits, self._ahead.misses

    @property
    def prompt(self) -> str:
        """What the world is said to be."""
        return self._about["prompt"]

    def show(self, frames: Frames, actions: Sequence[Action] | None = None) -> None:
        """Take frames as what has happened; they are context for what comes.

        Args:
            frames: uint8 [frames, height, width, 3].
            actions: What led to each of them; None = nothing was done.

        Raises:
            UsageError: another size, or a number of frames that does not fill whole blocks.
        """
        self._ahead.drop(self._restore)
        tokenizer, per_block = self._pipe.tokenizer, self._live.frames_per_block
        frames = np.asarray(frames)
        size = tuple(tokenizer.frame_size)
        if frames.ndim != 4 or frames.dtype != np.uint8 or frames.shape[1:] != (*size, 3):
            legal = f"uint8 (frames, {size[0]}, {size[1]}, 3)"
            raise UsageError(describe("frames", f"{frames.dtype} {frames.shape}", legal))
        clip = to_clip(frames).to(self._pipe.device, self._pipe.model.dtype)
        with torch.no_grad():
            values = tokenizer.encode(clip)
        count = values.shape[1]
        if not count or count % per_block:
            near = max(per_block, count - count % per_block)
            raise UsageError(
                describe("number of latent frames", count, f"multiples of {per_block}", near)
            )
        told = self._given_actions(actions, count)
        for first in range(0, count, per_block):
            part = slice(first, first + per_block)
            self._live.observe(
                values[:, part].flatten(1, 2), None if told is None else told[:, part]
            )
            with torch.no_grad():  # the decoder must have seen what came before
                _, self._stream = tokenizer.decode_chunk(values[:, part], self._stream)

    def step(self, action: Action | None = None) -> np.ndarray:
        """Let the world take its next step.

        Args:
            action: What is done: as many numbers as the model takes, or the number of one of them
                (which is then 1 and the others 0); None = nothing. Models that dream several
                frames at a time do it on the way to each.

        Returns:
            The next frames, uint8 [frames, height, width, 3]; usually one.

        Raises:
            UsageError: an action the model does not know.
        """
        ready = self._ahead.take(action, self._restore)
        self._last = action
        return self._step(action) if ready is None else ready

    def look_ahead(self, count: int = 1) -> int:
        """Dream on while the player decides, guessing that what was done last goes on.

        A later `step` that guessed right returns at once. Frames are the same with and without.

        Args:
            count: Steps wanted ahead, at least 1.

        Returns:
            Steps that lie ahead now.

        Raises:
            UsageError: a count below 1.
        """
        check_count("count", count)
        self._ahead.dream(self._last, count, self._step, self._snapshot)
        return len(self._ahead)

    def _step(self, action: Action | None) -> np.ndarray:
        per_block = self._live.frames_per_block
        told = self._given_actions(None if action is None else [action] * per_block, per_block)
        values = self._live.step(told)
        values = rearrange(values, "1 (f n) c -> 1 f n c", f=per_block)
        with torch.no_grad():
            pixels, self._stream = self._pipe.tokenizer.decode_chunk(values, self._stream)
        return to_frames(pixels)[0]

    def _given_actions(self, actions: Sequence[Action] | None, frames: int) -> Tensor | None:
        width = self._pipe.num_actions
        if not width:
            if actions is not None:
                raise UsageError("this world takes no actions; leave them out")
            return None
        if actions is None:
            return torch.zeros(1, frames, width)
        if len(actions) != frames:
            raise UsageError(describe("number of actions", len(actions), str(frames)))
        return torch.stack([action_vector(action, width) for action in actions])[None]

    def set_prompt(self, prompt: str) -> None:
        """Say what the world is from now on."""
        self._ahead.drop(self._restore)
        self._live.set_prompts([prompt])
        self._about = self._about | {"prompt": prompt}

    def fork(self) -> "WorldSession":
        """Return a second session that goes on from here on its own."""
        other = self._pipe.start(
            prompt=self.prompt, num_inference_steps=self._about["steps"],
            guidance_scale=self._about["guidance"],
        )  # fmt: skip
        other.restore(self.snapshot())
        other._last = self._last
        return other

    def snapshot(self) -> dict[str, Tensor]:
        """Return all that going on depends on, the prompt apart (safetensors-ready).

        Frames dreamt ahead are taken back.
        """
        self._ahead.drop(self._restore)
        return self._snapshot()

    def _snapshot(self) -> dict[str, Tensor]:
        state = self._live.snapshot()
        if self._stream is not None:
            state |= {f"stream.{name}": part for name, part in self._stream.snapshot().items()}
        return {name: part.contiguous() for name, part in state.items()}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a snapshot.

        Raises:
            UsageError: a snapshot of another model.
        """
        self._ahead.drop(self._restore)
        self._restore(state)

    def _restore(self, state: dict[str, Tensor]) -> None:
        live = {name: part for name, part in state.items() if not name.startswith("stream.")}
        stream = {
            name.removeprefix("stream."): part for name, part in state.items() if name not in live
        }
        self._live.restore(live)
        self._stream = StreamState.restore(stream) if stream else None

    def save(self, path: Path | str) -> Path:
        """Write the session to a safetensors file, whole or not at all.

        Args:
            path: Where to; an older file is replaced.

        Returns:
            The path.
        """
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        save_file(self.snapshot(), partial, {"session": json.dumps(self._about)})
        os.replace(partial, path)
        return path


def action_vector(action: Any, width: int) -> Tensor:
    """Turn an action into the numbers a model is told.

    Args:
        action: `width` numbers, or the number of the one that is 1.
        width: Numbers the model takes.

    Raises:
        UsageError: another count, a number outside 0..width-1, or anything that is not finite.
    """
    given = np.asarray(action)
    if given.ndim == 0 and given.dtype.kind in "iu":
        if not 0 <= int(given) < width:
            near = min(max(int(given), 0), width - 1)
            raise UsageError(describe("action", int(given), f"0 to {width - 1}", near))
        return torch.nn.functional.one_hot(torch.tensor(int(given)), width).float()
    if given.dtype.kind not in "iuf" or given.shape != (width,):
        legal = f"{width} numbers, or one of 0 to {width - 1}"
        raise UsageError(describe("action", str(action)[:60], legal))
    if not np.isfinite(given).all():
        raise UsageError(describe("action", str(action)[:60], "finite numbers"))
    return torch.from_numpy(given.astype(np.float32))
