"""Laws of what is right but in another order: slices that stand in other places, axes read in another order."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.mixture import comparable, enough, seen
from parity.laws.numbers import plainest
from parity.laws.support import plural, spans

# Slices along an axis that are matched with each other, and values that are looked at of each.
MOST_SLICES, MOST_VALUES = 1024, 512
# Moved indices that are listed.
LISTED = 4

Order = Callable[[int], np.ndarray]
"""Of each index along an axis of a length, which index it has the content of."""


@dataclass(frozen=True)
class Moved:
    """Where contents stand instead: in words with {many} and {one} for the axis, and how many numbers that takes."""

    words: str
    size: float
    order: Order


def orders(found: np.ndarray) -> Iterator[Moved]:
    """How an order of n indices can be said, the plainest first; none for the right one and for one without a rule."""
    n = len(found)
    own = np.arange(n)
    if n < 2 or np.array_equal(found, own):
        return
    for moved in _rules(found, n):
        if np.array_equal(moved.order(n), found):
            yield moved
    differs = found != own
    where = [span for span in spans("{one}", differs) if span.size <= LISTED]
    apart = np.unique(found[differs])
    if where and len(apart) == 1 and int(differs.sum()) > 1:
        source, part = int(apart[0]), where[0]
        said = part.words.replace("{one}s", "{many}")
        yield Moved(f"{said} read as {{one}} {source}", 1 + part.size, lambda m: np.where(
            part.of(m), min(source, m - 1), np.arange(m)))  # fmt: skip
    steps = np.unique((found - own)[differs])
    if where and len(steps) == 1 and not np.isin(differs.sum(), (0, n)):
        by, part = int(steps[0]), where[0]
        said = part.words.replace("{one}s", "{many}")
        yield Moved(f"{said} come from {abs(by)} {'later' if by > 0 else 'earlier'}", 1 + part.size, lambda m: np.clip(
            np.arange(m) + by * part.of(m), 0, m - 1))  # fmt: skip
    if 2 <= differs.sum() <= LISTED:
        listed = ", ".join(f"{i} holds {j}" for i, j in zip(own[differs], found[differs], strict=True))
        places = dict(zip(own[differs].tolist(), found[differs].tolist(), strict=True))
        yield Moved(f"of the {{many}} {listed}", 2 * len(places), lambda m: _listed(places, m))
    elif differs.sum() == 1:
        i, j = int(own[differs][0]), int(found[differs][0])
        yield Moved(f"{{one}} {i} holds {{one}} {j}", 2, lambda m: _listed({i: j}, m))


def _listed(places: dict[int, int], m: int) -> np.ndarray:
    found = np.arange(m)
    for i, j in places.items():
        if max(i, j) < m:
            found[i] = j
    return found


def _rules(found: np.ndarray, n: int) -> Iterator[Moved]:
    first = int(found[0])
    yield Moved("the {many} are in reverse", 1, lambda m: np.arange(m)[::-1])
    if (found == first).all():
        end = "the last" if first == n - 1 else ("the first" if not first else f"number {first}")
        yield Moved(f"all {{many}} are {end}", 1, lambda m: np.full(m, m - 1 if first == n - 1 else min(first, m - 1)))
    # A place near the middle: where the shift is seen whether or not ends wrap.
    by = int(found[n // 2]) - n // 2
    far = by if abs(by) <= n // 2 else by - int(np.sign(by)) * n
    for shift in dict.fromkeys((by, far)):
        side, count = ("too early" if shift > 0 else "too late"), abs(shift)
        yield Moved(f"the {{many}} are {count} {side}, those at the end come round", 1,
                    lambda m, shift=shift: (np.arange(m) + shift) % m)  # fmt: skip
        yield Moved(f"the {{many}} are {count} {side}, the one at the end repeats", 1.5,
                    lambda m, shift=shift: np.clip(np.arange(m) + shift, 0, m - 1))  # fmt: skip
    apart = np.flatnonzero(found != np.arange(n))
    if len(apart) == 2 and np.array_equal(found[apart], apart[::-1]):
        i, j = (int(k) for k in apart)
        if n == 3 and (i, j) == (0, 2):
            return
        yield Moved(f"{{many}} {i} and {j} are exchanged", 2, lambda m: _listed({i: j, j: i}, m))
    clipped = int(found.max())
    yield Moved(f"{{many}} above {clipped} are number {clipped}", 1, lambda m: np.minimum(np.arange(m), clipped))
    lowest = int(found.min())
    yield Moved(
        f"{{many}} below {lowest} are number {lowest}", 1, lambda m: np.maximum(np.arange(m), min(lowest, m - 1))
    )
    yield Moved(f"the {{many}} start again after {clipped}", 1, lambda m: np.arange(m) % (clipped + 1))
    for k in (2, 3, 4):
        yield Moved(f"every {{one}} stands {k} times, the others are left out", 1, lambda m, k=k: np.arange(m) // k)
        yield Moved(f"every {k}th {{one}} alone is taken, those at the end come round", 1.5,
                    lambda m, k=k: np.arange(m) * k % m)  # fmt: skip
        yield Moved(f"within every {k} {{many}} the order is reversed", 1.5, lambda m, k=k: np.minimum(
            np.arange(m) // k * k + k - 1 - np.arange(m) % k, m - 1))  # fmt: skip
    for k in (k for k in range(2, n) if n % k == 0):
        yield Moved(f"the {{many}} are read as {k} times {n // k} and turned", 1.5,
                    lambda m, k=k: np.arange(m).reshape(k, -1).T.ravel() if m % k == 0 else np.arange(m))  # fmt: skip


def matched(got: np.ndarray, own: np.ndarray) -> tuple[np.ndarray, float] | None:
    """Of each row of a matrix [n, m] the row of another [n, m] that it is, and their common factor; None where some row
    is like no other."""
    n = len(own)
    if not 2 <= n <= MOST_SLICES or own.shape[1] < 2:
        return None
    step = max(own.shape[1] // MOST_VALUES, 1)
    a, b = (x[:, ::step].astype(np.float64) for x in (got, own))
    lengths = [np.linalg.norm(x, axis=1) for x in (a, b)]
    if min(length.min() for length in lengths) <= 1e-9 * max(length.max() for length in lengths):
        return None
    likeness = (a @ b.T) / np.outer(*lengths)
    # Rows that are alike stay where they are.
    likeness[np.arange(n), np.arange(n)] += 1e-6
    found = np.abs(likeness).argmax(1)
    signs = likeness[np.arange(n), found]
    if np.abs(signs).min() < 0.995 or len(np.unique(np.sign(signs))) > 1:
        return None
    ratio = float(np.median(lengths[0] / lengths[1][found]) * np.sign(signs[0]))
    return found, ratio


def rearranged(component: Component, got: np.ndarray) -> Iterator[Law]:
    """A result whose slices along one axis stand elsewhere, or whose axes were read in another order."""
    if not comparable(component, got):
        return
    what = component.facts.get("what", "the result")
    for number, (shape, axes) in enumerate(seen(component)):
        for axis, name in enumerate(axes):
            if number and axis == len(axes) - 1:
                continue
            own, new = (np.moveaxis(x.reshape(shape), axis, 0).reshape(shape[axis], -1) for x in (component.own, got))
            pair = matched(new, own)
            if pair is None:
                continue
            factor = plainest(pair[1], 1e-3)
            for moved in orders(pair[0]):
                law = _along(number, axis, name, what, moved, factor)
                if enough(component, got, law.apply(component)):
                    yield law
                    break
        yield from _turned(component, got, number, shape, axes, what)


def _along(number: int, axis: int, name: str, what: str, moved: Moved, factor: tuple[float, str]) -> Law:
    def apply(other: Component) -> np.ndarray | None:
        ways = seen(other)
        if number >= len(ways) or axis >= len(ways[number][0]):
            return None
        shape = ways[number][0]
        new = np.take(other.own.reshape(shape), np.clip(moved.order(shape[axis]), 0, shape[axis] - 1), axis)
        return (new.reshape(other.own.shape) * np.float64(factor[0])).astype(np.float32)

    words = moved.words.format(many=plural(name), one=name)
    scaled = "" if factor[0] == 1 else f" and is {factor[1]} times as large"
    return Law(f"of {what} {words}{scaled}", moved.size + bool(scaled) - 0.1 * number, apply)


def _turned(
    component: Component, got: np.ndarray, number: int, shape: tuple[int, ...], axes: tuple[str, ...], what: str
) -> Iterator[Law]:
    """Values that were laid out in another order of the axes, and then read as if they were in this one."""
    wide = [axis for axis, length in enumerate(shape) if length > 1]
    if not 2 <= len(wide) <= 5:
        return
    for order in permutations(wide):
        if list(order) == wide:
            continue
        full = [axis for axis in range(len(shape)) if axis not in wide] + list(order)
        for back in (False, True):

            def apply(other: Component, full: list[int] = full, back: bool = back) -> np.ndarray | None:
                ways = seen(other)
                if number >= len(ways) or len(ways[number][0]) != len(full):
                    return None
                own, lengths = other.own, ways[number][0]
                if back:
                    laid = own.reshape([lengths[axis] for axis in full])
                    return laid.transpose(np.argsort(full)).reshape(own.shape)
                return own.reshape(lengths).transpose(full).reshape(own.shape)

            if enough(component, got, apply(component)):
                said = ", ".join(axes[axis] for axis in order)
                words = f"drawn in the order {said}" if back else f"laid out in the order {said}"
                yield Law(f"{what} is {words}", 1.5, apply)
                return
