"""What every pipeline is: a tokenizer and a model of its tokens, loaded only from safe files.

It knows neither pictures nor worlds.
"""

from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import DiffusionPipeline

from ..core.errors import ModelError, UsageError, describe
from ..core.sampling import item_generator
from ..models.generator import GenerativeModel

# diffusers loads a component only from a module that is already imported.
from ..tokenizers import video_build as _tokenizer_classes  # noqa: F401
from .guard import check_configs
from .params import model_folder

MAX_PROMPT = 100_000
"""Characters of a prompt."""


class TokenPipeline(DiffusionPipeline):
    """A tokenizer and a generative model that was trained on its tokens."""

    model_cpu_offload_seq: ClassVar[str] = "model->tokenizer"
    _folder: Path | None = None

    def __init__(self, tokenizer: Any, model: GenerativeModel) -> None:
        """Join a tokenizer and a model that was trained on its tokens.

        Args:
            tokenizer: A tokenizer.
            model: The generative model.

        Raises:
            ModelError: their grids or token kinds differ.
        """
        super().__init__()
        grid = (model.config.height, model.config.width)
        if tuple(tokenizer.grid) != grid or bool(tokenizer.codebook_size) != bool(
            model.config.codebook_size
        ):
            raise ModelError(
                f"tokenizer grid {tuple(tokenizer.grid)} ({tokenizer.value}s) does not fit a model "
                f"of grid {grid}; load the tokenizer the model was trained with"
            )
        self.register_modules(tokenizer=tokenizer, model=model)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Self:
        """Load a bundled model by name, or a folder written by `save_pretrained` or `train`.

        Args:
            pretrained_model_name_or_path: "blockloom/emoji", or a folder.
            **kwargs: Passed to diffusers (`dtype`, ...).

        Raises:
            ModelError: no such model, or a folder that holds anything but safetensors weights.
        """
        folder = model_folder(str(pretrained_model_name_or_path))
        check_configs(folder)
        kwargs.setdefault("local_files_only", True)
        kwargs["use_safetensors"] = True
        # Weights are stored in half precision; computing in it on a CPU is slow and inexact.
        kwargs.setdefault("dtype", torch.float32)
        pipe = super().from_pretrained(folder, **kwargs)
        for part in (pipe.model, pipe.tokenizer):
            own_memory(part).eval()
        pipe._folder = folder
        return pipe


class CallPipeline(TokenPipeline):
    """A pipeline that is called once per request and can be stopped while it runs."""

    def __init__(self, tokenizer: Any, model: GenerativeModel) -> None:
        """Join a tokenizer and a model; see `TokenPipeline`."""
        super().__init__(tokenizer, model)
        self._interrupted = False

    def interrupt(self) -> None:
        """Stop the running call at its next row; what is finished is kept and returned."""
        self._interrupted = True


def own_memory(module: torch.nn.Module) -> torch.nn.Module:
    """Move weights out of the memory-mapped file, in place.

    Mapped tensors start at any byte, and kernels that prefer aligned memory then differ in the
    last bits from the same weights elsewhere.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    return module


def item_generators(generator: Any, seed: int | None, items: int) -> list[torch.Generator]:
    """Return one CPU generator per item: the given ones, or item k of the seed.

    Args:
        generator: One for all items, one per item, or None.
        seed: Used when no generator is given; None = a random one.
        items: How many.

    Raises:
        UsageError: another number of generators, or one that is not on the CPU.
    """
    if generator is None:
        base = int(torch.seed()) if seed is None else seed
        return [item_generator(base, k) for k in range(items)]
    if isinstance(generator, torch.Generator):
        # One generator for several items: it seeds one stream per item, in order.
        if items == 1:
            return [_cpu(generator)]
        draws = torch.randint(2**62, (items,), generator=_cpu(generator)).tolist()
        return [item_generator(s, 0) for s in draws]
    if len(generator) != items:
        raise UsageError(describe("number of generators", len(generator), str(items)))
    return [_cpu(g) for g in generator]


def _cpu(generator: torch.Generator) -> torch.Generator:
    if generator.device.type != "cpu":
        raise UsageError(describe("generator device", generator.device, "cpu", "cpu"))
    return generator
