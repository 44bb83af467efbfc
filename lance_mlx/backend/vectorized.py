"""What MLX's CPU backend takes one element at a time, computed by NumPy, which is vectorised, in blocks that stay in
the processor's cache, so that memory is read and written once. Float32 only.

What NumPy computes MLX cannot differentiate, so that it has its derivative beside it.
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
