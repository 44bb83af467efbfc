"""Rows in pieces, where what is between a function's input and its result would take more memory than both."""

from collections.abc import Callable

import mlx.core as mx

from lance_mlx.backend.numerics import runs_on_cpu

PIECE_VALUES, GPU_PIECE_VALUES = 1 << 24, 1 << 26
"""Values of one array that a piece may hold between input and result: 64 MiB of float32 on the CPU; a GPU needs larger
pieces."""


def by_rows(function: Callable[..., mx.array], width: int, *arrays: mx.array) -> mx.array:
    """function(*arrays) of arrays [n, ...] whose rows do not depend on each other, so many at a time as the memory
    allows.

    Args:
        width: values of a row of the widest array that the function makes on its way.
    """
    rows = max(1, (PIECE_VALUES if runs_on_cpu() else GPU_PIECE_VALUES) // width)
    if len(arrays[0]) <= rows:
        return function(*arrays)
    pieces = []
    for start in range(0, len(arrays[0]), rows):
        pieces.append(function(*(array[start : start + rows] for array in arrays)))
        # Else MLX would hold what all pieces need until the last.
        mx.eval(pieces[-1])
    whole = mx.concatenate(pieces)
    mx.eval(whole)
    return whole
