"""The same array as the two models of a pair lay it out."""

import numpy as np


def laid_out(array: np.ndarray, expected: np.ndarray) -> np.ndarray | None:
    """A port's array as the trusted model lays it out: as it is, with channels first, each of a group of equal heads
    again or once, or without axes of one; None where none of these fits `expected`."""
    if _channels_last(array, expected):
        return np.ascontiguousarray(np.moveaxis(array, -1, 1))
    return in_groups(array, expected.shape)


def put_back(array: np.ndarray, own: np.ndarray) -> np.ndarray | None:
    """A trusted array as a port lays out its own; the reverse of laid_out."""
    if _channels_last(own, array):
        return np.ascontiguousarray(np.moveaxis(array, 1, -1))
    return in_groups(array, own.shape)


def _channels_last(array: np.ndarray, expected: np.ndarray) -> bool:
    """Whether channels stand last in an array and second in what is expected; where both shapes fit, values tell."""
    if array.ndim != expected.ndim or array.ndim < 3 or np.moveaxis(array, -1, 1).shape != expected.shape:
        return False
    return array.shape != expected.shape or _apart(np.moveaxis(array, -1, 1), expected) < _apart(array, expected)


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
