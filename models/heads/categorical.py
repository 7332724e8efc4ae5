"""Softmax head for codebook ids.

Knows one or several codebooks that are independent given the trunk state; does not know which
tokens are masked. Invariant: at initialisation every code is equally likely.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from ...core.errors import check_range
from ...core.numerics import RowStableLinear
from ...core.sampling import TokenStats, draw_codes, sample_codes
from .base import HeadSample, TokenHead, check_sizes, guided, zero_init


class CategoricalHead(TokenHead):
    """Predict `num_codebooks` independent categorical codes per token.

    Args:
        dim: Width of the trunk states.
        vocab_size: Codes per codebook.
        num_codebooks: Codes per token.
        label_smoothing: Default smoothing of the loss, in [0, 0.99].

    Raises:
        UsageError: A size is not positive or the smoothing is outside [0, 0.99].
    """

    value: ClassVar[str] = "code"

    def __init__(
        self,
        dim: int,
        vocab_size: int,
        num_codebooks: int = 1,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_sizes(dim=dim, vocab_size=vocab_size, num_codebooks=num_codebooks)
        check_range("label_smoothing", label_smoothing, 0.0, 0.99)
        self.vocab_size = vocab_size
        self.num_codebooks = num_codebooks
        self.label_smoothing = label_smoothing
        self.norm = nn.LayerNorm(dim)
        self.out = zero_init(RowStableLinear(dim, num_codebooks * vocab_size))

    def logits(self, hidden: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows codebooks vocab"]:
        """Score every code.

        Args:
            hidden: Trunk states.

        Returns:
            Unnormalised log probabilities.
        """
        scores = self.out(self.norm(hidden))
        if self.num_codebooks == 1:  # what rearrange does, at a tenth of its cost per token
            return scores[..., None, :]
        return rearrange(scores, "... (k v) -> ... k v", k=self.num_codebooks)

    def loss(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        target: Int[Tensor, "batch tokens codebooks"],
        generator: torch.Generator | None = None,
        label_smoothing: float | None = None,
    ) -> Float[Tensor, "batch tokens"]:
        """Return the cross-entropy per token, averaged over codebooks.

        Args:
            hidden: Trunk states.
            target: True codes in [0, vocab_size).
            generator: Unused; the loss draws no noise.
            label_smoothing: Overrides the head's own setting.

        Returns:
            Cross-entropy in nats, float32.
        """
        smoothing = self.label_smoothing if label_smoothing is None else label_smoothing
        scores = rearrange(self.logits(hidden).float(), "b m k v -> (b m k) v")
        nats = functional.cross_entropy(
            scores, target.reshape(-1), label_smoothing=smoothing, reduction="none"
        )
        return nats.reshape(target.shape).mean(dim=-1)

    def sample(
        self,
        hidden: Float[Tensor, "batch tokens dim"],
        generators: Sequence[torch.Generator],
        *,
        uncond_hidden: Float[Tensor, "batch tokens dim"] | None = None,
        guidance_scale: float | Tensor = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        allowed: Bool[Tensor, "tokens vocab"] | None = None,
        measure: bool = True,
    ) -> HeadSample:
        """Draw the codes of every token.

        Args:
            hidden: Trunk states under the prompt.
            generators: One CPU generator per item.
            uncond_hidden: Trunk states without the prompt, or None for no guidance.
            guidance_scale: Guidance of the logits, one number or [batch, tokens].
            temperature: Divides the logits; 0 takes the most likely code.
            top_k: Keep this many codes, or None for all.
            top_p: Keep the smallest set with this much probability, or None for all.
            allowed: Codes each token may take (mixed vocabularies), or None for all.
            measure: False skips the confidence numbers, for callers with nothing to choose.

        Returns:
            Codes, confidence numbers averaged over codebooks (probability: geometric mean) and
            the joint log probability of each token's codes before filtering.
        """
        uncond = None if uncond_hidden is None else self.logits(uncond_hidden)
        scores = guided(self.logits(hidden), uncond, guidance_scale)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        flat = scores.float().flatten(1, 2)
        if not measure:
            codes = draw_codes(flat, generators, temperature, top_k, top_p)
            return HeadSample(codes.view(scores.shape[:-1]))
        codes, stats = sample_codes(
            flat, generators, temperature=temperature, top_k=top_k, top_p=top_p
        )
        values = rearrange(codes, "b (m k) -> b m k", k=self.num_codebooks)
        return HeadSample(values, *self._merge_codebooks(stats))

    def _merge_codebooks(self, stats: TokenStats) -> tuple[TokenStats, Tensor]:
        """Reduce numbers per code to numbers per token; one codebook passes through unchanged."""

        def split(values: Tensor) -> Tensor:
            return rearrange(values, "b (m k) -> b m k", k=self.num_codebooks)

        log_prob = split(stats.prob.clamp_min(torch.finfo(torch.float32).tiny).log())
        if self.num_codebooks == 1:
            return stats, log_prob[..., 0]
        merged = TokenStats(
            prob=log_prob.mean(-1).exp(),
            max_prob=split(stats.max_prob).mean(-1),
            margin=split(stats.margin).mean(-1),
            entropy=split(stats.entropy).mean(-1),
        )
        return merged, log_prob.sum(-1)
