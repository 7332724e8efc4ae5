"""What every video tokenizer promises, the state of a stream, and the checks they share.

A video tokenizer turns a clip, Float[batch 3 frames height width] in [-1, 1], into values of
every latent frame: Float[batch frames tokens channels] (standardised) or
Int[batch frames tokens codebooks], tokens in raster order, and back. Layouts flatten and reorder
(frame, token); tokenizers do not.

What one chunk of a stream hands to the next lives in a `StreamState`, never in the module. A state
is never changed; keeping one is enough to rewind.

It does not know prompts, masks or schedules, nor how a tokenizer computes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from .base import Value

Direction = Literal["encode", "decode"]
Features = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class StreamState:
    """Everything a stream remembers between two chunks.

    Attributes:
        direction: "encode" (pixels come in) or "decode" (latents or codes come in).
        steps: Complete steps so far.
        waiting: Input frames of an incomplete step, shaped like the input; often none.
        features: Layer inputs that later steps look back at, batch first, by layer name.
    """

    direction: Direction
    steps: int
    waiting: Tensor
    features: Mapping[str, Tensor]

    @property
    def batch_size(self) -> int:
        """Streams that run side by side."""
        return len(self.waiting)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of this state."""
        tensors = (self.waiting, *self.features.values())
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def select(self, rows: Tensor) -> "StreamState":
        """Return the state of some streams of the batch, for instance to drop finished ones.

        Args:
            rows: int64 batch indices, repeats allowed.
        """
        features = {name: kept[rows] for name, kept in self.features.items()}
        return replace(self, waiting=self.waiting[rows], features=features)

    def snapshot(self) -> dict[str, Tensor]:
        """Return plain tensors, ready for safetensors, from which `restore` gives this state."""
        return {
            "direction": torch.tensor(int(self.direction == "decode")),
            "steps": torch.tensor(self.steps),
            "waiting": canonical(self.waiting),
            **{f"features.{name}": canonical(kept) for name, kept in self.features.items()},
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor]) -> "StreamState":
        """Rebuild a state from a snapshot.

        Args:
            tensors: What `snapshot` returned.

        Raises:
            ValueError: A part of the snapshot is missing.
        """
        for name in ("direction", "steps", "waiting"):
            if name not in tensors:
                raise ValueError(f"snapshot has no {name!r}; it holds {', '.join(sorted(tensors))}")
        prefix = "features."
        return cls(
            direction="decode" if int(tensors["direction"]) else "encode",
            steps=int(tensors["steps"]),
            waiting=tensors["waiting"].clone(),
            features={
                name.removeprefix(prefix): kept.clone()
                for name, kept in tensors.items()
                if name.startswith(prefix)
            },
        )


@runtime_checkable
class VideoTokenizer(Protocol):
    """Clips to values of latent frames and back, whole or as a stream.

    Attributes:
        value: "code" (integers) or "latent" (floats with mean 0 and deviation 1).
        frame_size: Height and width of a frame, in pixels.
        grid: Token rows and columns of a latent frame.
        temporal_stride: Pixel frames per latent frame, after the first.
        num_codebooks: Codes per token; 0 for latents.
        codebook_size: Values of one code, 0..codebook_size-1; 0 for latents.
        latent_channels: Floats per token; 0 for codes.
    """

    value: Value
    frame_size: tuple[int, int]
    grid: tuple[int, int]
    temporal_stride: int
    num_codebooks: int
    codebook_size: int
    latent_channels: int

    def encode(self, pixels: Tensor) -> Tensor:
        """Turn a clip into codes or standardised latents."""
        ...

    def decode(self, values: Tensor) -> Tensor:
        """Turn codes or standardised latents into a clip."""
        ...

    def encode_chunk(
        self, frames: Tensor, state: StreamState | None = None
    ) -> tuple[Tensor, StreamState]:
        """Encode some more frames of a stream."""
        ...

    def decode_chunk(
        self, values: Tensor, state: StreamState | None = None
    ) -> tuple[Tensor, StreamState]:
        """Decode some more latent frames of a stream."""
        ...

    def estimate_state_bytes(self, batch_size: int, direction: Direction) -> int:
        """Return the most bytes a stream's state will hold."""
        ...

    def loss(
        self, pixels: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the scalar training loss and named metrics."""
        ...


def motion_loss(
    pixels: Float[Tensor, "batch 3 frames height width"],
    target: Float[Tensor, "batch 3 frames height width"],
) -> Float[Tensor, ""]:
    """Average the absolute error of the change from frame to frame; 0 for a single frame.

    Args:
        pixels: Reconstruction, about [-1, 1].
        target: Original in [-1, 1].
    """
    if pixels.shape[2] < 2:
        return pixels.new_zeros(())
    return F.l1_loss(pixels.float().diff(dim=2), target.float().diff(dim=2))


def check_clip(pixels: Tensor, frame_size: tuple[int, int]) -> None:
    """Refuse clips of the wrong rank, channel count or frame size.

    Raises:
        ValueError: Not [batch, 3, frames, height, width] of this height and width.
    """
    height, width = frame_size
    if pixels.ndim != 5 or pixels.shape[1] != 3 or tuple(pixels.shape[3:]) != (height, width):
        raise ValueError(
            f"clip has shape {list(pixels.shape)}; this tokenizer takes "
            f"[batch, 3, frames, {height}, {width}]"
        )


def check_count(
    what: str, unit: str, count: int, first: int, step: int, single: bool = False
) -> None:
    """Refuse a number of frames that is not `first` plus a multiple of `step`.

    Args:
        what: Name of the thing that has them, for the message.
        unit: Name of what is counted, plural.
        count: The number.
        first: Frames of the first step.
        step: Frames of a later step.
        single: Whether a single frame is legal besides.

    Raises:
        ValueError: Another number; the nearest legal one is named.
    """
    if (single and count == 1) or (count >= first and (count - first) % step == 0):
        return
    steps = max(0, round((count - first) / step))
    legal = [first + steps * step] + [1] * single
    nearest = min(legal, key=lambda number: abs(number - count))
    # A first step may hold several later ones, and 8n+1 reads better than 8n+9.
    rest = first % step or first
    least = f" from {first} on" if first > step else ""
    least += ", or 1" if single and first > step else ""
    raise ValueError(
        f"{what} has {count} {unit}; legal numbers are {step}n+{rest}{least}, nearest {nearest}"
    )


def check_state(state: StreamState, direction: Direction, new: Tensor, axis: int) -> None:
    """Refuse a state that does not continue with these frames.

    Args:
        state: The state.
        direction: What it is used for.
        new: The frames to come.
        axis: Axis of time in `new`.

    Raises:
        ValueError: Another direction, batch size or frame shape.
    """
    if state.direction != direction:
        raise ValueError(
            f"state is of a stream that {state.direction}s; {direction}_chunk takes one that "
            f"{direction}s, or None to start"
        )
    expected, given = list(new.shape), list(state.waiting.shape)
    if len(given) != len(expected) or any(
        g != e for i, (g, e) in enumerate(zip(given, expected, strict=True)) if i != axis
    ):
        raise ValueError(
            f"state holds waiting frames of shape {given}; the new ones have shape {expected}, "
            "and only the number of frames may differ"
        )


def canonical(tensor: Tensor) -> Tensor:
    """Copy a tensor to plain contiguous memory; kernels look at strides to pick their loops."""
    return tensor.clone(memory_format=torch.contiguous_format)
