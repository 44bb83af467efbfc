"""Holding what may be true against what was computed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.numbers import snapped

# The part of the residual that a law may leave; one that leaves more, but less than HALF, may be one of two faults.
LEAVES, HALF = 0.05, 0.5
# Float32 holds a value to half of this part of it.
RESOLUTION = 1.2e-7
# How many parts of the residual are yielded, and of how many numbers at most, where nothing is the whole of it.
PARTS, PART_SIZE = 4, 8


@dataclass(frozen=True)
class Fit:
    """An array as it should be, as it was computed, and the norm of what rounding may do."""

    own: np.ndarray
    got: np.ndarray
    rounding: float = 0.0

    @cached_property
    def slack(self) -> float:
        """What may be left by rounding."""
        return max(self.rounding, RESOLUTION * float(np.linalg.norm(self.got)))

    @cached_property
    def residual(self) -> float:
        """How far what was computed is from what should have been."""
        return self.left(self.own)

    def left(self, predicted: np.ndarray) -> float:
        """How far what was computed is from a prediction; infinite where that is none."""
        if predicted is None or predicted.shape != self.got.shape:
            return np.inf
        left = float(np.linalg.norm(self.got - predicted))
        return left if np.isfinite(left) else np.inf

    def holds(self, predicted: np.ndarray) -> bool:
        """Whether a prediction leaves rounding, or next to nothing of the residual."""
        return self.left(predicted) <= max(self.slack, LEAVES * self.residual)

    def snapped(self, value: float, predict: Callable[[float], np.ndarray]) -> float:
        """The simplest number near one that predicts as well as that, but for rounding."""
        with np.errstate(all="ignore"):
            # Nothing is said by a number with which nothing is changed.
            best = min(max(self.slack, 1.02 * self.left(predict(value))), 0.9 * self.residual)
            return snapped(value, lambda written: self.left(predict(written)) <= best)


def fit_of(component: Component, got: np.ndarray) -> Fit | None:
    """A component's result and what was computed in float64; None where nothing can be read of them."""
    if component.own.shape != got.shape or got.size < 2:
        return None
    fit = Fit(component.own.astype(np.float64), got.astype(np.float64), component.rounding)
    if not (np.isfinite(fit.residual) and fit.residual > fit.slack) or not np.isfinite(fit.own).all():
        return None
    return fit


def checked(component: Component, fit: Fit, laws: Iterable[Law]) -> Iterator[Law]:
    """Of laws that may be true those that are: else, those that remove the larger part of the residual."""
    told, whole, parts = set(), [], []
    for law in laws:
        if law.sentence in told:
            continue
        told.add(law.sentence)
        law = replace(law, apply=partial(_in_float32, law.apply))
        result = law.apply(component)
        left = np.inf if result is None else fit.left(result.astype(np.float64))
        if left <= max(fit.slack, LEAVES * fit.residual):
            whole.append((left > fit.slack, law.size, left, law))
        elif left <= HALF * fit.residual and law.size <= PART_SIZE:
            parts.append((left, law.size, left, law))
    found = sorted(whole, key=lambda item: item[:3]) or sorted(parts, key=lambda item: item[:3])[:PARTS]
    yield from (item[3] for item in found[: 2 * PARTS])


def _in_float32(apply: Callable[[Component], np.ndarray | None], component: Component) -> np.ndarray | None:
    """A law's result in the dtype of what is compared; float64 inside."""
    own = component.own.astype(np.float64)
    with np.errstate(all="ignore"):
        result = apply(replace(component, own=own))
    return None if result is None or result.shape != own.shape else result.astype(np.float32)
