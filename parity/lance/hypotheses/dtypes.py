"""Hypotheses about a dtype that is too low in one place, or too high."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis, Patch
from parity.lance.hypotheses.tools import (
    CONVOLUTIONS,
    LINEARS,
    forward,
    leaf,
    module_of,
    of_weight,
    parameters,
    rounded,
)
from reference.numerics import Linear

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe

PRODUCTS = (*LINEARS, *CONVOLUTIONS, "time_embedder*")
SUMS = ("layers.*", "vit_model.*", "vae.*", "embeddings", "guidance", "euler", "noise", "velocity*", "llm2vae",
        "vae2llm", "time_embedder*", "latent_pos_embed", "embed_tokens", "lm_head", "norm*")  # fmt: skip


def tf32(x: Tensor) -> Tensor:
    """Values with the 10 bits of mantissa that tensor cores read."""
    bits = x.contiguous().view(torch.int32)
    kept = (bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF
    return kept.view(torch.float32)


def float32_policy(site: "TapProbe") -> None:
    if site.dtype != "float32":
        raise DoesNotApply


def product(narrow: Callable[[Tensor], Tensor], result: bool = True, bias: bool = True) -> Patch:
    """Inputs and parameters of a product narrowed; its result and its bias too, or not."""

    def computed(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, *rest: Any) -> Tensor:
        float32_policy(site)
        holder = leaf(module)
        values = {
            key: narrow(value)
            for key, value in holder._parameters.items()
            if value is not None and (bias or key != "bias")
        }
        with parameters(holder, values):
            out = original(narrow(x), *rest)
        return narrow(out) if result else out

    return forward(computed)


def to(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda x: rounded(x, dtype)


@contextmanager
def unrounded(site: "TapProbe") -> Iterator[None]:
    """A product of float32 values that is not rounded to the policy's dtype."""
    module = module_of(site)
    numerics = getattr(module, "numerics", None)
    if numerics is None or numerics.dtype == "float32":
        raise DoesNotApply
    with patch.object(module, "numerics", replace(numerics, dtype="float32", linear="float32")):
        yield


def bias_afterwards(site: "TapProbe", module: nn.Module, original: Callable, x: Tensor, *rest: Any) -> Tensor:
    """The product is rounded before its bias is added."""
    if not isinstance(module, Linear) or module.bias is None or site.dtype == "float32":
        raise DoesNotApply
    dtype = module.weight.dtype
    return F.linear(x.to(dtype).float(), module.weight.float()).to(dtype) + module.bias


def result(dtype: torch.dtype):
    """A result rounded to a dtype."""

    def transform(site: "TapProbe", array: np.ndarray) -> np.ndarray | None:
        if of_weight(site) or array.dtype != np.float32:
            return None
        # A reversed axis of one element is contiguous to NumPy and refused by PyTorch.
        return rounded(torch.from_numpy(array.copy()), dtype).numpy()

    return transform


HYPOTHESES = [
    Hypothesis("the product computes in bfloat16", PRODUCTS, product(to(torch.bfloat16))),
    Hypothesis("the product computes in bfloat16 but for its bias", PRODUCTS, product(to(torch.bfloat16), bias=False)),
    Hypothesis("the product computes in float16", PRODUCTS, product(to(torch.float16))),
    Hypothesis("the product computes in TF32", PRODUCTS, product(tf32, result=False)),
    Hypothesis("the product reads bfloat16 and is not rounded", PRODUCTS, product(to(torch.bfloat16), result=False)),
    Hypothesis("the product is not rounded", PRODUCTS, unrounded),
    Hypothesis("the product is rounded before its bias is added", PRODUCTS, forward(bias_afterwards)),
    Hypothesis("the result is rounded to bfloat16", SUMS, transform=result(torch.bfloat16)),
    Hypothesis("the result is rounded to float16", SUMS, transform=result(torch.float16)),
]
