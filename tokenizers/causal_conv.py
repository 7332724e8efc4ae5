"""Convolutions over space and time that never look ahead, and the encoder and decoder made of them.

Inside, clips are [batch frames channels height width]: frames stand before channels, so a window
of frames is one contiguous image with more channels and a plain 2-D convolution does the work (on
a CPU two to four times faster than the 3-D kernel).

Temporal padding is zeros on the left only. Normalisation is per pixel over channels, since
statistics over frames would leak the future. Without a `Tape` a whole clip passes at once, for
training; with one, a few frames pass and the layer inputs that later frames need are kept.

Invariants: both ways compute the same function; the layers hold no state; every residual branch
starts at zero.
"""

from collections.abc import Mapping, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from .conv import GridAttention, start_at_zero


class Tape:
    """Layer inputs of earlier frames, read by name, and those this pass keeps.

    Attributes:
        past: Read: from the pass before; empty at the start of a stream.
        kept: Written: for the next pass.
    """

    def __init__(self, past: Mapping[str, Tensor]):
        """Start a pass.

        Args:
            past: `kept` of the pass before.
        """
        self.past = past
        self.kept: dict[str, Tensor] = {}

    @property
    def is_start(self) -> bool:
        """Whether no frame came before."""
        return not self.past

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the frames a layer kept.

        Raises:
            ValueError: They are missing or have another shape than this layer keeps.
        """
        if name not in self.past or tuple(self.past[name].shape) != shape:
            found = list(self.past[name].shape) if name in self.past else "nothing"
            raise ValueError(
                f"state holds {found} for layer {name!r}, which needs {list(shape)}; it belongs "
                "to another tokenizer"
            )
        return self.past[name]


class CausalConv(nn.Module):
    """Convolution over the present frame and those before it."""

    def __init__(
        self,
        width: int,
        out_width: int,
        kernel: int = 3,
        stride: int = 1,
        time_kernel: int = 3,
        time_stride: int = 1,
    ):
        """Build the layer.

        Args:
            width: Channels in.
            out_width: Channels out.
            kernel: Side of the spatial kernel; odd ones are padded to keep the size.
            stride: Spatial stride.
            time_kernel: Frames the kernel spans, the present one last.
            time_stride: Frames per output frame; the first frame always gives one.
        """
        super().__init__()
        self.time_kernel = time_kernel
        self.time_stride = time_stride
        self.slot = ""  # name on the tape, set by the network that owns the layer
        padding = kernel // 2 if stride == 1 else 0
        self.conv = nn.Conv2d(time_kernel * width, out_width, kernel, stride, padding)

    def forward(
        self, frames: Float[Tensor, "batch frames width height columns"], tape: Tape | None = None
    ) -> Float[Tensor, "batch out_frames out_width out_height out_columns"]:
        """Convolve; with a tape, after the frames it holds."""
        windows = self._with_past(frames, tape).unfold(1, self.time_kernel, self.time_stride)
        images = rearrange(windows, "b f c h w k -> (b f) (k c) h w")
        return rearrange(self.conv(images), "(b f) c h w -> b f c h w", b=len(frames))

    def _with_past(self, frames: Tensor, tape: Tape | None) -> Tensor:
        keep = self.time_kernel - self.time_stride
        if keep <= 0:
            return frames
        batch, _, *image = frames.shape
        if tape is None or tape.is_start:
            past = frames.new_zeros(batch, self.time_kernel - 1, *image)
        else:
            past = tape.read(self.slot, (batch, keep, *image))
        joined = torch.cat([past, frames], dim=1)
        if tape is not None:
            tape.kept[self.slot] = joined[:, -keep:]
        return joined


class PixelNorm(nn.Module):
    """Root-mean-square normalisation of every pixel over its channels, with a learned scale."""

    def __init__(self, width: int, eps: float = 1e-6):
        """Build the layer.

        Args:
            width: Channels.
            eps: Added to the mean square.
        """
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(width, 1, 1))

    def forward(
        self, frames: Float[Tensor, "batch frames width height columns"]
    ) -> Float[Tensor, "batch frames width height columns"]:
        """Normalise in float32; same shape and type out."""
        exact = frames.float()
        size = exact.square().mean(dim=-3, keepdim=True).add(self.eps).rsqrt()
        return (exact * size * self.scale.float()).to(frames.dtype)


class CausalResidual(nn.Module):
    """Two normalised 3x3x3 causal convolutions, added to the input."""

    def __init__(self, width: int):
        """Build the layer.

        Args:
            width: Channels in and out.
        """
        super().__init__()
        self.norm_in = PixelNorm(width)
        self.conv_in = CausalConv(width, width)
        self.norm_out = PixelNorm(width)
        self.conv_out = CausalConv(width, width)
        start_at_zero(self.conv_out)

    def forward(
        self, frames: Float[Tensor, "batch frames width height columns"], tape: Tape | None = None
    ) -> Float[Tensor, "batch frames width height columns"]:
        """Refine features of any range; same shape out."""
        inner = self.conv_in(F.silu(self.norm_in(frames)), tape)
        return frames + self.conv_out(F.silu(self.norm_out(inner)), tape)


class FrameAttention(nn.Module):
    """Attention over all cells of each frame; frames do not see each other."""

    def __init__(self, width: int, num_cells: int):
        """Build the layer.

        Args:
            width: Channels; a multiple of 4.
            num_cells: Cells of the grid.
        """
        super().__init__()
        self.attention = GridAttention(width, num_cells)

    def forward(
        self, frames: Float[Tensor, "batch frames width height columns"], tape: Tape | None = None
    ) -> Float[Tensor, "batch frames width height columns"]:
        """Mix the cells of every frame; same shape out."""
        mixed = self.attention(rearrange(frames, "b f c h w -> (b f) c h w"))
        return rearrange(mixed, "(b f) c h w -> b f c h w", b=len(frames))


class Upsample(nn.Module):
    """Doubles both sides and perhaps multiplies frames; the first frame stays one frame."""

    def __init__(self, width: int, out_width: int, time_stride: int = 1):
        """Build the layer.

        Args:
            width: Channels in.
            out_width: Channels out.
            time_stride: Frames out per frame in, after the first; 1 or 2.
        """
        super().__init__()
        self.time_stride = time_stride
        time_kernel = 3 if time_stride > 1 else 1
        self.conv = CausalConv(width, 4 * time_stride * out_width, 1, time_kernel=time_kernel)

    def forward(
        self, frames: Float[Tensor, "batch frames width height columns"], tape: Tape | None = None
    ) -> Float[Tensor, "batch out_frames out_width out_height out_columns"]:
        """Spread channels over pixels and frames."""
        spread = rearrange(
            self.conv(frames, tape),
            "b f (t c p q) h w -> b (f t) c (h p) (w q)",
            t=self.time_stride,
            p=2,
            q=2,
        )
        # The first latent frame stands for one pixel frame: the last of its group.
        skip = self.time_stride - 1 if tape is None or tape.is_start else 0
        return spread[:, skip:]


class CausalEncoder(nn.Module):
    """A clip to latent frames of features: patches, then residual layers at halved resolutions."""

    def __init__(
        self,
        grid: tuple[int, int],
        patch: int,
        time_strides: Sequence[int],
        widths: Sequence[int],
        depths: Sequence[int],
        out_channels: int,
    ):
        """Build the encoder.

        Args:
            grid: Rows and columns of the coarsest resolution.
            patch: Side of the patches cut at the door, in pixels.
            time_strides: Temporal stride of every downsampling, finest first.
            widths: Channels from the finest to the coarsest resolution.
            depths: Layers at each resolution.
            out_channels: Channels of a grid cell.
        """
        super().__init__()
        self.patch = patch
        self.stem = CausalConv(3 * patch**2, widths[0])
        layers: list[nn.Module] = []
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            if level:
                stride = time_strides[level - 1]
                time_kernel = 3 if stride > 1 else 1
                layers.append(CausalConv(widths[level - 1], width, 2, 2, time_kernel, stride))
            layers += _layers(width, depth, grid if level == len(widths) - 1 else None)
        self.layers = nn.ModuleList(layers)
        self.norm = PixelNorm(widths[-1])
        self.head = CausalConv(widths[-1], out_channels, 1, time_kernel=1)
        name_slots(self)

    def forward(
        self, frames: Float[Tensor, "batch frames 3 height width"], tape: Tape | None = None
    ) -> Float[Tensor, "batch latents out grid_height grid_width"]:
        """Encode pixels in [-1, 1] into unbounded features."""
        features = self.stem(F.pixel_unshuffle(frames, self.patch), tape)
        for layer in self.layers:
            features = layer(features, tape)
        return self.head(F.silu(self.norm(features)))


class CausalDecoder(nn.Module):
    """Latent frames of features to a clip; mirrors the encoder and ends on pixels."""

    def __init__(
        self,
        grid: tuple[int, int],
        patch: int,
        time_strides: Sequence[int],
        widths: Sequence[int],
        depths: Sequence[int],
        in_channels: int,
        pixel_width: int = 16,
    ):
        """Build the decoder.

        Args:
            grid: Rows and columns of the coarsest resolution.
            patch: Side of the patches the encoder cut at the door, in pixels; a power of two.
            time_strides: Temporal stride of every resampling, finest first, as in the encoder.
            widths: Channels from the finest to the coarsest resolution, as in the encoder.
            depths: Layers at each resolution, same order.
            in_channels: Channels of a grid cell.
            pixel_width: Least channels of the layers between the finest level and pixels.
        """
        super().__init__()
        self.stem = CausalConv(in_channels, widths[-1])
        layers: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            coarsest = level == len(widths) - 1
            layers += _layers(widths[level], depths[level], grid if coarsest else None)
            if level:
                layers.append(Upsample(widths[level], widths[level - 1], time_strides[level - 1]))
        self.layers = nn.ModuleList(layers)
        self.norm = PixelNorm(widths[0])
        self.spread = nn.ModuleList()
        self.smooth = nn.ModuleList()
        width = widths[0]
        for _ in range(patch.bit_length() - 1):
            finer = max(pixel_width, width // 2)
            self.spread.append(Upsample(width, finer))
            self.smooth.append(CausalConv(finer, finer, time_kernel=1))
            width = finer
        self.head = CausalConv(width, 3, time_kernel=1)
        name_slots(self)

    def forward(
        self,
        features: Float[Tensor, "batch latents channels grid_height grid_width"],
        tape: Tape | None = None,
    ) -> Float[Tensor, "batch frames 3 height width"]:
        """Decode features into pixels; about [-1, 1], not clamped."""
        frames = self.stem(features, tape)
        for layer in self.layers:
            frames = layer(frames, tape)
        frames = F.silu(self.norm(frames))
        for spread, smooth in zip(self.spread, self.smooth, strict=True):
            frames = F.silu(spread(frames, tape))
            frames = frames + smooth(frames, tape)
        return self.head(frames, tape)


def _layers(width: int, depth: int, grid: tuple[int, int] | None) -> list[nn.Module]:
    """Residual layers; on the coarsest grid each is followed by attention over the frame."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(CausalResidual(width))
        if grid is not None:
            layers.append(FrameAttention(width, grid[0] * grid[1]))
    return layers


def name_slots(network: nn.Module) -> None:
    """Give every layer of a network that keeps inputs on a tape its name there."""
    for name, module in network.named_modules():
        if hasattr(module, "slot"):
            module.slot = name
