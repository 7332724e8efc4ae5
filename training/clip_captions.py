"""Does a video show what its caption says? Retrieval and parts of captions, split by split.

For every held-out caption a clip is drawn from the words alone. A small text-video encoder of our
own (text_video.py), trained on the data set's training clips, ranks the right caption among all of
the set. The same encoder judges the real held-out clips and the training clip with the nearest
caption, shown as it is; chance stands beside them. A caption's parts are what its commas separate.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor

from ..models.generator import GenerativeModel
from .baselines import nearest_captions
from .clips import ClipDataset
from .dreams import drawn_from_text
from .evaluation import bootstrap_interval, recall_report
from .pictures import chosen_items
from .text_video import NAME, SPAN, TextVideoEncoder, moments, shrunk, train_text_video

RANKS = (1, 5, 10)
TRAIN_STEPS = 700


def can_be_asked(model: GenerativeModel, clips: ClipDataset) -> bool:
    """Tell whether a model draws from captions alone and the training clips have different ones."""
    told = {name for name, split in zip(clips.captions, clips.split, strict=True)
            if split == "train"}  # fmt: skip
    return model.uses_prompt and not model.recipe.condition.actions and len(told) > 1


@torch.no_grad()
def caption_scores(
    model: GenerativeModel, tokenizer: Any, clips: ClipDataset, encoder: TextVideoEncoder,
    split: str, *, num: int | None = None, seed: int = 0, steps: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Score what a model draws for the captions of a split.

    Args:
        model: Draws from captions, in eval mode.
        tokenizer: Its tokenizer.
        clips: All clips; their captions are the candidates.
        encoder: From `judge_of`.
        split: Captions of this split are drawn.
        num: Captions, chosen by the seed; None = all.
        seed: Seed of the noise and the choice.
        steps: Rows per block; None = the recipe's.

    Returns:
        JSON dictionary: for the model, real clips and the nearest-caption baseline `recall_at_k`
        and accuracies of caption parts, with 95 % intervals; chance.
    """
    data: Any = clips
    index = chosen_items(data, split, num, seed)
    captions = [clips.captions[i] for i in index]
    drawn = drawn_from_text(model, tokenizer, captions, SPAN, seed=seed, steps=steps)
    train = np.array([i for i, name in enumerate(clips.split) if name == "train"])
    found = nearest_captions(captions, [clips.captions[i] for i in train])
    candidates = sorted(set(clips.captions))
    words = encoder.read(candidates)
    judge = _Judge(captions, candidates, words)
    return {
        "evaluator": NAME,
        "candidates": len(candidates),
        "frames": SPAN,
        "model": judge.report([seen(encoder, [moments(clip)]) for clip in drawn]),
        "real_clips": judge.report([seen(encoder, _pieces(clips, [i])) for i in index]),
        "nearest_training_caption": judge.report(
            [seen(encoder, _pieces(clips, train[numbers])) for _, numbers in found]
        )
        | {"mean_similarity": round(float(np.mean([score for score, _ in found])), 4)},
        "chance": judge.chance(),
    }


def judge_of(clips: ClipDataset, seed: int = 0, steps: int = TRAIN_STEPS) -> TextVideoEncoder:
    """Train the encoder that judges, on the training clips."""
    return train_text_video(clips.only("train"), steps, seed=seed)


def seen(
    encoder: TextVideoEncoder, pieces: Sequence[UInt8[Tensor, "moments height width 3"]]
) -> Float[Tensor, "pieces dim"]:
    """Turn pieces of clips into vectors."""
    return encoder.see(shrunk(torch.stack(list(pieces))))


def _pieces(clips: ClipDataset, index: Sequence[int] | NDArray[np.int64]) -> list[Tensor]:
    """Take the middle of each clip: neither its start nor its end is favoured."""
    found = []
    for number in index:
        frames = torch.from_numpy(clips.clip(int(number)))
        found.append(moments(frames, max(0, len(frames) - SPAN) // 2))
    return found


def parts_of(caption: str) -> list[str]:
    """Split "a fox, walk, dark background" at its commas."""
    return [part.strip() for part in caption.split(",")]


class _Judge:
    """Ranks the right captions among candidates, for lists of vectors per caption."""

    def __init__(self, captions: list[str], candidates: list[str], words: Tensor) -> None:
        self.captions, self.candidates, self.words = captions, candidates, words
        self.target = np.array([candidates.index(caption) for caption in captions])
        self.parts = [parts_of(caption) for caption in candidates]
        self.num_parts = min(map(len, self.parts))
        # Captions that differ in their last part only, as in two themes, succeed or fail together.
        self.clusters = [", ".join(parts_of(c)[: max(1, self.num_parts - 1)]) for c in captions]

    def report(self, vectors: list[Tensor]) -> dict[str, Any]:
        """Average over a caption's vectors, then over captions."""
        hits: dict[int, list[float]] = {k: [] for k in RANKS}
        right: list[list[float]] = [[] for _ in range(self.num_parts)]
        for target, some in zip(self.target, vectors, strict=True):
            scores = (some @ self.words.T).double().numpy()
            rank = (scores >= scores[:, [target]]).sum(1)
            for k in RANKS:
                hits[k].append(float((rank <= k).mean()))
            best = scores.argmax(1)
            for part, found in enumerate(right):
                wanted = self.parts[target][part]
                found.append(float(np.mean([self.parts[b][part] == wanted for b in best])))
        arrays = {k: np.array(values) for k, values in hits.items()}
        sizes = np.full(len(self.captions), len(self.candidates))
        result = recall_report(arrays, sizes, self.clusters) | {"descriptor": NAME}
        return result | {
            f"part_{number + 1}_right": self._share(np.array(found))
            for number, found in enumerate(right)
        }

    def _share(self, right: NDArray[np.float64]) -> dict[str, Any]:
        low, high = bootstrap_interval(right, self.clusters)
        return {"share": float(right.mean()), "interval": [low, high]}

    def chance(self) -> dict[str, float]:
        """Return what naming any candidate at random would reach."""
        result = {f"recall_at_{k}": min(1.0, k / len(self.candidates)) for k in RANKS}
        for part in range(self.num_parts):
            same = [
                np.mean([other[part] == self.parts[target][part] for other in self.parts])
                for target in self.target
            ]
            result[f"part_{part + 1}_right"] = float(np.mean(same))
        return result
