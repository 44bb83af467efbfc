"""Functions of one value, read through what they are multiplied with: target = weight (f(pre) * times)."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from parity.laws.base import Curves
from parity.laws.fit import LEAVES
from parity.laws.numbers import least, snapped, told
from parity.laws.rounding import formats, grids

Function = Callable[[np.ndarray], np.ndarray]

# Rows and outputs that a function is read from, and the places between which it is drawn straight.
ROWS, OUTPUTS, KNOTS = 192, 32, 28
# The part that the best drawing may leave for a function of one number to be sought.
WORTH = 0.4


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
    """A function with its words, which continue the name of what it is of, and how many numbers they hold.

    `describes` as of a Law.
    """

    words: str
    size: float
    of: Function
    figure: Curves | None = None
    describes: bool = False


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
    found = list(plain(reading, base))
    drawing = None if found else drawn(reading, base, expected, of)
    if not found and (drawing is None or drawing[1] <= WORTH):
        found = list(numbered(reading, base))
    for function in found:
        with np.errstate(all="ignore"):
            lines = {f"expected: {expected}": base(x), "found": function.of(x)}
        yield replace(function, figure=Curves(f"The function of {of}", of, "value", x, lines))
    if not found and drawing is not None and drawing[0] <= 1:
        yield drawing[2]


def narrowed(reading: Reading, base: Function, widths: Sequence[int] = ()) -> Iterator[Named]:
    """Ways to round what a function is of: to formats, and to the grids of rows of a width."""
    for words, size, rounded in (*formats(), *(grid for width in widths for grid in grids(width))):
        if reading.left(lambda x, rounded=rounded: base(rounded(x))) <= reading.allowed:
            yield Named(f" {words}", size + 0.1, lambda x, rounded=rounded: base(rounded(x)))


def plain(reading: Reading, base: Function) -> Iterator[Named]:
    """Functions that have a name, by themselves or times a factor."""
    for name, function in FUNCTIONS.items():
        result = reading.result(function)
        square = float(np.vdot(result, result))
        if function is base or not square or not np.isfinite(square):
            continue
        if reading.left(function) <= reading.allowed:
            yield Named(f" passes {name}" if name != "nothing" else " is not activated", 1, function)
        elif scaled := _with(
            lambda x, p, f=function: p * f(x), float(np.vdot(result, reading.target)) / square, reading
        ):
            yield Named(f" passes {told(scaled[0])} times {name}", 2, scaled[1])


def numbered(reading: Reading, base: Function) -> Iterator[Named]:
    """Functions with one number, and what one number does to `base`."""
    for words, function, grid in _families(base, float(np.abs(reading.pre).max()) or 1.0):
        best = _searched(reading, function, grid)
        found = None if best is None else _with(function, best, reading)
        if found and (found[0] or grid[0] < 0):
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
    if lefts[best] > 0.6 * max(lefts):
        return None
    return least(lambda p: reading.left(lambda x: function(x, p)), grid[max(best - 1, 0) : best + 2])


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


def drawn(reading: Reading, base: Function, expected: str, of: str) -> tuple[float, float, Named] | None:
    """Any function, read from one half of the rows: `base` and what is straight between some places.

    Before it, by how much more than a law may it leaves in the other half, and the part that the best of all leaves.
    None where there is too little to read it from.
    """
    equations = len(reading.pre) // 2 * len(reading.weight)
    count = min(KNOTS, equations // 6)
    if count < 6:
        return None
    values = np.sort(reading.pre.ravel())
    places = np.quantile(values, np.linspace(0, 1, count))
    places = np.unique(np.concatenate([places, np.linspace(values[0], values[-1], count // 2)]))
    if len(places) < 4:
        return None
    hats = [np.interp(reading.pre, places, hat) * reading.times for hat in np.eye(len(places))]
    design = np.stack([hat @ reading.weight.T for hat in hats], -1)
    off = reading.target - reading.result(base)
    # What is hardly seen stays as it should be.
    held = 1e-4 * float(np.sqrt(np.mean(design**2))) * np.eye(len(places))

    def solved(rows: slice) -> np.ndarray:
        equations = np.concatenate([design[rows].reshape(-1, len(places)), held])
        return np.linalg.lstsq(equations, np.append(off[rows].ravel(), np.zeros(len(places))), rcond=None)[0]

    tested = float(np.linalg.norm(design[1::2] @ solved(slice(0, None, 2)) - off[1::2]))
    allowed = max(reading.slack, 2 * LEAVES * float(np.linalg.norm(off[1::2]))) or 1.0
    by = solved(slice(None))
    left = max(float(np.linalg.norm(design @ by - off)) - reading.slack, 0.0) / (reading.before or 1.0)
    lines = {f"expected: {expected}": base(places), "found": base(places) + by}
    figure = Curves(f"The function of {of}", of, "value", places, lines)
    size = float(len(places))
    function = Named(" passes another function", size, lambda x: base(x) + np.interp(x, places, by), figure, True)
    return tested / allowed, left, function
