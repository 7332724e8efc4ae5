"""From logits to codes, with one random stream per item.

What it is: per-item random tensors, logit filters, and drawing codes together with the four
numbers unmasking rules rank slots by.
What it does not know: masks, schedules, caches, models.
Invariants: the numbers drawn for an item depend on its own generator and its own shape only, never
on what else is in the batch; a code whose logit is -inf is never drawn; probabilities are float32.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .errors import UsageError, check_one_of, check_range, describe

FILTERS = ("temperature", "top_k", "top_p")


class TokenStats(NamedTuple):
    """How sure the model was about each drawn code; all float32, shape [batch, tokens].

    Attributes:
        prob: Probability of the code that was drawn, in [0, 1].
        max_prob: Largest probability, in [0, 1].
        margin: Largest minus second largest probability, in [0, 1].
        entropy: Shannon entropy in nats, in [0, log vocab].
    """

    prob: Float[Tensor, "batch tokens"]
    max_prob: Float[Tensor, "batch tokens"]
    margin: Float[Tensor, "batch tokens"]
    entropy: Float[Tensor, "batch tokens"]


def item_generator(seed: int, key: int | str) -> torch.Generator:
    """Make the random stream of one item of a request.

    Args:
        seed: The user's seed, any int.
        key: What tells items apart: an index, or a name such as "item 3, block 2".

    Returns:
        A CPU generator seeded with a 64-bit hash of both, so neighbouring seeds and keys share
        nothing and the stream does not depend on the device that runs the model.
    """
    digest = hashlib.blake2b(f"{seed}|{type(key).__name__}|{key}".encode(), digest_size=8).digest()
    # manual_seed takes 64 bits but treats the top one as a sign; 63 bits avoid the double meaning.
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


def _stack(
    draw: Callable[[torch.Generator], Tensor],
    generators: Sequence[torch.Generator],
    device: torch.device | str | None,
    dtype: torch.dtype,
) -> Tensor:
    # One draw per generator: a single batched draw would couple an item to its neighbours.
    return torch.stack([draw(generator) for generator in generators]).to(device, dtype)


def per_item_rand(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch ..."]:
    """Draw uniform numbers in [0, 1) for every item from its own generator.

    Args:
        shape: Shape of one item, without the batch axis.
        generators: One CPU generator per batch row.
        device: Where the stacked tensor goes.
        dtype: Floating type of the draw and of the result (float32 or float64).

    Returns:
        [batch, *shape].
    """
    size = tuple(shape)
    return _stack(lambda g: torch.rand(size, generator=g, dtype=dtype), generators, device, dtype)


def per_item_randn(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch ..."]:
    """Draw standard normal numbers for every item from its own generator.

    Args:
        shape: Shape of one item, without the batch axis.
        generators: One CPU generator per batch row.
        device: Where the stacked tensor goes.
        dtype: Floating type of the result; the draw itself is float32.

    Returns:
        [batch, *shape].
    """
    size = tuple(shape)
    return _stack(lambda g: torch.randn(size, generator=g), generators, device, dtype)


def per_item_gumbel(
    shape: Sequence[int],
    generators: Sequence[torch.Generator],
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "batch ..."]:
    """Draw standard Gumbel numbers -log(-log u) for every item from its own generator.

    Args:
        shape: Shape of one item, without the batch axis.
        generators: One CPU generator per batch row.
        device: Where the stacked tensor goes.
        dtype: Floating type of the result.

    Returns:
        [batch, *shape], always finite.
    """
    size = tuple(shape)

    def draw(generator: torch.Generator) -> Tensor:
        # float64: in float32 u is a multiple of 2^-24, which cuts the upper tail at 16.6.
        uniform = torch.rand(size, generator=generator, dtype=torch.float64)
        return -torch.log(-torch.log(uniform.clamp(min=torch.finfo(torch.float64).tiny)))

    return _stack(draw, generators, device, dtype)


def filter_logits(
    logits: Float[Tensor, "*batch vocab"],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    order: Sequence[str] = FILTERS,
) -> Float[Tensor, "*batch vocab"]:
    """Sharpen logits and cut their tail; codes that fall out get -inf.

    Args:
        logits: Any finite or -inf numbers.
        temperature: Divides the logits; 0 keeps the single best code (first of equals).
        top_k: Keep the k best codes, ties at the edge included; None or 0 keeps all.
        top_p: Keep the smallest set of best codes whose probability reaches p; None or 1: all.
        order: Order in which the three act. It is part of a recipe: nucleus sampling before or
            after the temperature keeps different sets.

    Returns:
        Filtered float32 logits of the same shape.

    Raises:
        UsageError: A negative temperature or top_k, top_p outside (0, 1], an unknown filter.
    """
    check_filters(temperature, top_k, top_p)
    logits = logits.float()
    for name in order:
        check_one_of("filter order", name, FILTERS)
        if name == "temperature":
            logits = _sharpen(logits, temperature)
        elif name == "top_k" and top_k and top_k < logits.shape[-1]:
            edge = logits.topk(top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < edge, -torch.inf)
        elif name == "top_p" and top_p is not None and top_p < 1.0:
            logits = _nucleus(logits, top_p)
    return logits


def check_filters(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Refuse filter settings outside their ranges.

    Raises:
        UsageError: A negative temperature or top_k, or top_p outside (0, 1].
    """
    check_range("temperature", temperature, 0.0)
    check_range("top_k", top_k or 0, 0)
    check_range("top_p", 1.0 if top_p is None else top_p, 0.0, 1.0, open_low=True)


def _sharpen(logits: Tensor, temperature: float) -> Tensor:
    if temperature == 0.0:
        best = logits.argmax(dim=-1, keepdim=True)
        keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, best, True)
        return logits.masked_fill(~keep, -torch.inf)
    return logits if temperature == 1.0 else logits / temperature


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    sorted_logits, index = logits.sort(dim=-1, descending=True, stable=True)
    probs = sorted_logits.softmax(dim=-1)
    # A code stays when the mass strictly before it is still short of p, so the best always stays.
    before = probs.cumsum(dim=-1) - probs
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, index, before >= top_p)
    drop.scatter_(-1, index[..., :1], False)
    return logits.masked_fill(drop, -torch.inf)


def token_stats(
    logits: Float[Tensor, "batch tokens vocab"], codes: Int[Tensor, "batch tokens"]
) -> TokenStats:
    """Measure how sure a distribution is, and how likely it found given codes.

    Args:
        logits: Finite or -inf; -inf codes have probability 0 and add nothing to the entropy.
        codes: Indices into the last axis.
    """
    logits = logits.float()
    probs = logits.softmax(dim=-1)
    best = probs.topk(min(2, probs.shape[-1]), dim=-1).values
    second = best[..., 1] if best.shape[-1] > 1 else torch.zeros_like(best[..., 0])
    prob = probs.gather(-1, codes[..., None])[..., 0]
    entropy = _entropy(logits, probs, best[..., 0])
    return TokenStats(prob, best[..., 0], best[..., 0] - second, entropy)


def _entropy(logits: Tensor, probs: Tensor, max_prob: Tensor) -> Tensor:
    """Compute -sum p log p as -log p_max - sum p (x - x_max), which needs no second exponential."""
    centred = logits - logits.amax(dim=-1, keepdim=True)
    # Any finite floor will do: probabilities there are 0, and 0 * -inf would be nan.
    terms = probs * centred.clamp_(min=-1e4)
    # Parts added in order: torch splits one long sum over threads when it is alone, and so the
    # bits of an item would depend on its batch.
    total = torch.zeros_like(max_prob)
    for part in terms.split(4096, dim=-1):
        total = total + part.sum(dim=-1)
    return (-max_prob.double().log() - total).float().clamp(min=0.0)


def sample_codes(
    logits: Float[Tensor, "batch tokens vocab"],
    generators: Sequence[torch.Generator],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    *,
    conf_from: str = "raw",
    banned_ids: Sequence[int] = (),
    order: Sequence[str] = FILTERS,
) -> tuple[Int[Tensor, "batch tokens"], TokenStats]:
    """Draw one code per token and report how sure the model was.

    One uniform number per token picks the code by inverting the cumulative distribution, so the
    random cost does not grow with the vocabulary.

    Args:
        logits: Model output; must have at least one finite value per token.
        generators: One CPU generator per batch row.
        temperature: 0 takes the most likely code and uses no random numbers.
        top_k: See `filter_logits`.
        top_p: See `filter_logits`.
        conf_from: "raw" measures confidence on the distribution before the filters (LLaDA),
            "filtered" after them (Dream).
        banned_ids: Codes that must never be drawn, such as the mask id; their logits become -inf
            before anything is measured.
        order: Order of the filters.

    Returns:
        Codes int64 [batch, tokens] and their statistics.

    Raises:
        UsageError: `conf_from` unknown, a generator count other than the batch, or a banned id
            outside the vocabulary.
    """
    check_one_of("conf_from", conf_from, ("raw", "filtered"))
    if len(generators) != logits.shape[0]:
        allowed = f"{logits.shape[0]} (one per batch row)"
        raise UsageError(describe("number of generators", len(generators), allowed))
    logits = logits.float()
    if len(banned_ids):
        logits = _ban(logits, banned_ids)
    if temperature == 0.0 and conf_from == "raw":
        codes = draw_codes(logits, generators, temperature, top_k, top_p)
        return codes, token_stats(logits, codes)
    filtered = filter_logits(logits, temperature, top_k, top_p, order=order)
    codes = _pick(filtered, generators, temperature)
    return codes, token_stats(logits if conf_from == "raw" else filtered, codes)


def draw_codes(
    logits: Float[Tensor, "batch tokens vocab"],
    generators: Sequence[torch.Generator],
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Int[Tensor, "batch tokens"]:
    """Draw the codes `sample_codes` draws, without measuring how sure the model was.

    Args:
        logits: See `sample_codes`.
        generators: One CPU generator per batch row.
        temperature: See `sample_codes`.
        top_k: See `filter_logits`.
        top_p: See `filter_logits`.

    Returns:
        Codes int64 [batch, tokens].
    """
    if temperature == 0.0:
        check_filters(temperature, top_k, top_p)
        return logits.argmax(dim=-1)  # no filter drops the best code
    return _pick(filter_logits(logits, temperature, top_k, top_p), generators, temperature)


def _pick(filtered: Tensor, generators: Sequence[torch.Generator], temperature: float) -> Tensor:
    if temperature == 0.0:
        return filtered.argmax(dim=-1)
    return _invert_cumulative(filtered.softmax(dim=-1), generators)


def _ban(logits: Tensor, banned_ids: Sequence[int]) -> Tensor:
    for code in banned_ids:
        check_range("banned id", code, 0, logits.shape[-1] - 1)
    return logits.index_fill(-1, torch.tensor(list(banned_ids), device=logits.device), -torch.inf)


def _invert_cumulative(probs: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    uniform = per_item_rand(probs.shape[1:-1], generators, probs.device, torch.float64)
    cumulative = probs.double().cumsum(dim=-1)
    total = cumulative[..., -1]
    # Strictly below the total, or rounding could pick a trailing code of probability zero.
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target[..., None], right=True)[..., 0]
