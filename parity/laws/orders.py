"""Indexes of an axis in another order, and the words for it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from parity.laws.regions import part_of

# Indexes that are looked for among all others, and the numbers that each is known by.
SOUGHT, KNOWN_BY = 512, 64


@dataclass(frozen=True)
class Order:
    """Where each index of an axis is taken from: given the axis's length the sources, None where it says nothing."""

    words: str
    size: float
    of: Callable[[int], np.ndarray | None]


def sources(own: np.ndarray, got: np.ndarray, axis: int) -> np.ndarray | None:
    """The index of `own` along an axis that is nearest to each of `got`; its own where it is as near."""
    a, b = (np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1) for array in (own, got))
    if a.shape[1] > KNOWN_BY:
        mixed = np.random.default_rng(0).standard_normal((a.shape[1], KNOWN_BY)) / KNOWN_BY**0.5
        a, b = a @ mixed, b @ mixed
    result = np.arange(len(a))
    off = np.square(b - a).sum(1)
    sought = np.flatnonzero(off > 1e-6 * off.max(initial=0))
    if len(sought) > SOUGHT:
        return None
    distance = np.square(a).sum(1)[None] - 2 * b[sought] @ a.T
    result[sought] = distance.argmin(1)
    return result


def known(n: int) -> Iterator[Order]:
    """Orders that can be said without being read: reversed, rolled, and blocks turned, of an axis of n."""

    def alike(order: np.ndarray) -> Callable[[int], np.ndarray | None]:
        return lambda m: order if m == n else None

    index = np.arange(n)
    yield Order("are reversed", 1, alike(index[::-1]))
    for shift in range(1, n):
        yield Order(f"are rolled by {(shift + n // 2) % n - n // 2}", 2, alike(np.roll(index, shift)))
    for block in (size for size in range(2, n) if n % size == 0):
        blocks = index.reshape(-1, block)
        yield Order(f"are read as {len(blocks)} x {block} transposed", 2, alike(blocks.T.ravel()))
        yield Order(f"of every {block} are reversed", 2, alike(blocks[:, ::-1].ravel()))
        yield Order(f"of every {block} are exchanged by halves", 2, alike(np.roll(blocks, block // 2, 1).ravel()))
        yield Order(f"in blocks of {block} are reversed", 2, alike(blocks[::-1].ravel()))


def told(order: np.ndarray, name: str, is_open: bool) -> Iterator[Order]:
    """What an order of indexes may be called, the shortest first; an open axis may be longer elsewhere."""
    n = len(order)
    index = np.arange(n)
    moved = np.flatnonzero(order != index)
    if not len(moved):
        return
    if (order == index[::-1]).all():
        yield Order(f"{name}s are reversed", 1, lambda m: np.arange(m)[::-1])
        return
    shift = int(index[moved[-1]] - order[moved[-1]])
    if (order == (index - shift) % n).all():
        by = (shift + n // 2) % n - n // 2
        yield Order(f"{name}s are rolled by {by}", 2, lambda m: (np.arange(m) - by) % m)
        return
    if (order == np.clip(index - shift, 0, n - 1)).all():
        yield Order(f"{name}s are those {shift} before", 2, lambda m: np.clip(np.arange(m) - shift, 0, m - 1))
        return
    if len(set(order[moved])) == 1:
        yield _one(order, moved, name, is_open)
        return

    def same(m: int) -> np.ndarray | None:
        return order if m == n else None

    if (order[order] == index).all() and len(moved) == 2:
        yield Order(f"{name}s {moved[0]} and {moved[1]} are exchanged", 2, same)
        return
    for block in (size for size in range(n // 2, 1, -1) if n % size == 0):
        heads = order.reshape(-1, block)
        if (heads == heads[:, :1] + np.arange(block)).all() and not (heads[:, 0] % block).any():
            yield _of_blocks(heads[:, 0] // block, block, name, same)
            return
    for block in (size for size in range(2, n + 1) if n % size == 0):
        inside = order[:block]
        if (order.reshape(-1, block) - index.reshape(-1, block)[:, :1] == inside).all() and inside.max() < block:
            words = _inside(inside)
            if words:
                of_every = f" of every {block}" if block < n else ""
                yield Order(f"{name}s{of_every} {words}", 3, same)
                return
    shown = f"{name} {moved[0]} is {name} {order[moved[0]]}"
    yield Order(f"{len(moved)} of {n} {name}s are others, {shown}", 2.0 * len(moved), same)


def _one(order: np.ndarray, moved: np.ndarray, name: str, is_open: bool) -> Order:
    """Some indexes that are all taken from one."""
    source, part = int(order[moved[0]]), part_of(moved, len(order), name, is_open)
    words = "everywhere" if len(moved) == len(order) - 1 else part.words

    def of(m: int) -> np.ndarray | None:
        if source >= m or (not is_open and m != len(order)):
            return None
        result = np.arange(m)
        result[part.of(m)] = source
        return result

    return Order(f"{name} {source} stands {words}", 1 + part.size, of)


def _of_blocks(order: np.ndarray, block: int, name: str, of: Callable[[int], np.ndarray | None]) -> Order:
    moved = np.flatnonzero(order != np.arange(len(order)))
    if len(moved) == 2:
        first, second = (f"{i * block} to {(i + 1) * block - 1}" for i in moved)
        return Order(f"{name}s {first} and {second} are exchanged", 3, of)
    if (order == np.arange(len(order))[::-1]).all():
        return Order(f"blocks of {block} {name}s are reversed", 2, of)
    shown = ", ".join(map(str, order[:16])) + (", ..." if len(order) > 16 else "")
    return Order(f"blocks of {block} {name}s come as {shown}", 1.0 + len(moved), of)


def _inside(order: np.ndarray) -> str | None:
    """The order in a block, where it has a name."""
    n = len(order)
    if (order == np.arange(n)[::-1]).all():
        return "are reversed"
    for rows in (size for size in range(2, n // 2 + 1) if n % size == 0):
        if (order == np.arange(n).reshape(rows, -1).T.ravel()).all():
            return f"are read as {rows} x {n // rows} transposed"
    shift = int(-order[0] % n)
    return f"are rolled by {shift}" if (order == (np.arange(n) - shift) % n).all() else None
