"""One-dimensional convolutions over time that never look ahead, and the networks made of them.

The scheme is that of causal_conv.py: without a `Tape` a whole clip passes at once, for training;
with one, a few frames pass and the layer inputs that later frames need are kept on it. Here a frame
is a row of features, and a layer may be dilated.

Temporal padding is zeros on the left only, so many that a strided layer gives its first output
once its stride is full: `2^n` frames become one latent frame, the first like every other.

Beside the convolutions of encoder and decoder runs a linear path from a latent frame's own frames
to its channels and back. Its weights can be set to principal components, and the convolutions start
at zero: so training starts from the best linear code instead of from noise.

Invariants: both ways compute the same function; the layers hold no state; every residual branch
starts at zero.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .causal_conv import Tape, name_slots
from .conv import start_at_zero


class MotionConv(nn.Module):
    """Convolution over the present frame and those before it."""

    def __init__(
        self, width: int, out_width: int, kernel: int = 3, stride: int = 1, dilation: int = 1
    ):
        """Build the layer.

        Args:
            width: Channels in.
            out_width: Channels out.
            kernel: Frames the kernel reads, the present one last.
            stride: Frames per output frame.
            dilation: Frames from one that is read to the next.
        """
        super().__init__()
        self.past = (kernel - 1) * dilation + 1 - stride
        self.slot = ""  # name on the tape, set by the network that owns the layer
        self.conv = nn.Conv1d(width, out_width, kernel, stride, dilation=dilation)

    def forward(
        self, frames: Float[Tensor, "batch width frames"], tape: Tape | None = None
    ) -> Float[Tensor, "batch out_width out_frames"]:
        """Convolve; with a tape, after the frames it holds."""
        if not self.past:
            return self.conv(frames)
        shape = (*frames.shape[:2], self.past)
        if tape is None or tape.is_start:
            before = frames.new_zeros(shape)
        else:
            before = tape.read(self.slot, shape)
        joined = torch.cat([before, frames], dim=2)
        if tape is not None:
            tape.kept[self.slot] = joined[..., -self.past :]
        return self.conv(joined)


class FrameNorm(nn.Module):
    """Root-mean-square normalisation of every frame over its channels, with a learned scale."""

    def __init__(self, width: int, eps: float = 1e-6):
        """Build the layer.

        Args:
            width: Channels.
            eps: Added to the mean square.
        """
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(width, 1))

    def forward(
        self, frames: Float[Tensor, "batch width frames"]
    ) -> Float[Tensor, "batch width frames"]:
        """Normalise in float32; same shape and type out."""
        exact = frames.float()
        size = exact.square().mean(dim=1, keepdim=True).add(self.eps).rsqrt()
        return (exact * size * self.scale.float()).to(frames.dtype)


class MotionResidual(nn.Module):
    """A dilated causal convolution and one over channels alone, added to the input."""

    def __init__(self, width: int, dilation: int, dropout: float = 0.0):
        """Build the layer.

        Args:
            width: Channels in and out.
            dilation: Frames between those the first convolution reads.
            dropout: Share of inner channels dropped in training.
        """
        super().__init__()
        self.norm_in = FrameNorm(width)
        self.conv_in = MotionConv(width, width, dilation=dilation)
        self.norm_out = FrameNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = MotionConv(width, width, kernel=1)
        start_at_zero(self.conv_out)

    def forward(
        self, frames: Float[Tensor, "batch width frames"], tape: Tape | None = None
    ) -> Float[Tensor, "batch width frames"]:
        """Refine features of any range; same shape out."""
        inner = self.conv_in(F.silu(self.norm_in(frames)), tape)
        return frames + self.conv_out(self.dropout(F.silu(self.norm_out(inner))))


class Spread(nn.Module):
    """Doubles the frames: a causal convolution gives the channels of both halves."""

    def __init__(self, width: int):
        """Build the layer.

        Args:
            width: Channels in and out.
        """
        super().__init__()
        self.conv = MotionConv(width, 2 * width)

    def forward(
        self, frames: Float[Tensor, "batch width frames"], tape: Tape | None = None
    ) -> Float[Tensor, "batch width twice"]:
        """Spread channels over frames."""
        return rearrange(self.conv(frames, tape), "b (t c) f -> b c (f t)", t=2)


class MotionEncoder(nn.Module):
    """Feature frames to latent frames: halved in time and refined, stage by stage."""

    def __init__(
        self,
        features: int,
        width: int,
        halvings: int,
        dilations: Sequence[int],
        out_channels: int,
        dropout: float = 0.0,
    ):
        """Build the encoder.

        Args:
            features: Numbers of a frame.
            width: Channels inside.
            halvings: Stages; each halves the number of frames.
            dilations: Dilation of every residual layer of a stage.
            out_channels: Channels of a latent frame.
            dropout: Of the residual layers, in training.
        """
        super().__init__()
        stride = 2**halvings
        self.linear = MotionConv(features, out_channels, kernel=stride, stride=stride)
        self.stem = MotionConv(features, width)
        layers: list[nn.Module] = []
        for _ in range(halvings):
            layers.append(MotionConv(width, width, kernel=4, stride=2))
            layers += [MotionResidual(width, dilation, dropout) for dilation in dilations]
        self.layers = nn.ModuleList(layers)
        self.norm = FrameNorm(width)
        self.head = MotionConv(width, out_channels, kernel=1)
        start_at_zero(self.head)
        name_slots(self)

    def forward(
        self, frames: Float[Tensor, "batch features frames"], tape: Tape | None = None
    ) -> Float[Tensor, "batch channels latents"]:
        """Encode standardised frames, a multiple of `2^halvings`, into unbounded channels."""
        hidden = self.stem(frames, tape)
        for layer in self.layers:
            hidden = layer(hidden, tape)
        return self.linear(frames) + self.head(F.silu(self.norm(hidden)))


class MotionDecoder(nn.Module):
    """Latent frames to feature frames; mirrors the encoder."""

    def __init__(
        self,
        features: int,
        width: int,
        halvings: int,
        dilations: Sequence[int],
        in_channels: int,
        dropout: float = 0.0,
    ):
        """Build the decoder.

        Args:
            features: Numbers of a frame.
            width: Channels inside.
            halvings: Stages; each doubles the number of frames.
            dilations: Dilation of every residual layer of a stage.
            in_channels: Channels of a latent frame.
            dropout: Of the residual layers, in training.
        """
        super().__init__()
        self.stride = 2**halvings
        self.linear = MotionConv(in_channels, self.stride * features, kernel=1)
        self.stem = MotionConv(in_channels, width)
        layers: list[nn.Module] = []
        for _ in range(halvings):
            layers += [MotionResidual(width, dilation, dropout) for dilation in dilations]
            layers.append(Spread(width))
        self.layers = nn.ModuleList(layers)
        self.norm = FrameNorm(width)
        self.head = MotionConv(width, features)
        start_at_zero(self.head)
        name_slots(self)

    def forward(
        self, latents: Float[Tensor, "batch channels latents"], tape: Tape | None = None
    ) -> Float[Tensor, "batch features frames"]:
        """Decode latent frames into standardised frames, `2^halvings` from each."""
        hidden = self.stem(latents, tape)
        for layer in self.layers:
            hidden = layer(hidden, tape)
        direct = rearrange(self.linear(latents), "b (c s) f -> b c (f s)", s=self.stride)
        return direct + self.head(F.silu(self.norm(hidden)), tape)
