"""Holding what may be true against what was computed."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.numbers import snapped

# The part of the residual that a law may leave; one that leaves more, but less than HALF, may be one of two faults.
LEAVES, HALF = 0.05, 0.5
# Float32 holds a value to half of this part of it; what a run leaves may be a little more than what was measured.
RESOLUTION, MEASURED = 1.2e-7, 1.25
# A law has to remove so much of the residual, whatever rounding there is; one of two together less.
REMOVES, HELPS = 0.3, 0.1
# How many laws are yielded, of how many numbers one is at most that is held to be a part, and on how many of these
# another is looked for.
YIELDED, FEW, BASES = 6, 8.0, 2
Propose = Callable[[Component, "Fit"], Iterable[Law]]
"""Given a component and its fit, laws that may be true."""


@dataclass(frozen=True)
class Fit:
    """An array as it should be, as it was computed, and the norm of what rounding may do."""

    own: np.ndarray
    got: np.ndarray
    rounding: float = 0.0

    @cached_property
    def slack(self) -> float:
        """What may be left by rounding."""
        return max(MEASURED * self.rounding, RESOLUTION * float(np.linalg.norm(self.got)))

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

    @property
    def allowed(self) -> float:
        """What a law that is true leaves: rounding, or next to nothing of the residual."""
        return min(max(self.slack, LEAVES * self.residual), (1 - REMOVES) * self.residual)

    def holds(self, predicted: np.ndarray) -> bool:
        """Whether a prediction leaves no more."""
        return self.left(predicted) <= self.allowed

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


def checked(component: Component, got: np.ndarray, propose: Propose, part: float = HALF) -> Iterator[Law]:
    """Of laws that may be true those that are, or two of them together; else what leaves no more than a `part`."""
    fit = fit_of(component, got)
    if fit is None:
        return
    judged = _judged(component, fit, propose)
    whole = [item for item in judged if item[0] <= fit.allowed]
    if whole and not any(law.size <= FEW for _, law in whole):
        # Two faults that are few numbers each may be one of many.
        bases = [item for item in judged if item[0] <= (1 - HELPS) * fit.residual and item[1].size <= FEW]
        for _, base in sorted(bases, key=lambda item: item[0])[:BASES]:
            whole += _together(component, fit, propose, base)
    if whole:
        yield from _shortest(whole, fit)
    else:
        parts = [item for item in judged if item[0] <= part * fit.residual and item[1].size <= FEW]
        yield from (law for _, law in sorted(parts, key=lambda item: item[0])[:YIELDED])


def _judged(component: Component, fit: Fit, propose: Propose) -> list[tuple[float, Law]]:
    """Proposed laws with what they leave."""
    judged, seen = [], set()
    with np.errstate(all="ignore"):
        for law in propose(component, fit):
            if law.sentence not in seen:
                seen.add(law.sentence)
                law = replace(law, apply=partial(_in_float32, law.apply))
                result = law.apply(component)
                judged.append((np.inf if result is None else fit.left(result.astype(np.float64)), law))
                if judged[-1][0] <= fit.slack and law.size <= 1:
                    # Nothing says it shorter.
                    break
    return judged


def _together(component: Component, fit: Fit, propose: Propose, base: Law) -> list[tuple[float, Law]]:
    """What leaves no more than rounding on top of a law."""
    own = base.apply(component)
    on_top = replace(component, own=own)
    rest = Fit(own.astype(np.float64), fit.got, fit.rounding)
    if not rest.residual > rest.slack:
        return []
    found = _judged(on_top, rest, propose)
    pairs = [(left, law) for left, law in found if left <= min(fit.allowed, rest.allowed) and law.size <= FEW]

    def both(second: Law) -> Law:
        def apply(other: Component) -> np.ndarray | None:
            first = base.apply(other)
            return None if first is None else second.apply(replace(other, own=first))

        figure = second.figure or base.figure
        size, describes = base.size + second.size + 1, base.describes or second.describes
        return Law(f"{base.sentence}, and {second.sentence}", size, apply, figure, describes)

    return [(left, both(law)) for left, law in pairs]


def _shortest(whole: list[tuple[float, Law]], fit: Fit) -> list[Law]:
    """Laws from the shortest on: a longer one only where it leaves much less, of what is more than rounding."""
    kept: list[Law] = []
    best, size = np.inf, np.inf
    # What another says as shortly and much better is no law.
    whole = [
        (left, law)
        for left, law in whole
        if left <= fit.slack or not any(o < left / 5 and other.size <= law.size + 2 for o, other in whole)
    ]
    for left, law in sorted(whole, key=lambda item: (item[1].size, item[0])):
        if law.size <= size + 1 or (best > fit.slack and left < HALF * best):
            kept.append(law)
            size = min(size, law.size) if left > HALF * best else law.size
            best = min(best, left)
    return kept[:YIELDED]


def _in_float32(apply: Callable[[Component], np.ndarray | None], component: Component) -> np.ndarray | None:
    """A law's result in the dtype of what is compared; float64 inside."""
    own = component.own.astype(np.float64)
    with np.errstate(all="ignore"):
        result = apply(replace(component, own=own))
    return None if result is None or result.shape != own.shape else result.astype(np.float32)
