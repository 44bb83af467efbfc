"""Laws of a flow sampler: the Euler step, its times, its noise, and what else is a sum of known arrays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.mixture import Where, comparable, enough, mixed, put, rounded_as, spelled, summed, where
from parity.laws.numbers import plainest

Interval = Callable[[np.ndarray, int], float]
"""The length of a step, of t at every boundary and the step's number."""


def _at(times: np.ndarray, step: int) -> float:
    step = min(max(step, 0), len(times) - 2)
    return float(times[step] - times[step + 1])


def _even(times: np.ndarray, step: int) -> float:
    return 1 / (len(times) - 1)


INTERVALS: dict[str, Interval] = {
    "is as long as the one after it should be": lambda times, step: _at(times, step + 1),
    "is as long as the one before it should be": lambda times, step: _at(times, step - 1),
    "is as long as the first one": lambda times, step: _at(times, 0),
    "is as long as the last one": lambda times, step: _at(times, len(times) - 2),
    "is as long as the one at the same distance from the end": lambda times, step: _at(times, len(times) - 2 - step),
    "is 1 / steps long": _even,
    "is 1 / (steps + 1) long": lambda times, step: 1 / len(times),
    "is 1 / (steps - 1) long": lambda times, step: 1 / max(len(times) - 2, 1),
    "is t long: it goes to the data at once": lambda times, step: float(times[step]),
    "is as long as its end's t": lambda times, step: float(times[step + 1]),
    "is as long as two steps": lambda times, step: float(times[step] - times[min(step + 2, len(times) - 1)]),
    "is t - 1/steps long": lambda times, step: float(times[step]) - _even(times, step),
    "is squared": lambda times, step: _at(times, step) ** 2,
    "is a thousandth of the first t long": lambda times, step: 0.001,
    "is divided by t": lambda times, step: _at(times, step) / max(float(times[step]), 1e-9),
    "is multiplied by t": lambda times, step: _at(times, step) * float(times[step]),
    "is multiplied by its end's t": lambda times, step: _at(times, step) * float(times[step + 1]),
    "is multiplied by 1 - t": lambda times, step: _at(times, step) * (1 - float(times[step])),
}


def _step_of(component: Component) -> tuple[np.ndarray, int] | None:
    times, step = component.facts.get("times"), component.facts.get("step")
    if times is None or step is None or not 0 <= step < len(times) - 1:
        return None
    return np.asarray(times, np.float64), int(step)


def euler(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Inputs x_t and velocity (0 where there is none), others that may mix in; facts times, step, made, grid.

    Own is x_t less the interval times the velocity in the rows `made` (booleans that broadcast), x_t in the others.
    """
    known = _step_of(component)
    if not comparable(component, got) or known is None or "velocity" not in component.inputs:
        return
    times, step = known
    interval = _at(times, step)
    if not interval:
        return
    terms = {name: array.astype(np.float64) for name, array in component.inputs.items()}
    made = np.broadcast_to(component.facts["made"], got.shape)
    for part in _parts_of_step(component, got, made):
        chosen = part.mask(component)
        if chosen is None or not chosen.any():
            continue
        inside = {name: term[chosen] for name, term in terms.items()}
        for factors, off in mixed(got[chosen].astype(np.float64), inside, component.rounding, most=3):
            for law in _steps(part, factors, off, times, step):
                if enough(component, got, law.apply(component)):
                    yield law


@dataclass(frozen=True)
class _Rows(Where):
    """The rows that a step moves, or those that it leaves as they are."""

    moved: bool = True

    def says(self, words: str) -> str:
        return ("" if self.moved else "in what is given ") + words

    def mask(self, component: Component) -> np.ndarray | None:
        made = np.broadcast_to(component.facts["made"], component.own.shape)
        return made if self.moved else ~made


def _parts_of_step(component: Component, got: np.ndarray, made: np.ndarray) -> list[Where]:
    differs = np.abs(got.astype(np.float64) - component.own) > 0
    rows: list[Where] = [_Rows()]
    if not made.all() and differs[~made].any():
        rows = [_Rows(moved=False), Where()] if not differs[made].any() else [Where(), _Rows()]
    others = [part for part in where(component, got)[1:] if not np.array_equal(part.mask(component), made)]
    return [*rows, *others]


def _steps(
    part: Where, factors: dict[str, float], off: dict[str, float], times: np.ndarray, step: int
) -> Iterator[Law]:
    """What a step's sum may be said to be."""
    right, found = _at(times, step), -factors.get("velocity", 0.0)
    rest = {name: factor for name, factor in factors.items() if name != "velocity"}
    alone = set(rest) == {"x_t"} and abs(rest["x_t"] - 1) <= off["x_t"]
    if alone and "velocity" not in factors:
        yield _stepped(part, lambda times, step: 0.0, part.says("the Euler step moves nothing"), 0.5)
        return
    if alone:
        near = max(off["velocity"], 2e-6 * abs(right))
        for words, interval in INTERVALS.items():
            if abs(interval(times, step) - found) <= near and abs(interval(times, step) - right) > near:
                yield _stepped(part, interval, part.says(f"the Euler step {words}"), 1)
        times_as_long, said = plainest(found / right, near / abs(right))
        words, size = f"the Euler step is {said} times as long", 1.5
        if times_as_long in (1, -1):
            words, size = (
                ("the Euler step moves it too" if times_as_long > 0 else "the Euler step goes the other way"),
                0.5,
            )
        yield _stepped(part, lambda times, step: times_as_long * _at(times, step), part.says(words), size)
        if abs(right) > near:
            length, said = plainest(found, near)
            yield _stepped(part, lambda times, step: length, part.says(f"the Euler step is {said} long"), 2)
        return
    # What is moved along counts in intervals, what is mixed in does not.
    unit = {name: abs(right) if "velocity" in name else 1.0 for name in factors}
    named = {name: f"dt {name}" if "velocity" in name else name for name in factors}
    words, plain = spelled(
        {named[name]: factor / unit[name] for name, factor in factors.items()},
        {named[name]: value / unit[name] for name, value in off.items()},
    )
    plain = {name: plain[named[name]] for name in factors}

    def apply(other: Component) -> np.ndarray | None:
        known = _step_of(other)
        if known is None:
            return None
        own = {name: value * (abs(_at(*known)) if "velocity" in name else 1) for name, value in plain.items()}
        return put(other.own, part.mask(other), summed(own, other.inputs))

    yield Law(part.says(f"the Euler step makes {words}"), 1 + len(plain) + part.size, apply)


def _stepped(part: Where, interval: Interval, words: str, size: float) -> Law:
    def apply(other: Component) -> np.ndarray | None:
        known = _step_of(other)
        if known is None or not {"x_t", "velocity"} <= set(other.inputs):
            return None
        by = rounded_as(other.own, interval(*known) * other.inputs["velocity"])
        moved = other.inputs["x_t"].astype(np.float64) - by
        return put(other.own, part.mask(other), moved)

    return Law(words, size + part.size, apply)


def sum_of_parts(component: Component, got: np.ndarray) -> Iterator[Law]:
    """A result that is another sum of the inputs and of itself, somewhere or everywhere.

    facts what: what the result is called.
    """
    if not comparable(component, got):
        return
    what = component.facts.get("what", "the result")

    def terms_of(other: Component) -> dict[str, np.ndarray]:
        inputs = {name: a.astype(np.float64) for name, a in other.inputs.items() if a.shape == other.own.shape}
        return {what: other.own.astype(np.float64), **inputs, "1": np.ones(other.own.shape)}

    terms, seen = terms_of(component), set()
    for part in where(component, got):
        chosen = part.mask(component)
        if chosen is None or not chosen.any():
            continue
        if not got[chosen].any():
            zero = Law(part.says(f"{what} is 0"), 0.5 + part.size, lambda other, part=part: put(
                other.own, part.mask(other), np.zeros(1)))  # fmt: skip
            yield zero
            continue
        for words, change in ANEW.items():
            law = Law(part.says(f"{what} {words}"), 1 + part.size, lambda other, part=part, change=change: _anew(
                other, part, change))  # fmt: skip
            if enough(component, got, law.apply(component)):
                yield law
                seen.add("")
        if "" in seen:
            return
        inside = {name: term[chosen] for name, term in terms.items()}
        for factors, off in mixed(got[chosen].astype(np.float64), inside, component.rounding, most=3):
            words, plain = spelled(factors, off)
            # What is already a sum of the others says nothing in a sum with them.
            if words in seen or (set(plain) - {what, "1"} and plain.get(what, 1) != 1):
                continue

            def apply(other: Component, part: Where = part, plain: dict[str, float] = plain) -> np.ndarray | None:
                return put(other.own, part.mask(other), summed(plain, terms_of(other)))

            law = Law(part.says(f"{what} is {_words(words, what, plain)}"), len(plain) + part.size, apply)
            if enough(component, got, law.apply(component)):
                seen.add(words)
                yield law


ANEW: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "is brought to mean 0 and deviation 1": lambda x: (x - x.mean()) / x.std(),
    "is brought to mean 0": lambda x: x - x.mean(),
    "is brought to deviation 1": lambda x: x / x.std(),
    "is brought to a mean square of 1": lambda x: x / np.sqrt(np.mean(x * x)),
}
"""What numbers are made by that all values have a part in."""


def _anew(other: Component, part: Where, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray | None:
    chosen = part.mask(other)
    if chosen is None or not chosen.any():
        return None
    values = other.own.astype(np.float64)
    values[chosen] = change(values[chosen])
    return put(other.own, chosen, values)


def _words(words: str, what: str, plain: dict[str, float]) -> str:
    if set(plain) == {what}:
        return f"{plainest(plain[what], 0)[1]} times as large" if plain[what] != -1 else "negated"
    if set(plain) == {what, "1"} and plain[what] == 1:
        return f"off by {plainest(plain['1'], 0)[1]}"
    return words.replace(" 1", "").strip() if words.endswith(" 1") and set(plain) == {"1"} else words
