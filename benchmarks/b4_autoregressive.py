"""B4: one picture token by token, against our own recompute and against transformers.

The peer is a Llama of the same width, depth, heads, MLP and vocabulary: random weights, greedy,
with transformers' default cache and as many prompt rows and new tokens as ours. The two models are
different functions, so their codes are not compared; ours are compared with our recompute.
"""

from collections.abc import Callable

import torch
from common import Row, Timing, build_model, draw, in_turns, report_row, require_equal
from transformers import LlamaConfig, LlamaForCausalLM

from blockloom.core.layout import Layout
from blockloom.core.rollout import Rollout
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start

PASS_RECOMPUTE, PASS_TRANSFORMERS = 8.0, 1.2


def ar_model(
    device: torch.device, dim: int, layers: int, heads: int, height: int, width: int, codes: int
) -> torch.nn.Module:
    """Our autoregressive picture model; an MLP of 3 dim, as LlamaGen rounds it at this width."""
    sizes = [f"backbone.dim={dim}", f"backbone.layers={layers}", f"backbone.heads={heads}"]
    return build_model(
        "image/llamagen", [*sizes, "backbone.mlp_ratio=3", "schedule.temperature=0.0"],
        height, width, codebook_size=codes, device=device,
    )  # fmt: skip


def llama(
    device: torch.device, dim: int, layers: int, heads: int, codes: int, prompt: int, new: int
) -> Callable[[], torch.Tensor]:
    """Build a Llama of the same shape; returns a call of transformers' generate."""
    config = LlamaConfig(
        vocab_size=codes, hidden_size=dim, intermediate_size=3 * dim, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=prompt + new,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = LlamaForCausalLM(config).eval().to(device)
    peer.generation_config.eos_token_id = None  # never stop early
    ids = torch.arange(1, prompt + 1, device=device)[None] % codes
    mask = torch.ones_like(ids)

    def generate() -> torch.Tensor:
        out = peer.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        if out.shape[1] != prompt + new:
            raise RuntimeError(f"the peer stopped after {out.shape[1] - prompt} of {new} tokens")
        return out

    return generate


def _last_step(
    model: torch.nn.Module, values: torch.Tensor, repeats: int, device: torch.device
) -> Timing:
    """Time the pass that predicts the last token, with and without the cache.

    Both sides stand on a rollout that is given every token but the last; the cached one commits
    them before the clock starts. The same pass runs again and again: nothing is accepted.
    """
    sides = []
    for use_cache in (True, False):
        known = torch.ones(values.shape[:2], dtype=torch.bool, device=device)
        known[:, -1] = False
        request = Request(
            ["a red apple"], [item_generator(0, 0)], values=values, is_known=known,
            use_cache=use_cache,
        )  # fmt: skip
        rollout = start(model, request)
        last = rollout.plan.num_blocks - 1
        for block in range(last - 1):
            list(rollout.finish(block))
        rollout.predict_rows(last - 1)  # what was pending rides along and is committed
        list(rollout.finish(last - 1))
        length = 0 if rollout.cache is None else int(rollout.cache.written[0])
        sides.append((rollout, list(rollout.pending), list(rollout.context), length))

    def again(side: tuple[Rollout, list[Layout], list[Layout], int]) -> torch.Tensor:
        rollout, pending, context, length = side
        rollout.pending, rollout.context = list(pending), list(context)
        if rollout.cache is not None:
            rollout.cache.rollback(length)
        return rollout.predict_rows(rollout.plan.num_blocks - 1)

    if not torch.allclose(again(sides[0]), again(sides[1]), atol=1e-4):
        raise RuntimeError("B4: the last pass with and without the cache differ by more than 1e-4")
    return in_turns(
        lambda: again(sides[0]), lambda: again(sides[1]), repeats=10 * repeats, device=device
    )


def run(
    device: torch.device, *, dim: int = 256, layers: int = 6, heads: int = 4, height: int = 16,
    width: int = 16, codes: int = 1024, repeats: int = 5,
) -> list[Row]:  # fmt: skip
    """Measure one shape: height x width tokens."""
    model = ar_model(device, dim, layers, heads, height, width, codes)
    prompt = model.backbone.config.num_prompt_rows
    generate = llama(device, dim, layers, heads, codes, prompt, height * width)
    shape = {
        "dim": dim, "layers": layers, "heads": heads, "mlp": 3 * dim, "vocab": codes,
        "tokens": height * width, "prompt": prompt,
    }  # fmt: skip
    with torch.inference_mode():
        cached, recomputed = (draw(model, use_cache=flag) for flag in (True, False))
        require_equal(cached, recomputed, "B4")
        step = _last_step(model, cached, repeats, device)
        peer = in_turns(lambda: draw(model), generate, repeats=repeats, device=device)
        twin = in_turns(
            lambda: draw(model),
            lambda: draw(model, use_cache=False),
            repeats=max(1, repeats // 2),
            device=device,
        )
    return [
        report_row(
            "B4-recompute", "autoregressive decode with the cache", "our own full recompute", twin,
            shape=shape, pass_line=PASS_RECOMPUTE, device=device,
        ),
        report_row(
            "B4-step", "the last token of a picture with the cache", "our own full recompute", step,
            shape=shape, pass_line=PASS_RECOMPUTE, device=device,
        ),
        report_row(
            "B4-transformers", "autoregressive decode with the cache",
            "transformers generate, DynamicCache, eager", peer,
            shape=shape, pass_line=PASS_TRANSFORMERS, device=device,
        ),
    ]  # fmt: skip
