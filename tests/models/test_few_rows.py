"""The decode path for a few rows: the bits of the layers called one by one, for every batch."""

import pytest
import torch
from torch import Tensor, nn

from blockloom.core.numerics import RowStableLinear, row_stable_linear
from blockloom.core.recipe import load_recipe
from blockloom.core.sampling import item_generator
from blockloom.models import backbone
from blockloom.models.generate import Request, start
from blockloom.models.generator import GenerativeModel

SIZES = (
    ["backbone.dim=64", "backbone.heads=4"],
    ["backbone.dim=48", "backbone.heads=4", "backbone.kv_heads=2"],
    ["backbone.dim=20", "backbone.heads=2"],
)
GUIDED = ["condition.adaln=true", "condition.modulate=[clean,noisy]", "schedule.guidance_scale=2.0"]


def built(name: str, settings: list[str], *grid: int, **values: int) -> GenerativeModel:
    recipe = load_recipe(name, ["backbone.layers=2", *settings])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GenerativeModel(recipe.model_dump(mode="json"), *grid, **values)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny(settings: list[str]) -> GenerativeModel:
    return built("image/llamagen", settings, 2, 3, codebook_size=7)


def decode(model: GenerativeModel, items: int) -> tuple[Tensor, Tensor]:
    """Hidden states of all one-row passes, and the codes."""
    prompts = [f"prompt {i}" for i in range(items)]
    rollout = start(model, Request(prompts, [item_generator(0, i) for i in range(items)]))
    passes: list[Tensor] = []
    rollout.record = lambda layout, hidden: passes.append(hidden)
    for _ in rollout.events():
        pass
    return torch.cat(passes[1:], 1), rollout.values


@pytest.mark.parametrize("extra", [[], GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size[0])
def test_it_equals_the_layers_bit_for_bit_for_every_batch(size, extra, monkeypatch):
    model = tiny([*size, *extra])
    answers: list[bool] = []
    real = backbone.fits_few_rows

    def asked(*args: object) -> bool:
        answers.append(real(*args))
        return answers[-1]

    with torch.no_grad():
        alone = decode(model, 1)
        for items in (1, 2, 4, 5, 9):
            monkeypatch.setattr(backbone, "fits_few_rows", asked)
            fast = decode(model, items)
            monkeypatch.setattr(backbone, "fits_few_rows", lambda *args: False)
            slow = decode(model, items)
            assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
            rows = [0, items] if extra else [0]  # the first item of each guidance branch
            assert torch.equal(fast[0][rows], alone[0])
            assert torch.equal(fast[1][:1], alone[1])
    # Five passes after the prompt's for each of the batches that fit into eight rows.
    assert sum(answers) == 5 * (3 if extra else 4)


def flowing(settings: list[str]) -> GenerativeModel:
    """A flow over latent frames: fused commits, two rows of two kinds in a block's first pass."""
    sizes = ["schedule.steps=3", "text.buckets=32", "cache.window=3"]
    return built("motion/block_flow", [*sizes, *settings], 1, 1, latent_channels=6)


@pytest.mark.parametrize("extra", [[], ["schedule.guidance_scale=2.0"]], ids=["plain", "guided"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: size[0])
def test_passes_of_two_rows_equal_the_layers_bit_for_bit(size, extra, monkeypatch):
    model = flowing([*size, *extra])
    shapes: list[tuple[int, int]] = []
    real = backbone.fits_few_rows

    def asked(layers: object, x: Tensor, *rest: object) -> bool:
        if fits := real(layers, x, *rest):
            shapes.append((x.shape[0], x.shape[1]))
        return fits

    with torch.no_grad():
        alone = decode(model, 1)
        for items in (1, 2, 3, 5):
            monkeypatch.setattr(backbone, "fits_few_rows", asked)
            fast = decode(model, items)
            monkeypatch.setattr(backbone, "fits_few_rows", lambda *args: False)
            slow = decode(model, items)
            assert torch.equal(fast[0], slow[0]) and torch.equal(fast[1], slow[1])
            assert torch.equal(fast[1][:1], alone[1])
    branches = 2 if extra else 1
    assert {2 * branches, 4 * branches} <= {b * n for b, n in shapes if n == 2}
    assert max(b * n for b, n in shapes) <= 8


def test_adapters_and_hooks_take_the_modules():
    model = tiny(SIZES[0])
    calls: list[int] = []
    with torch.no_grad():
        plain = decode(model, 1)
        handle = model.backbone.layers[0].register_forward_hook(lambda *_: calls.append(1))
        hooked = decode(model, 1)
        handle.remove()
        assert len(calls) == 6 and torch.equal(plain[0], hooked[0])

        class Doubled(RowStableLinear):
            def forward(self, x: Tensor) -> Tensor:
                return 2 * super().forward(x)

        old = model.backbone.layers[0].mlp.to_out
        new = Doubled(old.in_features, old.out_features, bias=False).eval()
        new.load_state_dict(old.state_dict())
        model.backbone.layers[0].mlp.to_out = new
        assert not torch.equal(decode(model, 1)[0], plain[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("features", "out"), [(3, 5), (16, 1), (33, 100), (64, 192), (256, 768)])
def test_single_rows_do_not_depend_on_the_batch(dtype, features, out):
    generator = torch.Generator().manual_seed(features)
    weight = torch.randn(out, features, generator=generator, dtype=dtype)
    bias = torch.randn(out, generator=generator, dtype=dtype)
    rows = torch.randn(19, 1, features, generator=generator, dtype=dtype)
    with torch.no_grad():
        full = row_stable_linear(rows, weight, bias)
        plain = nn.functional.linear(rows, weight, bias)
        torch.testing.assert_close(full, plain, rtol=1e-5, atol=1e-4)  # sums of size 50
        for count in range(1, 19):
            assert torch.equal(row_stable_linear(rows[:count], weight, bias), full[:count]), count


@pytest.mark.parametrize("recipe", ["llamagen", "block_masked", "maskgil"])
def test_keys_rotated_at_write_or_at_read_give_the_same_bits(recipe):
    passes = {}
    for keys in ("rotated", "unrotated"):
        sizes = ["backbone.dim=48", "backbone.heads=4", "backbone.layers=2", "schedule.steps=2"]
        spec = load_recipe(f"image/{recipe}", [*sizes, f"cache.keys={keys}"])
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = GenerativeModel(spec.model_dump(mode="json"), 2, 3, codebook_size=7).eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
        with torch.no_grad():
            passes[keys] = decode(model, 2)
    assert torch.equal(passes["rotated"][1], passes["unrotated"][1])
    assert torch.equal(passes["rotated"][0], passes["unrotated"][0])


@pytest.mark.parametrize("recipe", ["block_masked", "maskgil"])
def test_commit_passes_that_stop_at_the_keys_leave_the_same_cache(recipe):
    sizes = ["backbone.dim=48", "backbone.heads=4", "backbone.layers=2", "schedule.steps=2"]
    spec = load_recipe(f"image/{recipe}", sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GenerativeModel(spec.model_dump(mode="json"), 2, 3, codebook_size=7).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    ends = []
    with torch.no_grad():
        for whole in (True, False):
            rollout = start(model, Request(["a", "b"], [item_generator(0, i) for i in range(2)]))
            if whole:  # somebody looks at every pass, so none may be cut short
                rollout.record = lambda layout, hidden: None
            for _ in rollout.events():
                pass
            ends.append((rollout.values, rollout.cache.snapshot()))
    assert torch.equal(ends[0][0], ends[1][0])
    used = int(ends[0][1]["written"][0])
    for name, tensor in ends[0][1].items():
        cut = (slice(None), slice(None), slice(used)) if name.startswith(("keys", "values")) else ()
        assert torch.equal(tensor[cut], ends[1][1][name][cut]), name
