"""Functions of one value, read through what they are multiplied with: target = weight (f(pre) * times)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parity.laws.base import Curves
from parity.laws.fit import LEAVES
from parity.laws.numbers import snapped, told
from parity.laws.rounding import formats, grids

Function = Callable[[np.ndarray], np.ndarray]

# Rows and outputs that a function is read from, and the places between which it is drawn straight.
ROWS, OUTPUTS, KNOTS = 192, 24, 24


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x))."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def gelu(x: np.ndarray) -> np.ndarray:
    """x times the normal distribution's integral up to x."""
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def _erf(x: np.ndarray) -> np.ndarray:
    """The error function, from a table of the exact one."""
    return np.interp(x, _PLACES, _ERF)


_PLACES = np.linspace(-6, 6, 24001)
_ERF = np.array([math.erf(place) for place in _PLACES])

FUNCTIONS: Mapping[str, Function] = {
    "SiLU": lambda x: x * sigmoid(x),
    "GELU": gelu,
    "tanh GELU": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "quick GELU": lambda x: x * sigmoid(1.702 * x),
    "ReLU": lambda x: np.maximum(x, 0),
    "ReLU squared": lambda x: np.maximum(x, 0) ** 2,
    "sigmoid": sigmoid,
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(x, 0),
    "Mish": lambda x: x * np.tanh(np.logaddexp(x, 0)),
    "hard swish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
    "nothing": lambda x: x,
    "a square": np.square,
    "the absolute value": np.abs,
    "ELU": lambda x: np.where(x > 0, x, np.expm1(np.minimum(x, 0))),
}


@dataclass(frozen=True)
class Named:
    """A function with its words, which continue the name of what it is of, and how many numbers they hold."""

    words: str
    size: float
    of: Function
    figure: Curves | None = None


@dataclass(frozen=True)
class Reading:
    """What a function is read from: pre, times [n, inner], weight [out, inner], target [n, out], what may be left."""

    pre: np.ndarray
    times: np.ndarray
    weight: np.ndarray
    target: np.ndarray
    slack: float
    before: float

    @classmethod
    def of(
        cls, pre: np.ndarray, times: np.ndarray, weight: np.ndarray, target: np.ndarray, slack: float, base: Function
    ) -> "Reading":
        """A reading of some rows and of mixtures of the outputs; `base` is the function that should be."""
        rows = np.unique(np.linspace(0, len(pre) - 1, ROWS).astype(int))
        share = len(rows) / len(pre)
        pre, times, target = pre[rows], times[rows], target[rows]
        if len(weight) > OUTPUTS:
            mixed = np.random.default_rng(0).standard_normal((len(weight), OUTPUTS)) / OUTPUTS**0.5
            weight, target = mixed.T @ weight, target @ mixed
        before = float(np.linalg.norm((base(pre) * times) @ weight.T - target))
        return cls(pre, times, weight, target, 1.5 * slack * share**0.5, before)

    @property
    def allowed(self) -> float:
        """What a function that is true leaves."""
        return max(self.slack, LEAVES * self.before)

    def result(self, function: Function) -> np.ndarray:
        """What comes out with a function."""
        with np.errstate(all="ignore"):
            return (function(self.pre) * self.times) @ self.weight.T

    def left(self, function: Function) -> float:
        """How far off that is."""
        left = float(np.linalg.norm(self.result(function) - self.target))
        return left if math.isfinite(left) else math.inf


def read(reading: Reading, base: Function, expected: str, of: str) -> Iterator[Named]:
    """Functions under which it comes out as it did, with a drawing; any function only where none has a name."""
    x = np.linspace(float(reading.pre.min()), float(reading.pre.max()), 100)
    found = False
    for function in named(reading, base):
        found = True
        with np.errstate(all="ignore"):
            lines = {f"expected: {expected}": base(x), "found": function.of(x)}
        yield replace(function, figure=Curves(f"The function of {of}", of, "value", x, lines))
    if not found and (function := drawn(reading, base, expected, of)):
        yield function


def narrowed(reading: Reading, base: Function) -> Iterator[Named]:
    """Ways to round what a function is of."""
    for words, size, rounded in (*formats(), *grids(reading.pre.shape[1])):
        if reading.left(lambda x, rounded=rounded: base(rounded(x))) <= reading.allowed:
            yield Named(f" {words}", size + 0.1, lambda x, rounded=rounded: base(rounded(x)))


def named(reading: Reading, base: Function) -> Iterator[Named]:
    """Functions that have a name, and those that do something to `base`."""
    for name, function in FUNCTIONS.items():
        result = reading.result(function)
        square = float(np.vdot(result, result))
        if reading.left(function) <= reading.allowed:
            yield Named(f" passes {name}", 1, function)
        elif square and np.isfinite(square):
            factor = float(np.vdot(result, reading.target)) / square
            scaled = _with(lambda x, p, f=function: p * f(x), factor, reading)
            if scaled:
                yield Named(f" passes {told(scaled[0])} times {name}", 2, scaled[1])
    spread = float(np.abs(reading.pre).max()) or 1.0
    for words, function, grid in _families(base, spread):
        best = _searched(reading, function, grid)
        found = None if best is None else _with(function, best, reading)
        if found:
            yield Named(words(found[0]), 1.5, found[1])


Family = tuple[Callable[[float], str], Callable[[np.ndarray, float], np.ndarray], np.ndarray]


def _families(base: Function, spread: float) -> Sequence[Family]:
    """Functions with one number, and where the number is sought."""
    wide = np.geomspace(spread / 500, spread, 28)
    both = np.concatenate([-wide[::-1], wide])
    slopes = np.concatenate([-np.geomspace(0.01, 2, 12)[::-1], np.geomspace(0.01, 2, 12)])
    betas = np.geomspace(0.1, 10, 24)
    return (
        (lambda p: f" is clamped to [{told(-p)}, {told(p)}]", lambda x, p: base(np.clip(x, -abs(p), abs(p))), wide),
        (lambda p: f" is at most {told(p)}", lambda x, p: base(np.minimum(x, p)), both),
        (lambda p: f" is at least {told(p)}", lambda x, p: base(np.maximum(x, p)), both),
        (lambda p: f" is {told(abs(p))} {'larger' if p > 0 else 'smaller'}", lambda x, p: base(x + p), both),
        (lambda p: f" is {told(p)} times as large", lambda x, p: base(p * x), np.concatenate([-betas[::-1], betas])),
        (lambda p: f" is capped by {told(p)} tanh(x / {told(p)})", lambda x, p: base(p * np.tanh(x / p)), 4 * wide),
        (lambda p: f" passes SiLU with beta {told(p)}", lambda x, p: x * sigmoid(p * x), betas),
        (lambda p: f" passes a leaky ReLU of slope {told(p)}", lambda x, p: np.where(x > 0, x, p * x), slopes),
        (
            lambda p: f" passes an ELU with alpha {told(p)}",
            lambda x, p: np.where(x > 0, x, p * np.expm1(np.minimum(x, 0))),
            np.geomspace(0.1, 4, 16),
        ),
        (lambda p: f" passes a softplus with beta {told(p)}", lambda x, p: np.logaddexp(p * x, 0) / p, betas),
        (lambda p: f"'s activation is at most {told(p)}", lambda x, p: np.minimum(base(x), p), wide),
        (lambda p: f"'s activation is at least {told(p)}", lambda x, p: np.maximum(base(x), p), both),
        (lambda p: f"'s activation is {told(p)} too large", lambda x, p: base(x) + p, both),
    )


def _searched(reading: Reading, function: Callable, grid: np.ndarray) -> float | None:
    """The number that leaves least: the best of a grid, closed in on; None where that would not do by far."""
    small = Reading(*(array[::3] for array in (reading.pre, reading.times)), reading.weight, reading.target[::3], 0, 0)
    lefts = [small.left(lambda x, p=p: function(x, p)) for p in grid]
    best = int(np.argmin(lefts))
    if lefts[best] > 0.7 * small.left(lambda x: function(x, grid[0])) and lefts[best] > 0.7 * reading.before:
        return None
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    golden = (math.sqrt(5) - 1) / 2
    a, b = high - golden * (high - low), low + golden * (high - low)
    at_a, at_b = (reading.left(lambda x, p=p: function(x, p)) for p in (a, b))
    for _ in range(36):
        if at_a < at_b:
            high, b, at_b = b, a, at_a
            a = high - golden * (high - low)
            at_a = reading.left(lambda x: function(x, a))
        else:
            low, a, at_a = a, b, at_b
            b = low + golden * (high - low)
            at_b = reading.left(lambda x: function(x, b))
    return (low + high) / 2


def _with(
    function: Callable[[np.ndarray, float], np.ndarray], number: float, reading: Reading
) -> tuple[float, Function] | None:
    """A function with a number as it is written; None where it does not come out so."""
    left = reading.left(lambda x: function(x, number))
    if left > reading.allowed:
        return None
    allowed = max(reading.slack, 1.02 * left)
    number = snapped(number, lambda written: reading.left(lambda x: function(x, written)) <= allowed)
    return number, lambda x: function(x, number)


def drawn(reading: Reading, base: Function, expected: str, of: str) -> Named | None:
    """Any function: straight between some places, read from one half of the rows and right in the other."""
    values = np.sort(reading.pre.ravel())
    places = np.unique(np.quantile(values, np.linspace(0, 1, KNOTS)))
    places = np.unique(np.concatenate([places, np.linspace(values[0], values[-1], KNOTS // 2)]))
    equations = len(reading.pre) // 2 * len(reading.weight)
    if len(places) < 4 or equations < 3 * len(places):
        return None
    hats = [np.interp(reading.pre, places, np.eye(len(places))[k]) * reading.times for k in range(len(places))]
    design = np.stack([hat @ reading.weight.T for hat in hats], -1)
    scale = np.sqrt(np.mean(design**2)) or 1.0
    # What is hardly seen stays near what it should be.
    held = 1e-4 * scale * np.eye(len(places))
    mine = base(places)

    def solved(rows: slice) -> np.ndarray:
        a, b = design[rows].reshape(-1, len(places)), reading.target[rows].reshape(-1)
        return (
            mine + np.linalg.lstsq(np.concatenate([a, held]), np.append(b - a @ mine, np.zeros(len(places))), None)[0]
        )

    first = solved(slice(0, None, 2))
    tested = np.linalg.norm(design[1::2] @ first - reading.target[1::2])
    before = np.linalg.norm(design[1::2] @ mine - reading.target[1::2])
    if tested > max(reading.slack, 2 * LEAVES * before):
        return None
    found = solved(slice(None))
    # Beyond the straight pieces, what they leave of the function that should be is kept.
    off = found - mine
    figure = Curves(f"The function of {of}", of, "value", places, {f"expected: {expected}": mine, "found": found})
    return Named(" passes another function", float(len(places)), lambda x: base(x) + np.interp(x, places, off), figure)
