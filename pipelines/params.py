"""The record of one generated file: its parameters, what made it, and how to make it again.

What it does not know: how a picture is drawn or which file format holds the record. It imports
no torch, so that flags and batch files are checked before anything heavy loads.

Invariants: a record is plain JSON, holds no time stamps and no paths of the machine, and equal
parameters always give the same key on every machine.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata as package_metadata
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from ..core.errors import DataError, ModelError, nearest
from ..core.messages import explain
from .guard import check_folder

FORMAT = 1
_VERSIONED = ("torch", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Params:
    """What decides one output, whatever kind it is.

    Attributes:
        prompt: Text as the user wrote it, without the style words.
        seed: Seed of this output, 0 <= seed < 2**64.
        model: Model name or folder name (never an absolute path).
    """

    kind: ClassVar[str] = ""

    prompt: str
    seed: int
    model: str

    def to_dict(self) -> dict[str, Any]:
        """Return the parameters as plain JSON values, every field present."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Self:
        """Read parameters back, refusing unknown keys and wrong types.

        Args:
            record: Output of `to_dict`, or the same after a trip through JSON.

        Raises:
            DataError: Unknown or missing key, or a value of the wrong type.
        """
        names = [f.name for f in fields(cls)]
        for key in record:
            if key not in names:
                close = nearest(str(key), names)
                raise DataError(
                    explain(
                        "unknown parameter",
                        got=str(key),
                        allowed=", ".join(names),
                        hint=close,
                    ),
                )
        for f in fields(cls):
            _check_type(f.name, record.get(f.name), required=f.name in ("prompt", "seed", "model"))
        return cls(**record)

    def key(self, weights_sha256: str) -> str:
        """Name the output by content: sha256 of canonical JSON of parameters and weights.

        Args:
            weights_sha256: Hash of the weights, as `weights_hash` gives it.

        Returns:
            64 hexadecimal digits.
        """
        record = {"params": self.to_dict(), "weights_sha256": weights_sha256}
        return hashlib.sha256(canonical_json(record).encode()).hexdigest()


@dataclass(frozen=True)
class ImageParams(Params):
    """Everything that decides the pixels of one picture.

    Attributes:
        negative_prompt: What to steer away from, or None.
        style: Style name appended to the prompt as ", NAME style", or None.
        num_inference_steps: Rows of the schedule; None is the recipe's own number.
        guidance_scale: 1 is off; None is the recipe's own value.
        temperature: 0 is greedy; None is the recipe's own value.
        top_k: Codes kept per draw; None keeps all.
        top_p: Probability mass kept per draw; None keeps all.
        height: Pixels; None is the recipe's own size.
        width: Pixels; None is the recipe's own size.
        dtype: float32, bfloat16 or float16.
        region: What `edit` redraws, or None for a picture from nothing.
        input_sha256: Hash of the edited picture's pixels, or None.
    """

    kind: ClassVar[str] = "image"

    negative_prompt: str | None = None
    style: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    height: int | None = None
    width: int | None = None
    dtype: str = "float32"
    region: str | None = None
    input_sha256: str | None = None

    @property
    def full_prompt(self) -> str:
        """The text the model reads: prompt plus style words."""
        return f"{self.prompt}, {self.style} style" if self.style else self.prompt


@dataclass(frozen=True)
class VideoParams(Params):
    """Everything that decides the frames of one video.

    Attributes:
        prompts: One per block of new frames, or None where `prompt` says it all.
        num_frames: Frames of the file.
        fps: Frames per second.
        given: Frames at the start that were given, not made.
        input_sha256: Hash of the given frames at the model's size, or None.
        last_sha256: Hash of a given last frame, or None.
        structure_sha256: Hash of the clip whose structure guided the frames, or None.
        actions_sha256: Hash of the actions of a played world, or None.
        session_sha256: Hash of the session file that was gone on with, or None.
        num_inference_steps: Rows per block; None is the recipe's own number.
        guidance_scale: 1 is off; None is the recipe's own value.
        temperature: 0 is greedy; None is the recipe's own value.
        dtype: float32, bfloat16 or float16.
        scale: Every pixel is a square of this many pixels in the file.
    """

    kind: ClassVar[str] = "video"

    prompts: list[str] | None = None
    num_frames: int | None = None
    fps: float | None = None
    given: int = 0
    input_sha256: str | None = None
    last_sha256: str | None = None
    structure_sha256: str | None = None
    actions_sha256: str | None = None
    session_sha256: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    dtype: str = "float32"
    scale: int = 1


@dataclass(frozen=True)
class MotionParams(Params):
    """Everything that decides the poses of one motion, 20 per second.

    Attributes:
        prompts: One per block of new frames or per segment, or None where `prompt` says it all.
        segment_seconds: How long each of `prompts` lasts, or None for one block each.
        num_frames: Frames of the motion.
        span: First frame that was made anew and the frame after the last, or None.
        given: Frames that were given, not made.
        input_sha256: Hash of the given joints, or None.
        num_inference_steps: Rows per block; None is the recipe's own number.
        guidance_scale: 1 is off; None is the recipe's own value.
        temperature: 0 is greedy; None is the recipe's own value.
        dtype: float32, bfloat16 or float16.
    """

    kind: ClassVar[str] = "motion"

    prompts: list[str] | None = None
    segment_seconds: float | None = None
    num_frames: int | None = None
    span: list[int] | None = None
    given: int = 0
    input_sha256: str | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    dtype: str = "float32"


_STRINGS = {
    "prompt", "model", "negative_prompt", "style", "dtype", "region", "input_sha256",
    "last_sha256", "structure_sha256", "actions_sha256", "session_sha256",
}  # fmt: skip
_INTEGERS = {
    "seed", "num_inference_steps", "top_k", "height", "width", "num_frames", "given", "scale",
}  # fmt: skip


def _check_type(name: str, value: Any, *, required: bool) -> None:
    if value is None and not required:
        return
    if name == "prompts":
        is_right = isinstance(value, list) and all(isinstance(text, str) for text in value)
        kind = "a list of texts"
    elif name == "span":
        numbers = value if isinstance(value, list) else []
        is_right = len(numbers) == 2 and all(type(number) is int for number in numbers)
        kind = "two whole numbers"
    elif name in _STRINGS:
        is_right, kind = isinstance(value, str), "text"
    elif name in _INTEGERS:
        is_right, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        is_right = isinstance(value, (int, float)) and not isinstance(value, bool)
        kind = "a number"
    if not is_right:
        raise DataError(explain(f"parameter {name}", got=value, allowed=kind))
    if name == "seed" and not 0 <= value < 2**64:
        raise DataError(explain("parameter seed", got=value, allowed="0 to 2**64 - 1"))


P = TypeVar("P", bound=Params)


@dataclass(frozen=True)
class Record(Generic[P]):
    """What a file carries about itself.

    Attributes:
        params: Parameters of the picture or video.
        recipe: Name of the recipe that trained the model.
        weights_sha256: Hash of the weights.
        versions: Package name to version.
    """

    params: P
    recipe: str
    weights_sha256: str
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with `key` so that a reader can compare at a glance."""
        return {
            "format": FORMAT,
            "kind": self.params.kind,
            "prompt": self.params.prompt,
            "seed": self.params.seed,
            "recipe": self.recipe,
            "weights_sha256": self.weights_sha256,
            "key": self.params.key(self.weights_sha256),
            "versions": self.versions,
            "params": self.params.to_dict(),
        }


def read_record(record: Any, of: type[P], where: str = "record") -> Record[P]:
    """Read a record back.

    Args:
        record: Parsed JSON.
        of: Parameters it should hold.
        where: File name for messages.

    Raises:
        DataError: Not a record of this program, of a newer format, or of another kind of output.
    """
    if not isinstance(record, dict) or not isinstance(record.get("params"), dict):
        raise DataError(
            explain(f"{where} holds no blockloom parameters", hint="a file made by blockloom"),
        )
    if record.get("format") != FORMAT:
        raise DataError(
            explain(f"{where}: format", got=record.get("format"), allowed=str(FORMAT)),
        )
    if record.get("kind", of.kind) != of.kind:
        raise DataError(
            explain(
                f"{where} holds parameters of another kind", got=record["kind"], allowed=of.kind
            )
        )
    versions = record.get("versions")
    versions = versions if isinstance(versions, dict) else {}
    return Record(
        params=of.from_dict(record["params"]),
        recipe=str(record.get("recipe", "")),
        weights_sha256=str(record.get("weights_sha256", "")),
        versions={str(k): str(v) for k, v in versions.items()}
        if isinstance(versions, dict)
        else {},
    )


def canonical_json(value: Any) -> str:
    """Write JSON that is equal byte for byte for equal values: sorted keys, no spaces, no NaN."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    )


def hash64(seed: int, key: int | str) -> int:
    """Derive the seed of one item from a run's seed and the item's own key.

    Args:
        seed: Seed of the run, 0 <= seed < 2**64.
        key: Identity of the item; its position in the file plays no part.

    Returns:
        Whole number in [0, 2**64), the same on every machine.
    """
    digest = hashlib.blake2b(f"{seed}:{key}".encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "big")


def package_versions() -> dict[str, str]:
    """Return the versions that can change a picture's bits, by package name."""
    from .. import __version__

    versions = {"blockloom": __version__}
    for name in _VERSIONED:
        try:
            versions[name] = package_metadata.version(name)
        except package_metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def bundled_models() -> dict[str, Path]:
    """List the models that ship with the package.

    Returns:
        Public name ("blockloom/emoji") to folder, sorted by name.
    """
    # `weights/` has no __init__, so `files` gives a view of several folders; its items are paths.
    folders = [Path(str(item)) for item in files("blockloom.weights").iterdir() if item.is_dir()]
    found = {f"blockloom/{p.name}": p for p in folders if (p / "model_index.json").is_file()}
    return dict(sorted(found.items()))


def model_folder(name: str) -> Path:
    """Resolve a model name to a local folder and refuse what must not be opened.

    Args:
        name: Bundled name ("blockloom/emoji") or the path of a saved pipeline.

    Returns:
        Folder that holds `model_index.json` and safetensors only.

    Raises:
        ModelError: Empty name, a URL, a file, a missing folder, or a folder without an index or
            with pickled weights (these can run code when opened).
    """
    bundled = bundled_models()
    choices = ", ".join(bundled) or "the path of a saved pipeline"
    if not name.strip():
        raise ModelError(explain("model name is empty", allowed=choices))
    if "://" in name:
        raise ModelError(
            explain("a model is not loaded from a URL", got=name, allowed=f"{choices} or a folder"),
        )
    if name in bundled:
        return bundled[name]
    folder = Path(name).expanduser()
    if "\0" in name or not folder.exists():
        close = nearest(name, list(bundled))
        raise ModelError(
            explain("no such model", got=name, allowed=f"{choices} or a folder", hint=close),
        )
    if not folder.is_dir():
        raise ModelError(
            explain("a model is a folder with model_index.json, not a file", got=folder.name),
        )
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            explain(
                f"folder {folder.name!r} holds no model_index.json",
                allowed="a folder written by save_pretrained or by blockloom train",
            ),
        )
    check_folder(folder)
    return folder


def weights_hash(folder: Path) -> str:
    """Hash the weights of a saved pipeline.

    Args:
        folder: Folder of the pipeline.

    Returns:
        sha256 over the sorted relative names and contents of all safetensors files.

    Raises:
        ModelError: No safetensors file inside, or one cannot be read.
    """
    paths = sorted(folder.rglob("*.safetensors"), key=lambda p: p.relative_to(folder).as_posix())
    if not paths:
        raise ModelError(explain(f"folder {folder.name!r} holds no safetensors weights"))
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ModelError(explain(f"cannot read {path.name}: {error.strerror}")) from error
        digest.update(f"{path.relative_to(folder).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()
