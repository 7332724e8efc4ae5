"""Output heads and the factory that builds them from a config."""

from collections.abc import Mapping
from typing import Any

from ...core.errors import UsageError, check_one_of
from .base import Head, HeadSample
from .categorical import CategoricalHead
from .diffusion import DiffusionHead
from .gmm import GaussianMixtureHead
from .patch import PatchHead
from .regression import RegressionHead
from .shortcut import ShortcutHead

__all__ = [
    "CategoricalHead",
    "DiffusionHead",
    "GaussianMixtureHead",
    "Head",
    "HeadSample",
    "PatchHead",
    "RegressionHead",
    "ShortcutHead",
    "build_head",
]

_HEADS: dict[str, type[Head]] = {
    "categorical": CategoricalHead,
    "diffusion": DiffusionHead,
    "gmm": GaussianMixtureHead,
    "patch": PatchHead,
    "regression": RegressionHead,
    "shortcut": ShortcutHead,
}


def build_head(
    config: Mapping[str, Any],
    dim: int,
    *,
    codebook_size: int | None = None,
    num_codebooks: int = 1,
    latent_channels: int | None = None,
) -> Head:
    """Build a head from its config.

    Args:
        config: `kind` (categorical, patch, diffusion, shortcut, gmm or regression) and the
            head's own settings.
        dim: Width of the trunk states.
        codebook_size: Codes per codebook of the tokenizer; needed by the categorical head.
        num_codebooks: Codes per token of the tokenizer.
        latent_channels: Channels per token of the tokenizer; needed by the continuous heads.

    Returns:
        The head, freshly initialised.

    Raises:
        UsageError: Unknown kind, unknown setting, or a tokenizer of the wrong value type.
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    check_one_of("head.kind", kind, sorted(_HEADS))
    if _HEADS[kind].value == "code":
        sizes = {"vocab_size": codebook_size, "num_codebooks": num_codebooks}
        needed = codebook_size
    else:
        sizes = {"channels": latent_channels}
        needed = latent_channels
    if needed is None:
        raise UsageError(
            f"head.kind {kind!r} needs a tokenizer with {_HEADS[kind].value} values, got one "
            "without; pick a tokenizer or a head of the other value type"
        )
    try:
        return _HEADS[kind](dim, **(sizes | settings))
    except TypeError as error:
        raise UsageError(f"head.{kind} has no such setting: {error}") from error
