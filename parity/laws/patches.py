"""A convolution's patches: what each of its outputs reads, for paddings, offsets and dilations of any kind."""

from dataclasses import dataclass

import numpy as np

from parity.laws.base import Component

# Outputs that are computed at once.
CHUNK = 512
ZERO, EDGE, MIRROR, MIRROR_TWICE, OPPOSITE = "zero", "edge", "reflect", "symmetric", "wrap"


@dataclass(frozen=True)
class Geometry:
    """Where a convolution reads, in (frame, row, column).

    Attributes:
        stride, dilation: steps between outputs and between a kernel's taps.
        start: where the first tap of the first output lies; negative outside.
        modes: what stands outside, for each axis.
    """

    stride: tuple[int, int, int]
    start: tuple[int, int, int]
    dilation: tuple[int, int, int] = (1, 1, 1)
    modes: tuple[str, str, str] = (ZERO, ZERO, ZERO)


def geometry_of(component: Component) -> Geometry:
    """Where a convolution should read."""
    (above, _), (left, _) = component.facts["pads"]
    return Geometry(tuple(component.facts["stride"]), (0, -above, -left))


def all_places(shape: tuple[int, ...]) -> np.ndarray:
    """Every output (frame, row, column) of a result [1, out, T, H, W], int [n, 3]."""
    return np.indices(shape[2:]).reshape(3, -1).T


def patches(x: np.ndarray, geometry: Geometry, kernel: tuple[int, ...], places: np.ndarray) -> np.ndarray:
    """What outputs [n, 3] read of x [in, T, H, W]: [n, in, t, h, w]."""
    index, inside = [], np.ones((len(places), *kernel), bool)
    for axis in range(3):
        steps = np.arange(kernel[axis]) * geometry.dilation[axis] + geometry.start[axis]
        at = places[:, axis, None] * geometry.stride[axis] + steps
        count = x.shape[1 + axis]
        mode = geometry.modes[axis]
        shape = [len(places), 1, 1, 1]
        shape[1 + axis] = kernel[axis]
        if mode == ZERO:
            inside &= ((at >= 0) & (at < count)).reshape(shape)
        index.append(_mapped(at, count, mode).reshape(shape))
    values = x[:, index[0], index[1], index[2]]
    return np.moveaxis(np.where(inside, values, 0), 0, 1)


def _mapped(at: np.ndarray, count: int, mode: str) -> np.ndarray:
    if mode in (ZERO, EDGE):
        return np.clip(at, 0, count - 1)
    if mode == OPPOSITE:
        return at % count
    if mode == MIRROR_TWICE:
        turned = at % (2 * count)
        return np.where(turned < count, turned, 2 * count - 1 - turned)
    around = max(2 * count - 2, 1)
    turned = at % around
    return np.where(turned < count, turned, around - turned)


def convolved(x: np.ndarray, weight: np.ndarray, geometry: Geometry, places: np.ndarray) -> np.ndarray:
    """x [in, T, H, W] convolved with a weight [out, in, t, h, w], without a bias, at places [n, 3]: [n, out]."""
    flat = weight.reshape(len(weight), -1).T
    parts = [
        patches(x, geometry, weight.shape[2:], places[i : i + CHUNK]).reshape(-1, len(flat)) @ flat
        for i in range(0, len(places), CHUNK)
    ]
    return np.concatenate(parts)


def laid_out(values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Values [n, out] of all places as [1, out, T, H, W]."""
    return np.moveaxis(values.reshape(*shape[2:], -1), -1, 0)[None]


def taken(array: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Of an array [1, out, T, H, W] the values at places [n, 3]: [n, out]."""
    return array[0][:, places[:, 0], places[:, 1], places[:, 2]].T
