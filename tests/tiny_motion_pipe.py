"""Motion pipelines of real classes that cost nothing: one in order, one all at once."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockloom.pipelines.motion import MotionPipeline

SIZES = (
    "backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16", "text.buckets=32",
    "text.words=3", "layout.frames=6", "tokenizer.width=16",
)  # fmt: skip
IN_ORDER = ("tokenizer.latent_channels=8", "schedule.steps=2", "cache.window=3")
AT_ONCE = ("tokenizer.codebook_size=16", "tokenizer.levels=2", "schedule.levels=[3,1]")


def tiny_motion_pipe(*, in_order: bool = True) -> "MotionPipeline":
    """Build a motion model whose poses are those of `tiny_motions`, shaken.

    Args:
        in_order: True for one latent frame (4 poses) after another, False for all at once.
    """
    import torch
    from tests.tiny_motion import tiny_motions

    from blockloom.core.recipe import load_recipe
    from blockloom.models.generator import GenerativeModel
    from blockloom.pipelines.motion import MotionPipeline
    from blockloom.tokenizers.video_build import build_video_tokenizer

    name, sizes = ("block_flow", IN_ORDER) if in_order else ("momask", AT_ONCE)
    recipe = load_recipe(f"motion/{name}", [*SIZES, *sizes])
    frames = torch.from_numpy(tiny_motions(2, 0).frames).T[None]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = recipe.model_dump(mode="json")
        told = {name: value for name, value in recipe.tokenizer.items() if name != "train"}
        tokenizer: Any = build_video_tokenizer(told).eval()
        tokenizer.measure_features([frames])
        model = GenerativeModel(
            settings, *tokenizer.grid, latent_channels=tokenizer.latent_channels,
            num_codebooks=tokenizer.num_codebooks, codebook_size=tokenizer.codebook_size,
        )  # fmt: skip
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return MotionPipeline(tokenizer, model.eval())
