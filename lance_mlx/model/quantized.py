"""Linear layers and embeddings whose weights are packed integers, as MLX quantizes: groups along the width of a row
share a scale, and in the affine mode a bias.

The model computes in the policy's dtype, whatever the weights lie in: an affine weight is code * scale + bias in
float32, rounded once to that dtype.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.errors import LanceError
from lance_mlx.model.layers import Linear, LowRank, fused, linear

MODES = {
    "affine": ((8, 3, 4, 5, 6), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "mxfp8": ((8,), (32,)),
    "nvfp4": ((4,), (16,)),
}
"""The bits and the group sizes of each of MLX's modes, defaults first."""
_LANES = {2: mx.uint16, 4: mx.uint32, 8: mx.uint64}
"""Integers that hold so many bytes."""


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantized, in MLX's terms.

    Raises:
        LanceError: the mode is unknown, or has not these bits or groups.
    """

    bits: int
    group_size: int
    mode: str = "affine"

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise LanceError(f"there is no mode '{self.mode}': choose one of {', '.join(MODES)}")
        bits, groups = MODES[self.mode]
        for name, value, allowed in (("bits", self.bits, bits), ("group_size", self.group_size, groups)):
            if isinstance(value, bool) or value not in allowed:
                known = " or ".join(map(str, sorted(allowed)))
                raise LanceError(f"{name} {value!r} does not go with mode {self.mode}: it has {known}")

    @classmethod
    def of(cls, bits: int | None = None, group_size: int | None = None, mode: str = "affine") -> "Scheme":
        """A scheme with the mode's own bits and groups where none are given."""
        default_bits, default_groups = MODES.get(mode, ((0,), (0,)))
        return cls(default_bits[0] if bits is None else bits,
                   default_groups[0] if group_size is None else group_size, mode)  # fmt: skip

    def __str__(self) -> str:
        return f"{self.mode} {self.bits} bits in groups of {self.group_size}"

    def to_dict(self) -> dict[str, Any]:
        """As MLX writes it in config.json."""
        return asdict(self)

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors that a weight becomes."""
        return ("weight", "scales", "biases") if self.mode == "affine" else ("weight", "scales")

    def fits(self, width: int) -> bool:
        """Whether rows of so many weights part into groups."""
        return width % self.group_size == 0

    def shapes(self, *shape: int) -> dict[str, tuple[int, ...]]:
        """Those of the tensors that a weight of a shape becomes, by name."""
        *rows, width = shape
        groups = (*rows, width // self.group_size)
        return dict.fromkeys(self.names, groups) | {"weight": (*rows, width * self.bits // 32)}

    def quantize(self, weight: mx.array) -> dict[str, mx.array]:
        """[..., width] in float32 or bfloat16 -> packed uint32 weight, and scales (and biases) [..., groups]: in the
        dtype of the weight, or uint8 in modes that are not affine. No group depends on another."""
        return dict(zip(self.names, mx.quantize(weight, **asdict(self)), strict=True))

    def dequantize(self, packed: Mapping[str, mx.array], dtype: mx.Dtype) -> mx.array:
        """What `quantize` gave, two-dimensional -> [rows, width] in a dtype, rounded once."""
        weight, scales = packed["weight"], packed["scales"]
        if self.mode != "affine":
            return mx.dequantize(weight, scales, **asdict(self), dtype=dtype)
        codes = _codes(weight, self.bits).reshape(*scales.shape, self.group_size)
        return _AFFINE[dtype](codes, scales[..., None], packed["biases"][..., None]).reshape(len(weight), -1)


def _codes(packed: mx.array, bits: int) -> mx.array:
    """uint32 [rows, words] -> uint8 [rows, width].

    By arithmetic on whole integers, since MLX's CPU backend unpacks code by code, two to eight times as slowly.
    """
    octets = packed.view(mx.uint8)
    if bits == 8:
        return octets
    # The fewest codes that fill bytes, gathered in one integer and moved apart to a byte each.
    count = 8 // math.gcd(8, bits)
    lane = _LANES[count]
    octets = octets.reshape(len(packed), -1, count * bits // 8)
    word = octets[..., 0].astype(lane)
    for index in range(1, octets.shape[-1]):
        word = word | octets[..., index].astype(lane) << mx.array(8 * index, lane)
    mask = (1 << bits) - 1
    apart = word & mx.array(mask, lane)
    for index in range(1, count):
        apart = apart | (word & mx.array(mask << bits * index, lane)) << mx.array((8 - bits) * index, lane)
    return apart.view(mx.uint8)


def _affine(codes: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
    return codes.astype(mx.float32) * scales.astype(mx.float32) + biases.astype(mx.float32)


_AFFINE = {
    mx.float32: fused(_affine),
    mx.bfloat16: fused(lambda *given: _affine(*given).astype(mx.bfloat16)),
}


class QuantizedLinear(LowRank, nn.Module):
    """A `Linear` whose weight is packed.

    One row, such as a token of an answer, is multiplied with the packed weight. For more rows the weight is dequantized
    and goes the way of `Linear`, so that they are what the dequantized model makes of them, bit for bit.

    Attributes:
        scheme: how it is quantized.
        dtype: of what it gives.
    """

    def __init__(self, out: int, width: int, bias: bool, scheme: Scheme, dtype: mx.Dtype) -> None:
        super().__init__()
        _place(self, scheme, dtype, out, width)
        if bias:
            self.bias = mx.zeros(out)

    def __call__(self, x: mx.array) -> mx.array:
        """[..., in] -> [..., out]."""
        return self.adapted(x, self.product(x, self))

    def product(self, x: mx.array, parameters: Mapping[str, mx.array]) -> mx.array:
        """The same with other parameters of the same scheme."""
        bias = parameters.get("bias")
        if x.size != x.shape[-1]:
            return linear(x, self.scheme.dequantize(parameters, self.dtype), bias)
        factors = [parameters[name] for name in self.scheme.names[1:]]
        x = x.astype(self.dtype)
        if runs_on_cpu():
            # It multiplies float32 eight times as fast as bfloat16.
            x = x.astype(mx.float32)
            factors = [each if each.dtype == mx.uint8 else each.astype(mx.float32) for each in factors]
        y = mx.quantized_matmul(x, parameters["weight"], *factors, **self.scheme.to_dict())
        return (y if bias is None else y + bias).astype(self.dtype)

    def goes_with(self, others: Sequence[nn.Module]) -> bool:
        """Whether one product can take the place of this one's and those of others."""
        if any("lora_a" in each for each in (self, *others)):
            return False
        return all(isinstance(each, QuantizedLinear) and each.scheme == self.scheme for each in others)


class QuantizedEmbedding(nn.Module):
    """Embeddings whose table is packed; only the rows that are looked up are dequantized.

    Attributes:
        scheme: how it is quantized.
        dtype: of what it gives.
    """

    def __init__(self, count: int, width: int, scheme: Scheme, dtype: mx.Dtype) -> None:
        super().__init__()
        _place(self, scheme, dtype, count, width)

    def __call__(self, ids: mx.array) -> mx.array:
        """[...] -> [..., width]."""
        rows = {name: self[name][ids.reshape(-1)] for name in self.scheme.names}
        return self.scheme.dequantize(rows, self.dtype).reshape(*ids.shape, -1)


def _place(module: nn.Module, scheme: Scheme, dtype: mx.Dtype, *shape: int) -> None:
    module.scheme, module.dtype = scheme, dtype
    for name, placed in scheme.shapes(*shape).items():
        kind = mx.uint32 if name == "weight" else mx.float32 if scheme.mode == "affine" else mx.uint8
        module[name] = mx.zeros(placed, kind)


def quantizable(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that can be quantized, by path, in the order of the paths."""
    return {path: each for path, each in sorted(model.named_modules()) if isinstance(each, Linear | nn.Embedding)}


def make_quantized(model: nn.Module, schemes: Mapping[str, Scheme], dtype: mx.Dtype) -> None:
    """Put quantized modules, whose parameters are yet to come, in the place of those at some paths.

    Args:
        dtype: of what they give: the policy's.
    """
    modules, made = quantizable(model), []
    for path, scheme in schemes.items():
        rows, width = modules[path].weight.shape
        if isinstance(modules[path], Linear):
            made.append((path, QuantizedLinear(rows, width, "bias" in modules[path], scheme, dtype)))
        else:
            made.append((path, QuantizedEmbedding(rows, width, scheme, dtype)))
    model.update_modules(tree_unflatten(made))
