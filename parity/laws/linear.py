"""Laws of a product with a weight: x [n, in] -> x W^T + b [n, out]."""

from collections.abc import Iterator

import numpy as np

from parity.laws.base import Component, Law


def scale(component: Component, got: np.ndarray) -> Iterator[Law]:
    """The result times one factor."""
    own = component.own.astype(np.float64)
    if own.shape != got.shape or not (square := float((own * own).sum())):
        return
    factor = float((own * got).sum()) / square
    yield Law(f"the result is {factor:.4g} times as large", 1, lambda other: (other.own * factor).astype(np.float32))
