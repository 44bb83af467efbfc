"""The parameters of lance_mlx in the checkpoint's names and PyTorch's layout."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from lance_mlx.model.layers import linear
from lance_mlx.model.quantized import QuantizedEmbedding, QuantizedLinear
from lance_mlx.pipeline import Pipeline
from parity.lance.dequantize import Packed, Scheme
from parity.ports.attach import Attached
from parity.tensors.rounding import ULP, rounded

_HEAD = "language_model.lm_head."
# What a product and a sum that are rounded at once may be off, relative to the largest weight.
_FUSED = 2.0**-22


def named_weights(pipeline: Pipeline, with_head: bool) -> Iterator[tuple[str, np.ndarray]]:
    """Every parameter, float32, under the checkpoint's name, dequantized where it is packed; the VAE's behind
    "vae."."""
    packed = packed_modules(pipeline.model)
    for name, array in tree_flatten(pipeline.model.parameters()):
        path, _, kind = name.rpartition(".")
        if name.startswith(_HEAD) and not with_head:
            continue
        if path not in packed or kind == "bias":
            yield name, np.array(array.astype(mx.float32))
        elif kind == "weight":
            yield name, _dequantized(packed[path])
    for name, array in tree_flatten(pipeline.vae.parameters()):
        yield f"vae.{name}", _channels_first(np.array(array.astype(mx.float32)))


def packed_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules whose weights are packed, by path."""
    kinds = QuantizedLinear, QuantizedEmbedding
    return {path: each for path, each in model.named_modules() if isinstance(each, kinds)}


def _dequantized(module: nn.Module) -> np.ndarray:
    """What lance_mlx makes of packed weights: where a backend only rounds its product and its sum at once, what NumPy
    does, as the reference has it."""
    told = np.array(module.scheme.dequantize(module, module.dtype).astype(mx.float32))
    dtype = "bfloat16" if module.dtype == mx.bfloat16 else "float32"
    own = rounded(_by_numpy(module), dtype)
    near = 2 * ULP[dtype] * np.abs(own) + _FUSED * np.abs(own).max()
    return own if told.shape == own.shape and (np.abs(told - own) <= near).all() else told


def _by_numpy(module: nn.Module) -> np.ndarray:
    affine = "biases" in module.scheme.names
    factors = [
        np.array(module[name].astype(mx.float32) if affine else module[name]) for name in module.scheme.names[1:]
    ]
    scales, biases = factors if affine else (*factors, None)
    return Packed(Scheme(**module.scheme.to_dict()), np.array(module.weight), scales, biases).dequantized()


@contextmanager
def replaced_weights(pipeline: Pipeline, given: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Let parameters hold other values for a while; arrays are in PyTorch's layout.

    A module whose weight is packed computes with the given one in its place, whatever it is packed in.
    """
    model, vae = pipeline.model, pipeline.vae
    packed = packed_modules(model)
    dequantized = {id(packed[path]): f"{path}.weight" for path in packed if f"{path}.weight" in given}
    unpacked = {name for name in given if name not in dequantized.values()}
    before = {name: array for name, array in tree_flatten(model.parameters()) if name in unpacked}
    # What is joined with others is computed by itself once one of its arrays is another.
    kept = {name: array for name, array in tree_flatten(model.parameters()) if name in dequantized.values()}
    coded = {name: array for name, array in tree_flatten(vae.parameters()) if f"vae.{name}" in given}
    dtype = model.numerics.dtype
    values = {key: mx.array(given[name]).astype(dtype) for key, name in dequantized.items()}

    def product(original: Callable, module: nn.Module, x: mx.array, parameters: Mapping[str, Any]) -> mx.array:
        if id(module) not in values:
            return original(module, x, parameters)
        return linear(x, values[id(module)], parameters.get("bias"))

    def looked_up(original: Callable, module: nn.Module, ids: mx.array) -> mx.array:
        return values[id(module)][ids] if id(module) in values else original(module, ids)

    try:
        model.load_weights([(name, mx.array(given[name]).astype(dtype)) for name in before], strict=False)
        model.load_weights([(name, mx.array(array)) for name, array in kept.items()], strict=False)
        vae.load_weights(
            [(name, mx.array(_channels_last(given[f"vae.{name}"])).astype(dtype)) for name in coded], strict=False
        )
        with Attached() as attached:
            attached.wrap(QuantizedLinear, "product", product)
            attached.wrap(QuantizedEmbedding, "__call__", looked_up)
            yield
    finally:
        model.load_weights([*before.items(), *kept.items()], strict=False)
        vae.load_weights(list(coded.items()), strict=False)


def _channels_first(array: np.ndarray) -> np.ndarray:
    return np.moveaxis(array, -1, 1) if array.ndim > 1 else array


def _channels_last(array: np.ndarray) -> np.ndarray:
    if array.ndim > 1 and array.size == array.shape[0]:
        return array.reshape(-1)  # a norm's gamma
    return np.moveaxis(array, 1, -1) if array.ndim > 1 else array
