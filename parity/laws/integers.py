"""What may be done to a segment's integers along one axis, read from them; everything is equal or it is nothing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import permutations

import numpy as np

from parity.laws.segments import OPENING, TEXT, Segment
from parity.laws.support import spans

# Denominators of a factor, and what a factor takes to say beyond one that is whole, where it has to be rounded.
FINEST, FITTED = 12, 1.5


@dataclass(frozen=True)
class View:
    """Integers [axes, n], the segments along n, and the index of the first column in the whole sequence.

    `counts` tells that they are counts of things and no positions; where they are names, `names` says what of.
    """

    ids: np.ndarray
    segments: tuple[Segment, ...]
    first: int = 0
    counts: bool = False
    names: Mapping[int, str] | None = None

    def said(self, value: int) -> str:
        return str(value) if self.names is None else self.names.get(value, str(value))

    def of(self, segment: Segment, axis: int) -> np.ndarray:
        return self.ids[axis, segment.rows]


@dataclass(frozen=True)
class Change:
    """Something done to the integers of a segment along an axis; equal ones are the same thing at several places.

    Attributes:
        words: what follows "positions are": "off by +1".
        size: how many numbers say it.
        call: of a view, a segment and an axis the new integers, None where it has no meaning.
    """

    words: str
    size: float
    call: Callable[[View, Segment, int], np.ndarray | None] = field(compare=False, repr=False)


Rule = Callable[[np.ndarray], np.ndarray]


def changes(view: View, segment: Segment, axis: int, got: np.ndarray) -> Iterator[Change]:
    """All changes that make a segment's integers along an axis what was found, none of which needs more than is known
    of a segment."""
    x = view.of(segment, axis).astype(np.int64)
    y = got.astype(np.int64)
    for change in _candidates(view, segment, axis, x, y):
        value = change.call(view, segment, axis)
        if value is not None and np.array_equal(value, y):
            yield change


def _candidates(view: View, segment: Segment, axis: int, x: np.ndarray, y: np.ndarray) -> Iterator[Change]:
    by = int(y[0] - x[0])
    if view.names is None:
        yield _plain(f"off by {by:+d}", 1, lambda x: x + by)
    yield _plain(view.said(int(y[0])), 1, lambda x: np.full_like(x, int(y[0])))
    if view.names is not None:
        for place in np.flatnonzero(x != y)[:1]:
            old, new = int(x[place]), int(y[place])
            if np.sum(view.ids[axis] == old) < 2:
                continue
            words = f"{view.said(new)} where {view.said(old)} should be"
            yield _plain(words, 1.5, lambda x, old=old, new=new: np.where(x == old, new, x))
        return
    if view.counts:
        yield from (_plain(words, 1.1 + more, rule) for words, more, rule in _scaled(x, y))
        for other in range(len(view.ids)):
            if other != axis:
                yield Change(f"those of the {AXES[other]}", 1, lambda view, segment, axis, other=other: view.of(
                    segment, other))  # fmt: skip
        return
    high, low = int(y.max()), int(y.min())
    yield _plain(f"at most {high}", _cost(high), lambda x: np.minimum(x, high))
    yield _plain(f"at least {low}", _cost(low), lambda x: np.maximum(x, low))
    for modulus in _moduli(x, y):
        yield _plain(f"the remainder by {modulus}", _cost(modulus), lambda x, m=modulus: x % m)
    for words, more, rule in _scaled(x, y):
        yield _plain(words, 1 + more, rule)
    differs = np.flatnonzero(x != y)
    if len(differs):
        old, new = int(x[differs[0]]), int(y[differs[0]])
        yield _plain(f"{new} where {old} should be", 2, lambda x: np.where(x == old, new, x))
        if (old, new) == (int(x[differs[-1]]), new):
            yield _plain(f"off by {new - old:+d} at {old}", 2, lambda x: np.where(x == old, new, x))
        gap = int(y[differs[-1]] - x[differs[-1]])
        yield _plain(f"off by {gap:+d} from {old} on", 2, lambda x: x + gap * (x >= old))
        last = int(x[differs].max())
        yield _plain(f"off by {gap:+d} up to {last}", 2, lambda x: x + gap * (x <= last))
    first = int(y[0])
    yield Change(f"{first} at the start and count on from there", _start_cost(first), lambda view, segment, axis: (
        view.of(segment, axis) - view.of(segment, axis)[:1] + first))  # fmt: skip
    for other in range(len(view.ids)):
        if other != axis:
            yield Change(
                f"those of the {AXES[other]}", 1, lambda view, segment, axis, other=other: view.of(segment, other)
            )
    yield Change("places in the sequence", 1, lambda view, segment, axis: (
        np.arange(segment.start, segment.stop) + view.first))  # fmt: skip
    yield Change("places in the segment", 1, lambda view, segment, axis: np.arange(segment.length))
    for other in view.segments:
        if other.length == segment.length and other.name != segment.name and segment.length > 1:
            yield Change(f"those of {other.name}", 1, lambda view, segment, axis, name=other.name: _of_other(
                view, segment, axis, name))  # fmt: skip
    if segment.length > 1:
        yield from _within(view, segment, axis, x, y, by)
    if segment.kind != TEXT:
        yield from _from_opening(view, segment, axis, x, y)


AXES = ("frames", "rows", "columns")


def _start_cost(number: int) -> float:
    """What a start takes to say: less where it is an anchor, such as 0 or 1000."""
    return 1.1 if number % 100 else 0.9


def _cost(number: int) -> float:
    """What a bound takes to say: less where it is one that people write."""
    return 1.0 if number < 10 or not number % 10 or not number & (number - 1) or not number & (number + 1) else 1.5


def _of_other(view: View, segment: Segment, axis: int, name: str) -> np.ndarray | None:
    found = [other for other in view.segments if other.name == name and other.length == segment.length]
    return view.of(found[0], axis) if found else None


def _plain(words: str, size: float, rule: Rule) -> Change:
    return Change(words, size, lambda view, segment, axis: rule(view.of(segment, axis).astype(np.int64)))


def _from_opening(view: View, segment: Segment, axis: int, x: np.ndarray, y: np.ndarray) -> Iterator[Change]:
    """What changes how a visual block counts from its opening bracket on."""

    def base(view: View, segment: Segment, axis: int) -> int | None:
        block = [other for other in view.segments if other.block == segment.block]
        return int(view.of(block[0], axis)[0]) if block[0].kind == OPENING else None

    first = base(view, segment, axis)
    if first is None:
        return
    r, s = x - first, y - first
    rules = [(words, 1.2 + more, rule) for words, more, rule in _scaled(r, s)]
    rules += [(f"counted up to {m - 1} and again from 0", 1.2, lambda r, m=m: r % m) for m in _moduli(r, s)]
    most = int(s.max())
    rules.append((f"no more than {most}", 1.2, lambda r: np.minimum(r, most)))
    for words, size, rule in rules:

        def call(view: View, segment: Segment, axis: int, rule: Rule = rule) -> np.ndarray | None:
            first = base(view, segment, axis)
            return None if first is None else first + rule(view.of(segment, axis).astype(np.int64) - first)

        yield Change(f"{words} from the opening bracket", size, call)


def _within(view: View, segment: Segment, axis: int, x: np.ndarray, y: np.ndarray, by: int) -> Iterator[Change]:
    """What changes how a segment counts from its first integer on, which may itself be another."""
    r, s = x - x[0], y - y[0]
    moved = f" and off by {by:+d}" if by else ""
    size = 1 + bool(by)

    def counted(words: str, more: float, rule: Rule) -> Change:
        def call(view: View, segment: Segment, axis: int) -> np.ndarray:
            own = view.of(segment, axis).astype(np.int64)
            return own[0] + by + rule(own - own[0])

        return Change(f"{words}{moved}", size - 1 + more, call)

    if not r.any():
        # A count that should stand still is one by token, or none at all.
        yield Change(f"counted by token{moved}", size, lambda view, segment, axis: (
            view.of(segment, axis)[0] + by + np.arange(segment.length)))  # fmt: skip
    yield counted("all that of the first", 1, np.zeros_like)
    yield counted("in reverse", 1, lambda r: r.max() - r - (r.max() - r)[0])
    back = int(y[0] - x[0] - r.max())

    def turned(view: View, segment: Segment, axis: int) -> np.ndarray:
        own = view.of(segment, axis)
        return own.max() + own.min() - own + back

    yield Change("in reverse" + (f" and off by {back:+d}" if back else ""), 1 + bool(back), turned)
    for words, more, rule in _scaled(r, s):
        yield counted(f"{words} within the segment", 1 + more, rule)
    for modulus in _moduli(r, s):
        yield counted(f"counted up to {modulus - 1} and again from 0 within the segment", 1, lambda r, m=modulus: r % m)
    most = int(s.max())
    yield counted(f"no more than {most} from the first", 1, lambda r: np.minimum(r, most))
    differs = np.flatnonzero(r != s)
    if len(differs):
        old, gap = int(r[differs[0]]), int((s - r)[differs[0]])
        yield counted(f"off by {gap:+d} from the one at {old} on", 2.2, lambda r: r + gap * (r >= old))
        yield counted(f"off by {gap:+d} at {old} from the first", 2, lambda r: r + gap * (r == old))
    if by:
        half = (int(r.max()) + 1) // 2
        if by == -half:
            yield Change("centred", 1, lambda view, segment, axis: (
                view.of(segment, axis) - (int(np.ptp(view.of(segment, axis))) + 1) // 2))  # fmt: skip
    yield Change(f"counted by token{moved}", size, lambda view, segment, axis: (
        view.of(segment, axis)[0] + by + np.arange(segment.length)))  # fmt: skip
    for other in range(len(view.ids)):
        if other != axis:
            yield Change(f"counted by {AXES[other]}{moved}", size, lambda view, segment, axis, other=other: (
                view.of(segment, axis)[0] + by + view.of(segment, other) - view.of(segment, other)[0]))  # fmt: skip
    if segment.grid is not None and np.prod(segment.grid) == len(x):
        yield from _in_grid(segment, x, y)
    if segment.grid is not None and len(view.ids) == 3:
        for order in permutations(range(3)):
            if order != (0, 1, 2):
                said = ", ".join(AXES[i] for i in order)
                yield Change(f"counted in the order {said}{moved}", size, lambda view, segment, axis, order=order: (
                    _read_in(view, segment, axis, order, by)))  # fmt: skip


def _in_grid(segment: Segment, x: np.ndarray, y: np.ndarray) -> Iterator[Change]:
    """One number added in some frames, rows or columns of a grid."""
    differs, gaps = (x != y).reshape(segment.grid), np.unique((y - x)[x != y])
    if len(gaps) != 1:
        return
    places, chosen = [], np.ones((1, 1, 1), bool)
    for axis, name in enumerate(("frame", "row", "column")):
        along = differs.any(tuple(i for i in range(3) if i != axis))
        places += [(axis, span) for span in spans(name, along)[:1]]
        chosen = chosen & along.reshape([-1 if i == axis else 1 for i in range(3)])
    if not places or not np.array_equal(np.broadcast_to(chosen, segment.grid), differs):
        return
    gap = int(gaps[0])

    def call(view: View, segment: Segment, axis: int) -> np.ndarray | None:
        own = view.of(segment, axis)
        if segment.grid is None or np.prod(segment.grid) != len(own):
            return None
        chosen = np.ones(segment.grid, bool)
        for place, span in places:
            chosen &= span.of(segment.grid[place]).reshape([-1 if i == place else 1 for i in range(3)])
        return own + gap * chosen.ravel()

    said = " ".join(f"{span.within} alone" if span.alone else span.within for _, span in places)
    yield Change(f"off by {gap:+d} {said}", 0.9 + sum(span.size for _, span in places), call)


def _read_in(view: View, segment: Segment, axis: int, order: tuple[int, ...], by: int) -> np.ndarray | None:
    if segment.grid is None:
        return None
    own = view.of(segment, axis).astype(np.int64)
    r = own - own[0]
    sides = segment.grid
    if np.prod(sides) != len(r):
        return None
    # Stride of the axis as it is, coordinates as they would follow each other.
    step = int(r.reshape(sides).max()) // max(sides[axis] - 1, 1)
    coordinates = np.indices([sides[i] for i in order]).reshape(3, -1)[np.argsort(order)]
    return own[0] + by + coordinates[axis] * step


def _moduli(x: np.ndarray, y: np.ndarray) -> list[int]:
    differs = x != y
    if not differs.any() or (y < 0).any() or (x < y).any():
        return []
    common = int(np.gcd.reduce((x - y)[differs]))
    # What wraps round once at a number that nobody writes is as well off by that number.
    return [
        m
        for m in dict.fromkeys((int(y.max()) + 1, common))
        if m > 1 and (_cost(m) == 1 or len(np.unique(x[differs] // m)) > 1)
    ]


@cache
def _factors() -> tuple[Fraction, ...]:
    found = {Fraction(p, q) for q in range(1, FINEST + 1) for p in range(1, 4 * FINEST + 1)} - {Fraction(1)}
    return tuple(sorted(found, key=lambda f: (f.denominator, f.numerator)))


def _scaled(x: np.ndarray, y: np.ndarray) -> Iterator[tuple[str, float, Rule]]:
    """Factors, with what is done to what is no integer. What has to be rounded is no law of so few integers that some
    factor is always found for them: it takes more to say."""
    far = int(np.abs(x).argmax())
    if not x[far]:
        return
    slope, slack = y[far] / x[far], 1.01 / abs(x[far])
    for factor in _factors():
        if abs(float(factor) - slope) > slack:
            continue
        p, q = factor.numerator, factor.denominator
        said = f"{p}" if q == 1 else f"{p}/{q}"
        for words, size, rule in (
            ("" if q == 1 else ", rounded down", 0 if p == 1 else FITTED, lambda x, p=p, q=q: x * p // q),
            (", rounded up", FITTED, lambda x, p=p, q=q: -(-x * p // q)),
            (", rounded", FITTED, lambda x, p=p, q=q: np.round(x * (p / q)).astype(np.int64)),
        ):
            if np.array_equal(rule(x), y):
                whole = not (x * p % q).any()
                yield f"{said} times as large{words}", 0 if whole else size, rule
                return
    for k in (2, 3, 4, 8, 14, 16, 28, 32, 64):
        if np.array_equal(x // k * k, y):
            yield f"rounded down to multiples of {k}", 0, lambda x, k=k: x // k * k
            return
