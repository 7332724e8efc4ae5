"""Motions of a few kinds, made by rule: enough to learn what a text says."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from blockloom.training.clips import ClipDataset

TEXTS = (
    "a person walks forward", "a person walks backward", "a person raises the left arm",
    "a person raises the right arm", "a person bends down",
)  # fmt: skip
FPS = 20.0


def tiny_joints(text: str, frames: int, seed: int = 0) -> np.ndarray:
    """Move the rest pose of the 22 joints, float32 [frames, 22, 3] in metres.

    Args:
        text: One of `TEXTS`.
        frames: Poses.
        seed: Changes speed, height and phase a little.
    """
    from blockloom.motion.skeleton import HUMAN22

    rng = np.random.default_rng(seed)
    pose = np.zeros((22, 3))
    for joint, parent in enumerate(HUMAN22.parents):
        pose[joint] = HUMAN22.offsets[joint] + (pose[parent] if parent >= 0 else 0)
    joints = np.repeat(pose[None], frames, axis=0)
    joints[..., 1] -= pose[:, 1].min()
    time = np.arange(frames) / FPS
    wave = np.sin(2 * np.pi * (time + rng.random()))
    if "walks" in text:
        way = (1 if "forward" in text else -1) * rng.uniform(0.8, 1.2) * time
        joints[..., 2] += way[:, None]
        for side, foot in ((1, (7, 10)), (-1, (8, 11))):
            joints[:, foot, 2] += 0.2 * side * wave[:, None]
    elif "arm" in text:
        elbow, wrist = (18, 20) if "left" in text else (19, 21)
        joints[:, elbow, 1] += 0.2 * (1 + wave)
        joints[:, wrist, 1] += rng.uniform(0.4, 0.5) * (1 + wave)
    else:
        upper = [3, 6, 9, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21]
        joints[:, upper, 1] -= 0.25 * (1 + wave)[:, None]
        joints[:, upper, 2] += 0.25 * (1 + wave)[:, None]
    return joints.astype(np.float32)


def tiny_features(text: str, frames: int, seed: int = 0) -> np.ndarray:
    """Describe `tiny_joints` by 263 features, float32 [frames, 263]; no bone is ever twisted."""
    from blockloom.motion.clip import Motion
    from blockloom.motion.features import human_features
    from blockloom.motion.skeleton import HUMAN22

    joints = tiny_joints(text, frames + 1, seed)
    still = np.zeros((frames + 1, 22, 4), np.float32)
    still[..., 0] = 1
    return human_features(Motion(joints, HUMAN22, FPS, still, text))


def tiny_motions(per_text: int = 6, held_out: int = 2) -> "ClipDataset":
    """Lay motions of all `TEXTS` end to end; the last ones of each text are held out."""
    from blockloom.training.clips import ClipDataset

    frames, captions, split = [], [], []
    for kind, text in enumerate(TEXTS):
        for number in range(per_text):
            frames.append(tiny_features(text, 20 + 4 * (number % 3), 100 * kind + number))
            captions.append(text)
            split.append("train" if number < per_text - held_out else "test")
    offsets = np.cumsum([0, *(len(some) for some in frames)])
    return ClipDataset(np.concatenate(frames), offsets, captions, split, FPS)
