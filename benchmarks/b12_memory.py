"""B12: bytes of the cache: exact by formula, and the peak of a cache that grows by concatenation.

Both sides take the same keys and values, block after block. The peer keeps one tensor per layer and
concatenates, as `torch.cat` caches do; while it does, the old and the new tensor live together.
"""

import torch
from common import Row, Timing, report_row

from blockloom.core.cache import KVCache
from blockloom.core.layout import Layout

PEAK_LINE = 1.9  # design: a concatenating cache peaks at 1.9 times ours or more
SHAPES = {
    "full": {"blocks": 16, "window": None, "sink": 0},
    "window 9": {"blocks": 64, "window": 9, "sink": 0},
    "sink 3 + 6": {"blocks": 64, "window": 6, "sink": 3},
}
LAYERS, HEADS, HEAD_DIM, TOKENS = 4, 4, 64, 64


def ours(blocks: int, window: int | None, sink: int) -> tuple[int, int]:
    """Fill a cache; returns the bytes it holds and those its formula names."""
    kept = blocks if window is None else window + sink
    sizes = {
        "num_layers": LAYERS, "batch": 1, "capacity": kept * TOKENS, "num_kv_heads": HEADS,
        "head_dim": HEAD_DIM,
    }  # fmt: skip
    cache = KVCache(**sizes, num_axes=1, dtype=torch.float32, device="cpu")
    for block in range(blocks):
        rows = Layout.make(TOKENS, block=block, order=torch.arange(TOKENS) + block * TOKENS)
        if block and window is not None:
            cache.evict(window=window, sink=sink, next_block=block)
        view = cache.view(rows, keep=torch.arange(TOKENS))
        for layer in range(LAYERS):
            part = torch.full((1, HEADS, TOKENS, HEAD_DIM), float(block))
            view.extend(layer, part, part)
        cache.write(view)
        cache.commit()
    held = sum(t.untyped_storage().nbytes() for t in [*cache.keys, *cache.values])
    return held, KVCache.estimate_bytes(**sizes)


def concatenated(blocks: int) -> int:
    """Grow tensors by concatenation; returns the largest number of bytes alive at once."""
    pairs = [[torch.zeros(1, HEADS, 0, HEAD_DIM) for _ in range(2)] for _ in range(LAYERS)]
    peak = 0
    for block in range(blocks):
        for pair in pairs:
            for side in range(2):
                part = torch.full((1, HEADS, TOKENS, HEAD_DIM), float(block))
                grown = torch.cat((pair[side], part), 2)
                alive = [t for p in pairs for t in p] + [grown]
                peak = max(peak, sum(t.untyped_storage().nbytes() for t in alive))
                pair[side] = grown
    return peak


def run(device: torch.device, *, repeats: int = 1) -> list[Row]:
    """Count bytes; nothing here is timed."""
    rows = []
    for name, settings in SHAPES.items():
        held, formula = ours(**settings)
        peer = concatenated(settings["blocks"])
        bytes_of = Timing([held], [peer], [held], [peer], "bytes, not seconds")
        row = report_row(
            f"B12 {name}", "bytes of the cache", "peak of a concatenating cache", bytes_of,
            shape=settings | {"tokens_per_block": TOKENS, "layers": LAYERS},
            pass_line=None if settings["window"] is None else PEAK_LINE, device=device,
            formula_bytes=formula, exact=held == formula,
        )  # fmt: skip
        row.passed = (row.passed is not False) and held == formula
        rows.append(row)
    return rows
