"""The one transformer behind every recipe.

Pre-norm attention and SwiGLU layers whose rows are modulated per token (adaLN-zero) with weights
indexed by the row's copy, so that clean rows can be kept free of noise level and prompt: then their
keys and values serve every guidance branch (ACDiT, arXiv:2412.07720).

It does not know masks (a lowered mask is handed in), schedules, or what its tokens stand for.

Sources: RMSNorm (arXiv:1910.07467), SwiGLU (arXiv:2002.05202), QK-norm (arXiv:2302.05442),
adaLN-zero (DiT, arXiv:2212.09748) in the shared "single" form of PixArt-alpha (arXiv:2310.00426):
one projection for all layers plus a learned table per layer. Differs: the table has one row per
copy.
"""

import math
from collections.abc import Sequence
from typing import ClassVar, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.attention import Lowered, NoMask
from ..core.cache import CacheView
from ..core.grouping import PerLayer
from ..core.layout import Copy, Layout
from ..core.numerics import RowStableLinear, row_stable_activation
from ..core.positions import Cameras, Positions, Rotary, Unmoved, inverse_transposed
from ..core.routing import routing
from .few_rows import fits_few_rows, run_few_rows
from .layers import (
    MOST_REMEMBERED,
    Layer,
    RowContext,
    Run,
    Told,
    common_level,
    distance_bias,
    layout_angles,
    level_features,
    modulate,
    rms_norm,
    row_runs,
    two_maps,
)
from .prompts import PreparedPrompt
from .row_inputs import RowInputs
from .text import spread_prompts


class BlockTransformer(RowInputs, ModelMixin, ConfigMixin):
    """Block-causal transformer over codes or latents, with or without a cache."""

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["Layer"]

    @register_to_config
    def __init__(
        self,
        dim: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        mlp_ratio: float = 8 / 3,
        rope_theta: float = 100.0,
        value: str = "code",
        num_codebooks: int = 1,
        codebook_size: int = 16,
        latent_channels: int = 0,
        num_sources: int = 64,
        num_orders: int = 0,
        prompt_dim: int = 64,
        num_prompt_rows: int = 0,
        cross_attention: bool = False,
        level: str = "none",
        level_rate: float = 1000.0,
        modulate: tuple[str, ...] = (),
        sees_words: tuple[str, ...] = ("noisy",),
        action_dim: int = 0,
        decay: float = 0.0,
        period: int = 1,
        position: str = "rope",
        aligned: bool = False,
        route: int = 0,
        route_per: str = "query",
        action_codes: int = 0,
        action_numbers: int = 0,
        far_patch: int = 0,
        structure_dim: int = 0,
    ) -> None:
        """Build the layers.

        Args:
            dim: Width of a row.
            num_layers: Transformer layers.
            num_heads: Query heads.
            num_kv_heads: Key/value heads; None = as many as query heads.
            mlp_ratio: Inner width of the MLP over `dim`.
            rope_theta: Base of the rotary frequencies.
            value: "code" or "latent".
            num_codebooks: Codes per token.
            codebook_size: Entries per codebook, the mask id not counted.
            latent_channels: Channels of a latent token.
            num_sources: Data slots with a learned absolute position: all, or those of one frame,
                which further frames share.
            num_orders: Turns that masked rows are told of, later ones as the last; 0 = not told.
            prompt_dim: Width of the text encoder.
            num_prompt_rows: Prompt rows in front (words, then one row for the pooled prompt).
            cross_attention: Attend to the words in every layer.
            level: "none", "adaln" or "add": how a noisy row is told its noise level.
            level_rate: Highest frequency of the level's sinusoids, in radians.
            modulate: Copies whose rows the pooled prompt modulates.
            sees_words: Copies whose rows cross-attend.
            action_dim: Numbers every data row is told through the modulation; 0 = none.
            decay: Scale by which scores fall with distance along the first axis; 0 = not.
            period: Places of that axis over which such a score stays the same.
            position: "rope", "pose" for the camera of each row's frame, or "periodic" for
                sinusoids of the place within its period, added to the rows.
            aligned: Tell those numbers by aligned cross-attention instead.
            route: Finished blocks a row reads, those whose mean key fits it best; 0 = all.
            route_per: "query" or "block": who chooses them.
            action_codes: Ids that ACTION rows hold, in their first code; 0 = no such rows.
            action_numbers: Numbers that ACTION rows hold, in their first channels; 0 = no such
                rows.
            far_patch: Side of the patch of tokens that a COARSE row stands for; 0 = no such rows.
            structure_dim: Further input channels of noisy rows, a map of their frame; 0 = none.
        """
        super().__init__()
        self.copies_modulated = [Copy[name.upper()] for name in modulate]
        self.copies_seeing_words = [Copy[name.upper()] for name in sees_words]
        self._add_embeddings()
        self._add_tables()
        self._add_conditions(prompt_dim, num_prompt_rows, bool(modulate), action_dim, level)
        self._add_layers()
        self.gradient_checkpointing = False

    def _add_layers(self) -> None:
        """Add the modulations, which start at zero, and the layers, whose branches start small.

        Source: adaLN-zero (arXiv:2212.09748), residual branches as in GPT-2.
        """
        config = self.config
        self.to_modulation = RowStableLinear(config.dim, 6 * config.dim)
        self.to_final = RowStableLinear(config.dim, 2 * config.dim)
        for linear in (self.to_modulation, self.to_final):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)
        kv_heads = config.num_kv_heads or config.num_heads
        words = config.prompt_dim if config.cross_attention else 0
        told = config.action_dim if config.aligned else 0
        self.layers = nn.ModuleList(
            Layer(config.dim, config.num_heads, kv_heads, config.mlp_ratio, words, told)
            for _ in range(config.num_layers)
        )
        for layer in self._stack:
            for proj in (layer.attention.to_out, layer.mlp.to_out):
                nn.init.normal_(proj.weight, std=0.02 / math.sqrt(2 * config.num_layers) * 4)

    def _add_conditions(
        self, prompt_dim: int, num_prompt_rows: int, modulates: bool, action_dim: int, level: str
    ) -> None:
        """Add the maps of what rows are told: words, pooled prompt, actions, noise level."""
        dim = self.config.dim
        if num_prompt_rows:
            self.embed_words = RowStableLinear(prompt_dim, dim)
            self.prompt_table = nn.Parameter(torch.randn(num_prompt_rows, dim) * 0.02)
        if modulates or num_prompt_rows:
            self.embed_pooled = two_maps(prompt_dim, dim)
            spread_prompts(self.embed_pooled)
        if action_dim and not self.config.aligned:
            self.embed_action = two_maps(action_dim, dim)
        if level != "none":
            self.embed_level = two_maps(dim, dim)

    @property
    def _stack(self) -> Sequence[Layer]:
        """The layers, by the type their container forgets."""
        return cast("Sequence[Layer]", self.layers)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head."""
        return self.config.dim // self.config.num_heads

    @property
    def condition_free_clean(self) -> bool:
        """True when clean rows see no prompt at all, so guidance branches can share their cache."""
        return (
            Copy.CLEAN not in self.copies_modulated
            and not self.config.num_prompt_rows
            and not (self.config.cross_attention and Copy.CLEAN in self.copies_seeing_words)
        )

    def prepare_prompt(
        self, words: Float[Tensor, "b t p"], is_valid: Bool[Tensor, "b t"],
        pooled: Float[Tensor, "b p"],
    ) -> PreparedPrompt:  # fmt: skip
        """Project a prompt once: prompt rows, the modulation vector, cross keys and values.

        Words that are padding become a zero row plus their learned slot, so that the layout is the
        same for every prompt; the last prompt row carries the pooled prompt.
        """
        config = self.config
        vector = self.embed_pooled(pooled) if hasattr(self, "embed_pooled") else None
        prefix = None
        if config.num_prompt_rows and vector is not None:
            rows = torch.where(is_valid[..., None], self.embed_words(words), 0.0)
            rows = rows[:, : config.num_prompt_rows - 1]
            prefix = torch.cat((rows, vector[:, None]), 1) + self.prompt_table
        cross = None
        if config.cross_attention:
            cross = [layer.cross.prepare(words) for layer in self._stack if layer.cross is not None]
            # An empty prompt still needs one visible word, or softmax has nothing to sum.
            is_valid = is_valid | ~is_valid.any(-1, keepdim=True)
        return PreparedPrompt(
            prefix, vector if self.copies_modulated else None, cross, is_valid if cross else None
        )

    def _vector(
        self, run: Run, level: Tensor, prompt: PreparedPrompt, actions: Tensor | None
    ) -> Tensor:
        """Conditioning vector of rows of one kind, [batch|1, rows|1, dim]; zero = told nothing."""
        dim = self.config.dim
        vector = torch.zeros(1, 1, dim, device=self.mask_row.device, dtype=self.mask_row.dtype)
        if self.config.level == "adaln" and run.copy == Copy.NOISY:
            vector = self.embed_level(self._level_features(level).to(vector.dtype))
            vector = vector if vector.ndim == 3 else vector[None]
        if prompt.pooled is not None and run.is_data and run.copy in self.copies_modulated:
            vector = vector + prompt.pooled[:, None]
        if actions is not None and run.is_data:
            stop = run.start + 1 if run.is_one_frame else run.stop
            vector = vector + self.embed_action(actions[:, run.start : stop].to(vector.dtype))
        return row_stable_activation("silu", vector)

    def _level_features(self, level: Tensor) -> Tensor:
        return level_features(level, self.config.dim, self.config.level_rate)

    def _told(
        self, run: Run, level: Tensor, prompt: PreparedPrompt, actions: Tensor | None
    ) -> Told:
        """Modulation of the rows of one kind.

        Without gradients it is a function of the prompt, the kind and, where all rows stand at one
        noise level, of that level, unless the rows are told an action; then it is remembered with
        the prompt: every block of a rollout goes through the same levels.
        """
        by_level = self.config.level == "adaln" and run.copy == Copy.NOISY
        by_action = actions is not None and run.is_data
        level = level[..., run.start : run.stop] if level.shape[-1] > 1 else level
        only = common_level(level) if by_level else 0.0
        level = level if only is None else level[..., :1]
        kind = (run.copy, run.is_data, only)
        keeps = only is not None and not by_action and not torch.is_grad_enabled()
        if keeps and kind in prompt.memo:
            return prompt.memo[kind]
        vector = self._vector(run, level, prompt, actions)
        six = rearrange(self.to_modulation(vector), "... (six d) -> ... six d", six=6)
        shift, scale = self.to_final(vector).chunk(2, dim=-1)
        told = Told(run.copy, six, (shift, 1 + scale))
        if keeps and len(prompt.memo) < MOST_REMEMBERED:
            prompt.memo[kind] = told
        return told

    def forward(
        self,
        values: Tensor,
        is_masked: Bool[Tensor, "batch rows"],
        layout: Layout,
        level: Float[Tensor, "..."],
        prompt: PreparedPrompt,
        lowered: Lowered | PerLayer | None = None,
        view: CacheView | None = None,
        actions: Float[Tensor, "batch rows actions"] | None = None,
        poses: Float[Tensor, "batch frames 4 4"] | None = None,
        structure: Float[Tensor, "batch rows numbers"] | None = None,
    ) -> Float[Tensor, "batch rows dim"]:
        """Run the active rows.

        Args:
            values: Codes [batch, rows, codebooks] or latents [batch, rows, channels]; prompt rows
                may hold anything.
            is_masked: Rows whose content is unknown.
            layout: Attributes of the active rows, 1-D or one row per batch row.
            level: Noise level per row, broadcast against [batch, rows].
            prompt: From `prepare_prompt`.
            lowered: Who sees whom among keys = cached + active rows, for all layers or for each;
                None = everybody.
            view: Open pass of the cache, or None.
            actions: What every data row is told besides; None for models without actions.
            poses: Camera of every frame, for models whose positions are poses; None = all alike.
            structure: Map of the frame of every row at its token; None for models without.

        Returns:
            Final hidden states of the active rows, normalised and modulated; for a view that asks
            for keys only, whatever the last layer would have read.
        """
        if layout.is_batched:
            raise ValueError("the backbone takes one layout for the batch; got one per item")
        x = self._rows(values, is_masked, layout, prompt, structure)
        if self.config.level == "add":
            told = self._level_features(level)
            told = self.embed_level(told.to(x.dtype))
            x = x + torch.where((layout.copy == Copy.NOISY)[..., None], told, 0.0)
        positions = self._positions(layout, view, x.dtype, poses)
        rows = self._context(layout, level, prompt, view, x.dtype, actions, positions)
        lowered = NoMask(layout.num_tokens**2) if lowered is None else lowered
        masks = lowered if isinstance(lowered, PerLayer) else PerLayer((lowered,))
        alike = len(masks.masks) == 1
        if view is not None and alike and fits_few_rows(self._stack, x, rows, view):
            x = run_few_rows(self._stack, x, rows, masks.of(0), view)
            return self._finish(x, rows)
        if view is not None and view.only_keys and not torch.is_grad_enabled():
            return self._store(x, rows, masks, view)
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training:
                mask = masks.of(index)
                x = checkpoint(layer, x, index, rows, mask, view, use_reentrant=False)
            else:
                x = layer(x, index, rows, masks.of(index), view)
        return self._finish(x, rows)

    def _store(self, x: Tensor, rows: RowContext, masks: PerLayer, view: CacheView) -> Tensor:
        """Run a pass that only fills the cache: the last layer stops at its keys and values."""
        *before, last = self._stack
        for index, layer in enumerate(before):
            x = layer(x, index, rows, masks.of(index), view)
        last.store(x, len(before), rows, view)
        return x

    def _finish(self, x: Tensor, rows: RowContext) -> Tensor:
        """Normalise and modulate the output of the last layer."""
        final = [(start, stop, told.final) for start, stop, told in rows.segments]
        return modulate(rms_norm(x), final, shift=0, scale=1)

    def _context(
        self, layout: Layout, level: Tensor, prompt: PreparedPrompt, view: CacheView | None,
        dtype: torch.dtype, actions: Tensor | None, positions: Positions,
    ) -> RowContext:  # fmt: skip
        sees = layout.copy < 0  # no row
        if prompt.cross is not None:
            for copy in self.copies_seeing_words:
                sees |= layout.copy == copy
        by_adaln = None if self.config.aligned else actions
        segments = [
            (run.start, run.stop, self._told(run, level, prompt, by_adaln))
            for run in row_runs(layout)
        ]
        bias = None
        if self.config.decay:
            among = layout if view is None else view.layout
            settings = (self.config.num_heads, self.config.decay, self.config.period)
            bias = distance_bias(layout, among, *settings).to(dtype)
        routed = None
        if self.config.route:
            among = layout if view is None else view.layout
            routed = routing(layout, among, self.config.route, self.config.route_per)
        told = actions.to(dtype) if self.config.aligned and actions is not None else None
        return RowContext(
            segments, positions, sees, prompt.cross, prompt.cross_valid, bias, routed, told
        )

    def _positions(
        self, layout: Layout, view: CacheView | None, dtype: torch.dtype, poses: Tensor | None
    ) -> Positions:
        """Work out what this pass does to queries and keys."""
        reads = view is not None and not view.cache.rotated
        if self.config.position == "periodic":
            return Unmoved()
        if self.config.position == "rope":
            settings = (self.head_dim, self.config.rope_theta, dtype)
            active = layout_angles(layout, *settings)
            known = view.layout if view is not None and reads else None
            return Rotary(active, active if known is None else layout_angles(known, *settings))
        if poses is None:
            poses = torch.eye(4, device=layout.device)[None, None]
        own = self._pose_rows(layout, poses)
        keys = self._pose_rows(view.layout, poses) if view is not None and reads else own
        return Cameras(inverse_transposed(own), own, keys)

    def _pose_rows(
        self, layout: Layout, poses: Float[Tensor, "batch frames 4 4"]
    ) -> Float[Tensor, "batch rows 4 4"]:
        """Look up the pose of every row's frame; prompt rows stand at the origin."""
        frame = layout.source.clamp_min(0) // self.config.num_sources
        own = poses[:, frame.clamp_max(poses.shape[1] - 1)]
        origin = torch.eye(4, device=poses.device, dtype=poses.dtype)
        return torch.where((layout.source < 0)[..., None, None], origin, own)
