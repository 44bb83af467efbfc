"""Laws of sums: a part for each input, of one shape, added up; and of anything of which only the result is known.

Facts: terms (the inputs that should be added, once), axes (what the axes are called).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.change import changes
from parity.laws.fit import Fit, checked
from parity.laws.numbers import told
from parity.laws.support import names_of, regions_of

AXES = ("row", "channel")
WHOLE = 1e-5


def read(component: Component, got: np.ndarray) -> Iterator[Law]:
    """What a sum adds instead."""
    yield from checked(component, got, proposed)


def proposed(component: Component, fit: Fit) -> Iterator[Law]:
    """Laws of a sum that may be true."""
    terms, axes = component.facts.get("terms", ()), names_of(component, component.facts.get("axes", AXES))
    if len(axes) != fit.own.ndim:
        return
    parts = {
        name: array.astype(np.float64)
        for name, array in component.inputs.items()
        if array.shape == fit.own.shape and np.isfinite(array).all() and array.any()
    }
    for region in regions_of(fit.own, fit.got, fit.slack, axes) if parts else ():
        place = np.ix_(*region.indexes(fit.own.shape))
        inside = Fit(fit.own[place], fit.got[place], fit.rounding)
        for law in _of_part({name: array[place] for name, array in parts.items()}, terms, inside):
            yield region.law(law, _inside)
    for name, array in parts.items():
        # One of the parts is changed before it is added.
        if name in terms:
            for change in changes(array, array + fit.got - fit.own, fit.slack, axes):

                def apply(other: Component, name: str = name, change=change) -> np.ndarray | None:
                    part = other.inputs.get(name)
                    changed = None if part is None else change.apply(part.astype(np.float64))
                    return None if changed is None else other.own + (changed - part)

                yield change.law(name, apply, 0.1)
    for change in changes(fit.own, fit.got, fit.slack, axes):
        yield change.law("the result", lambda o, c=change: c.apply(o.own), 0.2)


def _inside(component: Component, found: list[np.ndarray]) -> Component:
    """A sum of some of the values alone."""
    shape, place = component.own.shape, np.ix_(*found)
    inputs = {name: array[place] for name, array in component.inputs.items() if array.shape == shape}
    return replace(component, inputs=inputs)


def _of_part(parts: Mapping[str, np.ndarray], terms: Sequence[str], fit: Fit) -> Iterator[Law]:
    """One, two or all of the parts are added another number of times."""
    if not fit.residual > fit.slack or fit.own.size == 1:
        return
    off = (fit.got - fit.own).ravel()
    names = list(parts)
    for chosen in (*([name] for name in names), *([a, b] for i, a in enumerate(names) for b in names[:i]), names):
        if chosen is names and len(names) < 3:
            continue
        design = np.stack([parts[name].ravel() for name in chosen], -1)
        if len(design) < 2 * len(chosen) or np.linalg.matrix_rank(design) < len(chosen):
            continue
        numbers = np.linalg.lstsq(design, off, rcond=None)[0]
        if fit.left(fit.own + (design @ numbers).reshape(fit.own.shape)) > 0.9 * fit.residual:
            continue
        for i, name in enumerate(chosen):
            once = float(name in terms)
            others = fit.own + (design @ np.where(np.arange(len(chosen)) == i, 0, numbers)).reshape(fit.own.shape)
            number = fit.snapped(float(numbers[i]) + once, lambda a, o=others, p=parts[name], c=once: o + (a - c) * p)
            # What is that near to a whole number was not written otherwise.
            numbers[i] = (round(number) if abs(number - round(number)) < WHOLE else number) - once
        yield _weighted({name: float(number) for name, number in zip(chosen, numbers, strict=True) if number}, terms)


def _weighted(numbers: Mapping[str, float], terms: Sequence[str]) -> Law:
    def apply(other: Component) -> np.ndarray | None:
        if any(name not in other.inputs or other.inputs[name].shape != other.own.shape for name in numbers):
            return None
        return other.own + sum(number * other.inputs[name].astype(np.float64) for name, number in numbers.items())

    said = [_said(name, float(name in terms) + number, name in terms) for name, number in numbers.items()]
    return Law(", and ".join(said) or "nothing is added", float(len(said)), apply)


def _said(name: str, number: float, term: bool = True) -> str:
    if not number:
        return f"{name} is not added"
    if number == -1 and not term:
        # What is no term by itself can be a part of one.
        return f"{name} is left out of it"
    words = {1.0: " too", 2.0: " twice", -1.0: " with the other sign"}
    return f"{name} is {'added' if number != -1 else 'taken'}{words.get(number, f' {told(number)} times')}"
