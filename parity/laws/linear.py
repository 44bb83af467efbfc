"""Laws of a product with a weight: x [n, in] -> x W^T + b [n, out]."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from parity.laws import curves, order
from parity.laws.base import Component, Curves, Law
from parity.laws.change import Change, changes, times
from parity.laws.fit import Fit, checked
from parity.laws.numbers import told
from parity.laws.rounding import by_rows, formats, grids
from parity.laws.support import names_of, regions_of
from parity.laws.weight import WHOLE, factors

AXES = ("row", "channel")
# Outputs that ways to change the weight are first tried on, and the most inputs whose gains are read.
TRIED, INPUTS = 48, 512
# Rows that ways to change the weight, and orders of the inputs, are tried on.
ROWS, SOME = 512, 48


@dataclass(frozen=True)
class Part:
    """Some rows and some outputs of a product: what the laws below are read from."""

    x: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    fit: Fit

    @cached_property
    def off(self) -> np.ndarray:
        """By how much the result is off, [n, out]."""
        return self.fit.got - self.fit.own

    @cached_property
    def product(self) -> np.ndarray:
        """The result without its bias."""
        return self.fit.own if self.bias is None else self.fit.own - self.bias


def read(component: Component, got: np.ndarray) -> Iterator[Law]:
    """What a product is instead."""
    yield from checked(component, got, proposed)


def proposed(component: Component, fit: Fit) -> Iterator[Law]:
    """Laws of a product that may be true."""
    for change in changes(fit.own, fit.got, fit.slack, names_of(component, (*AXES, "axis 2"))):
        yield change.law("the result", _on_own(change))
    whole = part_of(component, fit)
    if whole is None:
        return
    for region in regions_of(fit.own, fit.got, fit.slack, names_of(component, AXES)):
        rows, columns = region.indexes(fit.own.shape)
        bias = None if whole.bias is None else whole.bias[columns]
        own, there = (array[np.ix_(rows, columns)] for array in (fit.own, fit.got))
        part = Part(whole.x[rows], whole.weight[columns], bias, Fit(own, there, fit.rounding))
        yield from (region.law(law, _inside) for law in _of_part(part))


def part_of(component: Component, fit: Fit) -> Part | None:
    """All of a product in float64; None where something is not known of it or of another shape."""
    x, weight, bias = component.inputs.get("x"), component.facts.get("weight"), component.facts.get("bias")
    if x is None or weight is None or x.ndim != 2 or fit.own.shape != (len(x), len(weight)):
        return None
    if x.shape[1] != weight.shape[1] or not np.isfinite(x).all():
        return None
    bias = None if bias is None else bias.astype(np.float64)
    return Part(x.astype(np.float64), weight.astype(np.float64), bias, fit)


def _on_own(change: Change):
    return lambda other: change.apply(other.own)


def _inside(component: Component, found: list[np.ndarray]) -> Component | None:
    """A product of some rows and outputs alone."""
    (rows, columns), x, bias = found, component.inputs.get("x"), component.facts.get("bias")
    if x is None or x.ndim != 2:
        return None
    facts = {"weight": component.facts["weight"][columns], "bias": None if bias is None else bias[columns]}
    return replace(component, inputs={"x": x[rows]}, facts=facts)


def _of_part(part: Part) -> Iterator[Law]:
    if not part.fit.residual > part.fit.slack or part.off.size == 1:
        return
    yield from _biases(part)
    yield from _weights(part)
    yield from _inputs(part)
    yield from _columns(part)
    yield from _matrices(part)


def _biases(part: Part) -> Iterator[Law]:
    """Another bias, or none; the product alone times a factor."""
    bias = part.bias
    vector = part.off.mean(0)
    steady = len(part.off) > 1 and part.fit.holds(part.fit.own + vector)
    if bias is not None and bias.any():
        square = float(np.vdot(part.product, part.product)) or 1.0
        factor = float(np.vdot(part.product, part.fit.got - bias)) / square
        factor = part.fit.snapped(factor, lambda a: a * part.product + bias)
        yield Law(f"the product {times(factor)}, but not the bias", 1.2, _scaled(factor))
        rounding = part.fit.slack / len(part.off) ** 0.5
        for change in changes(bias, bias + vector, rounding, ("channel",), (), True):
            words = {" is 0": " is missing"}.get(change.sentence, change.sentence)
            yield replace(change, sentence=words).law("the bias", _rebiased(change))
    if steady and len(vector) > 1:
        words = "the bias is another vector" if bias is not None else "a vector is added as a bias"
        anew = partial(_if_alike, vector=vector)
        yield Law(words, float(len(vector)), anew, describes=bias is not None)


def _if_alike(other: Component, vector: np.ndarray) -> np.ndarray | None:
    return other.own + vector if other.own.shape[-1] == len(vector) else None


def _scaled(factor: float):
    def apply(other: Component) -> np.ndarray:
        bias = other.facts.get("bias")
        bias = 0.0 if bias is None else bias.astype(np.float64)
        return factor * (other.own - bias) + bias

    return apply


def _rebiased(change: Change):
    def apply(other: Component) -> np.ndarray | None:
        bias = other.facts.get("bias")
        if bias is None:
            return None
        bias = bias.astype(np.float64)
        changed = change.apply(bias)
        return None if changed is None else other.own + (changed - bias)

    return apply


def reweighted(change: Change):
    """What a product is with another weight."""

    def apply(other: Component) -> np.ndarray | None:
        weight = other.facts["weight"].astype(np.float64)
        changed = change.apply(weight)
        if changed is None or changed.shape != weight.shape:
            return None
        return other.own + other.inputs["x"].astype(np.float64) @ (changed - weight).T

    return apply


def _weights(part: Part) -> Iterator[Law]:
    """Ways to change the weight that need nothing read."""
    weight = part.weight
    some = np.unique(np.linspace(0, len(weight) - 1, TRIED).astype(int))
    fit = Fit(part.fit.own[:, some], part.fit.got[:, some], part.fit.rounding)
    rows = slice(None) if len(part.x) <= ROWS else slice(None, None, -(-len(part.x) // ROWS))
    x, fit = part.x[rows], Fit(fit.own[rows], fit.got[rows], part.fit.rounding)
    ways = [Change(" is transposed in memory", 1.5, lambda w: w.T.reshape(w.shape))]
    if weight.shape[0] == weight.shape[1]:
        ways.append(Change(" is transposed", 1, np.transpose))
    for words, size, how in (*formats(), *grids(weight.shape[1])):
        if by_rows(words):
            if fit.holds(fit.own + x @ (how(weight[some]) - weight[some]).T):
                yield Law(f"the weight {words}", size, reweighted(Change("", size, how)))
        elif weight.size <= WHOLE:
            ways.append(Change(f" {words}", size, how))
    for change in ways:
        if fit.holds(fit.own + x @ (change.apply(weight)[some] - weight[some]).T):
            yield change.law("the weight", reweighted(change))
    yield from _orders(part, fit, some)


def _orders(part: Part, fit: Fit, some: np.ndarray) -> Iterator[Law]:
    """The inputs in another order that can be said; first tried on a mixture of outputs."""
    width = part.weight.shape[1]
    mixed = np.random.default_rng(0).standard_normal((len(some), 4)) / 2
    rows = slice(None, None, max(len(part.x) // SOME, 1))
    x, weight, target = part.x[rows], part.weight[some].T @ mixed, part.off[rows][:, some] @ mixed
    room = max(2 * fit.slack, 0.1 * float(np.linalg.norm(target)))
    for found in order.known(width):
        taken = found.of(width)
        if np.linalg.norm((x[:, taken] - x) @ weight - target) <= room:
            yield Law(f"the input's {found.of_axis('channel')}", found.size, reweighted(_taken(np.argsort(taken))))


def _taken(columns: np.ndarray) -> Change:
    return Change("", 0, lambda weight: weight[:, columns] if weight.shape[1] == len(columns) else None)


def _inputs(part: Part) -> Iterator[Law]:
    """Another function of each input value: bounds, fewer bits, an activation."""
    bias = 0.0 if part.bias is None else part.bias
    ones = np.ones_like(part.x)
    identity = curves.FUNCTIONS["nothing"]
    reading = curves.Reading.of(part.x, ones, part.weight, part.fit.got - bias, part.fit.slack, identity)
    for function in (
        *curves.read(reading, identity, "x", "the input"),
        *curves.narrowed(reading, identity, (part.x.shape[1],)),
    ):

        def apply(other: Component, of: curves.Function = function.of) -> np.ndarray:
            x = other.inputs["x"].astype(np.float64)
            return other.own + (of(x) - x) @ other.facts["weight"].astype(np.float64).T

        words = f"the input{function.words}"
        yield Law(words, function.size + 0.1, apply, function.figure, function.describes)


def _columns(part: Part) -> Iterator[Law]:
    """Each input channel times a factor; or one whose weights are others."""
    x, weight, width = part.x, part.weight, part.weight.shape[1]
    rows = np.unique(np.linspace(0, len(x) - 1, 96).astype(int))
    outputs = np.unique(np.linspace(0, len(weight) - 1, 32).astype(int))
    if width <= INPUTS and len(rows) * len(outputs) >= 2 * width and x[rows].any() and weight[outputs].any():
        design = (x[rows][:, None] * weight[outputs][None]).reshape(-1, width)
        target = part.off[np.ix_(rows, outputs)].ravel()
        gram = design.T @ design
        gram += 1e-10 * np.trace(gram) / width * np.eye(width)
        inverse = np.linalg.inv(gram)
        gains = inverse @ (design.T @ target)
        left = float(np.linalg.norm(design @ gains - target))
        if left <= max(part.fit.slack, 0.5 * float(np.linalg.norm(target))):
            noise = max(left, part.fit.slack / part.off.size**0.5) / len(target) ** 0.5
            yield from _gains(1 + gains, noise * np.sqrt(np.diag(inverse)))
    nearest = np.abs(x.T @ part.off).sum(1) / np.maximum(np.linalg.norm(x, axis=0), 1e-30)
    j = int(nearest.argmax())
    square = float(np.vdot(x[:, j], x[:, j]))
    if len(x) > 2 and square:
        vector = part.off.T @ x[:, j] / square
        noise = part.fit.slack / square**0.5
        for change in changes(weight[:, j], weight[:, j] + vector, noise, ("output",), (), True):
            change = replace(change, apply=_in_column(change, j))
            yield change.law(f"the weight of input {j}", reweighted(change), 1)


def _in_column(change: Change, j: int):
    def apply(weight: np.ndarray) -> np.ndarray | None:
        column = change.apply(weight[:, j]) if j < weight.shape[1] else None
        if column is None:
            return None
        weight = weight.copy()
        weight[:, j] = column
        return weight

    return apply


def _gains(gains: np.ndarray, noise: np.ndarray) -> Iterator[Law]:
    """Inputs that count more or less than they should; each is told to its own `noise`, that of small inputs badly."""
    width, whole = len(gains), float(np.linalg.norm(noise))
    alike = 1 + (gains - 1) * whole / (width**0.5 * noise)
    for region in regions_of(np.ones(width), alike, whole, ("channel",), ()):
        (place,) = region.indexes(gains.shape)
        fit = Fit(np.ones(len(place)), gains[place], whole)
        factor = fit.snapped(float(gains[place].mean()), lambda a, unit=fit.own: a * unit)
        vector = np.ones(width)
        vector[place] = factor
        words = "is left out" if not factor else f"is {told(factor)} times as large"
        yield Law(f"the input {words}{region.words}", 1.1 + region.size, reweighted(_times(vector)))
    figure = Curves("What each input counts", "channel", "factor", np.arange(width), {"found": gains})
    words = f"each input channel is times another factor, from {told(gains.min())} to {told(gains.max())}"
    yield Law(words, float(width), reweighted(_times(gains)), figure, True)


def _times(vector: np.ndarray) -> Change:
    return Change("", 0, lambda weight: weight * vector if weight.shape[1] == len(vector) else None)


def _matrices(part: Part) -> Iterator[Law]:
    """A matrix that is added to the weight: one of low rank, or any where the rows suffice to read it."""
    x, width = part.x, part.x.shape[1]
    found = factors(part.off, part.fit.slack)
    if found is not None:
        left, right = found
        inner = np.linalg.lstsq(x, left, rcond=1e-9)[0]
        size = float(inner.size + right.size)

        def apply(other: Component) -> np.ndarray | None:
            given = other.inputs["x"]
            # With fewer rows than inputs the matrix is known for these rows alone.
            if given.shape[1:] != x.shape[1:] or (len(x) < width and not np.array_equal(given, x)):
                return None
            return other.own + given @ inner @ right if other.own.shape[1] == right.shape[1] else None

        yield Law(f"the weight differs by a matrix of rank {len(right)}", size, apply)
    if width > INPUTS or len(x) < 2 * width + 2:
        return
    half = np.linalg.lstsq(x[::2], part.off[::2], rcond=None)[0]
    tested = Fit(part.fit.own[1::2], part.fit.got[1::2], part.fit.rounding)
    if not tested.holds(tested.own + x[1::2] @ half):
        return
    added = np.linalg.lstsq(x, part.off, rcond=None)[0].T
    noise = part.fit.slack * float(np.sqrt(np.square(np.linalg.pinv(x)).sum() / len(x)))
    for change in changes(part.weight, part.weight + added, noise, ("output", "input"), (), True):
        yield change.law("the weight", reweighted(change))
    anew = Change("", 0, lambda w: w + added if w.shape == added.shape else None)
    yield Law("the weight is another matrix", float(added.size), reweighted(anew), describes=True)
