"""Every metric of a set of motions, one number per motion, so that sets can be compared in pairs.

A set has one motion per asked text, in the same order: generated ones, real ones, copies. It knows
no generator and no data set.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..motion.features import recover
from ..motion.skeleton import HUMAN22
from .embedding_metrics import (
    POOL,
    RANKS,
    distances,
    diversity,
    jackknife_interval,
    matched_distances,
    precision_hits,
    with_interval,
)
from .frechet import frechet_of_features
from .motion_drawing import Motions
from .motion_metrics import bone_error, bone_lengths, bone_stretch, foot_skating, jerk
from .text_motion import NOTHING, TextMotionEncoder

Values = dict[str, NDArray[np.float64]]


def joints_of(motions: Sequence[NDArray[np.float32]]) -> list[NDArray[np.float64]]:
    """Turn features into joints [frames, joints, 3] in metres."""
    return [recover(motion).double().numpy() for motion in motions]


def mean_bones(joints: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Average the length of every bone over all frames, in metres."""
    return np.concatenate([bone_lengths(some, HUMAN22.parents) for some in joints]).mean(0)


@dataclass(frozen=True)
class Panel:
    """Measures sets of motions that were asked for by the same texts.

    Attributes:
        encoder: Judges texts and motions.
        texts: What each motion of a set is to show.
        candidates: Different texts that R-precision ranks, the asked ones among them.
        vocabulary: All different texts of the data, for pools of 32 among them.
        bones: Lengths of a real skeleton, in the order of `bone_lengths`.
        fps: Frames per second.
    """

    encoder: TextMotionEncoder
    texts: list[str]
    candidates: list[str]
    vocabulary: list[str]
    bones: NDArray[np.float64]
    fps: float

    def judged(self, vectors: NDArray[np.float64]) -> Values:
        """Measure what the evaluator sees, from vectors [motions, dim].

        Returns:
            `r_precision_top_k` among the candidates, `r_precision_of_all_texts_top_k`,
            `mm_distance`, `recognised` (1 where a motion is nearer to its text than to "nothing",
            which single poses and trembling are near) and `r_precision_recognised_top_3`, the
            share of motions of which both are true.
        """
        values: Values = {}
        for name, texts in (("", self.candidates), ("_of_all_texts", self.vocabulary)):
            words = self.encoder.embed_texts(texts)
            target = np.array([texts.index(text) for text in self.texts])
            for k, hits in precision_hits(vectors, words, target).items():
                values[f"r_precision{name}_top_{k}"] = hits
            if not name:
                values["mm_distance"] = matched_distances(vectors, words, target)
        nothing = distances(vectors, self.encoder.embed_texts([NOTHING]))[:, 0]
        values["recognised"] = (values["mm_distance"] < nothing).astype(np.float64)
        values["r_precision_recognised_top_3"] = values["r_precision_top_3"] * values["recognised"]
        return values

    def moved(self, joints: Sequence[NDArray[np.float64]]) -> Values:
        """Measure how bodies move; NaN where a motion is too short or no foot stands.

        Returns:
            `foot_skating_ratio`, `foot_contact_ratio`, `foot_contact_speed_m_s`, `jerk_m_s3`,
            `bone_length_stretch`, `bone_length_error`.
        """
        rows = [self._moved(some) for some in joints]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def _moved(self, joints: NDArray[np.float64]) -> dict[str, float]:
        feet = foot_skating(joints, self.fps) if len(joints) > 1 else None
        speed = None if feet is None else feet.speed
        return {
            "foot_skating_ratio": np.nan if feet is None else feet.ratio,
            "foot_contact_ratio": np.nan if feet is None else feet.contact_ratio,
            "foot_contact_speed_m_s": np.nan if speed is None else speed,
            "jerk_m_s3": jerk(joints, self.fps) if len(joints) > 3 else np.nan,
            "bone_length_stretch": bone_stretch(joints, HUMAN22.parents),
            "bone_length_error": bone_error(joints, HUMAN22.parents, self.bones),
        }

    def values(self, motions: Motions, vectors: NDArray[np.float64]) -> Values:
        """Measure everything that has one number per motion.

        Args:
            motions: Features, one per text.
            vectors: The same motions as the encoder sees them.
        """
        return self.judged(vectors) | self.moved(joints_of(motions))

    def report(
        self, values: Values, vectors: NDArray[np.float64], real: NDArray[np.float64] | None
    ) -> dict[str, Any]:
        """Summarise a set.

        Args:
            values: From `values`.
            vectors: The set as the encoder sees it.
            real: Vectors of real motions of the same texts, in the same order, for the Frechet
                distance; None = the set is these.

        Returns:
            For every metric `value`, 95 % `interval` with motions of one text resampled together,
            and `n`; None where a metric cannot be had.
        """
        result = {name: self._summary(numbers) for name, numbers in values.items()}
        result["diversity"] = {"value": diversity(vectors), "interval": None, "n": len(vectors)}
        if real is not None:
            result["frechet_distance"] = self._frechet(vectors, real)
        return result

    def _summary(self, numbers: NDArray[np.float64]) -> dict[str, Any] | None:
        known = np.isfinite(numbers)
        if not known.any():
            return None
        texts = [text for text, is_known in zip(self.texts, known, strict=True) if is_known]
        return with_interval(numbers[known], texts)

    def _frechet(
        self, vectors: NDArray[np.float64], real: NDArray[np.float64]
    ) -> dict[str, Any] | None:
        if len(vectors) < 2:
            return None

        def measure(kept: NDArray[np.bool_]) -> float:
            return frechet(real[kept], vectors[kept])

        few = min(np.sum(np.array(self.texts) != text) for text in set(self.texts)) < 2
        interval = None if few else jackknife_interval(measure, self.texts)
        return {
            "value": measure(np.ones(len(vectors), bool)),
            "interval": None if interval is None else list(interval),
            "n": len(vectors),
            "is_rank_deficient": len(vectors) <= vectors.shape[1],
        }

    def chance(self) -> dict[str, float]:
        """Return what R-precision would be for motions that say nothing of their texts."""
        result = {}
        for name, texts in (("", self.candidates), ("_of_all_texts", self.vocabulary)):
            pool = min(POOL, len(texts))
            for k in RANKS:
                result[f"r_precision{name}_top_{k}"] = min(1.0, k / pool)
        return result


def frechet(real: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the Frechet distance between two sets of vectors of the evaluator."""
    return frechet_of_features(real, other, "blockloom text-motion evaluator")["frechet_distance"]


def frechet_floors(
    train: NDArray[np.float64], held_out: NDArray[np.float64], *, splits: int = 20, seed: int = 0
) -> dict[str, Any]:
    """Measure Frechet distances between sets of real motions: what a perfect model would reach.

    A distance between few items is biased upwards, so sets have stated sizes: compare with those of
    the size that was generated.

    Args:
        train: Vectors of training motions [items, dim].
        held_out: Vectors of held-out motions.
        splits: Random splits that are averaged.
        seed: Seed of the splits.

    Returns:
        `train_against_held_out` (as many of each as there are held-out ones, at most), and halves
        of each by themselves: mean, smallest and largest over the splits, items a side. None where
        there are fewer than two items a side.
    """
    rng = np.random.default_rng(seed)

    def spread(first: NDArray[np.float64], second: NDArray[np.float64] | None) -> Any:
        size = min(len(first) // (1 if second is not None else 2),
                   len(held_out) if second is None else len(second))  # fmt: skip
        if size < 2:
            return None
        found = []
        for _ in range(splits):
            order = rng.permutation(len(first))
            if second is None:
                other = first[order[size : 2 * size]]
            elif len(second) > size:
                other = second[rng.permutation(len(second))[:size]]
            else:
                other = second
            found.append(frechet(other, first[order[:size]]))
        return {
            "value": float(np.mean(found)),
            "range": [min(found), max(found)],
            "items_a_side": size,
            "splits": splits,
        }

    return {
        "train_against_held_out": spread(train, held_out),
        "halves_of_train": spread(train, None),
        "halves_of_held_out": spread(held_out, None),
    }
