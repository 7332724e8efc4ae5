"""What `blockloom train` does differently for videos: clips in, windows of latent frames as items.

The run itself (stages, checkpoints, the pipeline folder) is in run.py. It knows no recipe by name.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ..core.errors import DataError, UsageError
from ..core.recipe import Recipe
from ..models.generator import GenerativeModel
from ..tokenizers.mosaic import MosaicTokenizer
from ..tokenizers.video_frames import FrameTokenizer
from .balance import balanced_order
from .clip_folder import load_clips
from .clip_stage import (
    ClipActions,
    ClipPrompts,
    ClipTokens,
    ClipWindows,
    PixelWindows,
    encode_clips,
    latent_offsets,
    leading_actions,
    with_actions,
)
from .clip_structure import ClipStructure, clip_structure
from .clips import ClipDataset
from .consistency import ConsistencyStage
from .distill import DistillStage
from .loop import TrainConfig
from .objective import ModelStage
from .tokenizer_stage import save_half, train_tokenizer
from .wordings import wordings

logger = logging.getLogger(__name__)
TOKENIZER_STEPS = 3
"""Steps of a temporal tokenizer in a training window, after the first."""
DISTILLING = {"dmd": DistillStage, "consistency": ConsistencyStage}
"""Stage of every `distill.method`."""
MEASURED_CLIPS = 64
"""Held-out windows whose reconstruction is measured."""


def load_clip_data(recipe: Recipe, data: Path | str, tokenizer: Any) -> ClipDataset:
    """Load clips at the tokenizer's frame size and check them against the recipe.

    Args:
        recipe: A video recipe.
        data: Folder or .npz, as `load_clips` reads them.
        tokenizer: The `VideoTokenizer` of the run.

    Raises:
        DataError: Data that cannot be read, of another size, without training clips, or whose
            actions do not fit `condition.actions`.
    """
    height, width = tokenizer.frame_size
    clips = load_clips(data, height if height == width else None)
    size = clips.frames.shape[1:3]
    if tuple(size) != (height, width):
        raise DataError(
            f"frames are {size[1]}x{size[0]} pixels and the tokenizer takes {width}x{height}; "
            "set tokenizer.frame_size, or scale the clips"
        )
    if recipe.condition.actions:
        leading_actions(clips.only("train"), recipe.condition.actions, tokenizer)
    elif clips.actions is not None:
        logger.info("actions of these clips are not used; condition.actions = 0")
    return clips


def held_out_clips(clips: ClipDataset) -> ClipDataset | None:
    """Select every clip outside the training split, or None when there is none."""
    index = [i for i, split in enumerate(clips.split) if split != "train"]
    return clips.take(index) if index else None


def train_clip_tokenizer(
    tokenizer: Any,
    clips: ClipDataset,
    config: TrainConfig,
    folder: Path,
    *,
    init_from: Path | str | None = None,
    resume: bool = False,
    frames: int | None = None,
    balance: str = "none",
) -> dict[str, Any]:
    """Train a video tokenizer on windows of raw frames and store it in `folder/final`.

    Args:
        tokenizer: A `VideoTokenizer`; trained in place.
        clips: All clips; only "train" is trained on.
        config: Settings of the loop.
        folder: Output folder.
        init_from: Saved tokenizer whose fitting tensors are copied first.
        resume: Go on from the newest checkpoint.
        frames: Pixel frames per window; None = 1 for tokenizers of single frames, else some steps.
        balance: Lets windows of rare kinds come more often, as `train.balance` does.

    Returns:
        The report of the loop (of a mosaic, which is picked and not trained, the number of its
        pictures), and the PSNR of held-out windows in dB where there are any.
    """
    length = frames or _window_frames(tokenizer)
    seen = clips.only("train")
    train: Any = PixelWindows(seen, length, max(1, length // 2))
    train.windows = balanced(train.windows, seen, balance)
    if isinstance(getattr(tokenizer, "inner", None), MosaicTokenizer):
        result = fit_mosaic(tokenizer, train, config, folder)
    else:
        report = train_tokenizer(
            tokenizer, train, config, folder, init_from=init_from, resume=resume
        )
        result = vars(report) | {"checkpoint": str(report.checkpoint)}
    held_out = held_out_clips(clips)
    if held_out is not None:
        result["held_out_psnr_db"] = clip_psnr(tokenizer, PixelWindows(held_out, length, length))
    return result


def fit_mosaic(
    tokenizer: FrameTokenizer, train: PixelWindows, config: TrainConfig, folder: Path
) -> dict[str, Any]:
    """Pick the cell pictures of a mosaic from training frames and store it in `folder/final`.

    Args:
        tokenizer: Frames by a `MosaicTokenizer`; changed in place.
        train: Windows of training frames.
        config: Batch size and seed; nothing else of it is used.
        folder: Output folder.

    Returns:
        The number of pictures in use.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(config.seed))
    mosaic: Any = tokenizer.inner
    used = mosaic.fit(
        rearrange(train.pixels(part), "b c f h w -> (b f) c h w")
        for part in order.split(config.batch_size)
    )
    save_half(tokenizer.eval(), folder / "final")
    return {"pictures": used}


def _window_frames(tokenizer: Any) -> int:
    if tokenizer.temporal_stride == 1 and isinstance(tokenizer, FrameTokenizer):
        return 1
    return tokenizer.first_frames + TOKENIZER_STEPS * tokenizer.step_frames


@torch.no_grad()
def clip_psnr(tokenizer: Any, windows: PixelWindows, most: int = MEASURED_CLIPS) -> float:
    """Measure the mean PSNR of reconstructed frames, in dB, for a peak-to-peak range of 2.

    Args:
        tokenizer: A `VideoTokenizer` in eval mode.
        windows: Windows of its frame size.
        most: Windows measured, spread evenly over all.
    """
    chosen = torch.linspace(0, len(windows) - 1, min(most, len(windows))).long()
    pixels = windows.pixels(chosen)
    device = next(iter(tokenizer.state_dict().values()), torch.zeros(0)).device
    decoded = tokenizer.decode(tokenizer.encode(pixels.to(device))).float().cpu()
    return float(frame_psnr(decoded, pixels).mean())


def frame_psnr(pixels: Tensor, target: Tensor) -> Tensor:
    """Measure the PSNR of every frame, in dB.

    Args:
        pixels: Float[batch 3 frames height width], clamped to [-1, 1] here.
        target: The same shape, in [-1, 1].

    Returns:
        Float[batch frames].
    """
    error = (pixels.clamp(-1, 1) - target).square().mean(dim=(1, 3, 4))
    return 10 * torch.log10(4 / error.clamp_min(1e-12))


def balanced(windows: ClipWindows, clips: ClipDataset, balance: str) -> ClipWindows:
    """Repeat the windows of rare kinds of clips."""
    order = balanced_order([clips.captions[clip] for clip in windows.clip.tolist()], balance)
    return windows if order is None else windows.take(order)


def clip_model_stage(
    model: GenerativeModel, tokenizer: Any, clips: ClipDataset, cache: Path, split: str = "train"
) -> ModelStage:
    """Encode the clips of a split and join them, as windows, with a model.

    Args:
        model: The model to train; its recipe says how long a window is.
        tokenizer: The `VideoTokenizer` in eval mode.
        clips: All clips.
        cache: Folder of the latent cache.
        split: The clips that are used.

    Raises:
        DataError: No clip is as long as a window.
    """
    used = clips.only(split)
    return stage_of_clips(model, tokenizer, used, encode_clips(tokenizer, used, cache))


def stage_of_clips(
    model: GenerativeModel, tokenizer: Any, clips: ClipDataset, values: Tensor
) -> ModelStage:
    """Join encoded clips with a model.

    Args:
        model: The model.
        tokenizer: The `VideoTokenizer` the values are from.
        clips: The clips.
        values: From `encode_clips`.

    Raises:
        DataError: No clip is as long as a window.
        UsageError: A recipe that spells captions into the sequence, which videos do not.
    """
    if model.recipe.layout.kind != "frames":
        raise UsageError(
            f'layout.kind = "{model.recipe.layout.kind}" cannot train on clips; set "frames"'
        )
    offsets = latent_offsets(clips, tokenizer)
    acting, length = model.recipe.acting, model.recipe.layout.frames
    pads = model.recipe.train.pad
    if acting is None:
        tokens: Any = ClipTokens(values, offsets, length, pad=pads)
    else:  # how clips end is what actions are about: every frame lies in a window
        rows, stride = with_actions(values, clips, acting), max(1, length // 2)
        tokens = ClipTokens(rows, offsets, length, stride, pad=True)
    if tokens.windows.num_short and acting is None and not pads:
        logger.warning(
            "%d of %d clips are shorter than %d latent frames and are not trained on",
            tokens.windows.num_short, len(clips), model.recipe.layout.frames,
        )  # fmt: skip
    tokens.windows = balanced(tokens.windows, clips, model.recipe.train.balance)
    tokens.windows, prompts = _in_every_wording(model, clips, tokens.windows)
    width = model.recipe.condition.actions
    actions: Any = None
    if width:
        actions = ClipActions(leading_actions(clips, width, tokenizer), tokens.windows)
    condition = model.recipe.condition
    if condition.structure != "none":
        maps: Any = ClipStructure(clip_structure(clips, condition, tokenizer), tokens.windows)
        return ModelStage(model, tokens, prompts, clips.captions, actions, maps)
    distill = model.recipe.distill
    stage = ModelStage if distill is None else DISTILLING[distill.method]
    return stage(model, tokens, prompts, clips.captions, actions)


def _in_every_wording(
    model: GenerativeModel, clips: ClipDataset, windows: ClipWindows
) -> tuple[ClipWindows, Any]:
    """Repeat the windows once per wording of their captions; with one wording they stay."""
    settings = model.recipe.train
    said = wordings(clips.captions, settings.wordings, settings.synonyms)
    ids = torch.cat([model.text_encoder.tokenize(captions) for captions in said])
    count, ways = len(windows), len(said)
    told = windows.take(torch.arange(count).repeat(ways))
    return told, ClipPrompts(ids, told, torch.arange(ways).repeat_interleave(count))
