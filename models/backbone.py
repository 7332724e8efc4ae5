"""The one transformer behind every recipe.

Pre-norm attention and SwiGLU layers whose rows are modulated per token (adaLN-zero) with weights
indexed by the row's copy, so that clean rows can be kept free of noise level and prompt: then their
keys and values serve every guidance branch (ACDiT, arXiv:2412.07720).

It does not know masks (a lowered mask is handed in), schedules, or what its tokens stand for.

Sources: RMSNorm (arXiv:1910.07467), SwiGLU (arXiv:2002.05202), QK-norm (arXiv:2302.05442), adaLN-zero
(DiT, arXiv:2212.09748) in the shared "single" form of PixArt-alpha (arXiv:2310.00426): one projection
for all layers plus a learned table per layer. Differs: the table has one row per copy.
"""

import math
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ..core.attention import Lowered, NoMask, attend
from ..core.cache import CacheView
from ..core.layout import Copy, Layout
from ..core.numerics import RowStableActivation, RowStableLinear, row_stable_activation
from ..core.positions import rope_angles, rotate


@dataclass(frozen=True)
class PreparedPrompt:
    """What the layers need of a prompt, computed once per rollout.

    `prefix` [batch, prompt rows, dim] stands in front of the tokens; `pooled` [batch, dim] feeds the
    modulation; `cross` holds one (key, value) pair per layer, and `cross_valid` [batch, words].
    """

    prefix: Tensor | None = None
    pooled: Tensor | None = None
    cross: list[tuple[Tensor, Tensor]] | None = None
    cross_valid: Tensor | None = None


def level_features(level: Float[Tensor, "*lead"], dim: int) -> Float[Tensor, "*lead dim"]:
    """Sinusoids of a noise level in [0, 1]: frequencies fall from 1000 to 0.1 radians."""
    half = dim // 2
    frequency = 1000.0 * 1e-4 ** (torch.arange(half, device=level.device) / max(half - 1, 1))
    angle = level.float()[..., None] * frequency
    return functional.pad(torch.cat((angle.cos(), angle.sin()), -1), (0, dim - 2 * half))


def rms_norm(x: Float[Tensor, "*lead dim"]) -> Float[Tensor, "*lead dim"]:
    """Divide by the root mean square of the last axis (no gain: modulation supplies it)."""
    return functional.rms_norm(x, (x.shape[-1],), eps=1e-6)


class SelfAttention(nn.Module):
    """Grouped-query attention with RMS-normalised queries and keys."""

    def __init__(self, dim: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, dim // heads
        self.to_qkv = RowStableLinear(dim, (heads + 2 * kv_heads) * self.head_dim, bias=False)
        self.to_out = RowStableLinear(heads * self.head_dim, dim, bias=False)
        # One learned temperature per head replaces the gains of both norms: they only ever multiply.
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(
        self, x: Tensor, layer: int, angles: "Angles", lowered: Lowered, view: CacheView | None
    ) -> Tensor:
        """Attend from the active rows to the cached and active rows."""
        sizes = [self.heads, self.kv_heads, self.kv_heads]
        heads = rearrange(self.to_qkv(x), "b n (h d) -> b h n d", d=self.head_dim)
        query, key, value = heads.split(sizes, dim=1)
        query, key = rms_norm(query) * self.temperature.to(query.dtype), rms_norm(key)
        query = rotate(query, angles.active)
        if view is None:
            key = rotate(key, angles.active)
        elif view.cache.rotated:
            key, value = view.extend(layer, rotate(key, angles.active), value)
        else:
            key, value = view.extend(layer, key, value)
            key = rotate(key, angles.keys)
        out = attend(query, key.to(query.dtype), value.to(query.dtype), lowered)
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Attention to the prompt's words; keys and values are computed once per rollout."""

    def __init__(self, dim: int, heads: int, prompt_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_query = RowStableLinear(dim, dim, bias=False)
        self.to_key_value = RowStableLinear(prompt_dim, 2 * dim, bias=False)
        self.to_out = RowStableLinear(dim, dim, bias=False)
        nn.init.zeros_(self.to_out.weight)

    def prepare(self, words: Float[Tensor, "b t p"]) -> tuple[Tensor, Tensor]:
        """Project the words to keys and values [batch, heads, words, head_dim]."""
        both = rearrange(self.to_key_value(words), "b t (two h d) -> two b h t d", two=2, h=self.heads)
        return both[0], both[1]

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor], valid: Tensor) -> Tensor:
        """Add what the words say."""
        query = rearrange(self.to_query(rms_norm(x)), "b n (h d) -> b h n d", h=self.heads)
        key, value = (part.to(query.dtype) for part in memory)
        out = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=valid[:, None, None, :].to(query.device)
        )
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


class SwiGLU(nn.Module):
    """silu(W1 x) * W2 x, projected back."""

    def __init__(self, dim: int, ratio: float) -> None:
        super().__init__()
        inner = 8 * math.ceil(dim * ratio / 8)
        self.to_gate_value = RowStableLinear(dim, 2 * inner, bias=False)
        self.to_out = RowStableLinear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gated map."""
        gate, value = self.to_gate_value(x).chunk(2, dim=-1)
        return self.to_out(row_stable_activation("silu", gate) * value)


class Layer(nn.Module):
    """One transformer layer with a modulation table of one row per copy."""

    def __init__(
        self, dim: int, heads: int, kv_heads: int, mlp_ratio: float, prompt_dim: int
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads, kv_heads)
        self.cross = CrossAttention(dim, heads, prompt_dim) if prompt_dim else None
        self.mlp = SwiGLU(dim, mlp_ratio)
        # Rows: copies. Columns: scale, gate of attention; shift, scale, gate of both in order.
        table = torch.zeros(len(Copy), 6, dim)
        table[:, 2::3] = 1.0  # gates start open; the shared projection starts at zero
        self.table = nn.Parameter(table)

    def forward(
        self, x: Tensor, layer: int, rows: "RowContext", lowered: Lowered, view: CacheView | None
    ) -> Tensor:
        """Run attention, optional cross-attention and the MLP."""
        parts = [
            (s.start, s.stop, (s.modulation + self.table[s.copy]).unbind(dim=-2))
            for s in rows.segments
        ]
        normed = modulate(rms_norm(x), parts, shift=0, scale=1)
        x = add_gated(x, self.attention(normed, layer, rows.angles, lowered, view), parts, gate=2)
        if self.cross is not None and rows.cross is not None:
            added = self.cross(x, rows.cross[layer], rows.cross_valid)
            x = x + torch.where(rows.sees_words[..., None], added, 0.0)
        normed = modulate(rms_norm(x), parts, shift=3, scale=4)
        return add_gated(x, self.mlp(normed), parts, gate=5)


Parts = list[tuple[int, int, tuple[Tensor, ...]]]
"""Row ranges with the six modulation vectors of each, broadcast over its rows."""


def modulate(x: Tensor, parts: Parts, *, shift: int, scale: int) -> Tensor:
    """Scale and shift every row range by its own vectors: shift + x * (1 + scale)."""
    pieces = [
        torch.addcmul(six[shift], x[:, start:stop], 1 + six[scale]) for start, stop, six in parts
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def add_gated(x: Tensor, out: Tensor, parts: Parts, *, gate: int) -> Tensor:
    """Add a branch through its gate: x + gate * out."""
    pieces = [
        torch.addcmul(x[:, start:stop], out[:, start:stop], six[gate]) for start, stop, six in parts
    ]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


@dataclass(frozen=True)
class Angles:
    """Rotary angles of the active rows and of all keys."""

    active: tuple[Tensor, Tensor]
    keys: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Segment:
    """Rows start..stop-1: one copy, told the same things; `modulation` [batch|1, rows|1, 6, dim]."""

    start: int
    stop: int
    copy: int
    modulation: Tensor


@dataclass(frozen=True)
class RowContext:
    """Per-row facts shared by all layers of one pass."""

    segments: list[Segment]
    angles: Angles
    sees_words: Tensor
    cross: list[tuple[Tensor, Tensor]] | None
    cross_valid: Tensor | None


_RUNS: WeakKeyDictionary[Layout, list[tuple[int, int]]] = WeakKeyDictionary()


def row_runs(layout: Layout) -> list[tuple[int, int]]:
    """Split rows into runs of one copy and one kind (prompt or data), as (start, stop).

    Remembered per layout, because reading a tensor's numbers stalls a GPU.
    """
    if layout not in _RUNS:
        kind = layout.copy * 2 + (layout.source >= 0)
        edges = (kind[1:] != kind[:-1]).nonzero()[:, 0] + 1
        stops = [*edges.tolist(), layout.num_tokens]
        _RUNS[layout] = list(zip([0, *stops[:-1]], stops, strict=True))
    return _RUNS[layout]


class BlockTransformer(ModelMixin, ConfigMixin):
    """Block-causal transformer over codes or latents, with or without a cache."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]

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
        prompt_dim: int = 64,
        num_prompt_rows: int = 0,
        cross_attention: bool = False,
        level: str = "none",
        modulate: tuple[str, ...] = (),
        sees_words: tuple[str, ...] = ("noisy",),
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
            num_sources: Data slots with a learned absolute position.
            prompt_dim: Width of the text encoder.
            num_prompt_rows: Prompt rows in front (words, then one row for the pooled prompt).
            cross_attention: Attend to the words in every layer.
            level: "none", "adaln" or "add": how a noisy row is told its noise level.
            modulate: Copies whose rows the pooled prompt modulates.
            sees_words: Copies whose rows cross-attend.
        """
        super().__init__()
        self.copies_modulated = [Copy[name.upper()] for name in modulate]
        self.copies_seeing_words = [Copy[name.upper()] for name in sees_words]
        if value == "code":
            self.embed_codes = nn.Embedding(num_codebooks * codebook_size, dim)
            nn.init.normal_(self.embed_codes.weight, std=1 / math.sqrt(num_codebooks))
            self.register_buffer(
                "code_offset", torch.arange(num_codebooks) * codebook_size, persistent=False
            )
        else:
            self.embed_latents = RowStableLinear(latent_channels, dim)
            self.embed_noisy = RowStableLinear(latent_channels, dim)
        self.mask_row = nn.Parameter(torch.randn(dim) * 0.02)
        self.position_table = nn.Embedding(num_sources, dim)
        nn.init.normal_(self.position_table.weight, std=0.1)
        self.copy_table = nn.Parameter(torch.zeros(len(Copy), dim))
        if num_prompt_rows:
            self.embed_words = RowStableLinear(prompt_dim, dim)
            self.prompt_table = nn.Parameter(torch.randn(num_prompt_rows, dim) * 0.02)
        if modulate or num_prompt_rows:
            self.embed_pooled = nn.Sequential(
                RowStableLinear(prompt_dim, dim),
                RowStableActivation("silu"),
                RowStableLinear(dim, dim),
            )
        if level != "none":
            self.embed_level = nn.Sequential(
                RowStableLinear(dim, dim),
                RowStableActivation("silu"),
                RowStableLinear(dim, dim),
            )
        self.to_modulation = RowStableLinear(dim, 6 * dim)
        self.to_final = RowStableLinear(dim, 2 * dim)
        nn.init.zeros_(self.to_modulation.weight)
        nn.init.zeros_(self.to_modulation.bias)
        nn.init.zeros_(self.to_final.weight)
        nn.init.zeros_(self.to_final.bias)
        kv_heads = num_kv_heads or num_heads
        words = prompt_dim if cross_attention else 0
        self.layers = nn.ModuleList(
            Layer(dim, num_heads, kv_heads, mlp_ratio, words) for _ in range(num_layers)
        )
        for layer in self.layers:  # residual branches start small (GPT-2)
            for proj in (layer.attention.to_out, layer.mlp.to_out):
                nn.init.normal_(proj.weight, std=0.02 / math.sqrt(2 * num_layers) * 4)
        self.gradient_checkpointing = False

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
        if config.num_prompt_rows:
            rows = torch.where(is_valid[..., None], self.embed_words(words), 0.0)
            rows = rows[:, : config.num_prompt_rows - 1]
            prefix = torch.cat((rows, vector[:, None]), 1) + self.prompt_table
        cross = None
        if config.cross_attention:
            cross = [layer.cross.prepare(words) for layer in self.layers]
            # An empty prompt still needs one visible word, or softmax has nothing to sum.
            is_valid = is_valid | ~is_valid.any(-1, keepdim=True)
        return PreparedPrompt(
            prefix, vector if self.copies_modulated else None, cross, is_valid if cross else None
        )

    def _embed(self, values: Tensor, is_masked: Tensor, layout: Layout) -> Tensor:
        """Embed data rows: codes summed over codebooks, or latents, by copy."""
        if self.config.value == "code":
            rows = self.embed_codes(values + self.code_offset).sum(-2)
        else:
            noisy = (layout.copy == Copy.NOISY)[..., None]
            values = values.to(self.mask_row.dtype)
            if self.config.level == "none":
                rows = self.embed_latents(values)
            else:
                rows = torch.where(noisy, self.embed_noisy(values), self.embed_latents(values))
        return torch.where(is_masked[..., None], self.mask_row.to(rows.dtype), rows)

    def _rows(
        self, values: Tensor, is_masked: Tensor, layout: Layout, prompt: PreparedPrompt
    ) -> Tensor:
        """Assemble the input of the first layer: prompt rows where source < 0, data elsewhere."""
        is_data = layout.source >= 0
        source = layout.source.clamp_min(0)
        x = self._embed(values, is_masked, layout)
        x = x + self.position_table(source) + self.copy_table[layout.copy]
        if prompt.prefix is None:
            return x
        # Prompt rows count -rows..-1 in `order`.
        slot = (layout.order + self.config.num_prompt_rows).clamp(0, self.config.num_prompt_rows - 1)
        slot = slot.expand(x.shape[0], -1)
        index = slot[..., None].expand(-1, -1, x.shape[-1])
        return torch.where(is_data[..., None], x, prompt.prefix.to(x.dtype).gather(1, index))

    def _vector(
        self, start: int, stop: int, layout: Layout, level: Tensor, prompt: PreparedPrompt
    ) -> Tensor:
        """Conditioning vector of rows of one kind, [batch|1, rows|1, dim]; zero = told nothing."""
        copy, is_data = int(layout.copy[start]), int(layout.source[start]) >= 0
        dim = self.config.dim
        vector = torch.zeros(1, 1, dim, device=layout.device, dtype=self.mask_row.dtype)
        if self.config.level == "adaln" and copy == Copy.NOISY:
            vector = self.embed_level(level_features(level[..., start:stop], dim).to(vector.dtype))
            vector = vector if vector.ndim == 3 else vector[None]
        if prompt.pooled is not None and is_data and copy in self.copies_modulated:
            vector = vector + prompt.pooled[:, None]
        return row_stable_activation("silu", vector)

    def forward(
        self,
        values: Tensor,
        is_masked: Bool[Tensor, "batch rows"],
        layout: Layout,
        level: Float[Tensor, "..."],
        prompt: PreparedPrompt,
        lowered: Lowered | None = None,
        view: CacheView | None = None,
    ) -> Float[Tensor, "batch rows dim"]:
        """Run the active rows.

        Args:
            values: Codes [batch, rows, codebooks] or latents [batch, rows, channels]; prompt rows
                may hold anything.
            is_masked: Rows whose content is unknown.
            layout: Attributes of the active rows, 1-D or one row per batch row.
            level: Noise level per row, broadcast against [batch, rows].
            prompt: From `prepare_prompt`.
            lowered: Who sees whom among keys = cached + active rows; None = everybody.
            view: Open pass of the cache, or None.

        Returns:
            Final hidden states of the active rows, normalised and modulated.
        """
        if layout.is_batched:
            raise ValueError("the backbone takes one layout for the batch; got one per item")
        x = self._rows(values, is_masked, layout, prompt)
        if self.config.level == "add":
            told = self.embed_level(level_features(level, self.config.dim).to(x.dtype))
            x = x + torch.where((layout.copy == Copy.NOISY)[..., None], told, 0.0)
        runs = row_runs(layout)
        vectors = [self._vector(*run, layout, level, prompt) for run in runs]
        rows = self._context(layout, runs, vectors, prompt, view)
        lowered = NoMask() if lowered is None else lowered
        for index, layer in enumerate(self.layers):
            if self.gradient_checkpointing and self.training:
                x = checkpoint(layer, x, index, rows, lowered, view, use_reentrant=False)
            else:
                x = layer(x, index, rows, lowered, view)
        final = [
            (*run, self.to_final(vector).chunk(2, dim=-1))
            for run, vector in zip(runs, vectors, strict=True)
        ]
        return modulate(rms_norm(x), final, shift=0, scale=1)

    def _context(
        self, layout: Layout, runs: list[tuple[int, int]], vectors: list[Tensor],
        prompt: PreparedPrompt, view: CacheView | None,
    ) -> RowContext:  # fmt: skip
        config = self.config
        active = rope_angles(layout.position, self.head_dim, config.rope_theta)
        keys = active
        if view is not None and not view.cache.rotated:
            keys = rope_angles(view.layout.position, self.head_dim, config.rope_theta)
        sees = torch.zeros_like(layout.copy, dtype=torch.bool)
        for copy in self.copies_seeing_words:
            sees |= layout.copy == copy
        segments = [
            Segment(
                start,
                stop,
                int(layout.copy[start]),
                rearrange(self.to_modulation(vector), "... (six d) -> ... six d", six=6),
            )
            for (start, stop), vector in zip(runs, vectors, strict=True)
        ]
        return RowContext(segments, Angles(active, keys), sees, prompt.cross, prompt.cross_valid)


def repeat_prompt(prompt: PreparedPrompt, times: int) -> PreparedPrompt:
    """Repeat every item of a prepared prompt (several pictures of one prompt)."""

    def again(x: Tensor | None) -> Tensor | None:
        return None if x is None else repeat(x, "b ... -> (b t) ...", t=times)

    cross = prompt.cross and [(again(k), again(v)) for k, v in prompt.cross]
    return PreparedPrompt(again(prompt.prefix), again(prompt.pooled), cross, again(prompt.cross_valid))
