"""`blockloom train` and `blockloom eval`: a recipe and data in, a pipeline folder or JSON out.

The output folder of a run holds `tokenizer/` and `model/` (checkpoints and log of each stage) and
`final/`, a folder any pipeline loads. It knows no recipe by name.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.errors import ModelError, UsageError
from ..core.recipe import Recipe
from ..core.sampling import item_generator
from ..models.generate import Request, picture_values, start
from ..models.generator import GenerativeModel
from ..tokenizers.build import build_tokenizer, load_tokenizer
from ..tokenizers.video_build import build_video_tokenizer, load_video_tokenizer
from .acting import evaluate_acting
from .balance import balanced_order
from .clip_evaluation import ClipSettings, evaluate_clips
from .clip_run import clip_model_stage, load_clip_data, train_clip_tokenizer
from .clip_stage import remembered
from .data import ImageDataset, load_images
from .loop import TrainConfig, Trainer
from .motion_archive import load_motions
from .motion_evaluation import MotionSettings, evaluate_motions
from .motion_run import load_motion_data, train_motion_tokenizer
from .objective import ModelStage, stage_summary
from .pictures import evaluate_pictures, held_out_items
from .selfcheck import mask_self_check
from .student import StudentStage
from .tokenizer_stage import mean_psnr, save_half, train_tokenizer

logger = logging.getLogger(__name__)
PIPELINES = {
    "image": "ImagePipeline", "video": "VideoPipeline", "world": "WorldPipeline",
    "motion": "MotionPipeline",
}  # fmt: skip
"""Class that runs a saved model: by modality, and "world" for videos that are steered."""

STAGES = ("tokenizer", "model", "all")
_TOKENIZER_EXTRAS = ("init_from", "frames", "balance", "mixtures")


@dataclass(frozen=True)
class Medium:
    """What differs between pictures, videos and motion in a run.

    Attributes:
        build: Tokenizer settings to an untrained tokenizer.
        load: Folder to a trained tokenizer.
        read: Recipe, data and tokenizer to a data set of its size.
        fit: Trains the tokenizer and stores it in `folder/final`.
        stage: Model, tokenizer, data set and folder of the latent cache to the model stage.
    """

    build: Callable[[dict[str, Any]], nn.Module]
    load: Callable[[Path], nn.Module]
    read: Callable[[Recipe, Path | str, Any], Any]
    fit: Callable[..., dict[str, Any]]
    stage: Callable[[GenerativeModel, Any, Any, Path], ModelStage]


def medium_of(recipe: Recipe) -> Medium:
    """Return what a recipe's modality needs.

    Raises:
        UsageError: A modality that cannot be trained yet.
    """
    media = {
        "image": Medium(
            build_tokenizer, load_tokenizer, lambda recipe, data, tokenizer: load_images(data),
            _fit_picture_tokenizer, _picture_stage,
        ),
        "video": Medium(
            build_video_tokenizer, load_video_tokenizer, load_clip_data,
            train_clip_tokenizer, clip_model_stage,
        ),
        "motion": Medium(
            build_video_tokenizer, load_video_tokenizer, load_motion_data,
            train_motion_tokenizer, clip_model_stage,
        ),
    }  # fmt: skip
    if recipe.modality not in media:
        raise UsageError(
            f"recipe {recipe.name} is of modality {recipe.modality!r}; allowed {', '.join(media)}"
        )
    return media[recipe.modality]


def train_config(recipe: Recipe, steps: int | None, **changes: Any) -> TrainConfig:
    """Translate the recipe's train section into settings of the loop."""
    spec = recipe.train
    settings: dict[str, Any] = {
        "num_steps": steps or spec.steps,
        "batch_size": spec.batch_size,
        "seed": spec.seed,
        "learning_rate": spec.lr,
        "optimizer": spec.optimizer,
        "weight_decay": spec.weight_decay,
        "ema_decay": spec.ema,
        "warmup_steps": spec.warmup,
        "curve": spec.lr_schedule,
        "save_every": spec.save_every,
    }
    if recipe.distill is not None and recipe.distill.lr is not None:
        second = {"late_from": recipe.distill.init_steps, "late_learning_rate": recipe.distill.lr}
        settings |= second
    return TrainConfig(**(settings | changes))


def needs_training(tokenizer: nn.Module) -> bool:
    """Tell whether a tokenizer has weights to learn or features to measure."""
    is_learned = any(p.requires_grad for p in tokenizer.parameters())
    return is_learned or hasattr(tokenizer, "measure_features")


def train(
    recipe: Recipe,
    data: Path | str,
    out: Path | str,
    *,
    stage: str = "all",
    resume: bool = False,
    steps: int | None = None,
    overrides: Sequence[str] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Train the stages of a recipe.

    Args:
        recipe: The recipe.
        data: Folder, .npz or .parquet of captioned images; folder or .npz of clips or of motion.
        out: Folder of the run.
        stage: "tokenizer", "model" (needs a trained tokenizer in `out` or one without weights), or
            "all".
        resume: Go on from the newest checkpoints in `out`.
        steps: Overrides the recipe's number of model steps (or tokenizer steps for that stage).
        overrides: Kept in the record of the run.
        progress: Show bars on stderr.

    Returns:
        Where the pipeline lies and what each stage reported.

    Raises:
        UsageError: unknown stage, or the model stage without a tokenizer.
        DataError: data that cannot be read.
    """
    if stage not in STAGES:
        raise UsageError(f"--stage {stage!r}; allowed {', '.join(STAGES)}; try all")
    out = Path(out)
    medium = medium_of(recipe)
    tokenizer = _tokenizer(recipe, out, medium)
    dataset = medium.read(recipe, data, tokenizer)
    report: dict[str, Any] = {"recipe": recipe.name, "overrides": list(overrides)}
    if stage != "model" and needs_training(tokenizer) and not _tokenizer_done(out):
        report["tokenizer"] = _train_tokenizer(
            recipe,
            tokenizer,
            dataset,
            out,
            resume,
            steps if stage == "tokenizer" else None,
            progress,
            medium,
        )
        tokenizer = medium.load(out / "tokenizer" / "final")
    if stage == "tokenizer":
        return report | {"out": str(out / "tokenizer" / "final")}
    if needs_training(tokenizer) and not _tokenizer_done(out):
        raise UsageError(
            "--stage model needs a trained tokenizer; run --stage tokenizer first, or --stage all"
        )
    report["model"] = _train_model(recipe, tokenizer, dataset, out, resume, steps, progress, medium)
    return report | {"out": str(out / "final")}


def _tokenizer_done(out: Path) -> bool:
    return (out / "tokenizer" / "final" / "config.json").is_file()


def _tokenizer(recipe: Recipe, out: Path, medium: Medium) -> nn.Module:
    if _tokenizer_done(out):
        return medium.load(out / "tokenizer" / "final")
    settings = dict(recipe.tokenizer)
    settings.pop("train", None)
    folder = settings.pop("path", None)
    return medium.load(folder) if folder else medium.build(settings).eval()


def _train_tokenizer(
    recipe: Recipe,
    tokenizer: nn.Module,
    dataset: Any,
    out: Path,
    resume: bool,
    steps: int | None,
    progress: bool,
    medium: Medium,
) -> dict[str, Any]:
    given = dict(recipe.tokenizer.get("train", {}))
    more = {key: given.pop(key) for key in _TOKENIZER_EXTRAS if key in given}
    changes = given | {"progress": progress} | ({"num_steps": steps} if steps else {})
    config = train_config(recipe, steps, **changes)
    return medium.fit(tokenizer, dataset, config, out / "tokenizer", resume=resume, **more)


def _fit_picture_tokenizer(
    tokenizer: nn.Module,
    dataset: ImageDataset,
    config: TrainConfig,
    folder: Path,
    *,
    init_from: Path | str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    report = train_tokenizer(
        tokenizer, dataset.only("train"), config, folder, held_out=held_out_items(dataset),
        init_from=init_from, resume=resume,
    )  # fmt: skip
    return vars(report) | {"checkpoint": str(report.checkpoint)}


def _picture_stage(
    model: GenerativeModel, tokenizer: Any, dataset: ImageDataset, cache: Path
) -> ModelStage:
    items = dataset.only("train")
    values = encoded(tokenizer, items, cache)
    captions, order = items.captions, balanced_order(items.captions, model.recipe.train.balance)
    if order is not None:
        values, captions = values[order], [captions[i] for i in order.tolist()]
    return ModelStage(model, values, model.text_encoder.tokenize(captions), captions)


def _train_model(
    recipe: Recipe,
    tokenizer: nn.Module,
    dataset: Any,
    out: Path,
    resume: bool,
    steps: int | None,
    progress: bool,
    medium: Medium,
) -> dict[str, Any]:
    model = initial_model(recipe, tokenizer, recipe.train.seed)
    if recipe.train.init_from is not None:
        start_from(model, Path(recipe.train.init_from))
    stage = medium.stage(model, tokenizer, dataset, out / "cache")
    if isinstance(stage, StudentStage):
        give_teacher(stage, recipe)
    checked = mask_self_check(stage, torch.Generator().manual_seed(recipe.train.seed))
    logger.info("model stage: %s; mask self-check kept %d rows", stage_summary(stage), checked)
    config = train_config(recipe, steps, progress=progress)
    trainer = Trainer(stage, config, out / "model", resume=resume)
    result = trainer.run()
    with trainer.averaged_weights():
        save_pipeline(out / "final", model, tokenizer)
    return vars(result) | {"checkpoint": str(result.checkpoint)}


def build_model(recipe: Recipe, tokenizer: Any) -> GenerativeModel:
    """Build the untrained model of a recipe for a tokenizer."""
    height, width = tokenizer.grid
    plain = recipe.model_dump(mode="json")
    for machine_detail in ("path", "train"):  # how this run got its tokenizer is not the model's
        plain["tokenizer"].pop(machine_detail, None)
    plain["train"]["init_from"] = None
    if plain["distill"] is not None:
        plain["distill"]["teacher"] = None
    return GenerativeModel(
        recipe=plain,
        height=height,
        width=width,
        num_codebooks=max(tokenizer.num_codebooks, 1),
        codebook_size=tokenizer.codebook_size,
        latent_channels=tokenizer.latent_channels,
    )


def initial_model(recipe: Recipe, tokenizer: Any, seed: int) -> GenerativeModel:
    """Build the untrained model whose weights a seed gives, leaving the global generator alone."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        return build_model(recipe, tokenizer)


def give_teacher(stage: StudentStage, recipe: Recipe) -> None:
    """Load the trained teacher that a recipe names, if it names one.

    Raises:
        UsageError: no teacher, and no step to train one in.
        ModelError: no model in its folder, or one of another shape.
    """
    assert recipe.distill is not None
    if recipe.distill.teacher is not None:
        start_from(stage.teacher.model, Path(recipe.distill.teacher), "distill.teacher")
    elif not recipe.distill.init_steps:
        raise UsageError("distill.init_steps = 0 needs a trained distill.teacher; try 500")


def start_from(model: GenerativeModel, folder: Path, setting: str = "train.init_from") -> None:
    """Copy the weights of a trained pipeline's model.

    Args:
        model: Changed in place.
        folder: The trained pipeline.
        setting: What names the folder, for errors.

    Raises:
        ModelError: no model in the folder, or one of another shape.
    """
    trained, _ = load_pipeline_parts(folder)
    try:
        model.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ModelError(f"{setting} {folder.name} does not fit: {reason}") from error


@torch.no_grad()
def encoded(tokenizer: Any, items: ImageDataset, cache: Path, batch_size: int = 128) -> Tensor:
    """Encode all items once, kept on disk under a hash of images and tokenizer.

    Args:
        tokenizer: In eval mode.
        items: Images to encode.
        cache: Folder of the latent cache; created when missing.
        batch_size: Images at a time.

    Returns:
        Codes [items, cells, codebooks] (int64) or latents [items, cells, channels] (float32).
    """

    def encode() -> Tensor:
        device = next(iter(tokenizer.state_dict().values()), torch.zeros(0)).device
        parts = torch.arange(len(items)).split(batch_size)
        return torch.cat([tokenizer.encode(items.pixels(p).to(device)).cpu() for p in parts])

    return remembered(cache, hashlib.sha256(items.images.tobytes()), tokenizer, encode)


def save_pipeline(folder: Path, model: GenerativeModel, tokenizer: Any) -> None:
    """Write a folder that `AutoPipeline.from_pretrained` loads: fp16 weights, index, recipe."""
    save_half(model, folder / "model")
    save_half(tokenizer, folder / "tokenizer")
    package = __package__.split(".")[0]
    index = {
        "_class_name": PIPELINES[_pipeline_kind(model.recipe)],
        "tokenizer": [type(tokenizer).__module__, type(tokenizer).__name__],
        "model": [f"{package}.models.generator", "GenerativeModel"],
    }
    recipe = json.dumps(model.recipe.model_dump(mode="json"), indent=2)
    for name, text in (("recipe.json", recipe), ("model_index.json", json.dumps(index, indent=2))):
        partial = folder / f"{name}.part"
        partial.write_text(text + "\n")
        os.replace(partial, folder / name)


def _pipeline_kind(recipe: Recipe) -> str:
    is_steered = recipe.condition.actions and recipe.modality == "video"
    return "world" if is_steered else recipe.modality


def load_pipeline_parts(folder: Path) -> tuple[GenerativeModel, Any]:
    """Load the model and the tokenizer of a pipeline folder, in eval mode and float32.

    Raises:
        ModelError: a part is missing or cannot be read.
    """
    try:
        model = GenerativeModel.from_pretrained(folder / "model", use_safetensors=True)
        return model.float().eval(), medium_of(model.recipe).load(folder / "tokenizer")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"cannot load {folder.name}: {str(error).splitlines()[0]}") from error


@torch.no_grad()
def draw(
    model: GenerativeModel, tokenizer: Any, prompts: Sequence[str], seed: int, batch_size: int = 64,
    steps: int | None = None,
) -> Tensor:  # fmt: skip
    """Draw one picture per prompt with the recipe's own settings, but for the number of rows.

    Returns:
        uint8 [prompts, size, size, 3].
    """
    pictures = []
    for first in range(0, len(prompts), batch_size):
        part = list(prompts[first : first + batch_size])
        keys = range(first, first + len(part))
        streams = [item_generator(seed, k) for k in keys]
        rollout = start(model, Request(part, streams, num_steps=steps))
        for _ in rollout.events():
            pass
        pixels = tokenizer.decode(picture_values(model, rollout.values))
        pictures.append(((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).cpu())
    return torch.cat(pictures).permute(0, 2, 3, 1)


def evaluate(
    folder: Path | str,
    data: Path | str,
    *,
    num: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    sheet: Path | None = None,
    steps: int | None = None,
    endurance: int = 0,
    simulator: bool = False,
    evaluator: Path | None = None,
) -> dict[str, Any]:
    """Measure a pipeline on a data set.

    Args:
        folder: Pipeline folder.
        data: Captioned images or clips with splits, as `load_images` and `load_clips` read them.
        num: Pictures drawn per split, None = all; for videos held-out beginnings, None = about 100;
            for motions held-out texts, None = all.
        seed: Seed of everything drawn and of the choice of items.
        device: Where to run.
        sheet: PNG with data set pictures or frames above drawn ones; None = no picture.
        steps: Rows per block; None = the recipe's.
        endurance: Frames of one long rollout of a video model; 0 = none.
        simulator: Let a model that acts play held-out episodes in the real simulator.
        evaluator: Folder of a text-motion evaluator, made when missing; None = beside the model.

    Returns:
        JSON-ready numbers. Pictures: reconstruction PSNR, prompt retrieval per split with its
        baselines. Videos: see `evaluate_clips`; motions: `evaluate_motions`; models that act:
        `evaluate_acting`.

    Raises:
        UsageError: A long rollout or an evaluator for a model it is not for, or a simulator for a
            model that does not act, or none for one that does.
        DataError: Data that does not fit the model.
    """
    folder = Path(folder)
    model, tokenizer = load_pipeline_parts(folder)
    modality = model.recipe.modality
    is_video, made = modality == "video", {"image": "pictures"}.get(modality, f"{modality}s")
    if endurance and not is_video:
        raise UsageError(f"endurance {endurance}: {folder.name} makes {made}; leave it out")
    if evaluator is not None and modality != "motion":
        raise UsageError(f"an evaluator judges motions, {folder.name} makes {made}")
    model, tokenizer = model.to(device), tokenizer.to(device)
    result: dict[str, Any] = {
        "model": folder.name,
        "recipe": model.recipe.name,
        "seed": seed,
        "torch": torch.__version__,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    acts = model.recipe.acting is not None
    if simulator != acts:
        hint = "add --simulator" if acts else "leave --simulator out"
        raise UsageError(f"{folder.name} {'acts' if acts else 'does not act'}; {hint}")
    if acts:
        return result | evaluate_acting(model, tokenizer, data, num=num, seed=seed)
    if modality == "motion":
        how = MotionSettings(num, seed, steps, evaluator=evaluator, progress=True)
        clips, source = load_motions(data), Path(data).name
        return result | evaluate_motions(model, tokenizer, clips, folder, how, source, sheet)
    if is_video:
        clips = load_clip_data(model.recipe, data, tokenizer)
        settings = ClipSettings(num, seed, steps, endurance)
        return result | evaluate_clips(model, tokenizer, clips, folder, settings, sheet)
    dataset = load_images(data)
    held_out = held_out_items(dataset)
    if held_out is not None:
        result["reconstruction_psnr_db"] = mean_psnr(tokenizer, held_out)
    result |= evaluate_pictures(
        dataset,
        lambda prompts: draw(model, tokenizer, prompts, seed, steps=steps).numpy(),
        num=num,
        seed=seed,
        sheet=sheet,
    )
    return result
