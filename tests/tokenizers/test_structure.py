"""Structure maps: what they are of simple pictures, and how tokens are told them."""

import pytest
import torch

from blockloom.core.errors import UsageError
from blockloom.tokenizers.structure import structure_map, structure_tokens
from blockloom.tokenizers.video_build import build_video_tokenizer


def picture(left, right, height=4, width=6):
    """One frame, its left and right half in plain colours."""
    pixels = torch.empty(1, 3, 1, height, width)
    pixels[..., : width // 2] = torch.tensor(left)[None, :, None, None, None]
    pixels[..., width // 2 :] = torch.tensor(right)[None, :, None, None, None]
    return pixels


def test_luma_weighs_the_colours():
    maps = structure_map("luma", picture([1.0, -1.0, -1.0], [-1.0, 3.0, -1.0]))
    torch.testing.assert_close(maps[0, 0, 0], torch.tensor([0.299] * 3 + [0.587] * 3))


def test_edges_stand_where_brightness_changes():
    maps = structure_map("edges", picture([-1.0] * 3, [1.0] * 3))
    assert maps.shape == (1, 1, 4, 6)
    torch.testing.assert_close(maps[0, 0], torch.tensor([[0.0, 0, 1, 1, 0, 0]] * 4))
    # Half as high a step, half as strong an edge; turned, the same.
    half = structure_map("edges", picture([-1.0] * 3, [0.0] * 3))
    torch.testing.assert_close(half[0, 0, 1], torch.tensor([0.0, 0, 0.5, 0.5, 0, 0]))
    turned = structure_map("edges", picture([-1.0] * 3, [0.0] * 3, 6, 6).transpose(-1, -2))
    torch.testing.assert_close(turned[0, 0, :, 1], torch.tensor([0.0, 0, 0.5, 0.5, 0, 0]))


def test_unknown_maps_are_refused():
    with pytest.raises(UsageError, match=r"condition\.structure.*depth"):
        structure_map("depth", picture([0.0] * 3, [1.0] * 3))


def test_tokens_are_told_the_cells_they_cover():
    image = {"kind": "patch", "image_size": 8, "patch": 4}
    tokenizer = build_video_tokenizer({"kind": "frames", "image": image})
    maps = torch.zeros(1, 2, 8, 8)
    maps[0, 1, 4:, :2] = 1.0  # the left half of the lower left token, in the second frame
    told = structure_tokens(maps, tokenizer, 2)
    assert told.shape == (1, 2, 4, 4) and bool((told[0, 0] == -1).all())
    assert told[0, 1].tolist() == [[-1.0] * 4, [-1.0] * 4, [1.0, -1.0, 1.0, -1.0], [-1.0] * 4]
    assert structure_tokens(maps, tokenizer, 1)[0, 1, :, 0].tolist() == [-1.0, -1.0, 0.0, -1.0]


def test_frames_of_one_latent_are_averaged():
    tokenizer = build_video_tokenizer(
        {"kind": "video_kl", "frame_size": [8, 8], "spatial_stride": 4, "temporal_stride": 2,
         "widths": [8, 8, 16], "encoder_depths": [1, 1, 1], "decoder_depths": [1, 1, 1],
         "latent_channels": 3}
    )  # fmt: skip
    maps = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.8, 0.9])[None, :, None, None].expand(1, 6, 8, 8)
    told = structure_tokens(maps, tokenizer, 1)
    # The first frame alone, then pairs; the last fills no pair.
    expected = torch.tensor([0.1, 0.3, 0.7]) * 2 - 1
    torch.testing.assert_close(told, expected[None, :, None, None].expand(1, 3, 4, 1))
    with pytest.raises(UsageError, match="at least 1"):
        structure_tokens(maps[:, :0], tokenizer, 1)
