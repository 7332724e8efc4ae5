"""Where a student's own videos stand: what it goes on from at the next training step.

A student that is trained on windows of a few frames never meets the errors of its hundredth frame.
So its videos do not end with a step: the last frames it drew are the given frames of the next
window, told what the data's next actions are, until the clip or the horizon ends and the video
starts anew from true frames.

It knows neither models nor losses. Invariant: all of it is in buffers, so a resumed run goes on
from the same frames.

Source: LongLive (arXiv:2509.22622), streaming long tuning. Differs: the frames before a window are
kept as latents and read anew, so no keys grow stale as the student changes.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


class Streams(nn.Module):
    """Videos of a student, one per item of a batch, that go on from step to step."""

    items: Tensor
    ages: Tensor
    tails: Tensor

    def __init__(self, values: Any, batch: int, given: int, horizon: int) -> None:
        """Start no video yet.

        Args:
            values: `ClipTokens`: windows of the data.
            batch: Videos.
            given: Frames of a window that are given.
            horizon: Frames a video has at most, the first given ones left out.

        Raises:
            ValueError: Data that is not windows of clips.
        """
        super().__init__()
        if getattr(values, "windows", None) is None:
            raise ValueError("distill.horizon needs clips with several frames; set it to 0")
        self.values = values
        self.given, self.horizon = given, horizon
        length = values.windows.length
        self.advance = length - given
        """Frames a window adds."""
        self.given_slots = values.shape[1] // length * given
        self.register_buffer("items", torch.full((batch,), -1))
        self.register_buffer("ages", torch.zeros(batch, dtype=torch.long))
        tails = torch.zeros(batch, self.given_slots, values.shape[2], dtype=values.frames.dtype)
        self.register_buffer("tails", tails)

    def next(
        self, fresh: Int[Tensor, " batch"]
    ) -> tuple[Int[Tensor, " batch"], Float[Tensor, "batch slots channels"]]:
        """Move every video to its next window; videos that end start anew.

        Args:
            fresh: Windows of the data to start from.

        Returns:
            The window of the data each video is told the actions of, and its values with the given
            frames replaced by the video's own where it goes on.

        Raises:
            ValueError: Another number of windows than there are videos.
        """
        if len(fresh) != len(self.items):
            raise ValueError(
                f"{len(fresh)} items for {len(self.items)} videos; with distill.horizon every step "
                f"takes train.batch_size items at once, on one device; try {len(self.items)}"
            )
        windows = self.values.windows
        fresh = fresh.to(self.items.device)
        following = (self.items + self.advance).clamp_max(len(windows) - 1)
        clip, start = windows.clip.to(self.items.device), windows.start.to(self.items.device)
        goes_on = (self.items >= 0) & (clip[following] == clip[self.items])
        # Windows need not lie in order: a next one is one that starts where this one ends.
        goes_on &= start[following] == start[self.items] + self.advance
        goes_on &= self.ages + self.advance <= self.horizon
        self.items = torch.where(goes_on, following, fresh)
        self.ages = torch.where(goes_on, self.ages, 0) + self.advance
        values = self.values[self.items].clone()
        own = self.tails.to(values)
        true = values[:, : self.given_slots]
        values[:, : self.given_slots] = torch.where(goes_on[:, None, None], own, true)
        return self.items, values

    def keep(self, values: Float[Tensor, "batch slots channels"]) -> None:
        """Remember the last frames of the windows that were drawn.

        Args:
            values: Latents of all frames of the windows, the given ones included.
        """
        self.tails = values[:, values.shape[1] - self.given_slots :].detach().to(self.tails)
