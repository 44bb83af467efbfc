"""Building blocks shared by the transformer, the embeddings and the VAE."""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from lance_mlx.numerics import exp, runs_on_cpu

SCORE_BUDGET = 1 << 22
"""Attention scores held at once where the backend materialises them: 16 MiB of float32, which stay in cache."""
_FEW_ROWS, _LARGE = 4, 1 << 22
_FEW_SCORES = 1 << 16
"""Scores below which MLX's own kernel is as fast."""


class Linear(nn.Linear):
    """y = x @ weight.T + bias in the dtype of `weight`, rounded once at the end."""

    def __call__(self, x: mx.array) -> mx.array:
        dtype = self.weight.dtype
        if dtype != mx.float32 and runs_on_cpu() and not (len(x) <= _FEW_ROWS and self.weight.size >= _LARGE):
            # The CPU backend multiplies half precision outside BLAS; float32 gives the same bits sooner. Where few rows
            # meet a large matrix, that takes longer to convert than to multiply with.
            x, weight = x.astype(dtype).astype(mx.float32), self.weight.astype(mx.float32)
            y = mx.addmm(self.bias.astype(mx.float32), x, weight.T) if "bias" in self else x @ weight.T
            return y.astype(dtype)
        return super().__call__(x.astype(dtype))


class SiLU(nn.Module):
    """x * sigmoid(x), computed in float32 and rounded once."""

    def __call__(self, x: mx.array) -> mx.array:
        return silu(x)


def silu(x: mx.array) -> mx.array:
    """x * sigmoid(x), computed in float32 and rounded once; same shape and dtype."""
    wide = x.astype(mx.float32)
    return (wide / (1 + exp(-wide))).astype(x.dtype)


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

    def __call__(self, x: mx.array) -> mx.array:
        """[rows, hidden] -> [rows, hidden]."""
        return self.down_proj(_swiglu(self.gate_proj(x), self.up_proj(x)))


def attention(queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    """Scaled dot-product attention; keys and values of grouped heads are not repeated.

    Args:
        queries: [batch, heads, n, head_dim].
        keys, values: [batch, kv_heads, m, head_dim], m >= n.
        causal: the queries are the last n of the m positions and see none after their own.

    Returns:
        [batch, heads, n, head_dim] in the dtype of `queries`.
    """
    scale = queries.shape[-1] ** -0.5
    if not runs_on_cpu():
        return _attend(queries, keys, values, scale, causal)
    batch, heads, n, _ = queries.shape
    m = keys.shape[2]
    rows = max(1, SCORE_BUDGET // (batch * heads * m))
    few = queries.dtype == mx.float32 and batch * heads * n * m < _FEW_SCORES
    attend = _attend if few else _attend_exposed
    pieces = []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        # A causal chunk leaves out the keys that none of its queries sees.
        seen = m - n + stop if causal else m
        piece = attend(queries[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen], scale, causal)
        if rows < n:
            mx.eval(piece)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)


def _attend(queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> mx.array:
    mask = "causal" if causal else None
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def _attend_exposed(queries: mx.array, keys: mx.array, values: mx.array, scale: float, causal: bool) -> mx.array:
    """Attention whose scores are computed in float32 and exist: the CPU backend's kernel does no better.

    In half precision it rounds once inside, as flash attention does: the weights before they meet the values.
    """
    dtype = queries.dtype
    batch, heads, n, head_dim = queries.shape
    kv_heads, m = keys.shape[1:3]
    queries, keys, values = (x.astype(mx.float32) for x in (queries, keys, values))
    queries = queries.reshape(batch, kv_heads, heads // kv_heads, n, head_dim)
    scores = (queries @ keys[:, :, None].swapaxes(-1, -2)) * scale
    if causal:
        hidden = mx.arange(m) > mx.arange(m - n, m)[:, None]
        scores = mx.where(hidden, -mx.inf, scores)
    weights = exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    attended = weights.astype(dtype).astype(mx.float32) @ values[:, :, None]
    return (attended / total).astype(dtype).reshape(batch, heads, n, head_dim)
