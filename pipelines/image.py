"""Text to image, and editing, as a diffusers pipeline.

A request becomes a rollout; this file consumes its events. `pipe(...)` runs them to the end,
`pipe.stream(...)` passes them on with previews. It knows neither masks nor schedules.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.utils import BaseOutput
from einops import rearrange, repeat
from PIL import Image
from torch import Tensor

from ..core.decoder import Event
from ..core.errors import UsageError, check_one_of, describe
from ..models.generate import Request, empty_values, picture_values, start
from .base import MAX_PROMPT, CallPipeline, item_generators

MAX_IMAGES = 256
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
_CALLBACK_TENSORS = ("latents", "is_known")


@dataclass
class ImagePipelineOutput(BaseOutput):
    """Result of a call.

    Attributes:
        images: Pictures, as `output_type` asked; tokens for "latent".
        tokens: Codes [items, cells, codebooks] or latents [items, cells, channels].
        is_complete: False when the call was interrupted before every token was known.
    """

    images: Any
    tokens: Tensor
    is_complete: bool = True


class ImagePipeline(CallPipeline):
    """Draws pictures from words with any image recipe."""

    _callback_tensor_inputs: ClassVar[list[str]] = list(_CALLBACK_TENSORS)

    @property
    def recipe_name(self) -> str:
        """Name of the recipe the model was trained from."""
        return self.model.recipe.name

    # -- checks -----------------------------------------------------------------------------

    def _check(self, prompts: list[str], count: int, given: dict[str, Any]) -> None:
        if not 1 <= count <= MAX_IMAGES:
            legal = f"1 to {MAX_IMAGES}"
            near = str(min(max(count, 1), MAX_IMAGES))
            raise UsageError(describe("num_images_per_prompt", count, legal, near))
        for prompt in prompts:
            if len(prompt) > MAX_PROMPT:
                raise UsageError(
                    describe("prompt length", len(prompt), f"at most {MAX_PROMPT} characters")
                )
        limits = {
            "num_inference_steps": (1, 1000),
            "guidance_scale": (0.0, 100.0),
            "temperature": (0.0, 100.0),
            "top_k": (1, self.tokenizer.codebook_size or 1),
            "top_p": (0.0, 1.0),
        }
        for name, (low, high) in limits.items():
            value = given[name]
            if value is not None and not low <= value <= high:
                near = str(low if value != value else min(max(value, low), high))
                raise UsageError(describe(name, value, f"{low} to {high}", near))
        size = self.tokenizer.image_size
        for name in ("height", "width"):
            if given[name] is not None and given[name] != size:
                raise UsageError(describe(name, given[name], f"{size} pixels", str(size)))

    def _prompts(self, prompt: Any) -> list[str]:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, list | tuple) or not prompts:
            raise UsageError(describe("prompt", type(prompt).__name__, "text, or a list of texts"))
        for item in prompts:
            if not isinstance(item, str):
                raise UsageError(describe("prompt item", type(item).__name__, "text"))
        return list(prompts)

    def _given(
        self, image: Any, keep: Any, latents: Tensor | None, items: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Tokens of the given picture, and which cells are kept."""
        if image is None and latents is None:
            if keep is not None:
                raise UsageError("keep needs image or latents: what is kept must be given")
            return None, None
        if image is not None and latents is not None:
            raise UsageError("image and latents both give tokens; pass one of them")
        if keep is None:
            raise UsageError("image and latents need keep: a boolean mask of what stays")
        if latents is None:
            pixels = to_pixels(image, self.tokenizer.image_size)
            values = self.tokenizer.encode(pixels.to(self.device, self.model.dtype))
            values = repeat(values, "1 ... -> b ...", b=items)
        else:
            values = self._checked_latents(latents, items)
        cells = keep_cells(np.asarray(keep, dtype=bool), tuple(self.tokenizer.grid))
        if cells.all():
            raise UsageError("keep covers every cell: nothing is left to draw")
        known = torch.from_numpy(cells.reshape(1, -1)).to(values.device)
        return values, known.expand(items, -1).clone()

    def _checked_latents(self, latents: Tensor, items: int) -> Tensor:
        """Refuse tokens of another shape or kind than the model's."""
        canvas = empty_values(self.model, items)
        if latents.shape != canvas.shape:
            legal = str(tuple(canvas.shape))
            raise UsageError(describe("latents shape", tuple(latents.shape), legal))
        if latents.is_floating_point() != canvas.is_floating_point():
            raise UsageError(describe("latents dtype", latents.dtype, str(canvas.dtype)))
        if canvas.is_floating_point() and not bool(latents.isfinite().all()):
            raise UsageError(describe("latents", "NaN or infinite", "finite numbers"))
        size = self.tokenizer.codebook_size
        if size and not 0 <= int(latents.min()) <= int(latents.max()) < size:
            raise UsageError(describe("latents", int(latents.max()), f"codes 0 to {size - 1}"))
        return latents.to(canvas)

    def _request(self, prompt: Any, **given: Any) -> Request:
        prompts, count = self._prompts(prompt), given["num_images_per_prompt"]
        self._check(prompts, count, given)
        items = len(prompts) * count
        prompts = [p for p in prompts for _ in range(count)]
        negative = given["negative_prompt"]
        if negative is not None:
            negative = self._prompts(negative)
            if len(negative) == 1:
                negative = negative * len(prompts)
            elif len(negative) * count == len(prompts):
                negative = [p for p in negative for _ in range(count)]
            else:
                raise UsageError(describe("number of negative prompts", len(negative), "one each"))
        values, known = self._given(given["image"], given["keep"], given["latents"], items)
        return Request(
            prompts,
            item_generators(given["generator"], given["seed"], items),
            negative_prompts=negative,
            num_steps=given["num_inference_steps"],
            guidance_scale=given["guidance_scale"],
            temperature=given["temperature"],
            top_k=given["top_k"],
            top_p=given["top_p"],
            values=values,
            is_known=known,
            use_cache=given["use_cache"],
        )

    # -- calls ------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        image: Any = None,
        keep: Any = None,
        use_cache: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Draw pictures.

        Args:
            prompt: What to draw; one text or a list. An empty text draws without a prompt.
            negative_prompt: What to steer away from (needs guidance_scale > 1).
            height: Pixels; None or the model's own size.
            width: Pixels; None or the model's own size.
            num_inference_steps: Rows per block, 1..1000; None = the recipe's.
            guidance_scale: 1 = off, at most 100; None = the recipe's.
            num_images_per_prompt: Pictures per prompt, 1..256.
            generator: One for all, or one per picture; picture k depends on its own only.
            latents: Tokens [pictures, cells, ...] instead of `image`, as `output.tokens` gives
                them; those where `keep` is True stay.
            output_type: "pil", "np" [0, 1] channels last, "pt" [0, 1] channels first, "latent".
            return_dict: False returns a tuple.
            callback_on_step_end: Called (pipe, index, level, tensors) after every row; may return
                {"latents": ...} unchanged names only.
            callback_on_step_end_tensor_inputs: Names among latents, is_known.
            temperature: 0 = greedy, at most 100; None = the recipe's.
            top_k: Codes kept per draw; None = the recipe's.
            top_p: Probability mass kept per draw; None = the recipe's.
            seed: Used when no generator is given: picture k is item k of the seed.
            image: Picture to edit.
            keep: Boolean pixels [height, width] or cells; True stays. A cell is kept when all of
                its pixels are.
            use_cache: False recomputes the past in every pass; same pictures, slower.

        Returns:
            `images`, `tokens` and `is_complete`.

        Raises:
            UsageError: a setting outside its range (a ValueError).
        """
        given = {k: v for k, v in locals().items() if k in _GIVEN}
        check_one_of("output_type", output_type, OUTPUT_TYPES)
        for name in callback_on_step_end_tensor_inputs:
            check_one_of("callback_on_step_end_tensor_inputs", name, _CALLBACK_TENSORS)
        self._interrupted = False
        request = self._request(prompt, **given)
        request.should_stop = lambda: self._interrupted
        rollout, index = start(self.model, request), 0
        with self.progress_bar(total=rollout.plan.num_blocks) as bar:
            for event in rollout.events():
                if event.kind == "commit":
                    bar.update()
                if event.kind == "row" and callback_on_step_end is not None:
                    tensors = {"latents": rollout.values, "is_known": rollout.is_known}
                    chosen = {n: tensors[n] for n in callback_on_step_end_tensor_inputs}
                    _check_returned(callback_on_step_end(self, index, event.data["level"], chosen))
                    index += 1
        tokens = picture_values(self.model, rollout.values)
        complete = bool(rollout.is_known.all())
        images = tokens if output_type == "latent" else self._finish(rollout, output_type)
        output = ImagePipelineOutput(images=images, tokens=tokens, is_complete=complete)
        return output if return_dict else (images, tokens, complete)

    def _finish(self, rollout: Any, output_type: str) -> Any:
        pixels = self.preview(rollout.values, rollout.is_known)
        return from_pixels(pixels, output_type)

    @torch.no_grad()
    def stream(
        self,
        prompt: str | list[str],
        *,
        preview: bool = True,
        should_stop: Callable[[], bool] = lambda: False,
        **settings: Any,
    ) -> Iterator[Event]:
        """Draw pictures and report every step.

        Args:
            prompt: As in `__call__`.
            preview: Decode after every row of one picture and after every block; adds
                `data["images"]`, with cells not drawn yet shown as a grey check.
            should_stop: Asked before every row; True ends the stream with what is there.
            **settings: Any argument of `__call__` but output_type, return_dict and callbacks.

        Yields:
            Events: row and commit as the rollout reports them, `decoded` with previews, and
            `done` with `images`, `tokens`, `is_complete`.

        Raises:
            UsageError: unknown setting, or one outside its range.
        """
        unknown = sorted(set(settings) - set(_GIVEN))
        if unknown:
            raise UsageError(describe("stream setting", unknown[0], ", ".join(_GIVEN)))
        defaults = dict.fromkeys(_GIVEN) | {"num_images_per_prompt": 1, "use_cache": True}
        self._interrupted = False
        request = self._request(prompt, **(defaults | settings))
        request.should_stop = lambda: self._interrupted or should_stop()
        rollout = start(self.model, request)
        for event in rollout.events():
            if event.kind == "done":
                tokens = picture_values(self.model, rollout.values)
                event.data["tokens"] = tokens
                event.data["images"] = from_pixels(
                    self.preview(rollout.values, rollout.is_known), "pil"
                )
                event.data["is_complete"] = bool(rollout.is_known.all())
                yield event
                return
            yield event
            if preview and event.kind == "row":
                pixels = self.preview(rollout.values, _shown(event))
                data = {"images": from_pixels(pixels, "pil")}
                yield Event("decoded", event.path, event.block, event.of_blocks, data)

    def preview(self, values: Tensor, is_known: Tensor) -> Tensor:
        """Decode slots to pixels in [-1, 1]; unknown cells become a grey check."""
        first = self.model.recipe.layout.text_tokens
        grid = tuple(self.tokenizer.grid)
        cells = picture_values(self.model, values)
        known = is_known[:, first : first + grid[0] * grid[1]]
        if cells.is_floating_point():
            cells = torch.where(known[..., None], cells, 0.0)
        pixels = self.tokenizer.decode(cells).float().clamp(-1, 1)
        if bool(known.all()):
            return pixels
        size = pixels.shape[-1]
        shown = rearrange(known, "b (h w) -> b 1 h w", h=grid[0]).repeat_interleave(
            size // grid[0], 2
        )
        shown = shown.repeat_interleave(size // grid[1], 3)
        line = torch.arange(size, device=pixels.device) // max(size // 16, 1)
        check = 0.72 + 0.1 * ((line[:, None] + line[None, :]) % 2).float()
        return torch.where(shown, pixels, check)


_GIVEN = (
    "negative_prompt", "height", "width", "num_inference_steps", "guidance_scale",
    "num_images_per_prompt", "generator", "latents", "temperature", "top_k", "top_p", "seed",
    "image", "keep", "use_cache",
)  # fmt: skip


def _shown(event: Event) -> Tensor:
    """Cells a preview shows: everything known, and a block that is being denoised."""
    known = event.data["is_known"]
    if event.data["values"].is_floating_point():
        known = known.clone()
        known[:, event.data["sources"]] = True
    return known


def _check_returned(returned: Any) -> None:
    for name in returned or {}:
        if name not in _CALLBACK_TENSORS:
            legal = ", ".join(_CALLBACK_TENSORS)
            raise UsageError(describe("callback result", name, legal))


def to_pixels(image: Any, size: int) -> Tensor:
    """Turn a picture into [1, 3, size, size] pixels in [-1, 1].

    Args:
        image: PIL picture (any mode; transparency on white) or uint8 [height, width, 3] array.
        size: Side in pixels; other sizes are resampled.
    """
    if not isinstance(image, Image.Image):
        image = Image.fromarray(np.asarray(image))
    if image.mode in ("RGBA", "LA", "P", "PA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    image = image.convert("RGB")
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.LANCZOS)
    array = np.asarray(image, dtype=np.float32) / 127.5 - 1
    return rearrange(torch.from_numpy(array), "h w c -> 1 c h w")


def from_pixels(pixels: Tensor, output_type: str) -> Any:
    """Turn pixels in [-1, 1] into "pil", "np" or "pt" pictures."""
    unit = ((pixels.float().clamp(-1, 1) + 1) / 2).cpu()
    if output_type == "pt":
        return unit
    last = rearrange(unit, "b c h w -> b h w c").numpy()
    if output_type == "np":
        return last
    return [Image.fromarray(np.round(picture * 255).astype(np.uint8)) for picture in last]


def keep_cells(keep: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Turn a mask of pixels or cells into cells: a cell stays when all of its pixels do.

    Raises:
        UsageError: the mask does not divide into the grid.
    """
    if keep.shape == grid:
        return keep
    if keep.ndim != 2 or keep.shape[0] % grid[0] or keep.shape[1] % grid[1]:
        legal = f"2-D, a multiple of {grid[0]}x{grid[1]}"
        raise UsageError(describe("keep shape", keep.shape, legal))
    cells = rearrange(keep, "(h p) (w q) -> h w (p q)", h=grid[0], w=grid[1])
    return np.all(cells, axis=-1)
