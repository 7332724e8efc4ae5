"""The causal video autoencoder: streams equal whole clips bit for bit, and nothing looks ahead."""

import itertools

import pytest
import torch
from einops import rearrange
from safetensors.torch import load, save

from blockloom.tokenizers.video_base import StreamState, VideoTokenizer
from blockloom.tokenizers.video_build import build_video_tokenizer, load_video_tokenizer

SIZES = {
    "frame_size": (8, 12),
    "spatial_stride": 4,
    "widths": (8, 8, 16),
    "encoder_depths": (1, 1, 1),
    "decoder_depths": (1, 1, 1),
    "latent_channels": 3,
}


def make(kind="video_kl", **settings):
    torch.manual_seed(0)
    tokenizer = build_video_tokenizer({"kind": kind, **SIZES, **settings}).eval()
    with torch.no_grad():
        # Zero-initialised branches would hide mistakes in them.
        for parameter in tokenizer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        tokenizer.latent_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
        tokenizer.latent_std.copy_(torch.tensor([0.5, 0.8, 1.1]))
    return tokenizer


def clip(frames, batch=1, size=(8, 12)):
    rng = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, *size, generator=rng) * 2 - 1


def chunkings(total):
    """Every way to write `total` as an ordered sum."""
    for cuts in itertools.product((False, True), repeat=total - 1):
        ends = [place + 1 for place, cut in enumerate(cuts) if cut] + [total]
        yield [b - a for a, b in itertools.pairwise([0, *ends])]


def stream(advance, inputs, sizes, axis):
    state, outputs = None, []
    for chunk in inputs.split(sizes, dim=axis):
        output, state = advance(chunk, state)
        outputs.append(output)
    return torch.cat(outputs, dim=3 - axis), state


@torch.no_grad()
@pytest.mark.parametrize("temporal_stride", [1, 2, 4])
def test_every_chunking_encodes_and_decodes_the_same_bits(temporal_stride):
    tokenizer = make(temporal_stride=temporal_stride)
    pixels = clip(5)
    latents = tokenizer.encode(pixels)
    decoded = tokenizer.decode(latents)
    assert latents.shape == (1, 1 + 4 // temporal_stride, 6, 3)
    assert decoded.shape == pixels.shape and decoded.std() > 0.01
    for sizes in chunkings(5):
        assert torch.equal(stream(tokenizer.encode_chunk, pixels, sizes, 2)[0], latents), sizes
    for sizes in chunkings(latents.shape[1]):
        assert torch.equal(stream(tokenizer.decode_chunk, latents, sizes, 1)[0], decoded), sizes


@torch.no_grad()
def test_longer_clip_in_chunks_of_every_size():
    tokenizer = make(temporal_stride=4)
    pixels = clip(13)
    latents = tokenizer.encode(pixels)
    decoded = tokenizer.decode(latents)
    for size in (2, 3, 5, 8, 13):
        assert torch.equal(stream(tokenizer.encode_chunk, pixels, size, 2)[0], latents)
    for sizes in chunkings(4):
        assert torch.equal(stream(tokenizer.decode_chunk, latents, sizes, 1)[0], decoded)


@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 5])
def test_batch_has_the_bits_of_its_items(batch):
    tokenizer = make(temporal_stride=4)
    pixels = clip(5, batch)
    latents = tokenizer.encode(pixels)
    assert torch.equal(latents, torch.cat([tokenizer.encode(item) for item in pixels.split(1)]))
    decoded = tokenizer.decode(latents)
    assert torch.equal(decoded, torch.cat([tokenizer.decode(item) for item in latents.split(1)]))


@torch.no_grad()
@pytest.mark.parametrize("temporal_stride", [1, 2, 4])
def test_steps_compute_what_training_computes(temporal_stride):
    tokenizer = make(temporal_stride=temporal_stride)
    pixels = clip(9, batch=2)
    encoded = tokenizer._mean(tokenizer.encoder(rearrange(pixels, "b c f h w -> b f c h w")))
    tokens = rearrange(encoded, "b f c h w -> b f (h w) c")
    latents = tokenizer.encode(pixels)
    expected = (tokens - tokenizer.latent_mean) / tokenizer.latent_std
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)
    frames = rearrange(tokenizer.decoder(encoded), "b f c h w -> b c f h w").clamp(-1, 1)
    torch.testing.assert_close(tokenizer.decode(latents), frames, atol=1e-5, rtol=1e-5)


def test_gradients_never_reach_the_future():
    tokenizer = make(temporal_stride=4)
    frames = rearrange(clip(9), "b c f h w -> b f c h w").requires_grad_()
    tokenizer.encoder(frames)[:, 1].square().sum().backward()
    reach = frames.grad.abs().sum(dim=(0, 2, 3, 4))
    assert (reach[:5] > 0).all() and (reach[5:] == 0).all()
    latents = torch.randn(1, 3, 3, 2, 3, requires_grad=True)
    decoded = tokenizer.decoder(latents)
    decoded[:, 1:5].square().sum().backward()
    reach = latents.grad.abs().sum(dim=(0, 2, 3, 4))
    assert (reach[:2] > 0).all() and reach[2] == 0


@torch.no_grad()
def test_the_first_frame_is_a_clip_of_its_own():
    tokenizer = make(temporal_stride=4)
    pixels = clip(9)
    latents = tokenizer.encode(pixels)
    assert torch.equal(tokenizer.encode(pixels[:, :, :1]), latents[:, :1])
    assert torch.equal(tokenizer.decode(latents[:, :1]), tokenizer.decode(latents)[:, :, :1])
    assert [tokenizer.num_latents(n) for n in (1, 5, 49)] == [1, 2, 13]
    assert [tokenizer.num_frames(n) for n in (1, 2, 13)] == [1, 5, 49]


@torch.no_grad()
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_state_travels_through_safetensors_and_rewinds(direction):
    tokenizer = make(temporal_stride=4)
    axis = 2 if direction == "encode" else 1
    advance = tokenizer.encode_chunk if axis == 2 else tokenizer.decode_chunk
    inputs = clip(9, batch=2) if axis == 2 else torch.randn(2, 3, 6, 3)
    cut = 7 if axis == 2 else 2
    head, tail = inputs.split([cut, inputs.shape[axis] - cut], dim=axis)
    _, state = advance(head)
    before = {name: kept.clone() for name, kept in state.snapshot().items()}
    expected, after = advance(tail, state)
    assert expected.shape[3 - axis] > 0
    # The first call left the state as it was, so it rewinds the stream.
    assert torch.equal(advance(tail, state)[0], expected)
    assert all(torch.equal(kept, before[name]) for name, kept in state.snapshot().items())
    restored = StreamState.restore(load(save(state.snapshot())))
    assert (restored.direction, restored.steps) == (direction, 2)
    again, end = advance(tail, restored)
    assert torch.equal(again, expected)
    assert all(torch.equal(kept, end.features[name]) for name, kept in after.features.items())


@torch.no_grad()
def test_rows_of_a_state_go_on_alone():
    tokenizer = make(temporal_stride=2)
    latents = torch.randn(3, 3, 6, 3)
    decoded = tokenizer.decode(latents)
    _, state = tokenizer.decode_chunk(latents[:, :2])
    rows = torch.tensor([2, 0])
    assert state.batch_size == 3
    tail, _ = tokenizer.decode_chunk(latents[rows, 2:], state.select(rows))
    assert torch.equal(tail, decoded[rows, :, 3:])


@torch.no_grad()
@pytest.mark.parametrize(("temporal_stride", "batch"), [(1, 1), (2, 2), (4, 1)])
def test_state_bytes_are_foretold(temporal_stride, batch):
    tokenizer = make(temporal_stride=temporal_stride)
    most = tokenizer.estimate_state_bytes(batch, "encode")
    sizes = []
    state = None
    for frame in clip(4 * temporal_stride, batch).split(1, dim=2):
        _, state = tokenizer.encode_chunk(frame, state)
        sizes.append(state.num_bytes)
    assert max(sizes) == most
    _, state = tokenizer.decode_chunk(torch.randn(batch, 4, 6, 3))
    assert state.num_bytes == tokenizer.estimate_state_bytes(batch, "decode") > 0


@torch.no_grad()
def test_incomplete_steps_wait():
    tokenizer, whole = make(temporal_stride=4), clip(5)
    latents, state = tokenizer.encode_chunk(whole[:, :, :4])
    assert latents.shape == (1, 1, 6, 3)
    assert state.waiting.shape[2] == 3 and state.steps == 1
    nothing, later = tokenizer.encode_chunk(whole[:, :, :0], state)
    assert nothing.shape == (1, 0, 6, 3) and later.waiting.shape[2] == 3
    rest, done = tokenizer.encode_chunk(whole[:, :, 4:], later)
    assert torch.equal(torch.cat((latents, rest), 1), tokenizer.encode(whole))
    assert done.steps == 2 and done.waiting.shape[2] == 0


@pytest.mark.parametrize(
    ("frames", "message"),
    [(0, r"0 frames.*4n\+1, nearest 1"), (2, "nearest 1"), (4, "nearest 5"), (12, "nearest 13")],
)
def test_illegal_frame_counts_are_named(frames, message):
    tokenizer = make(temporal_stride=4)
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(torch.zeros(1, 3, frames, 8, 12))
    with pytest.raises(ValueError, match=message):
        tokenizer.loss(torch.zeros(1, 3, frames, 8, 12))
    with pytest.raises(ValueError, match=message):
        tokenizer.num_latents(frames)


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    tokenizer = make(temporal_stride=4)
    with pytest.raises(ValueError, match=r"\[1, 3, 5, 8, 8\].*frames, 8, 12\]"):
        tokenizer.encode(torch.zeros(1, 3, 5, 8, 8))
    with pytest.raises(ValueError, match=r"\[1, 2, 5, 3\].*latent frames, 6, 3\]"):
        tokenizer.decode(torch.zeros(1, 2, 5, 3))
    with pytest.raises(ValueError, match="0 latent frames"):
        tokenizer.decode(torch.zeros(1, 0, 6, 3))
    _, state = tokenizer.encode_chunk(clip(5))
    with pytest.raises(ValueError, match="stream that encodes; decode_chunk"):
        tokenizer.decode_chunk(torch.zeros(1, 1, 6, 3), state)
    with pytest.raises(ValueError, match="only the number of frames"):
        tokenizer.encode_chunk(clip(4, batch=2), state)
    with pytest.raises(ValueError, match=r"'stem'.*another tokenizer"):
        make(temporal_stride=4, widths=(16, 8, 16), spatial_stride=8, frame_size=(8, 16)).encoder(
            torch.zeros(1, 4, 3, 8, 16), _tape(state)
        )
    with pytest.raises(ValueError, match="no 'steps'"):
        StreamState.restore({"direction": torch.tensor(0)})


def _tape(state):
    from blockloom.tokenizers.causal_conv import Tape

    return Tape(state.features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temporal_stride": 3}, "temporal_stride is 3.*1, 2, 4, nearest 2"),
        ({"temporal_stride": 4, "widths": (8, 16)}, "with 2 widths allowed 1, 2, nearest 2"),
        ({"spatial_stride": 2}, "spatial_stride is 2.*from 4 on, nearest 4"),
        ({"spatial_stride": 12}, "nearest 8"),
        ({"frame_size": (8, 10)}, "frame_size holds 10.*nearest 8"),
        ({"widths": (8, 12, 16)}, "widths holds 12"),
        ({"kind": "video_kk"}, "nearest video_kl"),
        ({"path": 3}, "no setting 'path'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)


@pytest.mark.parametrize("spatial_stride", [4, 8, 16])
def test_spatial_strides(spatial_stride):
    tokenizer = make(spatial_stride=spatial_stride, temporal_stride=2, frame_size=(16, 32))
    with torch.no_grad():
        latents = tokenizer.encode(clip(3, size=(16, 32)))
        assert latents.shape[1:3] == (2, 512 // spatial_stride**2)
        assert tokenizer.decode(latents).shape == (1, 3, 3, 16, 32)
        # Later frames are coded apart from earlier ones, at every stride.
        other = clip(3, size=(16, 32)).clone()
        other[:, :, 1:] *= -1
        again = tokenizer.encode(other)
    assert torch.equal(again[:, 0], latents[:, 0]) and not torch.equal(again[:, 1], latents[:, 1])


@pytest.mark.parametrize("kind", ["video_kl", "video_sigma"])
def test_protocol_storage_and_measured_latents(kind, tmp_path):
    tokenizer = make(kind, temporal_stride=2)
    assert isinstance(tokenizer, VideoTokenizer)
    assert tokenizer.value == "latent" and tokenizer.grid == (2, 3)
    pixels = clip(5, batch=3)
    tokenizer.measure_latents(pixels.split(2))
    with torch.no_grad():
        latents = tokenizer.encode(pixels)
    flat = latents.flatten(0, 2)
    torch.testing.assert_close(flat.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(0, correction=0), torch.ones(3), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="at least 1"):
        tokenizer.measure_latents([])
    tokenizer.save_pretrained(tmp_path)
    loaded = load_video_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    with torch.no_grad():
        assert torch.equal(loaded.encode(pixels), latents)
        assert torch.equal(loaded.decode(latents), tokenizer.decode(latents))


@pytest.mark.parametrize("kind", ["video_kl", "video_sigma"])
def test_loss_reaches_every_weight_and_is_seeded(kind):
    tokenizer = make(kind, temporal_stride=4).train()
    pixels = clip(5, batch=2)
    loss, metrics = tokenizer.loss(pixels, torch.Generator().manual_seed(1))
    loss.backward()
    assert [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert set(metrics) == {"l1", "mse", "edge", "psnr", "motion", "regulariser"}
    again, _ = tokenizer.loss(pixels, torch.Generator().manual_seed(1))
    other, _ = tokenizer.loss(pixels, torch.Generator().manual_seed(2))
    assert torch.equal(loss, again) and not torch.equal(loss, other)


def test_sigma_draws_one_scale_per_clip():
    tokenizer = make("video_sigma", temporal_stride=2, noise_std=0.8)
    # 40 frames of 2 x 3 cells, laid below each other as `loss` does.
    sample, _ = tokenizer.posterior_sample(torch.zeros(200, 3, 80, 3), torch.Generator())
    halves = sample.unflatten(2, (2, 40)).square().mean(dim=(1, 3, 4))
    torch.testing.assert_close(halves[:, 0], halves[:, 1], rtol=0.5, atol=1e-6)
    assert halves.mean() == pytest.approx(1.0, abs=0.3)
    assert halves.std() > 0.5


def moving_squares(count, rng, frames=5, size=8, side=4):
    """Coloured squares that move diagonally at constant speed and wrap round."""
    start = torch.randint(0, size, (count, 1, 2), generator=rng)
    speed = torch.randint(1, 3, (count, 1, 2), generator=rng)
    color = torch.rand(count, 3, generator=rng) * 2 - 1
    color[:, 0] = 1
    corner = start + torch.arange(frames)[:, None] * speed
    rows, columns = ((torch.arange(size) - corner[..., None]) % size < side).unbind(2)
    inside = rows[..., :, None] & columns[..., None, :]
    return torch.where(inside[:, None], color[:, :, None, None, None], -1.0)


def test_it_learns_moving_squares():
    torch.manual_seed(0)
    tokenizer = build_video_tokenizer(
        SIZES
        | {"kind": "video_kl", "frame_size": (8, 8), "temporal_stride": 2, "widths": (16, 32)}
        | {"encoder_depths": (1, 1), "decoder_depths": (1, 1), "latent_channels": 16}
        | {"absolute_weight": 0, "square_weight": 4, "edge_weight": 0, "motion_weight": 0}
    )
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=5e-3, betas=(0.9, 0.95))
    for _ in range(60):
        loss, _ = tokenizer.loss(moving_squares(8, rng), rng)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
    held_out = moving_squares(32, torch.Generator().manual_seed(9))
    tokenizer.eval().measure_latents([held_out])
    with torch.no_grad():
        decoded = tokenizer.decode(tokenizer.encode(held_out))
    error = float((decoded - held_out).square().mean())
    # Stronger than the mean frame of the data: the mean frame of every clip itself.
    mean_frame = held_out.mean(dim=2, keepdim=True)
    assert error < 0.8 * float((mean_frame - held_out).square().mean())
