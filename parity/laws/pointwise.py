"""Laws of a result each of whose values is changed by itself: clamped, rounded, bent."""

from collections.abc import Callable, Iterator

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.mixture import comparable, enough
from parity.laws.numbers import plainest
from parity.laws.rounding import bfloat16

Change = Callable[[np.ndarray], np.ndarray]


def changes(own: np.ndarray, got: np.ndarray, near: float) -> Iterator[tuple[str, float, Change]]:
    """What may have been done to each value: "is clamped to [-1, 1]", how many numbers that takes, and the change."""
    low, high = float(got.min()), float(got.max())
    bounds = [plainest(low, near)] if own.min() < low else [(-np.inf, "")]
    bounds += [plainest(high, near)] if own.max() > high else [(np.inf, "")]
    if bounds[0][1] or bounds[1][1]:
        words = {
            (True, True): f"is clamped to [{bounds[0][1]}, {bounds[1][1]}]",
            (True, False): f"is at least {bounds[0][1]}",
            (False, True): f"is at most {bounds[1][1]}",
            (False, False): "",
        }[bool(bounds[0][1]), bool(bounds[1][1])]
        yield words, bool(bounds[0][1]) + bool(bounds[1][1]), lambda x: np.clip(x, bounds[0][0], bounds[1][0])
    yield "is rounded to bfloat16", 0.5, bfloat16
    yield "is rounded to float16", 0.5, lambda x: x.astype(np.float16).astype(np.float32)
    values = np.unique(got.ravel()[:4096])
    if 1 < len(values) < min(got.size, 4096) // 2:
        step = float(np.diff(values)[np.diff(values) > 1e-9].min(initial=np.inf))
        if np.isfinite(step) and step > 0:
            count, said = plainest(1 / step, 1e-3 / step)
            yield f"is rounded to 1/{said}", 1, lambda x: np.round(x * count) / count
            yield f"is rounded down to 1/{said}", 1.5, lambda x: np.floor(x * count + 1e-6) / count
            yield f"is cut to 1/{said}", 1.5, lambda x: np.trunc(x * count) / count
    yield "has no sign", 0.5, np.abs
    yield "is squared", 0.5, np.square
    yield "goes through tanh", 0.5, np.tanh


def pointwise(component: Component, got: np.ndarray) -> Iterator[Law]:
    """A result whose values were changed one by one."""
    if not comparable(component, got):
        return
    what = component.facts.get("what", "the result")
    near = max(component.rounding / np.sqrt(got.size), 1e-6)
    for words, size, change in changes(component.own, got, near):

        def apply(other: Component, change: Change = change) -> np.ndarray:
            return np.asarray(change(other.own.astype(np.float32)), np.float32)

        if enough(component, got, apply(component)):
            yield Law(f"{what} {words}", size, apply)
