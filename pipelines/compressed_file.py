"""The container of a compressed clip: what a reader must know, the coded bits, and two checks.

Layout, least byte first: magic `BLMV`, version (1 byte), length of the description (2 bytes), first
16 bytes of the hash of the model's weights, first 8 bytes of the hash of the codes, the description
(JSON), the coded bits, and the CRC-32 of all that. It knows no models and decodes nothing.
"""

import json
import math
import struct
import zlib
from dataclasses import asdict, dataclass
from typing import Any

from ..core.errors import DataError
from ..core.messages import explain

MAGIC = b"BLMV"
VERSION = 1
SOURCES = ("raw", "counts", "prior", "mixed")
MODEL_BYTES, CODES_BYTES = 16, 8
MAX_FRAMES = 100_000
MAX_FILE_BYTES = 256 * 2**20
_HEAD = struct.Struct(f"<4sBH{MODEL_BYTES}s{CODES_BYTES}s")
_CRC = struct.Struct("<I")


@dataclass(frozen=True)
class CompressedClip:
    """A compressed clip as it lies in a file.

    Attributes:
        frames: Number of frames.
        height: Pixels.
        width: Pixels.
        fps: Frames per second.
        source: Where the probabilities of the coder came from, one of `SOURCES`.
        model: First bytes of the sha256 of the weights.
        codes: First bytes of the sha256 of the codes.
        payload: Coded bits.
    """

    frames: int
    height: int
    width: int
    fps: float
    source: str
    model: bytes
    codes: bytes
    payload: bytes

    def to_bytes(self) -> bytes:
        """Write the container."""
        told = asdict(self)
        for name in ("model", "codes", "payload"):
            del told[name]
        text = json.dumps(told, separators=(",", ":"), allow_nan=False).encode()
        head = _HEAD.pack(MAGIC, VERSION, len(text), self.model, self.codes)
        body = head + text + self.payload
        return body + _CRC.pack(zlib.crc32(body))

    @classmethod
    def from_bytes(cls, content: bytes) -> "CompressedClip":
        """Read a container of unknown origin.

        Args:
            content: All bytes of the file.

        Raises:
            DataError: Another kind of file, another version, damaged, or cut short.
        """
        if content[: len(MAGIC)] != MAGIC:
            raise DataError(explain("not a compressed clip", got=f"{content[:4]!r}",
                                    allowed="a file written by blockloom compress"))  # fmt: skip
        least = _HEAD.size + _CRC.size
        if len(content) < least:
            raise DataError(explain("compressed clip is cut short", got=f"{len(content)} bytes"))
        if content[len(MAGIC)] != VERSION:
            raise DataError(
                explain("version of a compressed clip", got=str(content[len(MAGIC)]),
                        allowed=str(VERSION))
            )  # fmt: skip
        body = content[: -_CRC.size]
        if _CRC.unpack(content[-_CRC.size :])[0] != zlib.crc32(body):
            raise DataError(explain("compressed clip is damaged or cut short",
                                    got="another checksum", hint="a fresh copy"))  # fmt: skip
        _, _, length, model, codes = _HEAD.unpack_from(content)
        try:
            told = json.loads(body[_HEAD.size : _HEAD.size + length])
        except (ValueError, RecursionError) as error:
            raise DataError(explain("description of a compressed clip is not JSON")) from error
        return cls(**_checked(told), model=model, codes=codes,
                   payload=body[_HEAD.size + length :])  # fmt: skip


def _checked(told: Any) -> dict[str, Any]:
    """Refuse descriptions this version does not write.

    Raises:
        DataError: A missing, unknown or illegal entry.
    """
    counts = {"frames": MAX_FRAMES, "height": 2**16, "width": 2**16}
    legal = {*counts, "fps", "source"}
    if not isinstance(told, dict):
        raise DataError(explain("description of a compressed clip is not an object"))
    if set(told) != legal:
        odd = sorted(set(told) ^ legal)[0]
        raise DataError(explain("description of a compressed clip", got=f"{odd} missing or extra"))
    for name, most in counts.items():
        value = told[name]
        if type(value) is not int or not 1 <= value <= most:
            raise DataError(explain(f"{name} of a compressed clip", got=str(value),
                                    allowed=f"1..{most}"))  # fmt: skip
    fps = told["fps"]
    if type(fps) not in (int, float) or not math.isfinite(fps) or not 0.1 <= fps <= 240:
        raise DataError(explain("fps of a compressed clip", got=str(fps), allowed="0.1..240"))
    if told["source"] not in SOURCES:
        raise DataError(explain("source of a compressed clip", got=str(told["source"]),
                                allowed=", ".join(SOURCES)))  # fmt: skip
    return told | {"fps": float(fps)}
