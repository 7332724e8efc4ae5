"""Clips to bytes and back: the bits, the container, the model that drives them, the commands."""

import json
import struct
import zlib
from importlib import resources

import numpy as np
import pytest
import torch

from blockloom import cli
from blockloom.core.errors import DataError, ModelError, UsageError
from blockloom.core.recipe import load_recipe
from blockloom.models.generator import GenerativeModel
from blockloom.pipelines import bit_coding
from blockloom.pipelines.bit_coding import (
    STEPS,
    AdaptiveCounts,
    BitReader,
    BitWriter,
    LogisticMixer,
    TokenCoder,
    bit_tree,
    to_steps,
)
from blockloom.pipelines.compressed_file import SOURCES, CompressedClip
from blockloom.pipelines.compression import VideoCompressor, digest
from blockloom.pipelines.params import weights_hash
from blockloom.pipelines.video import VideoPipeline
from blockloom.tokenizers.video_build import build_video_tokenizer

RECIPE = resources.files("blockloom.configs") / "bundled" / "compression.yaml"
TOKENIZER = {"kind": "bsq_transformer", "frame_size": (16, 16), "patch": 8, "dim": 16, "heads": 1,
             "encoder_depth": 1, "decoder_depth": 1, "window": 2, "bits": 3,
             "num_codebooks": 2}  # fmt: skip
BACKBONE = ["backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "layout.frames=4"]


def parts(*overrides, **settings):
    """A tokenizer and an untrained model of its codes, with weights that make it opinionated."""
    recipe = load_recipe(str(RECIPE), [*BACKBONE, *overrides])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = build_video_tokenizer(TOKENIZER | settings).eval()
        model = GenerativeModel(
            recipe.model_dump(mode="json"),
            *tokenizer.grid,
            num_codebooks=tokenizer.num_codebooks,
            codebook_size=tokenizer.codebook_size,
            latent_channels=tokenizer.latent_channels,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return tokenizer, model.eval()


@pytest.fixture(scope="module")
def compressor():
    return VideoCompressor(*parts(), identity=bytes(range(32)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    VideoPipeline(*parts()).save_pretrained(path)
    return path


def clip(frames, seed=0):
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 256, (1, 16, 16, 3), dtype=np.uint8).repeat(frames, 0)
    still[:, 4:12, :8] = rng.integers(0, 256, (frames, 8, 8, 3), dtype=np.uint8)
    return still


def test_bits_come_back_and_cost_what_they_should():
    rng = np.random.default_rng(1)
    chances = [to_steps(p) for p in rng.beta(0.3, 0.3, 4000)]
    bits = [int(rng.random() < steps / STEPS) for steps in chances]
    writer = BitWriter()
    for bit, steps in zip(bits, chances, strict=True):
        assert writer.code(bit, steps) == bit
    content = writer.content()
    assert 8 * len(content) == pytest.approx(writer.ideal_bits, abs=64)
    assert writer.ideal_bits < 0.75 * len(bits)
    reader = BitReader(content)
    assert [reader.code(0, steps) for steps in chances] == bits
    assert reader.is_done
    assert BitWriter().content() == b""
    with pytest.raises(DataError, match="cut short; got 3 bytes"):
        BitReader(content[:3])


def test_probabilities_stay_off_certainty():
    assert (to_steps(0.0), to_steps(1.0), to_steps(0.5)) == (8, STEPS - 8, STEPS // 2)


def test_counts_learn_each_surrounding_apart():
    counts = AdaptiveCounts(2)
    assert counts.probability(1, 7) == 0.5
    for _ in range(99):
        counts.learn(1, 7, 1)
    assert counts.probability(1, 7) == pytest.approx(99.4 / 99.8)
    assert counts.probability(1, 6) == counts.probability(0, 7) == 0.5
    for _ in range(300):
        counts.learn(1, 7, 0)
    assert counts.probability(1, 7) < 0.2  # old counts were halved


def test_mixer_finds_out_who_is_right():
    mixer = LogisticMixer(1)
    assert mixer.mix(0, 0.8, 0.1) == pytest.approx(0.8)
    for _ in range(3000):
        mixer.mix(0, 0.8, 0.1)
        mixer.learn(0, 0)
    assert mixer.mix(0, 0.8, 0.1) < 0.1


def test_bit_tree_is_the_chain_rule_of_the_codes():
    scores = np.log(np.array([0.1, 0.2, 0.05, 0.15, 0.1, 0.1, 0.25, 0.05]))
    levels = bit_tree(scores)
    assert [len(level) for level in levels] == [1, 2, 4]
    exact = np.exp(scores)
    for code in range(8):
        chance, before = 1.0, 0
        for level in range(3):
            bit = code >> (2 - level) & 1
            one = levels[level][before]
            chance *= one if bit else 1 - one
            before = 2 * before + bit
        assert chance == pytest.approx(exact[code], rel=0.03)
    # What lies below the grid changes nothing at all.
    noisy = bit_tree(np.round(scores * 64) / 64 + 1e-9)
    assert all(np.array_equal(a, b) for a, b in zip(levels, noisy, strict=True))


def test_surroundings_of_a_token():
    writer = BitWriter()
    tokens = TokenCoder(writer, (2, 2), 1, 2, "counts")
    for frame in ([[1], [2], [3], [0]], [[1], [2], [0], [3]]):
        for place, code in enumerate(frame):
            around, still = tokens._neighbours(place)
            tokens.token(place, np.array(code), None)
        last = (around, still)
    # Before: 0; left: 0 and it moved (was 3); above: 2 and it stood still.
    assert last == (([0], [0], [2]), 1)


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("frames", [1, 4, 7])
def test_clip_of_any_length_comes_back_bit_for_bit(compressor, source, frames):
    original = clip(frames)
    codes = compressor.encode(original)
    content = compressor.compress(original, 12.5, source)
    container = CompressedClip.from_bytes(content)
    assert (container.frames, container.fps, container.source) == (frames, 12.5, source)
    assert torch.equal(compressor.read(container.payload, frames, source), codes)
    decoded, fps = compressor.decompress(content)
    assert fps == 12.5 and np.array_equal(decoded, compressor.decode(codes))
    with torch.no_grad():
        whole = compressor.tokenizer.decode(codes[None])
    expected = ((whole[0].permute(1, 2, 3, 0) + 1) * 127.5).round().byte().numpy()
    assert np.array_equal(decoded, expected)


def test_clips_side_by_side_give_the_bytes_of_each_alone(compressor):
    codes = torch.stack([compressor.encode(clip(5, seed)) for seed in (0, 1, 2)])
    together = [writer.content() for writer in compressor.write_many(codes)]
    assert together == [compressor.write(alone).content() for alone in codes]
    assert len(set(together)) == 3
    assert torch.equal(compressor.read_many(together, 5, "mixed"), codes)


def test_raw_bits_cost_one_bit_each(compressor):
    codes = compressor.encode(clip(5))
    writer = compressor.write(codes, "raw")
    assert writer.ideal_bits == 5 * 4 * 6


@torch.no_grad()
def test_probabilities_are_those_of_the_masked_model(compressor):
    """The cost of the first segment equals the cross-entropy of one masked forward."""
    from blockloom.models.generate import Request, start

    codes = compressor.encode(clip(4))
    writer = compressor.write(codes, "prior")
    model = compressor.model
    plan = start(model, Request([""], [torch.Generator()])).plan
    layout = plan.training_layout()
    values = codes.flatten(0, 1)[None]
    data = values[:, layout.source.clamp_min(0)]
    hidden = model.backbone(
        data, torch.zeros(data.shape[:2], dtype=torch.bool), layout,
        torch.zeros(data.shape[:2]), model.unprompted(1), plan.lower(layout, layout),
    )  # fmt: skip
    logits = model.head.logits(hidden)[0]
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), values[0].flatten(), reduction="sum"
    )
    assert writer.ideal_bits == pytest.approx(float(nats) / np.log(2), rel=0.01)


def test_segments_see_half_a_segment_back(compressor):
    """What a frame costs depends on the frames given to its segment, not on older ones."""
    codes = compressor.encode(clip(8))
    other = codes.clone()
    other[0] = 7 - other[0]
    costs = []
    for values in (codes, other):
        writer = compressor.write(values, "prior")
        one = np.asarray(writer._steps) / STEPS
        bits = np.asarray(writer._bits, dtype=bool)
        costs.append(-np.log2(np.where(bits, one, 1 - one)).reshape(8, -1).sum(1))
    # Segments of four frames step by two: frames 4.. were coded after 2.. were given.
    assert (costs[0][:3] != costs[1][:3]).all() and np.array_equal(costs[0][4:], costs[1][4:])


def test_threads_do_not_change_what_is_read(compressor):
    codes = compressor.encode(clip(2))
    payload = compressor.write(codes, "mixed").content()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2 if before == 1 else 1)
        assert torch.equal(compressor.read(payload, 2, "mixed"), codes)
    finally:
        torch.set_num_threads(before)


def test_damage_is_told_in_one_line(compressor):
    content = compressor.compress(clip(3), source="counts")
    for cut in (0, 3, 20, len(content) - 1):
        with pytest.raises(DataError):
            compressor.decompress(content[:cut])
    for place in (5, 40, len(content) - 6):
        broken = bytearray(content)
        broken[place] ^= 16
        with pytest.raises(DataError, match="damaged or cut short"):
            compressor.decompress(bytes(broken))
    with pytest.raises(DataError, match="not a compressed clip"):
        compressor.decompress(b"GIF8" + content[4:])
    with pytest.raises(DataError, match="version of a compressed clip; got 9; allowed 1"):
        compressor.decompress(content[:4] + b"\x09" + content[5:])


def rebuilt(content, **changes):
    """The container with some fields changed and a right checksum."""
    clip_ = CompressedClip.from_bytes(content)
    told = {name: getattr(clip_, name) for name in CompressedClip.__dataclass_fields__}
    return CompressedClip(**(told | changes)).to_bytes()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": bytes(16)}, ModelError, "another model; got 000102"),
        ({"codes": bytes(8)}, DataError, "other than they were written"),
        ({"height": 8}, DataError, "got 16x8"),
        ({"frames": 10**7}, DataError, r"frames of a compressed clip.*1\.\.100000"),
        ({"frames": 2}, DataError, "."),
        ({"fps": 1e9}, DataError, r"fps.*0\.1\.\.240"),
        ({"source": "zip"}, DataError, "allowed raw, counts, prior, mixed"),
        ({"payload": b"\1\2\3\4" * 3}, DataError, "."),
    ],
)
def test_crafted_files_are_refused(compressor, changes, error, message):
    content = compressor.compress(clip(3), source="counts")
    with pytest.raises(error, match=message):
        compressor.decompress(rebuilt(content, **changes))


@pytest.mark.parametrize("text", [b"[]", b"{", b'{"frames":1}', b"[" * 5000, b"\xff"])
def test_crafted_descriptions_are_refused(text):
    head = struct.pack("<4sBH16s8s", b"BLMV", 1, len(text), bytes(16), bytes(8))
    body = head + text
    with pytest.raises(DataError, match="description"):
        CompressedClip.from_bytes(body + struct.pack("<I", zlib.crc32(body)))


def test_what_cannot_be_compressed_is_refused(compressor):
    with pytest.raises(UsageError, match=r"3 frames of 8x16; allowed .* of 16x16"):
        compressor.compress(np.zeros((3, 16, 8, 3), np.uint8))
    with pytest.raises(UsageError, match=r"source.*zip.*raw, counts, prior, mixed"):
        compressor.compress(clip(2), source="zip")
    with pytest.raises(UsageError, match="fps"):
        compressor.compress(clip(2), fps=0.0)


@pytest.mark.parametrize(
    ("overrides", "settings", "message"),
    [
        (["condition.actions=2"], {}, "needs condition.actions = 0; got 2"),
        (["condition.adaln=true"], {}, "needs condition.adaln = False"),
        (
            [],
            {"kind": "video_kl", "frame_size": (16, 16), "spatial_stride": 8, "widths": (8, 16),
             "encoder_depths": (1, 1), "decoder_depths": (1, 1), "temporal_stride": 1,
             "latent_channels": 2},
            "tokenizer of bits; got latents",
        ),
    ],
)  # fmt: skip
def test_other_models_are_refused(overrides, settings, message):
    tokenizer, model = parts(*overrides)
    if settings:
        tokenizer = build_video_tokenizer(settings)
    with pytest.raises(ModelError, match=message):
        VideoCompressor(tokenizer, model, bytes(32))


def test_missing_library_names_the_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "constriction", None)
    with pytest.raises(UsageError, match=r"pip install 'blockloom\[compress\]'"):
        bit_coding.import_constriction()


def run(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    return code, out, err.strip().splitlines()


def test_commands_there_and_back(folder, tmp_path, capsys):
    from blockloom.pipelines.video_input import read_video
    from blockloom.pipelines.video_media import save_video

    source, packed, again = tmp_path / "in.gif", tmp_path / "c.blmv", tmp_path / "out.gif"
    save_video(clip(5), source, fps=10)
    code, out, err = run(
        capsys, "compress", source, "--model", folder, "--out", packed, "--format", "json"
    )
    assert (code, err) == (0, [])
    report = json.loads(out)
    assert report["bytes"] == packed.stat().st_size and report["frames"] == 5
    assert report["bits_per_pixel"] == round(8 * report["bytes"] / (5 * 256), 5)
    assert CompressedClip.from_bytes(packed.read_bytes()).model.hex() == weights_hash(folder)[:32]
    code, out, err = run(capsys, "decompress", packed, "--model", folder, "--out", again)
    assert (code, out.strip(), err) == (0, str(again), [])
    shown = read_video(again)
    assert shown.frames.shape == (5, 16, 16, 3) and shown.fps == pytest.approx(10)
    code, _, err = run(capsys, "compress", source, "--model", folder, "--out", packed)
    assert code == 2 and "output exists; got c.blmv" in err[0]
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("compress",), 2, "no video given"),
        (("compress", "in.gif"), 2, "no model given"),
        (("compress", "in.gif", "--model", "nowhere"), 4, "no such model"),
        (("compress", "in.gif", "--model", "{folder}", "--out", "x.zip"), 2, "allowed .blmv"),
        (("compress", "no.gif", "--model", "{folder}", "--out", "x.blmv"), 3, "no.gif"),
        (("decompress", "no.blmv", "--model", "{folder}", "--out", "x.mp4"), 3, "no such file"),
        (("decompress", "bad.blmv", "--model", "{folder}", "--out", "x.mp4"), 3, "not a comp"),
        (("decompress", "bad.blmv", "--model", "{folder}", "--out", "x.wav"), 2, "--out ext"),
    ],
)
def test_commands_refuse_in_one_line(
    arguments, status, message, folder, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.gif").write_bytes(b"GIF89a")
    (tmp_path / "bad.blmv").write_bytes(b"nothing of the kind")
    code, out, err = run(capsys, *(part.format(folder=folder) for part in arguments))
    assert (code, out, len(err)) == (status, "", 1), err
    assert message in err[0]
    assert not (tmp_path / "x.blmv").exists() and not (tmp_path / "x.mp4").exists()


def test_digest_tells_codes_apart():
    codes = torch.tensor([[[1, 2]]])
    assert digest(codes) == digest(codes.clone()) != digest(codes + 1)
    assert len(digest(codes)) == 8
