"""The same array as the two models of a pair lay it out."""

from collections.abc import Iterable, Iterator

import numpy as np


def laid_out(array: np.ndarray, expected: np.ndarray) -> np.ndarray | None:
    """A port's array as the trusted model lays it out; None where no way to do so fits `expected`.

    That is as it is, with channels first, the places of a picture one behind the other, each of a group of equal heads
    again or once, or without axes of one. Where several fit, the values tell.
    """
    return _nearest(array, expected, array.ndim > 2 and np.moveaxis(array, -1, 1), _in_a_row(array))


def put_back(array: np.ndarray, own: np.ndarray) -> np.ndarray | None:
    """A trusted array as a port lays out its own; the reverse of laid_out."""
    first = array.ndim > 2 and np.moveaxis(array, 1, -1)
    places = (array, first) if array.ndim == 3 and own.ndim == 4 else ()
    return _nearest(array, own, first, (each.reshape(own.shape) for each in places if _fits(each, own)))


def _in_a_row(array: np.ndarray) -> Iterator[np.ndarray]:
    """[batch, rows, columns, channels] as [batch, places, channels] and as [batch, channels, places]."""
    if array.ndim == 4:
        rows = array.reshape(len(array), -1, array.shape[-1])
        yield from (rows, rows.swapaxes(1, 2))


def _fits(array: np.ndarray, own: np.ndarray) -> bool:
    return array.shape == (len(own), own.shape[1] * own.shape[2], own.shape[3])


def _nearest(
    array: np.ndarray, wanted: np.ndarray, first: np.ndarray | bool, others: Iterable[np.ndarray]
) -> np.ndarray | None:
    """Of an array laid out in several ways the one of the shape that is wanted, and of several of these the nearest."""
    ways = [] if isinstance(first, bool) else [first]
    found = [way for way in (*ways, *others) if way.shape == wanted.shape]
    grouped = in_groups(array, wanted.shape)
    found = [*found, grouped] if grouped is not None else found
    best = min(found, key=lambda way: _apart(way, wanted)) if len(found) > 1 else next(iter(found), None)
    return None if best is None else np.ascontiguousarray(best)


def _apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(np.nan_to_num(a.astype(np.float64) - b)))


def in_groups(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """An array as it is or without axes of one; of four axes (batch, heads, n, d) with heads and n exchanged, with the
    heads of a group one behind the other, or in equal groups, once or again."""
    if _long(array.shape) == _long(shape):
        return array.reshape(shape)
    if array.ndim != 4 or len(shape) != 4 or not array.size or array.shape[::3] != shape[::3]:
        return None
    if array.shape[1:3] == (shape[2], shape[1]):
        return np.ascontiguousarray(array.swapaxes(1, 2))
    if array.size == int(np.prod(shape)):
        return array.reshape(shape)
    if array.shape[2] != shape[2]:
        return None
    heads, wanted = array.shape[1], shape[1]
    if wanted > heads:
        return np.repeat(array, wanted // heads, axis=1) if wanted % heads == 0 else None
    once = np.ascontiguousarray(array[:, :: heads // wanted]) if wanted and heads % wanted == 0 else None
    return once if once is not None and np.array_equal(np.repeat(once, heads // wanted, axis=1), array) else None


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(side for side in shape if side != 1)
