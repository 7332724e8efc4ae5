"""B4: one picture token by token, against our own recompute and against transformers.

The picture is drawn as LlamaGen draws: with guidance, so that two rows go through the model. The
peer is a Llama of the same width, depth, heads, MLP and vocabulary: random weights, greedy, with
transformers' default cache and a batch of two, as many prompt rows and new tokens as ours. The two
models are different functions, so their codes are not compared; ours are compared with our
recompute. The rows without guidance stand beside them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import Row, Timing, build_model, draw, in_turns, report_row, require_equal
from transformers import LlamaConfig, LlamaForCausalLM

from blockloom.core.layout import Layout
from blockloom.core.rollout import Rollout
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start

PASS_RECOMPUTE, PASS_TRANSFORMERS = 8.0, 1.2
GUIDANCE = 2.0


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
) -> Callable[[int], torch.Tensor]:
    """Build a Llama of the same shape; returns a call of transformers' generate for a batch."""
    config = LlamaConfig(
        vocab_size=codes, hidden_size=dim, intermediate_size=3 * dim, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=prompt + new,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peer = LlamaForCausalLM(config).eval().to(device)
    peer.generation_config.eos_token_id = None  # never stop early
    row = torch.arange(1, prompt + 1, device=device)[None] % codes

    def generate(batch: int) -> torch.Tensor:
        ids = row.expand(batch, -1).contiguous()
        mask = torch.ones_like(ids)
        out = peer.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False)
        if out.shape[1] != prompt + new:
            raise RuntimeError(f"the peer stopped after {out.shape[1] - prompt} of {new} tokens")
        return out

    return generate


def _last_step(
    model: torch.nn.Module, values: torch.Tensor, guidance: float, repeats: int,
    device: torch.device,
) -> Timing:  # fmt: skip
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
            use_cache=use_cache, guidance_scale=guidance,
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
    rows = []
    with torch.inference_mode():
        for guidance, suffix in ((GUIDANCE, ""), (1.0, "-unguided")):
            about = shape | {"batch": 1 if guidance == 1.0 else 2}
            ours = partial(draw, model, guidance_scale=guidance)
            slow = partial(draw, model, guidance_scale=guidance, use_cache=False)
            cached = ours()
            require_equal(cached, slow(), "B4")
            twin = in_turns(ours, slow, repeats=max(1, repeats // 2), device=device)
            step = _last_step(model, cached, guidance, repeats, device)
            peer = in_turns(ours, partial(generate, about["batch"]), repeats=repeats, device=device)
            rows += _rows(twin, step, peer, suffix, about, device)
    return rows


def _rows(
    twin: Timing, step: Timing, peer: Timing, suffix: str, shape: dict[str, Any],
    device: torch.device,
) -> list[Row]:  # fmt: skip
    """Three lines of the report; those without guidance have no line to pass."""
    guided = not suffix
    least = (PASS_RECOMPUTE, PASS_RECOMPUTE, PASS_TRANSFORMERS) if guided else (None,) * 3
    ours = "autoregressive decode with the cache"
    told = (
        ("B4-recompute", ours, "our own full recompute", twin),
        ("B4-step", "the last token of a picture with the cache", "our own full recompute", step),
        ("B4-transformers", ours, "transformers generate, DynamicCache, eager", peer),
    )
    return [
        report_row(name + suffix, what, against, timing, shape=shape, pass_line=line, device=device)
        for (name, what, against, timing), line in zip(told, least, strict=True)
    ]
