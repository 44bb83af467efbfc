"""Attention for MLX's CPU backend, which would hold all scores and take exponentials one at a time.

Scores exist in tiles that stay in the processor's cache, and are overwritten there by their exponentials, which NumPy
computes; what rows have summed so far is scaled down whenever a larger score comes.
"""

from functools import partial

import mlx.core as mx
import numpy as np

ROWS, KEYS, SCORES = 64, 512, 1 << 19
"""Of a tile: the fewest queries a head and the most keys, and scores beyond which it has no more queries than ROWS."""
DERIVED_SCORES = 1 << 22
"""Scores held at once for a derivative, several times."""
_BLOCK = 1 << 15
"""Scores whose exponentials are taken at once: 128 KiB."""


def attention(queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    """Scaled dot-product attention of float32 or bfloat16, as lance_mlx.model.attention has it; scores are float32.

    In bfloat16 it rounds once inside, as flash attention does: the weights before they meet the values.
    """
    # What NumPy computes MLX cannot differentiate.
    attend = mx.custom_function(partial(_attend, causal=causal))
    attend.vjp(partial(_derived, causal=causal))
    return attend(queries, keys, values)


def _attend(queries: mx.array, keys: mx.array, values: mx.array, causal: bool) -> mx.array:
    batch, heads, n, head_dim = queries.shape
    kv_heads, m = keys.shape[1:3]
    dtype = queries.dtype
    # Laid out once for all tiles: a product would copy them for each.
    keys, values = (mx.contiguous(x.astype(mx.float32)) for x in (keys, values))
    rows = max(ROWS, SCORES // (batch * heads * min(m, KEYS)))
    pieces = []
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        # The queries of the heads that share keys are the rows of one product.
        some = queries[:, :, start:stop].astype(mx.float32) * head_dim**-0.5
        some = mx.contiguous(some.reshape(batch, kv_heads, -1, head_dim))
        # The last of them sees so many keys, and none sees more.
        seen = m - n + stop if causal else m
        sums = _Sums()
        for key in range(0, seen, KEYS):
            tile = slice(key, min(key + KEYS, seen))
            scores = some @ keys[:, :, tile].swapaxes(-1, -2)
            if causal and tile.stop > m - n + start + 1:
                hidden = mx.arange(tile.start, tile.stop) > mx.arange(m - n + start, m - n + stop)[:, None]
                by_head = scores.reshape(batch, heads, stop - start, -1)
                scores = mx.where(hidden, -mx.inf, by_head).reshape(scores.shape)
            sums.add(scores, values[:, :, tile], rounded=dtype == mx.bfloat16)
        pieces.append(mx.array(sums.mean().reshape(batch, heads, -1, head_dim)).astype(dtype))
    return pieces[0] if len(pieces) == 1 else mx.concatenate(pieces, axis=2)


def _derived(given: tuple[mx.array, ...], cotangent: mx.array, output: mx.array, causal: bool) -> tuple[mx.array, ...]:
    """Cotangents of queries, keys and values, by MLX's own operations on some queries at a time; float32 inside."""
    queries, keys, values = (x.astype(mx.float32) for x in given)
    n, m = queries.shape[2], keys.shape[2]
    rows = max(1, DERIVED_SCORES // (queries.shape[0] * queries.shape[1] * m))
    parts, to_keys, to_values = [], mx.zeros_like(keys), mx.zeros_like(values)
    for start in range(0, n, rows):
        some = slice(start, start + rows)
        hidden = mx.arange(m) <= mx.arange(m - n, m)[some, None] if causal else None

        def attend(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = hidden) -> mx.array:
            return mx.fast.scaled_dot_product_attention(q, k, v, scale=q.shape[-1] ** -0.5, mask=mask)

        _, found = mx.vjp(attend, [queries[:, :, some], keys, values], [cotangent[:, :, some].astype(mx.float32)])
        parts.append(found[0])
        to_keys, to_values = to_keys + found[1], to_values + found[2]
        mx.eval(parts[-1], to_keys, to_values)
    results = mx.concatenate(parts, axis=2), to_keys, to_values
    return tuple(result.astype(x.dtype) for result, x in zip(results, given, strict=True))


class _Sums:
    """What rows [r] have summed: their largest score, the exponentials of how far the others are below it, and values
    [r, head_dim] weighted with these."""

    def __init__(self) -> None:
        self.largest: np.ndarray | None = None

    def add(self, scores: mx.array, values: mx.array, rounded: bool) -> None:
        """Add a tile: scores [batch, kv_heads, rows, keys], which are overwritten, and values [.., keys, head_dim];
        `rounded`: the weights are rounded to bfloat16."""
        scores = mx.contiguous(scores)
        flat = np.asarray(scores).reshape(-1, scores.shape[-1])
        with np.errstate(under="ignore", invalid="ignore"):
            largest = flat.max(axis=1, keepdims=True)
            if self.largest is not None:
                np.maximum(largest, self.largest, out=largest)
            total = exponentials(flat, largest, rounded)
            weighted = np.asarray(scores @ values).reshape(len(flat), -1)
            if self.largest is None:
                self.weighted, self.total = weighted, total
            else:
                fall = np.exp(self.largest - largest)
                self.weighted *= fall
                self.weighted += weighted
                self.total *= fall
                self.total += total
        self.largest = largest

    def mean(self) -> np.ndarray:
        """The weighted mean of the values, float32 [r, head_dim]."""
        with np.errstate(invalid="ignore"):
            return np.divide(self.weighted, self.total, out=self.weighted)


def exponentials(scores: np.ndarray, largest: np.ndarray, rounded: bool) -> np.ndarray:
    """Put e ** (score - largest) in the place of float32 scores [r, keys], rounded to bfloat16 or not; returns their
    sums [r, 1], of what is not rounded."""
    ones, total = np.ones((scores.shape[1], 1), np.float32), np.empty((len(scores), 1), np.float32)
    step = max(1, _BLOCK // scores.shape[1])
    odd = np.empty((step, scores.shape[1]), np.uint32)
    for start in range(0, len(scores), step):
        part = scores[start : start + step]
        np.subtract(part, largest[start : start + step], out=part)
        np.exp(part, out=part)
        np.matmul(part, ones, out=total[start : start + step])
        if rounded:
            # To the nearest even: half of what is cut off is added, less one bit where what is kept is even.
            bits, kept = part.view(np.uint32), odd[: len(part)]
            np.right_shift(bits, 16, out=kept)
            kept &= 1
            kept += 0x7FFF
            bits += kept
            bits &= 0xFFFF0000
    return total
