"""What all tests share: no network, and shape checks at run time when asked for."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

# `BLOCKLOOM_CHECK_SHAPES=1 python -m pytest` checks every signature's shapes and types on every
# call, before anything imports these rooms. Off by default: tests that hand in wrong values on
# purpose would then see the checker's error and not ours.
if os.environ.get("BLOCKLOOM_CHECK_SHAPES") == "1":
    jaxtyping.install_import_hook(
        ["blockloom.core", "blockloom.models", "blockloom.tokenizers"], "beartype.beartype"
    )

_LOCAL = {"127.0.0.1", "::1", "localhost", "0.0.0.0"}


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse connections that leave this machine."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in _LOCAL:
            raise OSError(f"tests have no network; tried {address}")
        connect(self, address)

    socket.socket.connect = guarded  # type: ignore[method-assign]
    yield
    socket.socket.connect = connect  # type: ignore[method-assign]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved pipeline of real classes: 4 x 4 tokens of 8 colours, untrained weights."""
    import torch

    from blockloom.core.recipe import load_recipe
    from blockloom.models.generator import GenerativeModel
    from blockloom.pipelines.image import ImagePipeline
    from blockloom.tokenizers.build import build_tokenizer

    sizes = ["backbone.dim=32", "backbone.layers=1", "backbone.heads=2"]
    recipe = load_recipe("image/maskgit", [*sizes, "text.dim=16", "text.buckets=32"])
    tokenizer: Any = build_tokenizer({"kind": "palette", "image_size": 16, "patch": 4})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GenerativeModel(
            recipe.model_dump(mode="json"),
            *tokenizer.grid,
            num_codebooks=tokenizer.num_codebooks,
            codebook_size=tokenizer.codebook_size,
        )
        for parameter in model.parameters():  # heads start at zero; pictures should differ
            torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ImagePipeline(tokenizer, model).save_pretrained(folder)
    return folder
