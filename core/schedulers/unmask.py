"""One scheduler for every decoder that reveals masked slots row by row.

What it is: MaskGIT, MAR, MaskGIL, Halton, LLaDA, Dream, Fast-dLLM, EB-Sampler, CARD, WeDLM and
plain autoregression as settings of one class: a count plan, an order and an accept rule.
What it does not know: models, masks, caches, codebooks.
Invariants: `select` returns a subset of the masked slots, at least one per unfinished item, and
all of them on the last row; items never influence one another.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..accept import (
    STAT_SCORES,
    accept_confident_prefix,
    accept_entropy_budget,
    accept_factor,
    accept_low_entropy,
    accept_quota,
    accept_threshold,
    accept_top_n,
    add_choice_noise,
    base_score,
    restrict_first,
)
from ..counts import BASES, COUNT_NAMES, ancestral_share, binomial_counts, reveal_counts
from ..errors import UsageError, check_count, check_one_of, check_range, describe
from ..guidance import RAMPS, guidance_at
from ..orders import RANK_ORDERS, make_rank
from ..sampling import TokenStats, sample_codes
from .base import BlockScheduler, DiscreteSchedulerOutput, Row

ORDERS = (*STAT_SCORES, *RANK_ORDERS)
ACCEPTS = (
    "top_n",
    "threshold",
    "quota",
    "entropy_budget",
    "factor",
    "confident_prefix",
    "low_entropy",
)
CHOICE_RAMPS = ("linear", "linspace", "constant")


class UnmaskScheduler(BlockScheduler):
    """Reveal masked slots over several rows.

    Rules that decide their own count ("threshold", "entropy_budget", ...) may finish an item before
    the last row; the last row reveals whatever is left. `num_steps` is thus a budget: set it to the
    block length to never cut such a rule short.

    Args:
        num_steps: Rows per block; clamped to the number of masked slots.
        count: Count plan of `core.counts.reveal_counts`, or the counts themselves, or "binomial":
            every mask is revealed with chance 1 - level_next / level on linear levels (the
            ancestral sampler of masked diffusion), at least one per row.
        on: What a count curve describes: "remaining", "revealed" or "counts".
        order: "confidence", "max_prob", "margin", "entropy" (from the model) or "random",
            "raster", "halton" (from a rank).
        accept: "top_n", "threshold", "quota", "entropy_budget", "factor", "confident_prefix" or
            "low_entropy".
        threshold: Confidence in [0, 1] for "threshold", "quota", "confident_prefix"; nats for
            "low_entropy".
        gamma: Entropy budget in nats.
        factor: Right-hand side of the parallel-decoding theorem.
        distance_weight: Nats per slot of distance, for "low_entropy".
        first_k: Only the first k masked slots are candidates; 0 = all.
        temperature: Sampling temperature of codes on the first row.
        temperature_end: On the last row, linear in between; None = constant.
        top_k: Codes kept before sampling; None = all.
        top_p: Nucleus mass; None = all.
        conf_from: Statistics before ("raw") or after ("filtered") the sampling filters.
        choice_temperature: Gumbel noise on the order, at the start.
        choice_ramp: "linear" 1 - (i+1)/N (MaskGIT), "linspace" 1 - i/(N-1) (aMUSEd, MaskGIL) or
            "constant" (Dream).
        gumbel: Whether that noise is added at all; it acts on log scores.
        roll: Start a rank order at a random place per item.
        guidance_scale: Classifier-free guidance weight; 1 = off.
        guidance_ramp: "constant", "linear" (i/(N-1)), "mar_linear" (share revealed after the
            row) or "cosine_power" (i/N).
        guidance_start: Scale at the start of a ramp.
        guidance_power: Exponent of "cosine_power".
        mask_token_id: Code that stands for a mask in `step`; it is never drawn.

    Raises:
        UsageError: A setting outside its range; the message names the nearest legal value.
    """

    @register_to_config
    def __init__(
        self,
        num_steps: int = 8,
        count: str | list[int] = "cosine",
        on: str = "remaining",
        order: str = "confidence",
        accept: str = "top_n",
        threshold: float = 0.9,
        gamma: float = 0.1,
        factor: float = 1.0,
        distance_weight: float = 0.0,
        first_k: int = 0,
        temperature: float = 1.0,
        temperature_end: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        conf_from: str = "raw",
        choice_temperature: float = 0.0,
        choice_ramp: str = "linear",
        gumbel: bool = True,
        roll: bool = False,
        guidance_scale: float = 1.0,
        guidance_ramp: str = "constant",
        guidance_start: float = 1.0,
        guidance_power: float = 2.75,
        mask_token_id: int = -1,
    ) -> None:
        check_count("num_steps", num_steps)
        if isinstance(count, str):
            check_one_of("count", count, (*COUNT_NAMES, "binomial"))
        check_one_of("on", on, BASES)
        check_one_of("order", order, ORDERS)
        check_one_of("accept", accept, ACCEPTS)
        check_range("threshold", threshold, 0.0)
        check_range("gamma", gamma, 0.0)
        check_range("factor", factor, 0.0, open_low=True)
        check_count("first_k", first_k, 0)
        check_range("temperature", temperature, 0.0)
        check_range("choice_temperature", choice_temperature, 0.0)
        check_one_of("choice_ramp", choice_ramp, CHOICE_RAMPS)
        check_one_of("conf_from", conf_from, ("raw", "filtered"))
        check_one_of("guidance_ramp", guidance_ramp, RAMPS)
        self._plan: list[Row] = []
        self.timesteps = torch.arange(num_steps)

    @property
    def needs_rank(self) -> bool:
        """Whether the order comes from a rank made by `make_rank`, not from the model."""
        return self.config.order in RANK_ORDERS

    def rows(self, length: int, num_steps: int | None = None) -> list[Row]:
        """Plan the forwards of a block.

        Args:
            length: Masked slots of the item that has most of them.
            num_steps: Overrides the config.

        Returns:
            One row per forward; [] when nothing is masked. `level` is the planned masked
            fraction; rules that decide their own count reveal more or fewer.
        """
        config = self.config
        steps = config.num_steps if num_steps is None else num_steps
        plan = "linear" if config.count == "binomial" else config.count
        counts = reveal_counts(plan, length, steps, config.on)
        fixed = config.accept in ("top_n", "quota") and config.count != "binomial"
        rows, masked = [], length
        for index, count in enumerate(counts):
            left = masked - count
            row = Row(
                index=index,
                num_rows=len(counts),
                level=masked / length,
                level_next=left / length,
                count=count if fixed else None,
                temperature=self._temperature(index, len(counts)),
                guidance_scale=self._guidance(index, len(counts), 1 - left / length),
                choice_temperature=self._choice_temperature(index, len(counts)),
            )
            rows.append(row)
            masked = left
        return rows

    def _temperature(self, index: int, num_rows: int) -> float:
        start, end = self.config.temperature, self.config.temperature_end
        if end is None or num_rows == 1:
            return start
        return start + (end - start) * index / (num_rows - 1)

    def _choice_temperature(self, index: int, num_rows: int) -> float:
        if not self.config.gumbel:
            return 0.0
        fall = {
            "linear": 1 - (index + 1) / num_rows,
            "linspace": 1 - index / (num_rows - 1) if num_rows > 1 else 0.0,
            "constant": 1.0,
        }
        return self.config.choice_temperature * fall[self.config.choice_ramp]

    def _guidance(self, index: int, num_rows: int, revealed: float) -> float:
        config = self.config
        progress = {
            "constant": 1.0,
            "linear": index / (num_rows - 1) if num_rows > 1 else 1.0,
            "mar_linear": revealed,
            "cosine_power": index / num_rows,
        }
        return guidance_at(
            config.guidance_ramp,
            config.guidance_scale,
            progress[config.guidance_ramp],
            start=config.guidance_start,
            power=config.guidance_power,
        )

    def make_rank(
        self,
        height: int,
        width: int,
        generators: Sequence[torch.Generator],
        device: torch.device | str | None = None,
    ) -> Float[Tensor, "batch cells"] | None:
        """Make the reveal rank of raster cells, or None when the model decides the order.

        Args:
            height: Grid rows; 1 for a plain sequence.
            width: Grid columns.
            generators: One CPU generator per item.
            device: Where the rank goes.
        """
        if not self.needs_rank:
            return None
        roll = self.config.roll
        return make_rank(self.config.order, height, width, generators, roll=roll, device=device)

    def select(
        self,
        row: Row,
        is_masked: Bool[Tensor, "batch slots"],
        stats: TokenStats | None,
        rank: Float[Tensor, "*batch slots"] | None,
        generators: Sequence[torch.Generator],
    ) -> Bool[Tensor, "batch slots"]:
        """Choose the slots this row reveals; `take` without the order.

        Args:
            row: The row being run.
            is_masked: Slots still unknown; prompt and padding slots must be False.
            stats: Statistics of the drawn codes; may be None for rank orders with "top_n".
            rank: From `make_rank`, lower first, in the column order of `is_masked`; None for
                model-decided orders.
            generators: One CPU generator per item.

        Returns:
            Accepted slots: within `is_masked`, at least one per unfinished item, and on the last
            row all.

        Raises:
            UsageError: The order or the rule needs `stats` or `rank` and got None.
        """
        return self.take(row, is_masked, stats, rank, generators)[0]

    def take(
        self,
        row: Row,
        is_masked: Bool[Tensor, "batch slots"],
        stats: TokenStats | None,
        rank: Float[Tensor, "*batch slots"] | None,
        generators: Sequence[torch.Generator],
    ) -> tuple[Bool[Tensor, "batch slots"], Float[Tensor, "batch slots"] | None]:
        """Choose the slots this row reveals, and tell in which order.

        Args:
            row: As in `select`.
            is_masked: As in `select`.
            stats: As in `select`.
            rank: As in `select`.
            generators: As in `select`.

        Returns:
            Accepted slots, and the score they were taken by, higher first; None when the last row
            takes everything and nothing orders it.
        """
        if row.is_last:
            knows = self.needs_rank or stats is not None
            score = self._score(row, stats, rank, generators) if knows else None
            return is_masked.clone(), None if score is None else score.expand(is_masked.shape)
        candidates = restrict_first(is_masked, self.config.first_k)
        score = self._score(row, stats, rank, generators).expand(is_masked.shape)
        count: int | Tensor = row.count or 1
        if self.config.count == "binomial":
            share = ancestral_share(row.level, row.level_next)
            count = binomial_counts(is_masked.sum(dim=-1), share, generators)
        accepted = self._accept(count, candidates, score, stats, rank)
        stuck = is_masked.any(dim=-1) & ~accepted.any(dim=-1)
        if bool(((accepted & ~is_masked).any(dim=-1) | stuck).any()):
            raise RuntimeError(f"accept rule {self.config.accept} broke its progress guarantee")
        return accepted, score

    def _score(
        self,
        row: Row,
        stats: TokenStats | None,
        rank: Tensor | None,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        if self.needs_rank:
            if rank is None:
                raise UsageError(describe("rank", None, f"a rank for order {self.config.order}"))
            return -rank.float()
        score = base_score(self.config.order, self._need(stats), log=self.config.gumbel)
        return add_choice_noise(score, row.choice_temperature, generators)

    def _need(self, stats: TokenStats | None) -> TokenStats:
        if stats is None:
            rule = f"token statistics for order {self.config.order}, accept {self.config.accept}"
            raise UsageError(describe("stats", None, rule))
        return stats

    def _accept(
        self,
        count: int | Int[Tensor, " batch"],
        is_masked: Bool[Tensor, "batch slots"],
        score: Float[Tensor, "batch slots"],
        stats: TokenStats | None,
        rank: Float[Tensor, "*batch slots"] | None,
    ) -> Bool[Tensor, "batch slots"]:
        config, rule = self.config, self.config.accept
        if rule == "top_n":
            return accept_top_n(score, is_masked, count)
        stats = self._need(stats)
        if rule == "entropy_budget":
            return accept_entropy_budget(score, stats.entropy, is_masked, config.gamma)
        if rule == "low_entropy":
            weight = config.distance_weight
            return accept_low_entropy(
                stats.entropy, is_masked, config.threshold, distance_weight=weight
            )
        # Thresholds compare probabilities, so they use the plain score, never the noisy one.
        measured = config.order if config.order in ("max_prob", "margin") else "confidence"
        confidence = base_score(measured, stats)
        if rule == "threshold":
            return accept_threshold(confidence, is_masked, config.threshold)
        if rule == "quota":
            return accept_quota(confidence, is_masked, config.threshold, count)
        if rule == "factor":
            return accept_factor(confidence, is_masked, config.factor)
        return accept_confident_prefix(confidence, is_masked, config.threshold, rank)

    def set_timesteps(
        self,
        num_inference_steps: int,
        device: torch.device | str | None = None,
        length: int | None = None,
    ) -> None:
        """Prepare `step`: plan the rows of a canvas and expose their indices.

        Args:
            num_inference_steps: Rows.
            device: Device of `timesteps`.
            length: Masked slots; `num_inference_steps` slots when None.
        """
        slots = num_inference_steps if length is None else length
        self._plan = self.rows(slots, num_inference_steps)
        self.timesteps = torch.arange(len(self._plan), device=device)

    def step(
        self,
        model_output: Float[Tensor, "batch slots vocab"],
        timestep: int | Tensor,
        sample: Int[Tensor, "batch slots"],
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        rank: Float[Tensor, "*batch slots"] | None = None,
        return_dict: bool = True,
    ) -> DiscreteSchedulerOutput | tuple[Any, ...]:
        """Run one row on a canvas of codes, in the calling convention of diffusers.

        Args:
            model_output: Logits for every slot.
            timestep: Row index, an element of `timesteps`.
            sample: Codes, `mask_token_id` where unknown.
            generator: One per item, or a single one for a batch of one.
            rank: Reveal rank for rank orders.
            return_dict: False returns a tuple in field order.

        Raises:
            UsageError: `set_timesteps` was not called, the row index is outside the plan, or the
                number of generators differs from the batch.
        """
        if not self._plan:
            raise UsageError(describe("scheduler", "no plan", "set_timesteps(...) before step"))
        index = int(timestep)
        check_range("timestep", index, 0, len(self._plan) - 1)
        row, mask_id = self._plan[index], self.config.mask_token_id
        generators = _as_list(generator)
        banned = [mask_id] if 0 <= mask_id < model_output.shape[-1] else []
        codes, stats = sample_codes(
            model_output,
            generators,
            row.temperature,
            self.config.top_k,
            self.config.top_p,
            conf_from=self.config.conf_from,
            banned_ids=banned,
        )
        accepted = self.select(row, sample == mask_id, stats, rank, generators)
        output = DiscreteSchedulerOutput(
            prev_sample=torch.where(accepted, codes, sample),
            pred_original_sample=codes,
            sampled_probs=stats.prob,
            pred_logits=model_output,
            committed_mask=accepted,
            edited_mask=torch.zeros_like(accepted),
        )
        return output if return_dict else output.to_tuple()


def _as_list(
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> list[torch.Generator]:
    if generator is None:
        raise UsageError(describe("generator", None, "one torch.Generator per item"))
    return [generator] if isinstance(generator, torch.Generator) else list(generator)
