"""What the motion commands share: where files go, in which formats, what is read and reported.

What it does not know: flags' texts, or how poses are made. Top-level imports are light.

Invariants: a name or format that cannot be written is refused before weights load; every file
stands under its name whole or not at all, the sidecar last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import UsageError
from ..core.messages import explain
from ..pipelines.params import MotionParams, Record, read_record
from . import clips, models, output
from .arguments import MOTION_FORMATS

if TYPE_CHECKING:
    from ..motion.clip import Motion

DEFAULT_MODEL = "blockloom/motion"
DEFAULT_FORMATS = ("mp4", "bvh")
FPS = 20.0


@dataclass(frozen=True)
class Place:
    """Where a motion's files go.

    Attributes:
        target: Folder, or the one file.
        formats: Endings of all files, without dots; the first names the sidecar.
    """

    target: output.Target
    formats: tuple[str, ...]

    def paths(self, index: int, params: MotionParams) -> list[Path]:
        """Name the files of motion `index` of the run."""
        first = self.target.path(index, params)
        return [first.with_suffix(f".{kind}") for kind in self.formats]


def plan(out: str | None, num: int, formats: Sequence[str] | None) -> Place:
    """Decide where motions go and in which formats, and refuse what cannot be written here.

    Args:
        out: `--out`: a file, whose ending is a format, or a folder.
        num: Number of motions.
        formats: `--formats`; None = that of the file, or MP4 to look at and BVH to use.

    Raises:
        UsageError: An unknown ending, a package that is missing, a file for several motions, or a
            file where a folder is needed and the reverse.
    """
    chosen = tuple(formats or ())
    ordered = dict.fromkeys((*(chosen or DEFAULT_FORMATS), *MOTION_FORMATS))
    target = output.plan(out, num, [f".{kind}" for kind in ordered])
    if target.file is not None:
        own = target.file.suffix.lower()[1:]
        chosen = (own, *(kind for kind in chosen if kind != own))
    place = Place(target, chosen or DEFAULT_FORMATS)
    if "glb" in place.formats:
        from ..motion.glb import import_pygltflib

        import_pygltflib()
    if {"mp4", "gif"} & set(place.formats):
        from ..pipelines.video_media import video_codecs

        codecs = video_codecs()
        for kind in place.formats:
            if kind in ("mp4", "gif") and kind not in codecs:
                allowed = ", ".join(sorted({*MOTION_FORMATS} - {"mp4", "gif"} | set(codecs)))
                raise UsageError(explain(f"this PyAV cannot write {kind}", allowed=allowed))
    return place


def earlier_record(path: str | None) -> Record[MotionParams] | None:
    """Read the record of a motion that should be made again.

    Args:
        path: `--params-from`.

    Raises:
        DataError: Not readable, or the record of something else.
    """
    if path is None:
        return None
    from ..pipelines.motion_media import read_motion_metadata

    return read_record(read_motion_metadata(path), MotionParams, Path(path).name)


def digest(motion: "Motion") -> str:
    """Hash a motion's joints, whatever file they came from."""
    return clips.digest(motion.joints)


def make_all(
    args: Any, pipe: Any, choice: models.Choice, place: Place, everything: Sequence[MotionParams],
    given: "Motion | None",
) -> None:  # fmt: skip
    """Make the motions one after another and write each.

    Args:
        args: Flags of `generate` or `edit`.
        pipe: A `MotionPipeline`.
        choice: The model.
        place: Where files go.
        everything: Parameters of each motion.
        given: What `given` frames of the parameters are from.

    Raises:
        UsageError: A file would be lost, or the pipeline refused a setting.
    """
    from ..pipelines.motion_media import save_motion

    pairs = [
        (path, params.key(choice.weights_sha256))
        for k, params in enumerate(everything)
        for path in place.paths(k, params)
    ]
    output.refuse_overwriting(pairs, overwrite=args.overwrite)
    reports = []
    for k, params in enumerate(everything):
        motion = _made(pipe, params, given)
        record, paths = choice.record(params), place.paths(k, params)
        for path in paths:
            clips.sweep(path)
        files = save_motion(motion, paths, None if args.no_metadata else record)
        named = {str(path): files[path.name] for path in paths}
        reports.append({"path": str(paths[0]), "files": named, **record.to_dict()})
        if args.format == "text":
            for path in paths:
                output.say(str(path))
    if args.format == "json":
        output.emit_json(reports)


def _made(pipe: Any, params: MotionParams, given: "Motion | None") -> "Motion":
    from ..core.sampling import item_generator

    settings = clips.number_for(
        {}, num_inference_steps=params.num_inference_steps, guidance_scale=params.guidance_scale,
        temperature=params.temperature, segment_seconds=params.segment_seconds, motion=given,
        span=None if params.span is None else tuple(params.span),
    )  # fmt: skip
    result = pipe(
        params.prompts or params.prompt, num_frames=params.num_frames,
        generator=item_generator(params.seed, 0), **settings,
    )  # fmt: skip
    motion: Motion = result.motions[0]
    return motion
