"""Elementwise functions that MLX's CPU backend takes one element at a time, computed by NumPy, which is vectorised.

They work on blocks that stay in the processor's cache, so that memory is read and written once. Float32 only. What
NumPy computes MLX cannot differentiate, so that each has its derivative beside it.
"""

import mlx.core as mx
import numpy as np

_BLOCK = 1 << 15
"""Elements of a block: 128 KiB."""


@mx.custom_function
def silu(x: mx.array) -> mx.array:
    """x / (1 + e ** -x) of float32, same shape."""
    values = np.asarray(x).reshape(-1)
    result = np.empty_like(values)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, len(values), _BLOCK):
            part, out = values[start : start + _BLOCK], result[start : start + _BLOCK]
            np.negative(part, out=out)
            np.exp(out, out=out)
            out += 1
            np.divide(part, out, out=out)
    return mx.array(result.reshape(x.shape))


@silu.vjp
def _(x: mx.array, cotangent: mx.array, _: mx.array) -> mx.array:
    gate = mx.sigmoid(x)
    return cotangent * gate * (1 + x * (1 - gate))


@mx.custom_function
def exponentials(scores: mx.array) -> tuple[mx.array, mx.array]:
    """A softmax before it is divided: e ** (score - the row's largest) of float32 scores, same shape, and the rows'
    sums, whose last axis is 1."""
    rows = np.asarray(scores).reshape(-1, scores.shape[-1])
    weights, totals = np.empty_like(rows), np.empty((len(rows), 1), np.float32)
    step = max(1, _BLOCK // rows.shape[1])
    with np.errstate(under="ignore", invalid="ignore"):
        for start in range(0, len(rows), step):
            part, out = rows[start : start + step], weights[start : start + step]
            np.subtract(part, part.max(axis=1, keepdims=True), out=out)
            np.exp(out, out=out)
            np.sum(out, axis=1, keepdims=True, out=totals[start : start + step])
    return mx.array(weights.reshape(scores.shape)), mx.array(totals.reshape(*scores.shape[:-1], 1))


@exponentials.vjp
def _(scores: mx.array, cotangents: list[mx.array], outputs: list[mx.array]) -> mx.array:
    # The row's largest score cancels in the quotient that both are made for, so that it counts as a constant.
    return outputs[0] * (cotangents[0] + cotangents[1])
