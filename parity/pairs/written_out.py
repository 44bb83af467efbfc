"""Attention that a PyTorch model writes out, product, softmax and product, seen as one function of q, k and v."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# The last two tensors that each is given are multiplied.
_PRODUCTS = {torch.matmul, torch.bmm, torch.baddbmm, Tensor.matmul, Tensor.bmm, Tensor.baddbmm, Tensor.__matmul__}
_SOFTMAX = {torch.softmax, functional.softmax, Tensor.softmax}


class Attended(NamedTuple):
    """What was attended: q, k, v and the result [b, h, n, d], and what else PyTorch's own function would be given."""

    q: Tensor
    k: Tensor
    v: Tensor
    output: Tensor
    values: dict[str, Any]


class WrittenOut(TorchFunctionMode):
    """Calls `seen` with every attention that is written out; what it returns is gone on with.

    Only scores of four axes (batch, heads, queries, keys) are, and not too many; the products may have batch and heads
    in one.
    """

    def __init__(self, seen: Callable[[Attended], Tensor]) -> None:
        super().__init__()
        self._seen = seen
        self._product: tuple[Tensor, Tensor, Tensor] | None = None
        self._weights: tuple[Tensor, Tensor, tuple[Tensor, Tensor]] | None = None

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _SOFTMAX and self._product is not None:
            scores, (left, right, made) = args[0], self._product
            alike = scores.numel() == made.numel() <= _MOST and output.shape == scores.shape
            if scores.ndim == 4 and alike:
                self._weights = scores, output, (left, right)
            self._product = None
        elif func in _PRODUCTS:
            left, right = [each for each in (*args, *(kwargs or {}).values()) if isinstance(each, Tensor)][-2:]
            if self._weights is not None and _same(left, self._weights[1]):
                scores, _, (q, k) = self._weights
                self._weights = None
                return self._attended(q, k, scores, right, output)
            self._product = (left, right, output)
        return output

    def _attended(self, q: Tensor, k: Tensor, scores: Tensor, v: Tensor, output: Tensor) -> Tensor:
        b, h, n, m = scores.shape
        try:
            q, k = q.reshape(b, h, n, -1), k.reshape(b, h, -1, m).transpose(-1, -2)
            v, made_of = v.reshape(b, h, m, -1), output.reshape(b, h, n, -1)
        except RuntimeError:
            return output
        scale, added = _made_of(q.double() @ k.double().transpose(-1, -2), scores.double(), q.shape[-1], q.dtype)
        values = {"attn_mask": None if added is None else added.to(q.dtype), "scale": scale}
        return self._seen(Attended(q, k, v, made_of, values)).reshape(output.shape)


# Scores that are looked at, in float64.
_MOST = 1 << 26
HIDDEN = -1e4
"""What hides a key adds at least that much to its score."""
# How far a score may be from what it is made of.
_ROUNDING = {torch.bfloat16: 3e-2}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.equal(a.reshape(b.shape), b.to(a.dtype))


def _made_of(products: Tensor, scores: Tensor, size: int, dtype: torch.dtype) -> tuple[float, Tensor | None]:
    """What products were multiplied by, and what was added then: -inf where a key is hidden; None for nothing.

    The factor is what fits; where something is added, 1 or 1 / sqrt(d), whichever fits better.
    """
    hidden = scores < HIDDEN
    x, y = products[~hidden], scores[~hidden]
    most = _ROUNDING.get(dtype, 1e-5) * y.abs().max()
    scale = float((x * y).sum() / (x * x).sum().clamp(min=1e-30))
    if (y - scale * x).abs().max() > most:
        x, y = x - x.mean(), y - y.mean()
        fitted = float((x * y).sum() / (x * x).sum().clamp(min=1e-30))
        scale = min((1.0, size**-0.5), key=lambda each: abs(each - fitted))
    added = scores - scale * products
    added = torch.where(added.abs() <= most, 0, added).masked_fill(hidden, -torch.inf)
    return scale, added if added.any() else None
