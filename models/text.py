"""A small text encoder that trains with the model and needs no download.

Words are hashed, so there is no vocabulary file: each word is the sum of the embeddings of the word
itself and of its character n-grams. The module knows nothing about pictures or guidance scales.

Invariants: the ids of a prompt depend on the prompt and the config only (not on the process, the
platform or the batch); the number of text tokens is always `max_words`, so a prompt's bits do not
depend on its neighbours; a prompt without words is the learned unconditional prompt.
"""

import unicodedata
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ..core.errors import UsageError, check_count, describe
from ..core.numerics import RowStableActivation, RowStableLinear

CHARS_PER_WORD_CAP = 64
NGRAM_CHARS_CAP = 32
PROMPT_CACHE_SIZE = 4096
WORD_CACHE_SIZE = 65536
HASHES_PER_WORD = 2
QUIET_MARKS = frozenset(",.;:\"'`()[]{}<>-_/\\|\u2018\u2019\u201c\u201d\u2013\u2014\u2026\u00b7")


@dataclass
class PromptEmbeds:
    """Text features of a batch of prompts.

    Attributes:
        embeds: One vector per text token.
        is_valid: False where the token is padding.
        pooled: One vector per prompt.
    """

    embeds: Float[Tensor, "batch text dim"]
    is_valid: Bool[Tensor, "batch text"]
    pooled: Float[Tensor, "batch dim"]

    def replace(self, rows: Bool[Tensor, " batch"], other: "PromptEmbeds") -> "PromptEmbeds":
        """Take some prompts from another batch, as label dropping does.

        Args:
            rows: True where `other` is taken.
            other: Prompts of the same shapes, e.g. the unconditional ones.

        Returns:
            The mixed batch.
        """
        return PromptEmbeds(
            torch.where(rows[:, None, None], other.embeds, self.embeds),
            torch.where(rows[:, None], other.is_valid, self.is_valid),
            torch.where(rows[:, None], other.pooled, self.pooled),
        )

    def take(self, rows: Int[Tensor, " chosen"]) -> "PromptEmbeds":
        """Pick prompts by row number, repeats allowed.

        Args:
            rows: Row numbers in [0, batch).

        Returns:
            The picked prompts, in that order.
        """
        return PromptEmbeds(self.embeds[rows], self.is_valid[rows], self.pooled[rows])

    @staticmethod
    def cat(parts: Sequence["PromptEmbeds"]) -> "PromptEmbeds":
        """Join batches of prompts of equal text length.

        Args:
            parts: Batches to join, at least one.

        Returns:
            One batch.
        """
        return PromptEmbeds(
            torch.cat([part.embeds for part in parts]),
            torch.cat([part.is_valid for part in parts]),
            torch.cat([part.pooled for part in parts]),
        )


@lru_cache(maxsize=PROMPT_CACHE_SIZE)
def split_words(prompt: str) -> tuple[str, ...]:
    """Split a prompt into lower-case words and single symbols.

    Letters, digits and combining marks form words in any script; an emoji or another symbol is a
    word of its own; spaces, control characters, lone surrogates and quiet punctuation separate.
    Joiners and variation selectors vanish.

    Args:
        prompt: Any string.

    Returns:
        Words in reading order, NFKC-normalised.

    Example:
        >>> split_words("Cat, Fluent-3D style \U0001f600!")
        ('cat', 'fluent', '3d', 'style', '\U0001f600', '!')
    """
    words: list[str] = []
    current: list[str] = []
    for char in unicodedata.normalize("NFKC", prompt).lower():
        category = unicodedata.category(char)
        if category[0] in "LN" or (category[0] == "M" and current):
            current.append(char)
            continue
        if category == "Cf" or category[0] == "M":
            continue
        if current:
            words.append("".join(current))
            current = []
        if category[0] != "Z" and category not in ("Cc", "Cs") and char not in QUIET_MARKS:
            words.append(char)
    if current:
        words.append("".join(current))
    return tuple(words)


def _bucket(kind: str, feature: str, num_buckets: int) -> int:
    """Hash one feature; the salt keeps a word apart from an equal n-gram."""
    data = f"blockloom\0{kind}\0{feature}".encode("utf-8", "surrogatepass")
    return zlib.crc32(data) % num_buckets


@lru_cache(maxsize=WORD_CACHE_SIZE)
def word_features(
    word: str, num_buckets: int, min_ngram: int, max_ngram: int, max_features: int
) -> tuple[int, ...]:
    """Hash a word and its character n-grams into buckets.

    Args:
        word: One word, as `split_words` returns it.
        num_buckets: Size of the embedding table.
        min_ngram: Shortest n-gram, in characters, word borders included.
        max_ngram: Longest n-gram; 0 turns n-grams off.
        max_features: Cap on the features; n-grams beyond it are thinned out evenly.

    Returns:
        Bucket ids in [0, num_buckets); the first two stand for the whole word.
    """
    whole = [_bucket(f"word{i}", word, num_buckets) for i in range(HASHES_PER_WORD)]
    marked = f"<{word[:NGRAM_CHARS_CAP]}>"
    grams = [
        marked[start : start + size]
        for size in range(min_ngram, max_ngram + 1)
        for start in range(len(marked) - size + 1)
        if size < len(marked)
    ]
    room = max(max_features - HASHES_PER_WORD, 0)
    if len(grams) > room:
        grams = [grams[i * len(grams) // room] for i in range(room)] if room else []
    return tuple(whole[:max_features] + [_bucket("gram", gram, num_buckets) for gram in grams])


class TextLayer(nn.Module):
    """One pre-norm transformer layer over the words of a prompt, full attention.

    Written out instead of calling the fused kernel: prompts are short and the plain product keeps
    the bits of one prompt independent of the batch.

    Args:
        dim: Width.
        num_heads: Attention heads; must divide `dim`.
        mlp_ratio: Hidden width of the feed-forward part over `dim`.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.LayerNorm(dim)
        self.query_key_value = RowStableLinear(dim, 3 * dim)
        self.merge = RowStableLinear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(
            RowStableLinear(dim, int(dim * mlp_ratio)),
            RowStableActivation("gelu"),
            RowStableLinear(int(dim * mlp_ratio), dim),
        )

    def forward(
        self, x: Float[Tensor, "batch text dim"], is_valid: Bool[Tensor, "batch text"]
    ) -> Float[Tensor, "batch text dim"]:
        """Mix the valid words; padding rows see only valid words and are ignored later.

        Args:
            x: Word vectors.
            is_valid: True for real words; every prompt has at least one.

        Returns:
            Updated word vectors.
        """
        mixed = self.query_key_value(self.norm_attention(x))
        # Batched products of strided views pick their kernel by batch size; contiguous ones do not.
        query, key, value = rearrange(
            mixed, "b t (n h d) -> n b h t d", n=3, h=self.num_heads
        ).contiguous()
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(~is_valid[:, None, None, :], torch.finfo(scores.dtype).min)
        mixed = rearrange(scores.softmax(dim=-1) @ value, "b h t d -> b t (h d)")
        x = x + self.merge(mixed)
        return x + self.mlp(self.norm_mlp(x))


def spread_prompts(layers: nn.Sequential) -> None:
    """Initialise linear layers so that a mean over words comes out as spread as it went in.

    The mean of a few words differs little between prompts and each default layer shrinks it
    threefold; with that start, a model conditioned by one pooled vector ignores its prompt for the
    first thousand steps.

    Args:
        layers: Linear layers and activations, changed in place.
    """
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=2 * layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)


class HashTextEncoder(ModelMixin, ConfigMixin):
    """Encode prompts by hashed words and character n-grams, then a light transformer.

    Attributes:
        truncated: How many prompts of the latest `tokenize` call lost words to `max_words`.

    Args:
        dim: Width of the embeddings.
        num_buckets: Rows of the shared embedding table.
        max_words: Text tokens per prompt; later words are cut and counted in `truncated`.
        min_ngram: Shortest character n-gram.
        max_ngram: Longest character n-gram; 0 uses whole words only.
        max_features: Features kept per word.
        num_layers: Transformer layers; 0 keeps words independent.
        num_heads: Attention heads; must divide `dim`.
        mlp_ratio: Feed-forward width over `dim`.

    Raises:
        UsageError: A size is not positive, or `num_heads` does not divide `dim`.

    Source: subword hashing of fastText (arXiv:1607.04606); differs: signs, symbols and whole words
    share one table, and a transformer follows.
    """

    @register_to_config
    def __init__(
        self,
        dim: int = 192,
        num_buckets: int = 4096,
        max_words: int = 16,
        min_ngram: int = 3,
        max_ngram: int = 5,
        max_features: int = 20,
        num_layers: int = 1,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
    ) -> None:
        super().__init__()
        sizes = {"dim": dim, "num_buckets": num_buckets, "max_words": max_words}
        for name, size in (sizes | {"max_features": max_features, "num_heads": num_heads}).items():
            check_count(name, size)
        if dim % num_heads:
            nearest = max(n for n in range(1, num_heads + 1) if dim % n == 0)
            raise UsageError(describe("num_heads", num_heads, f"divisors of dim {dim}", nearest))
        self.truncated = 0
        self.buckets = nn.Parameter(torch.randn(num_buckets + 1, dim) * dim**-0.5)
        self.positions = nn.Parameter(torch.randn(max_words, dim) * dim**-0.5)
        self.null_word = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.null_pooled = nn.Parameter(torch.zeros(dim))
        self.layers = nn.ModuleList(
            [TextLayer(dim, num_heads, mlp_ratio) for _ in range(num_layers)]
        )
        self.norm = nn.LayerNorm(dim)
        self.pool = nn.Sequential(
            RowStableLinear(dim, dim), RowStableActivation("silu"), RowStableLinear(dim, dim)
        )
        spread_prompts(self.pool)

    def tokenize(self, prompts: Sequence[str]) -> Int[Tensor, "batch text features"]:
        """Hash prompts into bucket ids; very long prompts are cut before any work.

        Args:
            prompts: One string per item; any Unicode, also empty.

        Returns:
            Int64 ids on the CPU, -1 where there is no word or feature.

        Raises:
            UsageError: An item is not a string.
        """
        settings = self.config
        ids = np.full((len(prompts), settings.max_words, settings.max_features), -1, dtype=np.int64)
        char_cap = settings.max_words * CHARS_PER_WORD_CAP
        truncated = 0
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise UsageError(f"prompts[{row}] must be a string, got {type(prompt).__name__}")
            words = split_words(prompt[:char_cap])
            truncated += len(prompt) > char_cap or len(words) > settings.max_words
            for place, word in enumerate(words[: settings.max_words]):
                found = word_features(
                    word,
                    settings.num_buckets,
                    settings.min_ngram,
                    settings.max_ngram,
                    settings.max_features,
                )
                ids[row, place, : len(found)] = found
        self.truncated = truncated
        return torch.from_numpy(ids)

    def forward(self, ids: Int[Tensor, "batch text features"]) -> PromptEmbeds:
        """Embed hashed prompts.

        Args:
            ids: Output of `tokenize`; a row of only -1 yields the unconditional prompt.

        Returns:
            Embeddings, padding map and pooled vector.
        """
        ids = ids.to(self.buckets.device)
        is_valid = (ids >= 0).any(dim=-1)
        is_empty = ~is_valid.any(dim=-1)
        # An empty prompt lends its first slot, so that no softmax runs over nothing.
        is_seen = is_valid.clone()
        is_seen[:, 0] |= is_empty
        x = self._embed_words(ids) + self.positions[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, is_seen)
        x = self.norm(x) * is_seen[..., None]
        mean = x.sum(dim=1) / is_seen.sum(dim=1, keepdim=True)
        encoded = PromptEmbeds(x, is_seen, self.pool(mean))
        return encoded.replace(is_empty, self.null(ids.shape[0], ids.shape[1]))

    def null(self, batch: int, num_words: int | None = None) -> PromptEmbeds:
        """Return the learned unconditional prompt.

        Args:
            batch: Copies wanted.
            num_words: Text tokens, `max_words` by default.

        Returns:
            One valid learned token, then padding.
        """
        num_words = num_words or self.config.max_words
        first = self.null_word.new_zeros(num_words, 1)
        first[0] = 1.0
        return PromptEmbeds(
            repeat(first * self.null_word, "t d -> b t d", b=batch),
            repeat(first[:, 0] > 0, "t -> b t", b=batch),
            repeat(self.null_pooled, "d -> b d", b=batch),
        )

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Tokenize and embed.

        Args:
            prompts: One string per item.

        Returns:
            Embeddings on the encoder's device.
        """
        return self(self.tokenize(prompts))

    def _embed_words(
        self, ids: Int[Tensor, "batch text features"]
    ) -> Float[Tensor, "batch text dim"]:
        """Sum the features of each word, scaled so that the variance does not grow with them."""
        padding = self.buckets.shape[0] - 1
        flat = rearrange(torch.where(ids < 0, padding, ids), "b t g -> (b t) g")
        total = functional.embedding_bag(flat, self.buckets, mode="sum", padding_idx=padding)
        count = (ids >= 0).sum(dim=-1, keepdim=True).clamp_min(1)
        return rearrange(total, "(b t) d -> b t d", b=ids.shape[0]) * count.to(total.dtype).rsqrt()
