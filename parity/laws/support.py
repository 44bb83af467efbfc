"""Where along the axes of an array something is so: told in words that hold for an axis of another length too."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from parity.laws.numbers import listed, ordinal

# Of more indices than this only the number is said.
LISTED = 6


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
        return self.words if self.words.startswith(("from ", "up to ")) else f"in {self.words}"


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
        return ways
    many = plural(axis)
    if last - first + 1 == len(places):
        if not first:
            ways = [Span(axis, f"up to {axis} {last}", False, 1, _where(lambda i, n: i <= last))]
            if last == count - 2:
                ways.append(Span(axis, f"all {many} but the last", False, 1, _where(lambda i, n: i < n - 1)))
            return ways
        if last == count - 1:
            return [Span(axis, f"from {axis} {first} on", False, 1, _where(lambda i, n: i >= first))]
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
    words = f"{many} {listed([str(i) for i in places])}"
    if len(places) > LISTED:
        words = f"{len(places)} of {count} {many}"
    return [Span(axis, words, False, len(places), lambda n: np.isin(np.arange(n), places))]


def _where(test: Callable[[np.ndarray, int], np.ndarray]) -> Callable[[int], np.ndarray]:
    return lambda n: np.asarray(test(np.arange(n), n), bool)


def plural(axis: str) -> str:
    """The name of an axis for several indices; what follows in brackets or after "in" stays as it is."""
    head, rest = re.fullmatch(r"(.+?)((?: in | \().*)?", axis).groups(default="")
    if head.endswith(("ch", "x", "s")):
        return f"{head}es{rest}"
    return f"{head[:-1]}ies{rest}" if head.endswith("y") else f"{head}s{rest}"


def sentence(where: Sequence[Span], says: str) -> str:
    """What is said of a result, "is 0", where it is so."""
    if not where:
        return f"the result {says}"
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
