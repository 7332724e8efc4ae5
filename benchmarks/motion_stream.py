"""M: motion streamed with the exact cache, beside the loop that the field's reference codes run.

The peer has the same weights and gives the same poses: for every latent frame it sends the whole
prefix through the model, the whole prefix through the decoder, and keeps the last poses. Ours keeps
the model's keys and values, the decoder's look-back and where the body stands. Also: how long the
first poses take, and whether time and memory stay flat over a long motion.

From the repository's root: `python benchmarks/motion_stream.py --out report.json`, or as `motion`
of run.py.
"""

import argparse
import gc
import json
import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))

from common import Row, Timing, as_json, in_turns, report_row

from blockloom.core.recipe import load_recipe
from blockloom.core.sampling import item_generator
from blockloom.models.generate import Request, start
from blockloom.models.video import goes_on
from blockloom.motion.features import features_to_motion
from blockloom.motion.procedural import procedural_motions
from blockloom.pipelines.motion import MotionPipeline
from blockloom.pipelines.motion_input import FPS, features_of
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.endurance import resident_bytes
from blockloom.training.run import initial_model

RATIO_LINE, FIRST_LINE, GROWTH_LINE = 5.0, 150.0, 4.0
TOKEN_BY_TOKEN = ("motion/t2m_gpt", "motion/mogo", "motion/mogo_levels")
"""Recipes whose published code runs the peer's loop; the line is theirs. Others stand beside."""
RECIPES = ("motion/t2m_gpt", "motion/mogo_levels", "motion/block_flow")
PROMPT = "walk"


def build_pipe(recipe: str, overrides: list[str], device: torch.device) -> MotionPipeline:
    """Build an untrained pipeline whose features have the mean and spread of real movement."""
    spec = load_recipe(recipe, overrides)
    described = {key: part for key, part in spec.tokenizer.items() if key != "train"}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer: Any = build_video_tokenizer(described).eval()
    clips = [
        features_of(motion, 40).T.float()
        for motion in procedural_motions(8, torch.Generator().manual_seed(0), frames=41)
    ]
    tokenizer.measure_features([torch.stack(clips)])
    model = initial_model(spec, tokenizer, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():  # where training starts at zero
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    pipe = MotionPipeline(tokenizer, model.eval()).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def streamed(pipe: MotionPipeline, frames: int) -> Iterator[np.ndarray]:
    """Yield the joints of a motion as the pipeline hands them out."""
    for event in pipe.stream(PROMPT, num_frames=frames, generator=item_generator(0, 0)):
        if event.kind == "decoded":
            yield event.data["joints"][0]


@torch.no_grad()
def recomputed(pipe: MotionPipeline, frames: int) -> Iterator[np.ndarray]:
    """Yield the same joints from a loop that remembers nothing but the latent frames."""
    tokenizer, cells = pipe.tokenizer, int(np.prod(pipe.tokenizer.grid))
    request = Request(
        [PROMPT], [item_generator(0, 0)], frames=frames // tokenizer.step_frames, use_cache=False
    )
    rollout, made = start(pipe.model, request), 0
    per_frame = rollout.plan.num_blocks // request.frames if request.frames else 1
    for event in rollout.events():
        if event.kind != "commit" or (event.block + 1) % per_frame:
            continue
        latents = (event.block + 1) // per_frame
        values = rollout.values[:, : latents * cells]
        features = tokenizer.decode(values.unflatten(1, (latents, cells)))[0].T
        joints = features_to_motion(features.double().cpu()).joints
        yield joints[made:]
        made = len(joints)


def first_pose(pipe: MotionPipeline, frames: int) -> tuple[float, float]:
    """Return process and wall milliseconds until the first poses are there."""
    cpu, wall = time.process_time(), time.perf_counter()
    next(streamed(pipe, frames))
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


def long_run(pipe: MotionPipeline, frames: int) -> dict[str, float]:
    """Stream a long motion and return its growth in memory and time after the first sixth."""
    seconds, early, begun = [], 0.0, time.process_time()
    chunks = frames // (pipe.tokenizer.step_frames * pipe.frames_per_block)
    for number, _ in enumerate(streamed(pipe, frames)):
        seconds.append(time.process_time() - begun)
        if number == chunks // 6:
            gc.collect()
            early = (resident_bytes() or 0) / 2**20
        begun = time.process_time()
    gc.collect()
    half = len(seconds) // 2
    return {
        "growth_mib": (resident_bytes() or 0) / 2**20 - early, "chunks": len(seconds),
        "milliseconds_per_chunk": 1e3 * statistics.median(seconds),
        "second_half_over_first": statistics.median(seconds[half:])
        / statistics.median(seconds[chunks // 6 : half]),
    }  # fmt: skip


def run(
    device: torch.device, *, dim: int = 256, layers: int = 6, heads: int = 4, width: int = 256,
    seconds: float = 10.0, long_seconds: float = 60.0, repeats: int = 3,
    recipes: tuple[str, ...] = RECIPES, models: tuple[str, ...] = (),
) -> list[Row]:  # fmt: skip
    """Measure every recipe, untrained at one size, and every stored model."""
    rows = []
    for recipe in recipes:
        sizes = [f"backbone.dim={dim}", f"backbone.layers={layers}", f"backbone.heads={heads}"]
        pipe = build_pipe(recipe, [*sizes, f"tokenizer.width={width}"], device)
        name = f"M-{recipe.removeprefix('motion/')}"
        rows += measure(name, recipe, pipe, device, seconds, long_seconds, repeats)
    for model in models:
        pipe = MotionPipeline.from_pretrained(model).to(device)
        pipe.set_progress_bar_config(disable=True)
        rows += measure(f"M-{model}", model, pipe, device, seconds, long_seconds, repeats)
    return rows


def measure(
    name: str, what: str, pipe: MotionPipeline, device: torch.device, seconds: float,
    long_seconds: float, repeats: int,
) -> list[Row]:  # fmt: skip
    """Measure streaming against recomputing, first poses and a long motion."""
    config = pipe.model.backbone.config
    shape = {"recipe": what, "dim": config.dim, "layers": config.num_layers,
             "width": dict(pipe.tokenizer.config).get("width"), "seconds": seconds}  # fmt: skip
    step = pipe.tokenizer.step_frames * pipe.frames_per_block
    frames, long = (round(s * FPS / step) * step for s in (seconds, long_seconds))
    rows = [_stream_row(pipe, frames, name, shape, device, repeats)]
    latencies = [first_pose(pipe, frames) for _ in range(2 * repeats + 1)]
    cpu, wall = (statistics.median(side) for side in zip(*latencies, strict=True))
    rows.append(_plain_row(f"{name}-first", "milliseconds to the first poses", cpu, FIRST_LINE,
                           device, shape, wall_milliseconds=wall))  # fmt: skip
    if goes_on(pipe.model):
        told = long_run(pipe, long)
        rows.append(_plain_row(f"{name}-flat", "MiB more at the end of a long motion",
                               told["growth_mib"], GROWTH_LINE, device,
                               shape | {"seconds": long_seconds}, **told))  # fmt: skip
    return rows


def _stream_row(
    pipe: MotionPipeline, frames: int, name: str, shape: dict[str, Any], device: torch.device,
    repeats: int,
) -> Row:  # fmt: skip
    ours, theirs = (np.concatenate(list(side(pipe, frames))) for side in (streamed, recomputed))
    # The two sides sum in another order: equal to rounding, not bit for bit.
    error = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
    if not error < 1e-2:
        raise RuntimeError(f"{name}: the two sides disagree by {error} m on {len(ours)} frames")
    line = RATIO_LINE if shape["recipe"] in TOKEN_BY_TOKEN else None
    timing = in_turns(
        lambda: list(streamed(pipe, frames)), lambda: list(recomputed(pipe, frames)),
        repeats=repeats, device=device,
    )  # fmt: skip
    return report_row(
        name, "motion streamed with the cache", "the whole prefix again for every latent frame",
        timing, shape=shape, pass_line=line if device.type == "cpu" else None, device=device,
        largest_difference_m=error, times_real_time=frames / FPS / statistics.median(timing.ours),
    )  # fmt: skip


def _plain_row(
    name: str, what: str, value: float, line: float, device: torch.device, shape: dict[str, Any],
    **notes: Any,
) -> Row:  # fmt: skip
    """A row that is no ratio: the value stands in `notes` and passes at or below its line."""
    flat = Timing([1.0], [1.0], [1.0], [1.0], "process time")
    row = report_row(name, what, "-", flat, shape=shape, pass_line=None, device=device,
                     value=value, line=line, **notes)  # fmt: skip
    row.passed = value <= line
    return row


def main(argv: list[str] | None = None) -> int:
    """Run, print a line per row, write the report; 0 when every row passed."""
    parser = argparse.ArgumentParser(description="Motion streamed beside a loop without a cache")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--models", nargs="*", default=[], help="stored models to measure, too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="transformers")
    rows = run(
        torch.device("cpu"), repeats=args.repeats, recipes=tuple(args.recipes),
        models=tuple(args.models),
    )  # fmt: skip
    for row in rows:
        value = row.notes.get("value", row.ratio)
        verdict = {None: "-", True: "pass", False: "FAIL"}[row.passed]
        print(f"{row.name:24} {value:8.2f}  {verdict}  {row.what} vs {row.peer}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps(as_json(rows, repeats=args.repeats), indent=1) + "\n")
    return 0 if all(row.passed is not False for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
