"""How many bits a clip costs here and with VP9, and how well it comes back.

Ours: every held-out clip is written to bytes, read back, and compared code by code before its size
counts. VP9: libvpx through PyAV at its best deadline, several qualities, in 4:2:0 and 4:4:4; the
size of the whole file and of the packets alone. Both are scored against the same frames, as the
mean PSNR of RGB frames.

From the repository's root:
`python benchmarks/compression.py --model runs/bsq/final --data clips.npz --clips 4`.
"""

import argparse
import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from blockloom.pipelines.bit_coding import STEPS, BitCoder, BitWriter, TokenCoder, to_steps
from blockloom.pipelines.compressed_file import MODEL_BYTES, SOURCES, CompressedClip
from blockloom.pipelines.compression import VideoCompressor, digest

QUALITIES = (20, 30, 35, 40, 45, 50, 55, 60, 63)
FPS = 12.5


class Witness(BitCoder):
    """Counts what bits would cost under the model alone, while a coder of a mix writes them."""

    def __init__(self, inner: BitCoder) -> None:
        self.inner = inner
        self.bits = 0.0
        self.model: float | None = None

    def code(self, bit: int, steps: int) -> int:
        """Pass the bit on and add its cost under `model`."""
        if self.model is not None:
            one = to_steps(self.model) / STEPS
            self.bits -= float(np.log2(one if bit else 1 - one))
        return self.inner.code(bit, steps)


class WitnessedCoder(TokenCoder):
    """A coder that tells its witness what the model said."""

    def _bit(self, index: int, context: int, bit: int, model: float | None) -> int:
        witness = self.coder
        if isinstance(witness, Witness):
            witness.model = model
        return super()._bit(index, context, bit, model)


def psnr(decoded: NDArray[np.uint8], clip: NDArray[np.uint8]) -> float:
    """Average the PSNR of RGB frames, in dB."""
    error = (decoded.astype(np.float64) - clip) ** 2
    frames = error.mean(axis=(1, 2, 3)).clip(1e-4)
    return float((10 * np.log10(255**2 / frames)).mean())


def measure_ours(compressor: VideoCompressor, clips: NDArray[np.uint8]) -> dict[str, Any]:
    """Write, read back and score clips.

    Raises:
        RuntimeError: Codes that were read differ from those that were written.
    """
    count, frames, height, width = clips.shape[:4]
    pixels = count * frames * height * width
    codes = torch.stack([compressor.encode(clip) for clip in clips])
    quality = [psnr(compressor.decode(c), clip) for c, clip in zip(codes, clips, strict=True)]
    rows: dict[str, Any] = {}
    for source in SOURCES:
        if source == "prior":
            continue  # witnessed while the mix is coded
        before = time.process_time()
        witnesses = [Witness(BitWriter()) for _ in clips]
        plain = [compressor.token_coder(witness, source) for witness in witnesses]
        coders = [WitnessedCoder(c.coder, c.grid, codes.shape[-1], c.bits, source) for c in plain]
        compressor.run(coders, codes.clone())
        seconds = time.process_time() - before
        payloads = [w.inner.content() for w in witnesses if isinstance(w.inner, BitWriter)]
        read = compressor.read_many(payloads, frames, source)
        if not torch.equal(read, codes):
            raise RuntimeError(f"{source}: codes came back other than they were written")
        files = [
            CompressedClip(frames, height, width, FPS, source, bytes(MODEL_BYTES), digest(c), p)
            for c, p in zip(codes, payloads, strict=True)
        ]
        rows[source] = {
            "file_bpp": 8 * sum(len(file.to_bytes()) for file in files) / pixels,
            "bits_bpp": 8 * sum(map(len, payloads)) / pixels,
            "write_seconds_per_frame": seconds / (count * frames),
        }
        if source == "mixed":
            rows["prior"] = {"ideal_bpp": sum(w.bits for w in witnesses) / pixels}
    return {"psnr_db": float(np.mean(quality)), "sources": rows}


def vp9(clip: NDArray[np.uint8], quality: int, pixel_format: str) -> tuple[int, int, NDArray]:
    """Code a clip; returns bytes of the file, bytes of the packets, and the decoded frames."""
    import av

    file, packets = io.BytesIO(), 0
    with av.open(file, "w", format="webm") as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=25)
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt, stream.thread_count = pixel_format, 1
        stream.options = {"crf": str(quality), "b:v": "0", "deadline": "best", "cpu-used": "0"}
        frames = [av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in clip]
        for frame in [*frames, None]:
            for packet in stream.encode(frame):
                packets += packet.size
                container.mux(packet)
    size = len(file.getvalue())
    file.seek(0)
    with av.open(file) as container:
        shown = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return size, packets, np.stack(shown)


def measure_vp9(clips: NDArray[np.uint8], pixel_format: str) -> list[dict[str, float]]:
    """Score VP9 at every quality, coarsest last."""
    rows = []
    for quality in QUALITIES:
        coded = [vp9(clip, quality, pixel_format) for clip in clips]
        pixels = clips[..., 0].size
        rows.append(
            {
                "crf": quality,
                "file_bpp": 8 * sum(size for size, _, _ in coded) / pixels,
                "bits_bpp": 8 * sum(packets for _, packets, _ in coded) / pixels,
                "psnr_db": float(
                    np.mean([psnr(d, c) for (_, _, d), c in zip(coded, clips, strict=True)])
                ),
            }
        )
    return rows


def nearest(rows: list[dict[str, float]], name: str, value: float) -> dict[str, float]:
    """Find the row whose figure is nearest to a value."""
    return min(rows, key=lambda row: abs(row[name] - value))


def held_out(path: Path, count: int) -> NDArray[np.uint8]:
    """Read the first held-out clips of an .npz with `frames` and `is_test`."""
    with np.load(path) as data:
        index = np.flatnonzero(data["is_test"])[:count]
        return data["frames"][index]


def main(argv: list[str] | None = None) -> None:
    """Measure and write JSON."""
    parser = argparse.ArgumentParser(description="Bits per pixel and PSNR beside VP9")
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--frames", type=int, help="of every clip; all when not given")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    clips = held_out(args.data, args.clips)[:, : args.frames]
    theirs = {kind: measure_vp9(clips, kind) for kind in ("yuv420p", "yuv444p")}
    ours = measure_ours(VideoCompressor.from_pretrained(args.model), clips)
    bits = ours["sources"]["mixed"]["bits_bpp"]
    beside = {
        kind: {
            "near_our_bits": nearest(rows, "bits_bpp", bits),
            "near_our_psnr": nearest(rows, "psnr_db", ours["psnr_db"]),
        }
        for kind, rows in theirs.items()
    }
    report = {
        "data": args.data.name, "clips": list(clips.shape), "threads": args.threads,
        "ours": ours, "vp9": theirs, "vp9_beside": beside,
    }  # fmt: skip
    print(json.dumps({"ours": ours, "vp9_beside": beside}, indent=1), flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
