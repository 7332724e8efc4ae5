"""`blockloom play`: a world, a script of actions, and the video of what happened.

What it does not know: how a script is read (`script`), how files are written (`clips`), or how a
world dreams.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UsageError
from ..core.messages import explain
from ..pipelines.params import VideoParams, canonical_json
from . import clips, models, output
from .arguments import Play
from .script import Step, read_script

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_MODEL = "blockloom/world"
SESSION = ".safetensors"
_NOT_RESUMED = ("frames", "start", "seed", "steps", "guidance_scale")


@dataclass(frozen=True)
class Beginning:
    """What a world starts from: frames at its size, and what led to each; both may be None."""

    frames: "NDArray[np.uint8] | None" = None
    actions: "NDArray[np.float32] | None" = None


def run(args: Play) -> int:
    """Play the script, write the video and the session, and print the paths.

    Args:
        args: Parsed flags.

    Returns:
        Exit code 0.
    """
    if args.actions is None:
        raise UsageError(explain("no --actions given", hint="--actions script.txt (see --help)"))
    place = clips.target(args.out, 1)
    session_out = _session_file(args)
    raw = clips.read_start(args.frames) if args.frames else None
    choice = clips.choose(args.model, args.recipe, DEFAULT_MODEL)
    from ..pipelines.world_files import read_controls

    width = clips.action_numbers(choice)
    controls = read_controls(choice.folder, width)
    steps = read_script(Path(args.actions), width, controls)
    fps = args.fps or (raw[1] if raw else None) or (controls.fps if width else clips.DEFAULT_FPS)
    clips.check_fps(fps, place)
    device = models.pick_device(args.device, args.dtype or "float32")
    for folder in {place.folder, session_out.parent if session_out else place.folder}:
        output.ensure_writable(folder)
    pipe = clips.open_video(choice, device, args.dtype or "float32", world=True)
    clips.check_size(pipe, place, args.scale)
    begin = Beginning() if args.resume else _beginning(args, raw, choice, pipe, width)
    params = _params(args, choice, steps, begin, fps)
    path = place.path(0, params)
    output.refuse_overwriting([(path, params.key(choice.weights_sha256))], overwrite=args.overwrite)
    session = _session(args, pipe, begin, params)
    frames = played(pipe, session, steps, begin.frames)
    report = clips.write(frames, path, params, choice, with_record=not args.no_metadata)
    if session_out is not None:
        report["session"] = str(session.save(session_out))
    clips.announce(args, [report])
    return 0


def _session_file(args: Play) -> Path | None:
    """Check the names of session files, and flags that a resumed session has already."""
    if args.resume is not None:
        for name in _NOT_RESUMED:
            if getattr(args, name) != type(args).__dataclass_fields__[name].default:
                flag = "--" + name.replace("_", "-")
                raise UsageError(
                    explain(f"{flag} beside --resume: the session has it", hint="leave it out")
                )
    if args.session_out is None:
        return None
    path = Path(args.session_out).expanduser()
    if path.suffix.lower() != SESSION:
        hint = path.with_suffix(SESSION).name
        raise UsageError(explain("--session-out", got=path.name, allowed=SESSION, hint=hint))
    path = output.folder(path.parent) / path.name
    if path.exists() and not args.overwrite:
        hint = "--overwrite or another --session-out"
        raise UsageError(explain("session file exists", got=path.name, hint=hint))
    return path


def _beginning(args: Play, raw: Any, choice: models.Choice, pipe: Any, width: int) -> Beginning:
    """Find what the world starts from: the flag's frames, or a start that came with the model.

    Raises:
        UsageError: A steered world without either, or no such start.
        DataError: Too few frames.
    """
    from ..core.recipe import frames_per_block
    from ..pipelines.world_files import read_starts

    if raw is not None:
        per_block = frames_per_block(pipe.model.recipe.layout.block) or 1
        frames = clips.at_model_size(raw[0], pipe)
        return Beginning(clips.usable_start(frames, pipe, per_block))
    starts = read_starts(choice.folder, width, tuple(pipe.tokenizer.frame_size))
    if starts is None:
        if not width:
            return Beginning()
        raise UsageError(
            explain(f"world {choice.name} comes without first frames", hint="--frames start.png")
        )
    if args.start >= len(starts):
        most = len(starts) - 1
        raise UsageError(
            explain("--start", got=str(args.start), allowed=f"0 to {most}", hint=str(most))
        )
    return Beginning(starts.frames[args.start], starts.actions[args.start])


def _params(
    args: Play, choice: models.Choice, steps: list[Step], begin: Beginning, fps: float
) -> VideoParams:
    script = canonical_json([[step.action, step.repeat, step.prompt] for step in steps])
    resumed = None
    if args.resume is not None:
        path = Path(args.resume).expanduser()
        # A file that is not there is refused by whoever opens it.
        resumed = clips.file_digest(path) if path.is_file() else None
    return VideoParams(
        prompt=args.prompt or "", seed=0 if args.resume else output.pick_seed(args.seed),
        model=choice.name, fps=fps, given=0 if begin.frames is None else len(begin.frames),
        input_sha256=None if begin.frames is None else clips.digest(begin.frames),
        actions_sha256=hashlib.sha256(script.encode()).hexdigest(), session_sha256=resumed,
        num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
        dtype=args.dtype or "float32", scale=args.scale,
    )  # fmt: skip


def _session(args: Play, pipe: Any, begin: Beginning, params: VideoParams) -> Any:
    """Start the world, or go on with a saved session."""
    if args.resume is not None:
        session = pipe.resume(Path(args.resume).expanduser())
        if args.prompt is not None:
            session.set_prompt(args.prompt)
        return session
    led = None if begin.actions is None else list(begin.actions)
    return pipe.start(
        begin.frames, prompt=params.prompt, seed=params.seed, actions=led,
        num_inference_steps=args.steps, guidance_scale=args.guidance_scale,
    )  # fmt: skip


def played(
    pipe: Any, session: Any, steps: list[Step], first: "NDArray[np.uint8] | None" = None
) -> "Iterator[NDArray[np.uint8]]":
    """Yield the frames of a played world as they are dreamt, with a bar on a terminal.

    Args:
        pipe: A `WorldPipeline`.
        session: One of its sessions.
        steps: The script.
        first: Frames that are shown before.
    """
    yield from () if first is None else first
    with pipe.progress_bar(total=sum(step.repeat for step in steps)) as bar:
        for step in steps:
            if step.prompt is not None:
                session.set_prompt(step.prompt)
            for _ in range(step.repeat):
                yield from session.step(step.action)
                bar.update()
