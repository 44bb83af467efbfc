"""Walking arrays in blocks that stay in a core's cache, so that no step needs a copy of a whole array."""

import math
from collections.abc import Iterator
from itertools import product

BLOCK = 1 << 17
"""Elements of a block: few enough that a few of them stay in cache as float64, many enough to hide a NumPy call."""


def blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Yield the index of every block of an array: at most BLOCK elements each, one after the other in C order."""
    # The axes whose rows are too long are walked one by one, the first one whose rows fit is cut, the rest is whole.
    cut = next((axis for axis in range(len(shape)) if math.prod(shape[axis + 1 :]) <= BLOCK), None)
    if cut is None:
        yield ()
        return
    step = BLOCK // max(math.prod(shape[cut + 1 :]), 1)
    whole = (slice(None),) * (len(shape) - cut - 1)
    for outer in product(*(range(side) for side in shape[:cut])):
        for start in range(0, shape[cut], step):
            yield *(slice(index, index + 1) for index in outer), slice(start, start + step), *whole
