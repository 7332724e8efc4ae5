"""Linear maps and activations whose row results do not depend on how many rows share the call.

On a CPU the matrix kernels pick their inner loop from the row count, so the last bits of a row
change when another request joins the batch. Padding the rows to a multiple of eight makes every
row go through the same loop. Activations run vectors of numbers and treat the remainder one by
one with other rounding; padding each row to a multiple of 64 leaves no remainder. The module knows
nothing about models or batches.

Invariants: the result equals that of the plain function up to rounding; in eval mode, without
gradients, on a CPU, row i of the result is a function of row i of the input only, bit for bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import CausalBias

ROW_MULTIPLE = 8
WIDTH_MULTIPLE = 64
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
}


def row_stable_linear(
    x: Float[Tensor, "*rows features"],
    weight: Float[Tensor, "out features"],
    bias: Float[Tensor, " out"] | None = None,
) -> Float[Tensor, "*rows out"]:
    """Apply a linear map so that one row's bits do not depend on the other rows.

    Rows are padded to a multiple of eight only on a CPU and only while gradients are off;
    anywhere else this is the plain linear map, since training needs no such promise. Items of one
    row each, `[items, 1, features]`, take a kernel of their own: decoding token by token runs
    nothing else, and it is bound by reading the weights.

    Args:
        x: Input rows, any leading axes.
        weight: Matrix, one row per output feature.
        bias: Added to every output row, or None.

    Returns:
        `x @ weight.T + bias` in the dtype of `x` (or of autocast).
    """
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return functional.linear(x, weight, bias)
    if x.ndim == 3 and x.shape[1] == 1 and x.shape[0]:
        return _single_rows(x[:, 0], weight, bias)[:, None]
    num_rows = x.numel() // max(x.shape[-1], 1)
    if num_rows == 0:
        return functional.linear(x, weight, bias)
    spare = -num_rows % ROW_MULTIPLE
    if not spare and x.is_contiguous():
        return functional.linear(x, weight, bias)  # what follows would only reshape and back
    rows = x.reshape(num_rows, x.shape[-1])
    padded = functional.pad(rows, (0, 0, 0, spare)) if spare else rows
    out = functional.linear(padded, weight, bias)[:num_rows]
    return out.reshape(*x.shape[:-1], weight.shape[0])


def _single_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply up to eight rows at a time from the right: weight @ rows.

    With the wide matrix on the left the kernel streams it once at nearly the cost of one row, and
    four columns give the same bits as eight. The number of rows alone picks the kernel, so this
    path must not depend on it: longer batches run in pieces.
    """
    pieces = []
    for rows in x.split(ROW_MULTIPLE) if len(x) > ROW_MULTIPLE else (x,):
        count = len(rows)
        width = ROW_MULTIPLE // 2 if count <= ROW_MULTIPLE // 2 else ROW_MULTIPLE
        if count == 1:
            rows = rows.expand(width, -1).contiguous()
        elif count < width:
            rows = functional.pad(rows, (0, 0, 0, width - count))
        # Contiguous, or later elementwise kernels would take their scalar loop, with other bits.
        out = functional.linear(weight, rows).t()[:count].contiguous()
        pieces.append(out if bias is None else out + bias.to(out.dtype))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def item_stable_attention(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Tensor | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """Scaled dot product attention whose bits do not depend on the other items of the batch.

    The CPU kernel gives heads to threads, and each thread a scratch buffer with an alignment of
    its own, which shows in the last bits. Alone, an item always meets the same threads; so on a
    CPU with several threads and without gradients items run one by one. Inside
    `differentiable_attention` plain matrix products take the kernel's place.

    Args:
        query: Queries.
        key: Keys; `heads` may be a multiple of `kv_heads`.
        value: Values.
        mask: Boolean (True = visible) or additive, broadcast over batch and heads; or None.

    Returns:
        Attention output.
    """
    if _PLAIN.get():
        return _plain_attention(query, key, value, mask)
    grouped = query.shape[1] != key.shape[1]
    alone = len(query) == 1 or query.device.type != "cpu" or torch.is_grad_enabled()
    if alone or torch.get_num_threads() == 1:
        return functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=grouped)
    per_item = mask is not None and mask.ndim == 4 and mask.shape[0] > 1
    parts = []
    for item in range(len(query)):
        own = slice(item, item + 1)
        parts.append(
            functional.scaled_dot_product_attention(
                query[own],
                key[own],
                value[own],
                mask[own] if per_item and mask is not None else mask,
                enable_gqa=grouped,
            )
        )
    return torch.cat(parts)


_PLAIN: ContextVar[bool] = ContextVar("plain_attention", default=False)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Run attention as plain matrix products, which any transform of torch.func goes through.

    The fused kernels have no forward-mode derivative. Masks must be lowered without FlexAttention.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def _plain_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Scaled dot product attention by its definition; masks as `item_stable_attention` takes."""
    times = query.shape[1] // key.shape[1]
    if times > 1:
        key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    if isinstance(mask, CausalBias):  # bottom right: the last query sees every key
        rows, keys = scores.shape[-2:]
        mask = torch.ones(rows, keys, dtype=torch.bool, device=scores.device).tril(keys - rows)
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ value


class RowStableLinear(nn.Linear):
    """`nn.Linear` that keeps an item's bits independent of the batch size in eval mode.

    Parameters, initialisation and state names are those of `nn.Linear`.
    """

    def forward(self, x: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows out"]:
        """Apply the layer; rows are padded in eval mode under no-grad on a CPU.

        Args:
            x: Input rows, any leading axes.

        Returns:
            Output rows, same leading axes.
        """
        if self.training:
            return functional.linear(x, self.weight, self.bias)
        return row_stable_linear(x, self.weight, self.bias)


def row_stable_activation(
    kind: str, x: Float[Tensor, "*rows features"]
) -> Float[Tensor, "*rows features"]:
    """Apply an activation so that one row's bits do not depend on the other rows.

    Widths that are multiples of 64 cost nothing extra.

    Args:
        kind: "silu", "gelu" (tanh form) or "sigmoid".
        x: Input rows, any leading axes.

    Returns:
        Activated rows.

    Raises:
        KeyError: Unknown kind.
    """
    function = ACTIVATIONS[kind]
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return function(x)
    width = x.shape[-1]
    spare = -width % WIDTH_MULTIPLE
    if spare == 0:
        return function(x.contiguous())
    return function(functional.pad(x, (0, spare)))[..., :width].contiguous()


class RowStableActivation(nn.Module):
    """Module form of `row_stable_activation`.

    Args:
        kind: "silu", "gelu" (tanh form) or "sigmoid".
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Float[Tensor, "*rows features"]) -> Float[Tensor, "*rows features"]:
        """Apply the activation.

        Args:
            x: Input rows.

        Returns:
            Activated rows.
        """
        return row_stable_activation(self.kind, x)
