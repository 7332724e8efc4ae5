"""Clips to bytes and back: a tokenizer's bits, range coded under a model of them.

The codes of a clip are drawn by the one decode loop, by a decoder that does not roll dice: writing,
it takes the codes that are there and notes how likely the model found them; reading, it asks the
range coder which code those probabilities and the file's bytes spell. So both ways run the very
same passes. Long clips run in segments as long as the clips the model was trained on: the first
half of a segment is given (it has been coded already), so memory is constant and no position is
further from the start than in training.

It knows neither the bytes of a container (`compressed_file`) nor how a bit is coded
(`bit_coding`).

Invariants: reading gives the codes that were written or a `DataError`, never others; the model runs
in float64 on the CPU, one clip at a time.
"""

import copy
import hashlib
import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..core.decoder import Draw
from ..core.errors import DataError, ModelError, UsageError, check_one_of, check_range
from ..core.messages import explain
from ..core.schedulers.base import Row
from ..models.generate import Request, start
from ..models.generator import GenerativeModel, ModelDecoder
from ..models.heads import CategoricalHead
from .auto import AutoPipeline
from .bit_coding import BitCoder, BitReader, BitWriter, TokenCoder
from .clip_frames import checked_frames, to_clip, to_frames
from .compressed_file import CODES_BYTES, MAX_FRAMES, MODEL_BYTES, SOURCES, CompressedClip
from .params import model_folder, weights_hash

CHUNK = 16
"""Frames through the tokenizer at a time."""


class CodingDecoder(ModelDecoder):
    """Draws codes by writing or reading them, under the model's own probabilities."""

    def __init__(
        self, model: GenerativeModel, coders: Sequence[TokenCoder], first: int, codes: Tensor
    ) -> None:
        """Bind a model to one segment of some clips.

        Args:
            model: In float64 and eval mode; takes no prompt.
            coders: Write or read, one per clip.
            first: Frame of the clips that slot 0 belongs to.
            codes: int64 [clips, frames, tokens, codebooks] of whole clips; written codes are read
                from it, read ones written into it.
        """
        super().__init__(model, model.unprompted(len(coders)))
        self._coders, self._first, self._codes = coders, first, codes

    def draw(
        self, hidden: Tensor, row: Row, generators: Sequence[torch.Generator], source: Tensor
    ) -> Draw:
        """Code the token of the one slot `source`, for every clip."""
        slot = int(source[0])
        frame, place = self._first + slot // self.cells, slot % self.cells
        scores = cast("CategoricalHead", self.model.head).logits(hidden)[:, 0].numpy()
        known = self._codes[:, frame, place].numpy()
        for item, coder in enumerate(self._coders):
            known[item] = coder.token(place, known[item], scores[item])
        return Draw(self._codes[:, frame, place][:, None].clone(), None)


class VideoCompressor:
    """Compresses clips with a tokenizer of codes and a causal model of them."""

    def __init__(self, tokenizer: Any, model: GenerativeModel, identity: bytes) -> None:
        """Join the parts.

        Args:
            tokenizer: A `VideoTokenizer` of codes.
            model: A model of its codes, drawn token after token, without prompts.
            identity: Hash of both parts' weights, at least 16 bytes: readers refuse a file of
                another model.

        Raises:
            ModelError: Parts that cannot code a clip; the message says what can.
        """
        check_parts(tokenizer, model)
        self.tokenizer = tokenizer.eval()
        # A copy: whoever draws with the same model wants its own number format.
        twin: Any = copy.deepcopy(model)
        # diffusers' own `to` would warn about types it keeps.
        self.model: GenerativeModel = nn.Module.to(twin, "cpu", torch.float64).eval()
        self.identity = identity[:MODEL_BYTES]

    @classmethod
    def from_pretrained(cls, name: str) -> "VideoCompressor":
        """Load a folder that `blockloom train` wrote.

        Args:
            name: Folder of a video model whose tokenizer gives codes.

        Raises:
            ModelError: No such model, or one that cannot code a clip.
        """
        folder = model_folder(name)
        pipe = AutoPipeline.from_pretrained(name)
        if not hasattr(pipe.tokenizer, "temporal_stride"):
            wanted = "a video model whose tokenizer gives codes"
            raise ModelError(explain(f"model {folder.name} makes images", allowed=wanted))
        return cls(pipe.tokenizer, pipe.model, bytes.fromhex(weights_hash(folder)))

    def compress(self, frames: Any, fps: float = 8.0, source: str = "mixed") -> bytes:
        """Turn a clip into the bytes of a file.

        Args:
            frames: uint8 [frames, height, width, 3] of the tokenizer's size, any number of them
                that its steps fill.
            fps: Frames per second, kept for the reader.
            source: Probabilities of the bits: "raw" (one half), "counts" (what came before in this
                clip), "prior" (the model), "mixed" (model and counts, weighed as they prove).

        Returns:
            A container that `decompress` reads.

        Raises:
            UsageError: A clip of another size, or an unknown source.
        """
        frames = checked_frames("frames", frames)
        check_one_of("source", source, SOURCES)
        check_range("fps", fps, 0.1, 240)
        height, width = self.tokenizer.frame_size
        if frames.shape[1:3] != (height, width) or len(frames) > MAX_FRAMES:
            raise UsageError(
                explain("size of the clip", got=f"{len(frames)} frames of {frames.shape[2]}x"
                        f"{frames.shape[1]}", allowed=f"1..{MAX_FRAMES} of {width}x{height}")
            )  # fmt: skip
        codes = self.encode(frames)
        return CompressedClip(
            len(frames), height, width, float(fps), source, self.identity, digest(codes),
            self.write(codes, source).content(),
        ).to_bytes()  # fmt: skip

    def decompress(self, content: bytes) -> tuple[NDArray[np.uint8], float]:
        """Turn the bytes of a file back into a clip.

        Args:
            content: From `compress`.

        Returns:
            uint8 [frames, height, width, 3] as the tokenizer decodes the codes, and frames per
            second.

        Raises:
            DataError: Not such a file, damaged, or read with another result than it was written.
            ModelError: Written with another model.
        """
        clip = CompressedClip.from_bytes(content)
        if clip.model != self.identity:
            raise ModelError(
                explain("the clip was compressed with another model", got=self.identity.hex(),
                        allowed=clip.model.hex(), hint="--model with the folder it was made by")
            )  # fmt: skip
        if (clip.height, clip.width) != tuple(self.tokenizer.frame_size):
            raise DataError(explain("frames of the compressed clip",
                                    got=f"{clip.width}x{clip.height}"))  # fmt: skip
        try:
            latents = self.tokenizer.num_latents(clip.frames)
        except ValueError as error:
            raise DataError(explain(f"frames of the compressed clip: {error}")) from error
        codes = self.read(clip.payload, latents, clip.source)
        if digest(codes) != clip.codes:
            raise DataError(
                explain("the codes came out other than they were written: this machine's "
                        "arithmetic differs", hint="the machine that compressed the clip")
            )  # fmt: skip
        return self.decode(codes), clip.fps

    @torch.no_grad()
    def encode(self, frames: NDArray[np.uint8]) -> Tensor:
        """Turn frames into codes int64 [latents, tokens, codebooks], a chunk at a time."""
        self.tokenizer.num_latents(len(frames))
        state, parts = None, []
        for begin in range(0, len(frames), CHUNK):
            chunk = to_clip(frames[begin : begin + CHUNK]).to(_device(self.tokenizer))
            values, state = self.tokenizer.encode_chunk(chunk, state)
            parts.append(values[0].cpu().long())
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> NDArray[np.uint8]:
        """Turn codes int64 [latents, tokens, codebooks] into frames, a chunk at a time."""
        state, parts = None, []
        for chunk in codes.to(_device(self.tokenizer)).split(CHUNK):
            pixels, state = self.tokenizer.decode_chunk(chunk[None], state)
            parts.append(to_frames(pixels)[0])
        return np.concatenate(parts)

    def write(self, codes: Tensor, source: str = "mixed") -> BitWriter:
        """Code the codes of one clip; the writer holds the bytes and what they ideally cost.

        Args:
            codes: int64 [latents, tokens, codebooks]; not modified.
            source: As in `compress`.
        """
        return self.write_many(codes[None], source)[0]

    def write_many(self, codes: Tensor, source: str = "mixed") -> list[BitWriter]:
        """Code clips of one length side by side, each into bytes of its own.

        Args:
            codes: int64 [clips, latents, tokens, codebooks]; not modified.
            source: As in `compress`.
        """
        writers = [BitWriter() for _ in codes]
        self.run([self.token_coder(writer, source) for writer in writers], codes.clone())
        return writers

    def read(self, payload: bytes, latents: int, source: str) -> Tensor:
        """Read the codes of one clip back.

        Args:
            payload: From `write`.
            latents: Latent frames.
            source: As it was written.

        Returns:
            int64 [latents, tokens, codebooks].

        Raises:
            DataError: Bytes that cannot be read to their end.
        """
        return self.read_many([payload], latents, source)[0]

    def read_many(self, payloads: Sequence[bytes], latents: int, source: str) -> Tensor:
        """Read the codes of clips of one length back.

        Args:
            payloads: One per clip.
            latents: Latent frames.
            source: As they were written.

        Returns:
            int64 [clips, latents, tokens, codebooks].

        Raises:
            DataError: Bytes that cannot be read to their end.
        """
        tokens, books = math.prod(self.tokenizer.grid), self.tokenizer.num_codebooks
        codes = torch.zeros(len(payloads), latents, tokens, books, dtype=torch.long)
        readers = [BitReader(payload) for payload in payloads]
        self.run([self.token_coder(reader, source) for reader in readers], codes)
        if not all(reader.is_done for reader in readers):
            raise DataError(explain("compressed bits go on after the last frame"))
        return codes

    def token_coder(self, coder: BitCoder, source: str) -> TokenCoder:
        """Make what codes the tokens of one clip."""
        bits = int(self.tokenizer.codebook_size).bit_length() - 1
        books = self.tokenizer.num_codebooks
        return TokenCoder(coder, self.tokenizer.grid, books, bits, source)

    @torch.no_grad()
    def run(self, coders: Sequence[TokenCoder], codes: Tensor) -> None:
        """Pass all tokens of some clips through their coders, in place.

        Args:
            coders: One per clip, all of one source.
            codes: int64 [clips, latents, tokens, codebooks]; read where bits are written, written
                where they are read.
        """
        if coders[0].source in ("prior", "mixed"):
            self._run_model(coders, codes)
            return
        for coder, clip in zip(coders, codes.numpy(), strict=True):
            for frame in clip:
                for place, token in enumerate(frame):
                    frame[place] = coder.token(place, token, None)

    def _run_model(self, coders: Sequence[TokenCoder], codes: Tensor) -> None:
        """Code segment after segment, the first half of each but the first given."""
        length = self.model.recipe.layout.frames
        step = length - length // 2
        first, given = 0, 0
        while first + given < codes.shape[1]:
            self._run_segment(coders, codes, first, given)
            first, given = first + step, length - step

    def _run_segment(
        self, coders: Sequence[TokenCoder], codes: Tensor, first: int, given: int
    ) -> None:
        length = self.model.recipe.layout.frames
        clips, _, cells, books = codes.shape
        here = codes[:, first : first + length].flatten(1, 2)
        slots = torch.zeros(clips, length * cells, books, dtype=torch.long)
        slots[:, : given * cells] = here[:, : given * cells]
        is_known = torch.zeros(clips, length * cells, dtype=torch.bool)
        is_known[:, : given * cells] = True
        dice = [torch.Generator() for _ in range(clips)]  # the loop wants some; nobody rolls them
        rollout = start(self.model, Request([""] * clips, dice, values=slots, is_known=is_known))
        rollout.decoder = CodingDecoder(self.model, coders, first, codes)
        for event in rollout.events():
            if event.kind == "commit" and event.block == here.shape[1] - 1:
                break  # the clip ends inside the segment, or with it


def check_parts(tokenizer: Any, model: GenerativeModel) -> None:
    """Refuse a tokenizer and a model that cannot code clips.

    Raises:
        ModelError: With what was found and what can.
    """
    size = int(tokenizer.codebook_size)
    if tokenizer.value != "code" or size < 2 or size & (size - 1):
        raise ModelError(
            explain("compression needs a tokenizer of bits", got=f"{tokenizer.value}s of {size}",
                    allowed="codes of 2, 4, 8, ... values", hint="tokenizer.kind: bsq_transformer")
        )  # fmt: skip
    recipe = model.recipe
    found = {
        "layout.kind": (recipe.layout.kind, "frames"),
        "layout.block": (recipe.layout.block, "token"),
        "layout.shift": (recipe.layout.shift, 1),
        "head.kind": (recipe.head.kind, "categorical"),
        "condition.actions": (recipe.condition.actions, 0),
        "condition.prefix": (recipe.condition.prefix, False),
        "condition.adaln": (recipe.condition.adaln, False),
        "condition.cross": (recipe.condition.cross, False),
    }
    for name, (got, wanted) in found.items():
        if got != wanted:
            raise ModelError(
                explain(f"compression needs {name} = {wanted}", got=str(got),
                        hint="a model trained from configs/bundled/compression.yaml")
            )  # fmt: skip
    if recipe.layout.frames < 2:
        raise ModelError(explain("compression needs layout.frames", got="1", allowed="2 and more"))


def digest(codes: Tensor) -> bytes:
    """Hash codes: the first bytes of the sha256 of their numbers."""
    plain = np.ascontiguousarray(codes.numpy().astype("<u4"))
    return hashlib.sha256(plain.tobytes()).digest()[:CODES_BYTES]


def _device(tokenizer: Any) -> torch.device:
    return next(iter(tokenizer.state_dict().values())).device
