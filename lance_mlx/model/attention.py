"""Scaled dot-product attention that never holds more than some megabytes of scores at once."""

import mlx.core as mx

from lance_mlx.backend import cpu_attention
from lance_mlx.backend.numerics import runs_on_cpu

GPU_SCORE_BUDGET = 1 << 26
"""Attention scores held at once where a GPU holds them: 256 MiB of float32."""
_FUSED_DIM = 128
"""Largest head_dim that MLX has a fused kernel for."""
_FEW_SCORES = 1 << 16
"""Scores below which MLX's own kernel is as fast."""


def attention(queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    """Scaled dot-product attention; keys and values of grouped heads are not repeated.

    Args:
        queries: [batch, heads, n, head_dim].
        keys, values: [batch, kv_heads, m, head_dim], m >= n.
        causal: the queries are the last n of the m positions and see none after their own.

    Returns:
        [batch, heads, n, head_dim] in the dtype of `queries`.
    """
    batch, heads, n, head_dim = queries.shape
    m = keys.shape[2]
    few = queries.dtype == mx.float32 and batch * heads * n * m < _FEW_SCORES
    if few or _is_fused(queries):
        return _mlx_attention(queries, keys, values, causal)
    if runs_on_cpu():
        return cpu_attention.attention(queries, keys, values, causal)
    rows = max(1, GPU_SCORE_BUDGET // (batch * heads * m))
    pieces = []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        # A causal piece leaves out the keys that none of its queries sees.
        seen = m - n + stop if causal else m
        pieces.append(_mlx_attention(queries[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen], causal))
        if rows < n:
            mx.eval(pieces[-1])
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)


def _is_fused(queries: mx.array) -> bool:
    """Whether MLX computes such attention without holding its scores: never on the CPU, and in CUDA not of float32."""
    if runs_on_cpu() or queries.shape[-1] > _FUSED_DIM:
        return False
    return queries.dtype != mx.float32 or not mx.cuda.is_available()


def _mlx_attention(queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    """MLX's own; `causal` counts from the last key."""
    mask, scale = "causal" if causal else None, queries.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
