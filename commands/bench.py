"""`blockloom bench`: how fast a model draws on this machine, with and without its cache."""

import platform
import statistics
import time
from typing import Any

from ..pipelines.params import ImageParams, package_versions
from . import models, output
from .arguments import Bench


def run(args: Bench) -> int:
    """Load, warm up, time, and print.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    import torch

    choice = models.choose(args.model, None)
    models.check_makes(choice, "image")
    device = models.pick_device(args.device)
    start = time.perf_counter()
    pipe = models.open_model(choice, device)
    load_seconds = time.perf_counter() - start
    pipe.set_progress_bar_config(disable=True)
    group = [
        ImageParams(prompt="red apple", seed=seed, model=choice.name) for seed in range(args.num)
    ]
    result: dict[str, Any] = {
        "model": choice.name,
        "recipe": choice.recipe,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "versions": package_versions(),
        "num_pictures": args.num,
        "repeat": args.repeat,
        "load_seconds": load_seconds,
        "cached_seconds": _median_seconds(pipe, group, args.repeat, use_cache=True),
        "recomputed_seconds": _median_seconds(pipe, group, args.repeat, use_cache=False),
    }
    result["cache_ratio"] = result["recomputed_seconds"] / result["cached_seconds"]
    if args.format == "json":
        output.emit_json(result)
    else:
        output.say(f"{choice.name} on {device}, {result['threads']} threads, {args.num} pictures")
        output.say(f"load        {load_seconds:8.2f} s")
        output.say(f"cached      {result['cached_seconds']:8.2f} s (median of {args.repeat})")
        output.say(f"recomputed  {result['recomputed_seconds']:8.2f} s")
        output.say(f"ratio       {result['cache_ratio']:8.2f}")
    return 0


def _median_seconds(pipe: Any, group: list[ImageParams], repeat: int, *, use_cache: bool) -> float:
    models.draw(pipe, group, use_cache=use_cache)  # the first run fills allocator and kernel caches
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        models.draw(pipe, group, use_cache=use_cache)
        times.append(time.perf_counter() - start)
    return statistics.median(times)
