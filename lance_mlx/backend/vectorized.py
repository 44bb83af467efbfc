"""Elementwise functions that MLX's CPU backend takes one element at a time, computed by NumPy, which is vectorised.

They work on blocks that stay in the processor's cache, so that memory is read and written once. Float32 only.
"""

import mlx.core as mx
import numpy as np

_BLOCK = 1 << 15
"""Elements of a block: 128 KiB."""


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
