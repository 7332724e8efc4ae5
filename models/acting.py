"""A model that acts: frames seen and things done in one stream, for as long as somebody plays.

`ActingRollout` alternates between the two kinds of blocks of a recipe that acts. A frame is seen
(it was observed) or imagined (the model draws it); an action is drawn or told. A frame that was
imagined may be replaced by what was then seen. It does not know simulators or pixels.

Invariant: after a replacement the stream is that of a rollout that was shown the frame at once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional

from ..core.errors import UsageError
from .generator import GenerativeModel
from .live import LiveRollout


class ActingRollout:
    """The stream of a batch of players, in step with each other."""

    def __init__(
        self,
        model: GenerativeModel,
        instructions: Sequence[str],
        generators: Sequence[torch.Generator],
        **settings: Any,
    ) -> None:
        """Open the stream; nothing runs yet.

        Args:
            model: A model whose recipe acts, in eval mode.
            instructions: One per player.
            generators: One CPU generator per player.
            **settings: `temperature`, `guidance_scale` and `num_steps` of `LiveRollout`.

        Raises:
            UsageError: a model that does not act, or that cannot go on for ever.
        """
        if model.action_head is None:
            raise UsageError(
                f"recipe {model.recipe.name} does not act; train one with acting, like video/par"
            )
        self.model = model
        self.live = LiveRollout(model, instructions, generators, **settings)
        self._is_imagined = False

    @property
    def awaits_action(self) -> bool:
        """Whether the next block is an action; otherwise it is a frame."""
        return self.live.block % 2 == 1

    def see(self, values: Tensor) -> None:
        """Take a frame as observed: the next one, or in place of the one just imagined.

        Args:
            values: Codes or latents of the frame [players, tokens, channels]; -1, or not a number,
                where nothing was seen.

        Raises:
            UsageError: it is an action's turn, or values of another shape.
        """
        if self.awaits_action and self._is_imagined:
            self.live.amend(values)
        else:
            self._require(False)
            self.live.observe(values)
        self._is_imagined = False

    def keep(self, players: Int[Tensor, " kept"]) -> None:
        """Go on with some players only, for instance those whose episodes are not over.

        Args:
            players: Their numbers, at least one.
        """
        self.live.keep(players)

    def imagine(self) -> Tensor:
        """Draw the next frame.

        Returns:
            Its codes or latents [players, tokens, channels].

        Raises:
            UsageError: it is an action's turn.
        """
        self._require(False)
        self._is_imagined = True
        return self.live.step()

    def act(self) -> Tensor:
        """Draw what is done next; it becomes part of the stream.

        Returns:
            Ids [players] (int64), or numbers [players, numbers].

        Raises:
            UsageError: it is a frame's turn.
        """
        self._require(True)
        drawn, acting = self.live.step()[:, 0], self._acting
        return drawn[:, 0].long() if acting.codes else drawn[:, : acting.numbers]

    def do(self, actions: Tensor) -> None:
        """Say what was done, in place of `act`.

        Args:
            actions: As `act` returns them; -1, or not a number, where nobody knows what was done.

        Raises:
            UsageError: it is a frame's turn, or actions of another shape or outside the codes.
        """
        self._require(True)
        acting, items = self._acting, self.live.items
        wanted = (items,) if acting.codes else (items, acting.numbers)
        if tuple(actions.shape) != wanted:
            raise UsageError(f"actions have shape {tuple(actions.shape)}; legal {wanted}")
        if acting.codes and not bool(((actions >= -1) & (actions < acting.codes)).all()):
            raise UsageError(f"actions {actions.tolist()} outside 0..{acting.codes - 1}")
        row = actions[:, None, None] if acting.codes else actions[:, None]
        config = self.model.config
        width = config.num_codebooks if config.codebook_size else config.latent_channels
        self.live.observe(functional.pad(row, (0, width - row.shape[-1])))

    @property
    def _acting(self) -> Any:
        return self.model.recipe.acting

    def _require(self, action: bool) -> None:
        if self.awaits_action != action:
            turn = "an action's" if self.awaits_action else "a frame's"
            raise UsageError(f"it is {turn} turn; frames and actions alternate, a frame first")
