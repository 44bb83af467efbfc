"""How glibc's allocator treats the large arrays of MLX's CPU backend on Linux.

By default it maps every large array anew and hands it back as soon as it is free, so that the kernel clears its pages
for each operation: 10 to 25 % of a denoising step. Kept for the next one, they cost nothing.
"""

import ctypes
import os
import sys

KEPT = 1 << 28
"""Bytes up to which a freed array stays with the process; of free memory at the end of the heap twice as many do."""
_SET_BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def keep_freed() -> None:
    """Keep freed arrays of up to `KEPT` bytes for those to come.

    Does nothing where the C library is not glibc, or the environment sets MALLOC_MMAP_THRESHOLD_ or
    MALLOC_TRIM_THRESHOLD_.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _SET_BY_USER):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
        # Older ones refuse so high a threshold; the other one alone would only end their own adjustment.
        if libc.mallopt(_M_MMAP_THRESHOLD, KEPT):
            libc.mallopt(_M_TRIM_THRESHOLD, 2 * KEPT)
    except (OSError, AttributeError):
        pass


def release() -> None:
    """Return what is free to the system, MLX's cache included: after something large, such as an encoder, has gone."""
    # This file is imported before MLX may be.
    import mlx.core as mx

    mx.clear_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        pass
