"""The adapters give exactly what the diffusers modules they wrap give."""

import torch
from diffusers import AutoencoderKL, VQModel

from blockloom.tokenizers.adapters import AutoencoderKLTokenizer, VQModelTokenizer

BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}


@torch.no_grad()
def test_autoencoder_kl_parity():
    torch.manual_seed(0)
    inner = AutoencoderKL(**BLOCKS, scaling_factor=0.5, shift_factor=0.1).eval()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    tokenizer = AutoencoderKLTokenizer.wrap(inner, 16)
    latents = tokenizer.encode(pixels)
    mode = inner.encode(pixels).latent_dist.mode()
    expected = ((mode - 0.1) * 0.5).flatten(2).transpose(1, 2)
    assert torch.equal(latents, expected)
    torch.testing.assert_close(
        tokenizer.decode(latents), inner.decode(mode).sample.clamp(-1, 1), atol=1e-6, rtol=1e-5
    )
    assert tokenizer.grid == (8, 8)


@torch.no_grad()
def test_vq_model_parity():
    torch.manual_seed(0)
    inner = VQModel(**BLOCKS, num_vq_embeddings=20).eval()
    # Fresh entries are so small that all features would fall to one of them.
    inner.quantize.embedding.weight.normal_()
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    tokenizer = VQModelTokenizer.wrap(inner, 16)
    codes = tokenizer.encode(pixels)
    assert len(codes.unique()) > 1
    expected = inner.decode(inner.encode(pixels).latents).sample.clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(codes), expected, atol=1e-6, rtol=1e-5)
