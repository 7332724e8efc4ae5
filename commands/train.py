"""`blockloom train`: check the flags and hand them to the training package."""

from pathlib import Path

from ..core.errors import DataError, UsageError
from ..core.messages import explain
from . import output
from .arguments import Train


def run(args: Train) -> int:
    """Train the stages asked for.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    if args.recipe is None:
        raise UsageError(explain("no recipe given", hint="blockloom recipes lists them"))
    data = existing_data(args.data)
    if args.out is None:
        raise UsageError(explain("--out is missing", allowed="a folder", hint="--out runs/first"))
    out = output.folder(Path(args.out).expanduser())
    from ..core.recipe import load_recipe

    recipe = load_recipe(args.recipe, list(args.set))
    output.ensure_writable(out)
    from ..training.run import train

    result = train(
        recipe,
        data,
        out,
        stage=args.stage,
        resume=args.resume,
        steps=args.steps,
        overrides=list(args.set),
    )
    if args.format == "json":
        output.emit_json(result)
    else:
        output.say(str(result.get("out", out)))
    return 0


def existing_data(text: str | None) -> Path:
    """Check that --data names something that is there.

    Args:
        text: The flag's text.

    Raises:
        UsageError: The flag is missing.
        DataError: The file or folder does not exist, or has an unknown form.
    """
    if text is None:
        raise UsageError(
            explain("--data is missing", allowed="a folder, .npz or .parquet", hint="--data photos")
        )
    path = Path(text).expanduser()
    if "\0" in text or not path.exists():
        raise DataError(explain("--data does not exist", got=text))
    if not path.is_dir() and path.suffix.lower() not in (".npz", ".parquet"):
        raise DataError(
            explain("--data has an unknown form", got=path.name, allowed="folder, .npz, .parquet")
        )
    return path
