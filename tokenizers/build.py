"""Build a tokenizer from the `tokenizer` part of a recipe, or load one from a folder.

It does not know recipes; it takes a plain mapping.
"""

import difflib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from .adapters import AutoencoderKLTokenizer, VQModelTokenizer
from .bsq import BSQTokenizer
from .fsq import FSQTokenizer
from .kl import KLTokenizer
from .light import LightFSQTokenizer, LightTokenizer
from .mosaic import MosaicTokenizer
from .pixels import PaletteTokenizer, PatchTokenizer
from .sigma import SigmaVAETokenizer
from .vq import VQTokenizer

TOKENIZERS: dict[str, type[Any]] = {
    "palette": PaletteTokenizer,
    "patch": PatchTokenizer,
    "fsq": FSQTokenizer,
    "vq": VQTokenizer,
    "bsq": BSQTokenizer,
    "kl": KLTokenizer,
    "sigma": SigmaVAETokenizer,
    "light": LightTokenizer,
    "light_fsq": LightFSQTokenizer,
    "mosaic": MosaicTokenizer,
    "autoencoder_kl": AutoencoderKLTokenizer,
    "vq_model": VQModelTokenizer,
}


def build_tokenizer(
    config: Mapping[str, Any], kinds: Mapping[str, type[Any]] = TOKENIZERS
) -> nn.Module:
    """Build a tokenizer, of images unless other kinds are given.

    Args:
        config: `kind` names the class (a key of `kinds`); the other entries are its
            constructor arguments.
        kinds: Classes by kind.

    Raises:
        ValueError: No or an unknown `kind`, or a setting the class does not have; the nearest
            legal name is given.

    Example:
        >>> build_tokenizer({"kind": "palette", "image_size": 16, "patch": 4}).grid
        (4, 4)
    """
    settings = dict(config)
    kind = settings.pop("kind", None)
    if kind not in kinds:
        raise ValueError(f"tokenizer kind is {kind!r}; {_choices(str(kind), kinds)}")
    cls = kinds[kind]
    legal = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
    for name in settings:
        if name not in legal:
            raise ValueError(f"tokenizer {kind!r} has no setting {name!r}; {_choices(name, legal)}")
    return cls(**settings)


def load_tokenizer(folder: Path | str, kinds: Mapping[str, type[Any]] = TOKENIZERS) -> nn.Module:
    """Load a tokenizer stored with `save_pretrained`, in evaluation mode and float32.

    Args:
        folder: Holds `config.json` and safetensors weights.
        kinds: Classes by kind; those of images by default.

    Raises:
        ValueError: No readable `config.json`, or it names a class that is not a tokenizer.
    """
    file = Path(folder) / "config.json"
    try:
        name = json.loads(file.read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a tokenizer configuration ({error})") from error
    classes = {cls.__name__: cls for cls in kinds.values()}
    if name not in classes:
        raise ValueError(f"{file}: class {name!r} is no tokenizer; {_choices(str(name), classes)}")
    return classes[name].from_pretrained(folder, use_safetensors=True).float().eval()


def _choices(given: str, legal: Mapping[str, Any] | list[str]) -> str:
    near = difflib.get_close_matches(given, list(legal), n=1)
    return f"allowed {', '.join(legal)}" + (f"; nearest {near[0]}" if near else "")
