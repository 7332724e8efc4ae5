"""Every tokenizer keeps the protocol: shapes, ranges, round trips, storage and errors."""

import pytest
import torch

from blockloom.tokenizers.base import ImageTokenizer
from blockloom.tokenizers.build import TOKENIZERS, build_tokenizer, load_tokenizer

NETWORK = {
    "image_size": 16,
    "patch": 2,
    "widths": (8, 16),
    "encoder_depths": (1, 1),
    "decoder_depths": (1, 1),
}
LIGHT = {"image_size": 16, "stride": 8, "patch": 2, "width": 16}
AUTOENCODER = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
}
CONFIGS = {
    "palette": {"image_size": 16, "patch": 4},
    "patch": {"image_size": 16, "patch": 4, "mean": 0.25, "std": 0.5},
    "fsq": NETWORK | {"levels": (4, 3), "num_codebooks": 3},
    "vq": NETWORK | {"codebook_size": 12, "code_dim": 4, "num_codebooks": 2},
    "bsq": NETWORK | {"bits": 3, "num_codebooks": 2},
    "kl": NETWORK | {"latent_channels": 6},
    "sigma": NETWORK | {"latent_channels": 6},
    "light": LIGHT | {"latent_channels": 6},
    "light_fsq": LIGHT | {"levels": (4, 3), "num_codebooks": 3},
    "mosaic": {"image_size": 16, "cell": 4, "merge": 2, "codebook_size": 6},
    "autoencoder_kl": {"image_size": 16, "autoencoder_config": AUTOENCODER},
    "vq_model": {"image_size": 16, "model_config": AUTOENCODER | {"num_vq_embeddings": 20}},
}
TRAINED = sorted(set(CONFIGS) - {"palette", "patch", "mosaic"})


def make(kind):
    torch.manual_seed(0)
    tokenizer = build_tokenizer({"kind": kind, **CONFIGS[kind]}).eval()
    # Zero-initialised branches would hide mistakes in them.
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            if not parameter.any():
                parameter.normal_(std=0.1)
    return tokenizer


@pytest.fixture
def pixels():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_kind_is_tested():
    assert set(CONFIGS) == set(TOKENIZERS)


@pytest.mark.parametrize("kind", CONFIGS)
def test_encode_gives_values_in_range(kind, pixels):
    tokenizer = make(kind)
    assert isinstance(tokenizer, ImageTokenizer)
    values = tokenizer.encode(pixels)
    tokens = tokenizer.grid[0] * tokenizer.grid[1]
    if tokenizer.value == "code":
        assert values.shape == (3, tokens, tokenizer.num_codebooks)
        assert values.dtype == torch.int64
        assert 0 <= values.min() and values.max() < tokenizer.codebook_size
        assert tokenizer.latent_channels == 0
    else:
        assert values.shape == (3, tokens, tokenizer.latent_channels)
        assert values.dtype == torch.float32
        assert tokenizer.num_codebooks == tokenizer.codebook_size == 0


@pytest.mark.parametrize("kind", CONFIGS)
def test_decode_is_clamped_and_deterministic(kind, pixels):
    tokenizer = make(kind)
    values = tokenizer.encode(pixels)
    decoded = tokenizer.decode(values)
    assert decoded.shape == pixels.shape
    assert decoded.min() >= -1 and decoded.max() <= 1
    assert torch.equal(decoded, tokenizer.decode(values))


@pytest.mark.parametrize("kind", CONFIGS)
def test_batch_equals_singles(kind, pixels):
    tokenizer = make(kind)
    together = tokenizer.encode(pixels)
    alone = torch.cat([tokenizer.encode(image[None]) for image in pixels])
    # Kernels may sum in another order for another batch size.
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", TRAINED)
def test_loss_reaches_encoder_and_decoder(kind, pixels):
    tokenizer = make(kind).train()
    loss, metrics = tokenizer.loss(pixels, torch.Generator().manual_seed(3))
    loss.backward()
    names = [n for n, p in tokenizer.named_parameters() if p.grad is not None and p.grad.any()]
    assert any("encoder" in name for name in names)
    assert any("decoder" in name for name in names)
    assert all(isinstance(value, float) for value in metrics.values())


@pytest.mark.parametrize("kind", ["kl", "sigma", "light", "autoencoder_kl"])
def test_loss_noise_comes_from_the_generator(kind, pixels):
    tokenizer = make(kind)
    same = [tokenizer.loss(pixels, torch.Generator().manual_seed(5))[0] for _ in range(2)]
    other = tokenizer.loss(pixels, torch.Generator().manual_seed(6))[0]
    assert torch.equal(*same)
    assert not torch.equal(same[0], other)


@pytest.mark.parametrize("kind", CONFIGS)
def test_stored_tokenizer_loads_equal(kind, pixels, tmp_path):
    tokenizer = make(kind)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert type(loaded) is type(tokenizer)
    values = tokenizer.encode(pixels)
    assert torch.equal(loaded.encode(pixels), values)
    assert torch.equal(loaded.decode(values), tokenizer.decode(values))
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("kind", CONFIGS)
def test_wrong_size_is_refused(kind, pixels):
    tokenizer = make(kind)
    with pytest.raises(ValueError, match=r"\[3, 3, 8, 16\].*16, 16"):
        tokenizer.encode(pixels[:, :, :8])
    values = tokenizer.encode(pixels)
    with pytest.raises(ValueError, match="this tokenizer takes"):
        tokenizer.decode(values[:, 1:])


@pytest.mark.parametrize("kind", ["palette", "fsq", "vq", "bsq", "light_fsq", "vq_model"])
def test_code_outside_the_codebook_is_refused(kind, pixels):
    tokenizer = make(kind)
    codes = tokenizer.encode(pixels)
    codes[0, 0, 0] = tokenizer.codebook_size
    with pytest.raises(ValueError, match=f"0..{tokenizer.codebook_size - 1}"):
        tokenizer.decode(codes)


@pytest.mark.parametrize("kind", ["fsq", "vq", "bsq", "light_fsq"])
def test_training_path_equals_encode_then_decode(kind, pixels):
    tokenizer = make(kind)
    features, codes, _ = tokenizer._quantize(tokenizer.encoder(pixels))
    assert torch.equal(codes, tokenizer.encode(pixels))
    # Straight-through adds and subtracts the feature, which rounds.
    torch.testing.assert_close(
        tokenizer.decoder(features).clamp(-1, 1), tokenizer.decode(codes), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("kind", ["fsq", "vq", "bsq", "light_fsq"])
def test_quantiser_ignores_autocast(kind, pixels):
    tokenizer = make(kind)
    features = tokenizer.encoder(pixels)
    plain = tokenizer._quantize(features)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(tokenizer._quantize(features)[1], plain)


@pytest.mark.parametrize("kind", ["vq"])
def test_encode_leaves_the_codebook_alone(kind, pixels):
    tokenizer = make(kind).train()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    tokenizer.encode(pixels)
    assert tokenizer.training
    assert all(torch.equal(value, before[name]) for name, value in tokenizer.state_dict().items())


@pytest.mark.parametrize("kind", ["kl", "sigma", "light"])
def test_measured_latents_are_standard(kind, pixels):
    tokenizer = make(kind)
    tokenizer.measure_latents(pixels.split(2))
    latents = tokenizer.encode(pixels).flatten(0, 1)
    torch.testing.assert_close(latents.mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(latents.std(0, correction=0), torch.ones(6), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="at least 1"):
        tokenizer.measure_latents([])


def test_sigma_noise_scale():
    tokenizer = make("sigma")
    zeros = torch.zeros(4000, 6, 2, 2)
    sample, regulariser = tokenizer.posterior_sample(zeros, torch.Generator().manual_seed(0))
    # E[s^2] = (0.75 / 0.8)^2 per image; channels of one image share s.
    assert float(sample.square().mean()) == pytest.approx((0.75 / 0.8) ** 2, rel=0.05)
    per_image = sample.square().mean(dim=(1, 2, 3))
    assert float(per_image.std() / per_image.mean()) > 1
    assert float(regulariser) == 0


def test_kl_divergence_closed_form():
    tokenizer = make("kl")
    features = torch.cat([torch.full((1, 6, 2, 2), 2.0), torch.zeros(1, 6, 2, 2)], dim=1)
    _, divergence = tokenizer.posterior_sample(features, torch.Generator())
    assert float(divergence) == pytest.approx(2.0)


def test_fsq_lattice_is_exhausted():
    tokenizer = make("fsq")
    codes = torch.arange(12)[None, :, None].expand(1, 12, 3)
    points = tokenizer.lookup(codes)[0, :, :2]
    assert sorted(points[:, 0].unique().tolist()) == [-1, -0.5, 0, 0.5]
    assert sorted(points[:, 1].unique().tolist()) == [-1, 0, 1]
    assert len(points.unique(dim=0)) == 12


def test_bsq_codes_are_signs():
    tokenizer = make("bsq")
    features = torch.tensor([[[1.0, -2.0, 3.0, -1.0, -1.0, 5.0]]])
    quantized, codes, _ = tokenizer.quantize(features)
    assert codes.tolist() == [[[0b101, 0b001]]]
    expected = torch.tensor([1, -1, 1, -1, -1, 1]) / 3**0.5
    torch.testing.assert_close(quantized[0, 0], expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "fsk"}, "nearest fsq"),
        ({}, "kind is None"),
        ({"kind": "palette", "path": 4}, "no setting 'path'.*nearest patch"),
        ({"kind": "palette", "image_size": 15, "patch": 4}, "15.*4.*16"),
        ({"kind": "palette", "colors": [[0, 0, 0]]}, "at least 2"),
        ({"kind": "palette", "colors": [[0, 0, 256], [0, 0, 0]]}, "0..255"),
        ({"kind": "patch", "std": 0.0}, "above 0"),
        ({"kind": "fsq", "levels": (2, 4)}, "at least 3"),
        ({"kind": "fsq", "patch": 3}, "power of two"),
        ({"kind": "fsq", "image_size": 60}, "60.*16.*64"),
        ({"kind": "fsq", "widths": (60, 128, 192)}, "60.*64"),
        ({"kind": "bsq", "bits": 20}, "20.*16"),
        ({"kind": "light", "stride": 10}, "stride is 10.*patch 4, nearest 8"),
        ({"kind": "light", "image_size": 70}, "70.*16, nearest 64"),
        ({"kind": "light_fsq", "depth": 0}, "depth is 0.*at least 1"),
    ],
)
def test_bad_settings_are_named(config, message):
    with pytest.raises(ValueError, match=message):
        build_tokenizer(config)


def test_load_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match="not a tokenizer configuration"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FSQTokenizr"}')
    with pytest.raises(ValueError, match="nearest FSQTokenizer"):
        load_tokenizer(tmp_path)
