"""`blockloom eval`: measure a model on a data set and write JSON."""

import json
from pathlib import Path

from ..core.errors import UsageError
from ..core.messages import explain
from ..pipelines.media import write_bytes
from ..pipelines.params import model_folder
from . import models, output
from .arguments import Eval
from .train import existing_data


def run(args: Eval) -> int:
    """Measure and write.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    if args.model is None:
        raise UsageError(explain("no model given", hint=models.DEFAULT_MODEL))
    data = existing_data(args.data)
    folder = model_folder(args.model)
    out = None if args.out is None else Path(args.out).expanduser()
    if out is not None:
        if out.suffix.lower() != ".json":
            raise UsageError(explain("--out extension", got=out.suffix, allowed=".json"))
        output.ensure_writable(output.folder(out.parent))
    sheet = None if args.sheet is None else Path(args.sheet).expanduser()
    if sheet is not None:
        if sheet.suffix.lower() != ".png":
            raise UsageError(explain("--sheet extension", got=sheet.suffix, allowed=".png"))
        output.ensure_writable(output.folder(sheet.parent))
    device = models.pick_device(args.device)
    from ..training.run import evaluate

    result = evaluate(
        folder, data, num=args.num, seed=args.seed, device=device, sheet=sheet, steps=args.steps,
        endurance=args.endurance or 0, simulator=args.simulator,
        evaluator=None if args.evaluator is None else Path(args.evaluator).expanduser(),
    )  # fmt: skip
    if out is None:
        output.emit_json(result)
    else:
        write_bytes(out, json.dumps(result, indent=2, allow_nan=False).encode() + b"\n")
        output.say(str(out))
    return 0
