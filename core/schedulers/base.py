"""What all schedulers share: the row record, the config rules and the output record.

What it is: `Row` (one forward of the model inside a block), the diffusers-compatible base class,
and the flow-matching conversions every continuous scheduler uses.
What it does not know: models, layouts, caches, how rows are executed.
Invariants: configs are plain JSON; a config key nobody in the family knows is an error, never
ignored; schedulers hold no per-request state except between `begin` and the last `step`.
"""

from dataclasses import dataclass
from typing import Any

from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..errors import check_known_keys


@dataclass(frozen=True)
class Row:
    """One forward pass of a block's decode plan.

    Attributes:
        index: Position in the plan, from 0.
        num_rows: Rows in the plan.
        level: Noise level or masked fraction the forward runs at, in [0, 1]; 1 = noise or mask.
        level_next: Level the row leaves the block at; 0 after the last row.
        count: Slots to reveal, or None when the accept rule decides or values are continuous.
        temperature: Sampling temperature of codes.
        guidance_scale: Classifier-free guidance weight, 1 = off.
        choice_temperature: Strength of the Gumbel noise on the reveal order.
    """

    index: int
    num_rows: int
    level: float
    level_next: float
    count: int | None = None
    temperature: float = 1.0
    guidance_scale: float = 1.0
    choice_temperature: float = 0.0

    @property
    def is_last(self) -> bool:
        """Whether this row finishes the block."""
        return self.index == self.num_rows - 1


@dataclass
class DiscreteSchedulerOutput(BaseOutput):
    """Result of one row on codes; field names follow diffusers' discrete schedulers.

    Attributes:
        prev_sample: Codes after the row, mask id where still unknown.
        pred_original_sample: Codes drawn for every slot.
        sampled_probs: Probability of each drawn code, float32.
        pred_logits: Logits the codes were drawn from.
        committed_mask: True where this row revealed a slot.
        edited_mask: True where this row replaced a revealed code.
    """

    prev_sample: Int[Tensor, "batch slots"]
    pred_original_sample: Int[Tensor, "batch slots"]
    sampled_probs: Float[Tensor, "batch slots"]
    pred_logits: Float[Tensor, "batch slots vocab"]
    committed_mask: Bool[Tensor, "batch slots"]
    edited_mask: Bool[Tensor, "batch slots"]


class BlockScheduler(SchedulerMixin, ConfigMixin):
    """Base of both families: strict configs that can be moved between family members."""

    order = 1
    config_name: Any = "scheduler_config.json"  # as every diffusers scheduler

    @property
    def config(self) -> Any:
        """Settings as a frozen dictionary whose keys are also attributes."""
        return self._internal_dict

    @classmethod
    def _get_compatibles(cls) -> list[type["BlockScheduler"]]:
        """List the family: every class below the ancestor that derives directly from this base.

        diffusers looks names up in its own library, where ours do not live.
        """
        root = next(c for c in cls.__mro__ if BlockScheduler in c.__bases__)
        members, pending = [], [root]
        while pending:
            member = pending.pop()
            pending.extend(member.__subclasses__())
            if "__init__" in vars(member):  # abstract members have no settings of their own
                members.append(member)
        return members

    @classmethod
    def from_config(
        cls, config: dict[str, Any] | None = None, return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Build this scheduler from its own config or from that of a family member.

        Settings the other member has and this one lacks are dropped; settings the other left at
        their defaults take this class's defaults. Keyword arguments override.

        Args:
            config: A config dictionary, such as `other.config`.
            return_unused_kwargs: Also return what was not used, as in diffusers.
            **kwargs: Overrides.

        Raises:
            UsageError: A key that no member of the family knows.
        """
        known = {
            key for member in cls._get_compatibles() for key in member._get_init_keys(member)
        } - {"self"}
        public = [key for key in (config or {}) if not key.startswith("_")]
        check_known_keys(cls.__name__, [*public, *kwargs], known)
        return super().from_config(config or {}, return_unused_kwargs, **kwargs)


def flow_noise(
    clean: Float[Tensor, "batch *rest"],
    noise: Float[Tensor, "batch *rest"],
    level: float | Float[Tensor, "batch *rest"],
) -> Float[Tensor, "batch *rest"]:
    """Mix clean values with noise on the straight path: x = (1 - s) clean + s noise.

    Args:
        clean: Data.
        noise: Standard normal numbers.
        level: s in [0, 1]; a tensor must broadcast against `clean`.
    """
    return (1 - level) * clean + level * noise


def velocity_from_clean(
    sample: Float[Tensor, "batch *rest"],
    clean: Float[Tensor, "batch *rest"],
    level: float | Float[Tensor, "batch *rest"],
) -> Float[Tensor, "batch *rest"]:
    """Convert a clean prediction: v = noise - clean = (x - clean) / s, for s > 0."""
    return (sample - clean) / level


def clean_from_velocity(
    sample: Float[Tensor, "batch *rest"],
    velocity: Float[Tensor, "batch *rest"],
    level: float | Float[Tensor, "batch *rest"],
) -> Float[Tensor, "batch *rest"]:
    """Convert a velocity: clean = x - s v."""
    return sample - level * velocity


def noise_from_velocity(
    sample: Float[Tensor, "batch *rest"],
    velocity: Float[Tensor, "batch *rest"],
    level: float | Float[Tensor, "batch *rest"],
) -> Float[Tensor, "batch *rest"]:
    """Convert a velocity: noise = x + (1 - s) v."""
    return sample + (1 - level) * velocity


def velocity_from_noise(
    sample: Float[Tensor, "batch *rest"],
    noise: Float[Tensor, "batch *rest"],
    level: float | Float[Tensor, "batch *rest"],
) -> Float[Tensor, "batch *rest"]:
    """Convert a noise prediction: v = (noise - x) / (1 - s), for s < 1.

    At s = 1 the sample IS the noise and the prediction carries no information about the data,
    which is why straight-path samplers cannot start from a noise-predicting model.
    """
    return (noise - sample) / (1 - level)
