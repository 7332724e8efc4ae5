"""P5 and B3: block-causal attention by key slices against one call with a boolean mask.

Forward and, for the training layout (a clean and a noisy copy), forward and backward.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from common import Row, in_turns, report_row

from blockloom.core.attention import attend, lower
from blockloom.core.layouts import flat, two_copy
from blockloom.core.masks import MaskTable
from blockloom.core.rules import rule

PASS_RATIO = 1.5
TOLERANCE = 2e-6


def run(
    device: torch.device, *, heads: int = 8, head_dim: int = 64,
    shapes: tuple[tuple[int, int], ...] = ((512, 64), (1024, 64), (2048, 256)),
    training: tuple[int, int] | None = (1024, 64), repeats: int = 15,
) -> list[Row]:  # fmt: skip
    """Measure (length, tokens per block) shapes; `training` runs twice its length (two copies)."""
    table = MaskTable.parse({"C->C": "LE(block)"})
    rows = [_forward(device, table, heads, head_dim, *shape, repeats) for shape in shapes]
    if training is not None:
        rows.append(_training(device, min(heads, 4), head_dim, *training, max(1, repeats // 3)))
    return rows


def _inputs(device: torch.device, heads: int, length: int, head_dim: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (1, heads, length, head_dim)
    return [torch.randn(shape, generator=generator).to(device) for _ in range(3)]


def _require_close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float) -> None:
    error = float((ours - theirs).abs().max())
    if not error <= tolerance:
        raise RuntimeError(f"P5: slices differ from the mask by {error:.1e} > {tolerance:.1e}")


def _forward(
    device: torch.device, table: MaskTable, heads: int, head_dim: int, length: int, block: int,
    repeats: int,
) -> Row:  # fmt: skip
    layout = flat(length, block_size=block).to(device)
    mask = table.visible(layout, layout)
    lowered = lower(table, layout, layout, backend="rectangles")
    query, key, value = _inputs(device, heads, length, head_dim)

    def ours() -> torch.Tensor:
        return attend(query, key, value, lowered)

    def theirs() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    with torch.inference_mode():
        _require_close(ours(), theirs(), TOLERANCE)
        timing = in_turns(ours, theirs, repeats=repeats, device=device)
    count = length // block
    shape = {"heads": heads, "head_dim": head_dim, "length": length, "block": block}
    return report_row(
        f"P5-{length}-{block}", "block-causal attention by slices", "SDPA with a boolean mask",
        timing, shape=shape, pass_line=PASS_RATIO, device=device,
        ideal_ratio=2 * count / (count + 1),
    )  # fmt: skip


def _training(
    device: torch.device, heads: int, head_dim: int, length: int, block: int, repeats: int
) -> Row:
    table = rule("block_diffusion")
    layout = two_copy(flat(length, block_size=block)).to(device)
    mask = table.visible(layout, layout)
    lowered = lower(table, layout, layout, backend="rectangles")
    tensors = [t.requires_grad_() for t in _inputs(device, heads, 2 * length, head_dim)]

    def step(forward: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
        out = forward()
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    def ours() -> list[torch.Tensor]:
        return step(lambda: attend(*tensors, lowered))

    def theirs() -> list[torch.Tensor]:
        return step(lambda: F.scaled_dot_product_attention(*tensors, attn_mask=mask))

    for mine, other in zip(ours(), theirs(), strict=True):
        _require_close(mine.detach(), other.detach(), 1e-4)  # gradients sum over thousands of rows
    timing = in_turns(ours, theirs, repeats=repeats, device=device)
    density = lowered.num_pairs / mask.numel()
    shape = {"heads": heads, "head_dim": head_dim, "length": 2 * length, "block": block}
    return report_row(
        "B3", "training mask by slices, forward and backward", "SDPA with a boolean mask",
        timing, shape=shape, pass_line=PASS_RATIO, device=device,
        density=density, ideal_ratio=1 / density,
    )  # fmt: skip
