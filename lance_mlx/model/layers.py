"""Building blocks shared by the transformer, the embeddings and the VAE."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from lance_mlx.backend import vectorized
from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.backend.pieces import by_rows

_FEW_ROWS, _LARGE = 4, 1 << 22
"""Rows that are few, such as the brackets of a block in both arms, and elements of a large matrix."""
_SMALL_PRODUCT = 500_000
"""Multiplications up to which OpenBLAS multiplies a matrix where it lies, instead of copying it into another order."""
_VECTORIZED = 1 << 16
"""Elements below which it is not worth waiting for them on the host."""


class LowRank:
    """A linear layer that may have an adapter: scale * (x @ lora_a) @ lora_b is added to what it gives, once it has
    these as `lora_a` [in, rank], `lora_b` [rank, out] and `lora_scale`.
    """

    def adapted(self, x: mx.array, y: mx.array) -> mx.array:
        """What the layer gives, y, and the adapter's share of it; in the dtype of y."""
        if "lora_a" not in self:
            return y
        low = x.astype(self.lora_a.dtype) @ self.lora_a
        return y + (self.lora_scale * (low @ self.lora_b)).astype(y.dtype)


class Linear(LowRank, nn.Linear):
    """y = x @ weight.T + bias in the dtype of `weight`, rounded once at the end."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.adapted(x, self.product(x, self))

    def product(self, x: mx.array, parameters: Mapping[str, mx.array]) -> mx.array:
        """The same with other parameters."""
        return linear(x, parameters["weight"], parameters.get("bias"))

    def goes_with(self, others: Sequence[nn.Module]) -> bool:
        """Whether one row is multiplied in the same dtype by this one, by each of others and by all of them at once."""
        if not all(isinstance(each, Linear) and "lora_a" not in each for each in (self, *others)):
            return False
        sizes = [each.weight.size for each in (self, *others)]
        half = self.weight.dtype != mx.float32 and runs_on_cpu()
        return not half or len({_stays_half(1, size) for size in (*sizes, sum(sizes))}) == 1


class FusedLinear:
    """Linears of the same input as one product for a single row, where the number of products counts.

    Their parameters become views of those of the product, so that nothing is held twice; they must not be changed in
    place. With more rows, and once one of the linears is given another parameter, each computes by itself. Where the
    product would round otherwise, they always do, and stay as they are.

    Attributes:
        linears: the linears, quantized alike or not at all where they are to be one product.
    """

    def __init__(self, linears: Sequence[nn.Module]) -> None:
        self.linears = tuple(linears)
        self._joined = linears[0].goes_with(linears[1:])
        if not self._joined:
            return
        self._ends = np.cumsum([len(each.weight) for each in linears])[:-1].tolist()
        self._whole, self._parts = {}, {}
        for name in linears[0].parameters():
            self._whole[name], self._parts[name] = self._join(name)

    def __call__(self, x: mx.array) -> list[mx.array]:
        """[rows, in] -> [rows, out] of every linear."""
        if len(x) > 1 or not self._joined or not self._intact():
            return [each(x) for each in self.linears]
        return mx.split(self.linears[0].product(x, self._whole), self._ends, axis=-1)

    def _join(self, name: str) -> tuple[mx.array, list[mx.array]]:
        whole = mx.concatenate([each[name] for each in self.linears])
        parts = mx.split(whole, self._ends)
        mx.eval(whole, parts)
        for each, part in zip(self.linears, parts, strict=True):
            each[name] = part
        return whole, parts

    def _intact(self) -> bool:
        return all(
            each[name] is part
            for name, parts in self._parts.items()
            for each, part in zip(self.linears, parts, strict=True)
        )


def linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """x @ weight.T + bias in the dtype of `weight`, rounded once at the end."""
    dtype = weight.dtype
    if dtype != mx.float32 and runs_on_cpu() and not _stays_half(len(x), weight.size):
        # The CPU backend multiplies half precision outside BLAS; float32 gives the same bits sooner.
        wide, bias = weight.astype(mx.float32), None if bias is None else bias.astype(mx.float32)

        def product(rows: mx.array) -> mx.array:
            return _product(rows.astype(dtype).astype(mx.float32), wide, bias).astype(dtype)

        return by_rows(product, max(weight.shape), x)
    x = x.astype(dtype)
    if dtype == mx.float32 and runs_on_cpu():
        return _product(x, weight, bias)
    return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)


def _stays_half(rows: int, size: int) -> bool:
    """Whether few rows meet a matrix of so many elements that it takes longer to convert than to multiply with."""
    return rows <= _FEW_ROWS and size >= _LARGE


def _product(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """x @ weight.T + bias of float32 on the CPU backend: [..., in], [out, in] and [out] -> [..., out]."""
    blocks = _blocks(len(x), *weight.shape) if x.ndim == 2 and len(x) <= _FEW_ROWS else 1
    if blocks == 1:
        return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    y = x @ weight.reshape(blocks, -1, weight.shape[1]).swapaxes(1, 2)
    y = y.swapaxes(0, 1).reshape(len(x), -1)
    return y if bias is None else y + bias


@cache
def _blocks(rows: int, width: int, depth: int) -> int:
    """The smallest number of equal blocks of a matrix [width, depth] that makes every product with so many rows small;
    1 where it takes many more than that."""
    least = max(1, -(-rows * width * depth // _SMALL_PRODUCT))
    return next((blocks for blocks in range(least, 4 * least + 1) if width % blocks == 0), 1)


class SiLU(nn.Module):
    """x * sigmoid(x), computed in float32 and rounded once."""

    def __call__(self, x: mx.array) -> mx.array:
        return silu(x)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), computed in float32 and rounded once; same shape and dtype."""
    wide = x.astype(mx.float32)
    if runs_on_cpu() and x.size >= _VECTORIZED:
        return vectorized.silu(wide).astype(x.dtype)
    return (wide / (1 + mx.exp(-wide))).astype(x.dtype)


def fused(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Compile an elementwise function where MLX has a GPU; its CPU compiler would need a C++ toolchain at run time."""
    compiled = mx.compile(function, shapeless=True)

    def call(*arrays: mx.array) -> mx.array:
        return function(*arrays) if runs_on_cpu() else compiled(*arrays)

    return call


@fused
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return silu(gate) * up


class MLP(nn.Module):
    """Gated SiLU feed-forward."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias)
        self.up_proj = Linear(hidden_size, intermediate_size, bias)
        self.down_proj = Linear(intermediate_size, hidden_size, bias)
        self._gate_up: FusedLinear | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """[rows, hidden] -> [rows, hidden]."""
        gate, up = self._gate_up(x) if self._gate_up else (self.gate_proj(x), self.up_proj(x))
        return self.down_proj(_swiglu(gate, up))

    def join(self) -> None:
        """Let gate and up be one product for one row; the weights have to be loaded."""
        self._gate_up = FusedLinear((self.gate_proj, self.up_proj))
