"""Hypotheses about packed weights: how they are unpacked, and by whose part of a recipe they were packed."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from parity.hypotheses.base import DoesNotApply, Hypothesis
from parity.lance.dequantize import Packed, scaled
from parity.lance.hypotheses.tools import twin_path
from parity.lance.hypotheses.weights import weights
from parity.lance.packed import PackedCheckpoint, packed_beside
from parity.laws.rounding import codes_towards_zero

if TYPE_CHECKING:
    from parity.hypotheses.tap_probe import TapProbe


PROJECTIONS = ("layers.*_proj", "layers.*_proj_moe_gen", "lm_head", "vae2llm", "llm2vae", "time_embedder*",
               "vit_model.*.qkv", "vit_model.*proj", "vit_model.merger*")  # fmt: skip


def checkpoint_of(site: "TapProbe") -> PackedCheckpoint:
    """What the weights of a site's run were packed in; raises DoesNotApply where the site's was not."""
    found = packed_beside(site.pipeline.checkpoint, site.pipeline.variant)
    if found is None or site.path not in found.schemes:
        raise DoesNotApply
    return found


def unpacked(name: str, values: Callable[[Packed], np.ndarray]) -> Hypothesis:
    """A hypothesis that a weight is unpacked otherwise: `values` makes float32 [rows, width] of its packed form."""

    def change(site: "TapProbe", module: nn.Module, key: str, value: Tensor) -> Tensor | None:
        if key != "weight":
            return None
        return torch.from_numpy(values(checkpoint_of(site).packed(site.path)).astype(np.float32)).to(value.dtype)

    return weights(name, (*PROJECTIONS, "embed_tokens"), change)


def affine(values: Callable[[Packed, np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> Callable:
    """Of the affine mode alone: `values` is given codes, scales and biases too, float32."""

    def made(packed: Packed) -> np.ndarray:
        if packed.biases is None:
            raise DoesNotApply
        return values(packed, packed.values(packed.codes), *packed.factors)

    return made


def down_columns(packed: Packed, codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> np.ndarray:
    """Groups that run down the columns."""
    rows, width = codes.shape
    if rows % packed.scheme.group_size:
        raise DoesNotApply
    a, b = (np.repeat(each.reshape(-1, width), packed.scheme.group_size, 0) for each in (scales, biases))
    return codes * a + b


def of_words(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Packed], np.ndarray]:
    """Packed words changed: `change` is given their bytes, uint8 [rows, words, 4]."""

    def made(packed: Packed) -> np.ndarray:
        octets = np.ascontiguousarray(packed.weight).astype("<u4").view(np.uint8).reshape(*packed.weight.shape, 4)
        return replace(packed, weight=np.ascontiguousarray(change(octets)).view("<u4")[..., 0]).dequantized()

    return made


def other_tower(site: "TapProbe", module: nn.Module, key: str, value: Tensor) -> Tensor | None:
    """The weight quantized once more, by the scheme of the same module of the other tower."""
    schemes = checkpoint_of(site).schemes
    scheme = schemes.get(twin_path(site.path), schemes[site.path])
    if scheme == schemes[site.path] or scheme.mode != "affine":
        raise DoesNotApply
    if key != "weight" or value.ndim > 2 or value.shape[-1] % scheme.group_size:
        return None
    made = codes_towards_zero(value.detach().float().numpy().reshape(-1, scheme.group_size), scheme.bits)
    # Scale and offset are kept in the weight's dtype.
    codes, step, offset = (torch.from_numpy(each).to(value.dtype).float() for each in made)
    return (codes * step + offset).reshape(value.shape).to(value.dtype)


HYPOTHESES = [
    unpacked("the quantization has no biases", affine(
        lambda packed, codes, scales, biases: scaled(codes, scales, np.zeros_like(biases)))),
    unpacked("scales and biases of the quantization are exchanged", affine(
        lambda packed, codes, scales, biases: scaled(codes, biases, scales))),
    unpacked("the quantization's groups run down the columns", affine(down_columns)),
    unpacked("the halves of each byte of codes are exchanged", of_words(lambda octets: octets << 4 | octets >> 4)),
    unpacked("the bytes of each word of codes are in reverse", of_words(lambda octets: octets[..., ::-1])),
    weights("the weight is quantized as the recipe says of the other tower", PROJECTIONS, other_tower),
]  # fmt: skip
