"""What dreaming ahead saves a player, as a function of how often actions repeat.

A player is simulated who decides every step: with probability p what was done last goes on. The
time a step keeps the player waiting is measured with and without `session.look_ahead(1)` in the
pauses between; the frames of both sides are compared bit for bit first.

From the repository's root: `python benchmarks/speculation.py --model blockloom/world`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from blockloom.pipelines.world import WorldPipeline, WorldSession


def script(repeat: float, steps: int, width: int, seed: int) -> list[list[float]]:
    """Draw actions that repeat with a probability and are fresh one-hot rows otherwise."""
    rng, actions = np.random.default_rng(seed), [[0.0] * width]
    while len(actions) < steps:
        choices = [row for row in np.eye(width).tolist() if row != actions[-1]]
        fresh = choices[rng.integers(len(choices))]
        actions.append(actions[-1] if rng.random() < repeat else fresh)
    return actions


def play(session: WorldSession, actions: list[list[float]], ahead: int) -> tuple[list, np.ndarray]:
    """Step through a script; returns the seconds every step kept waiting, and the frames."""
    waits, frames = [], []
    for action in actions:
        before = time.perf_counter()
        frames.append(session.step(action))
        waits.append(time.perf_counter() - before)
        if ahead:
            session.look_ahead(ahead)
    return waits, np.concatenate(frames)


def measure(pipe: WorldPipeline, repeat: float, steps: int, seed: int = 0) -> dict[str, float]:
    """Compare waiting with and without one frame of look-ahead.

    Raises:
        RuntimeError: The two sides do not show the same frames.
    """
    actions = script(repeat, steps, pipe.num_actions, seed)
    plain, wanted = play(pipe.start(seed=seed), actions, 0)
    session = pipe.start(seed=seed)
    guessed, got = play(session, actions, 1)
    if not np.array_equal(wanted, got):
        raise RuntimeError("frames with and without look-ahead differ")
    hits, misses = session.guesses
    return {
        "repeat_probability": repeat,
        "hit_share": hits / (hits + misses),
        "mean_wait_ms_plain": 1e3 * statistics.mean(plain),
        "mean_wait_ms_ahead": 1e3 * statistics.mean(guessed),
        "ratio": statistics.mean(plain) / statistics.mean(guessed),
    }


def main(argv: list[str] | None = None) -> None:
    """Measure a few repeat probabilities and write JSON."""
    parser = argparse.ArgumentParser(description="Waiting with and without speculative frames")
    parser.add_argument("--model", default="blockloom/world")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    pipe = WorldPipeline.from_pretrained(args.model)
    rows = [measure(pipe, p, args.steps) for p in (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)]
    for row in rows:
        print({name: round(value, 3) for name, value in row.items()}, flush=True)
    if args.out is not None:
        report = {"threads": args.threads, "steps": args.steps, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
