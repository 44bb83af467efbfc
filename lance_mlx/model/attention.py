"""Scaled dot-product attention that never holds more than some megabytes of scores at once."""

import mlx.core as mx

from lance_mlx.backend.numerics import runs_on_cpu
from lance_mlx.backend.vectorized import exponentials

SCORE_BUDGET = 1 << 22
"""Attention scores held at once where the CPU backend materialises them: 16 MiB of float32, which stay in cache."""
GPU_SCORE_BUDGET = 1 << 26
"""The same where a GPU does, which needs larger pieces: 256 MiB of float32."""
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
    on_cpu = runs_on_cpu()
    rows = max(1, (SCORE_BUDGET if on_cpu else GPU_SCORE_BUDGET) // (batch * heads * m))
    dtype = queries.dtype
    if on_cpu:
        # Laid out once for all chunks: a product would copy them for each.
        keys, values = (mx.contiguous(x.astype(mx.float32)) for x in (keys, values))
    attend = _attend if on_cpu else _mlx_attention
    pieces = []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        # A causal chunk leaves out the keys that none of its queries sees.
        seen = m - n + stop if causal else m
        piece = attend(queries[:, :, start:stop], keys[:, :, :seen], values[:, :, :seen], causal).astype(dtype)
        if rows < n:
            mx.eval(piece)
        pieces.append(piece)
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


def _attend(queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    """Attention of one chunk whose scores are computed in float32 and exist: the CPU backend's kernel does no better.

    In half precision it rounds once inside, as flash attention does: the weights before they meet the values.
    """
    dtype = queries.dtype
    batch, heads, n, head_dim = queries.shape
    kv_heads, m = keys.shape[1:3]
    # The queries of the heads that share keys are the rows of one product.
    queries = (queries.astype(mx.float32) * head_dim**-0.5).reshape(batch, kv_heads, -1, head_dim)
    scores = queries @ keys.swapaxes(-1, -2)
    if causal:
        hidden = mx.arange(m) > mx.arange(m - n, m)[:, None]
        scores = mx.where(hidden, -mx.inf, scores.reshape(batch, heads, n, m)).reshape(scores.shape)
    weights, total = exponentials(scores)
    attended = weights.astype(dtype).astype(mx.float32) @ values
    return (attended / total).reshape(batch, heads, n, head_dim)
