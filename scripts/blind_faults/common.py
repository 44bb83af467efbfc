"""What blind faults are made with: their kinds, and a few ways to break a module that the catalogue's own lack."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from parity.lance.faults.base import ALL, Fault, Need, Patch, Target, calls, parameter

PLAIN, SMALL, PRECISION, PAIR = KINDS = ("plain", "small", "precision", "pair")
"""A whole component done otherwise; one head, channel, token, frame, layer, step or arm; rounding, quantization and
remnants of training; two faults at once."""

Change = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class BlindFault(Fault):
    """A fault written without knowing what the harness can explain.

    Attributes:
        kind: one of KINDS.
    """

    kind: str = PLAIN


def _blind(
    kind: str,
    name: str,
    component: str,
    patch: Patch,
    about: str,
    tasks: frozenset[str] = ALL,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    needs: Need | None = None,
) -> BlindFault:
    return BlindFault(name, about, component, patch, tasks, dtypes, needs=needs, kind=kind)


plain, small, precision, pair = (partial(_blind, kind) for kind in KINDS)


def parameters(change: Change, *patterns: str, name: str = "weight") -> Patch:
    """A patch that gives a parameter of the matching modules, those that have it, other values of the same dtype."""

    @contextmanager
    def patch(target: Target) -> Iterator[None]:
        with ExitStack() as stack:
            for module in target.modules(*patterns).values():
                if name in module:
                    before = module[name]
                    after = change(before.astype(mx.float32)).astype(before.dtype)
                    stack.enter_context(parameter(module, name, after))
            yield

    return patch


def outputs(kind: type, change: Change, *patterns: str) -> Patch:
    """A patch that changes what the matching modules of a class return, in its dtype."""

    def call(original: Callable[..., Any], module: Any, *args: Any) -> Any:
        y = original(module, *args)
        return change(y).astype(y.dtype)

    return calls(kind, call, *patterns)


def inputs(kind: type, change: Change, *patterns: str) -> Patch:
    """A patch that changes the first argument of the matching modules of a class, in its dtype."""

    def call(original: Callable[..., Any], module: Any, x: mx.array, *args: Any) -> Any:
        return original(module, change(x).astype(x.dtype), *args)

    return calls(kind, call, *patterns)


def seeded(shape: tuple[int, ...], seed: int = 0) -> mx.array:
    """Standard normal numbers, the same ones each time."""
    return mx.array(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def low_rank(rank: int, size: float, seed: int = 0) -> Change:
    """A change that adds a matrix of a rank, `size` times as long as the weight it is added to."""

    def change(weight: mx.array) -> mx.array:
        delta = seeded((len(weight), rank), seed) @ seeded((rank, weight.shape[1]), seed + 1)
        return weight + delta * (size * mx.linalg.norm(weight) / mx.linalg.norm(delta))

    return change


def affine(bits: int, group: int) -> Change:
    """A change that quantizes rows in groups as MLX does, and back."""

    def change(weight: mx.array) -> mx.array:
        return mx.dequantize(*mx.quantize(weight, group, bits), group, bits)

    return change


def int8(x: mx.array, axis: int | None = None) -> mx.array:
    """Values rounded to 255 levels between plus and minus the largest one, of all or along an axis."""
    scale = mx.abs(x).max(axis=axis, keepdims=axis is not None) / 127
    return mx.round(x / mx.maximum(scale, 1e-12)) * scale


def fp8(x: mx.array) -> mx.array:
    """Values with three bits of mantissa, scaled by one factor so that the largest is 448, as E4M3 holds them."""
    scale = mx.abs(x).max() / 448
    wide = x / scale
    exponent = mx.maximum(mx.floor(mx.log2(mx.maximum(mx.abs(wide), 1e-30))), -6)
    step = mx.power(2.0, exponent - 3)
    return mx.round(wide / step) * step * scale


def half(x: mx.array) -> mx.array:
    """The values as float16 has them."""
    return x.astype(mx.float16).astype(x.dtype)


def zeroed(*where: Any) -> Change:
    """A change that sets a part of an array to zero, named by an index."""

    def change(x: mx.array) -> mx.array:
        y = mx.array(x)
        y[where] = 0
        return y

    return change


def digits(index: int, value: float) -> Change:
    """A change that gives one number of a list another value."""

    def change(x: mx.array) -> mx.array:
        y = mx.array(x)
        y[index] = value
        return y

    return change
