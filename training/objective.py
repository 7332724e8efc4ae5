"""The model stage: what a recipe's corruption does to tokens, and the loss that undoes it.

The same plan that decodes lays out the training forward, and the same table masks it. The stage
knows no recipe by name; it reads the recipe's fields.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..core.attention import Lowered
from ..core.corruption import (
    any_order_mask,
    bernoulli_mask,
    draw_spans,
    exact_mask,
    flight_levels,
    mask_ratios,
    noise_levels,
    swap_tokens,
)
from ..core.grouping import PerLayer
from ..core.layout import Copy, Layout
from ..core.missing import split_unknown
from ..core.plan import DecodePlan, build_plan, relabelled
from ..core.schedule import scheduler_of
from ..core.stages import draw_levels, level_mask
from ..models.generator import GenerativeModel, frame_actions, split_poses
from ..models.heads.base import Head
from ..models.prompts import PreparedPrompt
from .history import history_generators, history_level, resampled
from .objective_rows import action_values, predicted_part, stream_values
from .rolled import rollout_loss


@dataclass
class Batch:
    """One training forward: what stands in the rows, and which rows carry which loss."""

    values: Tensor
    is_masked: Tensor
    level: Tensor
    loss_rows: Tensor
    target: Tensor
    weight: Tensor


class ModelStage:
    """Trains a `GenerativeModel` on encoded data (satisfies the trainer's stage protocol)."""

    def __init__(
        self,
        model: GenerativeModel,
        values: Tensor,
        prompt_ids: Int[Tensor, "items words features"],
        captions: Sequence[str],
        actions: Float[Tensor, "items frames actions"] | None = None,
        structure: Float[Tensor, "items slots numbers"] | None = None,
    ) -> None:
        """Bind a model to its data.

        Args:
            model: The model to train.
            values: Codes [items, slots, codebooks] or latents [items, slots, channels].
            prompt_ids: Tokenised captions.
            captions: The captions themselves (stream recipes spell them into the sequence).
            actions: What was done on the way to every frame (recipes with `condition.actions`).
            structure: Maps of the frames (recipes with `condition.structure`).

        Raises:
            ValueError: actions missing, or not as wide as the recipe's; or structure missing.
        """
        if (model.recipe.condition.structure != "none") != (structure is not None):
            raise ValueError(
                f'condition.structure = "{model.recipe.condition.structure}" and structure is '
                f"{'missing' if structure is None else 'given'}"
            )
        self.structure = structure
        wanted, got = model.recipe.condition.actions, 0 if actions is None else actions.shape[-1]
        if wanted != got:
            raise ValueError(f"actions of width {got}; condition.actions = {wanted}; try {wanted}")
        self.actions = actions
        self.model, self.recipe = model, model.recipe
        if self.recipe.layout.kind == "stream":
            size = model.config.codebook_size
            values = stream_values(values, captions, self.recipe.layout.text_tokens, size)
        self.values, self.prompt_ids = values, prompt_ids
        self.scheduler = scheduler_of(self.recipe)
        layout = self.recipe.layout
        self.varies = layout.permute != "none" or layout.split == "random" or layout.spans > 0
        self.varies |= self.recipe.schedule.matrix == "rolling" or 0 < self._share < 1
        self._fixed: tuple[DecodePlan, Layout, Lowered | PerLayer] | None = None

    @property
    def _share(self) -> float:
        """Share of the blocks (of frames, where actions are tokens) that is predicted at once."""
        acting = self.recipe.acting
        learns = acting is None or acting.frame_weight > 0
        return self.recipe.corruption.share if learns else 0.0

    @property
    def num_items(self) -> int:
        """Training items."""
        return len(self.values)

    def modules(self) -> nn.Module:
        """The trained module."""
        return self.model

    def plan(self, generator: torch.Generator) -> tuple[DecodePlan, Layout, Lowered | PerLayer]:
        """Lay out one batch; recipes without random layouts reuse one plan and one mask."""
        if self._fixed is not None:
            return self._fixed
        config, layout = self.model.config, self.recipe.layout
        span = None
        if layout.spans:
            length = layout.text_tokens + config.height * config.width
            spans = draw_spans(length, generator, max_spans=layout.spans)
            span = spans[0] if spans else None
        plan = build_plan(
            self.recipe,
            config.height,
            config.width,
            generator=generator if self.varies else None,
            span=span,
        )
        rows = plan.training_layout()
        if plan.relabels:
            rows = self._relabelled(rows, generator)
        if self._share < 1:
            rows = predicted_part(rows, self._share, generator)
        rows = rows.to(self.values.device)
        backend = "dense" if self.varies else "auto"
        result = (plan, rows, plan.lower(rows, rows, backend))
        if not self.varies:
            self._fixed = result
        return result

    def _relabelled(self, rows: Layout, generator: torch.Generator) -> Layout:
        """Draw how many of the last rows are masked, and let copies tell which."""
        count = int((rows.block >= 0).sum())
        ratio = float(mask_ratios(self.recipe.corruption.ratio, (1,), generator))
        masked = max(1, round(ratio * count))
        is_known = torch.arange(rows.num_tokens) < rows.num_tokens - masked
        return relabelled(rows, is_known)

    def loss(
        self, indices: Int[Tensor, " batch"], generator: torch.Generator, step: int
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Compute the training loss of some items.

        Args:
            indices: Items of the batch.
            generator: All randomness of the step.
            step: Unused; the loss depends on (seed, step) through `generator` only.

        Returns:
            Weighted mean of the per-token losses, and the plain mean as metric.
        """
        values = self.values[indices]
        dropped = torch.rand(len(indices), generator=generator) < self.recipe.condition.drop
        plan, layout, lowered = self.plan(generator)
        if self.recipe.corruption.rollout:
            told = self._prompt(indices, dropped), self._actions(indices)
            return rollout_loss(self.model, plan, values, *told, generator)
        batch = self.corrupt(values, plan, layout, generator)
        self.rewrite_history(batch, values, indices, dropped, generator)
        hidden = self.hidden_states(indices, dropped, batch, layout, lowered)
        if self.recipe.acting is not None:
            return self.acting_loss(hidden, batch, layout, generator)
        loss = self.token_loss(hidden, batch, generator)
        total = (loss * batch.weight).sum() / batch.weight.sum().clamp_min(1e-8)
        counted = batch.weight > 0
        return total, {"token_loss": float(loss.detach()[counted].mean())}

    def acting_loss(
        self, hidden: Tensor, batch: Batch, layout: Layout, generator: torch.Generator
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Add up the losses of frames and of actions, each the mean over its own rows.

        Args:
            hidden: States of the rows that carry the loss.
            batch: From `corrupt`.
            layout: Rows of the forward.
            generator: All randomness of the step.

        Returns:
            `frame_weight` times the frames' mean loss plus `weight` times the actions'; both means.
        """
        acting = self.recipe.acting
        assert acting is not None
        losses = self.role_losses(hidden, batch, layout, generator)
        means = [(loss * weight).sum() / weight.sum().clamp_min(1e-8) for loss, weight in losses]
        total = acting.frame_weight * means[0] + acting.weight * means[1]
        names = ("frame_loss", "action_loss")
        return total, {name: float(mean.detach()) for name, mean in zip(names, means, strict=True)}

    def role_losses(
        self, hidden: Tensor, batch: Batch, layout: Layout, generator: torch.Generator
    ) -> list[tuple[Tensor, Tensor]]:
        """Ask the head of frames and the head of actions for the losses of their rows.

        Returns:
            Losses and weights [batch, rows], of frames and of actions.
        """
        acts = self.model.is_action(layout.source[batch.loss_rows])
        heads = (self.model.head, self.model.action_head)
        parts = []
        for head, rows in zip(heads, (~acts, acts), strict=True):
            assert head is not None
            target = batch.target[:, rows]
            if head is self.model.action_head:
                target = action_values(self.recipe, target)
            parts.append((head.loss(hidden[:, rows], target, generator), batch.weight[:, rows]))
        return parts

    def hidden_states(
        self, indices: Tensor, dropped: Tensor, batch: Batch, layout: Layout,
        lowered: Lowered | PerLayer,
    ) -> Tensor:  # fmt: skip
        """Run the trunk and return the states of the rows that carry the loss.

        Args:
            indices: Items of the batch.
            dropped: Items [batch] that see the learned empty prompt instead of their caption.
            batch: From `corrupt`.
            layout: Rows of the forward.
            lowered: Their mask.
        """
        prompt, actions = self._prompt(indices, dropped), self._actions(indices)
        told, poses = split_poses(self.recipe, actions)
        if told is not None:
            cells = self.model.config.height * self.model.config.width
            told = frame_actions(told, layout, cells, self.recipe.layout.shift)
        if self.recipe.cache.nearest is not None:  # which views are seen differs from item to item
            lowered = self.plan(torch.Generator())[0].lower(layout, layout, poses=poses)
        hidden = self.model.backbone(
            batch.values, batch.is_masked, layout, batch.level, prompt, lowered, actions=told,
            poses=poses, structure=self._structure(indices, layout),
        )  # fmt: skip
        return hidden[:, batch.loss_rows]

    def _prompt(self, indices: Tensor, dropped: Tensor) -> PreparedPrompt:
        if not self.model.uses_prompt:
            return self.model.unprompted(len(indices))
        ids, is_null = self.prompt_ids[indices], dropped.to(self.model.device)
        return self.model.prepare(self.model.embed_prompts(ids, is_null))

    def _structure(self, indices: Tensor, layout: Layout) -> Tensor | None:
        """Look up what the rows of some items are told of their frames' structure."""
        if self.structure is None:
            return None
        return self.structure[indices].to(self.model.device)[:, layout.source.clamp_min(0)]

    def _actions(self, indices: Tensor) -> Tensor | None:
        return None if self.actions is None else self.actions[indices].to(self.model.device)

    @torch.no_grad()
    def rewrite_history(
        self, batch: Batch, values: Tensor, indices: Tensor, dropped: Tensor,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        """Put the model's own redrawing where the clean copy stands, in a share of the steps.

        Args:
            batch: From `corrupt`; its clean rows are replaced.
            values: The data.
            indices: Items of the batch.
            dropped: Items without a prompt.
            generator: All randomness of the step.
        """
        spec = self.recipe.corruption
        if not spec.resample or float(torch.rand((), generator=generator)) >= spec.resample:
            return
        plan, layout, _ = self.plan(generator)
        level = history_level(spec.resample_shift, generator)
        redrawn = resampled(
            self.model, plan, values, self._prompt(indices, dropped), self._actions(indices), level,
            history_generators(len(values), generator),
        )  # fmt: skip
        is_context = layout.copy == Copy.CLEAN
        batch.values[:, is_context] = redrawn[:, layout.source[is_context]].to(batch.values)

    def token_loss(self, hidden: Tensor, batch: Batch, generator: torch.Generator) -> Tensor:
        """Ask the head for one loss per predicted row."""
        head: Head = self.model.head
        return head.loss(hidden, batch.target, generator)

    # -- corruption -------------------------------------------------------------------------

    def corrupt(
        self, values: Tensor, plan: DecodePlan, layout: Layout, generator: torch.Generator
    ) -> Batch:
        """Turn clean items into one training forward, as the recipe's corruption says.

        Slots of which nothing is known (core/missing.py) are masked rows and carry no loss.
        """
        is_padded = self.recipe.acting is not None or self.recipe.train.pad
        if is_padded:
            filled, unknown = split_unknown(values)
            if bool(unknown.any()):
                batch = self.corrupt(filled, plan, layout, generator)
                return self._forget(batch, unknown, plan, layout)
        source = layout.source.clamp_min(0)
        clean = values[:, source]
        kind = self.recipe.corruption.kind
        if plan.shift:
            return self._next_token(values, clean, plan, layout, generator)
        if kind in ("flow", "ddpm"):
            return self._diffuse(values, clean, plan, layout, generator)
        return self._mask(values, clean, plan, layout, generator)

    def _forget(
        self, batch: Batch, unknown: Bool[Tensor, "items slots"], plan: DecodePlan, layout: Layout
    ) -> Batch:
        """Take the loss off rows that predict what nobody knows, and hide it from masked models.

        Decoding masks the same rows (`Rollout.is_missing`).
        """
        predicted = plan.content.source if plan.shift else layout.source[batch.loss_rows]
        batch.weight = batch.weight * ~unknown[:, predicted]
        if self.model.knows_missing:
            # A masked token is one that is not known, and so is one that was not recorded.
            batch.is_masked |= unknown[:, layout.source.clamp_min(0)] & (layout.source >= 0)
            if self.recipe.corruption.kind == "mask":
                batch.level = batch.is_masked.to(batch.level)
        return batch

    def _next_token(
        self, values: Tensor, clean: Tensor, plan: DecodePlan, layout: Layout,
        generator: torch.Generator,
    ) -> Batch:  # fmt: skip
        """Every row from the last prompt row on predicts the token after it."""
        batch, rows = clean.shape[:2]
        first = plan.num_prompt_rows - 1
        nothing = torch.zeros(batch, rows, dtype=torch.bool, device=clean.device)
        target = values[:, plan.content.source]
        clean = swap_tokens(clean, self.recipe.corruption.context, generator)
        weight = torch.ones(target.shape[:2], device=clean.device)
        loss_rows = torch.arange(first, rows, device=clean.device)
        return Batch(clean, nothing, nothing.float(), loss_rows, target, weight)

    def _noisy(self, layout: Layout) -> Tensor:
        is_open = (layout.copy == Copy.NOISY) & ~self.model.is_given(layout.source)
        return is_open.nonzero()[:, 0]

    def _mask(
        self, values: Tensor, clean: Tensor, plan: DecodePlan, layout: Layout,
        generator: torch.Generator,
    ) -> Batch:  # fmt: skip
        """Hide some of the noisy rows; they (or all noisy rows) carry the loss."""
        spec, noisy = self.recipe.corruption, self._noisy(layout)
        batch, block = len(values), layout.block[noisy]
        weight = torch.ones(batch, len(noisy))
        if spec.ratio == "ardm":
            hidden, _, scale = any_order_mask(batch, len(noisy), generator)
            weight = weight * scale[:, None] / len(noisy)
        else:
            by_block = spec.per == "block" or (spec.per == "stage" and plan.copies == 2)
            columns = plan.num_blocks if by_block else 1
            ratio = mask_ratios(spec.ratio, (batch, columns), generator)
            choose = exact_mask if spec.exact_count else bernoulli_mask
            index = block.clamp_max(columns - 1).to(ratio.device)
            kept = self._kept_clean((batch, plan.num_blocks), generator)[:, block.cpu()]
            if plan.relabels:
                hidden = torch.ones(batch, len(noisy), dtype=torch.bool)
            elif plan.levels:
                drawn = draw_levels(ratio.shape, len(plan.levels), generator)
                source = layout.source[noisy].cpu()
                hidden, is_drawn = level_mask(
                    ratio, drawn, block.cpu(), source, plan.levels, generator
                )
                weight = weight * is_drawn
            else:
                hidden = choose(ratio, block, generator)
            hidden = hidden & ~kept.to(hidden.device)
            if spec.weight == "inverse_ratio":
                weight = 1 / ratio.clamp_min(1 / len(noisy))[:, index]
            weight = weight * ~kept
        if spec.loss_on == "masked":
            weight = weight * hidden
        is_masked = torch.zeros(clean.shape[:2], dtype=torch.bool, device=clean.device)
        is_masked[:, noisy] = hidden.to(clean.device)
        if spec.context:
            # With one copy whatever is known is looked at, and masked rows hide what they hold.
            is_context = (layout.copy == Copy.CLEAN) | (plan.copies == 1)
            clean = clean.clone()
            clean[:, is_context] = swap_tokens(clean[:, is_context], spec.context, generator)
        target = values[:, layout.source[noisy]]
        level = is_masked.float()
        return Batch(clean, is_masked, level, noisy, target, weight.to(clean.device))

    def _diffuse(
        self, values: Tensor, clean: Tensor, plan: DecodePlan, layout: Layout,
        generator: torch.Generator,
    ) -> Batch:  # fmt: skip
        """Add noise to the noisy rows, one level per block or per item."""
        spec, noisy = self.recipe.corruption, self._noisy(layout)
        batch, block = len(values), layout.block[noisy]
        columns = plan.num_blocks if spec.per == "block" else 1
        kind = "ddpm" if spec.kind == "ddpm" else spec.level
        shift = 1.0 if kind == "ddpm" else spec.level_shift
        if spec.per == "flight":
            # Blocks of a flight follow each other; `group` is the first of them.
            flight = layout.group[noisy].cpu()
            place = block.cpu() - flight
            per_row = flight_levels(batch, flight, place, plan.flight, generator, shift=shift)
            per_row = per_row.to(clean)
        else:
            levels = noise_levels(kind, (batch, columns), generator, shift=shift).to(clean)
            per_row = levels[:, block.clamp_max(columns - 1)]
        kept = self._kept_clean((batch, plan.num_blocks), generator).to(clean.device)[:, block]
        told = torch.where(kept, plan.context_level, per_row)
        per_row = torch.where(kept, plan.context_noise, per_row)
        target = values[:, layout.source[noisy]]
        noise = torch.randn(target.shape, generator=generator).to(clean)
        mixed = self.scheduler.add_noise(target, noise, per_row[..., None])
        rows = clean.clone()
        rows[:, noisy] = mixed
        if spec.context:
            is_context = layout.copy == Copy.CLEAN
            rows[:, is_context] = self._damaged(clean[:, is_context], spec.context, generator)
        level = torch.zeros(clean.shape[:2], device=clean.device, dtype=clean.dtype)
        level[:, noisy] = told
        weight = (~kept).to(clean)
        if spec.weight == "segment":
            # CausalFusion: 2 - start / n, the later segments count less.
            first = torch.stack([(block == b).nonzero()[0, 0] for b in range(plan.num_blocks)])
            weight = weight * (2.0 - first[block] / len(noisy))
        target = self.scheduler.target(target, noise)
        nothing = torch.zeros(clean.shape[:2], dtype=torch.bool, device=clean.device)
        return Batch(rows, nothing, level, noisy, target, weight)

    def _kept_clean(self, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw which blocks [batch, blocks] stay clean, as finished context is.

        Nothing is drawn for a share of 0: such recipes keep their random streams.
        """
        share = self.recipe.corruption.clean
        if not share:
            return torch.zeros(shape, dtype=torch.bool)
        return torch.rand(shape, generator=generator) < share

    def _damaged(self, context: Tensor, most: float, generator: torch.Generator) -> Tensor:
        """Add noise the model is not told of, one level in [0, most] per item."""
        levels = most * torch.rand(len(context), 1, generator=generator).to(context)
        noise = torch.randn(context.shape, generator=generator).to(context)
        return self.scheduler.add_noise(context, noise, levels.expand(context.shape[:2])[..., None])


def stage_summary(stage: ModelStage) -> dict[str, Any]:
    """Sizes worth logging at the start of a run."""
    parameters = sum(p.numel() for p in stage.model.parameters())
    return {"items": stage.num_items, "parameters": parameters, "slots": stage.values.shape[1]}
