"""Laws of norms: x over a statistic of it over the channels, times a weight; x [n, ..., channels].

Facts: weight [channels], eps (added to the mean square), axis (of the channels, the last where nothing is said).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product

import numpy as np

from parity.laws.base import Component, Curves, Law
from parity.laws.change import changes
from parity.laws.fit import Fit, checked
from parity.laws.numbers import least, told
from parity.laws.rounding import Rounded, bfloat16, formats
from parity.laws.support import plural, regions_of

# Rows that a number is sought with.
SOUGHT = 256
TINY = 1e-30
NOT_DIVIDED = "x is not divided by anything"


@dataclass(frozen=True)
class Norm:
    """x [..., channels], weight [channels] and eps, in float64; `rounded` is done to what is normed, before the weight
    and behind it."""

    x: np.ndarray
    weight: np.ndarray
    eps: float
    rounded: Rounded = np.asarray

    @classmethod
    def of(cls, component: Component) -> "Norm | None":
        """The norm of a component whose channels are last; None where something is not known or of another shape."""
        x, weight = component.inputs.get("x"), component.facts.get("weight")
        if x is None or weight is None or x.shape != component.own.shape or x.shape[-1] != weight.size:
            return None
        if not np.isfinite(x).all():
            return None
        held = all(np.array_equal(bfloat16(array), array) for array in (x, component.own))
        weight, eps = weight.astype(np.float64).ravel(), float(component.facts.get("eps", 0.0))
        return cls(x.astype(np.float64), weight, eps, bfloat16 if held else np.asarray)

    @property
    def square(self) -> np.ndarray:
        """The mean square over the channels, [..., 1]."""
        return np.square(self.x).mean(-1, keepdims=True)

    @property
    def normed(self) -> np.ndarray:
        """What the weight is multiplied with."""
        return _over(self.x, np.sqrt(self.square + self.eps))

    @property
    def result(self) -> np.ndarray:
        """What it should compute."""
        return self.times(self.normed)

    def times(self, normed: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
        """What is normed times the weight or another one."""
        weight = self.weight if weight is None else self.rounded(weight)
        return self.rounded(self.rounded(normed) * weight).astype(np.float64)


Compute = Callable[[Norm], np.ndarray]


def read(component: Component, got: np.ndarray) -> Iterator[Law]:
    """What a norm is instead."""
    yield from checked(component, got, proposed)


def proposed(component: Component, fit: Fit) -> Iterator[Law]:
    """Laws of a norm that may be true; inside, the channels are the last axis."""
    axis = component.facts.get("axis", -1) % fit.own.ndim
    turned = _turned(component, axis)
    own, got = (np.moveaxis(array, axis, -1) for array in (fit.own, fit.got))
    names = _names(own.ndim, axis)
    if len(component.axes) == own.ndim:
        names = (*component.axes[:axis], *component.axes[axis + 1 :], component.axes[axis])
    leading = tuple(range(own.ndim - 1))
    norm = Norm.of(turned)
    for region in regions_of(own, got, fit.slack, names, leading) if norm is not None else ():
        # A wrong statistic shows in all channels, a wrong weight in all rows.
        region = replace(region, parts=(*region.parts[:-1], None))
        place = np.ix_(*region.indexes(own.shape))
        part = Fit(own[place], got[place], fit.rounding)
        for law in _of_part(replace(norm, x=norm.x[place]), part, names):
            yield _turned_back(region.law(law, _inside))
    for change in changes(own, got, fit.slack, names, leading):
        yield _turned_back(change.law("the result", lambda o, c=change: c.apply(o.own)))


def _names(ndim: int, axis: int) -> Sequence[str]:
    """What the axes are called where the channels come last: of rows with heads, or of images."""
    if axis == ndim - 1:
        return ("row", *("head", "part", "piece")[: ndim - 2], "channel")
    return (*("batch", "frame", "image row", "image column")[5 - ndim :], "channel")


def _turned(component: Component, axis: int) -> Component:
    inputs = {
        name: np.moveaxis(array, axis, -1) if array.ndim == component.own.ndim else array
        for name, array in component.inputs.items()
    }
    return replace(component, inputs=inputs, own=np.moveaxis(component.own, axis, -1))


def _turned_back(law: Law) -> Law:
    """A law of arrays whose channels are last, of arrays as they are."""

    def apply(other: Component) -> np.ndarray | None:
        axis = other.facts.get("axis", -1) % other.own.ndim
        result = law.apply(_turned(other, axis))
        return None if result is None else np.moveaxis(result, -1, axis)

    return replace(law, apply=apply)


def _inside(component: Component, found: list[np.ndarray]) -> Component | None:
    """A norm of some of the values alone."""
    x = component.inputs["x"]
    return replace(component, inputs={"x": x[np.ix_(*found)]}) if x.shape == component.own.shape else None


def _law(words: str, size: float, compute: Compute, figure: Curves | None = None) -> Law:
    """A norm that computes something else, as a change of what it should compute."""

    def apply(other: Component) -> np.ndarray | None:
        norm = Norm.of(other)
        result = None if norm is None else compute(norm)
        return None if result is None else other.own + (result - norm.result)

    return Law(words, size, apply, figure)


def _of_part(norm: Norm, fit: Fit, names: Sequence[str]) -> Iterator[Law]:
    if not fit.residual > fit.slack or not norm.weight.any() or len(norm.x) == 0:
        return
    # A change of `own`, which may be changed already.
    fit = Fit(norm.result, fit.got - (fit.own - norm.result), fit.rounding)
    yield from _weights(norm, fit)
    yield from _statistics(norm, fit, names)
    yield from _numbers(norm, fit)
    for words, size, rounded in formats():
        yield _law(f"x {words}", size, lambda n, r=rounded: replace(n, x=r(n.x)).result)


def _weights(norm: Norm, fit: Fit) -> Iterator[Law]:
    """Another weight behind the right statistic."""
    normed, got = (array.reshape(-1, norm.weight.size) for array in (norm.normed, fit.got))
    square = np.square(normed).sum(0)
    if len(normed) < 2 or not square.all():
        return
    found = (normed * got).sum(0) / square
    figure = Curves("The norm's weight", "channel", "weight", np.arange(len(found)),
                    {"expected": norm.weight, "found": found})  # fmt: skip
    for change in changes(norm.weight, found, fit.slack / len(normed) ** 0.5, ("channel",), (), True):
        if change.sentence.endswith("times as large"):
            # Said of the result, whose factor may have a name.
            continue
        words = {" is 1 everywhere": " is missing", " is 1 larger": " counts from 1"}
        law = _law(
            f"the weight{words.get(change.sentence, change.sentence)}",
            change.size,
            lambda n, c=change: None if (w := c.apply(n.weight)) is None else n.times(n.normed, w),
            change.figure or figure,
        )
        yield replace(law, describes=change.describes)
    if len(normed) >= 4:
        law = _law(
            "the weight is another vector",
            float(len(found)),
            lambda n: n.times(n.normed, found) if len(n.weight) == len(found) else None,
            figure,
        )
        yield replace(law, describes=True)


def _statistics(norm: Norm, fit: Fit, names: Sequence[str]) -> Iterator[Law]:
    """Another statistic, of x or of what is left of it without its mean, with the weight or without."""
    figure = _figure(norm, fit)
    ways = ("", lambda w: w), ("the weight is missing", np.ones_like), ("the weight counts from 1", lambda w: w + 1)
    for words, size, divisor in _divisors(norm, names):
        for centred, (weighted, weight) in product((False, True), ways):

            def compute(n: Norm, d=divisor, centred=centred, weight=weight) -> np.ndarray | None:
                y = n.x - n.x.mean(-1, keepdims=True) if centred else n.x
                below = d(y, n.eps)
                return None if below is None else n.times(_over(y, below), weight(n.weight))

            result = compute(norm)
            if result is None or not (square := float(np.vdot(result, result))) or not np.isfinite(square):
                continue
            factor, said = _factor(fit, result, float(np.vdot(result, fit.got)) / square)
            if fit.left(factor * result) > 0.9 * fit.residual:
                continue
            parts = [words, "the mean is subtracted" if centred else "", said, weighted]
            sentence = " and ".join(filter(None, parts))
            if words == NOT_DIVIDED and weighted == ways[1][0] and not centred:
                sentence, size = " and ".join(filter(None, ["the norm is missing", said])), 0
            larger = size + centred + bool(weighted) + 0.9 * bool(said)
            yield _law(sentence, larger, lambda n, c=compute, f=factor: _times(c(n), f), figure)


def _times(result: np.ndarray | None, factor: float) -> np.ndarray | None:
    return None if result is None else factor * result


def _factor(fit: Fit, result: np.ndarray, factor: float) -> tuple[float, str]:
    """A factor of a norm's result, and what is said of it: nothing of 1."""
    channels = result.shape[-1]
    allowed = max(fit.slack, 1.02 * fit.left(factor * result))
    for words, value in (
        ("", 1.0),
        ("the mean is over one channel less", ((channels - 1) / channels) ** 0.5),
        ("the factor sqrt(channels) is missing", channels**-0.5),
        ("there is a factor sqrt(channels)", channels**0.5),
    ):
        if abs(factor / value - 1) < 0.01 and fit.left(value * result) <= allowed:
            return value, words
    factor = fit.snapped(factor, lambda a: a * result)
    return factor, "" if told(factor) == "1" else f"the result is {told(factor)} times as large"


Divisor = Callable[[np.ndarray, float], np.ndarray | None]


def _divisors(norm: Norm, names: Sequence[str]) -> Iterator[tuple[str, float, Divisor]]:
    """What x may be divided by: words, size, and the divisor given x and eps."""
    channels = norm.x.shape[-1]
    yield "", 0, lambda y, eps: np.sqrt(np.square(y).mean(-1, keepdims=True) + eps)
    yield NOT_DIVIDED, 1, lambda y, eps: np.ones_like(y[..., :1])
    yield "x is divided by its mean absolute value", 1, lambda y, eps: np.abs(y).mean(-1, keepdims=True)
    yield "x is divided by its largest absolute value", 1, lambda y, eps: np.abs(y).max(-1, keepdims=True)
    yield "x is divided by its mean square", 1, lambda y, eps: np.square(y).mean(-1, keepdims=True) + eps
    yield "x is divided by its deviation", 1, lambda y, eps: np.sqrt(y.var(-1, keepdims=True) + eps)
    axes = [i for i, length in enumerate(norm.x.shape) if length > 1]
    for count in range(1, len(axes) + 1):
        for chosen in combinations(axes, count):
            if chosen != (norm.x.ndim - 1,):
                said = " and ".join(plural(names[i]) for i in chosen)
                yield f"the mean is over {said}", 1, lambda y, eps, a=chosen: np.sqrt(
                    np.square(y).mean(a, keepdims=True) + eps
                ) if max(a) < y.ndim else None  # fmt: skip
    for size in (size for size in range(2, channels // 2 + 1) if channels % size == 0):
        yield f"groups of {size} channels are normed by themselves", 1, lambda y, eps, s=size: (
            _grouped(y, eps, s) if y.shape[-1] % s == 0 else None
        )  # fmt: skip
    for count in {channels // 4, channels // 2, 3 * channels // 4} - {0}:
        for words, part in ((f"first {count}", slice(count)), (f"last {count}", slice(-count, None))):
            yield f"the mean is over the {words} channels", 2, lambda y, eps, p=part: np.sqrt(
                np.square(y[..., p]).mean(-1, keepdims=True) + eps
            )  # fmt: skip


def _grouped(y: np.ndarray, eps: float, size: int) -> np.ndarray:
    parts = np.square(y).reshape(*y.shape[:-1], -1, size).mean(-1)
    return np.sqrt(np.repeat(parts, size, -1) + eps)


def _numbers(norm: Norm, fit: Fit) -> Iterator[Law]:
    """Norms with one number that is another: eps and where it is added, bounds, powers."""
    x, got = (array.reshape(-1, norm.weight.size) for array in (norm.x, fit.got))
    rows = np.unique(np.linspace(0, len(x) - 1, SOUGHT).astype(int))
    small = Fit(fit.own.reshape(x.shape)[rows], got[rows], fit.rounding * (len(rows) / len(x)) ** 0.5)
    # What is rounded is no smooth function of a number.
    sought, figure = replace(norm, x=x[rows], rounded=np.asarray), _figure(norm, fit)
    typical = float(np.median(norm.square)) + TINY
    scales = np.concatenate([[0.0], typical * np.geomspace(1e-9, 1e3, 60)])
    families: Sequence[tuple[Callable[[float], str], Callable[[Norm, float], np.ndarray], np.ndarray]] = (
        (lambda p: f"eps is {told(p)} instead of {told(norm.eps)}",
         lambda n, p: _divided(n, np.sqrt(n.square + p)), scales),
        (lambda p: f"eps {told(p)} is added to the root", lambda n, p: _divided(n, np.sqrt(n.square) + p), scales),
        (lambda p: f"the mean square is at least {told(p)}",
         lambda n, p: _divided(n, np.sqrt(np.maximum(n.square, p))), scales),
        (lambda p: f"the mean square is at most {told(p)}",
         lambda n, p: _divided(n, np.sqrt(np.minimum(n.square, p))), scales),
        (lambda p: f"the power is {told(-p)} instead of -1/2", lambda n, p: _divided(n, (n.square + n.eps) ** p),
         np.linspace(0.05, 2, 40)),
        (lambda p: f"the mean is that of |x| to the power {told(p)}",
         lambda n, p: _divided(n, (np.abs(n.x) ** p).mean(-1, keepdims=True) ** (1 / p)), np.linspace(0.2, 8, 40)),
        (lambda p: f"{told(p)} times the mean is subtracted first",
         lambda n, p: replace(n, x=n.x - p * n.x.mean(-1, keepdims=True)).result, np.linspace(-2, 2, 17)),
        (lambda p: f"x is clamped to [{told(-p)}, {told(p)}]", lambda n, p: replace(n, x=np.clip(n.x, -p, p)).result,
         float(np.abs(x).max()) * np.geomspace(0.01, 1, 30)),
    )  # fmt: skip
    for words, compute, grid in families:
        best = least(lambda p, c=compute: small.left(c(sought, p)), grid)
        best = small.snapped(best, lambda p, c=compute: c(sought, p))
        if small.left(compute(sought, best)) <= 0.9 * small.residual:
            yield _law(words(best), 1.2, lambda n, c=compute, p=best: c(n, p), figure)
        if small.holds(compute(sought, best)):
            continue

        def scaled(p: float, c=compute) -> np.ndarray:
            result = c(sought, p)
            return result * (np.vdot(result, small.got) / (np.vdot(result, result) + TINY))

        best = least(lambda p, s=scaled: small.left(s(p)), grid)
        if small.holds(scaled(best)):
            best = small.snapped(best, scaled)
            result = compute(sought, best)
            factor, said = _factor(small, result, float(np.vdot(result, small.got) / (np.vdot(result, result) + TINY)))
            if said:
                sentence = f"{words(best)} and {said}"
                yield _law(sentence, 2.2, lambda n, c=compute, p=best, f=factor: f * c(n, p), figure)


def _divided(norm: Norm, below: np.ndarray) -> np.ndarray:
    return norm.times(_over(norm.x, below))


def _figure(norm: Norm, fit: Fit) -> Curves:
    """By what each row was multiplied, over its root mean square."""
    expected, got = (array.reshape(-1, norm.weight.size) for array in (norm.x * norm.weight, fit.got))
    lengths = np.sqrt(norm.square).ravel()
    order = np.argsort(lengths)[:: max(len(lengths) // 200, 1)]
    found = (expected * got).sum(-1) / (np.square(expected).sum(-1) + TINY)
    lines = {"expected": _over(np.ones_like(lengths), np.sqrt(lengths**2 + norm.eps))[order], "found": found[order]}
    return Curves("By what each row is multiplied", "root mean square", "factor", lengths[order], lines)


def _over(x: np.ndarray, below: np.ndarray) -> np.ndarray:
    return x / np.where(below == 0, TINY, below)
