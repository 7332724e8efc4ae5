"""Measure a motion model on held-out texts: does it show them, does it move like bodies do.

Beside what is drawn stand the real held-out motions of the same texts, the same motions through the
tokenizer, the training motion with the nearest text, shown as it is, one pose of the real motion
held for as long (how far a pose alone gets), and a body that stands still. Everything is judged by
our own text-motion evaluator, named in the result. It knows no model by name.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.errors import DataError, ResourceError
from ..models.generator import GenerativeModel
from ..motion.features import features_to_motion
from ..motion.figure import draw_strip
from .baselines import nearest_captions
from .checkpoint import write_atomic
from .clip_run import held_out_clips
from .clips import ClipDataset
from .embedding_metrics import POOL, multimodality, ratio_interval, with_interval
from .motion_augment import frozen
from .motion_drawing import Motions, drawn_motions, most_frames, recoded_motions
from .motion_metrics import mpjpe, usual_jump, velocity_jumps
from .motion_panel import Panel, Values, frechet_floors, joints_of, mean_bones
from .pictures import sheet_png
from .text_motion import (
    MOST_FRAMES,
    TRAIN_STEPS,
    TextMotionEncoder,
    check_features,
    fingerprint,
    fitted,
    load_text_motion,
    save_text_motion,
    train_text_motion,
)
from .wordings import inflected

logger = logging.getLogger(__name__)
SHOWN, POSES, STRIP_HEIGHT = 6, 8, 192
"""Texts on the sheet, poses of a motion, and their height in pixels."""
VARIANTS = 4
"""Motions drawn per text for multimodality."""
COMPARED = (
    "r_precision_top_1", "r_precision_top_2", "r_precision_top_3", "r_precision_recognised_top_3",
    "recognised", "foot_skating_ratio", "jerk_m_s3",
)  # fmt: skip
"""Metrics whose ratio to real motion is told, with a paired interval."""


@dataclass(frozen=True)
class MotionSettings:
    """How much to measure.

    Attributes:
        num: Held-out motions whose texts are drawn; None = all.
        seed: Seed of all noise, of the choice, and of a freshly trained evaluator.
        steps: Rows per block; None = the recipe's.
        variants: Motions per text for multimodality; below 2 = none.
        frames: Feature frames that real and drawn motions are cut to at the most; None = 196, or
            as many as the model was made for. Figures of models that were cut differently do not
            compare.
        evaluator: Folder of a stored evaluator, made there when missing; None = beside the model.
        evaluator_steps: Training steps of a new evaluator.
        progress: Show bars on stderr.
    """

    num: int | None = None
    seed: int = 0
    steps: int | None = None
    variants: int = VARIANTS
    frames: int | None = None
    evaluator: Path | None = None
    evaluator_steps: int = TRAIN_STEPS
    progress: bool = False


def evaluator_for(
    clips: ClipDataset, folder: Path, settings: MotionSettings, source: str
) -> TextMotionEncoder:
    """Load the evaluator of a data set, or train it on the training clips and store it.

    Args:
        clips: All clips; only "train" is trained on.
        folder: The pipeline's folder; `evaluator-<fingerprint of the clips>` in it is looked for.
        settings: May name another folder, which is used whatever it was trained on.
        source: Name of the data set.

    Raises:
        ModelError: A stored evaluator that cannot be read.
        ResourceError: The folder that was named is none, or cannot be written.
    """
    train = clips.only("train")
    place = settings.evaluator or folder / f"evaluator-{fingerprint(train)}"
    if place.exists() and not place.is_dir():
        raise ResourceError(f"evaluator {place.name} is a file; name a folder, or a new one")
    if (place / "config.json").is_file():
        return load_text_motion(place)
    encoder = train_text_motion(
        train, settings.evaluator_steps, seed=settings.seed, source=source,
        progress=settings.progress,
    )  # fmt: skip
    try:
        save_text_motion(encoder, place)
    except OSError as error:
        if settings.evaluator is not None:
            raise ResourceError(f"cannot write evaluator {place.name}: {error}") from error
        logger.warning("the evaluator is not kept, it is trained anew next time: %s", error)
    return encoder


def evaluate_motions(
    model: GenerativeModel, tokenizer: Any, clips: ClipDataset, folder: Path,
    settings: MotionSettings = MotionSettings(), source: str = "the given clips",
    sheet: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Measure everything a motion model can be measured on.

    Args:
        model: In eval mode.
        tokenizer: Its tokenizer.
        clips: Clips of HumanML3D features with texts, training and held-out ones.
        folder: The pipeline's folder, where an evaluator may be kept.
        settings: How much to measure.
        source: Name of the data set, for the evaluator's name.
        sheet: PNG to write: poses of real motions above those drawn for their texts; None = none.

    Returns:
        JSON-ready: the evaluator; `table`, metric by metric, for `generated`, `real_held_out`,
        `tokenizer_reconstruction`, `nearest_training_text`, `one_real_pose_held` and
        `standing_still`, each with a 95 % interval and n; `generated_over_real` with paired
        intervals; Frechet floors between real sets; multimodality; joint errors of the tokenizer.

    Raises:
        DataError: No held-out clip, or clips of something other than these features.
    """
    check_features([clips.clip(i) for i in range(len(clips))])
    held_out = held_out_clips(clips)
    if held_out is None:
        raise DataError("every clip is in the training split; eval needs others")
    evaluator = evaluator_for(clips, folder, settings, source)
    measured = _Measured(model, tokenizer, clips, held_out, evaluator, settings)
    sets = measured.sets()
    if sheet is not None:
        write_atomic(sheet, measured.sheet(sets))
    return measured.result(sets)


class _Measured:
    """All sets of one evaluation, and what is told about them."""

    def __init__(
        self, model: GenerativeModel, tokenizer: Any, clips: ClipDataset, held_out: ClipDataset,
        evaluator: TextMotionEncoder, settings: MotionSettings,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.evaluator, self.held_out = evaluator, held_out
        limits = (MOST_FRAMES, most_frames(model, tokenizer), settings.frames)
        self.frames = min(limit for limit in limits if limit is not None)
        self.train = clips.only("train")
        self.training = self._cut(self.train)
        index = np.arange(len(held_out))
        if settings.num is not None and settings.num < len(index):
            order = np.random.default_rng(settings.seed).permutation(index)
            index = np.sort(order[: settings.num])
        every = self._cut(held_out)
        self.real = [every[i] for i in index]
        self.texts = [held_out.captions[i] for i in index]
        self.real_joints = joints_of(self.real)
        self.panel = Panel(
            evaluator, self.texts, sorted(set(held_out.captions)), sorted(set(clips.captions)),
            mean_bones(joints_of(self.training)), clips.fps,
        )  # fmt: skip

    def _cut(self, clips: ClipDataset) -> Motions:
        return [clips.clip(i)[: self.frames] for i in range(len(clips))]

    def sets(self) -> dict[str, Motions]:
        """Make one motion per asked text in each of the ways that are compared."""
        lengths = [len(motion) for motion in self.real]
        rng = np.random.default_rng(self.settings.seed)
        found = nearest_captions(self.texts, self.train.captions)
        usual = self._usual_pose()
        told = {"generated": self.texts}
        if self.model.recipe.train.wordings:  # a subject that no wording of training has
            told["generated_in_other_words"] = [
                f"somebody {inflected(text, 'tells')}" for text in self.texts
            ]
        return {
            **{name: self._drawn(texts, lengths, self.settings.seed)
               for name, texts in told.items()},
            "real_held_out": self.real,
            "tokenizer_reconstruction": recoded_motions(self.tokenizer, self.real),
            "nearest_training_text": [
                self.training[int(rng.choice(numbers))] for _, numbers in found
            ],
            "one_real_pose_held": [_held(motion[len(motion) // 2], len(motion))
                                   for motion in self.real],
            "standing_still": [_held(usual, n) for n in lengths],
        }  # fmt: skip

    def _usual_pose(self) -> NDArray[np.float32]:
        """Find the training frame that is nearest to the mean of all: a pose somebody stood in."""
        frames = np.concatenate(self.training)
        mean, std = fitted(self.training)
        far = (frames[:, : len(mean)] - mean.numpy()) / std.numpy()
        return frames[np.square(far).sum(1).argmin()].copy()

    def _drawn(self, texts: list[str], lengths: list[int], seed: int) -> Motions:
        return drawn_motions(
            self.model, self.tokenizer, texts, lengths, seed=seed, steps=self.settings.steps,
            progress=self.settings.progress,
        )  # fmt: skip

    def sheet(self, sets: dict[str, Motions]) -> bytes:
        """Draw poses of some real motions, those generated for the same texts below, as PNG."""
        index = np.linspace(0, len(self.texts) - 1, min(SHOWN, len(self.texts))).round().astype(int)
        shown = [sets[name][i] for i in index for name in ("real_held_out", "generated")]
        strips = [
            np.asarray(draw_strip(features_to_motion(m, fps=self.panel.fps), POSES, STRIP_HEIGHT))
            for m in shown
        ]
        width = max(strip.shape[1] for strip in strips)
        blank = [((0, 0), (0, width - strip.shape[1]), (0, 0)) for strip in strips]
        return sheet_png(
            [np.pad(a, b, constant_values=255) for a, b in zip(strips, blank, strict=True)]
        )

    def result(self, sets: dict[str, Motions]) -> dict[str, Any]:
        """Measure sets and tell."""
        vectors = {name: self.evaluator.embed(motions) for name, motions in sets.items()}
        values = {name: self.panel.values(sets[name], vectors[name]) for name in sets}
        real = vectors["real_held_out"]
        reports = {
            name: self.panel.report(
                values[name], vectors[name], None if name == "real_held_out" else real
            )
            for name in sets
        }
        everything = self.evaluator.embed(self._cut(self.held_out))
        return {
            "evaluator": self._about(),
            "held_out": self._asked(),
            "table": by_metric(reports, self.panel.chance()),
            "generated_over_real": self._ratios(values),
            "trained_texts_only": self._trained_texts(values),
            "frechet_floor_between_real_sets": frechet_floors(
                self.evaluator.embed(self.training), everything, seed=self.settings.seed
            ),
            "multimodality": self._multimodality(),
            "reconstruction": self._reconstruction(sets["tokenizer_reconstruction"]),
            "velocity_jump_m_s": self._jumps(sets),
        }

    def _about(self) -> dict[str, Any]:
        config = self.evaluator.config
        return {
            "name": self.evaluator.name,
            "hash": self.evaluator.weights_hash(),
            "trained_on": config.trained_on,
            "trained_on_these_clips": config.data == fingerprint(self.train),
            "frames": self.frames,
            "interval": "cluster-bootstrap-95 over texts; Frechet: jackknife-95 over texts",
        }

    def _asked(self) -> dict[str, Any]:
        known = set(self.train.captions)
        candidates, vocabulary = self.panel.candidates, self.panel.vocabulary
        return {
            "motions": len(self.held_out),
            "asked": len(self.texts),
            "texts": len(candidates),
            "pool": min(POOL, len(candidates)),
            "pool_of_all_texts": min(POOL, len(vocabulary)),
            "texts_not_trained_on": [text for text in candidates if text not in known],
        }

    def _ratios(self, values: dict[str, Values]) -> dict[str, Any]:
        """Compare generated with real motions, text by text."""
        ours, real = values["generated"], values["real_held_out"]
        result = {}
        for name in COMPARED:
            known = np.isfinite(ours[name]) & np.isfinite(real[name])
            if known.any():
                texts = [text for text, is_known in zip(self.texts, known, strict=True) if is_known]
                result[name] = ratio_interval(ours[name][known], real[name][known], texts)
        return result

    def _trained_texts(self, values: dict[str, Values]) -> dict[str, Any]:
        """R-precision without the texts that neither evaluator nor model was trained on."""
        trained = set(self.train.captions)
        known = np.array([text in trained for text in self.texts])
        if not known.any():
            return {}
        texts = [text for text in self.texts if text in trained]
        names = [name for name in COMPARED if name.startswith("r_precision")]
        return {
            name: {who: with_interval(some[name][known], texts) for who, some in values.items()}
            for name in names
        }

    def _multimodality(self) -> dict[str, Any] | None:
        """Draw several motions per text; beside them real ones that share a text."""
        if self.settings.variants < 2:
            return None
        asked = sorted(set(self.texts))
        lengths = {
            text: int(np.median([len(m) for m, t in zip(self.real, self.texts, strict=True)
                                 if t == text]))
            for text in asked
        }  # fmt: skip
        told = [text for text in asked for _ in range(self.settings.variants)]
        drawn = self._drawn(told, [lengths[text] for text in told], self.settings.seed + 1)
        groups = np.split(self.evaluator.embed(drawn), len(asked))
        seen = self.evaluator.embed(self.training)
        captions = np.array(self.train.captions)
        shared = [text for text in asked if (captions == text).sum() > 1]
        result: dict[str, Any] = {
            "variants_per_text": self.settings.variants,
            "generated": with_interval(multimodality(groups), asked),
        }
        if shared:
            real = multimodality([seen[captions == text] for text in shared])
            result["real_training_motions_of_the_same_texts"] = with_interval(real, shared)
        return result

    def _reconstruction(self, recoded: Motions) -> dict[str, Any]:
        """Joint errors of the tokenizer alone, in millimetres."""
        pairs = list(zip(joints_of(recoded), self.real_joints, strict=True))
        return {
            "mpjpe_mm": with_interval(np.array([mpjpe(a, b) for a, b in pairs]), self.texts),
            "mpjpe_root_aligned_mm": with_interval(
                np.array([mpjpe(a, b, root=0) for a, b in pairs]), self.texts
            ),
        }

    def _jumps(self, sets: dict[str, Motions]) -> dict[str, Any]:
        """95th percentile of velocity jumps: a seam is judged against that of real motion."""
        joints = {name: joints_of(sets[name]) for name in ("generated", "tokenizer_reconstruction")}
        joints["real_held_out"] = self.real_joints
        long = {name: [m for m in some if len(m) > 2] for name, some in joints.items()}
        fps = self.panel.fps
        return {
            name: {
                "quantile_95": usual_jump(some, fps),
                "largest": float(max(velocity_jumps(m, fps).max() for m in some)),
            }
            for name, some in long.items()
            if some
        }


def _held(pose: NDArray[np.float32], frames: int) -> NDArray[np.float32]:
    """Hold a pose for some frames, [frames, features]; nothing turns, goes or moves."""
    return frozen(torch.from_numpy(pose)[None], 0).expand(frames, -1).numpy()


def by_metric(reports: dict[str, dict[str, Any]], chance: dict[str, float]) -> dict[str, Any]:
    """Turn reports of sets into one table per metric, with what chance would reach beside.

    Args:
        reports: For every set its metrics.
        chance: Level of chance of some metrics.
    """
    names = list(dict.fromkeys(name for report in reports.values() for name in report))
    table: dict[str, Any] = {}
    for name in names:
        table[name] = {who: report[name] for who, report in reports.items() if name in report}
        if name in chance:
            table[name]["chance"] = chance[name]
    return table
