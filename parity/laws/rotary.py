"""Laws of a rotation by position: x [n, heads, d], pairs (x_i, x_{i + d/2}) turned by position times frequency.

The angle of every pair is read from x and the result, over all heads; then what made it is told.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np

from parity.laws.angles import Read, read_positions, read_speeds
from parity.laws.base import Component, Curves, Law
from parity.laws.numbers import least, listed, snapped, told
from parity.laws.positions import told_positions
from parity.laws.rounding import rounded_to
from parity.laws.support import Span, affected, span_of, spans
from parity.laws.turning import (
    Change,
    Turn,
    applied,
    as_pairs,
    beside,
    read_at,
    turn_of,
    turned_in_part,
    unrounded,
    with_theta,
)

# What a law may leave of the residual, beneath another; how many are told.
LEFT_BENEATH, TOLD = 0.5, 3
# Of orders in which sections follow axes so many are tried; those that are likely are held against what was computed.
MOST_ORDERS, LIKELY = 64, 6
# So many times as fast as it should no frequency turns by a mistake that can be read.
FASTEST = 64


def rotary(component: Component, got: np.ndarray) -> Iterator[Law]:
    """What turns by other angles, other positions, with other signs or in another precision, and where."""
    turn = turn_of(component)
    if turn is None or got.shape != component.own.shape or not np.isfinite(got).all():
        return
    difference = as_pairs(got.astype(np.float64) - component.own)
    residual = float(np.linalg.norm(difference))
    if residual <= max(component.rounding, 1e-7 * float(np.linalg.norm(turn.z))):
        return
    target = as_pairs(got - beside(component, turn))
    rows, heads, pairs = (affected(difference, axis, component.rounding) for axis in range(3))
    # A table that is made anew is rounded anew.
    rounding = max(component.rounding, 3e-7 * float(np.linalg.norm(target)))
    fit = _Fit(turn, target, rows, heads, pairs, 2 * rounding, component.facts.get("axis_names", "0123"))
    if precise := unrounded(component, got, turn, fit.enough):
        yield precise
        return
    read: list[tuple[float, Law]] = []
    for make in (_signs, _tables, _speeds, _positions, _partly):
        read += [law for found in make(fit) if (law := fit.law(*found)) is not None]
        if any(left <= min(fit.enough, LEFT_BENEATH * residual) for left, _ in read):
            break
    read.sort(key=lambda item: (0, item[1].size) if item[0] <= fit.enough else (1, item[0]))
    told_once = {law.sentence: law for left, law in reversed(read) if left <= LEFT_BENEATH * residual}
    yield from list(told_once.values())[: -TOLD - 1 : -1]


Found = tuple[str, float, Change, Curves | None]


@dataclass(frozen=True)
class _Fit:
    """What is read from: the target [n, heads, f], where it differs along each axis, and what is rounding."""

    turn: Turn
    target: np.ndarray
    rows: np.ndarray
    heads: np.ndarray
    pairs: np.ndarray
    enough: float
    names: str

    def left(self, change: Change) -> float:
        new = change(self.turn)
        return (
            float("inf") if new is None else float(np.linalg.norm((new - self.target)[:, self.heads][:, :, self.pairs]))
        )

    def number(self, value: float, change: Callable[[float], Change], spread: float) -> float:
        """The number near a value that a change fits best with, as people write it."""
        span = spread * max(abs(value), 0.02)
        for _ in range(4):
            tried = value + span * np.linspace(-1, 1, 9)
            value = float(min(tried, key=lambda number: self.left(change(number))))
            span /= 4
        least = self.left(change(value))
        return snapped(value, lambda number: self.left(change(number)) <= max(0.5 * self.enough, 1.05 * least))

    def law(self, sentence: str, size: float, change: Change, figure: Curves | None) -> tuple[float, Law] | None:
        """A change as a law where it holds: everywhere, or only where something differs; and what it leaves."""
        best: tuple[float, Law] | None = None
        for held, words in self._supports():
            if 2 in held and sentence.startswith("theta"):
                # All frequencies are made of it.
                continue
            limited = _restricted(change, held, self.target.shape)
            new = limited(self.turn)
            if new is None:
                return None
            left = float(np.linalg.norm(new - self.target))
            if best is None or left < 0.5 * best[0]:
                says = f"{sentence}, {words}" if words else sentence
                best = left, Law(says, size + len(held), applied(limited), figure)
            if left <= self.enough:
                break
        return best

    def _supports(self) -> Iterator[tuple[dict[int, Span], str]]:
        yield {}, ""
        sides = {1: ("head", self.heads), 2: ("frequency", self.pairs), 0: ("token", self.rows)}
        if self.pairs.sum() > 1 and (slow := span_of("frequency", np.maximum.accumulate(self.pairs))):
            # Those that hardly turn hardly show it.
            yield {2: slow}, slow.told
        limited = {axis: span for axis, side in sides.items() if (span := span_of(*side))}
        for axis, span in limited.items():
            yield {axis: span}, span.told
        if len(limited) > 1:
            yield limited, ", ".join(span.told for span in limited.values())

    def angles(self) -> Read:
        """The table that the target was turned by, over the heads that differ, and how much it weighs [n, f]."""
        z, target = self.turn.z[:, self.heads], self.target[:, self.heads]
        weight = np.square(np.abs(z)).sum(1)
        return Read((target * z.conj()).sum(1) / np.maximum(weight, 1e-30), weight)


def _restricted(change: Change, held: dict[int, Span], shape: tuple[int, ...]) -> Change:
    def restricted(turn: Turn) -> np.ndarray | None:
        new = change(turn)
        if new is None or not held:
            return new
        where = np.ones(new.shape, bool)
        for axis, span in held.items():
            if axis and shape[axis] != new.shape[axis]:
                return None
            where &= span.of(new.shape[axis]).reshape([-1 if i == axis else 1 for i in range(3)])
        return np.where(where, new, turn.turned)

    return restricted


_TERMS = ("cosine of the first half", "sine of the first half", "cosine of the second half", "sine of the second half")


def _signs(fit: _Fit) -> Iterator[Found]:
    """Factors of the four products of a rotation: signs, what is left out, what counts twice."""
    turn, inside = fit.turn, np.ix_(fit.rows, fit.heads, fit.pairs)
    z, target = turn.z[inside], fit.target[inside]
    table = turn.table[np.ix_(fit.rows, fit.pairs)][:, None]
    terms = (table.real * z.real, -table.imag * z.imag, table.real * z.imag, table.imag * z.real)
    factors = []
    for pair, goal in ((terms[:2], target.real), (terms[2:], target.imag)):
        columns = np.stack([term.ravel() for term in pair], 1)
        solved = np.linalg.lstsq(columns, goal.ravel(), rcond=1e-9)[0]
        factors += [snapped(value, lambda number, value=value: abs(number - value) < 0.005) for value in solved]
    changed = [place for place, factor in enumerate(factors) if abs(factor - 1) > 1e-3]
    # Factors of all are no matter of the rotation, those of the sines alone one of the angles.
    if not changed or len(set(factors)) == 1 or (changed == [1, 3] and factors[1] == factors[3] != -1):
        return

    def change(turn: Turn) -> np.ndarray:
        with_cosines, with_sines = turn.parts(turn.table)
        first = factors[0] * with_cosines.real - factors[1] * with_sines.imag
        return first + 1j * (factors[2] * with_cosines.imag + factors[3] * with_sines.real)

    if factors == [1, -1, 1, -1]:
        yield "the rotation goes the other way", 1, change, None
        return
    says = {-1.0: "has the wrong sign", 0.0: "is missing"}
    words = [f"the {_TERMS[i]} {says.get(factors[i], f'counts {told(factors[i])} times')}" for i in changed]
    yield " and ".join(words), len(changed), change, None


def _tables(fit: _Fit) -> Iterator[Found]:
    """The same angles in another precision."""
    for dtype in ("bfloat16", "float16"):
        yield (
            f"cosines and sines are {dtype}",
            1,
            lambda turn, dtype=dtype: turn.times(rounded_to(dtype, turn.table)),
            None,
        )
        yield (
            f"angles are {dtype}",
            1,
            lambda turn, dtype=dtype: (
                None if turn.positions is None else turn.by(rounded_to(dtype, turn.positions * turn.frequencies))
            ),
            None,
        )
        yield (
            f"frequencies are {dtype}",
            1,
            lambda turn, dtype=dtype: (
                None if turn.positions is None else turn.by(turn.positions * rounded_to(dtype, turn.frequencies))
            ),
            None,
        )


def _speeds(fit: _Fit) -> Iterator[Found]:
    """Other frequencies: all in one ratio, of another theta, or some of them; of another axis; from an offset."""
    turn = fit.turn
    if turn.positions is None:
        return
    read, half, own = fit.angles(), len(turn.frequencies), turn.frequencies
    yield from _axes(fit, read)
    speeds = read_speeds(read, turn.positions, own)
    figure = Curves("Frequencies", "pair", "radians a position", np.arange(half), {"expected": own, "found": speeds})
    exponents = turn.exponents
    slow = fit.pairs & (exponents >= min(0.5, exponents[fit.pairs].max()))

    def scaled(ratio: float) -> Change:
        return lambda turn: None if turn.positions is None else turn.by(ratio * turn.positions * turn.frequencies)

    ratio = fit.number(float(np.median((speeds / own)[slow])), scaled, 0.05)
    yield f"angles are {told(ratio)} times as large" if ratio else "nothing is turned", 1, scaled(ratio), figure
    rising = slow & (speeds > 0) & (exponents > 0)
    if rising.any():
        power = fit.number(float(np.median(-np.log(speeds[rising]) / exponents[rising])), with_theta, 0.01)
        theta = snapped(np.exp(power), lambda number: number > 1 and (
            fit.left(with_theta(np.log(number))) <= max(0.5 * fit.enough, 1.05 * fit.left(with_theta(power)))
        ))  # fmt: skip
        yield f"theta is {told(theta)}", 1, with_theta(np.log(theta)), figure
    yield from _some(fit, read, speeds, figure)


def _axes(fit: _Fit, read: Read) -> Iterator[Found]:
    """Other axes of the positions with the same frequencies."""
    turn = fit.turn
    weighted = read.weight * read.table
    scores = np.stack([(weighted * np.exp(-1j * ids[:, None] * turn.frequencies)).real.sum(0) for ids in turn.ids])
    own = scores[turn.axes, np.arange(len(turn.axes))]
    order = np.where(scores.max(0) > own + 1e-9 * read.weight.sum(0), scores.argmax(0), turn.axes)
    if not np.any(order != turn.axes):
        return
    sections = np.unique(turn.axes)
    orders = {tuple(order)}
    if len(sections) > 1 and len(turn.ids) ** len(sections) <= MOST_ORDERS:
        # Whole sections are what one exchanges; frequencies too slow to tell an axis tell nothing by themselves.
        by_section = [np.array(each)[np.searchsorted(sections, turn.axes)]
                      for each in product(range(len(turn.ids)), repeat=len(sections))]  # fmt: skip
        places = np.arange(len(turn.axes))
        by_section.sort(key=lambda order: -scores[order, places].sum())
        orders |= {tuple(order) for order in by_section[:LIKELY] if np.any(order != turn.axes)}
    for order in orders:
        yield _following(fit, np.array(order))


def _following(fit: _Fit, order: np.ndarray) -> Found:
    def follow(turn: Turn) -> np.ndarray | None:
        if turn.ids is None or len(turn.axes) != len(order):
            return None
        return turn.by(turn.ids[order].T * turn.frequencies)

    words, size = _followed(fit.names, fit.turn.axes, order)
    sections = {axis: set(order[fit.turn.axes == axis]) for axis in np.unique(fit.turn.axes)}
    if all(len(others) == 1 for others in sections.values()) and len(np.unique(order)) == len(sections):
        # Another order of the axes is one choice, and a likelier one than an axis that is left out.
        size = 0.9
    return words, size, follow, None


def _followed(names: str, axes: np.ndarray, order: np.ndarray) -> tuple[str, int]:
    """Which frequencies follow another axis, by their axes or by themselves, and how many choices that takes."""
    moved, sections = order != axes, {axis: np.unique(order[axes == axis]) for axis in np.unique(axes[order != axes])}
    if len(np.unique(order)) == 1:
        return f"all frequencies follow {names[order[0]]}", 1
    if all(len(others) == 1 for others in sections.values()):
        words = [f"of {names[axis]} follow {names[others[0]]}" for axis, others in sections.items()]
        return f"the frequencies {listed([words[0], *(f'those {said}' for said in words[1:])])}", len(words)
    words = [f"{_of(moved & (order == axis))} {_verb(moved & (order == axis), 'follow')} {names[axis]}"
             for axis in np.unique(order[moved])]  # fmt: skip
    return listed(words), len(words)


def _some(fit: _Fit, read: Read, speeds: np.ndarray, figure: Curves) -> Iterator[Found]:
    """Some frequencies by themselves are others."""
    turn, own = fit.turn, fit.turn.frequencies
    allowed = 0.25 * fit.enough**2 / len(own)
    # What is left by numbers that are not known better.
    more = 1 + min(0.1, 8 / turn.z[:, :, 0].size)

    def left(i: int, ratio: float) -> float:
        angles = ratio * own[i] * turn.positions[:, i]
        return float((read.weight[:, i] * np.square(np.abs(read.table[:, i] - np.exp(1j * angles)))).sum())

    factors = np.ones(len(own))
    for i in np.flatnonzero(fit.pairs):
        value = float(speeds[i] / own[i])
        best = left(i, value)
        if left(i, 1.0) > max(allowed, more * best):
            factors[i] = snapped(value, lambda number, i=i, best=best: left(i, number) <= max(allowed, more * best))
    for start in np.flatnonzero(factors != 1):
        # Of those that hardly turn each by itself says little of how fast.
        slow, each = range(start, len(own)), sum(left(i, factors[i]) for i in range(start, len(own)))

        def together(ratio: float, slow: range = slow) -> float:
            return sum(left(i, ratio) for i in slow)

        ratio = least(together, np.linspace(0, 2, 41))
        enough = max(allowed * len(slow), more * each)
        if len(slow) > 1 and together(ratio) <= enough:
            factors[start:] = snapped(ratio, lambda number, of=together, most=enough: of(number) <= most)
            break
    changed = factors != 1
    if not changed.any() or len(np.unique(factors[changed])) > max(len(own) // 2, 1) or np.abs(factors).max() > FASTEST:
        return
    says = {0.0: "{} not turn", -1.0: "{} the other way"}
    words = []
    for factor in np.unique(factors[changed]):
        which = changed & (factors == factor)
        verb = _verb(which, "do" if factor == 0 else "turn")
        words.append(f"{_of(which)} " + says.get(factor, f"{{}} {told(factor)} times as fast").format(verb))

    def turned(turn: Turn) -> np.ndarray | None:
        if turn.positions is None or len(turn.frequencies) != len(factors):
            return None
        return np.where(changed, turn.by(turn.positions * turn.frequencies * factors), turn.turned)

    yield listed(words), 2 * len(words) - 1, turned, figure


def _of(chosen: np.ndarray) -> str:
    return "all frequencies" if chosen.all() else spans("frequency", chosen)[0].those


def _verb(chosen: np.ndarray, verb: str) -> str:
    return verb if chosen.sum() > 1 else {"do": "does"}.get(verb, f"{verb}s")


def _positions(fit: _Fit) -> Iterator[Found]:
    """Other positions: all axes alike, or one of them."""
    turn = fit.turn
    if turn.positions is None:
        return
    axes, read = np.unique(turn.axes), fit.angles()
    alike = all(np.array_equal(turn.ids[axis], turn.ids[axes[0]]) for axis in axes)
    # What is read of one axis may be true of all; where all hold the same, all frequencies tell it.
    for axis in axes[:1] if alike else axes:
        of = np.ones(len(turn.axes), bool) if alike else turn.axes == axis
        if not fit.pairs[of].any():
            continue
        ids = turn.ids[axis]
        found = read_positions(Read(read.table[:, of], read.weight[:, of]), ids, turn.frequencies[of])
        figure = Curves("Positions", "row", "position", np.arange(len(ids)), {"expected": ids, "found": found})
        for words, size, change in told_positions(ids, found):
            yield words, size, read_at(change, axes), figure
            if not alike:
                yield f"{fit.names[axis]} {words}", size + 1, read_at(change, [axis]), figure
    if alike and len(axes) > 1:
        for axis in axes:
            of = turn.axes == axis
            found = read_positions(Read(read.table[:, of], read.weight[:, of]), turn.ids[axis], turn.frequencies[of])
            for words, size, change in told_positions(turn.ids[axis], found):
                yield f"{fit.names[axis]} {words}", size + 1, read_at(change, [axis]), None


def _partly(fit: _Fit) -> Iterator[Found]:
    """Only some channels of a head are turned, in pairs of their own."""
    d = 2 * fit.turn.z.shape[-1]
    for size in sorted({d // 4, d // 2, 3 * d // 4} - {0, d}):
        for start, words in ((0, f"the first {size}"), (d - size, f"the last {size}")):
            for own in (True, False):
                says = f"only {words} channels of a head are turned" + (
                    "" if own else ", with frequencies of their own"
                )
                yield says, 2, turned_in_part(start, size - size % 2, own), None
