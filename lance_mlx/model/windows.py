"""Which patches of pictures see each other, and where they are: index computations of the vision transformer.

Weight-free functions of the grids, computed once for all blocks.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from lance_mlx.backend.numerics import Numerics
from lance_mlx.model.attention import attention
from lance_mlx.model.rope import RotaryTable

Grid = tuple[int, int, int]
"""(t, h, w) of one image or video: temporal slices, rows and columns, in patches."""

_ROPE_THETA = 10000.0


def token_coordinates(grids: Sequence[Grid], merge: int) -> np.ndarray:
    """Place of every token in reading order: int32 [4, tokens], rows (grid, t, row, column) in tokens."""
    places = []
    for number, (t, h, w) in enumerate(grids):
        place = np.indices((t, h // merge, w // merge), dtype=np.int32).reshape(3, -1)
        places.append(np.concatenate([np.full_like(place[:1], number), place]))
    return np.concatenate(places, axis=1)


def window_order(coordinates: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort tokens by window: windows of `side` x `side` tokens in reading order, cut off at the grid's edges.

    Follows bytedance/Lance modeling/vit/qwen2_5_vl_vit.py:get_window_index.

    Returns:
        order int32 [tokens], the reading-order index of the token at each place; lengths int32 [windows] in tokens.
    """
    grid, t, row, column = coordinates
    windows = np.stack([grid, t, row // side, column // side])
    order = np.lexsort((column, row, *windows[::-1])).astype(np.int32)
    return order, run_lengths(windows[:, order])


def run_lengths(keys: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal columns: integers [k, n] -> int32 [runs]."""
    starts = np.flatnonzero(np.any(keys[:, 1:] != keys[:, :-1], axis=0)) + 1
    return np.diff(np.concatenate([[0], starts, [keys.shape[1]]])).astype(np.int32)


def patch_positions(coordinates: np.ndarray, merge: int) -> np.ndarray:
    """Row and column of every patch of the tokens, in patches: int32 [2, tokens * merge**2].

    The patches of a token follow each other in reading order (qwen2_5_vl_vit.py:rot_pos_emb).
    """
    inner = np.indices((merge, merge), dtype=np.int32).reshape(2, 1, -1)
    return (coordinates[2:, :, None] * merge + inner).reshape(2, -1)


def segments_by_length(lengths: np.ndarray) -> list[np.ndarray]:
    """Group consecutive segments of rows by length: one int32 [segments, length] array of row numbers a length."""
    starts = np.cumsum(lengths) - lengths
    return [
        (starts[lengths == length, None] + np.arange(length)).astype(np.int32) for length in np.unique(lengths).tolist()
    ]


class Segments:
    """A partition of rows into segments, each of which attends to itself alone."""

    def __init__(self, lengths: np.ndarray) -> None:
        """`lengths` int32 [segments]: rows of each of the consecutive segments."""
        groups = segments_by_length(lengths)
        self._count, self._length = groups[0].shape
        self._groups = [mx.array(group) for group in groups]
        self._inverse = mx.array(inverse_order(np.concatenate([group.reshape(-1) for group in groups])))

    def attend(self, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        """Attention inside every segment, those of equal length at once; all [n, heads, head_dim]."""
        inputs, shape = (queries, keys, values), queries.shape[1:]
        if len(self._groups) == 1:
            parts = (x.reshape(self._count, self._length, *shape) for x in inputs)
            return _attend_batch(*parts).reshape(-1, *shape)
        pieces = [_attend_batch(*(x[rows] for x in inputs)).reshape(-1, *shape) for rows in self._groups]
        return mx.concatenate(pieces, axis=0)[self._inverse]


def _attend_batch(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """[segments, length, heads, head_dim] -> the same shape and dtype, computed in float32 and rounded once.

    That is what upstream's sdpa class gets from PyTorch: its three-dimensional inputs never reach the flash kernel.
    """
    q, k, v = (x.transpose(0, 2, 1, 3).astype(mx.float32) for x in (queries, keys, values))
    return attention(q, k, v, causal=False).transpose(0, 2, 1, 3).astype(queries.dtype)


def inverse_order(order: np.ndarray) -> np.ndarray:
    """The permutation that undoes `order`, int32 [n]."""
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(order), dtype=order.dtype)
    return inverse


def vision_rotary_table(positions: np.ndarray, head_dim: int, numerics: Numerics) -> RotaryTable:
    """Rotation of patches at `positions` (int32 [2, n]): the first half of the angles follows rows, the second columns.

    With rounded frequencies upstream also counts positions and multiplies in that dtype. Cosines are taken on the host.
    """

    def rounded(x: np.ndarray) -> np.ndarray:
        if not numerics.round_rope_frequencies:
            return x.astype(np.float32)
        return np.array(mx.array(x.astype(np.float32)).astype(numerics.dtype).astype(mx.float32))

    exponents = np.arange(0, head_dim // 2, 2, dtype=np.float32) / np.float32(head_dim // 2)
    powers = np.power(_ROPE_THETA, exponents.astype(np.float64)).astype(np.float32)
    angles = rounded(rounded(positions)[..., None] * rounded(np.float32(1) / powers))
    wide = np.concatenate(list(angles), axis=-1).astype(np.float64)
    cos, sin = (mx.array(f(wide).astype(np.float32)[:, None]).astype(numerics.dtype) for f in (np.cos, np.sin))
    return RotaryTable(positions, cos, sin)
