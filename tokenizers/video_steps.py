"""The one loop that runs a video tokenizer, over a whole clip or over chunks of a stream.

Time is cut into canonical steps: the first `first_frames` frames become the first
`first_latents` latent frames, and every later `step_frames` frames become `step_latents`. A whole
clip is the loop over its steps, and a stream is the same loop interrupted, so both give the same
bits.

Invariants: the module keeps nothing between calls. On a CPU items of a batch run one by one,
because kernels choose their summation order by batch size.

It does not know how a step computes.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .base import Value
from .video_base import (
    Direction,
    Features,
    StreamState,
    canonical,
    check_clip,
    check_count,
    check_state,
)

# Axis of time in pixels [batch 3 frames height width], in feature frames [batch features frames]
# and in values [batch frames tokens width].
_TIME_AXIS = {"encode": 2, "decode": 1}


class SteppedTokenizer(ABC):
    """Runs the steps of a video tokenizer; a subclass computes one step each way.

    The attributes are those of `VideoTokenizer`, and the four step sizes.
    """

    value: Value
    frame_size: tuple[int, int]
    grid: tuple[int, int]
    temporal_stride: int
    num_codebooks: int
    codebook_size: int
    latent_channels: int
    first_frames = 1
    step_frames = 1
    first_latents = 1
    step_latents = 1
    takes_single = False  # a single frame is a clip although the first step holds more

    # What the module base class of every subclass brings along.
    config: Any
    dtype: torch.dtype
    device: torch.device

    @abstractmethod
    def encode_step(
        self, frames: Tensor, features: Features, is_first: bool
    ) -> tuple[Tensor, Features]:
        """Encode the pixel frames of one step.

        Args:
            frames: [batch 3 frames height width] in the module's type.
            features: What the last step kept; empty on the first.
            is_first: Whether a stream starts here.

        Returns:
            Values [batch latents tokens width] and what the next step needs.
        """

    @abstractmethod
    def decode_step(
        self, values: Tensor, features: Features, is_first: bool
    ) -> tuple[Tensor, Features]:
        """Decode the latent frames of one step; arguments and results mirror `encode_step`."""

    @property
    def num_tokens(self) -> int:
        """Tokens of a latent frame."""
        return self.grid[0] * self.grid[1]

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of an input frame, without the axis of time: colours, height, width."""
        return (3, *self.frame_size)

    def check_input(self, frames: Tensor) -> None:
        """Refuse a clip whose frames are not of `frame_shape`.

        Raises:
            ValueError: Not [batch, 3, frames, height, width] of this height and width.
        """
        check_clip(frames, self.frame_size)

    def encode(self, pixels: Float[Tensor, "batch 3 frames height width"]) -> Tensor:
        """Turn a clip in [-1, 1] into the values of its latent frames, without noise.

        Returns:
            Float[batch latents tokens channels] standardised, or Int[batch latents tokens
            codebooks].

        Raises:
            ValueError: Frames of another size, or a number of frames that steps do not fill.
        """
        self.check_input(pixels)
        self._check_frames(pixels.shape[2])
        return self.encode_chunk(pixels)[0]

    def decode(self, values: Tensor) -> Float[Tensor, "batch 3 frames height width"]:
        """Turn values of latent frames into a clip, clamped to [-1, 1].

        Args:
            values: As `encode` returns them.

        Raises:
            ValueError: Values of another shape, codes outside the codebook, or a number of latent
                frames that steps do not fill.
        """
        self._check_values(values)
        check_count(
            "clip",
            "latent frames",
            values.shape[1],
            self.first_latents,
            self.step_latents,
            self.takes_single,
        )
        return self.decode_chunk(values)[0]

    def encode_chunk(
        self,
        frames: Float[Tensor, "batch 3 frames height width"],
        state: StreamState | None = None,
    ) -> tuple[Tensor, StreamState]:
        """Encode some more frames of a stream; an incomplete step waits in the state.

        Args:
            frames: Any number of frames in [-1, 1].
            state: From the chunk before; None starts a stream.

        Returns:
            Values of the latent frames that are now complete, perhaps none, and the new state.
            All chunks together equal `encode` of all frames, bit for bit.

        Raises:
            ValueError: Frames of another size, or a state of another stream.
        """
        self.check_input(frames)
        return self._advance("encode", frames.to(self.dtype), state)

    def decode_chunk(
        self, values: Tensor, state: StreamState | None = None
    ) -> tuple[Float[Tensor, "batch 3 frames height width"], StreamState]:
        """Decode some more latent frames of a stream; an incomplete step waits in the state.

        Args:
            values: Values of any number of latent frames, as `encode` returns them.
            state: From the chunk before; None starts a stream.

        Returns:
            The pixel frames that are now complete, perhaps none, and the new state. All chunks
            together equal `decode` of all values, bit for bit.

        Raises:
            ValueError: Values of another shape, or a state of another stream.
        """
        self._check_values(values)
        values = values.to(self.dtype) if self.value == "latent" else values
        return self._advance("decode", values, state)

    def num_latents(self, num_frames: int) -> int:
        """Return the latent frames of a clip.

        Raises:
            ValueError: A number of frames that steps do not fill.
        """
        self._check_frames(num_frames)
        return 1 + (num_frames - 1) // self.temporal_stride

    def num_frames(self, num_latents: int) -> int:
        """Return the pixel frames that so many latent frames decode to."""
        return 1 + (num_latents - 1) * self.temporal_stride

    @torch.no_grad()
    def estimate_state_bytes(self, batch_size: int, direction: Direction) -> int:
        """Return the most bytes a stream's state will hold, features and waiting frames.

        Steps run on shapes alone, without weights, so this costs neither memory nor arithmetic.

        Args:
            batch_size: Streams side by side.
            direction: "encode" or "decode".
        """
        encoding = direction == "encode"
        first = self.first_frames if encoding else self.first_latents
        step = self.step_frames if encoding else self.step_latents
        count = first + 2 * step + step - 1  # two later steps fill every look-back
        with torch.device("meta"):
            settings = {k: v for k, v in self.config.items() if not k.startswith("_")}
            twin: Any = type(self)(**settings)
            # diffusers' own `to` would warn about types it keeps.
            nn.Module.to(twin, self.dtype)
            if encoding:
                channels, *sides = self.frame_shape
                frames = torch.empty(batch_size, channels, count, *sides)
                return twin.encode_chunk(frames)[1].num_bytes
            values = torch.empty(batch_size, count, self.num_tokens, self.latent_channels)
            if self.value == "code":
                values = torch.empty(*values.shape[:3], self.num_codebooks, dtype=torch.int64)
            return twin.decode_chunk(values)[1].num_bytes

    def _check_frames(self, count: int) -> None:
        check_count("clip", "frames", count, self.first_frames, self.step_frames, self.takes_single)

    def _check_values(self, values: Tensor) -> None:
        width = self.latent_channels if self.value == "latent" else self.num_codebooks
        if values.ndim != 4 or tuple(values.shape[2:]) != (self.num_tokens, width):
            raise ValueError(
                f"{self.value}s have shape {list(values.shape)}; this tokenizer takes "
                f"[batch, latent frames, {self.num_tokens}, {width}]"
            )

    def _advance(
        self, direction: Direction, new: Tensor, state: StreamState | None
    ) -> tuple[Tensor, StreamState]:
        """Run the steps that `new` completes."""
        axis = _TIME_AXIS[direction]
        if state is None:
            state = StreamState(direction, 0, new.narrow(axis, 0, 0), {})
        check_state(state, direction, new, axis)
        joined = torch.cat([state.waiting, new], dim=axis)
        sizes = self._step_sizes(direction, state.steps, joined.shape[axis])
        rows = _alone(joined)
        parts = [
            self._run(direction, joined[row], {n: f[row] for n, f in state.features.items()},
                      state.steps, sizes)
            for row in rows
        ]  # fmt: skip
        outputs = torch.cat([output for output, _ in parts])
        names = parts[0][1]
        features = {name: torch.cat([kept[name] for _, kept in parts]) for name in names}
        done = sum(sizes)
        waiting = canonical(joined.narrow(axis, done, joined.shape[axis] - done))
        return outputs, StreamState(direction, state.steps + len(sizes), waiting, features)

    def _step_sizes(self, direction: Direction, steps: int, available: int) -> list[int]:
        """Return the input frames of every step that `available` frames fill."""
        encoding = direction == "encode"
        first = self.first_frames if encoding else self.first_latents
        step = self.step_frames if encoding else self.step_latents
        sizes = [first] if steps == 0 and available >= first else []
        if steps or sizes:
            sizes += [step] * ((available - sum(sizes)) // step)
        return sizes

    def _run(
        self, direction: Direction, joined: Tensor, features: Features, steps: int, sizes: list[int]
    ) -> tuple[Tensor, Features]:
        run = self.encode_step if direction == "encode" else self.decode_step
        axis = _TIME_AXIS[direction]
        outputs = [] if sizes else [self._nothing(direction, joined)]
        start = 0
        for index, size in enumerate(sizes):
            # Kernels look at strides too, so every step gets plain contiguous tensors.
            inputs = canonical(joined.narrow(axis, start, size))
            kept = {name: canonical(feature) for name, feature in features.items()}
            output, features = run(inputs, kept, steps + index == 0)
            outputs.append(output)
            start += size
        return torch.cat(outputs, dim=3 - axis), {n: canonical(f) for n, f in features.items()}

    def _nothing(self, direction: Direction, joined: Tensor) -> Tensor:
        """Return an output without frames."""
        if direction == "decode":
            channels, *sides = self.frame_shape
            return joined.new_empty(len(joined), channels, 0, *sides, dtype=self.dtype)
        width = self.latent_channels if self.value == "latent" else self.num_codebooks
        dtype = self.dtype if self.value == "latent" else torch.int64
        return joined.new_empty(len(joined), 0, self.num_tokens, width, dtype=dtype)


def _alone(joined: Tensor) -> list[slice]:
    if joined.device.type != "cpu" or not len(joined):
        return [slice(None)]
    return [slice(row, row + 1) for row in range(len(joined))]
