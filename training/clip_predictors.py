"""Closed-form predictors of a frame: baselines of the learning checks of videos.

The next-frame ones know the frame before; the others know the position in the frame and nothing
else. Everything is fitted on training clips and evaluated elsewhere; no models here.
"""

import torch
from einops import einsum, rearrange
from torch import Tensor

from .clip_stage import ClipTokens
from .predictors import SMOOTHING, CodeTable, Path, SlotGaussians

RIDGE = 1e-2
"""Added to the covariance of the frame before, in units of its mean variance."""


class FrameCodes:
    """Frequencies of every code at every position of a frame."""

    name = "code frequencies per position"

    def __init__(self, tokens: ClipTokens, num_codes: int) -> None:
        """Count.

        Args:
            tokens: Encoded training clips with one codebook.
            num_codes: Codes of the codebook.
        """
        self.cells = tokens.frames.shape[1]
        self.alone = CodeTable(tokens.frames, num_codes)

    def loss(self, values: Tensor, target: Tensor, slots: Tensor) -> Tensor:
        """Return nats per row, [batch, rows]; see `NextFrameCodes.loss`."""
        return self.alone.loss(target, slots % self.cells)


class FrameGaussians:
    """One Gaussian per position of a frame."""

    name = "best linear denoiser per position"

    def __init__(self, tokens: ClipTokens) -> None:
        """Fit on all frames."""
        self.cells = tokens.frames.shape[1]
        self.gaussians = SlotGaussians(tokens.frames)

    def predict(self, values: Tensor, sample: Tensor, path: Path, slots: Tensor) -> Tensor:
        """Return the expected target of noisy rows; see `NextFrameGaussians.predict`."""
        return self.gaussians.predict(sample, path, slots % self.cells)


class NextFrameCodes:
    """Frequencies of every code at every position, given the code there one frame before."""

    name = "code frequencies per position given the code there one frame before"

    def __init__(self, tokens: ClipTokens, num_codes: int) -> None:
        """Count on all pairs of frames.

        Args:
            tokens: Encoded training clips with one codebook.
            num_codes: Codes of the codebook.
        """
        self.cells = tokens.frames.shape[1]
        first, later = _pairs(tokens)
        counts = torch.full((self.cells, num_codes, num_codes), SMOOTHING)
        cell = torch.arange(self.cells).expand(len(first), -1)
        one = torch.ones(first.shape[:2])
        counts.index_put_((cell, first[..., 0], later[..., 0]), one, accumulate=True)
        self.log_prob = (counts / counts.sum(-1, keepdim=True)).log()
        self.alone = CodeTable(tokens.frames, num_codes)

    def loss(self, values: Tensor, target: Tensor, slots: Tensor) -> Tensor:
        """Return nats per row, [batch, rows].

        Args:
            values: True codes of whole windows [batch, slots, 1].
            target: True codes of the rows [batch, rows, 1].
            slots: Slot of each row.
        """
        cell = slots % self.cells
        before = values[:, (slots - self.cells).clamp_min(0), 0]
        known = -self.log_prob[cell, before, target[..., 0]]
        return torch.where(slots >= self.cells, known, self.alone.loss(target, cell))


class NextFrameGaussians:
    """Every position as a Gaussian whose mean is linear in the whole frame before."""

    name = "best linear denoiser per position given the frame before"

    def __init__(self, tokens: ClipTokens, before: Tensor | None = None) -> None:
        """Fit on all pairs of frames.

        Args:
            tokens: Encoded training clips; more pairs than channels.
            before: Which earlier frame of its window stands for the one before [windows, frames];
                None = the one before.
        """
        self.cells = tokens.frames.shape[1]
        if before is None:
            first, later = _pairs(tokens)
        else:
            self.name = "best linear denoiser per position given the nearest view before"
            frames = tokens.frames[tokens.windows.rows(slice(None))]
            first, later = _before(frames, before).flatten(0, 1), frames[:, 1:].flatten(0, 1)
        features = rearrange(first, "n cells c -> n (cells c)").double()
        self.centre, self.mean = features.mean(0), later.double().mean(0)
        centred = features - self.centre
        square = centred.T @ centred
        square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=square.dtype)
        wanted = rearrange(later.double() - self.mean, "n cells c -> n (cells c)")
        self.weights = torch.linalg.solve(square, centred.T @ wanted)
        left = later - self.expected(first)
        alone, known = SlotGaussians(tokens.frames), SlotGaussians(left)
        # Slots of one window: the first frame alone, then a frame with one before it.
        self.gaussians = known
        for part in ("mean", "axes", "variance"):
            setattr(known, part, torch.cat((getattr(alone, part), getattr(known, part))))

    def expected(self, before: Tensor) -> Tensor:
        """Return the expected frame after each of [frames, cells, channels]."""
        features = rearrange(before, "n cells c -> n (cells c)").double() - self.centre
        flat = einsum(features, self.weights, "n a, a b -> n b")
        return (rearrange(flat, "n (cells c) -> n cells c", cells=self.cells) + self.mean).float()

    def predict(
        self, values: Tensor, sample: Tensor, path: Path, slots: Tensor,
        before: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the expected target of noisy rows, [batch, rows, channels].

        Args:
            values: Clean windows [batch, slots, channels].
            sample: Noisy rows.
            path: How sample and target were mixed.
            slots: Slot of each row.
            before: As the predictor was fitted, of these windows.
        """
        frames = rearrange(values, "b (f cells) c -> b f cells c", cells=self.cells)
        earlier = frames[:, :-1] if before is None else _before(frames, before)
        after = rearrange(earlier, "b f cells c -> (b f) cells c")
        told = rearrange(self.expected(after), "(b f) cells c -> b f cells c", b=len(values))
        told = torch.cat((torch.zeros_like(told[:, :1]), told), 1)
        mean = rearrange(told, "b f cells c -> b (f cells) c")[:, slots]
        kind = slots % self.cells + self.cells * (slots >= self.cells)
        rest = self.gaussians.predict(sample - path.signal * mean, path, kind)
        return path.clean_share * mean + rest


def _before(frames: Tensor, before: Tensor) -> Tensor:
    """Gather, for all frames but the first, the one that stands for the frame before."""
    index = before[:, 1:, None, None].expand(-1, -1, *frames.shape[2:])
    return frames.gather(1, index)


def _pairs(tokens: ClipTokens) -> tuple[Tensor, Tensor]:
    """Return all frames with a next one, and those next frames."""
    # Windows start at every frame, so consecutive rows of one clip are found from them.
    rows = torch.zeros(len(tokens.frames), dtype=torch.bool)
    windows = tokens.windows
    rows[windows.rows(slice(None))[:, :-1]] = True
    index = rows.nonzero()[:, 0]
    return tokens.frames[index], tokens.frames[index + 1]
