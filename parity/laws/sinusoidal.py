"""Laws of embeddings of times, and of whatever else is told as sines and cosines of it at falling frequencies."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import numpy as np

from parity.laws.base import Component, Law
from parity.laws.fit import LEAVES
from parity.laws.numbers import norm_of, plainest
from parity.laws.rounding import DTYPES
from parity.laws.waves import ORDERS, PERIODS, SCALES, Waves

# How far the squares of a sine and a cosine may be from 1.
UNIT = 0.05
# Periods and factors that are tried before any is read.
USUAL = (10000.0, *PERIODS)
FACTORS = (1.0, *SCALES)


def read(component: Component, got: np.ndarray) -> Iterator[Law]:
    """Other waves of inputs numbers [n], which own [n, width] should be the waves of that facts waves says."""
    right, numbers = component.facts["waves"], component.inputs["numbers"].astype(np.float64)
    if got.shape != component.own.shape or got.ndim != 2 or not np.isfinite(got).all():
        return
    allowed = max(component.rounding, LEAVES * norm_of(got.astype(np.float64) - component.own))

    def law(words: str, size: float, waves: Waves, to: str | None = None) -> Law:
        def apply(other: Component) -> np.ndarray | None:
            seen, width = other.inputs["numbers"].astype(np.float64), other.own.shape[1]
            # As a change, so that rounding is in both.
            more = waves.of(seen if to is None else DTYPES[to](seen), width) - right.of(seen, width)
            return (other.own + more).astype(np.float32)

        return Law(words, size, apply)

    ways = [law(f"the embedded number is rounded to {name}", 1, right, name) for name in DTYPES]
    ways += [law(*_said(waves, right), waves) for name in DTYPES if (waves := replace(right, angles=name))]
    ways += [law(*_said(waves, right), waves) for waves in waves_of(numbers, got, right, allowed / norm_of(got))]
    for way in ways:
        made = way.apply(component)
        if way.sentence and norm_of(got - made) <= allowed:
            yield way


def _said(waves: Waves, right: Waves) -> tuple[str, float]:
    return waves.against(right, "the embedded number", "is", "counts")


def waves_of(numbers: np.ndarray, points: np.ndarray, right: Waves | None, near: float) -> Iterator[Waves]:
    """The waves of numbers [n] that points [n, width] may be, no further from it than `near` relative to them, those
    that are nearest to the right ones first."""
    right = right or Waves(USUAL[0], ORDERS[0])
    orders, spacings = (dict.fromkeys(each) for each in ((right.order, *ORDERS), (right.less, 0.0, 1.0)))
    periods, scales = dict.fromkeys((right.period, *USUAL)), dict.fromkeys(right.scale * by for by in FACTORS)
    tried = product(orders, spacings, periods, scales)
    width, size = points.shape[1], norm_of(points)

    def left(waves: Waves) -> float:
        return norm_of(waves.of(numbers, width) - points) / size

    found = [waves for o, less, p, s in tried if left(waves := Waves(p, o, s, 0.0, less)) <= near]
    for order in () if found else ORDERS:
        read = _read(numbers, points, order)
        if read and (least := left(read)) <= near:
            # The plainest numbers that are as near as those that were read.
            for within in (1e-2, 1e-3, 1e-4, 1e-5, 0.0):
                period, scale = (plainest(value, within * value)[0] for value in (read.period, read.scale))
                if left(waves := replace(read, period=period, scale=scale)) <= 1.5 * least:
                    found.append(waves)
                    break
    yield from sorted(found, key=lambda waves: _said(waves, right)[1])


def is_made_of_waves(points: np.ndarray) -> bool:
    """Whether points [n, width] are sines and cosines of equal angles, in any order."""
    halves, pairs = (points.reshape(len(points), *shape) for shape in ((2, -1), (-1, 2)))
    sums = np.square(halves.astype(np.float64)).sum(1), np.square(pairs.astype(np.float64)).sum(2)
    return any(np.abs(each - 1).max() <= UNIT for each in sums)


def _read(numbers: np.ndarray, points: np.ndarray, order: str) -> Waves | None:
    """Waves whose frequencies fall evenly, followed from the slowest up, of the largest of the numbers."""
    half, largest = points.shape[1] // 2, int(np.abs(numbers).argmax())
    parts = points[largest].reshape((half, 2) if order.endswith("alternate") else (2, half))
    first, second = (parts.T if order.endswith("alternate") else parts).astype(np.float64)
    angles = np.arctan2(first, second) if order.startswith("sines") else np.arctan2(second, first)
    number = float(numbers[largest])
    if half < 4 or not number or (angles[-2:] * np.sign(number) <= 0).any():
        return None
    known = [abs(angles[-1]), abs(angles[-2])]
    for place in range(half - 3, -1, -1):
        at = np.arange(half - 1, place, -1)
        # What is turned further is known more exactly.
        fall, start = np.polyfit(at, np.log(known), 1, w=np.minimum(known, 100.0))
        angle = angles[place] * np.sign(number)
        turns = np.round((np.exp(start + fall * place) - angle) / (2 * np.pi))
        if angle + 2 * np.pi * turns <= 0:
            return None
        known.append(angle + 2 * np.pi * turns)
    fall, start = np.polyfit(np.arange(half - 1, -1, -1), np.log(known), 1, w=known)
    return Waves(float(np.exp(-fall * half)), order, float(np.exp(start)) / abs(number))
