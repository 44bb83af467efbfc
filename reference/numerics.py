"""Numeric policy of the reference, and the two operations whose order of rounding it selects."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from reference.errors import ReferenceError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# Rows that a padded batch is filled up to a multiple of, which suits no kernel's blocks; and keys of a tile, fewer than
# any kernel's, so that also a small bundle's keys take several.
PADDING, TILE = 24, 16
WIDER = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class Numerics:
    """Dtype of the weights and states, and which of several equivalent orders of rounding is used.

    dtype: "float32" and "bfloat16" are upstream's; "float64" tells how far float32 itself is from exact.
    attention: "sdpa" is PyTorch's kernel; "math" is an explicit softmax of float32 scores, "float64" of float64 ones;
    "tiled" takes a few keys at a time, as kernels of GPUs do; "disturbed" is "math" with errors added as large as those
    of another order of summing the scores, and of exponentials good to two units in the last place.
    linear: "float32" and "float64" multiply (and convolve) in that dtype and round once; "native" does so in `dtype`,
    whose sums depend on the processor's instructions; "padded" is "float32" with rows of zeros added to a batch, which
    changes how its products are blocked; "disturbed" is "float32" with errors added as large as those that another
    order of summing makes, for processors that are not at hand; `draw` numbers such errors. The oracles' captures
    agree with "float32".
    The alternatives have the same value up to rounding: the distance between them is what rounding alone can cause.
    """

    dtype: str = "float32"
    attention: str = "sdpa"
    linear: str = "float32"
    draw: int = 0

    def __post_init__(self) -> None:
        for field, allowed in (
            ("dtype", tuple(DTYPES)),
            ("attention", ("sdpa", "math", "float64", "tiled", "disturbed")),
            ("linear", ("native", "disturbed", "padded", *WIDER)),
        ):
            if getattr(self, field) not in allowed:
                raise ReferenceError(f"numerics: {field} '{getattr(self, field)}' is not one of {', '.join(allowed)}")

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def multiply_dtype(self) -> torch.dtype:
        if self.linear in ("disturbed", "padded") and self.dtype != "float64":
            return torch.float32
        return torch.float64 if self.dtype == "float64" else WIDER.get(self.linear, self.torch_dtype)

    def rounded(self, product: Tensor, terms: int) -> Tensor:
        """A product of sums of so many terms, in the policy's dtype, disturbed first where the policy says so."""
        if self.linear == "disturbed":
            product = disturbed_sums(product, terms, self.draw)
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
        x = x.to(self.weight.dtype).to(wide)
        rows = len(x)
        if self.numerics.linear == "padded":
            x = torch.cat([x, x.new_zeros(PADDING - rows % PADDING, x.shape[1])])
        return self.numerics.rounded(F.linear(x, self.weight.to(wide), bias)[:rows], self.in_features)


def disturbed_sums(sums: Tensor, terms: int, draw: int = 0) -> Tensor:
    """Float32 sums of so many terms with the errors of another order of summing.

    Partial sums of terms of either sign grow like the root of their number, and each is rounded: together they are off
    by a quarter of a unit in the last place (2**-24) times the root of the number of terms.
    """
    noise = normal(sums.shape, terms + draw).to(sums)
    return sums + noise * sums.square().mean().sqrt() * terms**0.5 * 2.0**-26


def normal(shape: torch.Size, draw: int) -> Tensor:
    """Standard normal numbers, the same for the same shape and draw."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape.numel() * 31 + draw))


def widened(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64: what upstream computes in float32 whatever the weights' dtype."""
    return x if x.dtype is torch.float64 else x.float()


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, attention: str, draw: int = 0) -> Tensor:
    """Attention of q [n, heads, d] over k, v [m, kv_heads, d]; mask [n, m] bool, True where a query sees a key.

    Query head i reads key/value head i // (heads / kv_heads). `attention` and `draw` are as Numerics has them.
    Returns [n, heads, d] in q's dtype.
    """
    groups = q.shape[1] // k.shape[1]
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)))
    if attention == "sdpa":
        out = attend_heads(q, k, v, mask)
    else:
        wide = torch.float64 if attention == "float64" else widened(q).dtype
        scores = q.to(wide) @ k.to(wide).transpose(1, 2) * q.shape[-1] ** -0.5
        if attention == "disturbed":
            scores = disturbed_sums(scores, q.shape[-1], draw)
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        if attention == "tiled":
            return _tiled(scores, v).to(q.dtype).transpose(0, 1)
        weights = torch.softmax(scores, -1)
        if attention == "disturbed":
            weights = weights * (1 + normal(weights.shape, len(k) + draw).to(weights) * 2.0**-23)
        out = (weights @ v.to(wide)).to(q.dtype)
    return out.transpose(0, 1)


def _tiled(scores: Tensor, v: Tensor) -> Tensor:
    """Softmax of scores [heads, n, m] times v [heads, m, d], TILE keys at a time.

    What is summed so far is scaled to the largest score so far, and the weights are rounded to v's dtype before they
    are divided by their sum, which is that of the unrounded ones.
    """
    largest = scores.new_full((*scores.shape[:2], 1), torch.finfo(scores.dtype).min)
    total, out = torch.zeros_like(largest), scores.new_zeros(*scores.shape[:2], v.shape[-1])
    for part, values in zip(scores.split(TILE, -1), v.split(TILE, 1), strict=True):
        known, largest = largest, torch.maximum(largest, part.amax(-1, keepdim=True))
        weights, past = torch.exp(part - largest), torch.exp(known - largest)
        total = total * past + weights.sum(-1, keepdim=True)
        out = out * past + weights.to(v.dtype).to(out.dtype) @ values.to(out.dtype)
    return out / total


def attend_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """PyTorch's attention kernel over [heads, n, d]."""
    given = q[None], k[None], v[None], None if mask is None else mask[None, None]
    try:
        return F.scaled_dot_product_attention(*given)[0]
    except RuntimeError:
        # With AMX, and ATEN_CPU_CAPABILITY below AVX-512, its bfloat16 kernel packs what it then has no code for.
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(*given)[0]
