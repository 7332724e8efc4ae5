"""Fragmented MP4: video bytes that play in a web page while its blocks are still being made.

Every block of frames becomes one fragment (`moof` and `mdat`) that starts with a key frame and can
be shown the moment it arrives. The first bytes also carry the header (`ftyp` and `moov`), which has
no frames and no length. A page appends the bytes to a MediaSource buffer opened with `mime`.

Each block has an encoder and a muxer of its own: a muxer that lives on would hold back the last
frame of a block until the next block begins. What it does not know: models, and who receives.

Invariant: the bytes given out so far are always a complete file.
"""

import struct
from collections.abc import Iterable, Iterator
from io import BytesIO

import numpy as np
from numpy.typing import NDArray

from ..core.errors import UsageError, check_count, check_one_of, check_range
from ..core.messages import explain
from .video_input import import_av
from .video_media import _add_stream, _rate, _sized, _yuv, video_codecs

_OPTIONS = {
    "libx264": {
        "crf": "16",
        "preset": "veryfast",
        "tune": "zerolatency",
        "bf": "0",
        "g": "100000",
        "sc_threshold": "0",
    },
    "libvpx-vp9": {
        "crf": "18",
        "b": "0",
        "deadline": "realtime",
        "cpu-used": "6",
        "lag-in-frames": "0",
        "g": "100000",
    },
}
_ENCODERS = {"h264": "libx264", "vp9": "libvpx-vp9"}


class FragmentedWriter:
    """Turn blocks of frames into the bytes of one fragmented MP4.

    Args:
        fps: Frames per second, 0.1 to 240.
        codec: "h264", "vp9", or None for the first that PyAV has.
        scale: Every pixel becomes a square of this many pixels, 1 to 64.
        pad: Repeat the last row or column of frames of odd size instead of refusing.

    Attributes:
        num_frames: Frames written so far.
        num_fragments: Blocks written so far.
        mime: Type for `MediaSource.isTypeSupported` and `addSourceBuffer`; "" before any block.

    Raises:
        UsageError: A bad setting, or a codec this PyAV lacks.

    Example:
        >>> writer = FragmentedWriter(fps=8, codec="vp9")
        >>> blocks = np.zeros((2, 4, 16, 16, 3), dtype=np.uint8)
        >>> [len(writer.add(block)) > 0 for block in blocks], writer.num_frames
        ([True, True], 8)
    """

    def __init__(
        self, *, fps: float, codec: str | None = None, scale: int = 1, pad: bool = False
    ) -> None:
        check_range("fps", fps, 0.1, 240)
        check_count("scale", scale, 1, 64)
        has_x264 = video_codecs().get("mp4") == "libx264"
        codec = codec or ("h264" if has_x264 else "vp9")
        check_one_of("codec", codec, tuple(_ENCODERS))
        if codec == "h264" and not has_x264:
            raise UsageError(explain("codec h264 is not in this PyAV", hint="codec='vp9'"))
        self._encoder, self._rate = _ENCODERS[codec], _rate(fps)
        self._scale, self._pad = scale, pad
        self._header = b""
        self._size: tuple[int, ...] | None = None
        self.num_frames = 0
        self.num_fragments = 0
        self.mime = ""

    def add(self, block: NDArray[np.uint8]) -> bytes:
        """Encode one block.

        Args:
            block: uint8 [frames, height, width, 3], at least one frame, all blocks of one size.

        Returns:
            The next bytes of the file: one fragment, the first time with the header before it.

        Raises:
            UsageError: No frames, another size, or an odd size without `pad`; nothing is written
                and the next block may follow.
        """
        frames = list(_sized(block, self._scale, even=True, pad=self._pad))
        if self._size not in (None, frames[0].shape):
            shapes = ((frames[0].shape), self._size or ())
            got, allowed = (f"{shape[1]}x{shape[0]}" for shape in shapes)
            raise UsageError(explain("blocks differ in size", got=got, allowed=allowed))
        parts = list(boxes(self._encode(frames)))
        header = b"".join(body for name, body in parts if name in (b"ftyp", b"moov"))
        moof = next(body for name, body in parts if name == b"moof")
        mdat = next(body for name, body in parts if name == b"mdat")
        if self._header and header != self._header:
            raise UsageError(explain("the encoder changed its header between blocks"))
        fragment = _placed(moof, self.num_fragments + 1, self._ticks(self.num_frames)) + mdat
        if not self._header:
            self.mime = mime_type(header)
            fragment = header + fragment
        self._header, self._size = header, frames[0].shape
        self.num_frames += len(frames)
        self.num_fragments += 1
        return fragment

    def stream(self, blocks: Iterable[NDArray[np.uint8]]) -> Iterator[bytes]:
        """Encode blocks one by one as they arrive.

        Args:
            blocks: As in `add`.
        """
        for block in blocks:
            yield self.add(block)

    @property
    def _timescale(self) -> int:
        """Ticks per second: a multiple of the rate's numerator, so that frame times are exact."""
        return self._rate.numerator * max(1, -(-1000 // self._rate.numerator))

    def _ticks(self, frames: int) -> int:
        return int(frames * self._timescale / self._rate)

    def _encode(self, frames: list[NDArray[np.uint8]]) -> bytes:
        av, buffer, rate = import_av(), BytesIO(), self._rate
        options = {
            "movflags": "+frag_keyframe+empty_moov+default_base_moof",
            "fflags": "+bitexact",
            "use_editlist": "0",
            "video_track_timescale": str(self._timescale),
        }
        with av.open(buffer, "w", format="mp4", options=options) as container:
            settings = _OPTIONS[self._encoder]
            stream = _add_stream(container, self._encoder, frames[0].shape, rate, settings)
            for number, frame in enumerate(frames):
                container.mux(stream.encode(_yuv(av, frame, number, rate)))
            container.mux(stream.encode())
        return buffer.getvalue()


def boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Split MP4 bytes into top-level boxes.

    Args:
        content: Whole boxes with 32-bit sizes.

    Yields:
        The four-letter name, and the box with its header.
    """
    place = 0
    while place < len(content):
        size, name = struct.unpack_from(">I4s", content, place)
        yield name, content[place : place + size]
        place += size


def mime_type(header: bytes) -> str:
    """Name the type a browser needs, from the codec's own record in a `moov` box.

    Args:
        header: `ftyp` and `moov` of an H.264 or VP9 file.

    Raises:
        UsageError: Neither of the two.
    """
    place = header.find(b"avcC")
    if place > 0:
        profile, flags, level = header[place + 5 : place + 8]
        return f'video/mp4; codecs="avc1.{profile:02x}{flags:02x}{level:02x}"'
    place = header.find(b"vpcC")
    if place > 0:
        profile, level, depth = header[place + 8 : place + 11]
        return f'video/mp4; codecs="vp09.{profile:02d}.{level:02d}.{depth >> 4:02d}"'
    raise UsageError(explain("video type of these bytes", allowed="H.264 or VP9 in MP4"))


def _placed(moof: bytes, number: int, ticks: int) -> bytes:
    """Set a fragment's running number and the time of its first frame; sizes stay as they are."""
    fragment = bytearray(moof)
    struct.pack_into(">I", fragment, fragment.index(b"mfhd") + 8, number)
    struct.pack_into(">Q", fragment, fragment.index(b"tfdt") + 8, ticks)
    return bytes(fragment)
