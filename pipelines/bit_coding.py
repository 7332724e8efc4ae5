"""Bits to bytes and back: a range coder fed with probabilities that adapt to the file.

Three sources of a bit's probability are known here: none (one half), counts of what followed the
same surroundings earlier in this file, and a model's distribution over whole codes; the last two
can be mixed. It knows neither networks nor frames as pixels. `constriction` (the extra `compress`)
does the range coding and is imported where it is used.

Invariants: writing and reading call the same functions in the same order, so both see the same
probabilities; probabilities are whole multiples of 2^-16 before the coder sees them; a model's
scores are rounded to a coarse grid first, so that the last bits of a matrix product do not matter.

Sources: range coding (Martin, 1979) as in constriction (arXiv:2201.01741); mixing in the logistic
domain (Mahoney, Adaptive weighing of context models for lossless data compression, 2005).
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..core.errors import DataError, UsageError
from ..core.messages import explain

STEPS = 2**16
"""Probabilities are multiples of 1 / STEPS."""
LEAST = 8
"""No bit is ever more certain than 1 - LEAST / STEPS."""
SCORE_GRID = 64
"""Scores of a model are rounded to multiples of 1 / SCORE_GRID."""
COUNT_LIMIT = 255
"""Counts are halved beyond this sum, so that old surroundings fade."""
NUM_CONTEXTS = 32
MIX_RATE = 0.004


def import_constriction() -> Any:
    """Import the range coder.

    Raises:
        UsageError: It is not installed; the message names the extra that brings it.
    """
    try:
        import constriction
    except ImportError as error:
        raise UsageError(
            explain("compression needs constriction", hint="pip install 'blockloom[compress]'")
        ) from error
    return constriction


class BitCoder(ABC):
    """Takes bits one by one with the probability that each is 1."""

    @abstractmethod
    def code(self, bit: int, steps: int) -> int:
        """Write `bit`, or read one and return it.

        Args:
            bit: What is written; readers ignore it.
            steps: Probability of a 1 in units of 1 / STEPS.
        """


class BitWriter(BitCoder):
    """Collects bits and their probabilities; `content` turns them into bytes."""

    def __init__(self) -> None:
        self._bits: list[int] = []
        self._steps: list[int] = []
        self._constriction = import_constriction()

    def code(self, bit: int, steps: int) -> int:
        """Note a bit."""
        self._bits.append(bit)
        self._steps.append(steps)
        return bit

    @property
    def ideal_bits(self) -> float:
        """Sum of -log2 of the probabilities of the bits that were written."""
        one = np.asarray(self._steps, dtype=np.float64) / STEPS
        bits = np.asarray(self._bits, dtype=bool)
        return float(-np.log2(np.where(bits, one, 1 - one)).sum())

    def content(self) -> bytes:
        """Return the code: whole words of 32 bits, least byte first."""
        stream = self._constriction.stream
        encoder = stream.queue.RangeEncoder()
        if self._bits:
            encoder.encode(
                np.asarray(self._bits, dtype=np.int32),
                stream.model.Bernoulli(perfect=False),
                np.asarray(self._steps, dtype=np.float64) / STEPS,
            )
        return encoder.get_compressed().astype("<u4").tobytes()


class BitReader(BitCoder):
    """Reads what a `BitWriter` wrote."""

    def __init__(self, content: bytes) -> None:
        """Start at the front.

        Args:
            content: From `BitWriter.content`.

        Raises:
            DataError: Not a whole number of words.
        """
        if len(content) % 4:
            raise DataError(explain("compressed bits are cut short", got=f"{len(content)} bytes"))
        stream = import_constriction().stream
        words = np.frombuffer(content, dtype="<u4").astype(np.uint32)
        self._decoder = stream.queue.RangeDecoder(words)
        self._model = stream.model.Bernoulli(perfect=False)

    def code(self, bit: int, steps: int) -> int:
        """Read a bit.

        Raises:
            DataError: The bytes were written with other probabilities.
        """
        try:
            return int(self._decoder.decode(self._model, np.array([steps / STEPS]))[0])
        except (AssertionError, ValueError) as error:
            raise DataError(explain("compressed bits are damaged")) from error

    @property
    def is_done(self) -> bool:
        """Whether everything may have been read; False is certain."""
        return bool(self._decoder.maybe_exhausted())


def to_steps(probability: float) -> int:
    """Round a probability to whole steps, away from certainty."""
    return min(max(round(probability * STEPS), LEAST), STEPS - LEAST)


class AdaptiveCounts:
    """How often a bit was 1 in the same surroundings, earlier in this file."""

    def __init__(self, num_bits: int) -> None:
        """Start without experience: every bit is 1 half of the time.

        Args:
            num_bits: Bits of a token.
        """
        self._ones = [[0.4] * NUM_CONTEXTS for _ in range(num_bits)]
        self._all = [[0.8] * NUM_CONTEXTS for _ in range(num_bits)]

    def probability(self, index: int, context: int) -> float:
        """Return the share of ones so far (Krichevsky-Trofimov, with 0.4 in place of 0.5)."""
        return self._ones[index][context] / self._all[index][context]

    def learn(self, index: int, context: int, bit: int) -> None:
        """Count a bit."""
        ones, total = self._ones[index], self._all[index]
        ones[context] += bit
        total[context] += 1
        if total[context] > COUNT_LIMIT:
            ones[context] /= 2
            total[context] /= 2


class LogisticMixer:
    """Weighs two opinions by how well they did so far, per bit of a token."""

    def __init__(self, num_bits: int) -> None:
        """Start by trusting the first opinion alone.

        Args:
            num_bits: Bits of a token.
        """
        self._weights = [[1.0, 0.0] for _ in range(num_bits)]
        self._inputs = (0.0, 0.0)
        self._mixed = 0.5

    def mix(self, index: int, first: float, second: float) -> float:
        """Return the mixed probability of two, both strictly between 0 and 1."""
        self._inputs = (_stretch(first), _stretch(second))
        weights = self._weights[index]
        score = weights[0] * self._inputs[0] + weights[1] * self._inputs[1]
        self._mixed = _squash(score)
        return self._mixed

    def learn(self, index: int, bit: int) -> None:
        """Move the weights of the mix made last by its error."""
        error = MIX_RATE * (bit - self._mixed)
        weights = self._weights[index]
        weights[0] += error * self._inputs[0]
        weights[1] += error * self._inputs[1]


def _stretch(probability: float) -> float:
    clipped = min(max(probability, 1e-4), 1 - 1e-4)
    return math.log(clipped / (1 - clipped))


def _squash(score: float) -> float:
    return 1 / (1 + math.exp(-min(max(score, -30.0), 30.0)))


def bit_tree(scores: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Turn scores of whole codes into probabilities of their bits, first bit first.

    Args:
        scores: Unnormalised log probabilities [2^bits]; rounded to the grid here.

    Returns:
        Level j has 2^j numbers: the probability that bit j is 1 after every beginning of j bits.
    """
    rounded = np.round(scores * SCORE_GRID) / SCORE_GRID
    mass = np.exp(rounded - rounded.max()) + 1e-9
    levels: list[NDArray[np.float64]] = []
    while len(mass) > 1:
        pairs = mass.reshape(-1, 2)
        mass = pairs[:, 0] + pairs[:, 1]
        levels.append(pairs[:, 1] / mass)
    return levels[::-1]


class TokenCoder:
    """Codes tokens of frames in raster order, bit by bit."""

    def __init__(
        self, coder: BitCoder, grid: tuple[int, int], num_codebooks: int, bits: int, source: str
    ) -> None:
        """Start a file.

        Args:
            coder: Writes or reads.
            grid: Token rows and columns of a frame.
            num_codebooks: Codes per token.
            bits: Bits of a code.
            source: Where probabilities come from: raw, counts, prior or mixed.
        """
        self.coder, self.grid, self.bits, self.source = coder, grid, bits, source
        self._codebooks = num_codebooks
        self._counts = AdaptiveCounts(num_codebooks * bits)
        self._mixer = LogisticMixer(num_codebooks * bits)
        self._before: NDArray[np.int64] | None = None
        self._now = np.zeros((grid[0] * grid[1], num_codebooks), dtype=np.int64)

    def token(
        self, place: int, codes: NDArray[np.int64], scores: NDArray[np.float64] | None
    ) -> NDArray[np.int64]:
        """Write a token's codes, or read them.

        Args:
            place: Raster index; 0 starts a frame.
            codes: What is written [codebooks]; readers ignore it.
            scores: A model's log probabilities [codebooks, 2^bits], for the sources that need one.

        Returns:
            The codes [codebooks].
        """
        around, still = self._neighbours(place)
        found = np.zeros(self._codebooks, dtype=np.int64)
        for book in range(self._codebooks):
            tree = None if scores is None else bit_tree(scores[book])
            value = 0
            for level in range(self.bits):
                shift = self.bits - 1 - level
                context = still
                for neighbour in around:
                    context = 2 * context + ((neighbour[book] >> shift) & 1)
                model = None if tree is None else float(tree[level][value])
                bit = (int(codes[book]) >> shift) & 1
                value = 2 * value + self._bit(book * self.bits + level, context, bit, model)
            found[book] = value
        self._now[place] = found
        if place == len(self._now) - 1:
            self._before, self._now = self._now, np.zeros_like(self._now)
        return found

    def _bit(self, index: int, context: int, bit: int, model: float | None) -> int:
        if self.source == "raw":
            return self.coder.code(bit, STEPS // 2)
        counted = self._counts.probability(index, context)
        if self.source == "counts" or model is None:
            chance = counted
        else:
            chance = model if self.source == "prior" else self._mixer.mix(index, model, counted)
        bit = self.coder.code(bit, to_steps(chance))
        self._counts.learn(index, context, bit)
        if self.source == "mixed":
            self._mixer.learn(index, bit)
        return bit

    def _neighbours(self, place: int) -> tuple[tuple[list[int], ...], int]:
        """Codes one frame before, left and above; and which of the last two stood still."""
        width = self.grid[1]
        zeros = [0] * self._codebooks
        before = zeros if self._before is None else self._before[place].tolist()
        around, still = [before], 0
        for is_there, step in ((place % width > 0, 1), (place >= width, width)):
            codes = self._now[place - step].tolist() if is_there else zeros
            around.append(codes)
            earlier = self._before[place - step].tolist() if self._before is not None else None
            still = 2 * still + int(is_there and codes == earlier)
        return tuple(around), still
