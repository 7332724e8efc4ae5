"""What stands in the rows before the first layer: values, places, copies, turns, prompt rows.

The part of the backbone that turns codes, latents, actions and patches into rows of its width. It
runs no layers and does not know masks or noise schedules.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..core.far import coarse_members
from ..core.layout import Copy, Layout, Role
from ..core.numerics import RowStableLinear
from .layers import period_features, row_runs
from .prompts import PreparedPrompt


class RowInputs(nn.Module):
    """Tables and maps that rows are made of; `config` is that of the backbone."""

    config: Any
    code_offset: Tensor

    def _add_tables(self) -> None:
        """Add what rows carry besides: the masked row, places, turns, and which copy they are."""
        config, dim = self.config, self.config.dim
        self.mask_row = nn.Parameter(torch.randn(dim) * 0.02)
        self.position_table = nn.Embedding(config.num_sources, dim)
        nn.init.normal_(self.position_table.weight, std=0.1)
        if config.num_orders:
            self.order_table = nn.Embedding(config.num_orders, dim)
            nn.init.normal_(self.order_table.weight, std=0.1)
        self.copy_table = nn.Parameter(torch.zeros(len(Copy), dim))

    def _add_embeddings(self) -> None:
        """Add the maps of what rows hold: codes or latents, and actions where rows hold them."""
        config = self.config
        dim, codebooks = config.dim, config.num_codebooks
        if config.value == "code":
            self.embed_codes = nn.Embedding(codebooks * config.codebook_size, dim)
            nn.init.normal_(self.embed_codes.weight, std=1 / math.sqrt(codebooks))
            self.register_buffer(
                "code_offset", torch.arange(codebooks) * config.codebook_size, persistent=False
            )
        else:
            self.embed_latents = RowStableLinear(config.latent_channels, dim)
            self.embed_noisy = RowStableLinear(config.latent_channels, dim)
        if config.far_patch:
            width = dim if config.value == "code" else config.latent_channels
            self.embed_patches = RowStableLinear(config.far_patch**2 * width, dim)
        if config.structure_dim:  # a map of the channels beside the value's, added: the same
            self.embed_structure = RowStableLinear(config.structure_dim, dim)
        self.embed_done: nn.Module
        if config.action_codes:
            self.embed_done = nn.Embedding(config.action_codes, dim)
        elif config.action_numbers:
            self.embed_done = RowStableLinear(config.action_numbers, dim)

    def _embed(self, values: Tensor, is_masked: Tensor, layout: Layout) -> Tensor:
        """Embed data rows: codes summed over codebooks, or latents, by copy; actions by role."""
        is_action = ((layout.role & int(Role.ACTION)) != 0)[..., None]
        acts = hasattr(self, "embed_done")
        done = values
        if acts:  # ids of actions are none of the frames' codes
            values = values.masked_fill(is_action, 0)
        if self.config.value == "code":
            rows = self.embed_codes(values + self.code_offset).sum(-2)
        else:
            values = values.to(self.mask_row.dtype)
            rows = self._embed_latents(values, layout)
        if acts:
            rows = torch.where(is_action, self._embed_actions(done, is_action), rows)
        if self.config.far_patch:
            held = rows if self.config.value == "code" else values
            rows = self._with_patches(rows, held, layout)
        return torch.where(is_masked[..., None], self.mask_row.to(rows.dtype), rows)

    def _embed_latents(self, values: Tensor, layout: Layout) -> Tensor:
        """Embed latents; rows that are told their noise level have a map of their own."""
        copies = {run.copy for run in row_runs(layout)}
        if self.config.level == "none" or Copy.NOISY not in copies:
            return self.embed_latents(values)
        if len(copies) == 1:
            return self.embed_noisy(values)
        noisy = (layout.copy == Copy.NOISY)[..., None]
        return torch.where(noisy, self.embed_noisy(values), self.embed_latents(values))

    def _embed_actions(self, values: Tensor, is_action: Tensor) -> Tensor:
        """Embed what ACTION rows hold; other rows come out as anything."""
        if self.config.action_codes:
            ids = values[..., :1].masked_fill(~is_action, 0)
            return self.embed_done(ids[..., 0].long())
        return self.embed_done(values[..., : self.config.action_numbers].to(self.mask_row.dtype))

    def _with_patches(self, rows: Tensor, held: Tensor, layout: Layout) -> Tensor:
        """Embed COARSE rows by what the clean rows of their patch hold, side by side."""
        coarse, members = coarse_members(layout, self.config.far_patch)
        if not len(coarse):
            return rows
        patches = self.embed_patches(held[:, members].flatten(2))
        return rows.index_copy(1, coarse, patches.to(rows.dtype))

    def _places(self, layout: Layout) -> Tensor:
        """Look up the learned absolute position of every row; COARSE rows have a mean one."""
        source = layout.source.clamp_min(0)
        places = self.position_table(source % self.config.num_sources)
        if not self.config.far_patch:
            return places
        coarse, members = coarse_members(layout, self.config.far_patch)
        return places.index_copy(0, coarse, places[members].mean(1)) if len(coarse) else places

    def _rows(
        self, values: Tensor, is_masked: Tensor, layout: Layout, prompt: PreparedPrompt,
        structure: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Assemble the input of the first layer: prompt rows where source < 0, data elsewhere."""
        runs = row_runs(layout)
        copies = self.copy_table[runs[0].copy if len(runs) == 1 else layout.copy]
        x = self._embed(values, is_masked, layout)
        x = x + self._places(layout) + copies
        if self.config.position == "periodic":
            place = period_features(layout.position[:, 0], self.config.dim, self.config.period)
            x = x + place.to(x.dtype)
        if structure is not None:
            shown = self.embed_structure(structure.to(x.dtype))
            x = x + torch.where((layout.copy == Copy.NOISY)[:, None], shown, 0.0)
        if self.config.num_orders:
            turn = self.order_table(layout.order.clamp(0, self.config.num_orders - 1))
            x = x + torch.where(is_masked[..., None], turn, 0.0)
        if prompt.prefix is None or all(run.is_data for run in runs):
            return x
        is_data = layout.source >= 0
        # Prompt rows count -rows..-1 in `order`.
        slot = (layout.order + self.config.num_prompt_rows).clamp(
            0, self.config.num_prompt_rows - 1
        )
        slot = slot.expand(x.shape[0], -1)
        index = slot[..., None].expand(-1, -1, x.shape[-1])
        return torch.where(is_data[..., None], x, prompt.prefix.to(x.dtype).gather(1, index))
