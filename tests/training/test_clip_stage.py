"""Windows of encoded clips: which frames, which actions, which prompt; and the latent cache."""

import numpy as np
import pytest
import torch

from blockloom.core.errors import DataError
from blockloom.tokenizers.video_build import build_video_tokenizer
from blockloom.training.clip_stage import (
    ClipActions,
    ClipPrompts,
    ClipTokens,
    ClipWindows,
    PixelWindows,
    encode_clips,
    latent_offsets,
    leading_actions,
)
from blockloom.training.clips import ClipDataset

SIZES = (5, 2, 3)
OFFSETS = np.array([0, 5, 7, 10])


def dataset(actions=None, size=8, sizes=SIZES):
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    frames = rng.integers(0, 256, (offsets[-1], size, size, 3), dtype=np.uint8)
    names = [f"clip {i}" for i in range(len(sizes))]
    return ClipDataset(frames, offsets, names, ["train"] * len(sizes), 10.0, actions)


def frames_tokenizer(kind="patch", size=8):
    image = {"kind": kind, "image_size": size, "patch": 4}
    return build_video_tokenizer({"kind": "frames", "image": image}).eval()


@pytest.mark.parametrize(
    ("length", "stride", "starts", "clips", "short"),
    [
        (3, 1, [0, 1, 2, 7], [0, 0, 0, 2], 1),
        (2, 1, [0, 1, 2, 3, 5, 7, 8], [0, 0, 0, 0, 1, 2, 2], 0),
        (2, 3, [0, 3, 5, 7], [0, 0, 1, 2], 0),
        (1, 2, [0, 2, 4, 5, 7, 9], [0, 0, 0, 1, 2, 2], 0),
        (5, 1, [0], [0], 2),
    ],
)
def test_windows_stay_inside_their_clip(length, stride, starts, clips, short):
    windows = ClipWindows(torch.from_numpy(OFFSETS), length, stride)
    assert windows.start.tolist() == starts and windows.clip.tolist() == clips
    assert windows.num_short == short and len(windows) == len(starts)
    last = torch.tensor([len(starts) - 1])
    assert windows.rows(last).tolist() == [[starts[-1] + i for i in range(length)]]


def test_a_window_longer_than_every_clip_is_refused():
    with pytest.raises(DataError, match="longest clip has 5 latent frames and a window 6"):
        ClipWindows(torch.from_numpy(OFFSETS), 6)


def test_values_are_the_frames_of_the_window_one_after_another():
    frames = torch.arange(10 * 2 * 3).reshape(10, 2, 3)
    tokens = ClipTokens(frames, torch.from_numpy(OFFSETS), 3)
    assert tokens.shape == (4, 6, 3) and len(tokens) == 4 and tokens.device == frames.device
    batch = tokens[torch.tensor([3, 1])]
    assert torch.equal(batch[0], frames[7:10].flatten(0, 1))
    assert torch.equal(batch[1], frames[1:4].flatten(0, 1))
    assert torch.equal(tokens[:2], tokens[torch.tensor([0, 1])])
    with pytest.raises(DataError, match="offsets end at 10, but there are 9"):
        ClipTokens(frames[:9], torch.from_numpy(OFFSETS), 3)


def test_ids_lead_to_the_frame_after_them_as_one_hot_rows():
    taken = np.array([2, 0, 1, 2, -1, 1, -1, 0, 2, -1])
    led = leading_actions(dataset(taken), 3)
    one = torch.eye(3)
    wanted = [0 * one[0], one[2], one[0], one[1], one[2], 0 * one[0], one[1], 0 * one[0], one[0]]
    assert torch.equal(led, torch.stack([*wanted, one[2]]))
    windows = ClipWindows(torch.from_numpy(OFFSETS), 3)
    actions = ClipActions(led, windows)
    assert actions.shape == (4, 3, 3)
    # A window that starts within its clip knows what led to its first frame.
    assert torch.equal(actions[torch.tensor([1])][0], torch.stack([one[2], one[0], one[1]]))
    assert torch.equal(actions[torch.tensor([3])][0], torch.stack([0 * one[0], one[0], one[2]]))
    assert leading_actions(dataset(np.where(taken > 1, 0, taken)), 3).shape == (10, 3)
    # Behind the end of a clip nothing is done.
    longer = ClipActions(led, ClipWindows(torch.from_numpy(OFFSETS), 9, pad=True))
    first = longer[torch.tensor([0])][0]
    end = int(OFFSETS[1])
    assert torch.equal(first[:end], led[:end]) and not first[end:].any() and len(first) == 9
    assert torch.equal(longer.rows, led)  # those of the clips, whoever reads them one by one


def test_vectors_lead_to_the_frame_after_them():
    taken = np.arange(20, dtype=np.float32).reshape(10, 2)
    taken[[4, 6, 9]] = 0
    led = leading_actions(dataset(taken), 2)
    assert led.tolist()[:5] == [[0, 0], [0, 1], [2, 3], [4, 5], [6, 7]]
    assert led.tolist()[5:] == [[0, 0], [10, 11], [0, 0], [14, 15], [16, 17]]


def test_actions_of_another_width_name_what_to_set():
    ids, vectors = np.array([3, 0, 1, 2, -1, 1, -1, 0, 2, -1]), np.ones((10, 2), np.float32)
    with pytest.raises(DataError, match=r"are 4 ids; set condition\.actions to 4"):
        leading_actions(dataset(ids), 3)
    with pytest.raises(DataError, match=r"are 2 numbers; set condition\.actions to 2"):
        leading_actions(dataset(vectors), 3)
    with pytest.raises(DataError, match="no actions; set it to 0"):
        leading_actions(dataset(), 3)


class Strided:
    """Stands in for a tokenizer whose latent frames hold two pixel frames after the first."""

    temporal_stride = step_frames = 2


def test_a_latent_frame_gets_the_actions_of_all_its_frames():
    taken = np.array([2, 0, 1, 2, -1, 1, -1, 0, 2, -1])
    clips = dataset(taken)
    assert latent_offsets(clips, Strided()).tolist() == [0, 3, 4, 6]
    led = leading_actions(clips, 6, Strided())
    wanted = torch.zeros(6, 2, 3)
    wanted[1, 0, 2] = wanted[1, 1, 0] = 1  # frames 1 and 2, led to by actions 0 and 1
    wanted[2, 0, 1] = wanted[2, 1, 2] = 1
    wanted[5, 0, 0] = wanted[5, 1, 2] = 1
    assert torch.equal(led, wanted.flatten(1))
    with pytest.raises(DataError, match=r"3 ids x 2 frames; set condition\.actions to 6"):
        leading_actions(clips, 4, Strided())
    # One row alone is that of the latent's first frame: what is known before it begins.
    first = leading_actions(clips, 3, Strided())
    assert torch.equal(first, wanted[:, 0])


class Chunked(Strided):
    """Stands in for a tokenizer all of whose latent frames hold two frames."""

    first_frames = 2


def test_a_latent_frame_of_two_frames_from_the_start_gets_what_led_to_both():
    frames, offsets = np.zeros((10, 4), np.float32), np.array([0, 6, 10])
    numbers = np.arange(10, dtype=np.float32)[:, None] + 1
    numbers[2] = np.nan  # not recorded
    clips = ClipDataset(frames, offsets, ["", ""], ["train"] * 2, actions=numbers)
    assert latent_offsets(clips, Chunked()).tolist() == [0, 3, 5]
    assert leading_actions(clips, 1, Chunked())[:, 0].tolist() == [0, 2, 4, 0, 8]
    both = leading_actions(clips, 2, Chunked()).tolist()
    assert both == [[0, 1], [2, 0], [4, 5], [0, 7], [8, 9]]


def test_prompts_are_kept_once_per_clip():
    windows = ClipWindows(torch.from_numpy(OFFSETS), 3)
    ids = torch.tensor([[[1]], [[2]], [[3]]])
    prompts = ClipPrompts(ids, windows)
    assert prompts[torch.tensor([3, 0, 2])].flatten().tolist() == [3, 1, 1]
    assert prompts.ids.data_ptr() == ids.data_ptr()


@pytest.mark.parametrize("kind", ["patch", "palette"])
def test_frames_are_encoded_once_and_read_back(kind, tmp_path):
    tokenizer, clips = frames_tokenizer(kind), dataset()
    values = encode_clips(tokenizer, clips, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    written = file.stat().st_mtime_ns
    assert torch.equal(encode_clips(tokenizer, clips, tmp_path), values)
    assert file.stat().st_mtime_ns == written
    for clip in range(3):
        whole = tokenizer.encode(clips.window(torch.tensor([clip]), SIZES[clip]).pixels())[0]
        torch.testing.assert_close(values[OFFSETS[clip] : OFFSETS[clip + 1]], whole)
    assert values.dtype == (torch.float32 if kind == "patch" else torch.int64)
    other = ClipDataset(255 - clips.frames, clips.offsets, clips.captions, clips.split)
    encode_clips(tokenizer, other, tmp_path)
    # The same frames cut elsewhere are other clips.
    moved = ClipDataset(clips.frames, np.array([0, 4, 7, 10]), clips.captions, clips.split)
    encode_clips(tokenizer, moved, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_temporal_tokenizers_encode_clip_after_clip(tmp_path):
    torch.manual_seed(0)
    tokenizer = build_video_tokenizer(
        {
            "kind": "video_kl", "frame_size": (8, 8), "spatial_stride": 4, "temporal_stride": 2,
            "widths": (8, 8, 16), "encoder_depths": (1, 1, 1), "decoder_depths": (1, 1, 1),
            "latent_channels": 3,
        }
    ).eval()  # fmt: skip
    clips = dataset(sizes=(6, 1, 3))  # the sixth frame fills no step
    values = encode_clips(tokenizer, clips, tmp_path)
    ends = latent_offsets(clips, tokenizer)
    assert ends.tolist() == [0, 3, 4, 6] and values.shape == (6, 4, 3)
    with torch.no_grad():
        for clip, count in enumerate((5, 1, 3)):
            whole = tokenizer.encode(clips.window(torch.tensor([clip]), count).pixels())[0]
            assert torch.equal(values[ends[clip] : ends[clip + 1]], whole)


def test_raw_windows_are_pixels_of_the_right_frames():
    clips = dataset()
    windows = PixelWindows(clips, 2, 2)
    assert len(windows) == 4
    pixels = windows.pixels(torch.tensor([1]))
    assert pixels.shape == (1, 3, 2, 8, 8)
    wanted = torch.from_numpy(clips.frames[2:4]).permute(3, 0, 1, 2)[None] / 127.5 - 1
    torch.testing.assert_close(pixels, wanted)


def test_feature_frames_are_encoded_as_they_stream(tmp_path):
    torch.manual_seed(0)
    config = {"kind": "motion_rvq", "features": 3, "groups": None, "width": 8, "code_dim": 4}
    tokenizer = build_video_tokenizer({**config, "codebook_size": 5, "levels": 2}).eval()
    rng = np.random.default_rng(0)
    frames = rng.normal(size=(20, 3)).astype(np.float32)
    clips = ClipDataset(frames, np.array([0, 9, 12, 20]), [""] * 3, ["train"] * 3)
    values = encode_clips(tokenizer, clips, tmp_path)
    ends = latent_offsets(clips, tokenizer)
    # The ninth frame of the first clip and all of the second fill no step.
    assert ends.tolist() == [0, 2, 2, 4] and values.shape == (4, 2, 1)
    with torch.no_grad():
        whole = tokenizer.encode(clips.window(torch.tensor([2]), 8).pixels())[0]
    assert torch.equal(values[2:], whole)
    given = PixelWindows(clips.take([0, 2]), 8, 1).pixels(torch.tensor([1]))
    assert torch.equal(given[0].T, torch.from_numpy(clips.clip(0)[1:9]))
