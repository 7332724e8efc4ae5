"""Wan and CogVideoX: the adapters give what diffusers gives, and their streams stop anywhere."""

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan
from safetensors.torch import load, save

from blockloom.tokenizers.video_adapters import CogVideoXTokenizer, WanTokenizer
from blockloom.tokenizers.video_base import StreamState, VideoTokenizer
from blockloom.tokenizers.video_build import build_video_tokenizer, load_video_tokenizer

WAN = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [1.5, 2.0, 0.5, 1.0],
}
# The residual kind of Wan 2.2: pixels in patches, shortcuts that average and repeat.
WAN_PATCHED = WAN | {
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "dim_mult": [1, 1, 1],
}
COG = {
    "down_block_types": ("CogVideoXDownBlock3D",) * 3,
    "up_block_types": ("CogVideoXUpBlock3D",) * 3,
    "block_out_channels": (8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "temporal_compression_ratio": 4,
}
SIZE = (8, 16)


def wan(config):
    torch.manual_seed(0)
    return AutoencoderKLWan(**config).eval()


def cog():
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(**COG).eval()


def clip(frames, batch=1):
    rng = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, *SIZE, generator=rng) * 2 - 1


def to_tokens(grid):
    return grid.flatten(3).permute(0, 2, 3, 1)


def stream(advance, inputs, sizes, axis):
    """Advance chunk by chunk; the state goes through safetensors between any two."""
    state, outputs = None, []
    for chunk in inputs.split(sizes, dim=axis):
        output, state = advance(chunk, state)
        outputs.append(output)
        state = StreamState.restore(load(save(state.snapshot())))
    return torch.cat(outputs, dim=3 - axis), state


@torch.no_grad()
@pytest.mark.parametrize("config", [WAN, WAN_PATCHED], ids=["plain", "patched"])
@pytest.mark.parametrize("frames", [1, 5, 13])
def test_wan_parity(config, frames):
    inner = wan(config)
    tokenizer = WanTokenizer.wrap(inner, SIZE)
    pixels = clip(frames)
    mode = inner.encode(pixels).latent_dist.mode()
    shift, scale = torch.tensor(WAN["latents_mean"]), torch.tensor(WAN["latents_std"])
    latents = tokenizer.encode(pixels)
    assert latents.shape[1] == 1 + (frames - 1) // 4
    torch.testing.assert_close(latents, (to_tokens(mode) - shift) / scale, atol=1e-5, rtol=1e-5)
    decoded = tokenizer.decode(latents)
    assert decoded.std() > 0.01
    torch.testing.assert_close(decoded, inner.decode(mode).sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("config", [WAN, WAN_PATCHED], ids=["plain", "patched"])
def test_wan_streams_have_the_bits_of_the_whole(config):
    tokenizer = WanTokenizer.wrap(wan(config), SIZE)
    pixels = clip(13, batch=2)
    latents = tokenizer.encode(pixels)
    decoded = tokenizer.decode(latents)
    for sizes in ([1, 4, 8], [2, 3, 1, 7], [1] * 13):
        assert torch.equal(stream(tokenizer.encode_chunk, pixels, sizes, 2)[0], latents), sizes
    for sizes in ([1, 1, 1, 1], [3, 1]):
        assert torch.equal(stream(tokenizer.decode_chunk, latents, sizes, 1)[0], decoded), sizes
    assert torch.equal(tokenizer.decode(latents[1:]), decoded[1:])


@torch.no_grad()
def test_wan_keeps_nothing_in_the_module():
    """Two streams through one module do not mix, and neither does a whole clip in between."""
    tokenizer = WanTokenizer.wrap(wan(WAN), SIZE)
    one, two = torch.randn(2, 1, 3, 8, 4).unbind()
    expected = [tokenizer.decode(latents) for latents in (one, two)]
    parts, states = ([], []), [None, None]
    for step in range(3):
        for which, latents in enumerate((one, two)):
            frames, states[which] = tokenizer.decode_chunk(
                latents[:, step : step + 1], states[which]
            )
            parts[which].append(frames)
            tokenizer.encode(clip(5))
    assert all(
        torch.equal(torch.cat(p, dim=2), whole) for p, whole in zip(parts, expected, strict=True)
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_state_bytes_are_foretold(kind):
    config = WAN if kind == "wan" else COG
    tokenizer = build_video_tokenizer(
        {"kind": kind, "frame_size": SIZE, "autoencoder_config": config}
    ).eval()
    _, state = tokenizer.decode_chunk(torch.randn(2, 9 + tokenizer.step_latents - 1, 8, 4))
    assert state.num_bytes == tokenizer.estimate_state_bytes(2, "decode")
    _, state = tokenizer.encode_chunk(clip(17 + tokenizer.step_frames - 1))
    assert state.num_bytes == tokenizer.estimate_state_bytes(1, "encode")


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 9, 17])
def test_cogvideox_parity(frames):
    inner = cog()
    tokenizer = CogVideoXTokenizer.wrap(inner, SIZE)
    pixels = clip(frames)
    mode = inner.encode(pixels).latent_dist.mode()
    latents = tokenizer.encode(pixels)
    assert latents.shape[1] == 1 + (frames - 1) // 4
    torch.testing.assert_close(
        latents, to_tokens(mode) * inner.config.scaling_factor, atol=1e-6, rtol=1e-6
    )
    decoded = tokenizer.decode(latents)
    torch.testing.assert_close(
        decoded, inner.decode(mode).sample.clamp(-1, 1), atol=1e-5, rtol=1e-5
    )


@torch.no_grad()
def test_cogvideox_streams_have_the_bits_of_the_whole():
    tokenizer = CogVideoXTokenizer.wrap(cog(), SIZE)
    pixels = clip(17, batch=2)
    latents = tokenizer.encode(pixels)
    decoded = tokenizer.decode(latents)
    for sizes in ([1, 8, 3, 5], [16, 1]):
        assert torch.equal(stream(tokenizer.encode_chunk, pixels, sizes, 2)[0], latents), sizes
    for sizes in ([1, 1, 1, 1, 1], [4, 1]):
        assert torch.equal(stream(tokenizer.decode_chunk, latents, sizes, 1)[0], decoded), sizes
    assert torch.equal(tokenizer.encode(pixels[1:]), latents[1:])


def test_cogvideox_grouping_matters():
    """Why the groups are fixed: its norms see a whole group, so other groups give other pixels."""
    tokenizer = CogVideoXTokenizer.wrap(cog(), SIZE)
    latents = torch.randn(1, 5, 8, 4)
    with torch.no_grad():
        grouped = tokenizer.decode(latents)
        at_once, _ = tokenizer.decode_step(latents, {}, True)
    assert (grouped - at_once).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (3, "or 1, nearest 1"),
        (7, "nearest 9"),
        (16, r"16 frames.*8n\+1 from 9 on, or 1, nearest 17"),
    ],
)
def test_illegal_frame_counts_are_named(frames, message):
    tokenizer = CogVideoXTokenizer.wrap(cog(), SIZE)
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(clip(frames))
    with pytest.raises(ValueError, match=r"4 latent frames.*2n\+1 from 3 on"):
        tokenizer.decode(torch.zeros(1, 4, 8, 4))


@pytest.mark.parametrize("kind", ["wan", "cogvideox"])
def test_storage_loss_and_protocol(kind, tmp_path):
    torch.manual_seed(0)
    config = WAN if kind == "wan" else COG
    tokenizer = build_video_tokenizer(
        {"kind": kind, "frame_size": SIZE, "autoencoder_config": config}
    ).eval()
    assert isinstance(tokenizer, VideoTokenizer) and tokenizer.temporal_stride == 4
    tokenizer.save_pretrained(tmp_path)
    loaded = load_video_tokenizer(tmp_path)
    pixels = clip(9, batch=2)
    with torch.no_grad():
        latents = tokenizer.encode(pixels)
        assert torch.equal(loaded.encode(pixels), latents)
    loss, metrics = tokenizer.loss(pixels, torch.Generator().manual_seed(0))
    loss.backward()
    grads = {n: p.grad for n, p in tokenizer.named_parameters()}
    assert all(
        any(grads[n] is not None and grads[n].any() for n in grads if part in n)
        for part in ("encoder", "decoder")
    )
    again, _ = tokenizer.loss(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(loss, again)
    assert set(metrics) == {"l1", "mse", "edge", "psnr", "kl", "motion"}


def test_wan_refuses_clips_its_steps_or_cells_do_not_fill():
    tokenizer = WanTokenizer.wrap(wan(WAN), SIZE)
    with pytest.raises(ValueError, match=r"4n\+1, nearest 13"):
        tokenizer.encode(clip(12))
    with pytest.raises(ValueError, match=r"frame_size holds 10.*multiples of 4, nearest 8"):
        WanTokenizer.wrap(wan(WAN), (8, 10))
