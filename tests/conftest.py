"""What all tests share: no network, and shape checks at run time when asked for."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

# Tests that run beside each other (`-n`) take one thread each, or they wait for one another. torch
# reads this when it is imported, and so do the commands that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# `BLOCKLOOM_CHECK_SHAPES=1 python -m pytest` checks every signature's shapes and types on every
# call, before anything imports these rooms. Off by default: tests that hand in wrong values on
# purpose would then see the checker's error and not ours.
if os.environ.get("BLOCKLOOM_CHECK_SHAPES") == "1":
    jaxtyping.install_import_hook(
        ["blockloom.core", "blockloom.models", "blockloom.motion", "blockloom.tokenizers"],
        "beartype.beartype",
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


@pytest.fixture(scope="module")
def event_loops() -> Iterator[None]:
    """Close the event loops that Gradio opens for every page and leaves to the collector."""
    opened, original = [], asyncio.new_event_loop

    def remembered() -> asyncio.AbstractEventLoop:
        opened.append(original())
        return opened[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(asyncio, "new_event_loop", remembered)
        yield
    asyncio.set_event_loop(None)
    for loop in opened:
        if not loop.is_running():
            loop.close()


@pytest.fixture(scope="session")
def free_port() -> Callable[[], int]:
    """Return a function that finds a port of this machine nobody listens on."""

    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Return a function that runs one command and gives (exit code, stdout, last stderr line)."""

    from blockloom import cli

    def call(*arguments: Any, code: int | None = 0) -> tuple[int, str, str]:
        status = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        errors = [line for line in err.splitlines() if line.startswith("error[")]
        assert "Traceback" not in err and len(errors) == (status != 0), err
        if code is not None:
            assert status == code, err
        return status, out, (errors or [err])[-1]

    return call


@pytest.fixture(scope="module")
def shelf(tiny_model: Path) -> Any:
    """Return the demo's shelf with the tiny model on it."""
    from blockloom.demo.shelf import Shelf

    return Shelf([str(tiny_model)])


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


@pytest.fixture(scope="session")
def tiny_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved video model that takes words and no actions."""
    folder = tmp_path_factory.mktemp("clips") / "tiny-clips"
    from tests.tiny_video import tiny_video

    tiny_video(actions=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_motion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved motion model that makes frames in order."""
    from tests.tiny_motion_pipe import tiny_motion_pipe

    folder = tmp_path_factory.mktemp("motions") / "tiny-motion"
    tiny_motion_pipe().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_infill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved motion model that makes all frames together and redraws spans."""
    from tests.tiny_motion_pipe import tiny_motion_pipe

    folder = tmp_path_factory.mktemp("motions") / "tiny-infill"
    tiny_motion_pipe(in_order=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a saved world: three numbers per action, two starts, four keys."""
    import json

    import numpy as np

    folder = tmp_path_factory.mktemp("worlds") / "tiny-world"
    from tests.tiny_video import tiny_video

    tiny_video(actions=3).save_pretrained(folder)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 4, 16, 16, 3), dtype=np.uint8)
    actions = np.zeros((2, 4, 3), dtype=np.float32)
    np.savez_compressed(folder / "starts.npz", frames=frames, actions=actions)
    keys = {"ArrowLeft": [-1, 0, 0], "ArrowRight": [1, 0, 0], "ArrowUp": [0, 0.3, 0],
            "ArrowDown": [0, 0, 0.8]}  # fmt: skip
    told = {"controls": keys, "idle": [0, 0, 0], "fps": 12.5, "title": "Tiny world"}
    (folder / "world.json").write_text(json.dumps(told))
    return folder


class TinyModels:
    """Every recipe at a size that runs in milliseconds: 4 x 4 tokens, 7 codes or 5 channels.

    A frame of motion is one token, or one per level of its codes, or one per stream.

    Parameters that start at zero (heads, modulations) get small random numbers, so that no test
    passes because something is trivially zero.
    """

    height = width = 4
    codes, channels = 7, 5
    sizes = (
        "backbone.dim=40",
        "backbone.layers=2",
        "backbone.heads=2",
        "text.dim=16",
        "text.words=3",
        "text.buckets=64",
        "head.width=16",
        "head.steps=4",
    )

    def __init__(self) -> None:
        self._models: dict[Any, Any] = {}

    def recipe(self, name: str, *overrides: str) -> Any:
        """Load a recipe at tiny size."""
        from blockloom.core.recipe import load_recipe

        spans = ["layout.text_tokens=5"] if name.endswith("cm3") else []
        depth = ["head.depth=1"]
        return load_recipe(name, [*self.sizes, *spans, *depth, *overrides])

    def grid(self, recipe: Any) -> tuple[int, int]:
        """Token rows and columns of a picture, or of a frame."""
        if recipe.modality == "motion":
            levels = int(recipe.tokenizer.get("levels", 1))
            return 1, len(recipe.tokenizer.get("streams", ())) or levels
        return self.height, self.width

    def model(self, name: str, *overrides: str, dtype: Any = None, std: float = 0.1) -> Any:
        """Return a model in eval mode, the same weights for every type; not to be changed."""
        key = (name, overrides, dtype, std)
        if key not in self._models:
            self._models[key] = self.fresh_model(name, *overrides, dtype=dtype, std=std)
        return self._models[key]

    def fresh_model(self, name: str, *overrides: str, dtype: Any = None, std: float = 0.1) -> Any:
        """Build a model that the caller may train or change."""
        import torch

        from blockloom.models.generator import GenerativeModel

        recipe = self.recipe(name, *overrides)
        is_code = recipe.head.kind == "categorical"
        kind = {"codebook_size": self.codes} if is_code else {"latent_channels": self.channels}
        with torch.random.fork_rng():
            torch.manual_seed(0)
            data = recipe.model_dump(mode="json")
            model = GenerativeModel(data, *self.grid(recipe), **kind)
            with torch.no_grad():
                for part, parameter in model.named_parameters():
                    if not bool(parameter.any()) or parameter.ndim == 3:
                        # Prompt vectors are wide: modulations start gently, as after training.
                        gentle = 0.1 if "to_modulation" in part or "to_final" in part else 1.0
                        parameter.add_(torch.randn_like(parameter) * std * gentle)
        for module in model.modules():  # `model.to` warns about types it would keep
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype or torch.float32)
        return model.eval()

    def decoder(self, model: Any, prompts: list[str], guided: bool = False) -> Any:
        """Bind a model to prompts, with a second guidance branch if asked."""
        from blockloom.models.generate import prompt_vectors
        from blockloom.models.generator import ModelDecoder

        uncond = None
        if guided and model.uses_prompt:
            uncond = prompt_vectors(model, ["another thing"] * len(prompts))
        return ModelDecoder(model, prompt_vectors(model, prompts), uncond)

    def contents(self, model: Any, plan: Any, items: int = 2, seed: int = 0) -> Any:
        """Draw teacher-forced contents for a plan."""
        import torch

        from blockloom.core.proof import Contents

        rng = torch.Generator().manual_seed(seed)
        shape, dtype = (items, plan.num_slots), model.dtype
        if model.config.codebook_size:
            values = torch.randint(self.codes, (*shape, 1), generator=rng)
            if model.recipe.acting is not None:
                acts = model.is_action(torch.arange(plan.num_slots))
                values[:, acts] %= model.recipe.acting.codes
        else:
            values = torch.randn(*shape, self.channels, generator=rng, dtype=dtype)
        noisy = None
        if model.head.runs == "row":
            noisy = torch.randn(*shape, self.channels, generator=rng, dtype=dtype)
        # Equally many hidden slots per item and block, as one request requires.
        hidden = torch.rand(1, plan.num_slots, generator=rng).expand(items, -1) < 0.6
        return Contents(values, hidden, noisy)


@pytest.fixture(scope="session")
def tiny() -> TinyModels:
    """Return the builder of tiny models."""
    return TinyModels()
