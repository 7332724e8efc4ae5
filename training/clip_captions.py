"""Does a video show what its caption says? Retrieval and parts of captions, split by split.

For every held-out caption a clip is drawn from the words alone. A small text-video encoder of our
own (text_video.py), trained on the data set's training clips, ranks the right caption among those
of the split, which it never saw, and names each part of the caption (what its commas separate)
among all of the set. The same encoder judges the real held-out clips and the training clip with the
nearest caption, shown as it is; chance stands beside them.
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
from .text_video import (
    NAME,
    SPAN,
    TextVideoEncoder,
    moments,
    parts_of,
    shrunk,
    train_text_video,
)

RANKS = (1, 5, 10)
TRAIN_STEPS = 400


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
        clips: All clips; the captions of the split are the candidates.
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
    candidates = sorted({c for c, s in zip(clips.captions, clips.split, strict=True) if s == split})
    judge = Judge(encoder, captions, candidates, clips.captions)
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
) -> Float[Tensor, "pieces parts dim"]:
    """Turn pieces of clips into vectors."""
    return encoder.see(shrunk(torch.stack(list(pieces))))


def _pieces(clips: ClipDataset, index: Sequence[int] | NDArray[np.int64]) -> list[Tensor]:
    """Take the middle of each clip: neither its start nor its end is favoured."""
    found = []
    for number in index:
        frames = torch.from_numpy(clips.clip(int(number)))
        found.append(moments(frames, max(0, len(frames) - SPAN) // 2))
    return found


class Judge:
    """Ranks captions and names their parts, for vectors of clips that belong to captions."""

    def __init__(
        self, encoder: TextVideoEncoder, captions: list[str], candidates: list[str],
        vocabulary: Sequence[str],
    ) -> None:  # fmt: skip
        """Read all texts once.

        Args:
            encoder: Reads and has seen the clips.
            captions: The right ones, all among the candidates.
            candidates: Captions that are ranked.
            vocabulary: Captions whose parts may be named.
        """
        self.captions, self.candidates = captions, candidates
        count = encoder.num_parts
        self.words = encoder.read_captions(candidates)
        self.target = np.array([candidates.index(caption) for caption in captions])
        told = [parts_of(caption, count) for caption in captions]
        known = [parts_of(caption, count) for caption in vocabulary]
        self.wanted = [[parts[p] for parts in told] for p in range(count)]
        self.texts = [sorted({parts[p] for parts in known}) for p in range(count)]
        self.vectors = [encoder.read(texts) for texts in self.texts]
        # Captions that differ in their last part only, as in two themes, succeed or fail together.
        self.clusters = [", ".join(parts[: max(1, count - 1)]) for parts in told]

    def report(self, vectors: Sequence[Float[Tensor, "pieces parts dim"]]) -> dict[str, Any]:
        """Average over a caption's pieces, then over captions.

        Args:
            vectors: For every caption the pieces that are to show it, at least one.
        """
        hits: dict[int, list[float]] = {k: [] for k in RANKS}
        right: list[list[float]] = [[] for _ in self.texts]
        for number, some in enumerate(vectors):
            scores = torch.einsum("npd,cpd->nc", some, self.words).double().numpy()
            rank = (scores >= scores[:, [self.target[number]]]).sum(1)
            for k in RANKS:
                hits[k].append(float((rank <= k).mean()))
            for part, texts in enumerate(self.texts):
                named = (some[:, part] @ self.vectors[part].T).argmax(1).tolist()
                wanted = self.wanted[part][number]
                right[part].append(float(np.mean([texts[i] == wanted for i in named])))
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
        """Return what naming any caption, or any text of a part, at random would reach."""
        result = {f"recall_at_{k}": min(1.0, k / len(self.candidates)) for k in RANKS}
        return result | {
            f"part_{number + 1}_right": 1 / len(texts) for number, texts in enumerate(self.texts)
        }
