"""Few-step students: continuous-time consistency distillation of a flow model (sCM).

Until `distill.init_steps` the model learns velocities from the data as usual. Then a frozen copy of
it is the teacher, and the model learns to name, from anywhere on the teacher's path, the end of
that path: its answer may not change along it. How it does change is a derivative along the path, by
forward-mode differentiation through the network; every frame has a time of its own, and its tangent
is normalised over its own elements.

The student keeps answering with velocities of the straight path (core/trigflow.py holds the map),
so nothing else knows of the circular one. It knows no recipe by name.

Source: sCM (arXiv:2410.11081), algorithm 1 and section 4; per frame as in Next-Frame Diffusion
(arXiv:2506.01380). Differs: no adaptive weight over times.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..core.layout import Copy, Layout
from ..core.numerics import differentiable_attention
from ..core.schedulers.base import flow_noise
from ..core.schedulers.flow import FlowEuler
from ..core.trigflow import circular_velocity, level_of_time, path_scale, time_of_level
from ..models.generator import GenerativeModel
from .objective import Batch, ModelStage
from .student import StudentStage

Field = Callable[[Tensor, Tensor], Tensor]
"""Sample and time on the circular path to dx/dt."""


def tangent(
    student: Field,
    sample: Float[Tensor, "batch rows channels"],
    time: Float[Tensor, "batch rows 1"],
    drift: Float[Tensor, "batch rows channels"],
    *,
    moves: Float[Tensor, "batch rows 1"] | float = 1.0,
    share: float = 1.0,
) -> tuple[Float[Tensor, "batch rows channels"], Float[Tensor, "batch rows channels"]]:
    """Compute how the named end f = cos(t) x - sin(t) F changes along a path, times cos(t).

    g = -cos^2 (F - dx/dt) - r cos sin (x + dF/dt); it is 0 where the student is consistent. All
    rows that move do so at the speed cos t sin t, which moves their log-signal-to-noise alike.

    Args:
        student: F, a function of samples and times.
        sample: On the circular path.
        time: In [0, pi/2].
        drift: dx/dt of the teacher.
        moves: 0 for rows that stand still (context).
        share: r in [0, 1], raised from 0 while training warms up.

    Returns:
        F and g, neither with gradients.

    Raises:
        RuntimeError: `student` runs an operation without a forward derivative.

    Source: sCM (arXiv:2410.11081), eq. 6 and algorithm 1.
    """
    cos, sin = time.cos(), time.sin()
    speed = cos * sin * moves
    with torch.no_grad(), differentiable_attention():
        both: Any = torch.func.jvp(student, (sample, time), (speed * drift, speed))
        value, change = both
    g = -(cos**2) * (value - drift) - share * (cos * sin * sample + change)
    return value.detach(), (g * moves).detach()


def normalised(
    g: Float[Tensor, "batch rows channels"], frame: Int[Tensor, " rows"], floor: float
) -> Float[Tensor, "batch rows channels"]:
    """Divide a tangent by its norm plus `floor`, over the elements of every frame by itself.

    Args:
        g: Tangents of all rows.
        frame: Number of the frame each row belongs to, 0 or above.
        floor: c in g / (||g|| + c), > 0.
    """
    squares = g.new_zeros(len(g), int(frame.max()) + 1)
    squares = squares.index_add(1, frame, g.square().sum(-1))
    return g / (squares.sqrt()[:, frame, None] + floor)


END_METRIC = (
    "held-out squared distance of a frame drawn from noise in one row to where its path ends"
)
END_ROWS = 16
"""Euler rows that find where a path of the teacher ends."""
END_BATCH = 64


class ConsistencyStage(StudentStage):
    """Trains a flow model, then its student that needs few rows."""

    def __init__(self, model: GenerativeModel, *data: Any, **more: Any) -> None:
        """Build the teacher; see `StudentStage`."""
        super().__init__(model, *data, **more)
        self.teacher = self.beside(copy.deepcopy(model))
        self._all = nn.ModuleDict({"student": model, "teacher": self.teacher.model})

    def modules(self) -> nn.Module:
        """Student and teacher; the teacher never moves by itself."""
        return self._all

    def loss(
        self, indices: Int[Tensor, " batch"], generator: torch.Generator, step: int
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Compute the loss of a step: velocities of the data first, then consistency.

        Args:
            indices: Items of the batch.
            generator: All randomness of the step.
            step: Tells which of the two.
        """
        first = self.spec.init_steps
        if step < first:
            return super().loss(indices, generator, step)
        if step == first and first:  # with none, the teacher has come from a folder
            self.teacher.model.load_state_dict(self.model.state_dict())
        ramp = self.spec.tangent_warmup
        share = min(1.0, (step - first + 1) / ramp) if ramp else 1.0
        return self._consistency(indices, generator, share)

    def _consistency(
        self, indices: Tensor, generator: torch.Generator, share: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Move F along the normalised tangent: mean of (F - sg(F + g))^2 over rows with a loss."""
        dropped = torch.rand(len(indices), generator=generator) < self.recipe.condition.drop
        plan, layout, _ = self.plan(generator)
        batch = self.corrupt(self.values[indices], plan, layout, generator)
        first = int(batch.loss_rows[0])
        time = time_of_level(batch.level[:, first:, None])
        sample = path_scale(time) * batch.values[:, first:]
        fields = [
            self._field(stage, indices, dropped, batch, layout) for stage in (self, self.teacher)
        ]
        with torch.no_grad():
            drift = fields[1](sample, time)
        moves = (batch.weight > 0).to(sample)[..., None]
        value, g = tangent(fields[0], sample, time, drift, moves=moves, share=share)
        cells = self.model.config.height * self.model.config.width
        frame = layout.source[batch.loss_rows] // cells
        goal = value + normalised(g, frame, self.spec.tangent_floor)
        loss = (fields[0](sample, time) - goal).square().mean(-1)
        total = (loss * batch.weight).sum() / batch.weight.sum().clamp_min(1e-8)
        return total, {"tangent": float((g * moves).square().mean().sqrt())}

    def _field(
        self, stage: ModelStage, indices: Tensor, dropped: Tensor, batch: Batch, layout: Layout
    ) -> Field:
        """Make a model's F: a function of its noisy rows, which stand last, and their times."""
        first = int(batch.loss_rows[0])
        plan, _, _ = self.plan(torch.Generator())
        lowered = plan.lower(layout, layout, "dense")  # FlexAttention has no forward derivative
        head: Any = stage.model.head

        def field(sample: Tensor, time: Tensor) -> Tensor:
            values = torch.cat((batch.values[:, :first], sample / path_scale(time)), 1)
            level = torch.cat((batch.level[:, :first], level_of_time(time)[..., 0]), 1)
            rows = replace(batch, values=values, level=level)
            hidden = stage.hidden_states(indices, dropped, rows, layout, lowered)
            return circular_velocity(head.predict(hidden), sample, time)

        return field


@torch.no_grad()
def end_gaps(stage: ConsistencyStage, seed: int) -> tuple[float, float]:
    """Measure how far the clean frames that one row names lie from the ends of the teacher's paths.

    The last frame of every window starts as noise, with the true frames before it kept as context;
    its path is followed with many Euler rows of the teacher.

    Args:
        stage: Student and teacher in eval mode, with the windows to measure on.
        seed: Seed of all noise.

    Returns:
        Mean squared distance of the student's frames, and of the teacher's own in one row.
    """
    stage.teacher.model.eval()
    rows = FlowEuler(num_steps=END_ROWS, shift=stage.recipe.schedule.level_shift).rows()
    sums = torch.zeros(3, dtype=torch.float64)
    for number, indices in enumerate(torch.arange(stage.num_items).split(END_BATCH)):
        velocity, sample = _last_frame(stage, indices, torch.Generator().manual_seed(number + seed))
        guesses = [sample - velocity(part, sample, 1.0) for part in (stage, stage.teacher)]
        end = sample
        for row in rows:
            step = row.level_next - row.level
            end = end + step * velocity(stage.teacher, end, row.level)
        gaps = [(guess - end).square().sum() for guess in guesses]
        sums += torch.stack([*gaps, torch.tensor(float(end.numel()))]).double()
    return float(sums[0] / sums[2]), float(sums[1] / sums[2])


def _last_frame(
    stage: ConsistencyStage, indices: Tensor, generator: torch.Generator
) -> tuple[Callable[[ModelStage, Tensor, float], Tensor], Tensor]:
    """Make a model's velocity of the last frame of some windows, and the noise it starts from."""
    plan, layout, lowered = stage.plan(generator)
    values = stage.values[indices]
    batch = stage.corrupt(values, plan, layout, generator)
    clean = values[:, layout.source.clamp_min(0)]
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    context = flow_noise(clean, noise, plan.context_noise)
    own = (layout.block == plan.num_blocks - 1) & (layout.copy == Copy.NOISY)
    never = torch.zeros(len(indices), dtype=torch.bool)
    at = own[batch.loss_rows]

    def velocity(part: ModelStage, sample: Tensor, level: float) -> Tensor:
        rows = context.clone()
        rows[:, own] = sample
        told = torch.where(own, level, plan.context_level).to(rows).expand(rows.shape[:2])
        hidden = part.hidden_states(
            indices, never, replace(batch, values=rows, level=told), layout, lowered
        )
        head: Any = part.model.head
        return head.predict(hidden[:, at])

    return velocity, torch.randn(clean[:, own].shape, generator=generator).to(clean)
