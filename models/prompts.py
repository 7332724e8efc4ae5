"""A prompt as the layers take it: projected once, then shared by all passes of a rollout.

It knows neither encoders nor layers; the backbone (models/backbone.py) fills it.
"""

from dataclasses import dataclass, field
from typing import Any

from einops import repeat
from torch import Tensor


@dataclass(frozen=True)
class PreparedPrompt:
    """What the layers need of a prompt, computed once per rollout.

    `prefix` [batch, prompt rows, dim] stands in front of the tokens; `pooled` [batch, dim] feeds
    the modulation; `cross` holds one (key, value) pair per layer, and `cross_valid` [batch, words].
    `memo` keeps what the backbone derives from them and from the kinds of the rows alone.
    """

    prefix: Tensor | None = None
    pooled: Tensor | None = None
    cross: list[tuple[Tensor, Tensor]] | None = None
    cross_valid: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)


def take_prompts(prompt: PreparedPrompt, items: Tensor) -> PreparedPrompt:
    """Select items of a prepared prompt by number."""

    def maybe(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[items]

    cross = prompt.cross and [(key[items], value[items]) for key, value in prompt.cross]
    return PreparedPrompt(
        maybe(prompt.prefix), maybe(prompt.pooled), cross, maybe(prompt.cross_valid)
    )


def repeat_prompt(prompt: PreparedPrompt, times: int) -> PreparedPrompt:
    """Repeat every item of a prepared prompt (several pictures of one prompt)."""

    def again(x: Tensor) -> Tensor:
        return repeat(x, "b ... -> (b t) ...", t=times)

    def maybe(x: Tensor | None) -> Tensor | None:
        return None if x is None else again(x)

    cross = prompt.cross and [(again(k), again(v)) for k, v in prompt.cross]
    return PreparedPrompt(
        maybe(prompt.prefix), maybe(prompt.pooled), cross, maybe(prompt.cross_valid)
    )
