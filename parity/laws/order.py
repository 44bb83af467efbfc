"""Laws of order: what stands at an index along an axis is what belongs to another."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.support import LISTED, Span, mask, plural, spans

# An index map is read from so many values of a slice, of so many slices.
FEATURES, SAMPLED = 64, 512
# Slices of fewer values are like each other by chance.
FEWEST = 4
# What an order may leave of the residual: another fault may sit on top of it.
LEFT = 0.5
ZERO = -1
Map = Callable[[int], np.ndarray | None]
"""For an axis's length, which index stands at each: int [n], ZERO for none; None where that has no meaning."""


@dataclass(frozen=True)
class Order:
    """A map of indices, how it is said with the axis's name ({one}, {many}), and how many numbers say it."""

    says: str
    size: float
    of: Map


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
        count = own.shape[axis]
        wanted = np.ones(got.shape[axis], bool) if wrong is None else wrong[axis]
        inside = [np.ones(own.shape[i], bool) if wrong is None or i == axis else wrong[i] for i in range(own.ndim)]
        one, two = _slices(own, inside, axis), _slices(got, inside, axis)
        if one.shape[1] < FEWEST:
            continue
        where = [span for i in others if (span := (spans(component.axes[i], inside[i]) or [None])[0])]
        residual = _norm(two - one) if len(one) == len(two) else _norm(two)
        least, whole = LEFT * residual, 1e-3 * residual
        for order in (*(likely or {}).get(name, ()), *_candidates(one, two, wanted)):
            index = order.of(count)
            if index is None or len(index) != len(two):
                continue
            left = _norm(two - np.where(index[:, None] == ZERO, 0, one[index]))
            # Another is worth saying only where it leaves much less, or as little in fewer numbers than a list takes.
            if left < least and (order.size < LISTED or least > whole):
                least = max(0.5 * left, whole)
                yield _law(name, where, order)


def _law(name: str, where: Sequence[Span], order: Order) -> Law:
    def apply(other: Component) -> np.ndarray | None:
        if name not in other.axes:
            return None
        axis = other.axes.index(name)
        index = order.of(other.own.shape[axis])
        if index is None:
            return None
        moved = np.take(other.own, np.maximum(index, 0), axis)
        if (index == ZERO).any():
            moved[(slice(None),) * axis + (index == ZERO,)] = 0
        chosen = mask(where, other.axes, other.own.shape) if where else None
        if not where:
            return moved
        return None if chosen is None or moved.shape != other.own.shape else np.where(chosen, moved, other.own)

    says = order.says.format(one=name, many=plural(name))
    within = " ".join(span.within for span in where)
    return Law(f"{within} {says}".strip(), order.size + sum(span.size for span in where), apply)


def _candidates(own: np.ndarray, got: np.ndarray, wrong: np.ndarray) -> Iterator[Order]:
    """Orders that may make slices [m, k] of others [n, k]."""
    count, total = len(own), len(got)
    found = _matched(own, got, wrong)
    if total != count:
        yield from _of_another_length(count, total, found)
        return
    places = np.flatnonzero(wrong)
    known = {int(i): int(j) for i, j in zip(places, found, strict=False) if j != ZERO}
    steps = np.array([j - i for i, j in known.items()], int)
    yield Order("{many} are reversed", 0.5, lambda n: np.arange(n)[::-1])
    whole = len(known) == len(places)
    if whole and len(places) <= max(4, count // 8):
        yield from _few(known)
    if whole and len(set(known.values())) == 1 and len(places) > 1:
        yield from _constant(places, next(iter(known.values())), count)
    for step in _common(steps % count):
        by = (-step) % count
        by = by - count if by > count // 2 else by
        yield Order(f"{{many}} are rolled by {by}", 1, lambda n, by=by: (np.arange(n) - by) % n)
        for edge, said in ((True, "repeated"), (False, "replaced by 0")):
            yield _shifted(by, edge, said)
            yield _shifted(by - count if by > 0 else by + count, edge, said)
    if count % 2 == 0:
        yield Order("{many} are exchanged in pairs", 1, lambda n: np.arange(n) ^ 1 if n % 2 == 0 else None)
        yield Order("the halves of the {many} are exchanged", 1, _halves)
    yield from _regrouped(count)
    yield from _blocks_reversed(count)
    if whole and len(set(steps.tolist())) == 1 and len(places) > 1:
        yield from _neighbours(places, int(steps[0]), count)
    if whole and set(known) == set(known.values()) and 2 < len(places) < count and np.ptp(places) + 1 == len(places):
        yield from _block(places, known)
    if whole and len(places) > 2:
        yield _listed(known)


def _few(known: dict[int, int]) -> Iterator[Order]:
    """Few indices that hold what belongs to others."""
    if len(known) == 2 and all(known.get(j) == i for i, j in known.items()):
        first, second = sorted(known)
        swap = {first: second, second: first}
        yield Order(f"{{many}} {first} and {second} are exchanged", 1.5, _exceptions(swap))
    elif len(known) == 1:
        ((at, other),) = known.items()
        if abs(at - other) == 1:
            side = "before" if other < at else "after"
            yield Order(f"{{one}} {at} is a copy of the {{one}} {side} it", 1.5, _exceptions(known))
        else:
            yield Order(f"{{one}} {at} is a copy of {{one}} {other}", 1.5, _exceptions(known))


def _exceptions(known: dict[int, int]) -> Map:
    def of(n: int) -> np.ndarray | None:
        index = np.arange(n)
        for at, other in known.items():
            if max(at, other) >= n:
                return None
            index[at] = other
        return index

    return of


def _neighbours(places: np.ndarray, step: int, count: int) -> Iterator[Order]:
    """A part in which each index holds what belongs to one at a distance."""
    chosen = np.isin(np.arange(count), places)
    side = "before" if step < 0 else "after"
    for span in spans("{one}", chosen):

        def of(n: int, span: Span = span) -> np.ndarray:
            index = np.arange(n)
            return np.where(span.of(n), np.clip(index + step, 0, n - 1), index)

        what = f"the {{one}} {side}" if abs(step) == 1 else f"{{one}} {abs(step)} {side}"
        yield Order(_braced(f"{span.within} each {{one}} is {what}"), 1 + span.size, of)


def _constant(places: np.ndarray, other: int, count: int) -> Iterator[Order]:
    chosen = np.isin(np.arange(count), places)
    whole = [Span("{one}", "", False, 0, lambda n: np.ones(n, bool))]
    # The one that all are copies of is right.
    beside = chosen.copy()
    beside[other] = True
    for span in spans("{one}", chosen) if not beside.all() else whole:

        def of(n: int, span: Span = span) -> np.ndarray | None:
            return np.where(span.of(n), other, np.arange(n)) if other < n else None

        words = f"{span.within} each {{one}} is {{one}} {other}" if span.words else f"every {{one}} is {{one}} {other}"
        yield Order(_braced(words), 1 + span.size, of)


def _braced(words: str) -> str:
    """Words that hold the plural of "{one}" as it is said of any name."""
    return words.replace(plural("{one}"), "{many}")


def _block(places: np.ndarray, known: dict[int, int]) -> Iterator[Order]:
    """A part whose indices are in another order among themselves."""
    first, last = int(places[0]), int(places[-1])
    if all(known[i] == first + last - i for i in known):
        yield Order(f"{{many}} {first} to {last} are reversed", 2, _exceptions(known))
    steps = {(known[i] - i) % len(places) for i in known}
    if len(steps) == 1 and (step := steps.pop()):
        by = (-step) % len(places)
        by = by - len(places) if by > len(places) // 2 else by
        yield Order(f"{{many}} {first} to {last} are rolled by {by}", 2.5, _exceptions(known))


def _shifted(by: int, edge: bool, said: str) -> Order:
    what = f"{abs(by)} too late, the first" if by > 0 else f"{abs(by)} too early, the last"

    def of(n: int) -> np.ndarray:
        index = np.arange(n) - by
        return np.clip(index, 0, n - 1) if edge else np.where((index < 0) | (index >= n), ZERO, index)

    return Order(f"{{many}} are {what} {said}", 1.5, of)


def _halves(n: int) -> np.ndarray | None:
    return np.roll(np.arange(n), n // 2) if n % 2 == 0 else None


def _regrouped(count: int) -> Iterator[Order]:
    """Indices counted along two sides in the other order."""
    for side in range(2, count // 2 + 1):
        if count % side == 0:
            for said, fixed in ((f"{side} by {count // side}", True), (f"{count // side} by {side}", False)):
                if fixed or side * side != count:

                    def of(n: int, side: int = side, fixed: bool = fixed) -> np.ndarray | None:
                        if n % side:
                            return None
                        grid = np.arange(n).reshape((side, -1) if fixed else (-1, side))
                        return grid.T.ravel()

                    if fixed or side <= count // side:
                        yield Order(f"{{many}} that count as {said} are counted the other way round", 1.5, of)


def _blocks_reversed(count: int) -> Iterator[Order]:
    for side in range(2, count // 2 + 1):
        if count % side == 0:

            def of(n: int, side: int = side) -> np.ndarray | None:
                return None if n % side else np.arange(n).reshape(-1, side)[:, ::-1].ravel()

            yield Order(f"{{many}} are reversed in each group of {side}", 1.5, of)


def _listed(known: dict[int, int]) -> Order:
    shown = ", ".join(f"{i} holds {j}" for i, j in list(known.items())[:LISTED])
    more = f" and so on, {len(known)} in all" if len(known) > LISTED else ""
    return Order(f"{{many}} are in another order: {shown}{more}", float(max(len(known), LISTED)), _exceptions(known))


def _of_another_length(count: int, total: int, found: np.ndarray) -> Iterator[Order]:
    """Indices that are missing, or there twice."""
    more = total - count
    if more < 0:
        what = "{one} is" if more == -1 else f"{-more} {{many}} are"
        yield Order(f"the last {what} missing", 1, lambda n: np.arange(n + more) if n > -more else None)
        yield Order(f"the first {what} missing", 1, lambda n: np.arange(-more, n) if n > -more else None)
        lacking = sorted(set(range(count)) - set(found.tolist()))
        if len(lacking) == -more <= LISTED:
            which, one = " and ".join(map(str, lacking)), len(lacking) == 1
            words = f"{{one}} {which} is missing" if one else f"{{many}} {which} are missing"

            def without(n: int) -> np.ndarray | None:
                return np.delete(np.arange(n), lacking) if n > lacking[-1] else None

            yield Order(words, float(len(lacking)), without)
        every = count // total
        for first in range(min(every, 4)) if total * every == count else ():
            says = f"of every {every} {{many}} only the one at {first} is kept"
            yield Order(says, 1.5, lambda n, first=first: np.arange(n)[first::every])
    else:
        yield Order("the last {one} is repeated", 1, lambda n: np.minimum(np.arange(n + more), n - 1))
        yield Order("the first {one} is repeated", 1, lambda n: np.maximum(np.arange(-more, n), 0))
        times = total // count
        if times * count == total:
            yield Order(f"each {{one}} is there {times} times in turn", 1, lambda n: np.repeat(np.arange(n), times))
            yield Order(f"all {{many}} are repeated {times} times", 1, lambda n: np.tile(np.arange(n), times))


def _matched(own: np.ndarray, got: np.ndarray, wrong: np.ndarray) -> np.ndarray:
    """For each wrong slice the one of own that it is, ZERO where it is none; of SAMPLED of them at most."""
    places = np.flatnonzero(wrong)
    if len(places) * len(own) > SAMPLED * 4096:
        places = places[: SAMPLED * 4096 // len(own)]
    distance = (got[places] ** 2).sum(1)[:, None] - 2 * got[places] @ own.T + (own**2).sum(1)
    best = np.argmin(distance, 1)
    exact = ((got[places] - own[best]) ** 2).sum(1)
    scale = np.maximum((own[best] ** 2).sum(1), (got[places] ** 2).sum(1))
    return np.where((exact <= 0.05 * scale) & (scale > 0), best, ZERO)


def _common(steps: np.ndarray) -> list[int]:
    """The two commonest distances."""
    values, counts = np.unique(steps, return_counts=True)
    return [int(values[i]) for i in np.argsort(-counts)[:2] if values[i]]


def _exchanged_axes(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Two axes of the values in memory exchanged, whatever the sizes."""
    own, axes = component.own, component.axes
    residual = _norm(got - own)
    long = [axis for axis in range(own.ndim) if own.shape[axis] > 1]
    for i, first in enumerate(long):
        for second in long[i + 1 :]:
            for back in (False, True):
                if back and own.shape[first] == own.shape[second]:
                    continue
                law = _swap(axes[first], axes[second], own.shape[first] == own.shape[second], back)
                values = law.apply(component)
                if values is not None and _norm(got - values.astype(np.float64)) <= LEFT * residual:
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


def _norm(array: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(array, np.float64)))
