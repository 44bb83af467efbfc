"""Laws of an activation and the product behind it: W (f(gate) * up) + b, or W f(gate) + b where there is no up.

Inputs: gate, up [n, inner], and x = f(gate) * up, which the product is given. Facts: weight [out, inner], bias [out] or
None, activation (f's name, one of curves.FUNCTIONS).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from parity.laws import curves, linear
from parity.laws.base import Component, Law
from parity.laws.curves import FUNCTIONS, Function, Named, Reading
from parity.laws.fit import Fit, checked
from parity.laws.support import names_of, regions_of

Inner = Callable[["Gated"], np.ndarray]


@dataclass(frozen=True)
class Gated:
    """gate, up, x [n, inner] and the function of the gate, in float64; up is 1 where there is none."""

    gate: np.ndarray
    up: np.ndarray
    x: np.ndarray
    f: Function

    @classmethod
    def of(cls, component: Component) -> "Gated | None":
        """What a component's product is given, and what that is of; None where something is not known of it."""
        gate, x = component.inputs.get("gate"), component.inputs.get("x")
        function = FUNCTIONS.get(component.facts.get("activation", ""))
        if gate is None or x is None or function is None or gate.shape != x.shape or len(x) != len(component.own):
            return None
        up = component.inputs.get("up")
        up = np.ones_like(gate) if up is None else up
        if up.shape != gate.shape or not np.isfinite(gate).all() or not np.isfinite(up).all():
            return None
        return cls(*(array.astype(np.float64) for array in (gate, up, x)), function)


def read(component: Component, got: np.ndarray) -> Iterator[Law]:
    """What an activation and the product behind it are instead."""
    yield from checked(component, got, proposed)


def proposed(component: Component, fit: Fit) -> Iterator[Law]:
    """Laws of an activation that may be true, then those of the product behind it."""
    gated, part = Gated.of(component), linear.part_of(component, fit)
    if gated is not None and part is not None:
        for region in regions_of(fit.own, fit.got, fit.slack, names_of(component, linear.AXES)):
            rows, columns = region.indexes(fit.own.shape)
            some = Gated(gated.gate[rows], gated.up[rows], gated.x[rows], gated.f)
            place = np.ix_(rows, columns)
            inside = Fit(fit.own[place], fit.got[place], fit.rounding)
            laws = _of_part(some, part.weight[columns], inside, component)
            yield from (region.law(law, _inside) for law in laws)
    yield from linear.proposed(component, fit)


def _inside(component: Component, found: list[np.ndarray]) -> Component:
    """An activation in some rows and outputs alone."""
    rows, columns = found
    inputs = {name: array[rows] for name, array in component.inputs.items()}
    return replace(component, inputs=inputs, facts={**component.facts, "weight": component.facts["weight"][columns]})


def _law(words: str, size: float, inner: Inner, function: Named | None = None) -> Law:
    """Something else that the product is given, made by another function where there is one."""

    def apply(other: Component) -> np.ndarray | None:
        gated = Gated.of(other)
        if gated is None:
            return None
        return other.own + (inner(gated) - gated.x) @ other.facts["weight"].astype(np.float64).T

    return Law(words, size, apply, function and function.figure, bool(function and function.describes))


def _of_part(gated: Gated, weight: np.ndarray, fit: Fit, component: Component) -> Iterator[Law]:
    if not fit.residual > fit.slack or fit.own.size == 1:
        return
    f, name = gated.f, component.facts["activation"]
    both = component.inputs.get("up") is not None
    gate = "the gate" if both else "x"
    # What is computed of x has to be what it was, whatever was changed in `own`.
    target = fit.got - fit.own + gated.x @ weight.T

    def reading(pre: np.ndarray, times: np.ndarray, of: np.ndarray, base: Function) -> Reading:
        return Reading.of(pre, times, weight, of, fit.slack, base)

    def told(function: Named, subject: str) -> str:
        instead = f" instead of {name}" if function.words.startswith(" passes") else ""
        return f"{subject}{function.words}{instead}"

    identity = FUNCTIONS["nothing"]
    given = reading(gated.gate, gated.up, target, f)
    for function in (*curves.read(given, f, name, gate), *curves.narrowed(given, f)):
        yield _law(told(function, gate), function.size, lambda g, of=function.of: of(g.gate) * g.up, function)
    if not both:
        return
    given = reading(gated.up, f(gated.gate), target, identity)
    for function in (*curves.read(given, identity, "up", "up"), *curves.narrowed(given, identity)):
        words = f"up{function.words}"
        yield _law(words, function.size + 0.1, lambda g, of=function.of: g.f(g.gate) * of(g.up), function)
    for words, inner in _structures(name):
        if fit.left(fit.own + (inner(gated) - gated.x) @ weight.T) <= 0.9 * fit.residual:
            yield _law(words, 1, inner)
    for words, pre, times in (
        ("up, and not the gate,", lambda g: g.up, lambda g: g.gate),
        ("up counts from 1, and the gate", lambda g: g.gate, lambda g: g.up + 1),
        ("the gate, which alone is given on,", lambda g: g.gate, lambda g: np.ones_like(g.gate)),
        ("up, which alone is given on,", lambda g: g.up, lambda g: np.ones_like(g.gate)),
        ("the product of gate and up", lambda g: g.gate * g.up, lambda g: np.ones_like(g.gate)),
    ):
        for function in curves.plain(reading(pre(gated), times(gated), target, f), f):

            def inner(g: Gated, pre: Inner = pre, times: Inner = times, of: Function = function.of) -> np.ndarray:
                return of(pre(g)) * times(g)

            yield _law(f"{words}{function.words}", function.size + 1, inner)


def _structures(name: str) -> Iterator[tuple[str, Inner]]:
    """Other ways to make one of gate and up."""
    yield "the activation is on up instead of the gate", lambda g: g.gate * g.f(g.up)
    yield f"gate and up both pass {name}", lambda g: g.f(g.gate) * g.f(g.up)
    yield "gate and up are added", lambda g: g.f(g.gate) + g.up
    yield "the gate does not multiply", lambda g: g.f(g.gate)
    yield "up passes without its gate", lambda g: g.up
    yield f"the product of gate and up passes {name}", lambda g: g.f(g.gate * g.up)
    yield "the halves of gate and up are exchanged", lambda g: g.f(_halves(g)[0]) * _halves(g)[1]
    yield "gate and up take turns instead of halves", lambda g: g.f(_turns(g)[0]) * _turns(g)[1]


def _halves(gated: Gated) -> tuple[np.ndarray, np.ndarray]:
    """Each of gate and up with its own halves exchanged."""
    half = gated.gate.shape[1] // 2
    return np.roll(gated.gate, half, 1), np.roll(gated.up, half, 1)


def _turns(gated: Gated) -> tuple[np.ndarray, np.ndarray]:
    """Of gate and up behind each other, those at even and those at odd places."""
    joined = np.concatenate([gated.gate, gated.up], 1)
    return joined[:, ::2], joined[:, 1::2]
