"""A rollout that goes on for ever: one block per step, at constant memory.

`LiveRollout` drives an `EndlessPlan` through the one decode loop: it takes the actions of the next
block, runs its rows, and hands the block's values out before their slots are used again. What a
world session keeps between two key presses is one of these. It does not know pixels.

Invariant: its values are those of one long request with the same seed, bit for bit (with sinks: as
far as the recipe's own length); going on from a snapshot gives the bits that going on without it
gives.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.decoder import Event
from ..core.endless import EndlessPlan
from ..core.errors import UsageError
from ..core.missing import unknown_slots
from ..core.plan import build_plan
from ..core.rollout import Rollout
from ..core.schedule import scheduler_of
from .generate import empty_values, null_prompts, prompt_vectors
from .generator import GenerativeModel, ModelDecoder
from .prompts import take_prompts


class LiveRollout:
    """Blocks of frames one after another, for a batch of items."""

    def __init__(
        self,
        model: GenerativeModel,
        prompts: Sequence[str],
        generators: Sequence[torch.Generator],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        temperature: float | None = None,
    ) -> None:
        """Open the rollout; nothing runs yet.

        Args:
            model: A video model whose cache has a window, in eval mode.
            prompts: One per item.
            generators: One CPU generator per item.
            num_steps: Rows per block; None = the recipe's.
            guidance_scale: 1 = off; None = the recipe's.
            temperature: 0 = greedy; None = the recipe's.

        Raises:
            UsageError: a model that cannot go on for ever, or another number of generators.
        """
        if len(prompts) != len(generators):
            raise UsageError(f"{len(generators)} generators for {len(prompts)} prompts; give equal")
        structure = model.recipe.condition.structure
        if structure != "none":
            raise UsageError(
                f'condition.structure = "{structure}" in a rollout without end, whose frames to '
                "come have no map; make a video of so many frames instead"
            )
        self.model, self.items = model, len(prompts)
        height, width = model.config.height, model.config.width
        is_rotated = model.recipe.cache.keys == "rotated"
        self.plan = EndlessPlan(build_plan(model.recipe, height, width), rotated=is_rotated)
        self.frames_per_block = len(self.plan.rows_of_block[0]) // (height * width)
        scheduler = scheduler_of(
            model.recipe, guidance_scale=guidance_scale, temperature=temperature
        )
        self.decoder = ModelDecoder(model, prompt_vectors(model, prompts), self._uncond(scheduler))
        width = model.recipe.condition.actions
        if width:
            frames = self.plan.ring * self.frames_per_block
            self.decoder.actions = torch.zeros(self.items, frames, width, device=model.device)
        values = empty_values(model, self.items)
        self._rollout = Rollout(
            self.plan, self.decoder, scheduler, values=values,
            is_known=torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device),
            generators=generators, num_steps=num_steps,
        )  # fmt: skip
        self.block = 0
        self._moved = -1  # the last block that sinks were moved for: a block may be begun again

    def _uncond(self, scheduler: Any) -> Any:
        if not self.model.uses_prompt or scheduler.config.guidance_scale == 1.0:
            return None
        return null_prompts(self.model, self.items)

    @torch.no_grad()
    def observe(
        self, values: Tensor, actions: Float[Tensor, "items frames actions"] | None = None
    ) -> None:
        """Take the next block as given: it becomes context, as if it had been generated.

        Args:
            values: Codes or latents [items, slots of a block, channels], clean.
            actions: What was done on the way to each of its frames.

        Raises:
            UsageError: wrong shapes.
        """
        source = self._checked_source(self.block, values)
        self._open(actions)
        self._rollout.give(source, values)
        for _ in self._rollout.block_events(self.block):
            pass
        self._close()

    def amend(self, values: Tensor) -> None:
        """Replace the block generated last by what was observed; see `Rollout.amend`.

        Args:
            values: Codes or latents [items, slots of the block, channels], clean.

        Raises:
            UsageError: wrong shapes, or a block that is permanent already.
        """
        self._checked_source(self.block - 1, values)
        self._rollout.amend(self.block - 1, values)

    def _checked_source(self, block: int, values: Tensor) -> Tensor:
        """Return the slots of a block that values are for."""
        source = self.plan.sources(block)
        wanted = (self.items, len(source), self._rollout.values.shape[-1])
        if tuple(values.shape) != wanted:
            raise UsageError(f"given frames have shape {tuple(values.shape)}; legal {wanted}")
        if not self.model.knows_missing and bool(unknown_slots(values).any()):
            raise UsageError(
                f"given frames hold unknown values, and recipe {self.model.recipe.name} has not "
                "learned of any; give all of them"
            )
        return source

    @torch.no_grad()
    def events(
        self, actions: Float[Tensor, "items frames actions"] | None = None,
        told: Float[Tensor, "items frames given channels"] | None = None,
    ) -> Iterator[Event]:  # fmt: skip
        """Generate the next block, row by row; the block counts once all events are taken.

        Args:
            actions: What is done on the way to each of its frames; for models with actions.
            told: The tokens of each of its frames that the recipe is always given.

        Raises:
            UsageError: wrong shapes.
        """
        self._check_told(told)
        self._open(actions)
        self._tell(told)
        yield from self._rollout.block_events(self.block)
        self._close()

    def step(
        self, actions: Float[Tensor, "items frames actions"] | None = None,
        told: Float[Tensor, "items frames given channels"] | None = None,
    ) -> Tensor:  # fmt: skip
        """Generate the next block.

        Args:
            actions: See `events`.
            told: See `events`.

        Returns:
            Its values [items, slots of a block, channels], frame after frame.
        """
        source = self.plan.sources(self.block)
        for _ in self.events(actions, told):
            pass
        return self._rollout.values[:, source].clone()

    def _open(self, actions: Tensor | None) -> None:
        """Free the slots the next block lives in and note its actions."""
        source = self.plan.sources(self.block)
        told = self.decoder.actions
        wanted = None if told is None else (self.items, self.frames_per_block, told.shape[-1])
        got = None if actions is None else tuple(actions.shape)
        if wanted != got:
            raise UsageError(f"actions have shape {got}; this model takes {wanted} per step")
        if told is not None and actions is not None:
            first = (self.block % self.plan.ring) * self.frames_per_block
            told[:, first : first + self.frames_per_block] = actions.to(told)
        rollout = self._rollout
        for flags in (rollout.is_known, rollout.given, rollout.is_missing):
            flags[:, source] = False
        shift = self.plan.sink_shift(self.block)
        if shift and self._rollout.cache is not None and self._moved != self.block:
            self._rollout.cache.move_sinks(shift)
            self._moved = self.block

    def _check_told(self, told: Tensor | None) -> None:
        """Refuse tokens of the next block that are not those the recipe is always given."""
        given = self.model.recipe.layout.given
        channels = self._rollout.values.shape[-1]
        wanted = (self.items, self.frames_per_block, given, channels) if given else None
        got = None if told is None else tuple(told.shape)
        if wanted != got:
            raise UsageError(f"told tokens have shape {got}; this model takes {wanted} per step")

    def _tell(self, told: Tensor | None) -> None:
        """Take in the tokens of the next block that are always given."""
        if told is not None:
            source = self.plan.sources(self.block)
            self._rollout.give(source[self.model.is_given(source)], told.flatten(1, 2))

    def _close(self) -> None:
        self.block += 1
        if self._rollout.cache is not None:
            self._rollout.cache.log.clear()  # a log without end would be a leak

    def set_prompts(self, prompts: Sequence[str]) -> None:
        """Change the prompts of the blocks to come; what is cached stays as it was.

        Raises:
            UsageError: another number of prompts.
        """
        if len(prompts) != self.items:
            raise UsageError(f"{len(prompts)} prompts for {self.items} items; give one per item")
        fresh = ModelDecoder(
            self.model, prompt_vectors(self.model, prompts), self._uncond(self._rollout.scheduler)
        )
        fresh.actions = self.decoder.actions
        self.decoder = self._rollout.decoder = fresh

    def keep(self, items: Int[Tensor, " kept"]) -> None:
        """Go on with some items only; those that stay are what they would have been.

        Args:
            items: Numbers of items, at least one.
        """
        rollout, prompts = self._rollout, self.decoder
        index = items.to(rollout.values.device)
        fresh = ModelDecoder(
            self.model, take_prompts(prompts.cond, index),
            None if prompts.branches == 1 else null_prompts(self.model, len(items)),
        )  # fmt: skip
        if prompts.actions is not None:
            fresh.actions = prompts.actions[index]
        self.decoder = rollout.decoder = fresh
        for name in ("values", "is_known", "given", "is_missing"):
            setattr(rollout, name, getattr(rollout, name)[index])
        rollout.kept = None if rollout.kept is None else rollout.kept[index]
        rollout.generators = [rollout.generators[item] for item in items.tolist()]
        if rollout.cache is not None:
            places = items
            if rollout.cache.batch == 2 * self.items:  # guidance branches, one after the other
                places = torch.cat((items, items + self.items))
            rollout.cache = rollout.cache.select(places)
        self.items = len(items)

    def snapshot(self) -> dict[str, Tensor]:
        """Return everything that going on depends on, the prompts apart (safetensors-ready)."""
        rollout = self._rollout
        state = {"block": torch.tensor(self.block), "values": rollout.values.clone()}
        state |= {f"generator.{i}": g.get_state() for i, g in enumerate(rollout.generators)}
        if rollout.cache is not None:
            state |= {f"cache.{name}": part for name, part in rollout.cache.snapshot().items()}
        if rollout.kept is not None:
            state["kept"] = rollout.kept.clone()
        if self.model.knows_missing:
            state["missing"] = rollout.is_missing.clone()
        if self.decoder.actions is not None:
            state["actions"] = self.decoder.actions.clone()
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from a snapshot of a rollout of the same model and number of items.

        Raises:
            UsageError: a snapshot of another model or another number of items.
        """
        mine = self.snapshot()
        shapes = {name: tuple(part.shape) for name, part in mine.items()}
        given = {name: tuple(part.shape) for name, part in state.items()}
        if shapes != given:
            odd = sorted(set(shapes.items()) ^ set(given.items()))[0][0]
            raise UsageError(f"snapshot does not fit this model: {odd}")
        rollout = self._rollout
        self.block, self._moved = int(state["block"]), -1
        rollout.values = state["values"].clone()
        for i, generator in enumerate(rollout.generators):
            generator.set_state(state[f"generator.{i}"])
        if rollout.cache is not None:
            prefix = "cache."
            inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            rollout.cache.restore(inner)
        if rollout.kept is not None:
            rollout.kept.copy_(state["kept"])
        if self.model.knows_missing:
            rollout.is_missing.copy_(state["missing"])
        if self.decoder.actions is not None:
            self.decoder.actions.copy_(state["actions"])
        rollout.is_known[:] = True
        rollout.pending = self._pending()

    def _pending(self) -> list[Any]:
        """Rows that are finished but not yet in the cache, which the block number tells."""
        if self.block == 0:
            return [] if self.plan.prompt is None else [self.plan.prompt]
        return [self.plan.clean_rows(self.block - 1)] if self.plan.write == "fused" else []
