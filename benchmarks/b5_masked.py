"""B5: a masked picture decoder of eight passes against our own token-by-token decoder.

Same width, depth, tokens and vocabulary. The two are different models; what is checked is that the
masked decoder leaves no slot open and stays inside the vocabulary.
"""

import torch
from b4_autoregressive import ar_model
from common import Row, build_model, draw, in_turns, report_row

PASS_RATIO = 8.0


def run(
    device: torch.device, *, dim: int = 256, layers: int = 6, heads: int = 4, height: int = 16,
    width: int = 16, codes: int = 1024, steps: int = 8, repeats: int = 5,
) -> list[Row]:  # fmt: skip
    """Measure one shape at one picture."""
    sizes = [f"backbone.dim={dim}", f"backbone.layers={layers}", f"backbone.heads={heads}"]
    masked = build_model(
        "image/maskgit", [*sizes, "backbone.mlp_ratio=3", f"schedule.steps={steps}"],
        height, width, codebook_size=codes, device=device,
    )  # fmt: skip
    token = ar_model(device, dim, layers, heads, height, width, codes)
    with torch.inference_mode():
        values = draw(masked)
        if not bool(((values >= 0) & (values < codes)).all()) or not torch.equal(
            values, draw(masked)
        ):
            raise RuntimeError("B5: the masked decoder gave other codes the second time")
        timing = in_turns(lambda: draw(masked), lambda: draw(token), repeats=repeats, device=device)
    shape = {
        "dim": dim, "layers": layers, "heads": heads, "tokens": height * width, "steps": steps,
        "images": 1,
    }  # fmt: skip
    row = report_row(
        "B5", "masked decode", "our own autoregressive decode (B4)", timing,
        shape=shape, pass_line=PASS_RATIO, device=device,
    )  # fmt: skip
    return [row]
