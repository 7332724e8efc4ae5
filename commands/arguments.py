"""Every subcommand and flag of `blockloom`, as frozen dataclasses that tyro reads.

What it does not know: how a command does its work. `cli.py` maps each class to the module that
runs it.

Invariants: no torch; a value that got past this file is legal as far as can be said without a
model; None means "the recipe's own value".
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union

import tyro

from . import values

Steps = Annotated[
    int | None,
    values.spec(
        values.whole("--steps", 1, values.MAX_STEPS), f"1..{values.MAX_STEPS}", absent="recipe"
    ),
]
Seed = Annotated[
    int, values.spec(values.whole("--seed", 0, values.MAX_SEED, also=-1), "0..2**64-1|-1")
]
Guidance = Annotated[
    float | None,
    values.spec(values.real("--guidance-scale", 0.0, 100.0), "0..100", absent="recipe"),
]
Temperature = Annotated[
    float | None,
    values.spec(values.real("--temperature", 0.0, 100.0), "0..100", absent="recipe"),
]
TopK = Annotated[
    int | None, values.spec(values.whole("--top-k", 1, 2**20), "1..VOCABULARY", absent="recipe")
]
TopP = Annotated[
    float | None,
    values.spec(values.real("--top-p", 0.0, 1.0, open_low=True), "(0..1]", absent="recipe"),
]
_STEP = values.SIZE_STEP
Height = Annotated[
    int | None,
    values.spec(
        values.whole("--height", _STEP, values.MAX_SIZE, step=_STEP), "PIXELS", absent="recipe"
    ),
]
Width = Annotated[
    int | None,
    values.spec(
        values.whole("--width", _STEP, values.MAX_SIZE, step=_STEP), "PIXELS", absent="recipe"
    ),
]
Device = Annotated[str, values.spec(values.device, "auto|cpu|cuda[:N]|mps")]
Dtype = Annotated[
    str | None,
    values.spec(values.one_of("--dtype", values.DTYPES), "|".join(values.DTYPES), "float32"),
]
Text = Annotated[str | None, values.spec(values.prompt, "TEXT")]
Prompt = tyro.conf.Positional[Text]
Path = Annotated[str | None, values.spec(str, "PATH")]
Name = Annotated[str | None, values.spec(str, "NAME")]
Sets = tyro.conf.UseAppendAction[
    tuple[Annotated[str, values.spec(values.override, "KEY=VALUE")], ...]
]
Format = Literal["text", "json"]
Kind = Literal["image", "video", "motion"]
Frames = Annotated[
    int | None,
    values.spec(values.whole("--frames", 1, values.MAX_FRAMES), "N", absent="recipe"),
]
Fps = Annotated[
    float | None, values.spec(values.real("--fps", 0.1, 240.0), "0.1..240", absent="as given, or 8")
]
Scale = Annotated[int, values.spec(values.whole("--scale", 1, 64), "1..64")]
MOTION_FORMATS = ("mp4", "gif", "bvh", "glb", "npz")
Formats = Annotated[
    tuple[str, ...] | None,
    values.spec(
        values.names_of("--formats", MOTION_FORMATS), ",".join(MOTION_FORMATS), absent="mp4,bvh"
    ),
]
Seconds = Annotated[
    float | None,
    values.spec(values.real("--seconds", 0.0, 50_000, open_low=True), "S", absent="recipe"),
]


@dataclass(frozen=True)
class Common:
    """Flags of every command."""

    format: Format = "text"
    """What stdout holds: lines for people, or JSON."""
    debug: bool = False
    """Show the traceback of an error."""


@dataclass(frozen=True)
class Model(Common):
    """Which model, on what."""

    recipe: Name = None
    """Use the bundled model that was trained from this recipe (see `blockloom recipes`)."""
    model: Name = None
    """Bundled name or folder of a saved pipeline. Default: blockloom/emoji, for videos
    blockloom/clips, for motions blockloom/motion, to play blockloom/world."""
    device: Device = "auto"
    """Where to compute; auto takes CUDA when there is one."""
    dtype: Dtype = None
    """Number format of the model; float16 needs CUDA."""


@dataclass(frozen=True)
class Sampling(Model):
    """How to draw."""

    steps: Steps = None
    """Rows of the schedule per block."""
    guidance_scale: Guidance = None
    """Weight of the prompt; 1 is off."""
    temperature: Temperature = None
    """0 is greedy."""
    top_k: TopK = None
    """Draw from the k likeliest codes only."""
    top_p: TopP = None
    """Draw from the likeliest codes that hold this much probability."""
    height: Height = None
    """Multiple of 8; a bundled model draws its own size only."""
    width: Width = None
    """Multiple of 8; a bundled model draws its own size only."""
    negative_prompt: Text = None
    """What to steer away from."""
    style: Name = None
    """Appended to the prompt as ", NAME style"; the emoji models know noto, blobmoji, twemoji,
    openmoji, fluent-3d and fluent-flat."""


@dataclass(frozen=True)
class Generate(Sampling):
    """Make pictures, videos or motions of a human body from a prompt."""

    kind: tyro.conf.Positional[Kind] = "image"
    """What to make."""
    prompt: Prompt = None
    """What to draw; videos and motions may do without."""
    prompts_per_block: Path = None
    """Videos and motions: a text file whose line k is the prompt of block k of new frames; the last
    goes on."""
    segment_seconds: Annotated[
        float | None,
        values.spec(values.real("--segment-seconds", 0.0, 50_000, open_low=True), "S"),
    ] = None
    """Motions: how long each line of --prompts-per-block lasts, in place of one block."""
    frames: Frames = None
    """Videos: frames in all; some models take 4n + 1 only. Motions: 20 per second, most 4n."""
    seconds: Seconds = None
    """Motions: length, in place of --frames; the nearest legal one is taken."""
    motion: Path = None
    """Motions: a .bvh or .npz to go on from; its frames come first."""
    formats: Formats = None
    """Motions: kinds of files to write, all under one name."""
    fps: Fps = None
    """Videos: frames per second of the file."""
    image: Path = None
    """Videos: a picture that is the first frame."""
    video: Path = None
    """Videos: a clip to go on from; its frames come first."""
    structure: Path = None
    """Videos: a clip whose brightness or edges every frame follows; for models guided by it."""
    scale: Scale = 1
    """Videos: write every pixel as a square of this many pixels."""
    seed: Seed = -1
    """Output k of --num uses seed + k; -1 takes a random seed and prints it."""
    num: Annotated[int, values.spec(values.whole("--num", 1, values.MAX_NUM), "N")] = 1
    """How many."""
    out: Path = None
    """A .png, for videos .mp4, .webm or .gif, for motions .mp4, .gif, .bvh, .glb or .npz (one
    output), or a folder. Default: the folder outputs."""
    overwrite: bool = False
    """Replace files that hold something else."""
    no_metadata: bool = False
    """Write neither the parameters into the file nor a sidecar."""
    params_from: Path = None
    """Repeat the output of this file or sidecar .json; flags given beside it win."""


@dataclass(frozen=True)
class Edit(Sampling):
    """Redraw a region of a picture or a span of a motion, keep the rest; or go on with a clip."""

    kind: tyro.conf.Positional[Kind] = "image"
    """What to edit."""
    input: tyro.conf.Positional[Path] = None
    """The picture (PNG, JPEG, WEBP, GIF or BMP), video (MP4, WebM or GIF) or motion (BVH, npz)."""
    prompt: Text = None
    """What the whole picture or clip shows; videos and motions may do without."""
    continue_frames: Annotated[
        int | None,
        values.spec(values.whole("--continue", 1, values.MAX_FRAMES), "N"),
        tyro.conf.arg(name="continue"),
    ] = None
    """Videos and motions: make this many frames after the last."""
    between_frames: Annotated[
        int | None,
        values.spec(values.whole("--between", 1, values.MAX_FRAMES), "N"),
        tyro.conf.arg(name="between"),
    ] = None
    """Keep the first and the last frame of a video, or four at each end of a motion, and make this
    many between them; only models that make all frames together can."""
    span: Annotated[str | None, values.spec(values.span, "START-END")] = None
    """Motions: seconds that are made anew, such as 2.0-4.0; all other frames stay. Models that make
    frames in order can redraw the end only."""
    formats: Formats = None
    """Motions: kinds of files to write, all under one name."""
    fps: Fps = None
    """Videos: frames per second of the file."""
    scale: Scale = 1
    """Videos: write every pixel as a square of this many pixels."""
    region: Annotated[
        str | None, values.spec(values.region, "left|right|top|bottom|x0,y0,x1,y1")
    ] = None
    """Pictures: what to redraw, a half or a box in pixels of the input (required)."""
    seed: Seed = -1
    """-1 takes a random seed and prints it."""
    params_from: Path = None
    """Repeat the edit of this file or sidecar .json; flags given beside it win."""
    out: Path = None
    """A .png, for videos .mp4, .webm or .gif, for motions .mp4, .gif, .bvh, .glb or .npz, or a
    folder. Default: the folder outputs."""
    overwrite: bool = False
    """Replace files that hold something else."""
    no_metadata: bool = False
    """Write neither the parameters into the file nor a sidecar."""


@dataclass(frozen=True)
class Play(Model):
    """Play a world from a script of actions and write what it dreams as a video.

    The script has one action per line: the number of the action that is 1 (`2`), all numbers of
    an action (`0.5, 0, 1`), names of the world's keys (`ArrowUp+ArrowLeft`, see its world.json), or
    `-` for nothing. `x8` behind an action repeats it. Blank lines and lines that begin with # are
    left out. JSON lines are read too: `2`, `[0.5, 0, 1]`, `null` or
    `{"action": [0.5, 0, 1], "repeat": 8, "prompt": "a forest"}`.
    """

    actions: Path = None
    """The script (required): text, CSV or JSON lines."""
    frames: Path = None
    """A picture or video the world starts from. Default: a start that came with the model."""
    start: Annotated[int, values.spec(values.whole("--start", 0, 63), "0..63")] = 0
    """Which of the model's own starts."""
    prompt: Text = None
    """What the world is."""
    seed: Seed = -1
    """-1 takes a random seed and prints it."""
    steps: Steps = None
    """Rows of the schedule per block."""
    guidance_scale: Guidance = None
    """Weight of the prompt; 1 is off."""
    fps: Fps = None
    """Frames per second of the file. Default: the world's own."""
    scale: Scale = 1
    """Write every pixel as a square of this many pixels."""
    out: Path = None
    """A .mp4, .webm or .gif file or a folder. Default: the folder outputs."""
    session_out: Path = None
    """A .safetensors file to save the session to, so that --resume goes on bit for bit."""
    resume: Path = None
    """Go on with a saved session instead of starting anew; only new frames are written."""
    overwrite: bool = False
    """Replace files that hold something else."""
    no_metadata: bool = False
    """Write neither the parameters into the file nor a sidecar."""


@dataclass(frozen=True)
class Compress(Common):
    """Turn a video into few bytes, with a model whose tokenizer gives codes."""

    input: tyro.conf.Positional[Path] = None
    """Video or picture; resampled to the model's size."""
    model: Name = None
    """Folder of the model; decompressing needs the same."""
    out: Path = None
    """The .blmv to write."""
    source: Literal["mixed", "prior", "counts", "raw"] = "mixed"
    """Where the probabilities of the bits come from: the model and counts of this clip, the model
    alone, counts alone, or nowhere."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True)
class Decompress(Common):
    """Turn a file that `compress` wrote back into a video."""

    input: tyro.conf.Positional[Path] = None
    """The .blmv."""
    model: Name = None
    """Folder of the model it was compressed with."""
    out: Path = None
    """The .mp4, .webm or .gif to write."""
    scale: Scale = 1
    """Every pixel becomes a square of this many pixels."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True)
class Batch(Sampling):
    """Draw one picture per line of a file; stop and start again as you like."""

    prompts: tyro.conf.Positional[Path] = None
    """JSONL (id, prompt, negative_prompt, seed, style, steps, ...) or one prompt per line."""
    out: Path = None
    """Folder for pictures, sidecars and index.jsonl (required)."""
    seed: Annotated[int, values.spec(values.whole("--seed", 0, values.MAX_SEED), "0..2**64-1")] = 0
    """Seed of the run; an item without its own seed uses hash64(seed, id)."""
    batch_size: Annotated[int, values.spec(values.whole("--batch-size", 1, 1024), "N")] = 8
    """Pictures computed together; changes speed, never pixels."""
    shard: Annotated[str, values.spec(values.shard, "I/N")] = "0/1"
    """Work on lines I, I+N, I+2N, ... only, I counted from 0."""
    on_error: Literal["stop", "skip"] = "stop"
    """Stop at a bad line before drawing anything, or skip it and answer 6 at the end."""
    limit: Annotated[int | None, values.spec(values.whole("--limit", 1, 10**9), "N")] = None
    """Read only the first N prompts."""
    dry_run: bool = False
    """Check everything and say what would be drawn."""
    overwrite: bool = False
    """Draw again what is already there."""
    no_metadata: bool = False
    """Leave the parameters out of the PNG files; the sidecars stay, resuming needs them."""


@dataclass(frozen=True)
class Train(Common):
    """Train a tokenizer and a model from a recipe."""

    recipe: tyro.conf.Positional[Name] = None
    """Recipe name or path of a YAML file."""
    data: Path = None
    """Folder of pictures with metadata.jsonl or .txt captions, or an .npz or .parquet file."""
    out: Path = None
    """Folder for checkpoints, log and the finished pipeline."""
    stage: Literal["all", "tokenizer", "model"] = "all"
    """Which part to train."""
    resume: bool = False
    """Go on from the newest good checkpoint in --out."""
    steps: Annotated[int | None, values.spec(values.whole("--steps", 1, 10**9), "N")] = None
    """Optimizer steps per stage."""
    set: Sets = ()
    """Change one recipe value; may be repeated."""


@dataclass(frozen=True)
class Eval(Common):
    """Measure a model on a data set; the result is JSON."""

    model: tyro.conf.Positional[Name] = None
    """Bundled name or folder of a saved pipeline."""
    data: Path = None
    """As for train."""
    out: Path = None
    """File for the JSON; stdout when not given."""
    sheet: Path = None
    """PNG that shows data set pictures, or frames, above what the model drew for them."""
    num: Annotated[int | None, values.spec(values.whole("--num", 1, 10**7), "N")] = None
    """Pictures per split, beginnings of videos or texts of motions, for a quick look."""
    steps: Steps = None
    """As for generate."""
    endurance: Annotated[
        int | None, values.spec(values.whole("--endurance", 2, 10**7), "FRAMES")
    ] = None
    """Videos: also draw one world for this many frames (4096 shows whether it lasts)."""
    simulator: bool = False
    """Models that act: play held-out episodes in the real simulator (extra: babyai)."""
    evaluator: Path = None
    """Motions: folder of the text-motion evaluator, trained from --data there when missing; beside
    the model when not given."""
    seed: Annotated[int, values.spec(values.whole("--seed", 0, values.MAX_SEED), "0..2**64-1")] = 0
    """Seed of the drawn pictures."""
    device: Device = "auto"
    """Where to compute."""


@dataclass(frozen=True)
class Inspect(Common):
    """Write a recipe's layout, mask, schedule or cache log, as numbers or as a picture."""

    recipe: tyro.conf.Positional[Name] = None
    """Recipe name or path of a YAML file."""
    what: Literal["layout", "mask", "schedule", "cache"] = "mask"
    """layout and mask: of training. schedule: one entry per row. cache: write and commit log."""
    length: Annotated[int, values.spec(values.whole("--length", 1, 65536), "N")] = 16
    """Tokens of data."""
    seed: Annotated[int, values.spec(values.whole("--seed", 0, values.MAX_SEED), "0..2**64-1")] = 0
    """Seed of the stand-in scores where the order depends on a model."""
    set: Sets = ()
    """Change one recipe value; may be repeated."""
    out: Path = None
    """.npy (mask only; writes the tokens beside it as .json), .json or .png; stdout otherwise."""


@dataclass(frozen=True)
class Recipes(Common):
    """List the recipes: what they are, whether their cache is exact, what they learned."""

    modality: Literal["image", "video", "audio", "motion", "all"] = "all"
    """Show one modality only."""


@dataclass(frozen=True)
class Doctor(Common):
    """Check this machine and this installation."""

    out: Annotated[str, values.spec(str, "PATH")] = "outputs"
    """Folder that should be writable."""


@dataclass(frozen=True)
class Data(Common):
    """Turn a data set into one .npz with pictures or motions, captions and splits."""

    action: tyro.conf.Positional[Literal["convert"]] = "convert"
    """What to do."""
    source: tyro.conf.Positional[Path] = None
    """Folder of pictures or of BVH files with captions, .npz or .parquet."""
    out: Path = None
    """The .npz to write."""
    size: Annotated[int | None, values.spec(values.whole("--size", 8, 1024), "PIXELS")] = None
    """Side of the square pictures; the source's own size when not given."""
    mirror: bool = False
    """Add every training motion with left and right swapped."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True)
class Bench(Common):
    """Time a model on this machine: loading, cached and recomputed decoding."""

    model: Name = None
    """Bundled name or folder of a saved pipeline. Default: blockloom/emoji."""
    device: Device = "auto"
    """Where to compute."""
    num: Annotated[int, values.spec(values.whole("--num", 1, 256), "N")] = 4
    """Pictures per run."""
    repeat: Annotated[int, values.spec(values.whole("--repeat", 1, 100), "N")] = 3
    """Timed runs; the median is reported."""


@dataclass(frozen=True)
class Demo(Common):
    """Open the demo in a browser."""

    listen: Annotated[str, values.spec(str, "ADDRESS")] = "127.0.0.1"
    """Address to listen on; any other lets the network in and needs --auth or --i-know."""
    port: Annotated[int, values.spec(values.whole("--port", 1, 65535), "PORT")] = 7860
    """Port to listen on."""
    model: Name = None
    """Folder of a saved pipeline to offer beside the bundled models."""
    auth: Annotated[str | None, values.spec(values.auth, "USER:PASSWORD")] = None
    """Ask visitors for this name and password."""
    i_know: bool = False
    """Let anyone on the network in without a password."""


COMMANDS: dict[str, type] = {
    "generate": Generate,
    "edit": Edit,
    "play": Play,
    "compress": Compress,
    "decompress": Decompress,
    "batch": Batch,
    "train": Train,
    "eval": Eval,
    "inspect": Inspect,
    "recipes": Recipes,
    "doctor": Doctor,
    "data": Data,
    "bench": Bench,
    "demo": Demo,
}


def command_union() -> Any:
    """Return the type that tyro parses: one subcommand per class."""
    members = tuple(Annotated[cls, tyro.conf.subcommand(name)] for name, cls in COMMANDS.items())
    return Union[members]  # noqa: UP007 - the members are only known at run time
