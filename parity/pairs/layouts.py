"""The same array as the two models of a pair lay it out."""

import numpy as np


def laid_out(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A port's array as the trusted model lays it out: as it is, with channels first, each of a group of equal heads
    again or once, or without axes of one; None where none of these fits."""
    if array.ndim == len(shape) > 2 and array.shape != shape and np.moveaxis(array, -1, 1).shape == shape:
        return np.ascontiguousarray(np.moveaxis(array, -1, 1))
    return _in_groups(array, shape)


def put_back(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """A trusted array as a port lays it out; the reverse of laid_out."""
    if array.ndim == len(shape) > 2 and array.shape != shape and np.moveaxis(array, 1, -1).shape == shape:
        return np.ascontiguousarray(np.moveaxis(array, 1, -1))
    return _in_groups(array, shape)


def _in_groups(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
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
