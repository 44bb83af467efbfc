"""Laws of order: along an axis of a result stands what belongs elsewhere, or its axes are exchanged."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.numbers import norm_of
from parity.laws.order import LEFT, Order, fitting
from parity.laws.support import Span, mask, plural, spans

# An index map is read from so many values of a slice; slices of fewer values are like each other by chance.
FEATURES, FEWEST = 64, 4


def orders(
    component: Component,
    got: np.ndarray,
    wrong: Sequence[np.ndarray] | None = None,
    likely: Mapping[str, Sequence[Order]] | None = None,
) -> Iterator[Law]:
    """The axes along which a result is own in another order, or lacks or repeats indices; axes that are exchanged.

    `wrong` tells which indices along each axis are wrong: the order is read there alone. `likely` are orders that an
    axis may be in beside those that any may.
    """
    own = component.own
    if own.ndim != got.ndim:
        return
    if own.shape == got.shape:
        yield from _exchanged_axes(component, got)
    for axis, name in enumerate(component.axes):
        others = [i for i in range(own.ndim) if i != axis]
        if own.shape[axis] < 2 or any(own.shape[i] != got.shape[i] for i in others):
            continue
        wanted = np.ones(got.shape[axis], bool) if wrong is None else wrong[axis]
        inside = [np.ones(own.shape[i], bool) if wrong is None or i == axis else wrong[i] for i in range(own.ndim)]
        one, two = _slices(own, inside, axis), _slices(got, inside, axis)
        if one.shape[1] < FEWEST:
            continue
        where = [span for i in others if (span := (spans(component.axes[i], inside[i]) or [None])[0])]
        for order in fitting(one, two, wanted, (likely or {}).get(name, ())):
            yield _law(name, where, order)


def _law(name: str, where: Sequence[Span], order: Order) -> Law:
    def apply(other: Component) -> np.ndarray | None:
        if name not in other.axes:
            return None
        axis = other.axes.index(name)
        moved = order.taken(other.own, axis)
        if moved is None or not where:
            return moved
        chosen = mask(where, other.axes, other.own.shape)
        return None if chosen is None or moved.shape != other.own.shape else np.where(chosen, moved, other.own)

    says = order.of_axis(name)
    within = " ".join(span.within for span in where)
    return Law(f"{within} {says}".strip(), order.size + sum(span.size for span in where), apply)


def _exchanged_axes(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Two axes of the values in memory exchanged, whatever the sizes."""
    own, axes = component.own, component.axes
    residual = norm_of(got - own)
    long = [axis for axis in range(own.ndim) if own.shape[axis] > 1]
    for i, first in enumerate(long):
        for second in long[i + 1 :]:
            for back in (False, True):
                if back and own.shape[first] == own.shape[second]:
                    continue
                law = _swap(axes[first], axes[second], own.shape[first] == own.shape[second], back)
                values = law.apply(component)
                if values is not None and norm_of(got - values.astype(np.float64)) <= LEFT * residual:
                    yield law


def _swap(first: str, second: str, alike: bool, back: bool) -> Law:
    def apply(other: Component) -> np.ndarray | None:
        if first not in other.axes or second not in other.axes:
            return None
        one, two = other.axes.index(first), other.axes.index(second)
        own = other.own
        if min(own.shape[one], own.shape[two]) == 1:
            return None
        if not back:
            return np.ascontiguousarray(own.swapaxes(one, two)).reshape(own.shape)
        shape = list(own.shape)
        shape[one], shape[two] = shape[two], shape[one]
        return np.ascontiguousarray(own.reshape(shape).swapaxes(one, two))

    many, others = plural(first), plural(second)
    said = f"{many} and {others} are exchanged"
    if not alike:
        how = "before they are laid out" if not back else "after they are read"
        said = f"{many} and {others} in memory are exchanged {how}"
    return Law(said, 1 + 0.1 * back, apply)


def _slices(array: np.ndarray, inside: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Slices along an axis [n, FEATURES at most], of what lies inside along the others."""
    sides = [side for i, side in enumerate(array.shape) if i != axis]
    chosen = np.ones(sides, bool)
    for place, each in enumerate(each for i, each in enumerate(inside) if i != axis):
        chosen &= each.reshape([-1 if i == place else 1 for i in range(len(sides))])
    rest = np.flatnonzero(chosen)
    if len(rest) > FEATURES:
        rest = np.random.default_rng(0).choice(rest, FEATURES, replace=False)
    places = np.unravel_index(rest, sides) if sides else ()
    return np.moveaxis(array, axis, -1)[tuple(places)].reshape(-1, array.shape[axis]).T.astype(np.float64)
