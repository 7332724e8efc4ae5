"""Motion tokenizers: streams equal whole clips bit for bit, nothing looks ahead, units return."""

import itertools

import pytest
import torch
from safetensors.torch import load, save

from blockloom.tokenizers.motion_base import (
    HUMAN_GROUPS,
    drift_error,
    group_weights,
    motion_errors,
)
from blockloom.tokenizers.motion_conv import MotionConv
from blockloom.tokenizers.video_base import StreamState, VideoTokenizer
from blockloom.tokenizers.video_build import build_video_tokenizer, load_video_tokenizer

NETWORK = {"features": 5, "groups": (2, 3), "width": 8, "dilations": (3, 1)}
CODES = {"codebook_size": 7, "code_dim": 4}
CONFIGS = {
    "features": {"features": 5, "groups": (2, 3)},
    "motion_sigma": NETWORK | {"latent_channels": 3},
    "motion_vq": NETWORK | CODES,
    "motion_rvq": NETWORK | CODES | {"levels": 3},
}
TRAINED = ["motion_sigma", "motion_vq", "motion_rvq"]


def make(kind="motion_rvq", **settings):
    torch.manual_seed(0)
    tokenizer = build_video_tokenizer({"kind": kind, **CONFIGS[kind], **settings}).eval()
    with torch.no_grad():
        # Zero-initialised branches would hide mistakes in them.
        for parameter in tokenizer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
        tokenizer.feature_mean.copy_(torch.tensor([1.0, -2, 3, 0, 5])[:, None])
        tokenizer.feature_std.copy_(torch.tensor([0.5, 0.5, 2, 2, 2])[:, None])
        if kind == "motion_sigma":
            tokenizer.latent_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
            tokenizer.latent_std.copy_(torch.tensor([0.5, 0.8, 1.1]))
    return tokenizer


def clip(frames, batch=1, features=5):
    rng = torch.Generator().manual_seed(frames)
    return torch.randn(batch, features, frames, generator=rng) * 2 + 1


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
@pytest.mark.parametrize("kind", CONFIGS)
def test_every_chunking_encodes_and_decodes_the_same_bits(kind):
    tokenizer = make(kind)
    assert isinstance(tokenizer, VideoTokenizer)
    frames = clip(8)
    values = tokenizer.encode(frames)
    decoded = tokenizer.decode(values)
    width = tokenizer.latent_channels or 1
    assert values.shape == (1, 8 // tokenizer.temporal_stride, tokenizer.num_tokens, width)
    assert decoded.shape == frames.shape and decoded.std() > 0.01
    for sizes in chunkings(8):
        assert torch.equal(stream(tokenizer.encode_chunk, frames, sizes, 2)[0], values), sizes
    for sizes in chunkings(values.shape[1]):
        assert torch.equal(stream(tokenizer.decode_chunk, values, sizes, 1)[0], decoded), sizes


@torch.no_grad()
@pytest.mark.parametrize("kind", TRAINED)
def test_longer_clip_in_chunks_of_every_size(kind):
    tokenizer = make(kind)
    frames = clip(40)
    values = tokenizer.encode(frames)
    decoded = tokenizer.decode(values)
    for size in (1, 3, 4, 7, 16, 40):
        assert torch.equal(stream(tokenizer.encode_chunk, frames, size, 2)[0], values)
    for size in (1, 3, 10):
        assert torch.equal(stream(tokenizer.decode_chunk, values, size, 1)[0], decoded)


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_batch_has_the_bits_of_its_items(kind):
    tokenizer = make(kind)
    frames = clip(12, batch=3)
    values = tokenizer.encode(frames)
    assert torch.equal(values, torch.cat([tokenizer.encode(item) for item in frames.split(1)]))
    decoded = tokenizer.decode(values)
    assert torch.equal(decoded, torch.cat([tokenizer.decode(item) for item in values.split(1)]))


@torch.no_grad()
@pytest.mark.parametrize("stride", [2, 4, 8])
def test_steps_compute_what_training_computes(stride):
    tokenizer = make("motion_sigma", temporal_stride=stride)
    frames = clip(5 * stride, batch=2)
    encoded = tokenizer.encoder(tokenizer.standardise(frames))
    values = tokenizer.encode(frames)
    assert values.shape == (2, 5, 1, 3)
    torch.testing.assert_close(values, tokenizer.values_of(encoded), atol=1e-5, rtol=1e-5)
    whole = tokenizer.restore(tokenizer.decoder(encoded))
    torch.testing.assert_close(tokenizer.decode(values), whole, atol=1e-4, rtol=1e-4)


def test_gradients_never_reach_the_future():
    tokenizer = make("motion_sigma")
    frames = clip(12).requires_grad_()
    tokenizer.encoder(frames)[..., 1].square().sum().backward()
    reach = frames.grad.abs().sum(dim=(0, 1))
    assert (reach[:8] > 0).all() and (reach[8:] == 0).all()
    latents = torch.randn(1, 3, 3, requires_grad=True)
    tokenizer.decoder(latents)[..., 4:8].square().sum().backward()
    reach = latents.grad.abs().sum(dim=(0, 1))
    assert (reach[:2] > 0).all() and reach[2] == 0


@torch.no_grad()
def test_a_strided_dilated_layer_reads_the_frames_it_names():
    layer = MotionConv(1, 1, kernel=4, stride=2)
    layer.conv.weight.copy_(torch.tensor([[[1.0, 10, 100, 1000]]]))
    layer.conv.bias.zero_()
    frames = torch.tensor([[[1.0, 2, 3, 4]]])
    # Two zeros stand before the clip; the kernel ends on the second and the fourth frame.
    assert layer(frames)[0, 0].tolist() == [2100, 4321]
    layer = MotionConv(1, 1, kernel=2, dilation=3)
    layer.conv.weight.copy_(torch.tensor([[[1.0, 10]]]))
    layer.conv.bias.zero_()
    assert layer(torch.arange(1.0, 6)[None, None])[0, 0].tolist() == [10, 20, 30, 41, 52]


@torch.no_grad()
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_state_travels_through_safetensors_and_rewinds(direction):
    tokenizer = make("motion_rvq")
    axis = 2 if direction == "encode" else 1
    advance = tokenizer.encode_chunk if axis == 2 else tokenizer.decode_chunk
    rng = torch.Generator().manual_seed(1)
    inputs = clip(14, 2) if axis == 2 else torch.randint(0, 7, (2, 3, 3, 1), generator=rng)
    cut = 7 if axis == 2 else 2
    head, tail = inputs.split([cut, inputs.shape[axis] - cut], dim=axis)
    _, state = advance(head)
    expected, _ = advance(tail, state)
    assert torch.equal(advance(tail, state)[0], expected)
    restored = StreamState.restore(load(save(state.snapshot())))
    assert torch.equal(advance(tail, restored)[0], expected)
    rows = torch.tensor([1])
    assert torch.equal(advance(tail[1:], state.select(rows))[0], expected[1:])


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_state_bytes_are_foretold(kind):
    tokenizer = make(kind)
    most = tokenizer.estimate_state_bytes(2, "encode")
    sizes, state = [], None
    for frame in clip(20, 2).split(1, dim=2):
        _, state = tokenizer.encode_chunk(frame, state)
        sizes.append(state.num_bytes)
    assert max(sizes) == most
    _, state = tokenizer.decode_chunk(tokenizer.encode(clip(20, 2)))
    assert state.num_bytes == tokenizer.estimate_state_bytes(2, "decode")
    assert (most > 0) == (kind != "features")


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_stored_tokenizer_gives_the_same_values(kind, tmp_path):
    tokenizer, frames = make(kind), clip(8)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_video_tokenizer(tmp_path)
    values = tokenizer.encode(frames)
    # Mapped files are aligned otherwise than memory, and small kernels then sum otherwise.
    torch.testing.assert_close(loaded.encode(frames), values, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loaded.decode(values), tokenizer.decode(values))
    tokenizer.half().save_pretrained(tmp_path / "half")
    half = load_video_tokenizer(tmp_path / "half")
    twin = tokenizer.float().eval()
    assert torch.equal(half.encode(frames), twin.encode(frames))
    assert torch.equal(half.decode(values), twin.decode(values))


@torch.no_grad()
def test_feature_frames_come_back_as_they_were():
    tokenizer = make("features")
    frames = clip(6, batch=2)
    values = tokenizer.encode(frames)
    expected = (frames - tokenizer.feature_mean) / tokenizer.feature_std
    assert torch.equal(values, expected.transpose(1, 2)[:, :, None])
    torch.testing.assert_close(tokenizer.decode(values), frames, atol=1e-6, rtol=1e-6)
    assert tokenizer.loss(frames)[0] < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("kind", CONFIGS)
def test_features_are_measured_by_group(kind):
    tokenizer = make(kind)
    scale = torch.tensor([1.0, 3, 2, 2, 2])[:, None]
    frames = clip(40, batch=64) * scale + torch.arange(5.0)[:, None]
    tokenizer.measure_features(frames.split(20))
    standard = tokenizer.standardise(frames)
    torch.testing.assert_close(standard.mean(dim=(0, 2)), torch.zeros(5), atol=1e-5, rtol=0)
    variance = standard.var(dim=(0, 2), correction=0)
    torch.testing.assert_close(variance[:2].mean(), torch.tensor(1.0), atol=1e-4, rtol=0)
    # In a group the larger feature stays the larger one.
    assert 2.5 < (variance[1] / variance[0]).sqrt() < 3.5
    torch.testing.assert_close(tokenizer.restore(standard), frames, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="got 0 clips"):
        tokenizer.measure_features([])


def test_latents_are_measured():
    tokenizer = make("motion_sigma")
    frames = clip(40, batch=8)
    tokenizer.measure_latents(frames.split(3))
    with torch.no_grad():
        flat = tokenizer.encode(frames).flatten(0, 2)
    torch.testing.assert_close(flat.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)


@torch.no_grad()
def test_levels_add_up_and_may_be_left_out():
    tokenizer = make("motion_rvq")
    codes = tokenizer.encode(clip(12))
    books = [layer._codebook.embed[0] for layer in tokenizer.quantizer.layers]
    picked = [book[codes[0, :, level, 0]] for level, book in enumerate(books)]
    torch.testing.assert_close(tokenizer.latents_of(codes)[0].T, sum(picked))
    base = codes.clone()
    base[:, :, 1:] = -1
    torch.testing.assert_close(tokenizer.latents_of(base)[0].T, picked[0])
    assert not torch.equal(tokenizer.decode(base), tokenizer.decode(codes))
    # Each code is the entry nearest to what the levels before it left over.
    rest = tokenizer.encoder(tokenizer.standardise(clip(12)))[0].T
    for level, book in enumerate(books):
        assert torch.equal(torch.cdist(rest, book).argmin(1), codes[0, :, level, 0])
        rest = rest - picked[level]


@pytest.mark.parametrize("kind", TRAINED)
def test_loss_is_the_error_of_features_and_of_their_change(kind):
    tokenizer = make(kind, velocity_weight=0.5, group_loss=(1, 3), drift_weight=0.1)
    frames = clip(16, batch=4)
    generator = torch.Generator().manual_seed(3)
    loss, metrics = tokenizer.loss(frames, generator)
    again, _ = tokenizer.loss(frames, torch.Generator().manual_seed(3))
    assert torch.equal(loss, again)
    extra = metrics.get("quantizer", 1e-3 * metrics.get("regulariser", 0))
    torch.testing.assert_close(
        loss.detach(),
        torch.tensor(metrics["error"] + 0.5 * metrics["pace"] + 0.1 * metrics["drift"] + extra),
    )
    # Only in training do gradients pass the quantiser.
    tokenizer.train().loss(frames, generator)[0].backward()
    assert all(p.grad is not None and p.grad.any() for p in tokenizer.parameters())


def test_errors_are_weighted_by_group():
    weights = group_weights((1, 2), (3.0, 1.5))
    assert weights[:, 0].tolist() == [1.5, 0.75, 0.75]
    target = torch.zeros(1, 3, 2)
    frames = torch.tensor([[[2.0, 2], [0, 1], [0, 0]]])
    known = torch.ones(1, 2, dtype=torch.bool)
    error, pace = motion_errors(frames, target, weights, known)
    # Smooth absolute errors: 1.5 for 2, 0.5 for 1; six and three numbers.
    assert float(error) == pytest.approx((1.5 * 3 + 0.75 * 0.5) / 6)
    assert float(pace) == pytest.approx(0.75 * 0.5 / 3)
    assert motion_errors(frames[..., :1], target[..., :1], weights, known[:, :1])[1] == 0
    known[0, 1] = False
    error, pace = motion_errors(frames, target, weights, known)
    assert float(error) == pytest.approx(1.5 * 1.5 / 3) and pace == 0
    assert sum(HUMAN_GROUPS) == 263
    # The first feature is off by 2 and 2, so its sum by 2 and 4: 1.5 and 3.5.
    assert float(drift_error(frames, target, 1, torch.ones(1, 2).bool())) == pytest.approx(2.5)
    assert float(drift_error(frames, target, 2, known)) == pytest.approx(0.75)
    assert drift_error(frames, target, 0, known) == 0


@pytest.mark.parametrize("kind", ["motion_vq", "motion_rvq"])
def test_entries_move_in_training_only(kind):
    tokenizer = make(kind)
    before = {name: kept.clone() for name, kept in tokenizer.state_dict().items()}
    frames = clip(16, batch=8)
    tokenizer.train().encode(frames)
    assert all(torch.equal(kept, before[n]) for n, kept in tokenizer.state_dict().items())
    tokenizer.loss(frames, torch.Generator().manual_seed(0))
    moved = {n for n, kept in tokenizer.state_dict().items() if not torch.equal(kept, before[n])}
    assert any("embed" in name for name in moved) and all("quantizer" in n for n in moved)


def test_levels_are_dropped_as_often_as_asked():
    tokenizer = make("motion_rvq", level_dropout=0.5).train()
    latents = torch.randn(2, 4, 4)
    generator = torch.Generator().manual_seed(0)
    kept = []
    for _ in range(200):
        codes = tokenizer.quantize(latents, None, generator)[1]
        kept.append(int((codes[0, 0] >= 0).sum()))
    # A third of the dropped batches keep all three levels.
    assert set(kept) == {1, 2, 3} and 0.56 < kept.count(3) / 200 < 0.77


@pytest.mark.parametrize("rotation_trick", [False, True])
def test_codes_learn_to_tell_motions_apart(rotation_trick):
    settings = {"codebook_size": 8, "width": 16, "rotation_trick": rotation_trick}
    torch.manual_seed(0)
    tokenizer = build_video_tokenizer({"kind": "motion_rvq", **CONFIGS["motion_rvq"], **settings})
    rng = torch.Generator().manual_seed(0)
    time = torch.arange(16) / 16

    def swings(count):
        speed = torch.randint(1, 4, (count, 1, 1), generator=rng)
        phase = torch.arange(5)[None, :, None] / 5
        return 3 * torch.sin(6.283 * (speed * time + phase)) + 2

    assert [layer.rotation_trick for layer in tokenizer.quantizer.layers] == [rotation_trick] * 3
    tokenizer.measure_features([swings(64)])
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=5e-3)
    for _ in range(60):
        loss, _ = tokenizer.loss(swings(16), rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = swings(32)
    with torch.no_grad():
        codes = tokenizer.eval().encode(held_out)
        error = (tokenizer.decode(codes) - held_out).square().mean()
    assert error < 0.15 * held_out.var()


@pytest.mark.parametrize("rotation_trick", [False, True])
def test_one_codebook_turns_gradients_where_asked(rotation_trick):
    tokenizer = make("motion_vq", rotation_trick=rotation_trick)
    assert tokenizer.quantizer.rotation_trick == rotation_trick


def test_what_does_not_fit_is_refused():
    tokenizer = make("motion_rvq")
    with pytest.raises(ValueError, match=r"\[1, 4, 8\].*\[batch, 5, frames\]"):
        tokenizer.encode(torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match=r"7 frames.*4n\+4, nearest 8"):
        tokenizer.encode(torch.zeros(1, 5, 7))
    with pytest.raises(ValueError, match="0 frames"):
        tokenizer.loss(torch.zeros(1, 5, 0))
    with pytest.raises(ValueError, match="0 latent frames"):
        tokenizer.decode(torch.zeros(1, 0, 3, 1, dtype=torch.long))
    codes = torch.zeros(1, 2, 3, 1, dtype=torch.long)
    codes[0, 1, 2] = 7
    with pytest.raises(ValueError, match=r"0\.\.7; legal values are 0\.\.6; -1 leaves"):
        tokenizer.decode(codes)
    codes[0, 1] = -1
    with pytest.raises(ValueError, match=r"codes span -1\.\.-1"):
        tokenizer.decode(codes)
    with pytest.raises(ValueError, match=r"legal values are 0\.\.6$"):
        make("motion_vq").decode(torch.full((1, 1, 1, 1), -1))
    assert tokenizer.num_latents(12) == 3 and tokenizer.num_frames(3) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"features": 0}, "features is 0"),
        ({"groups": (2, 2)}, r"groups \[2, 2\] hold 4 features"),
        ({"group_loss": (1,)}, "weights has 1 numbers for 2 groups"),
        ({"group_loss": (0, 0)}, "one above 0"),
        ({"temporal_stride": 3}, "temporal_stride is 3; allowed 2, 4, 8, nearest 2"),
        ({"width": 0}, "width is 0"),
        ({"dilations": (0,)}, "dilations holds 0"),
        ({"dropout": 1.0}, r"dropout is 1\.0"),
        ({"levels": 1}, "levels is 1.*take motion_vq"),
        ({"level_dropout": 1.5}, r"level_dropout is 1\.5"),
        ({"kind": "motion_rvk"}, "nearest motion_rvq"),
    ],
)
def test_bad_settings_are_named(settings, message):
    config = {"kind": "motion_rvq", **CONFIGS["motion_rvq"]} | settings
    with pytest.raises(ValueError, match=message):
        build_video_tokenizer(config)


@pytest.mark.parametrize("kind", TRAINED)
def test_frames_behind_the_end_of_a_clip_teach_nothing(kind):
    frames = clip(8, batch=2)
    padded = torch.cat((frames, torch.full((2, 5, 8), float("nan"))), dim=2)
    padded[0, :, 8:10] = 1.0  # an unfinished step counts as little

    def trained(frames):
        quiet = {"motion_rvq": {"level_dropout": 0.0}, "motion_sigma": {"noise_std": 0.0}}
        tokenizer = make(kind, **quiet.get(kind, {}))
        loss, metrics = tokenizer.train().loss(frames, torch.Generator().manual_seed(0))
        loss.backward()
        return tokenizer, loss, metrics

    (one, loss, metrics), (two, again, same) = trained(frames), trained(padded)
    torch.testing.assert_close(loss, again)
    assert metrics == pytest.approx(same, rel=1e-4)
    for name, parameter in one.named_parameters():
        torch.testing.assert_close(parameter.grad, two.get_parameter(name).grad)
    for name, kept in one.state_dict().items():
        torch.testing.assert_close(kept, two.state_dict()[name])
    one.measure_features([frames])
    two.measure_features([padded[:1, :, :8], padded[1:]])
    torch.testing.assert_close(one.feature_mean, two.feature_mean)
    if kind == "motion_sigma":
        one.measure_latents([frames])
        two.measure_latents([padded])
        torch.testing.assert_close(one.latent_std, two.latent_std)


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize("mode", [True, False])
def test_clips_without_a_known_frame_cost_nothing(kind, mode):
    tokenizer = make(kind).train(mode)
    loss, metrics = tokenizer.loss(
        torch.full((2, 5, 8), float("nan")), torch.Generator().manual_seed(0)
    )
    assert loss == 0 and not any(metrics.values())
    loss.backward()
    for parameter in tokenizer.parameters():
        assert parameter.grad is None or not parameter.grad.any()
    assert all(bool(kept.isfinite().all()) for kept in tokenizer.state_dict().values())


def test_the_size_of_means_is_that_of_known_steps():
    tokenizer = make("motion_sigma")
    encoded = torch.tensor([[[1.0, 3, 50]] * 3, [[2.0, 50, 50]] * 3])
    known = torch.tensor([[True, True, False], [True, False, False]])
    _, extra, metrics = tokenizer.bottleneck(encoded, known, torch.Generator().manual_seed(0))
    assert metrics["regulariser"] == pytest.approx((1 + 9 + 4) / 3)
    assert float(extra) == pytest.approx(1e-3 * 14 / 3)


def steps_of(clips):
    """Standardised clips of a test as rows of four frames."""
    return torch.cat([c[0].unfold(1, 4, 4).permute(1, 0, 2).flatten(1) for c in clips])


def slow_clips(count=40, frames=24):
    """Clips whose five features are mixes of two slow waves, and a little noise."""
    rng = torch.Generator().manual_seed(5)
    mix = torch.randn(5, 2, generator=rng)
    time = torch.arange(frames) / 10
    clips = []
    for _ in range(count):
        speed, phase = torch.rand(2, 2, 1, generator=rng) * 2
        waves = torch.sin(speed * time + 3 * phase)
        clips.append((mix @ waves + 0.01 * torch.randn(5, frames, generator=rng))[None])
    return clips


@torch.no_grad()
@pytest.mark.parametrize("kind", ["motion_sigma", "motion_rvq"])
def test_prepared_linear_paths_are_principal_components(kind):
    channels = {"motion_sigma": {"latent_channels": 6}, "motion_rvq": {"code_dim": 6}}[kind]
    torch.manual_seed(0)
    tokenizer = build_video_tokenizer({"kind": kind, **CONFIGS[kind], **channels}).eval()
    clips = slow_clips()
    tokenizer.prepare(clips)
    target = torch.cat([tokenizer.standardise(c) for c in clips])
    latents = tokenizer.encoder(target)
    back = tokenizer.decoder(latents)
    rows = steps_of([tokenizer.standardise(c) for c in clips])
    values = torch.linalg.svdvals(rows)
    # No linear code of six numbers comes nearer.
    best = values[6:].square().sum() / values.square().sum()
    found = (back - target).square().sum() / target.square().sum()
    torch.testing.assert_close(found, best, atol=1e-4, rtol=0.02)
    torch.testing.assert_close(latents.square().mean(), torch.tensor(1.0), atol=1e-3, rtol=0)
    deviation = latents.std(dim=(0, 2))
    ratio = values[0] / values[1]
    wanted = ratio**0.5 if kind == "motion_sigma" else ratio
    torch.testing.assert_close(deviation[0] / deviation[1], wanted, atol=0.0, rtol=0.1)


@torch.no_grad()
def test_prepared_entries_are_means_of_clusters():
    torch.manual_seed(0)
    tokenizer = build_video_tokenizer({"kind": "motion_rvq", **CONFIGS["motion_rvq"]}).eval()
    clips = slow_clips()
    tokenizer.prepare(clips, seed=1)
    twin = build_video_tokenizer({"kind": "motion_rvq", **CONFIGS["motion_rvq"]}).eval()
    state = torch.random.get_rng_state()
    twin.prepare(clips, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    rest = torch.cat([tokenizer._steps(c) for c in clips])
    rest = tokenizer.encoder.linear(rest.unflatten(1, (5, 4)))[..., 0]
    sizes = [rest.square().sum()]
    for layer, other in zip(tokenizer.quantizer.layers, twin.quantizer.layers, strict=True):
        book = layer._codebook.embed[0]
        assert torch.equal(book, other._codebook.embed[0])
        nearest = torch.cdist(rest, book).argmin(dim=1)
        rest = rest - book[nearest]
        sizes.append(rest.square().sum())
    assert sizes[1] < 0.3 * sizes[0] and sizes[3] < 0.7 * sizes[2] < 0.7 * sizes[1]
    with pytest.raises(ValueError, match="prepare got no clip as long as a step"):
        tokenizer.prepare([torch.zeros(1, 5, 3)])
