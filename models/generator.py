"""Text encoder, backbone and head of one recipe, and the decoder the rollout drives.

A `GenerativeModel` is what `train` trains and what a pipeline loads: one folder, one safetensors
file, a config that holds the recipe. It does not know pixels; its tokenizer does.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from ..core.attention import Lowered
from ..core.cache import CacheView, KVCache
from ..core.decoder import Draw
from ..core.errors import ModelError
from ..core.given import is_given
from ..core.grouping import PerLayer, repeat_items
from ..core.layout import Layout
from ..core.plan import NUM_SENTINELS, DecodePlan, num_prompt_rows
from ..core.poses import POSE_NUMBERS, poses_of
from ..core.recipe import Recipe, recipe_from_dict
from ..core.recipe_sections import ActingSpec, HeadSpec, TextSpec
from ..core.schedulers.base import Row
from .backbone import BlockTransformer
from .heads import build_head
from .heads.base import Head, RowHead, TokenHead, guided
from .pretrained_text import PretrainedTextEncoder
from .prompts import PreparedPrompt, repeat_prompt
from .text import HashTextEncoder, PromptEmbeds

TEXT_CODES = 128
"""Ids that caption characters add to a joint vocabulary: ASCII, 0 = end and padding."""


def head_settings(head: HeadSpec, label_smoothing: float = 0.0) -> dict[str, Any]:
    """Select the settings a head kind takes from a head section."""
    mlp = {"width": head.width, "depth": head.depth}
    settings: dict[str, dict[str, Any]] = {
        "categorical": {"label_smoothing": label_smoothing},
        "patch": {"prediction": head.objective, "modulated": False},
        "diffusion": mlp
        | {
            "objective": head.objective,
            "draws": head.draws,
            "steps": head.steps,
            "solver": head.solver,
        },
        "shortcut": mlp | {"draws": head.draws, "steps": head.steps, "bootstrap": head.bootstrap},
        "gmm": {"num_mixtures": head.mixtures},
        "regression": {},
    }
    return {"kind": head.kind} | settings[head.kind]


def text_encoder_of(spec: TextSpec) -> HashTextEncoder | PretrainedTextEncoder:
    """Build the text encoder a recipe asks for."""
    if spec.pretrained is None:
        return HashTextEncoder(
            dim=spec.dim, num_buckets=spec.buckets, max_words=spec.words, num_layers=spec.layers
        )
    return PretrainedTextEncoder(
        spec.pretrained,
        dim=spec.dim,
        max_tokens=spec.words,
        subfolder=spec.encoder_folder,
        tokenizer_subfolder=spec.tokenizer_folder,
    )


class GenerativeModel(ModelMixin, ConfigMixin):
    """Everything of a recipe that is trained in the model stage."""

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(
        self,
        recipe: dict,
        height: int,
        width: int,
        num_codebooks: int = 1,
        codebook_size: int = 0,
        latent_channels: int = 0,
    ) -> None:
        """Build the parts.

        Args:
            recipe: The recipe as plain data.
            height: Token rows of the tokenizer's grid.
            width: Token columns.
            num_codebooks: Codes per token (discrete tokenizers).
            codebook_size: Entries per codebook; 0 for continuous tokenizers.
            latent_channels: Channels per token (continuous tokenizers).

        Raises:
            ModelError: the recipe is not legal, or asks for the other kind of tokens.
        """
        super().__init__()
        spec = recipe_from_dict(dict(recipe), "model config")
        self.recipe = spec
        _require_levels(spec, height * width)
        _require_open(spec, height * width)
        stream = spec.layout.kind == "stream"
        extra = TEXT_CODES + NUM_SENTINELS if stream else 0
        slots = height * width + spec.layout.text_tokens + (NUM_SENTINELS if stream else 0)
        vocab = codebook_size + extra
        text, condition, acting = spec.text, spec.condition, spec.acting
        slots += acting is not None
        self.text_encoder = text_encoder_of(text)
        self.backbone = BlockTransformer(
            dim=spec.backbone.dim,
            num_layers=spec.backbone.layers,
            num_heads=spec.backbone.heads,
            num_kv_heads=spec.backbone.kv_heads,
            mlp_ratio=spec.backbone.mlp_ratio,
            rope_theta=spec.backbone.rope_theta,
            value="code" if codebook_size else "latent",
            num_codebooks=num_codebooks,
            codebook_size=vocab,
            latent_channels=latent_channels,
            num_sources=slots,
            num_orders=slots * spec.layout.frames if condition.order else 0,
            action_dim=condition.actions - POSE_NUMBERS * condition.poses,
            decay=spec.backbone.decay,
            period=spec.backbone.period,
            aligned=condition.aligned,
            position=spec.backbone.position,
            route=spec.backbone.route,
            route_per=spec.backbone.route_per,
            prompt_dim=text.dim,
            num_prompt_rows=num_prompt_rows(spec),
            cross_attention=condition.cross,
            level=spec.backbone.level,
            level_rate=spec.backbone.level_rate,
            modulate=condition.modulate if condition.adaln else (),
            sees_words=condition.modulate if condition.cross else (),
            action_codes=acting.codes if acting else 0,
            action_numbers=acting.numbers if acting else 0,
            far_patch=spec.cache.far.patch if spec.cache.far else 0,
            structure_dim=structure_width(spec),
        )
        self.action_head = None if acting is None else _action_head(acting, spec, latent_channels)
        self.head = build_head(
            head_settings(spec.head, spec.corruption.label_smoothing),
            spec.backbone.dim,
            codebook_size=vocab or None,
            num_codebooks=num_codebooks,
            latent_channels=latent_channels or None,
        )
        if stream:
            self.register_buffer(
                "allowed", allowed_codes(spec, height * width, codebook_size), persistent=False
            )

    @property
    def slots_per_frame(self) -> int:
        """Data slots of a frame: its tokens, and one for what is done in it where it acts."""
        return self.config.height * self.config.width + (self.action_head is not None)

    def is_action(self, source: Int[Tensor, "*rows"]) -> Bool[Tensor, "*rows"]:
        """Tell which data slots hold actions: the last of every frame, where the model acts."""
        if self.action_head is None:
            return torch.zeros_like(source, dtype=torch.bool)
        return source % self.slots_per_frame == self.slots_per_frame - 1

    @property
    def knows_missing(self) -> bool:
        """Whether training shows, among what is looked at, values that nobody knows."""
        recipe = self.recipe
        shows = recipe.acting is not None or recipe.train.pad
        return shows and recipe.corruption.kind in ("mask", "flow")

    def is_given(self, source: Int[Tensor, "*rows"]) -> Bool[Tensor, "*rows"]:
        """Tell which data slots hold tokens that the recipe is always given."""
        return is_given(source, self.slots_per_frame, self.recipe.layout.given)

    @property
    def uses_prompt(self) -> bool:
        """False when the text encoder is not part of the model (captions are tokens)."""
        condition = self.recipe.condition
        return condition.prefix or condition.adaln or condition.cross

    def embed_prompts(
        self, ids: Int[Tensor, "batch words features"], is_null: Bool[Tensor, " batch"]
    ) -> PromptEmbeds:
        """Encode tokenised prompts; items flagged null get the learned unconditional prompt."""
        embeds = self.text_encoder(ids)
        return embeds.replace(is_null, self.text_encoder.null(len(ids), embeds.embeds.shape[1]))

    def prepare(self, embeds: PromptEmbeds) -> PreparedPrompt:
        """Project prompts for the backbone."""
        if not self.uses_prompt:
            return self.unprompted(len(embeds.pooled))
        return self.backbone.prepare_prompt(embeds.embeds, embeds.is_valid, embeds.pooled)

    def unprompted(self, batch: int) -> PreparedPrompt:
        """Prepare the empty prompt: only the learned start row where the layout has one."""
        null = self.text_encoder.null(batch, self.recipe.text.words)
        return self.backbone.prepare_prompt(null.embeds, null.is_valid, null.pooled)


def _require_levels(recipe: Recipe, tokens: int) -> None:
    """Refuse levels that are not the tokens of a frame.

    Raises:
        ModelError: another number of levels.
    """
    levels = recipe.schedule.levels
    if levels and len(levels) != tokens:
        raise ModelError(
            f"schedule.levels = {list(levels)} grants rows to {len(levels)} levels, but a frame of "
            f"this tokenizer has {tokens} tokens; give {tokens} numbers"
        )


def structure_width(recipe: Recipe) -> int:
    """Count the numbers a token is told of its frame's structure; 0 = none."""
    condition = recipe.condition
    return 0 if condition.structure == "none" else condition.structure_size**2


def _require_open(recipe: Recipe, tokens: int) -> None:
    """Refuse recipes that are given every token of a frame.

    Raises:
        ModelError: no token is left to predict.
    """
    given = recipe.layout.given
    if given >= tokens:
        raise ModelError(
            f"layout.given = {given}, but a frame of this tokenizer has {tokens} tokens, one of "
            f"which must be left to predict; at most {tokens - 1}"
        )


def _action_head(acting: ActingSpec, recipe: Recipe, latent_channels: int) -> Head:
    """Build the head of ACTION rows.

    Raises:
        ModelError: actions of more numbers than a frame token has channels to hold them.
    """
    if acting.numbers > latent_channels:
        raise ModelError(
            f"acting.numbers = {acting.numbers} do not fit the {latent_channels} channels of a "
            f"token; set acting.codes, or at most {latent_channels} numbers"
        )
    return build_head(
        head_settings(acting.head),
        recipe.backbone.dim,
        codebook_size=acting.codes or None,
        latent_channels=acting.numbers or None,
    )


def allowed_codes(recipe: Recipe, cells: int, codebook_size: int) -> Bool[Tensor, "slots vocab"]:
    """Tell which ids each slot of a stream may hold: characters, picture codes, or its mark."""
    text = recipe.layout.text_tokens
    slots, vocab = text + cells + NUM_SENTINELS, codebook_size + TEXT_CODES + NUM_SENTINELS
    allowed = torch.zeros(slots, vocab, dtype=torch.bool)
    allowed[:text, codebook_size : codebook_size + TEXT_CODES] = True
    allowed[text : text + cells, :codebook_size] = True
    marks = torch.arange(NUM_SENTINELS)
    allowed[text + cells + marks, codebook_size + TEXT_CODES + marks] = True
    return allowed


def _cat_prompts(first: PreparedPrompt, second: PreparedPrompt) -> PreparedPrompt:
    def join(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        return None if a is None or b is None else torch.cat((a, b), 0)

    cross = None
    if first.cross is not None and second.cross is not None:
        pairs = zip(first.cross, second.cross, strict=True)
        cross = [(torch.cat((a[0], b[0])), torch.cat((a[1], b[1]))) for a, b in pairs]
    return PreparedPrompt(
        join(first.prefix, second.prefix),
        join(first.pooled, second.pooled),
        cross,
        join(first.cross_valid, second.cross_valid),
    )


def frame_actions(
    actions: Float[Tensor, "batch frames actions"], layout: Layout, cells: int, shift: int = 0
) -> Float[Tensor, "batch rows actions"]:
    """Look up the actions of the frame that every row predicts.

    Args:
        actions: What was done on the way to every frame.
        layout: The rows; prompt rows get the first frame's actions, unread.
        cells: Tokens of a frame.
        shift: 1 for recipes whose rows predict the token after them.
    """
    frame = (layout.source + shift).clamp_min(0) // cells
    return actions[:, frame.clamp_max(actions.shape[1] - 1)]


def split_poses(
    recipe: Recipe, actions: Float[Tensor, "batch frames numbers"] | None
) -> tuple[Float[Tensor, "batch frames actions"] | None, Float[Tensor, "batch frames 4 4"] | None]:
    """Split the numbers of every frame into what adaLN is told and the camera's pose."""
    if actions is None or not recipe.condition.poses:
        return actions, None
    told = actions[..., :-POSE_NUMBERS]
    return told if told.shape[-1] else None, poses_of(actions)


class ModelDecoder:
    """Runs a `GenerativeModel` for the rollout, one or two guidance branches at once.

    Branches ride in one batch: the conditional items first, then the unconditional ones. When clean
    rows see no prompt, both branches share one cache and commit passes run once.
    """

    differentiable = False
    """Whether gradients go back through what the cache keeps."""

    def __init__(
        self,
        model: GenerativeModel,
        prompt: PreparedPrompt,
        uncond: PreparedPrompt | None = None,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        actions: Float[Tensor, "batch frames actions"] | None = None,
        structure: Float[Tensor, "batch slots numbers"] | None = None,
    ) -> None:
        """Bind a model to the prompts of one request.

        Args:
            model: The model, in eval mode.
            prompt: Prepared prompts, one per item.
            uncond: Prepared negative or empty prompts; None = no guidance.
            top_k: Codes kept before sampling; None = the recipe's.
            top_p: Nucleus mass; None = the recipe's.
            actions: What was done on the way to every frame (videos with `condition.actions`).
            structure: Map of every slot's frame at its token (videos with `condition.structure`).
        """
        self.model, self.structure = model, structure
        self.actions = actions
        self.cond = prompt
        self.both = prompt if uncond is None else _cat_prompts(prompt, uncond)
        self.branches = 1 if uncond is None else 2
        recipe, spec = model.recipe, model.recipe.schedule
        self.top_k = spec.top_k if top_k is None else top_k
        self.top_p = spec.top_p if top_p is None else top_p
        # With one copy the kept rows are rows that were told the prompt.
        kept_is_told = recipe.layout.copies == 1 and recipe.cache.write in ("block", "fused")
        self.shares_cache = model.backbone.condition_free_clean and not kept_is_told
        self.cells = model.config.height * model.config.width
        self.shift = recipe.layout.shift

    @property
    def per_level(self) -> bool:
        """True when the trunk runs again at every noise level."""
        return self.model.head.runs == "row"

    @property
    def poses(self) -> Float[Tensor, "batch frames 4 4"] | None:
        """Camera of every frame, for models that are told them."""
        return split_poses(self.model.recipe, self.actions)[1]

    def new_cache(self, plan: DecodePlan, batch: int) -> KVCache:
        """Allocate a cache; guidance branches share it where its entries are condition-free."""
        config = self.model.backbone.config
        return KVCache(
            num_layers=config.num_layers,
            batch=batch if self.shares_cache else batch * self.branches,
            capacity=plan.capacity(),
            num_kv_heads=config.num_kv_heads or config.num_heads,
            head_dim=self.model.backbone.head_dim,
            num_axes=plan.content.num_axes,
            dtype=self.model.dtype,
            device=self.model.device,
            rotated=self.model.recipe.cache.keys == "rotated",
            differentiable=self.differentiable,
        )

    def forward(
        self,
        values: Tensor,
        is_masked: Tensor,
        layout: Layout,
        level: Tensor,
        lowered: Lowered | PerLayer,
        view: CacheView | None,
    ) -> Tensor:
        """Run the active rows of every branch.

        Returns:
            Hidden states [branches * batch, rows, dim]; [batch, ...] for a shared commit pass.
        """
        branches = self.branches
        if branches > 1 and self.shares_cache and view is not None:
            branches = 2 if bool((layout.level > 0).any()) else 1  # a commit pass has no branches
        prompt = self.cond if branches == 1 else self.both
        if branches > 1:
            values, is_masked = (
                t.repeat(branches, 1, *[1] * (t.ndim - 2)) for t in (values, is_masked)
            )
            level = level if level.ndim == 1 else level.repeat(branches, 1)
        told, poses = split_poses(self.model.recipe, self.actions)
        if told is not None:
            told = frame_actions(told, layout, self.cells, self.shift)
            told = told.repeat(branches, 1, 1)
        if poses is not None and branches > 1:
            poses, lowered = poses.repeat(branches, 1, 1, 1), repeat_items(lowered, branches)
        shown = None if self.structure is None else self.structure[:, layout.source.clamp_min(0)]
        return self.model.backbone(
            values, is_masked, layout, level, prompt, lowered, view, actions=told, poses=poses,
            structure=None if shown is None else shown.repeat(branches, 1, 1),
        )  # fmt: skip

    def _split(self, hidden: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.branches == 1:
            return hidden, None
        cond, uncond = hidden.chunk(2, 0)
        return cond, uncond

    def draw(
        self, hidden: Tensor, row: Row, generators: Sequence[torch.Generator], source: Tensor
    ) -> Draw:
        """Sample values for the slots `source` under the row's temperature and guidance."""
        cond, uncond = self._split(hidden)
        head, acts = self.model.head, bool(self.model.is_action(source).any())
        if acts and self.model.action_head is not None:
            head = self.model.action_head
        head = cast("TokenHead", head)  # the rollout denoises the blocks of others
        settings: dict[str, Any] = {
            "uncond_hidden": uncond,
            "guidance_scale": row.guidance_scale,
            "temperature": row.temperature,
        }
        if head.value == "code":
            # One token in one row: there is no other to prefer, so nobody asks how sure it was.
            measure = len(source) > 1 or not row.is_last
            settings |= {"top_k": self.top_k, "top_p": self.top_p, "measure": measure}
            if hasattr(self.model, "allowed"):
                settings["allowed"] = self.model.allowed[source]
        sample = head.sample(cond, generators, **settings)
        return Draw(self._widened(sample.values) if acts else sample.values, sample.stats)

    def _widened(self, drawn: Tensor) -> Tensor:
        """Fill up an action to the width and the kind of number of a frame's token."""
        config = self.model.config
        width = config.num_codebooks if config.codebook_size else config.latent_channels
        wide = functional.pad(drawn, (0, width - drawn.shape[-1]))
        return wide if config.codebook_size else wide.to(self.model.dtype)

    def predict(self, hidden: Tensor, row: Row) -> Tensor:
        """Predict velocity or noise, guided."""
        head = cast("RowHead", self.model.head)  # the rollout asks where `per_level` says so
        predicted, uncond = self._split(head.predict(hidden))
        if uncond is None:
            return predicted
        return guided(predicted, uncond, row.guidance_scale)


__all__ = ["GenerativeModel", "ModelDecoder", "allowed_codes", "head_settings", "repeat_prompt"]
