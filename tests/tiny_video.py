"""A video model of real classes that costs nothing."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blockloom.pipelines.world import WorldPipeline

SETTINGS = (
    "modality=video", "layout.kind=frames", "layout.block=frame", "layout.frames=6",
    "cache.window=3", "backbone.dim=32", "backbone.layers=1", "backbone.heads=2", "text.dim=16",
    "text.buckets=32", "text.words=3", "schedule.steps=2", "corruption.kind=flow",
    "head.objective=velocity", "schedule.update=euler",
)  # fmt: skip


def tiny_video(*extra: str, actions: int = 3) -> "WorldPipeline":
    """Build a video model: 16 x 16 pixels, one frame at a time, a window of three.

    Untrained, with large weights (heads start at zero), so that frames change all the time and
    with every action.
    """
    import torch

    from blockloom.core.recipe import load_recipe
    from blockloom.models.generator import GenerativeModel
    from blockloom.pipelines.world import WorldPipeline
    from blockloom.tokenizers.video_build import build_video_tokenizer

    recipe = load_recipe("image/acdit", [*SETTINGS, f"condition.actions={actions}", *extra])
    image = {"kind": "patch", "image_size": 16, "patch": 8}
    tokenizer: Any = build_video_tokenizer({"kind": "frames", "image": image}).eval()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GenerativeModel(
            recipe.model_dump(mode="json"), *tokenizer.grid,
            latent_channels=tokenizer.latent_channels,
        )  # fmt: skip
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return WorldPipeline(tokenizer, model.eval())
