"""Laws of any result, whatever computes it: along each axis where it is wrong, and what is done to it there."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice, product

import numpy as np

from parity.laws.base import Component, Curves, Law
from parity.laws.change import of_values, times
from parity.laws.fit import Fit
from parity.laws.mixture import NOISE, relative
from parity.laws.numbers import norm_of, plainest
from parity.laws.reordered import orders
from parity.laws.rounding import formats
from parity.laws.support import Span, beyond, energies, mask, sentence, spans

# What a law may leave of the residual, alone and where another fault may sit on top of it.
LEFT, LEFT_BESIDE = 0.05, 0.8
# The part of a slice's values that has to have one factor.
MOST = 0.6
# No number is read from fewer values.
FEWEST = 4
# From so many values it is read what is done to each; from so many of each slice what is done to that.
SAMPLED, SLICED = 16384, 256
Change = Callable[[np.ndarray], np.ndarray]


def place(component: Component, got: np.ndarray) -> Iterator[Law]:
    """What is done to a part of the result: its smallest support, and a factor, an offset, another order, a dtype."""
    yield from {law.sentence: law for law in _read(component, got)}.values()


def _read(component: Component, got: np.ndarray) -> Iterator[Law]:
    own = component.own
    if not own.size or own.ndim == 0 or len(component.axes) != own.ndim:
        return
    if own.shape != got.shape:
        yield from _ordered(component, got)
        return
    if not np.isfinite(got).all():
        yield from _not_finite(component, got)
        return
    own, got = own.astype(np.float64), got.astype(np.float64)
    residual = got - own
    if not np.isfinite(own).all() or norm_of(residual) <= max(component.rounding, NOISE * norm_of(own)):
        return
    wrong = [beyond(residual, own, axis, relative(component)) for axis in range(own.ndim)]
    # Where no slice stands out of rounding, all of them together may.
    wrong = [each if each.any() else np.ones_like(each) for each in wrong]
    inside = np.ix_(*wrong)
    ways = _ways(component, wrong)
    # Numbers that are names are not counted with.
    alone = component.facts.get("names") is not None
    one, two = _sampled(own[inside], got[inside])
    level = max(relative(component) * norm_of(one), LEFT * norm_of(two - one))
    for says, size, change in () if alone else _changes(Fit(one, two, relative(component) * norm_of(one))):
        if norm_of(two - change(one)) > 1.5 * level:
            continue
        for where in ways:
            law = changed(where, says, size, change)
            if _left(component, got, law) <= max(component.rounding, LEFT * norm_of(residual)):
                yield _plainest(component, got, where, says, size, change)
                alone = True
    for axis in () if alone else range(own.ndim):
        yield from _along(component, own, got, wrong, axis)
    yield from _ordered(component, got, wrong)


def _sampled(own: np.ndarray, got: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values [n] beside each other, SAMPLED of them at most."""
    own, got = own.ravel(), got.ravel()
    if own.size <= SAMPLED:
        return own, got
    places = np.random.default_rng(0).integers(0, own.size, SAMPLED)
    return own[places], got[places]


def changed(
    where: Sequence[Span], says: str, size: float, change: Change, what: str = "the result", moved: bool = False
) -> Law:
    """A law that changes the values of a part by themselves; `moved`: of what a step moves alone."""

    def apply(other: Component) -> np.ndarray | None:
        chosen = mask(where, other.axes, other.own.shape)
        if chosen is None or (moved and "made" not in other.facts):
            return None
        chosen = chosen & np.broadcast_to(other.facts["made"], other.own.shape) if moved else chosen
        with np.errstate(all="ignore"):
            values = np.where(chosen, change(other.own.astype(np.float64)), other.own)
        # What makes no whole numbers of integers is true of few integers by chance.
        whole = other.own.dtype.kind == "f" or np.array_equal(values, np.rint(values))
        return as_own(other, values) if whole else None

    return Law(sentence(where, says, what), size + sum(span.size for span in where), apply)


def _plainest(
    component: Component, got: np.ndarray, where: Sequence[Span], says: str, size: float, change: Change
) -> Law:
    """A law of a part without what it need not say of the part: where the change changes nothing."""
    what = component.facts.get("what", "the result")
    law = changed(where, says, size, change, what)
    allowed = max(component.rounding, 1.001 * _left(component, got, law))
    for span in where:
        fewer = [other for other in where if other is not span]
        wider = changed(fewer, says, size, change, what)
        if _left(component, got, wider) <= allowed:
            where, law = fewer, wider
    if where and "made" in component.facts:
        wider = changed((), says, size, change, f"what is moved of {what}", True)
        law = wider if _left(component, got, wider) <= allowed else law
    return law


def as_own(component: Component, values: np.ndarray) -> np.ndarray:
    """Values in the dtype of a component's own."""
    dtype = component.own.dtype
    return values.astype(dtype) if dtype.kind == "f" else np.rint(values).astype(dtype)


def _ways(component: Component, wrong: Sequence[np.ndarray]) -> list[tuple[Span, ...]]:
    """The ways to say where that is, by which indices along each axis are wrong."""
    options = [spans(name, chosen) or [None] for name, chosen in zip(component.axes, wrong, strict=True)]
    return [tuple(span for span in way if span) for way in islice(product(*options), 4)]


def _changes(part: Fit) -> Iterator[tuple[str, float, Change]]:
    """What may be done to all values of a part, each by itself: what is said of it, its size, the change."""
    if not part.got.any():
        yield times(0), 0.5, np.zeros_like
    elif part.own.size < FEWEST:
        yield from formats()
    else:
        yield from ((change.sentence.strip(), change.size, change.apply) for change in of_values(part))


def _ordered(component: Component, got: np.ndarray, wrong: Sequence[np.ndarray] | None = None) -> Iterator[Law]:
    """A result in another order, also where its first axis is three of a grid."""
    what = f"of {component.facts['what']} " if "what" in component.facts else ""
    for law in orders(component, got, wrong):
        yield replace(law, sentence=f"{what}{law.sentence}")
    laid = _gridded(component)
    if laid is None or component.own.shape != got.shape:
        return
    for law in orders(laid, got.reshape(laid.own.shape)):

        def apply(other: Component, law: Law = law) -> np.ndarray | None:
            given = _gridded(other)
            result = None if given is None else law.apply(given)
            return None if result is None else result.reshape(other.own.shape)

        yield replace(law, sentence=f"{what}{law.sentence}", apply=apply)


def _gridded(component: Component) -> Component | None:
    """A component with the first axis as a grid's three; None where it is none."""
    grid, shape = component.facts.get("grid"), component.own.shape
    if grid is None or len(shape) != 2 or int(np.prod(grid)) != shape[0]:
        return None
    axes = ("frame", "row", "column", component.axes[1])
    return replace(component, own=component.own.reshape(*grid, shape[1]), axes=axes)


def _along(
    component: Component, own: np.ndarray, got: np.ndarray, wrong: Sequence[np.ndarray], axis: int
) -> Iterator[Law]:
    """What is done to some indices along an axis, alike or each in its own way, whatever is wrong elsewhere."""
    count = own.shape[axis]
    if count < 2:
        return
    inside = np.ix_(*(np.ones(count, bool) if i == axis else each for i, each in enumerate(wrong)))
    one, two = own[inside], got[inside]
    others = [np.ones(count, bool) if i == axis else each for i, each in enumerate(wrong)]
    squares, errors = energies(one, axis), energies(two - one, axis)
    first, second = (np.moveaxis(array, axis, 0).reshape(count, -1) for array in (one, two))
    if first.shape[1] > SLICED:
        columns = np.random.default_rng(0).integers(0, first.shape[1], SLICED)
        first, second = first[:, columns], second[:, columns]
    factors, part = _factors(first, second, relative(component))
    # A factor of one value, or of rounding, says nothing; elsewhere in the slice another fault may sit on top.
    fits = wrong[axis] & (squares > 0) & (part >= MOST) & (first.shape[1] >= FEWEST)
    if not fits.any():
        return
    residual = norm_of(got - own)
    for factor, alike in _groups(factors, fits, errors, squares, relative(component)):
        says = times(factor)
        for where in _ways(component, [alike if i == axis else each for i, each in enumerate(others)]):
            change = lambda x, factor=factor: factor * x  # noqa: E731
            law = _plainest(component, got, where, says, 1 if factor else 0.5, change)
            if where and _left(component, got, law) <= LEFT_BESIDE * residual:
                yield law
    if (
        fits.sum() > 2
        and (fits | ~wrong[axis]).all()
        and np.ptp(factors[fits]) > 0.01 * np.abs(factors[fits] - 1).max()
    ):
        yield from _each_its_own(component, got, others, axis, np.where(fits, factors, 1.0))


def _factors(own: np.ndarray, got: np.ndarray, noise: float) -> tuple[np.ndarray, np.ndarray]:
    """The factor of each slice [n, m] that most of its values have, and the part of them that has it."""
    with np.errstate(all="ignore"):
        ratios = np.where(own != 0, got / own, np.nan)
        known = np.isfinite(ratios).any(1)
        factors = np.zeros(len(own))
        factors[known] = np.nanmedian(ratios[known], 1)
    size = np.sqrt((own**2).mean(1, keepdims=True))
    unlike = np.abs(got - factors[:, None] * own)
    # The values that fit tell the factor better than their median.
    alike = unlike <= 4 * noise * (np.abs(got) + 0.1 * size)
    squares = (alike * own * own).sum(1)
    factors = np.divide((alike * own * got).sum(1), squares, out=factors, where=squares > 0)
    return factors, alike.mean(1)


def _groups(
    factors: np.ndarray, fits: np.ndarray, errors: np.ndarray, squares: np.ndarray, noise: float
) -> Iterator[tuple[float, np.ndarray]]:
    """The factors that indices have in common, those that make most of the error first, at most two."""
    rest = fits.copy()
    for _ in range(2):
        if not rest.any():
            return
        worst = int(np.argmax(np.where(rest, errors, -1)))
        alike = rest & (np.abs(factors - factors[worst]) <= np.maximum(8 * noise, 0.02 * abs(factors[worst] - 1)))
        mean = float(np.average(factors[alike], weights=squares[alike]))
        factor = plainest(mean, max(4 * noise / np.sqrt(alike.sum()), 1e-9))[0] if abs(mean) > 4 * noise else 0.0
        if factor != 1:
            yield factor, alike
        rest &= ~alike


def _each_its_own(
    component: Component, got: np.ndarray, others: Sequence[np.ndarray], axis: int, factors: np.ndarray
) -> Iterator[Law]:
    """A factor for each index along an axis."""
    name = component.axes[axis]
    low, high = (plainest(float(f(factors[factors != 1])), 1e-6)[1] for f in (np.min, np.max))

    def apply(other: Component) -> np.ndarray | None:
        if name not in other.axes or other.own.shape[place := other.axes.index(name)] != len(factors):
            return None
        shape = [-1 if i == place else 1 for i in range(other.own.ndim)]
        chosen = mask(where, other.axes, other.own.shape)
        scaled = other.own * factors.reshape(shape)
        return None if chosen is None else as_own(other, np.where(chosen, scaled, other.own))

    for where in _ways(component, others)[:1]:
        within = " ".join(span.within for span in where)
        lines = {"expected": np.ones(len(factors)), "found": factors}
        figure = Curves(f"{name} by {name}", name, "factor", np.arange(len(factors)), lines)
        says = f"{within} each {name} has a factor of its own, {low} to {high}".strip()
        law = Law(says, float((factors != 1).sum()) + 1, apply, figure, True)
        if _left(component, got, law) <= max(component.rounding, LEFT * norm_of(got - component.own)):
            yield law


def _not_finite(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Where alone a result is NaN or infinite."""
    for value, name in ((np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "minus infinite")):
        hit = np.isnan(got) if np.isnan(value) else got == value
        if not hit.any():
            continue
        wrong = [hit.any(tuple(i for i in range(hit.ndim) if i != axis)) for axis in range(hit.ndim)]
        if hit[np.ix_(*wrong)].all():
            for where in _ways(component, wrong):
                yield changed(where, f"is {name}", 0.5, lambda x, value=value: np.full_like(x, value))


def _left(component: Component, got: np.ndarray, law: Law) -> float:
    values = law.apply(component)
    return np.inf if values is None or values.shape != got.shape else norm_of(got - values.astype(np.float64))
