"""What `blockloom train` does differently for motion: feature frames, and errors in millimetres.

The run itself is in run.py, windows and the model stage are those of videos. It knows no recipe by
name.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.errors import DataError
from ..core.recipe import Recipe
from ..motion.features import HUMAN_SIZE, recover
from ..tokenizers.video_build import build_video_tokenizer
from .clip_run import balanced, held_out_clips
from .clip_stage import PixelWindows, leading_actions
from .clips import ClipDataset, tokenizer_input
from .loop import TrainConfig
from .motion_archive import load_motions
from .motion_metrics import mpjpe
from .motion_mixing import with_mixtures
from .tokenizer_stage import save_half, train_tokenizer

LEAST_FRAMES, MOST_FRAMES = 40, 200
"""Frames of a window whose reconstruction is measured."""


def load_motion_data(recipe: Recipe, data: Path | str, tokenizer: Any) -> ClipDataset:
    """Load motion as feature frames and check it against the recipe.

    Args:
        recipe: A motion recipe.
        data: As `load_motions` reads it.
        tokenizer: The tokenizer of the run.

    Raises:
        DataError: Data that cannot be read, of another number of features, without training clips,
            or whose actions do not fit `condition.actions`.
    """
    clips = load_motions(data, mirror=recipe.train.mirror)
    if clips.num_features != tokenizer.features:
        raise DataError(
            f"frames have {clips.num_features} features and the tokenizer takes "
            f"{tokenizer.features}; set tokenizer.features to {clips.num_features}"
        )
    if recipe.condition.actions:
        leading_actions(clips.only("train"), recipe.condition.actions, tokenizer)
    return clips


def train_motion_tokenizer(
    tokenizer: Any,
    clips: ClipDataset,
    config: TrainConfig,
    folder: Path,
    *,
    init_from: Path | str | None = None,
    resume: bool = False,
    frames: int = 64,
    balance: str = "none",
    mixtures: int = 0,
) -> dict[str, Any]:
    """Prepare a tokenizer on training clips, train it, and store it in `folder/final`.

    Args:
        tokenizer: A `FeatureTokenizer`; changed in place.
        clips: All clips; only "train" is trained on.
        config: Settings of the loop.
        folder: Output folder.
        init_from: Saved tokenizer whose fitting tensors are copied first.
        resume: Go on from the newest checkpoint.
        frames: Frames per window; shorter clips count as far as they go.
        balance: Lets windows of rare kinds come more often, as `train.balance` does.
        mixtures: Motions per clip that are added, mixed from parts of several (motion_mixing.py).

    Returns:
        The report of the loop (of a tokenizer without weights, the number of frames measured), and
        the error of held-out clips where there are any.
    """
    seen = clips.only("train")
    if mixtures:
        seen = with_mixtures(seen, mixtures, torch.Generator().manual_seed(config.seed))
    length = -(-frames // tokenizer.step_frames) * tokenizer.step_frames
    train: Any = PixelWindows(seen, length, max(1, length // 8), pad=True)
    train.windows = balanced(train.windows, seen, balance)
    clips_of = [torch.from_numpy(seen.clip(i))[None] for i in range(len(seen))]
    tokenizer.prepare([tokenizer_input(clip) for clip in clips_of], config.seed)
    if any(parameter.requires_grad for parameter in tokenizer.parameters()):
        report = train_tokenizer(
            tokenizer, train, config, folder, init_from=init_from, resume=resume
        )
        result = vars(report) | {"checkpoint": str(report.checkpoint)}
    else:
        save_half(tokenizer.eval(), folder / "final")
        result = {"measured_frames": len(seen.frames)}
    held_out = held_out_clips(clips)
    if held_out is not None:
        errors = reconstruction_errors(tokenizer, held_out)
        result |= {f"held_out_{name}": value for name, value in errors.items()}
    return result


@torch.no_grad()
def reconstruction_errors(
    tokenizer: Any, clips: ClipDataset, levels: int | None = None
) -> dict[str, float]:
    """Measure how far clips come back from themselves.

    Clips are cut into windows of at most 200 frames from their start on; windows below 40 frames
    are left out where there are longer ones. Means are over frames.

    Args:
        tokenizer: A `FeatureTokenizer` in eval mode.
        clips: Clips of its features.
        levels: First residual levels that are decoded; None = all.

    Returns:
        For the 263 features `mpjpe_mm`, the mean distance of joints in the world, each window
        recovered from the origin, so that errors of turn and way add up over it;
        `mpjpe_root_aligned_mm`, with the roots of every frame laid on each other, as MoMask's
        evaluation has it; for all, `feature_error`, the root mean square of standardised features;
        and the number of `windows` and `frames`.
    """
    windows = _measured_windows(clips, tokenizer.step_frames)
    device = next(iter(tokenizer.state_dict().values())).device
    sums: dict[str, float] = {"feature_error": 0.0}
    count = 0
    for rows in windows:
        given = tokenizer_input(rows[None]).to(device)
        values = tokenizer.encode(given)
        if levels is not None:
            values[:, :, levels:] = -1
        back = tokenizer.decode(values)
        error = (tokenizer.standardise(back) - tokenizer.standardise(given)).square().mean(1)
        sums["feature_error"] += float(error.sum())
        if clips.num_features == HUMAN_SIZE:
            joints, wanted = (recover(part).numpy() for part in (back[0].T.cpu(), rows))
            for name, root in (("mpjpe_mm", None), ("mpjpe_root_aligned_mm", 0)):
                sums[name] = sums.get(name, 0.0) + mpjpe(joints, wanted, root=root) * len(rows)
        count += len(rows)
    result = {name: total / count for name, total in sums.items()}
    result["feature_error"] **= 0.5
    return result | {"windows": len(windows), "frames": count}


def _measured_windows(clips: ClipDataset, step: int) -> list[Tensor]:
    windows = []
    for index in range(len(clips)):
        rows = torch.from_numpy(clips.clip(index))
        for start in range(0, len(rows), MOST_FRAMES):
            part = rows[start : start + MOST_FRAMES]
            windows.append(part[: len(part) // step * step])
    long = [part for part in windows if len(part) >= LEAST_FRAMES]
    kept = long or [part for part in windows if len(part)]
    if not kept:
        raise DataError(f"no clip has {step} frames, as many as the tokenizer takes at once")
    return kept


_TRAINED: dict[str, Any] = {}
"""Tokenizers that learning checks trained in this process: recipes of one kind share theirs."""


def trained_tokenizer(
    recipe: Recipe, clips: ClipDataset, steps: int, seed: int, *, batch_size: int = 16,
    learning_rate: float = 2e-3,
) -> Any:  # fmt: skip
    """Train a recipe's tokenizer as learning checks do, once per process, settings and clips.

    Args:
        recipe: Names the tokenizer.
        clips: Clips of feature frames; only "train" is trained on.
        steps: Optimiser steps.
        seed: Seed of weights and batches.
        batch_size: Windows per step.
        learning_rate: Peak rate.

    Returns:
        The tokenizer in eval mode.
    """
    settings = {k: v for k, v in recipe.tokenizer.items() if k not in ("train", "path")}
    split = "\0".join(clips.split).encode()  # the same clips may be held out or not
    data = hashlib.sha256(clips.frames.tobytes() + clips.offsets.tobytes() + split).hexdigest()
    key = json.dumps([settings, steps, seed, batch_size, learning_rate, data], sort_keys=True)
    if key not in _TRAINED:
        with torch.random.fork_rng(devices=[]), tempfile.TemporaryDirectory() as folder:
            torch.random.default_generator.manual_seed(seed)
            tokenizer: Any = build_video_tokenizer(settings)
            config = TrainConfig(
                num_steps=steps, batch_size=batch_size, seed=seed, learning_rate=learning_rate,
                warmup_steps=10, ema_decay=0.0, precision="fp32", progress=False,
                save_every=10**6,
            )  # fmt: skip
            train_motion_tokenizer(tokenizer, clips, config, Path(folder))
        _TRAINED[key] = tokenizer.eval()
    return _TRAINED[key]
