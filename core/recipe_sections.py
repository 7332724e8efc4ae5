"""The sections of a recipe: what every choice may say, with its range and its default.

One class per section of the YAML file. How a file is read and refused is in recipe.py; which
sections go together is in legality.py.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of a recipe: unknown keys are refused, and nothing changes after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class SystemSpec(Section):
    """Where the method comes from, and where this recipe differs from it."""

    title: str
    url: str = ""
    differs: str = ""


class LayoutSpec(Section):
    """Which tokens stand in the sequence.

    `block` is "token", "row", "all", "tile:HxW" or a number of tokens in raster order.
    `kind` "frames" is a video: `frames` latent frames train together, and `block` is "frame",
    "frames:N", "token" or "all". `copies` 2 = a clean and a noisy copy of every token. `shift` 1 =
    the row before a token predicts it. `spans` > 0 moves that many spans to the end during
    training (CM3). `permute` "random" trains on random orders and decodes in raster order; "any"
    decodes in an order from coarse to fine (Halton's), what is given first. `relabel`, for one
    copy, makes a row's copy say whether its token is known, so that masks tell known rows from
    masked ones.
    `given` tokens of every frame of a video, its first ones, are always given and never predicted:
    what others say and do while one moves. They are rows of their block like all others.
    `group` says what the mask's `group` is in a video: "site" (place in the frame), "frame",
    "block" (of noisy rows: the first block in flight with theirs), "window:TxHxW" or
    "window:TxHxW:shifted" (by half a window). Several are taken by the layers in turn.
    """

    kind: Literal["grid", "stream", "frames"] = "grid"
    frames: int = Field(1, ge=1, le=4096)
    block: int | str = "all"
    copies: Literal[1, 2] = 1
    shift: Literal[0, 1] = 0
    permute: Literal["none", "random", "any"] = "none"
    relabel: bool = False
    split: Literal["fixed", "random"] = "fixed"
    spans: int = Field(0, ge=0, le=8)
    text_tokens: int = Field(0, ge=0, le=512)
    given: int = Field(0, ge=0, le=64)
    group: str | tuple[str, ...] = "site"

    @property
    def groups(self) -> tuple[str, ...]:
        """The groupings, one per layer in turn."""
        return (self.group,) if isinstance(self.group, str) else self.group


class ConditionSpec(Section):
    """How a prompt reaches the backbone.

    `prefix`: the words stand in front of the tokens. `adaln`: the pooled prompt modulates the rows
    whose copy is listed in `modulate`. `cross`: cross-attention to the words. `actions`: numbers
    per frame (what was done on the way to it), told to all rows of the frame through adaLN, or,
    where they are `aligned`, by cross-attention whose rows read their own frame's numbers only.
    A latent of several frames is told the row of each of them, or of its first one alone.
    `order`: masked rows are told by a learned table when their turn comes.
    `structure`: the shape of every frame, as a map of its brightness or its edges, told to noisy
    rows as `structure_size` x `structure_size` further channels of their token.
    `poses`: the last sixteen of the actions are the camera-to-world matrix of the frame, in units
    of the scene, told to attention instead (`backbone.position: pose`).
    """

    prefix: bool = False
    adaln: bool = False
    cross: bool = False
    modulate: tuple[Literal["clean", "noisy"], ...] = ("noisy",)
    actions: int = Field(0, ge=0, le=256)
    poses: bool = False
    aligned: bool = False
    structure: Literal["none", "luma", "edges"] = "none"
    structure_size: int = Field(1, ge=1, le=16)
    order: bool = False
    drop: float = Field(0.1, ge=0.0, lt=1.0)


class BackboneSpec(Section):
    """Size of the transformer. `level` = which copies are told their noise level.

    `level_rate` is the highest frequency of the sinusoids that tell it, in radians: low where
    training differentiates by the level (consistency models), which sees all of their slope.
    `decay` > 0 lowers attention scores with distance along the first axis (frames of a video), in
    steps of `period` frames.
    `route` > 0 lets a row read only that many of the finished blocks before its own, those whose
    mean key fits it best; `route_per` says whether rows choose alone or with their block.
    `position` "rope" turns queries and keys by their place, "pose" by the camera of their frame
    (CaPE), in which case places within a frame are known by the learned table alone; "periodic"
    turns nothing and adds sinusoids of the place within its `period` to the rows.
    """

    dim: int = Field(128, ge=16, le=8192)
    layers: int = Field(4, ge=1, le=128)
    heads: int = Field(4, ge=1, le=128)
    kv_heads: int | None = Field(None, ge=1)
    mlp_ratio: float = Field(8 / 3, gt=0.0, le=16.0)
    level: Literal["none", "adaln", "add"] = "none"
    level_rate: float = Field(1000.0, gt=0.0, le=1e5)
    rope_theta: float = Field(100.0, gt=1.0)
    decay: float = Field(0.0, ge=0.0, le=100.0)
    period: int = Field(1, ge=1, le=100_000)
    route: int = Field(0, ge=0, le=4096)
    route_per: Literal["query", "block"] = "query"
    position: Literal["rope", "pose", "periodic"] = "rope"

    @model_validator(mode="after")
    def _divides(self) -> "BackboneSpec":
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            legal = [h for h in range(1, self.dim + 1) if self.dim % (2 * h) == 0]
            near = min(legal, key=lambda h: abs(h - self.heads))
            raise ValueError(
                f"backbone.heads = {self.heads} must split dim = {self.dim} evenly; try {near}"
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"backbone.kv_heads = {self.kv_heads} must divide heads = {self.heads}; try 1"
            )
        return self


class CorruptionSpec(Section):
    """What training does to the tokens, and which rows carry the loss.

    `level` says how noise levels are drawn and `level_shift` moves them: above 1 towards noise.
    `context` > 0 also damages what is looked at (the clean copy, which later blocks look back on;
    the input of shifted recipes; known codes of recipes with one copy), without telling the model:
    up to that share of an item's tokens is swapped for another item's (tokens), or noise up to that
    level is added (latents). A model trained so leans on the prompt and forgives its own
    mistakes when it decodes. `share` < 1 predicts, in one training step, only that share of the
    blocks, drawn anew each time; the others are context only, which costs less (rows of actions are
    always predicted). `clean` is for recipes with one copy: the share of blocks that stay
    clean and carry no loss, so that training sees finished context. `per`: levels and ratios are
    drawn per item, per block, or rise over the blocks that are in flight together; "stage" draws,
    per block of the noisy copy or per item, which stage of `schedule.levels` is learned.
    `rollout`, for recipes that answer frame after frame, learns from their own answers: a training
    step draws the whole window with the decode loop and its cache, and gradients go back through
    it. `resample` is the share of steps whose clean copy is the model's own: redrawn from a level
    shifted by `resample_shift`, block after block.
    """

    kind: Literal["none", "mask", "flow", "ddpm", "spans"] = "none"
    ratio: Literal["cosine", "uniform", "arccos", "truncnorm", "givt", "ardm", "all"] = "cosine"
    exact_count: bool = True
    per: Literal["sample", "block", "flight", "stage"] = "sample"
    loss_on: Literal["masked", "all"] = "masked"
    weight: Literal["none", "inverse_ratio", "ardm", "segment"] = "none"
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    level: Literal["uniform", "logit_normal"] = "uniform"
    level_shift: float = Field(1.0, gt=0.0, le=100.0)
    context: float = Field(0.0, ge=0.0, le=1.0)
    resample: float = Field(0.0, ge=0.0, le=1.0)
    resample_shift: float = Field(0.6, gt=0.0, le=100.0)
    clean: float = Field(0.0, ge=0.0, lt=1.0)
    share: float = Field(1.0, gt=0.0, le=1.0)
    rollout: bool = False


class ScheduleSpec(Section):
    """How a block is filled: how many rows, which order, what is accepted, how levels fall.

    `matrix` says how blocks that denoise follow each other: "autoregressive": one after the other;
    "pyramid": each starts `delay` rows after the one before it; "trapezoid": the same from both
    ends inwards; "full": all together; "rolling": `flight` of them together, evenly spread.

    `levels` fills the tokens of every frame in turn, all first ones of a block before all second
    ones: one number of rows for each (residual codes, coarse to fine). `steps` is then not used.
    """

    steps: int = Field(8, ge=1, le=1000)
    count: str = "cosine"
    basis: Literal["remaining", "counts", "revealed", "inclusive", "inclusive_floor"] = "remaining"
    order: str = "confidence"
    accept: str = "top_n"
    threshold: float = Field(0.9, gt=0.0, le=1.0)
    gamma: float = Field(0.1, ge=0.0)
    temperature: float = Field(1.0, ge=0.0, le=100.0)
    choice_temperature: float = Field(0.0, ge=0.0, le=1000.0)
    top_k: int | None = Field(None, ge=1)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    guidance_scale: float = Field(1.0, ge=0.0, le=100.0)
    guidance_ramp: str = "constant"
    update: Literal["euler", "renoise", "dpm", "unipc"] = "euler"
    level_shift: float = Field(1.0, gt=0.0, le=100.0)
    matrix: Literal["autoregressive", "pyramid", "trapezoid", "full", "rolling"] = "autoregressive"
    delay: int = Field(1, ge=1, le=1000)
    flight: int = Field(1, ge=1, le=64)
    levels: tuple[int, ...] = ()


class FarSpec(Section):
    """Far history: blocks older than the window are read as coarse rows, one per patch of tokens.

    `patch` is the side of a patch: patch x patch tokens of a frame become one row with an embedding
    of its own. `blocks` older than the window are kept so; null = all.
    """

    patch: int = Field(2, ge=2, le=64)
    blocks: int | None = Field(None, ge=1)


class CacheSpec(Section):
    """What becomes permanent and when. `exact: true` is refused unless the checker proves it.

    `write` "separate": a pass over the clean rows after every block; "block": the same for recipes
    with one copy, whose finished rows are run once more at level 0 (diffusion forcing); "fused":
    that pass rides with the next block, for one or two copies; "token": every token as it is
    drawn; "prefix": the prompt. `matched: true` claims more than `exact` does: that training shows
    finished context as decoding keeps it. It is refused for one copy without clean blocks, unless
    context is kept at a level that training draws.

    `window` keeps the last blocks, the query's own counted; `nearest` keeps all, and a row sees
    that many past ones whose camera poses are nearest to its own. `sink` blocks at the start stay
    visible beside either. `far` keeps what leaves the window at a coarser scale.

    Context is kept as a pair: `context_noise` is the level a finished block is noised to before it
    becomes permanent, `context_level` the level its rows are told (recipes with one copy); they may
    differ. 0 and 0 = as it is.
    """

    write: Literal["none", "prefix", "token", "separate", "fused", "block"] = "none"
    keys: Literal["unrotated", "rotated"] = "unrotated"
    window: int | None = Field(None, ge=1)
    nearest: int | None = Field(None, ge=1)
    sink: int = Field(0, ge=0)
    far: FarSpec | None = None
    context_noise: float = Field(0.0, ge=0.0, lt=1.0)
    context_level: float = Field(0.0, ge=0.0, lt=1.0)
    exact: bool = False
    matched: bool = False


class HeadSpec(Section):
    """How a hidden state becomes a sample, or for "regression" the answer, always the same."""

    kind: Literal["categorical", "diffusion", "shortcut", "gmm", "patch", "regression"] = (
        "categorical"
    )
    width: int = Field(128, ge=8)
    depth: int = Field(3, ge=1, le=64)
    objective: Literal["velocity", "eps"] = "velocity"
    draws: int = Field(4, ge=1, le=64)
    steps: int = Field(10, ge=1, le=1000)
    solver: Literal["euler", "ddpm", "dpm"] = "euler"
    mixtures: int = Field(8, ge=1, le=1024)
    bootstrap: float = Field(0.25, ge=0.0, le=1.0)


class ActingSpec(Section):
    """Actions as tokens: after every frame stands one row that holds what is done in it.

    An action is one of `codes`, or a vector of `numbers`; `head` draws it, `recipe.head` frames.
    `weight` and `frame_weight` scale the two losses, which are added; 0 learns nothing of that
    kind.
    """

    codes: int = Field(0, ge=0, le=4096)
    numbers: int = Field(0, ge=0, le=4096)
    head: HeadSpec = HeadSpec()
    weight: float = Field(1.0, ge=0.0, le=1000.0)
    frame_weight: float = Field(1.0, ge=0.0, le=1000.0)


class TextSpec(Section):
    """The text encoder trained with the model, or a frozen T5/CLIP the user points to.

    `pretrained` is a folder or Hub id; `words` then counts its tokens, and `encoder_folder` and
    `tokenizer_folder` name the parts inside a pipeline folder.
    """

    dim: int = Field(64, ge=8)
    buckets: int = Field(1024, ge=16)
    words: int = Field(8, ge=1, le=256)
    layers: int = Field(0, ge=0, le=24)
    pretrained: str | None = None
    encoder_folder: str = ""
    tokenizer_folder: str = ""


class TrainSpec(Section):
    """Defaults of `blockloom train` for this recipe.

    `init_from` names a trained pipeline folder whose model of the same shape is trained on.
    `balance` lets rare kinds of items come more often: kinds are whole captions, or their subjects
    (the part before the first comma). `pad` lets windows go on behind the end of their clip, so
    that short clips are trained on; of what stands there nothing is known, and nothing is learned.
    `mirror` adds every training motion with left and right swapped, in its caption too.
    `wordings` tells every motion's caption in so many other ways besides ("a person walks" for
    "walk"), and in further captions that `synonyms` names for it.
    """

    steps: int = Field(1000, ge=1)
    batch_size: int = Field(64, ge=1)
    lr: float = Field(1e-3, gt=0.0)
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = Field(0.01, ge=0.0)
    ema: float = Field(0.999, ge=0.0, lt=1.0)
    warmup: int = Field(50, ge=0)
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    save_every: int = Field(500, ge=1)
    seed: int = Field(0, ge=0)
    init_from: str | None = None
    balance: Literal["none", "caption", "subject"] = "none"
    pad: bool = False
    mirror: bool = False
    wordings: int = Field(0, ge=0, le=15)
    synonyms: dict[str, list[str]] = Field(default_factory=dict)


class DistillSpec(Section):
    """Learning in few steps from a teacher.

    `method` "dmd" matches distributions, "consistency" names the end of the teacher's path from
    anywhere on it; then the teacher is the model itself as it was at `init_steps`, and all but
    `init_steps`, `teacher`, `lr`, `tangent_warmup` (steps until the tangent counts in full) and
    `tangent_floor` (c in g / (||g|| + c), over the elements of a frame) is for "dmd".

    `lr` is the learning rate after `init_steps`, with a warm-up and a fall of its own; null = the
    run's goes on.

    Until `init_steps` student and teacher learn from the data side by side; `teacher` names a
    trained pipeline folder to take it from instead. Then `critic_steps` steps of the critic take
    turns with one of the student. `history` "own": the student's frames follow its own (self
    forcing); "data": they follow the data's (CausVid). `given` frames of every window are not drawn
    but given: the data's, and with `horizon` > 0 the student's own of the step before, until its
    video is `horizon` frames long. `data_weight` adds the usual loss on the data to the student's.

    `adversarial` > 0 adds, with that weight, a judge on the critic's states: it learns to tell the
    data from what the student draws, both noised, and the student to be taken for data.
    """

    method: Literal["dmd", "consistency"] = "dmd"
    init_steps: int = Field(500, ge=0)
    critic_steps: int = Field(2, ge=1, le=100)
    history: Literal["own", "data"] = "own"
    teacher: str | None = None
    given: int = Field(0, ge=0, le=4096)
    horizon: int = Field(0, ge=0, le=1_000_000)
    data_weight: float = Field(0.0, ge=0.0, le=1000.0)
    adversarial: float = Field(0.0, ge=0.0, le=1000.0)
    lr: float | None = Field(None, gt=0.0)
    tangent_warmup: int = Field(0, ge=0)
    tangent_floor: float = Field(0.1, gt=0.0, le=100.0)


class LearnsSpec(Section):
    """The learning check: what was trained, against which baseline, and what it reached.

    `drawn` says what share of pictures, drawn by the recipe's own schedule, show their prompt.
    """

    metric: str
    baseline: float
    baseline_name: str
    value: float
    budget: str
    drawn: str = ""
