"""Rounding to the dtypes that NumPy lacks, as float64 in and out."""

import numpy as np


def to_bits(array: np.ndarray, kept: int, nearest: bool = True) -> np.ndarray:
    """Float32 values of which `kept` bits of the mantissa are kept, rounded to the nearest even or cut off."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    dropped = np.uint64(23 - kept)
    if nearest:
        half = (np.uint64(1) << (dropped - np.uint64(1))) - np.uint64(1)
        bits = bits + half + ((bits >> dropped) & np.uint64(1))
    bits = (bits >> dropped) << dropped
    return bits.astype(np.uint32).view(np.float32).astype(np.float64)


def to_half(array: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return array.astype(np.float16).astype(np.float64)


DTYPES = {
    "bfloat16": lambda array: to_bits(array, 7),
    "float16": to_half,
    "TF32": lambda array: to_bits(array, 10),
    "bfloat16 by cutting off": lambda array: to_bits(array, 7, nearest=False),
}
"""What rounds to each, by its name."""
