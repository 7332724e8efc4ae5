"""A frozen T5 or CLIP text encoder from a checkpoint the user names, behind the same interface.

transformers is imported and the checkpoint read at the first use only. The module knows nothing
about pictures. Invariants: same calls and same rules as `models.text.HashTextEncoder` (fixed number
of text tokens, blank prompt = learned unconditional prompt); only the projections train, and only
they are saved, so a saved model needs the checkpoint at the same path; weights are read from
safetensors and no code of the checkpoint is run.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..core.errors import ModelError, UsageError, check_count
from ..core.numerics import RowStableActivation, RowStableLinear
from .text import CHARS_PER_WORD_CAP, PromptEmbeds

ENCODER_CLASSES = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


class PretrainedTextEncoder(ModelMixin, ConfigMixin):
    """Project the features of a frozen T5 or CLIP text encoder to the model's width.

    Attributes:
        truncated: How many prompts of the latest `tokenize` call were longer than `max_tokens`.

    Args:
        path: Folder or hub name of the checkpoint; a folder is read without any network access.
        dim: Width of the embeddings.
        max_tokens: Text tokens per prompt; CLIP allows at most 77.
        subfolder: Folder of the encoder inside `path`, e.g. "text_encoder".
        tokenizer_subfolder: Folder of the tokenizer inside `path`, e.g. "tokenizer".
        features: Width of the checkpoint's features; None reads it from the checkpoint.

    Raises:
        ModelError: The checkpoint is neither T5 nor CLIP.
        UsageError: A size is not positive, or longer than the checkpoint allows.
    """

    @register_to_config
    def __init__(
        self,
        path: str,
        dim: int = 192,
        max_tokens: int = 77,
        subfolder: str = "",
        tokenizer_subfolder: str = "",
        features: int | None = None,
    ) -> None:
        super().__init__()
        check_count("dim", dim)
        check_count("max_tokens", max_tokens)
        if features is None:
            features = self._read_width()
            self.register_to_config(features=features)
        self.truncated = 0
        # A plain list hides the frozen network from state_dict, EMA and the optimizer.
        self._frozen: list[Any] = []
        self.norm = nn.LayerNorm(features)
        self.project = RowStableLinear(features, dim)
        self.pool = nn.Sequential(
            nn.LayerNorm(features),
            RowStableLinear(features, dim),
            RowStableActivation("silu"),
            RowStableLinear(dim, dim),
        )
        self.null_word = nn.Parameter(torch.randn(dim) * dim**-0.5)
        self.null_pooled = nn.Parameter(torch.zeros(dim))

    def tokenize(self, prompts: Sequence[str]) -> Int[Tensor, "batch text 1"]:
        """Turn prompts into the checkpoint's token ids.

        Args:
            prompts: One string per item; blank ones become the unconditional prompt.

        Returns:
            Int64 ids on the CPU, -1 where there is no token.

        Raises:
            UsageError: An item is not a string.
        """
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt, str):
                raise UsageError(f"prompts[{row}] must be a string, got {type(prompt).__name__}")
        tokenizer, _ = self._load()
        max_tokens = self.config.max_tokens
        cap = max_tokens * CHARS_PER_WORD_CAP
        # Lone surrogates cannot be encoded as UTF-8, which the tokenizers library requires.
        texts = [p[:cap].encode("utf-8", "replace").decode("utf-8") for p in prompts]
        lengths = [len(ids) for ids in tokenizer(texts, verbose=False)["input_ids"]]
        self.truncated = sum(
            length > max_tokens or len(prompt) > cap
            for length, prompt in zip(lengths, prompts, strict=True)
        )
        found = tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=max_tokens,
            return_tensors="pt",
        )
        ids = found["input_ids"].masked_fill(found["attention_mask"] == 0, -1)
        is_blank = torch.tensor([not text.strip() for text in texts])
        return ids.masked_fill(is_blank[:, None], -1)[..., None]

    def forward(self, ids: Int[Tensor, "batch text 1"]) -> PromptEmbeds:
        """Embed token ids.

        Args:
            ids: Output of `tokenize`; a row of only -1 yields the unconditional prompt.

        Returns:
            Embeddings, padding map and pooled vector.
        """
        ids = ids[..., 0].to(self.null_word.device)
        is_valid = ids >= 0
        is_empty = ~is_valid.any(dim=-1)
        is_seen = is_valid.clone()
        is_seen[:, 0] |= is_empty
        words, pooled = self._encode_frozen(ids, is_seen)
        embeds = self.project(self.norm(words)) * is_seen[..., None]
        encoded = PromptEmbeds(embeds, is_seen, self.pool(pooled))
        return encoded.replace(is_empty, self.null(ids.shape[0], ids.shape[1]))

    def null(self, batch: int, num_words: int | None = None) -> PromptEmbeds:
        """Return the learned unconditional prompt.

        Args:
            batch: Copies wanted.
            num_words: Text tokens, `max_tokens` by default.

        Returns:
            One valid learned token, then padding.
        """
        num_words = num_words or self.config.max_tokens
        first = self.null_word.new_zeros(num_words, 1)
        first[0] = 1.0
        return PromptEmbeds(
            repeat(first * self.null_word, "t d -> b t d", b=batch),
            repeat(first[:, 0] > 0, "t -> b t", b=batch),
            repeat(self.null_pooled, "d -> b d", b=batch),
        )

    def encode(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Tokenize and embed.

        Args:
            prompts: One string per item.

        Returns:
            Embeddings on the projections' device.
        """
        return self(self.tokenize(prompts))

    @torch.no_grad()
    def _encode_frozen(
        self, ids: Int[Tensor, "batch text"], is_seen: Bool[Tensor, "batch text"]
    ) -> tuple[Float[Tensor, "batch text features"], Float[Tensor, "batch features"]]:
        """Run the frozen network; on a CPU one prompt at a time, so bits ignore the batch."""
        tokenizer, network = self._load()
        network.to(ids.device)
        filled = ids.masked_fill(ids < 0, tokenizer.pad_token_id or 0)
        size = 1 if ids.device.type == "cpu" else max(len(ids), 1)
        words: list[Tensor] = []
        pooled: list[Tensor] = []
        for rows, seen in zip(filled.split(size), is_seen.split(size), strict=True):
            out = network(input_ids=rows, attention_mask=seen.long())
            weight = seen[..., None].to(out.last_hidden_state.dtype)
            mean = (out.last_hidden_state * weight).sum(1) / weight.sum(1)
            words.append(out.last_hidden_state)
            pooled.append(out.pooler_output if "pooler_output" in out else mean)
        dtype = self.null_word.dtype
        return torch.cat(words).to(dtype), torch.cat(pooled).to(dtype)

    def _read_config(self) -> Any:
        """Read the checkpoint's config and check its kind."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.config.path, subfolder=self.config.subfolder)
        if config.model_type not in ENCODER_CLASSES:
            raise ModelError(
                f"text encoder {self.config.path!r} is of kind {config.model_type!r}; "
                f"allowed kinds are {', '.join(ENCODER_CLASSES)}"
            )
        return config

    def _read_width(self) -> int:
        """Return the feature width of the checkpoint, and check its longest prompt."""
        config = self._read_config()
        text = config.text_config if config.model_type == "clip" else config
        longest = getattr(text, "max_position_embeddings", None)
        if longest is not None and self.config.max_tokens > longest:
            raise UsageError(
                f"max_tokens must be at most {longest} for {self.config.path!r}, got "
                f"{self.config.max_tokens}; nearest legal value is {longest}"
            )
        return text.hidden_size

    def _load(self) -> tuple[Any, Any]:
        """Return tokenizer and frozen network, reading them at the first call."""
        if not self._frozen:
            import transformers

            settings = self.config
            encoder = getattr(transformers, ENCODER_CLASSES[self._read_config().model_type])
            network = encoder.from_pretrained(
                settings.path, subfolder=settings.subfolder, use_safetensors=True
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                settings.path, subfolder=settings.tokenizer_subfolder
            )
            self._frozen[:] = [tokenizer, network.eval().requires_grad_(False)]
        return self._frozen[0], self._frozen[1]
