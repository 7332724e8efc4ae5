"""The block-causal transformer tokenizer: chunks, batches, causality, window, storage, errors."""

import itertools

import pytest
import torch
from safetensors.torch import load, save

from blockloom.tokenizers.video_base import StreamState, VideoTokenizer
from blockloom.tokenizers.video_build import build_video_tokenizer, load_video_tokenizer

SIZES = {
    "kind": "bsq_transformer",
    "frame_size": (8, 12),
    "patch": 4,
    "dim": 24,
    "heads": 2,
    "encoder_depth": 2,
    "decoder_depth": 2,
    "window": 3,
    "bits": 3,
    "num_codebooks": 2,
}


def make(**settings):
    torch.manual_seed(0)
    return build_video_tokenizer({**SIZES, **settings}).eval()


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
@pytest.mark.parametrize("window", [1, 3, 8])
def test_every_chunking_encodes_and_decodes_the_same_bits(window):
    tokenizer = make(window=window)
    pixels = clip(5)
    codes = tokenizer.encode(pixels)
    decoded = tokenizer.decode(codes)
    assert codes.shape == (1, 5, 6, 2) and codes.dtype == torch.int64
    assert codes.unique().numel() > 4 and 0 <= codes.min() and codes.max() < 8
    assert decoded.shape == pixels.shape and decoded.std() > 0.01
    for sizes in chunkings(5):
        assert torch.equal(stream(tokenizer.encode_chunk, pixels, sizes, 2)[0], codes), sizes
        assert torch.equal(stream(tokenizer.decode_chunk, codes, sizes, 1)[0], decoded), sizes


@torch.no_grad()
@pytest.mark.parametrize("batch", [2, 5])
def test_batch_has_the_bits_of_its_items(batch):
    tokenizer = make()
    pixels = clip(5, batch)
    codes = tokenizer.encode(pixels)
    assert torch.equal(codes, torch.cat([tokenizer.encode(item) for item in pixels.split(1)]))
    decoded = tokenizer.decode(codes)
    assert torch.equal(decoded, torch.cat([tokenizer.decode(item) for item in codes.split(1)]))


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 8])
def test_steps_compute_what_training_computes(window):
    tokenizer = make(window=window).double()
    pixels = clip(7, batch=2).double()
    # Not closer: the quantiser itself always runs in float32.
    expected, _ = tokenizer._reconstruct(pixels)
    decoded = tokenizer.decode(tokenizer.encode(pixels))
    torch.testing.assert_close(decoded, expected.clamp(-1, 1), atol=1e-6, rtol=0)


@torch.no_grad()
def test_frames_see_the_window_and_nothing_later():
    # With two layers a frame reaches two windows back: 2 * (window - 1) frames.
    tokenizer = make(window=3)
    codes = torch.randint(8, (1, 9, 6, 2), generator=torch.Generator().manual_seed(0))
    decoded = tokenizer.decode(codes)
    changed = codes.clone()
    changed[:, 2] = 7 - changed[:, 2]
    differs = (tokenizer.decode(changed) != decoded).flatten(3).any(-1)[0, 0]
    assert differs.tolist() == [False, False, True, True, True, True, True, False, False]


def test_gradients_never_reach_the_future():
    tokenizer = make(window=8).train()
    frames = torch.randn(1, 5, 6, 24, requires_grad=True)
    tokenizer.encoder(frames)[:, 2].square().sum().backward()
    reach = frames.grad.abs().sum(dim=(0, 2, 3))
    assert (reach[:3] > 0).all() and (reach[3:] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_state_travels_rewinds_and_is_constant(direction):
    tokenizer = make()
    axis = 2 if direction == "encode" else 1
    advance = tokenizer.encode_chunk if axis == 2 else tokenizer.decode_chunk
    inputs = clip(9, batch=2) if axis == 2 else torch.randint(8, (2, 9, 6, 2))
    head, tail = inputs.split([5, 4], dim=axis)
    _, state = advance(head)
    before = {name: kept.clone() for name, kept in state.snapshot().items()}
    expected, after = advance(tail, state)
    # The first call left the state as it was, so it rewinds the stream.
    assert torch.equal(advance(tail, state)[0], expected)
    assert all(torch.equal(kept, before[name]) for name, kept in state.snapshot().items())
    restored = StreamState.restore(load(save(state.snapshot())))
    assert (restored.direction, restored.steps) == (direction, 5)
    assert torch.equal(advance(tail, restored)[0], expected)
    one, _ = advance(tail[1:], state.select(torch.tensor([1])))
    assert torch.equal(one, expected[1:])
    assert state.num_bytes == after.num_bytes == tokenizer.estimate_state_bytes(2, direction)


@torch.no_grad()
def test_a_long_stream_never_goes_wrong():
    tokenizer = make(window=2)
    state = None
    for _ in range(20):
        codes, state = tokenizer.encode_chunk(clip(3), state)
        assert codes.shape[1] == 3
    assert state.steps == 60 and torch.isfinite(state.features["keys.0"]).all()
    # A still picture, seen for ever, gives the same codes for ever.
    still = clip(1).expand(-1, -1, 30, -1, -1)
    codes = tokenizer.encode(still)
    assert (codes[:, 10:] == codes[:, 9:10]).float().mean() > 0.98


def test_protocol_storage_and_bits(tmp_path):
    tokenizer = make()
    assert isinstance(tokenizer, VideoTokenizer)
    assert (tokenizer.value, tokenizer.grid, tokenizer.codebook_size) == ("code", (2, 3), 8)
    assert tokenizer.bits_per_token == 6
    assert [tokenizer.num_latents(n) for n in (1, 2, 49)] == [1, 2, 49]
    pixels = clip(4)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_video_tokenizer(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded.encode(pixels), tokenizer.encode(pixels))


def test_loss_reaches_every_weight():
    tokenizer = make().train()
    loss, metrics = tokenizer.loss(clip(4, batch=2))
    loss.backward()
    assert [n for n, p in tokenizer.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert set(metrics) == {"l1", "mse", "edge", "psnr", "motion", "entropy"}
    black, _ = tokenizer.loss(-torch.ones(1, 3, 2, 8, 12))
    assert torch.isfinite(black)


@torch.no_grad()
def test_what_does_not_fit_is_refused():
    tokenizer = make()
    with pytest.raises(ValueError, match=r"\[1, 3, 5, 8, 8\].*frames, 8, 12\]"):
        tokenizer.encode(torch.zeros(1, 3, 5, 8, 8))
    with pytest.raises(ValueError, match="0 frames"):
        tokenizer.loss(torch.zeros(1, 3, 0, 8, 12))
    with pytest.raises(ValueError, match=r"codes have shape \[1, 2, 5, 2\]"):
        tokenizer.decode(torch.zeros(1, 2, 5, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"codes span 8\.\.8; legal values are 0\.\.7"):
        tokenizer.decode(torch.full((1, 2, 6, 2), 8))
    _, state = tokenizer.encode_chunk(clip(2))
    with pytest.raises(ValueError, match="stream that encodes"):
        tokenizer.decode_chunk(torch.zeros(1, 1, 6, 2, dtype=torch.long), state)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch": 5}, "frame_size holds 8; multiples of patch 5 only, nearest 10"),
        ({"patch": 0}, "patch is 0.*nearest 1"),
        ({"heads": 5}, "heads is 5; it must split dim 24.*nearest 4"),
        ({"window": 0}, "window is 0.*nearest 1"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
        ({"bits": 17}, r"bits is 17; allowed 1\.\.16, nearest 16"),
        ({"num_codebooks": 0}, "num_codebooks is 0"),
        ({"frame_size": (8,)}, r"frame_size is \[8\]"),
        ({"windw": 3}, "no setting 'windw'.*nearest window"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make(**settings)
