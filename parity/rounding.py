"""The size of roundings."""

import numpy as np
import torch

from parity.recording import DTYPES, Tap
from parity.sketch import Sketch

# The relative size of one unit in the last place is 2**-bits to 2**(1 - bits).
ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8}
# Whatever the size of a tap, one element in 25 may be off by one unit.
_FLIPPED_SHARE = 1 / 25


def quantum(tap: Tap | Sketch, dtype: str | None = None) -> float:
    """The least floor of a tap: the error of one in 25, or sqrt(size), of its elements off by one last bit.

    `dtype` is that of the states that the tap is computed from, where those may be off by a bit as well.
    """
    share = max(_FLIPPED_SHARE, max(tap.size, 1) ** -0.5)
    return ULP.get(dtype or tap.dtype, 0.0) * share**0.5


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as a dtype has them, held as float32."""
    return torch.from_numpy(np.array(values, np.float32)).to(DTYPES[dtype]).float().numpy()
