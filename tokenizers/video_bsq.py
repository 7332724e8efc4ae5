"""Block-causal transformer tokenizer of clips with binary spherical quantisation.

Frames of any number are cut into patches; encoder and decoder are transformers in which a frame
sees itself and the last frames only, so a clip of any length streams at constant memory. A token
is a point on the unit sphere rounded to the signs of its axes: its codes are plain bits.

It does not know how codes are generated or stored.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config

# diffusers finds out how to load a component by looking for this name in its module.
from diffusers.models.modeling_utils import ModelMixin as ModelMixin
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from vector_quantize_pytorch import LFQ

from .base import check_codes, join_patches, split_patches
from .bsq import BSQTokenizer
from .causal_transformer import FrameTransformer
from .losses import reconstruction_loss
from .video_base import Direction, Features, check_clip, motion_loss
from .video_steps import SteppedTokenizer


class BSQTransformerTokenizer(ModelMixin, ConfigMixin, SteppedTokenizer):
    """Transformer autoencoder of clips whose tokens are bits; every frame is a step.

    Source: BSQ-ViT (arXiv:2406.07548), sections 3 and 4; differs: rotary positions beside the
    learned ones of a frame, a window of frames instead of all, each group of bits on its own
    sphere, pixel, edge and motion errors instead of perceptual and adversarial losses.
    """

    value = "code"
    temporal_stride = 1
    latent_channels = 0

    @register_to_config
    def __init__(
        self,
        frame_size: Sequence[int] = (64, 64),
        patch: int = 8,
        dim: int = 128,
        encoder_depth: int = 4,
        decoder_depth: int = 4,
        heads: int = 4,
        window: int = 4,
        mlp_ratio: float = 4.0,
        bits: int = 9,
        num_codebooks: int = 2,
        entropy_weight: float = 0.02,
        diversity: float = 1.0,
        inverse_temperature: float = 4.0,
        absolute_weight: float = 1.0,
        square_weight: float = 2.0,
        edge_weight: float = 1.0,
        motion_weight: float = 0.5,
    ):
        """Build the network.

        Args:
            frame_size: Height and width of a frame, in pixels; multiples of `patch`.
            patch: Side of a patch, and so of a token, in pixels.
            dim: Width of a token inside the transformers.
            encoder_depth: Layers of the encoder.
            decoder_depth: Layers of the decoder.
            heads: Attention heads; each has an even number of channels.
            window: Frames a frame sees, its own counted; the memory of a stream.
            mlp_ratio: Inner width of an MLP over `dim`.
            bits: Bits of a code, 1..16; a code has 2^bits values.
            num_codebooks: Codes per token; a token has `bits * num_codebooks` bits.
            entropy_weight: Loss weight of the entropy term.
            diversity: Weight of the batch entropy inside that term.
            inverse_temperature: Sharpness of the soft assignment the entropies are taken of.
            absolute_weight: Loss weight of the absolute error.
            square_weight: Loss weight of the squared error.
            edge_weight: Loss weight of the edge error.
            motion_weight: Loss weight of the error of frame-to-frame change.

        Raises:
            ValueError: A setting out of its range, or sizes that do not fit together.
        """
        super().__init__()
        check_transformer(frame_size, patch, dim, heads)
        _check_counts(
            encoder_depth=encoder_depth,
            decoder_depth=decoder_depth,
            window=window,
            num_codebooks=num_codebooks,
        )
        if not 1 <= bits <= 16:
            raise ValueError(f"bits is {bits}; allowed 1..16, nearest {min(max(bits, 1), 16)}")
        self.frame_size = (frame_size[0], frame_size[1])
        self.grid = (frame_size[0] // patch, frame_size[1] // patch)
        self.num_codebooks, self.codebook_size = num_codebooks, 2**bits
        width, channels = 3 * patch**2, bits * num_codebooks
        self.embed = nn.Linear(width, dim)
        self.encoder: Any = FrameTransformer(
            self.grid, dim, encoder_depth, heads, window, mlp_ratio
        )
        self.to_bits = nn.Linear(dim, channels)
        self.quantizer = LFQ(
            dim=channels,
            codebook_size=self.codebook_size,
            num_codebooks=num_codebooks,
            keep_num_codebooks_dim=True,
            spherical=True,
            entropy_loss_weight=entropy_weight,
            diversity_gamma=diversity,
        )
        self.from_bits = nn.Linear(channels, dim)
        self.decoder: Any = FrameTransformer(
            self.grid, dim, decoder_depth, heads, window, mlp_ratio
        )
        self.to_pixels = nn.Linear(dim, width)

    # A frame's tokens meet the quantiser as a picture's do.
    quantize = BSQTokenizer.quantize

    @property
    def bits_per_token(self) -> int:
        """Bits of a token, all its codes together."""
        return int(self.config["bits"]) * self.num_codebooks

    def encode_step(
        self, frames: Float[Tensor, "batch 3 1 height width"], features: Features, is_first: bool
    ) -> tuple[Int[Tensor, "batch 1 tokens codebooks"], Features]:
        """Encode one frame.

        Args:
            frames: Pixels in [-1, 1].
            features: Cache of the frames before; empty on the first.
            is_first: Whether a stream starts here.
        """
        patches = split_patches(frames[:, :, 0], self.config["patch"])
        encoded, kept = self.encoder.step(self.embed(patches), features)
        _, codes, _ = self.quantize(self.to_bits(encoded))
        return codes.long()[:, None], kept

    def decode_step(
        self, values: Int[Tensor, "batch 1 tokens codebooks"], features: Features, is_first: bool
    ) -> tuple[Float[Tensor, "batch 3 1 height width"], Features]:
        """Decode one frame, clamped to [-1, 1].

        Args:
            values: Codes.
            features: Cache of the frames before; empty on the first.
            is_first: Whether a stream starts here.

        Raises:
            ValueError: A code outside the codebook.
        """
        codes = values[:, 0]
        if not codes.is_meta:
            check_codes(codes, self.num_tokens, self.num_codebooks, self.codebook_size)
        signs = self.quantizer.indices_to_codes(codes).to(self.dtype)
        decoded, kept = self.decoder.step(self.from_bits(signs), features)
        pixels = join_patches(self.to_pixels(decoded), self.grid, self.config["patch"])
        return pixels.clamp(-1, 1)[:, :, None], kept

    def loss(
        self,
        pixels: Float[Tensor, "batch 3 frames height width"],
        generator: torch.Generator | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, float]]:
        """Return the reconstruction loss plus the entropy term.

        The whole clip passes at once: the same function as the steps, without their bits.

        Args:
            pixels: Clips in [-1, 1].
            generator: Unused; no noise is drawn.

        Raises:
            ValueError: Frames of another size, or no frame.
        """
        check_clip(pixels, self.frame_size)
        self._check_frames(pixels.shape[2])
        frames, entropy = self._reconstruct(pixels)
        total, metrics = reconstruction_loss(
            rearrange(frames, "b c f h w -> (b f) c h w"),
            rearrange(pixels, "b c f h w -> (b f) c h w"),
            absolute_weight=self.config["absolute_weight"],
            square_weight=self.config["square_weight"],
            edge_weight=self.config["edge_weight"],
        )
        motion = motion_loss(frames, pixels)
        metrics["motion"] = float(motion.detach())
        metrics["entropy"] = float(entropy.detach())
        return total + self.config["motion_weight"] * motion + entropy, metrics

    def estimate_state_bytes(self, batch_size: int, direction: Direction) -> int:
        """Return the bytes a stream's state holds: the whole cache, from the first frame on.

        Args:
            batch_size: Streams side by side.
            direction: "encode" or "decode".
        """
        stack = self.encoder if direction == "encode" else self.decoder
        kept = stack.new_cache(batch_size, self.dtype, torch.device("cpu")).snapshot()
        number = 8 * batch_size  # of the next frame
        return number + sum(tensor.numel() * tensor.element_size() for tensor in kept.values())

    def _reconstruct(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pass whole clips through encoder, quantiser and decoder; not clamped."""
        count, patch = pixels.shape[2], self.config["patch"]
        flat = split_patches(rearrange(pixels, "b c f h w -> (b f) c h w"), patch)
        patches = rearrange(self.embed(flat), "(b f) n d -> b f n d", f=count)
        encoded = rearrange(self.to_bits(self.encoder(patches)), "b f n c -> b (f n) c")
        quantized, _, entropy = self.quantize(encoded)
        signs = rearrange(quantized, "b (f n) c -> b f n c", f=count).to(self.dtype)
        decoded = self.to_pixels(self.decoder(self.from_bits(signs)))
        images = join_patches(rearrange(decoded, "b f n c -> (b f) n c"), self.grid, patch)
        return rearrange(images, "(b f) c h w -> b c f h w", f=count), entropy


def check_transformer(frame_size: Sequence[int], patch: int, dim: int, heads: int) -> None:
    """Refuse frames that patches do not tile and heads that do not split the width.

    Raises:
        ValueError: With the nearest legal value.
    """
    if patch < 1:
        raise ValueError(f"patch is {patch}; it must be at least 1, nearest 1")
    if len(frame_size) != 2:
        raise ValueError(f"frame_size is {list(frame_size)}; it must be [height, width]")
    for side in frame_size:
        if side < patch or side % patch:
            nearest = max(patch, round(side / patch) * patch)
            raise ValueError(
                f"frame_size holds {side}; multiples of patch {patch} only, nearest {nearest}"
            )
    if heads < 1 or dim < 2 or dim % (2 * heads):
        legal = [number for number in range(1, max(dim, 2) + 1) if dim % (2 * number) == 0] or [1]
        nearest = min(legal, key=lambda number: abs(number - heads))
        raise ValueError(
            f"heads is {heads}; it must split dim {dim} into even parts, nearest {nearest}"
        )


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1, nearest 1")
