"""Few-step students: distribution matching distillation, on own history or the data's.

Until `distill.init_steps` the student and a bidirectional teacher of the same size learn to undo
noise as usual. Then the teacher stands still, a critic starts as its copy, and steps take turns:
the critic learns to undo noise on what the student draws, the student moves where the teacher finds
its frames likelier than the critic does.

The student's frames come from its own cached rollout, which keeps no gradients. They are computed
once more in one masked forward whose context is that rollout, and this forward carries the
gradients: cached and masked decode agree (core/proof.py), so it is the same student.

With `distill.adversarial` a judge on the critic's states learns beside it to tell noised data from
noised frames of the student, which in its turn moves to be taken for data.

It knows no recipe by name.

Source: DMD (arXiv:2311.18828) as CausVid (arXiv:2412.07772) and Self Forcing (arXiv:2506.08009,
algorithm 1) use it; the judge is that of DMD2 (arXiv:2405.14867), section 4.3. Differs: teacher and
student learn side by side from scratch; no guidance; the judge has a verdict on every token.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from ..core.corruption import noise_levels
from ..core.layout import Layout
from ..core.plan import DecodePlan
from ..core.recipe import Recipe, apply_overrides, recipe_from_dict
from ..core.rollout import Rollout
from ..core.sampling import per_item_randn
from ..core.schedulers.base import clean_from_velocity
from ..core.schedulers.early_exit import EarlyExit
from ..models.generator import GenerativeModel, ModelDecoder
from .history import history_generators
from .objective import Batch, ModelStage
from .streams import Streams
from .student import StudentStage

TEACHER = [
    "layout.copies=1", "layout.block=all", "mask=bidirectional", "cache.write=none",
    "cache.window=null", "cache.far=null", "cache.sink=0", "cache.exact=false",
    "cache.matched=false", "corruption.per=sample", "corruption.context=0",
    "corruption.resample=0", "distill=null", "learns=null",
]  # fmt: skip
"""What makes a recipe's bidirectional twin: every frame sees every frame, one level for all."""


@dataclass
class Drawn:
    """What a student drew: frames, and what the last row it ran was given.

    `clean` and `noisy` are [batch, slots, channels]; `level` is that of the last row. `items` are
    the windows of the data whose prompts and actions were told.
    """

    items: Tensor
    clean: Tensor
    noisy: Tensor
    level: float


class DistillStage(StudentStage):
    """Trains a student with a teacher and a critic beside it."""

    def __init__(self, model: GenerativeModel, *data: Any, **more: Any) -> None:
        """Build the teacher and the critic; see `StudentStage`."""
        super().__init__(model, *data, **more)
        config = dict(model.config)
        twin = bidirectional(self.recipe).model_dump(mode="json")
        sizes = {k: config[k] for k in ("height", "width", "latent_channels")}
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(self.recipe.train.seed + 1)
            teacher = GenerativeModel(recipe=twin, **sizes)
        self.teacher, self.critic = self.beside(teacher), self.beside(copy.deepcopy(teacher))
        self._all = nn.ModuleDict(
            {"student": model, "teacher": teacher, "critic": self.critic.model}
        )
        if self.spec.adversarial:
            self._all["judge"] = nn.Linear(self.recipe.backbone.dim, 1)
            nn.init.zeros_(self.judge.weight)  # at first it cannot tell, and pulls nowhere
            nn.init.zeros_(self.judge.bias)
        cells = self.values.shape[1] // self.recipe.layout.frames
        self.given_slots = cells * self.spec.given
        if self.spec.horizon:
            batch = self.recipe.train.batch_size
            self._all["streams"] = Streams(self.values, batch, self.spec.given, self.spec.horizon)

    def modules(self) -> nn.Module:
        """Student, teacher and critic; which of them move depends on the step."""
        return self._all

    @property
    def judge(self) -> nn.Linear:
        """Tells data from drawn frames by the critic's states, above 0 for data."""
        judge = self._all["judge"]
        assert isinstance(judge, nn.Linear)
        return judge

    @property
    def streams(self) -> Streams | None:
        """The student's own videos, where they go on from step to step."""
        found = self._all["streams"] if "streams" in self._all else None
        return found if isinstance(found, Streams) else None

    def loss(
        self, indices: Tensor, generator: torch.Generator, step: int
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Compute the loss of a step: learning from data, the critic's turn, or the student's.

        Args:
            indices: Items of the batch.
            generator: All randomness of the step.
            step: Tells whose turn it is.
        """
        if step < self.spec.init_steps:
            own, metrics = super().loss(indices, generator, step)
            guide, _ = self.teacher.loss(indices, generator, step)
            return own + guide, metrics
        if step == self.spec.init_steps:
            self.critic.model.load_state_dict(self.teacher.model.state_dict())
        turn = (step - self.spec.init_steps) % (self.spec.critic_steps + 1)
        drawn = self._drawn(indices, generator)
        if turn < self.spec.critic_steps:
            return self._critic_loss(drawn, generator)
        loss, metrics = self._student_loss(drawn, generator)
        if self.spec.data_weight:
            data, more = super().loss(indices, generator, step)
            loss, metrics = loss + self.spec.data_weight * data, metrics | more
        return loss, metrics

    # -- what the student draws ---------------------------------------------------------------

    def _never(self, indices: Tensor) -> Tensor:
        return torch.zeros(len(indices), dtype=torch.bool)

    @torch.no_grad()
    def _drawn(self, indices: Tensor, generator: torch.Generator) -> Drawn:
        """Draw clips with the student, up to a random row of its schedule."""
        plan, _, _ = self.plan(generator)
        if self.streams is None:
            values = self.values[indices]
        else:
            indices, values = self.streams.next(indices)
        rows = self.scheduler.rows()
        exit_row = int(torch.randint(len(rows), (), generator=generator))
        generators = history_generators(len(indices), generator)
        if self.spec.history == "data":
            noise = per_item_randn(values.shape[1:], generators, values.device, values.dtype)
            level = rows[exit_row].level
            noisy = self.scheduler.add_noise(values, noise, level)
            return Drawn(indices, values, noisy, level)
        prompt = self._prompt(indices, self._never(indices))
        decoder = ModelDecoder(self.model, prompt, actions=self._actions(indices))
        known = torch.zeros(values.shape[:2], dtype=torch.bool, device=values.device)
        known[:, : self.given_slots] = True
        rollout = Rollout(
            plan, decoder, EarlyExit(self.scheduler, exit_row), values=values, is_known=known,
            generators=generators,
        )  # fmt: skip
        noisy = torch.zeros_like(values)
        for event in rollout.events():
            if event.kind == "row" and event.data["row"] == exit_row:
                noisy[:, event.data["sources"]] = event.data["received"].to(noisy)
        if self.streams is not None:
            self.streams.keep(rollout.values)
        return Drawn(indices, rollout.values, noisy, rows[exit_row].level)

    def _redrawn(self, drawn: Drawn, generator: torch.Generator) -> Tensor:
        """Compute the last row of the student's frames once more, in one forward with gradients."""
        _, layout, lowered = self.plan(generator)
        noisy = self._noisy(layout)
        source = layout.source[noisy]
        rows = drawn.clean[:, layout.source.clamp_min(0)].clone()
        rows[:, noisy] = drawn.noisy[:, source]
        level = torch.zeros(rows.shape[:2], device=rows.device, dtype=rows.dtype)
        level[:, noisy] = drawn.level
        batch = self._forward_only(rows, level, noisy, drawn.noisy[:, source])
        velocity = self._velocity(self, drawn.items, batch, layout, lowered)
        return clean_from_velocity(drawn.noisy[:, source], velocity, drawn.level)

    def _forward_only(self, rows: Tensor, level: Tensor, at: Tensor, target: Tensor) -> Batch:
        nothing = torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
        return Batch(rows, nothing, level, at, target, torch.ones_like(target[..., 0]))

    def _velocity(
        self, stage: ModelStage, indices: Tensor, batch: Batch, layout: Layout, lowered: Any
    ) -> Tensor:
        hidden = stage.hidden_states(indices, self._never(indices), batch, layout, lowered)
        head: Any = stage.model.head
        return head.predict(hidden)

    # -- losses -------------------------------------------------------------------------------

    def _critic_loss(
        self, drawn: Drawn, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Flow matching on what the student drew."""
        plan, layout, lowered = self.critic.plan(generator)
        batch = self.critic.corrupt(drawn.clean, plan, layout, generator)
        never = self._never(drawn.items)
        hidden = self.critic.hidden_states(drawn.items, never, batch, layout, lowered)
        loss = self.critic.token_loss(hidden, batch, generator).mean()
        metrics = {"critic_loss": float(loss.detach())}
        if self.spec.adversarial:
            drawn_rows = self._verdict(drawn.clean, drawn.items, generator)
            data_rows = self._verdict(self.values[drawn.items], drawn.items, generator)
            judged = 0.5 * (softplus(drawn_rows).mean() + softplus(-data_rows).mean())
            loss, metrics["judge_loss"] = loss + judged, float(judged.detach())
        return loss, metrics

    def _verdict(self, clean: Tensor, items: Tensor, generator: torch.Generator) -> Tensor:
        """Judge the tokens a student draws, noised, [batch, tokens]: above 0 for data."""
        plan, layout, lowered = self.critic.plan(generator)
        noisy, level = self._noised(clean, plan, generator)
        at = torch.arange(noisy.shape[1], device=noisy.device)
        batch = self._forward_only(noisy, level.expand(noisy.shape[:2]), at, noisy)
        hidden = self.critic.hidden_states(items, self._never(items), batch, layout, lowered)
        return self.judge(hidden)[:, self.given_slots :, 0]

    def _student_loss(
        self, drawn: Drawn, generator: torch.Generator
    ) -> tuple[Tensor, dict[str, float]]:
        """Move the student's frames along the difference of the two scores.

        g = (x0_critic - x0_teacher) / mean|x - x0_teacher|, loss = mean((x - sg(x - g))^2) / 2,
        over the frames it drew; given ones are seen by teacher and critic but stay.
        """
        frames = self._redrawn(drawn, generator)
        whole = torch.cat((drawn.clean[:, : self.given_slots], frames[:, self.given_slots :]), 1)
        with torch.no_grad():
            plan, layout, lowered = self.teacher.plan(generator)
            noisy, level = self._noised(whole.detach(), plan, generator)
            at = torch.arange(noisy.shape[1], device=noisy.device)
            told = level.expand(noisy.shape[:2])
            batch = self._forward_only(noisy, told, at, noisy)
            real, fake = (
                clean_from_velocity(
                    noisy, self._velocity(s, drawn.items, batch, layout, lowered), level[..., None]
                )[:, self.given_slots :]
                for s in (self.teacher, self.critic)
            )
            own = whole[:, self.given_slots :].detach()
            gap = (own - real).abs().mean((1, 2), keepdim=True).clamp_min(1e-6)
            direction = ((fake - real) / gap).nan_to_num(0.0)
            goal = own - direction
        loss = 0.5 * (whole[:, self.given_slots :] - goal).square().mean()
        metrics = {"student_step": float(direction.abs().mean())}
        if self.spec.adversarial:
            with standing_still(self.critic.model, self.judge):
                fooled = softplus(-self._verdict(whole, drawn.items, generator)).mean()
            loss = loss + self.spec.adversarial * fooled
            metrics["adversarial_loss"] = float(fooled.detach())
        return loss, metrics

    def _noised(
        self, clean: Tensor, plan: DecodePlan, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Noise whole clips to one level each, between 2 % and 98 %."""
        shift = self.recipe.corruption.level_shift
        level = noise_levels("uniform", (len(clean), 1), generator, shift=shift).clamp(0.02, 0.98)
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        level = level.to(clean)
        return self.scheduler.add_noise(clean, noise, level[..., None]), level


@contextmanager
def standing_still(*modules: nn.Module) -> Iterator[None]:
    """Let gradients pass through modules and not into them, for forwards that run inside."""
    moving = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in moving:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in moving:
            parameter.requires_grad_(True)


def bidirectional(recipe: Recipe) -> Recipe:
    """Return a recipe's twin in which every frame sees every frame."""
    plain = apply_overrides(recipe.model_dump(mode="json"), TEACHER)
    return recipe_from_dict(plain, f"{recipe.name}, the teacher")
