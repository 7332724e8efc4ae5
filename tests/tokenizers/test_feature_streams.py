"""Streams of a frame as tokens: nothing is lost, streams have places, chunks are the whole."""

import pytest
import torch

from blockloom.tokenizers.video_build import build_video_tokenizer, load_video_tokenizer


@pytest.fixture
def tokenizer():
    made = build_video_tokenizer({"kind": "feature_streams", "streams": [2, 3, 1]})
    made.measure_features([clips()])
    return made.eval()


def clips():
    rng = torch.Generator().manual_seed(0)
    return torch.randn(4, 6, 20, generator=rng) * torch.arange(1.0, 7.0)[:, None] + 5


def test_every_stream_is_a_token_filled_up_with_zeros(tokenizer):
    values = tokenizer.encode(clips())
    assert tokenizer.grid == (1, 3) and tokenizer.latent_channels == 3
    assert values.shape == (4, 20, 3, 3)
    assert not bool(values[:, :, 0, 2].any()) and not bool(values[:, :, 2, 1:].any())
    expected = (clips() - tokenizer.feature_mean) / tokenizer.feature_std
    assert torch.equal(values[:, :, 1], expected[:, 2:5].transpose(1, 2))
    assert torch.allclose(values[:, :, 1].std((0, 1)), torch.ones(3), atol=0.01)
    assert torch.allclose(tokenizer.decode(values), clips(), atol=1e-5)


def test_chunks_and_a_saved_folder_give_the_same(tokenizer, tmp_path):
    values = tokenizer.encode(clips())
    first, state = tokenizer.encode_chunk(clips()[:, :, :7])
    rest, _ = tokenizer.encode_chunk(clips()[:, :, 7:], state)
    assert torch.equal(torch.cat((first, rest), 1), values)
    tokenizer.save_pretrained(tmp_path)
    again = load_video_tokenizer(tmp_path)
    assert again.streams == (2, 3, 1) and torch.equal(again.encode(clips()), values)


def test_empty_streams_are_refused():
    for streams in ([], [2, 0]):
        with pytest.raises(ValueError, match="must be one or more numbers from 1 on"):
            build_video_tokenizer({"kind": "feature_streams", "streams": streams})
