"""Where along the axes of an array something is so: told in words that hold for an axis of another length too."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.numbers import listed, ordinal

# Of more indices than this only the number is said.
LISTED = 6
# How many indices a kernel may take at once.
BLOCKS = (4, 8, 16, 32, 64)
# A slice counts as touched where it is off by so many times what rounding may do to it.
BEYOND = 4.0


@dataclass(frozen=True)
class Span:
    """Some indices along an axis.

    Attributes:
        axis: its name, in the singular.
        words: "channel 7", "from token 12 on", "channels 3 to 5".
        alone: whether it is one index, or the others than one.
        size: how many numbers say it.
        of: which indices those are on an axis of a length, as booleans.
    """

    axis: str
    words: str
    alone: bool
    size: float
    of: Callable[[int], np.ndarray] = field(repr=False, compare=False)

    @property
    def within(self) -> str:
        """The words after "it is so"."""
        return self.words if self._bounded else f"in {self.words}"

    @property
    def held(self) -> str:
        """The words after "it is so", where there is nothing else to say where."""
        return f"{self.within} alone" if self.alone else self.within

    @property
    def told(self) -> str:
        """The words by themselves: "channel 7 alone"."""
        return f"{self.words} alone" if self.alone else self.words

    @property
    def those(self) -> str:
        """The words before "are so": "channels from 3 on"."""
        return f"{plural(self.axis)} {self.words.replace(f'{self.axis} ', '')}" if self._bounded else self.words

    @property
    def _bounded(self) -> bool:
        return self.words.startswith(("from ", "up to "))


def spans(axis: str, chosen: np.ndarray) -> list[Span]:
    """How some indices (booleans [n]) can be said, the plainest first; several that only other lengths tell apart.

    None for all of them, and for no index.
    """
    count, places = len(chosen), np.flatnonzero(chosen)
    if not 0 < len(places) < count:
        return []
    first, last = int(places[0]), int(places[-1])
    if len(places) == 1:
        ways = [Span(axis, f"{axis} {first}", True, 1, _where(lambda i, n: i == first))]
        if first == count - 1 and count > 1:
            ways.append(Span(axis, f"the last {axis}", True, 1, _where(lambda i, n: i == n - 1)))
            ways += _behind_blocks(axis, first, count)
        return ways
    many = plural(axis)
    if last - first + 1 == len(places):
        if not first:
            ways = [Span(axis, f"up to {axis} {last}", False, 1, _where(lambda i, n: i <= last))]
            if last == count - 2:
                ways.append(Span(axis, f"all {many} but the last", False, 1, _where(lambda i, n: i < n - 1)))
            return ways
        if last == count - 1:
            ways = [Span(axis, f"from {axis} {first} on", False, 1, _where(lambda i, n: i >= first))]
            return [*ways, *_behind_blocks(axis, first, count)]
        words = f"{many} {first} {'and' if last == first + 1 else 'to'} {last}"
        return [Span(axis, words, False, 2, _where(lambda i, n: (first <= i) & (i <= last)))]
    steps = set(np.diff(places).tolist())
    step = steps.pop() if len(steps) == 1 else 0
    if step and len(places) > 2 and first < step and last + step >= count:
        words = f"{('even', 'odd')[first]} {many}" if step == 2 else f"every {ordinal(step)} {axis} from {first} on"
        return [Span(axis, words, False, 1 + (step > 2), _where(lambda i, n: i % step == first))]
    others = np.flatnonzero(~chosen)
    if len(others) == 1:
        missing = int(others[0])
        return [Span(axis, f"all {many} but {missing}", False, 1, _where(lambda i, n: i != missing))]
    period = next((n for n in range(2, count // 2 + 1) if (chosen[n:] == chosen[:-n]).all()), 0)
    if period and len(places) > 2:
        inside = np.flatnonzero(chosen[:period])
        run = len(inside) > 2 and np.ptp(inside) + 1 == len(inside)
        which = f"{inside[0]} to {inside[-1]}" if run else listed([str(i) for i in inside])
        words = f"{many if len(inside) > 1 else axis} {which} of every {period}"
        size = 3 if run else 1 + len(inside)
        return [Span(axis, words, False, size, _where(lambda i, n: np.isin(i % period, inside)))]
    words = f"{many} {listed([str(i) for i in places])}"
    if len(places) > LISTED:
        words = f"{len(places)} of {count} {many}"
    return [Span(axis, words, False, len(places), lambda n: np.isin(np.arange(n), places))]


def _behind_blocks(axis: str, first: int, count: int) -> list[Span]:
    """What is left over behind whole blocks, which is elsewhere at another length."""
    return [
        Span(axis, f"{plural(axis)} behind the last whole {k}", False, 1.5, _where(
            lambda i, n, k=k: (i >= n // k * k) & (n >= k)))
        for k in BLOCKS if first and first % k == 0 and count - first < k
    ]  # fmt: skip


def _where(test: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[int], np.ndarray]:
    return lambda n: np.asarray(test(np.arange(n), n), bool)


def plural(axis: str) -> str:
    """The name of an axis for several indices; what follows in brackets or after "in" stays as it is."""
    head, rest = re.fullmatch(r"(.+?)((?: in | \().*)?", axis).groups(default="")
    if head.endswith("is"):
        return f"{head[:-2]}es{rest}"
    if head.endswith(("ch", "x", "s")):
        return f"{head}es{rest}"
    return f"{head[:-1]}ies{rest}" if re.search("[^aeo]y$", head) else f"{head}s{rest}"


def sentence(where: Sequence[Span], says: str, what: str) -> str:
    """What is said of a result, "is 0", where it is so."""
    if not where:
        return f"{what} {says}"
    if len(where) == 1 and where[0].alone:
        return f"{where[0].words} alone {says}"
    # What is one index stands before what is a range.
    ordered = sorted(where, key=lambda span: not span.alone)
    comma = "," if len(where) > 1 else ""
    return f"{', '.join(span.within for span in ordered)}{comma} it {says}"


def mask(where: Sequence[Span], axes: Sequence[str], shape: Sequence[int]) -> np.ndarray | None:
    """Where that is in an array, as booleans that broadcast to its shape; None where it lacks an axis."""
    result = np.ones([1] * len(shape), bool)
    for span in where:
        if span.axis not in axes:
            return None
        place = axes.index(span.axis)
        result = result & span.of(shape[place]).reshape([-1 if i == place else 1 for i in range(len(shape))])
    return result


def names_of(component: Component, otherwise: Sequence[str]) -> Sequence[str]:
    """What the axes of a component's result are called; `otherwise` where that is not known."""
    known = len(component.axes) == component.own.ndim
    return component.axes if known else otherwise[: component.own.ndim]


def energies(array: np.ndarray, axis: int) -> np.ndarray:
    """The squared norm of each slice along an axis, float64 [n]."""
    return np.einsum("ij,ij->i", *[np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1).astype(np.float64)] * 2)


def beyond(residual: np.ndarray, own: np.ndarray, axis: int, relative: float) -> np.ndarray:
    """Which slices along an axis differ by more than rounding, booleans [n].

    `relative` is what rounding makes, relative to a slice's norm.
    """
    errors, norms = energies(residual, axis), energies(own, axis)
    # A slice near zero is rounded as what is beside it is.
    level = (2.5 * relative) ** 2 * np.maximum(norms, 0.01 * norms.mean())
    return errors > np.maximum(level, 1e-9 * errors.max(initial=0.0))


def affected(difference: np.ndarray, axis: int, rounding: float) -> np.ndarray:
    """Which places along an axis hold a difference beyond rounding, bool; all where none stands out of it."""
    energy = np.square(np.abs(difference)).sum(tuple(i for i in range(difference.ndim) if i != axis))
    beyond = energy > np.maximum(9 * rounding**2 / len(energy), 1e-6 * energy.max(initial=0.0))
    return beyond if beyond.any() else np.ones_like(beyond)


def span_of(axis: str, chosen: np.ndarray, is_open: bool = False) -> Span | None:
    """The plainest way to say some indices of an axis, which may be longer elsewhere; None for all and for too many."""
    ways = spans(axis, chosen)
    way = ways[-1] if is_open and len(ways) > 1 and ways[0].alone else (ways or [None])[0]
    return way if way and way.size <= max(len(chosen) / 4, LISTED) and f" of {len(chosen)} " not in way.words else None


@dataclass(frozen=True)
class Region:
    """A part of an array: some indexes of each axis, None for all of them.

    `lengths` are those of the array that it was read from, None for axes that may have another length elsewhere.
    """

    parts: tuple[Span | None, ...]
    lengths: tuple[int | None, ...]

    @property
    def words(self) -> str:
        """What stands behind a sentence: empty for all of an array."""
        told = [part for part in self.parts if part]
        return f" {told[0].held}" if len(told) == 1 else "".join(f" {part.within}" for part in told)

    @property
    def size(self) -> float:
        """How many numbers and choices it is told by."""
        return sum(part.size for part in self.parts if part)

    def indexes(self, shape: Sequence[int]) -> list[np.ndarray] | None:
        """The indexes along each axis of an array of a shape; None where that is no array of the kind."""
        if len(shape) != len(self.parts):
            return None
        if any(own is not None and own != length for own, length in zip(self.lengths, shape, strict=True)):
            return None
        return [np.flatnonzero(part.of(n)) if part else np.arange(n) for part, n in zip(self.parts, shape, strict=True)]

    def within(self, array: np.ndarray, change: Callable[[np.ndarray], np.ndarray | None]) -> np.ndarray | None:
        """An array of which this part alone is changed."""
        found = self.indexes(array.shape)
        if found is None or not any(self.parts):
            return change(array) if found else None
        place = np.ix_(*found)
        changed = change(array[place])
        if changed is None or changed.shape != array[place].shape:
            return None
        result = array.astype(np.result_type(array, changed))
        result[place] = changed
        return result

    def law(self, law: Law, inside: Callable[[Component, list[np.ndarray]], Component | None]) -> Law:
        """A law that holds in this part alone; `inside` makes of a component that of the indexes along each axis."""

        def apply(other: Component) -> np.ndarray | None:
            found = self.indexes(other.own.shape)
            part = None if found is None else inside(other, found)
            return None if part is None else self.within(other.own, lambda own: law.apply(replace(part, own=own)))

        return replace(law, sentence=law.sentence + self.words, size=law.size + self.size, apply=apply)


def regions_of(
    own: np.ndarray, got: np.ndarray, rounding: float, axes: Sequence[str], open_axes: Sequence[int] = (0,)
) -> list[Region]:
    """All of an array, and the smallest part outside of which there is nothing but rounding, where that is smaller."""
    lengths = tuple(None if i in open_axes else n for i, n in enumerate(own.shape))
    found = [Region((None,) * own.ndim, lengths)]
    off, square = np.square(got - own), np.square(own)
    total = square.sum() or 1.0
    touched = []
    for axis, length in enumerate(own.shape):
        others = tuple(i for i in range(own.ndim) if i != axis)
        allowed = rounding**2 * (square.sum(others) / total + 1 / length) / 2
        touched.append(off.sum(others) > BEYOND**2 * allowed)
    if all(part.any() for part in touched):
        # What lies between is touched too, however little it shows.
        between = [np.maximum.accumulate(part) & np.maximum.accumulate(part[::-1])[::-1] for part in touched]
        for chosen in (touched, between):
            parts = tuple(span_of(axes[axis], part, axis in open_axes) for axis, part in enumerate(chosen))
            region = Region(parts, lengths)
            if region.words not in [other.words for other in found]:
                found.append(region)
    return found
