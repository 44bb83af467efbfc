"""Numeric policy of the reference, and the two operations whose order of rounding it selects."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.errors import ReferenceError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDER = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Numerics:
    """Dtype of the weights and states, and which of several equivalent orders of rounding is used.

    attention: "sdpa" is PyTorch's kernel; "math" is an explicit softmax of float32 scores.
    linear: "float32" and "float64" multiply (and convolve) in that dtype and round once; "native" does so in `dtype`,
    whose sums depend on the processor's instructions; "disturbed" is "float32" with errors added as large as those that
    another order of summing makes, for processors that are not at hand. The oracles' captures agree with "float32".
    The alternatives have the same value up to rounding: the distance between them is what rounding alone can cause.
    """

    dtype: str = "float32"
    attention: str = "sdpa"
    linear: str = "float32"

    def __post_init__(self) -> None:
        for field, allowed in (
            ("dtype", tuple(DTYPES)),
            ("attention", ("sdpa", "math")),
            ("linear", ("native", "disturbed", *WIDER)),
        ):
            if getattr(self, field) not in allowed:
                raise ReferenceError(f"numerics: {field} '{getattr(self, field)}' is not one of {', '.join(allowed)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def multiply_dtype(self) -> torch.dtype:
        if self.linear == "disturbed":
            return torch.float32
        return WIDER.get(self.linear, self.torch_dtype)

    def rounded(self, product: Tensor, terms: int) -> Tensor:
        """A product of sums of so many terms, in the policy's dtype, disturbed first where the policy says so."""
        if self.linear == "disturbed":
            # Relative to their size, float32 sums of n terms are off by half a unit in the last place times sqrt(n).
            generator = torch.Generator().manual_seed(product.numel() * 31 + terms)
            noise = torch.randn(product.shape, generator=generator).to(product.device)
            product = product + noise * product.square().mean().sqrt() * terms**0.5 * 2.0**-24
        return product.to(self.torch_dtype)


class Linear(nn.Linear):
    """Linear layer [n, in] -> [n, out] that multiplies in the policy's dtype and answers in the weights' dtype.

    The input is first rounded to the weights' dtype, as autocast does around upstream's inference
    (bytedance/Lance inference_lance.py:validate_on_fixed_batch).
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, numerics: Numerics) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.numerics = numerics

    def forward(self, x: Tensor) -> Tensor:
        wide = self.numerics.multiply_dtype
        bias = None if self.bias is None else self.bias.to(wide)
        x = x.to(self.weight.dtype)
        return self.numerics.rounded(F.linear(x.to(wide), self.weight.to(wide), bias), self.in_features)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: str) -> Tensor:
    """Attention of q [n, heads, d] over k, v [m, kv_heads, d]; mask [n, m] bool, True where a query sees a key.

    Query head i reads key/value head i // (heads / kv_heads). Returns [n, heads, d] in q's dtype.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    if attention == "sdpa":
        out = F.scaled_dot_product_attention(q[None], k[None], v[None], None if mask is None else mask[None, None])[0]
    else:
        scores = q.float() @ k.float().transpose(1, 2) * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        out = (torch.softmax(scores, -1) @ v.float()).to(q.dtype)
    return out.transpose(0, 1)
