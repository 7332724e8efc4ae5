"""Build a video or motion tokenizer from a recipe's `tokenizer` part, or load one from a folder.

It does not know recipes; it takes a plain mapping.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .build import build_tokenizer, load_tokenizer
from .feature_frames import FeatureFrameTokenizer
from .feature_streams import FeatureStreamTokenizer
from .motion_codes import MotionRVQTokenizer, MotionVQTokenizer
from .motion_vae import MotionSigmaTokenizer
from .video_adapters import CogVideoXTokenizer, WanTokenizer
from .video_bsq import BSQTransformerTokenizer
from .video_frames import FrameTokenizer
from .video_vae import VideoKLTokenizer, VideoSigmaTokenizer

VIDEO_TOKENIZERS: dict[str, type[Any]] = {
    "frames": FrameTokenizer,
    "video_kl": VideoKLTokenizer,
    "video_sigma": VideoSigmaTokenizer,
    "bsq_transformer": BSQTransformerTokenizer,
    "wan": WanTokenizer,
    "cogvideox": CogVideoXTokenizer,
    "features": FeatureFrameTokenizer,
    "feature_streams": FeatureStreamTokenizer,
    "motion_sigma": MotionSigmaTokenizer,
    "motion_vq": MotionVQTokenizer,
    "motion_rvq": MotionRVQTokenizer,
}


def build_video_tokenizer(config: Mapping[str, Any]) -> nn.Module:
    """Build a video tokenizer.

    Args:
        config: `kind` names the class (a key of `VIDEO_TOKENIZERS`); the other entries are its
            constructor arguments.

    Raises:
        ValueError: No or an unknown `kind`, or a setting the class does not have; the nearest
            legal name is given.

    Example:
        >>> build_video_tokenizer({"kind": "frames", "image": {"kind": "light"}}).grid
        (4, 4)
    """
    return build_tokenizer(config, VIDEO_TOKENIZERS)


def load_video_tokenizer(folder: Path | str) -> nn.Module:
    """Load a video tokenizer stored with `save_pretrained`, in evaluation mode and float32.

    Args:
        folder: Holds `config.json` and safetensors weights.

    Raises:
        ValueError: No readable `config.json`, or it names a class that is no video tokenizer.
    """
    return load_tokenizer(folder, VIDEO_TOKENIZERS)
