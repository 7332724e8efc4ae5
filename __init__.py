"""Blockloom: one mask-schedule-cache core for block-causal diffusion and token models.

Importing this module runs nothing: public names load on first use (PEP 562), so that
`blockloom --help` answers before torch is imported.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "Layout": "core.layout",
    "MaskTable": "core.masks",
    "Recipe": "core.recipe",
    "KVCache": "core.cache",
    "ImagePipeline": "pipelines.image",
    "VideoPipeline": "pipelines.video",
    "WorldPipeline": "pipelines.world",
    "MotionPipeline": "pipelines.motion",
    "AutoPipeline": "pipelines.auto",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    raise AttributeError(f"module 'blockloom' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
