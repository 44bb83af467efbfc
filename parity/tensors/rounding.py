"""The size of roundings."""

from typing import NamedTuple

import numpy as np
import torch

from parity.tensors.recording import DTYPES

# The relative size of one unit in the last place is 2**-bits to 2**(1 - bits).
ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-8}


class Steps(NamedTuple):
    """Squares of the units in the last place of an array's elements: their sum, that of their squares, the largest."""

    total: float
    squares: float
    largest: float


def step_squares(array: np.ndarray, dtype: str) -> Steps:
    """What one unit in the last place of each element amounts to, squared; zeros have none."""
    exponents = np.frexp(array)[1].astype(np.float64)
    units = np.where(array == 0, 0.0, np.exp2(2 * exponents) * (ULP[dtype] ** 2))
    return Steps(float(units.sum()), float(np.square(units).sum()), float(units.max(initial=0.0)))


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """Values as a dtype has them, held as float32."""
    return torch.from_numpy(np.array(values, np.float32)).to(DTYPES[dtype]).float().numpy()
