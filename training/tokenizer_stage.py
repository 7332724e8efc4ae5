"""The tokenizer stage of training: reconstruct images, then measure and store the result.

It does not know which tokenizer it trains; it uses the tokenizer protocol only.
"""

import copy
import logging
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..core.errors import ModelError
from ..tokenizers.base import psnr
from .data import ImageDataset
from .loop import TrainConfig, Trainer, TrainReport

logger = logging.getLogger(__name__)


class TokenizerStage:
    """Trains a tokenizer to reconstruct the images of a data set."""

    def __init__(self, tokenizer: Any, images: ImageDataset):
        """Join a tokenizer and its training images.

        Args:
            tokenizer: An `ImageTokenizer` that is a module.
            images: Training items, of the tokenizer's size.
        """
        self.tokenizer = tokenizer
        self.images = images
        self.num_items = len(images)

    def modules(self) -> nn.Module:
        """Return the tokenizer."""
        return self.tokenizer

    def loss(
        self, indices: Tensor, generator: torch.Generator, step: int
    ) -> tuple[Tensor, dict[str, float]]:
        """Return the tokenizer's own loss on some items.

        Args:
            indices: int64 [items].
            generator: Noise of stochastic tokenizers.
            step: Unused; part of the stage protocol.
        """
        pixels = self.images.pixels(indices).to(_device(self.tokenizer))
        return self.tokenizer.loss(pixels, generator)


@torch.no_grad()
def reconstruct(tokenizer: Any, images: ImageDataset, batch_size: int = 64) -> Tensor:
    """Encode and decode images.

    Args:
        tokenizer: An `ImageTokenizer`.
        images: Images of its size.
        batch_size: Images at a time.

    Returns:
        float32 [items, 3, height, width] in [-1, 1], on the CPU.
    """
    device = _device(tokenizer)
    parts = torch.arange(len(images)).split(batch_size)
    decoded = [
        tokenizer.decode(tokenizer.encode(images.pixels(part).to(device))).float().cpu()
        for part in parts
    ]
    return torch.cat(decoded)


def mean_psnr(tokenizer: Any, images: ImageDataset) -> float:
    """Measure the mean reconstruction PSNR over images, in dB.

    Args:
        tokenizer: An `ImageTokenizer`.
        images: Images of its size.
    """
    decoded = reconstruct(tokenizer, images)
    return float(psnr(decoded, images.pixels(torch.arange(len(images)))).mean())


def load_matching(tokenizer: Any, folder: Path | str) -> int:
    """Copy every tensor of a saved tokenizer whose name and shape fit; leave the others.

    This is how a continuous tokenizer starts from a discrete one's convolutions.

    Args:
        tokenizer: Receives the tensors.
        folder: A `save_pretrained` folder or a training checkpoint.

    Returns:
        Number of tensors copied.

    Raises:
        ModelError: No weights in the folder, or none of them fits.
    """
    folder = Path(folder)
    names = ("diffusion_pytorch_model.safetensors", "ema.safetensors", "model.safetensors")
    file = next((folder / name for name in names if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"{folder} holds none of {', '.join(names)}")
    own = tokenizer.state_dict()
    fitting = {
        name: value.to(own[name].dtype)
        for name, value in load_file(file).items()
        if name in own and own[name].shape == value.shape
    }
    if not fitting:
        raise ModelError(f"no tensor of {file} fits this tokenizer")
    tokenizer.load_state_dict(own | fitting)
    logger.info("copied %d of %d tensors from %s", len(fitting), len(own), file)
    return len(fitting)


def save_half(tokenizer: Any, folder: Path | str) -> None:
    """Store a tokenizer in float16 safetensors with its configuration.

    Args:
        tokenizer: A diffusers `ModelMixin`; left as it is.
        folder: Created when missing.
    """
    half = copy.deepcopy(tokenizer).cpu().half()
    # diffusers notes where a model was loaded from: a folder of this machine is nobody's business.
    half.register_to_config(_name_or_path="")
    half.save_pretrained(folder)


def train_tokenizer(
    tokenizer: Any,
    images: ImageDataset,
    config: TrainConfig,
    folder: Path | str,
    *,
    held_out: ImageDataset | None = None,
    init_from: Path | str | None = None,
    resume: bool = False,
) -> TrainReport:
    """Train a tokenizer and store its averaged weights in `folder/final`.

    Args:
        tokenizer: An `ImageTokenizer` that is a diffusers `ModelMixin`.
        images: Training items.
        config: Settings of the loop.
        folder: Output folder.
        held_out: Items whose PSNR goes to the log.
        init_from: Saved tokenizer whose fitting tensors are copied first; ignored on resume.
        resume: Go on from the newest checkpoint.
    """
    if init_from is not None and not resume:
        load_matching(tokenizer, init_from)

    def evaluate(step: int) -> dict[str, float]:
        return {"psnr": mean_psnr(tokenizer, held_out)} if held_out is not None else {}

    stage = TokenizerStage(tokenizer, images)
    trainer = Trainer(stage, config, folder, resume=resume, evaluate=evaluate)
    report = trainer.run()
    if trainer.accelerator.is_main_process:
        with trainer.averaged_weights(), torch.no_grad():
            tokenizer.eval()
            if hasattr(tokenizer, "measure_latents"):
                parts = torch.arange(len(images)).split(config.batch_size)
                tokenizer.measure_latents(images.pixels(part) for part in parts)
            save_half(tokenizer, Path(folder) / "final")
    return report


def _device(module: nn.Module) -> torch.device:
    # Tokenizers without weights have buffers only.
    return next(chain(module.parameters(), module.buffers())).device
