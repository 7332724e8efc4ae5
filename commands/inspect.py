"""`blockloom inspect`: a recipe's layout, mask, schedule or cache log as numbers or a picture."""

import json
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UsageError
from ..core.messages import explain
from ..pipelines.media import write_bytes
from . import output, pictures
from .arguments import Inspect

if TYPE_CHECKING:
    from ..core.recipe import Recipe

_EXTENSIONS = {
    "mask": (".npy", ".json", ".png"),
    "layout": (".json", ".png"),
    "schedule": (".json", ".png"),
    "cache": (".json", ".png"),
}


def run(args: Inspect) -> int:
    """Compute and write.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    if args.recipe is None:
        raise UsageError(explain("no recipe given", hint="blockloom inspect image/acdit"))
    out = None if args.out is None else Path(args.out).expanduser()
    if out is not None:
        allowed = _EXTENSIONS[args.what]
        if out.suffix.lower() not in allowed:
            raise UsageError(
                explain(
                    f"--out extension for --what {args.what}",
                    got=out.suffix,
                    allowed=", ".join(allowed),
                    hint=allowed[0],
                )
            )
        output.ensure_writable(output.folder(out.parent))
    from ..core.recipe import load_recipe

    recipe = load_recipe(args.recipe, list(args.set))
    rows, mask = _compute(recipe, args)
    if out is None:
        _print(args, rows, mask)
    else:
        for path in _write(out, args.what, rows, mask):
            output.say(str(path))
    return 0


def _compute(recipe: "Recipe", args: Inspect) -> tuple[list[dict[str, Any]], Any]:
    """Return the records of one view, and the matrix when the view is the mask."""
    from ..core import inspection

    if args.what == "layout":
        return inspection.layout_records(recipe, args.length), None
    if args.what == "schedule":
        return inspection.schedule_rows(recipe, args.length, args.seed), None
    if args.what == "cache":
        return inspection.cache_log(recipe, args.length), None
    mask, records = inspection.mask_matrix(recipe, args.length)
    return records, mask


def _print(args: Inspect, rows: list[dict[str, Any]], mask: Any) -> None:
    if args.format == "json":
        output.emit_json({"mask": mask.tolist(), "tokens": rows} if mask is not None else rows)
    elif mask is not None:
        output.say("rows = queries, columns = keys, # = may attend")
        for line in mask:
            output.say("".join("#" if sees else "." for sees in line))
    else:
        for row in rows:
            output.say(json.dumps(row))


def _write(out: Path, what: str, rows: list[dict[str, Any]], mask: Any) -> list[Path]:
    """Write the view; a mask's .npy gets its tokens beside it as .json."""
    kind = out.suffix.lower()
    if kind == ".npy":
        import numpy as np

        buffer = BytesIO()
        np.save(buffer, np.ascontiguousarray(mask, dtype=bool), allow_pickle=False)
        write_bytes(out, buffer.getvalue())
        beside = out.with_suffix(".json")
        write_bytes(beside, _json(rows))
        return [out, beside]
    if kind == ".json":
        content = _json(rows if mask is None else {"mask": mask.tolist(), "tokens": rows})
        write_bytes(out, content)
        return [out]
    buffer = BytesIO()
    pictures.picture(what, rows, mask).save(buffer, format="PNG")
    write_bytes(out, buffer.getvalue())
    return [out]


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, allow_nan=False).encode() + b"\n"
