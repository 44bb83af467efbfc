"""What the errors of a tap's rows have in common.

Roundings of different rows have nothing to do with each other: summed over the rows they come to what one row is off by
times the root of their number. A cause that acts on all rows alike, such as a weight that is another one by less than
the dtype resolves, sums up to more, and shows in bfloat16 long before its size does.
"""

import numpy as np

from parity.oracle.bounds import far_quantile
from parity.tensors.names import TapName

CHANCE = 1e-7
"""Chance that rows which have nothing in common are taken for alike: a bundle has up to some thousand taps."""
# What the rows of an axis are computed each for themselves of.
_ROWS = ("token", "latent", "patch")


def common_error(tap: TapName, expected: np.ndarray, got: np.ndarray) -> float:
    """How much of a tap's error all rows have in common, relative L2 and as if none averaged out: beyond what chance
    makes of rows that have nothing in common, 0 where it is no more than that, and of a tap without such rows."""
    if tap.axes.split(",")[0] not in _ROWS or len(expected) < 2 or expected.shape != got.shape:
        return 0.0
    off = got.reshape(len(got), -1).astype(np.float64) - expected.reshape(len(expected), -1)
    square, norm = float(np.square(off).sum()), float(np.square(expected, dtype=np.float64).sum())
    if not (square and norm and np.isfinite(square)):
        return 0.0
    products = off @ off.T if off.shape[0] < off.shape[1] else off.T @ off
    # Of as many independent errors their sum is made, where some depend on each other or are larger than others.
    degrees = square**2 / float(np.square(products).sum())
    beyond = float(np.square(off.sum(0)).sum()) - square * _quantile(degrees)
    return (max(beyond, 0.0) / norm) ** 0.5


def _quantile(degrees: float) -> float:
    """What the mean square of so many normal numbers exceeds by CHANCE, by Wilson and Hilferty's approximation."""
    part = 2 / (9 * degrees)
    return (1 - part + far_quantile(CHANCE) * part**0.5) ** 3
