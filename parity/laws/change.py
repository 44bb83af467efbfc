"""Changes of an array that can be said: a factor, an offset, another order, bounds, fewer bits, somewhere or not."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parity.laws import order as order_of
from parity.laws.base import Component, Curves, Figure, Law
from parity.laws.fit import LEAVES, Fit
from parity.laws.numbers import plainest, told
from parity.laws.rounding import formats
from parity.laws.support import Region, plural, regions_of

# Numbers that each index along an axis is known by.
KNOWN_BY = 64


@dataclass(frozen=True)
class Change:
    """What becomes of an array: `sentence` continues the name of the array, `apply` changes any that is alike.

    `describes` as of a Law.
    """

    sentence: str
    size: float
    apply: Callable[[np.ndarray], np.ndarray | None]
    figure: Figure | None = None
    describes: bool = False

    def law(self, subject: str, apply: Callable[[Component], np.ndarray | None], more: float = 0.0) -> Law:
        """The law that a subject is changed so; `apply` says what a component then computes."""
        return Law(subject + self.sentence, self.size + more, apply, self.figure, self.describes)


def changes(
    own: np.ndarray,
    got: np.ndarray,
    rounding: float,
    axes: Sequence[str],
    open_axes: Sequence[int] = (0,),
    single: bool = False,
) -> Iterator[Change]:
    """Changes that may have made `got` of `own`, both float64 of one shape [axes]: likely ones, to be checked.

    `open_axes` may have other lengths elsewhere. `single`: an element by itself is told too, as of a parameter; of a
    result that would only say what came out.
    """
    for region in regions_of(own, got, rounding, axes, open_axes):
        place = np.ix_(*region.indexes(own.shape))
        if own[place].size == 1 and not single:
            continue
        share = np.linalg.norm(own[place]) / (np.linalg.norm(own) or 1.0)
        part = Fit(own[place], got[place], rounding * share)
        for change in (*of_values(part), *_vectors(part, axes, open_axes)):
            yield _within(region, change)
        yield from _alike(region, own, got, axes)
    for axis, name in enumerate(axes):
        yield from _orders(own, got, axis, name, axis in open_axes)
    if own.ndim == 2:
        yield from _turned(own)


def _within(region: Region, change: Change) -> Change:
    return replace(
        change,
        sentence=change.sentence + region.words,
        size=change.size + region.size,
        apply=lambda array: region.within(array, change.apply),
    )


def _alike(region: Region, own: np.ndarray, got: np.ndarray, axes: Sequence[str]) -> Iterator[Change]:
    """Slices of a part along an axis that are all the mean of the others."""
    held = [axis for axis, span in enumerate(region.parts) if span]
    if len(held) != 1 or own.ndim < 2:
        return
    axis, many = held[0], plural(axes[held[0]])

    def apply(array: np.ndarray) -> np.ndarray | None:
        found = region.indexes(array.shape)
        if found is None:
            return None
        moved = np.moveaxis(array.astype(np.float64), axis, 0).copy()
        moved[found[axis]] = np.delete(moved, found[axis], 0).mean(0)
        return np.moveaxis(moved, 0, axis)

    values = np.moveaxis(got, axis, 0)[region.indexes(own.shape)[axis]]
    if len(values) > 1 and not np.ptp(values, 0).any():
        yield Change(f" is the mean of the other {many}{region.words}", 1 + region.size, apply)


def of_values(part: Fit) -> Iterator[Change]:
    """What may be done to all values, each by itself."""
    own, got = part.own, part.got
    if own.size == 1:
        value = part.snapped(float(got.flat[0]), lambda v: np.full(got.shape, v))
        yield Change(f" is {told(value)} instead of {told(float(own.flat[0]))}", 1, lambda x: np.full(x.shape, value))
        return
    if square := float(np.vdot(own, own)):
        factor = part.snapped(float(np.vdot(own, got)) / square, lambda a: a * own)
        # What is written as once is no change.
        if told(factor) != "1":
            yield Change(f" {times(factor)}", 1, lambda x: x * factor)
    by = part.snapped(float(np.mean(got - own)), lambda c: own + c)
    yield Change(f" is {told(abs(by))} {'larger' if by > 0 else 'smaller'}", 1.1, lambda x: x + by)
    if own.size > 2 and np.ptp(own):
        slope, level = np.polyfit(own.ravel(), got.ravel(), 1)
        slope = part.snapped(float(slope), lambda a: a * own + level)
        level = part.snapped(float(np.mean(got - slope * own)), lambda c: slope * own + c)
        if slope != 1 and level:
            yield Change(f" is {told(slope)} times as large plus {told(level)}", 2, lambda x: slope * x + level)
        value = part.snapped(float(np.mean(got)), lambda v: np.full(got.shape, v))
        if value:
            yield Change(f" is {told(value)} everywhere", 1, lambda x: np.full(x.shape, value))
    yield from _bounds(part)
    yield Change(" has no sign", 1, np.abs)
    for name, size, rounded in formats():
        yield Change(f" {name}", size, rounded)
    yield Change(" is squared", 1.2, np.square)
    yield Change(" is rounded to whole numbers", 1.3, np.round)
    yield from _stepped(got)


def times(factor: float) -> str:
    """What a factor does to a result."""
    return {0.0: "is 0", -1.0: "is negated"}.get(factor, f"is {told(factor)} times as large")


def _stepped(got: np.ndarray) -> Iterator[Change]:
    """Values on a grid."""
    levels = np.unique(got.ravel()[:4096])
    if 2 < len(levels) < min(got.size, 4096) // 2:
        steps = np.diff(levels)
        step = float(np.median(steps[steps > 0.1 * steps.max()]))
        count, said = plainest(1 / step, 1e-3 / step)
        for how, rounding in (("", np.rint), (" down", np.floor), (" towards 0", np.trunc)):
            words = f" is rounded{how} to a multiple of 1/{said}"
            yield Change(words, 1.6 + 0.1 * bool(how), lambda x, of=rounding: of(x * count) / count)


def _bounds(part: Fit) -> Iterator[Change]:
    """Values held within bounds, of one side or both; a bound is met by several."""
    own, got = part.own, part.got
    low, high = float(got.min()), float(got.max())
    room = part.slack / max(got.size, 1) ** 0.5
    if own.max() > high + room:
        most = part.snapped(high, lambda v: np.minimum(own, v))
        yield Change(f" is at most {told(most)}", 1, lambda x: np.minimum(x, most))
    if own.min() < low - room:
        least = part.snapped(low, lambda v: np.maximum(own, v))
        yield Change(f" is at least {told(least)}", 1, lambda x: np.maximum(x, least))
    if own.max() > high + room and own.min() < low - room and high - low > room:
        bound = part.snapped(max(-low, high), lambda v: np.clip(own, -v, v))
        yield Change(f" is clamped to [{told(-bound)}, {told(bound)}]", 1, lambda x: np.clip(x, -bound, bound))
        least = part.snapped(low, lambda v: np.clip(own, v, high))
        most = part.snapped(high, lambda v: np.clip(own, least, v))
        yield Change(f" is clamped to [{told(least)}, {told(most)}]", 2, lambda x: np.clip(x, least, most))
        yield from _saturating(part)


def _saturating(part: Fit) -> Iterator[Change]:
    """c tanh(x / c), as logits are capped."""
    largest = float(np.abs(part.own).max())
    if not largest:
        return
    caps = largest * np.geomspace(0.2, 20, 60)
    for _ in range(3):
        best = min(caps, key=lambda c: part.left(c * np.tanh(part.own / c)))
        ratio = caps[1] / caps[0]
        caps = best * np.geomspace(1 / ratio, ratio, 60)
    cap = part.snapped(float(best), lambda c: c * np.tanh(part.own / c))
    yield Change(f" is capped by {told(cap)} tanh(x / {told(cap)})", 1, lambda x: cap * np.tanh(x / cap))


def _vectors(part: Fit, axes: Sequence[str], open_axes: Sequence[int]) -> Iterator[Change]:
    """A factor or an offset for each index of an axis, read from one half of the rest and right in the other."""
    own, got = part.own, part.got
    for axis, name in enumerate(axes):
        n = own.shape[axis]
        a, b = (np.moveaxis(array, axis, -1).reshape(-1, n) for array in (own, got))
        if axis in open_axes or n < 2 or len(a) < 4:
            continue
        halves = [(a[::2], b[::2]), (a[1::2], b[1::2])]
        ways = ("times another factor", _factors, np.multiply), ("plus another number", _offsets, np.add)
        for words, read, write in ways:
            first, second = (read(*half) for half in halves)
            left = np.linalg.norm(write(halves[1][0], first) - halves[1][1])
            allowed = max(part.slack, 2 * LEAVES * np.linalg.norm(halves[1][1] - halves[1][0]))
            if left > allowed or np.ptp(first) <= 1e-6:
                continue
            vector = read(a, b)
            shape = [n if i == axis else 1 for i in range(own.ndim)]
            span = f"from {told(float(vector.min()))} to {told(float(vector.max()))}"
            figure = Curves(f"Every {name} {words}", name, words.split()[-1], np.arange(n), {"found": vector})
            yield Change(
                f" is in each {name} {words}, {span}",
                float(n),
                lambda x, write=write, vector=vector, shape=shape, axis=axis, n=n: (
                    write(x, vector.reshape(shape)) if x.shape[axis] == n else None
                ),
                figure,
                True,
            )


def _factors(own: np.ndarray, got: np.ndarray) -> np.ndarray:
    square = np.square(own).sum(0)
    return np.where(square > 0, (own * got).sum(0) / np.where(square > 0, square, 1), 1.0)


def _offsets(own: np.ndarray, got: np.ndarray) -> np.ndarray:
    return (got - own).mean(0)


def _orders(own: np.ndarray, got: np.ndarray, axis: int, name: str, is_open: bool) -> Iterator[Change]:
    length = own.shape[axis]
    if length < 2 or own.size == length and own.size < 4:
        return
    one, two = (np.moveaxis(array, axis, 0).reshape(length, -1) for array in (own, got))
    if one.shape[1] > KNOWN_BY:
        places = np.random.default_rng(0).choice(one.shape[1], KNOWN_BY, replace=False)
        one, two = one[:, places], two[:, places]
    off = np.square(two - one).sum(1)
    for order in order_of.fitting(one, two, off > 1e-6 * off.max(initial=0)):

        def apply(x: np.ndarray, order: order_of.Order = order) -> np.ndarray | None:
            return order.taken(x, axis) if is_open or x.shape[axis] == length else None

        said = order.of_axis(name)
        yield Change(f"'s {said}" if order.says.startswith("{") else f": {said}", order.size, apply)


def _turned(own: np.ndarray) -> Iterator[Change]:
    """Rows and columns of a matrix exchanged."""
    if own.shape[0] == own.shape[1]:
        yield Change(" is transposed", 1, lambda x: x.T if x.ndim == 2 and x.shape[0] == x.shape[1] else None)
    else:
        yield Change(" is transposed in memory", 1, lambda x: x.T.reshape(x.shape) if x.ndim == 2 else None)
        yield Change(" is read in the other order in memory", 1, lambda x: x.reshape(x.shape[::-1]).T)
