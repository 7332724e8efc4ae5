"""Hash text encoder: ids by hand, pooling, empty and hostile prompts, batch independence."""

import zlib

import pytest
import torch

from blockloom.models.text import HashTextEncoder, PromptEmbeds, split_words, word_features


def _encoder(**changes) -> HashTextEncoder:
    torch.manual_seed(0)
    settings = {"dim": 16, "num_buckets": 64, "max_words": 6, "num_heads": 2} | changes
    return HashTextEncoder(**settings).eval()


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", ()),
        ("  ,.\n\t", ()),
        ("Grinning Face, Fluent-3D style", ("grinning", "face", "fluent", "3d", "style")),
        ("\u2764\ufe0f\u200d\U0001f525", ("\u2764", "\U0001f525")),
        ("ﬁne ＡＢＣ", ("fine", "abc")),
        ("شَمس حمراء", ("شَمس", "حمراء")),
        ("हिन्दी", ("हिन्दी",)),
        ("keycap: *", ("keycap", "*")),
        ("\ud800cat\udfff", ("cat",)),
    ],
)
def test_split_words(prompt, words):
    assert split_words(prompt) == words


def test_features_are_crc32_of_word_then_ngrams():
    def crc(kind, text):
        return zlib.crc32(f"blockloom\0{kind}\0{text}".encode()) % 1000

    want = [crc("word0", "cat"), crc("word1", "cat")]
    want += [crc("gram", gram) for gram in ("<ca", "cat", "at>", "<cat", "cat>")]
    assert list(word_features("cat", 1000, 3, 5, 20)) == want
    assert len(word_features("x" * 5000, 1000, 3, 5, 20)) == 20
    assert list(word_features("cat", 1000, 3, 0, 20)) == want[:2]


def test_hash_ids_are_frozen():
    # A change here silently breaks every saved checkpoint.
    assert word_features("cat", 4096, 3, 5, 20) == FROZEN_CAT


FROZEN_CAT = (283, 2219, 3389, 729, 2093, 3988, 2708)


def test_tokenize_pads_with_minus_one_and_counts_truncation():
    encoder = _encoder()
    ids = encoder.tokenize(["a b", "", "one two three four five six seven"])
    assert ids.shape == (3, 6, 20) and ids.dtype == torch.int64
    assert (ids[0, 2:] == -1).all() and (ids[1] == -1).all() and (ids[2] >= 0).any(-1).all()
    assert encoder.truncated == 1
    encoder.tokenize(["short"])
    assert encoder.truncated == 0


def test_a_million_characters_are_cut_before_work():
    encoder = _encoder()
    ids = encoder.tokenize(["cat " * 250_000])
    assert encoder.truncated == 1
    assert torch.equal(ids, encoder.tokenize(["cat " * 6]))


def test_word_embedding_is_scaled_sum_of_buckets():
    encoder = _encoder(num_layers=0)
    with torch.no_grad():
        encoder.positions.zero_()
        got = encoder.encode(["cat"])
    rows = encoder.buckets[torch.tensor(word_features("cat", 64, 3, 5, 20))]
    word = rows.sum(0) / len(rows) ** 0.5
    want = torch.nn.functional.layer_norm(word, (16,))
    torch.testing.assert_close(got.embeds[0, 0], want.detach())
    torch.testing.assert_close(got.pooled[0], encoder.pool(want).detach())
    assert (got.embeds[0, 1:] == 0).all() and got.is_valid.tolist() == [[True] + [False] * 5]


def test_padding_never_changes_the_result():
    encoder = _encoder()
    ids = encoder.tokenize(["red cat"])
    with torch.no_grad():
        long, short = encoder(ids), encoder(ids[:, :2])
    torch.testing.assert_close(long.embeds[:, :2], short.embeds)
    torch.testing.assert_close(long.pooled, short.pooled)


def test_empty_prompt_is_the_learned_null_and_gets_its_gradient():
    encoder = _encoder()
    got, null = encoder.encode(["", "cat"]), encoder.null(1)
    assert torch.equal(got.embeds[:1], null.embeds) and torch.equal(got.pooled[:1], null.pooled)
    assert torch.equal(got.is_valid[0], null.is_valid[0])
    assert not torch.equal(got.pooled[1], got.pooled[0])
    (got.embeds[0].sum() + 2 * got.pooled[0].sum()).backward()
    assert torch.equal(encoder.null_word.grad, torch.ones(16))
    assert torch.equal(encoder.null_pooled.grad, torch.full((16,), 2.0))
    assert encoder.buckets.grad.abs().max() == 0


def test_bits_do_not_depend_on_the_batch():
    encoder = _encoder(dim=64, num_heads=4)
    prompts = [f"word{i} is number {i} of them" for i in range(11)] + [""]
    with torch.no_grad():
        together = encoder.encode(prompts)
        for row, prompt in enumerate(prompts):
            alone = encoder.encode([prompt])
            assert torch.equal(alone.embeds[0], together.embeds[row])
            assert torch.equal(alone.pooled[0], together.pooled[row])


def test_replace_take_and_cat():
    encoder = _encoder()
    cond, null = encoder.encode(["cat", "dog"]), encoder.null(2)
    mixed = cond.replace(torch.tensor([True, False]), null)
    assert torch.equal(mixed.pooled[0], null.pooled[0])
    assert torch.equal(mixed.embeds[1], cond.embeds[1])
    joined = PromptEmbeds.cat([cond, null]).take(torch.tensor([1, 1, 2]))
    assert torch.equal(joined.pooled, torch.stack([cond.pooled[1]] * 2 + [null.pooled[0]]))


def test_save_and_load_keep_the_bits(tmp_path):
    encoder = _encoder()
    encoder.save_pretrained(tmp_path)
    loaded = HashTextEncoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded.encode(["cat"]).embeds, encoder.encode(["cat"]).embeds)


def test_default_size_is_about_a_million_parameters():
    total = sum(parameter.numel() for parameter in HashTextEncoder().parameters())
    assert 1.0e6 < total < 1.3e6


def test_errors_name_the_setting():
    with pytest.raises(ValueError, match=r"num_heads is not legal; got 4.*dim 10; try 2"):
        HashTextEncoder(dim=10, num_heads=4)
    with pytest.raises(ValueError, match=r"max_words is not legal; got 0"):
        HashTextEncoder(max_words=0)
    with pytest.raises(ValueError, match=r"prompts\[1\] must be a string, got int"):
        _encoder().tokenize(["a", 3])
