"""Parts of an array in which something was computed otherwise, and the words for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

# A slice counts as touched where it is off by so many times what rounding may do to it.
BEYOND = 4.0
LISTED = 4


@dataclass(frozen=True)
class Part:
    """Some indexes of an axis: given its length, which; `words` name them, `size` counts what they are told by."""

    words: str
    size: float
    of: Callable[[int], np.ndarray]


@dataclass(frozen=True)
class Region:
    """A part of an array: some indexes of each axis, None for all of them.

    `lengths` are those of the array that it was read from, None for axes that may have another length elsewhere.
    """

    parts: tuple[Part | None, ...]
    lengths: tuple[int | None, ...]

    @property
    def whole(self) -> bool:
        """Whether it is all of an array."""
        return not any(self.parts)

    @property
    def words(self) -> str:
        """What stands behind a sentence: empty for all of an array."""
        told = [part.words for part in self.parts if part]
        return f" {told[0]}" if len(told) == 1 else "".join(f" {words.removesuffix(' alone')}" for words in told)

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
        return [part.of(n) if part else np.arange(n) for part, n in zip(self.parts, shape, strict=True)]

    def within(self, array: np.ndarray, change: Callable[[np.ndarray], np.ndarray | None]) -> np.ndarray | None:
        """An array of which this part alone is changed."""
        if self.whole:
            return change(array) if self.indexes(array.shape) else None
        found = self.indexes(array.shape)
        if found is None:
            return None
        place = np.ix_(*found)
        changed = change(array[place])
        if changed is None or changed.shape != array[place].shape:
            return None
        result = array.astype(np.result_type(array, changed))
        result[place] = changed
        return result


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
        touched.append(np.flatnonzero(off.sum(others) > BEYOND**2 * allowed))
    if all(map(len, touched)):
        # What lies between is touched too, however little it shows.
        for indexes in (touched, [np.arange(part[0], part[-1] + 1) for part in touched]):
            parts = []
            for axis, (part, length) in enumerate(zip(indexes, own.shape, strict=True)):
                some = part_of(part, length, axes[axis], axis in open_axes) if len(part) < length else None
                # Indexes without an order that are many say nothing.
                parts.append(some if some and some.size <= max(length / 4, LISTED) else None)
            region = Region(tuple(parts), lengths)
            if region.words not in [other.words for other in found]:
                found.append(region)
    return found


def part_of(touched: np.ndarray, length: int, name: str, is_open: bool) -> Part:
    """Some indexes of an axis, told as shortly as they can be; an open axis may be longer elsewhere."""
    first, last, count = int(touched[0]), int(touched[-1]), len(touched)
    if count == 1:
        if is_open and first == length - 1 > 0:
            return Part(f"in the last {name} alone", 1, lambda n: np.arange(n)[-1:])
        return Part(f"in {name} {first} alone", 1, lambda n: np.arange(n)[first : first + 1])
    if last - first + 1 == count:
        if last == length - 1:
            return Part(f"from {name} {first} on", 1, lambda n: np.arange(n)[first:])
        return Part(f"in {name}s {first} to {last}", 1 if not first else 2, lambda n: np.arange(n)[first : last + 1])
    if count == length - 1:
        missing = int(np.setdiff1d(np.arange(length), touched)[0])
        return Part(f"but for {name} {missing}", 1, lambda n: np.delete(np.arange(n), [missing] if missing < n else []))
    period = _period(touched, length)
    if period:
        inside = touched[touched < period]
        return Part(
            f"in {_listed(inside, name)} of every {period}",
            1 + _told_by(inside),
            lambda n: np.flatnonzero(np.isin(np.arange(n) % period, inside)),
        )
    return Part(f"in {_listed(touched, name)}", _told_by(touched), lambda n: touched[touched < n])


def _period(touched: np.ndarray, length: int) -> int | None:
    mask = np.zeros(length, bool)
    mask[touched] = True
    for period in range(2, length // 2 + 1):
        if (mask[period:] == mask[:-period]).all():
            return period
    return None


def _told_by(indexes: np.ndarray) -> float:
    return 2.0 if len(indexes) > 1 and np.ptp(indexes) + 1 == len(indexes) else float(len(indexes))


def _listed(indexes: np.ndarray, name: str) -> str:
    if len(indexes) == 1:
        return f"{name} {indexes[0]}"
    if np.ptp(indexes) + 1 == len(indexes):
        return f"{name}s {indexes[0]} to {indexes[-1]}"
    if len(indexes) <= LISTED:
        return f"{name}s {', '.join(map(str, indexes[:-1]))} and {indexes[-1]}"
    return f"{len(indexes)} {name}s ({', '.join(map(str, indexes[:LISTED]))}, ...)"
