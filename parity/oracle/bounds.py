"""From floors to bounds: how far a tap may be from the reference's before a run is called wrong.

Two right runs lie on either side of what is exact, so they are at most two floors apart, the floor being the farthest
of the variants; in a tap whose error hangs on few roundings, or on one that all elements share, the next draw may go
beyond all that were seen. Both dtypes have that in their own form:

- float32: errors add up, and their size varies from draw to draw as that of a vector with so many degrees of freedom
  as the measured spread tells (1 where a single scalar is off). The bound is two floors times the far quantile of that.
- bfloat16: an element is rounded one way or the other. How many differ is counted over all taps of a component and all
  variants; in one tap their number is taken for Poisson's, each weighed with its unit in the last place, and the
  largest element may always be one of them. A float32 tap behind bfloat16 ones carries theirs.

The quantile is such that all taps of a run together alarm in FALSE_ALARM of clean runs (Bonferroni's bound).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from parity.oracle.floors import Floors
from parity.tensors.metrics import Difference
from parity.tensors.recording import Tap
from parity.tensors.rounding import ULP, step_squares
from parity.tensors.sketch import ACCURACY, Sketch

FALSE_ALARM = 0.01
"""Chance that a run of equally right implementations is called wrong anywhere, by the model of the bounds."""
_APART = 2.0
# Of bfloat16 errors of many roundings: what a Poisson number may exceed its mean by where that is 1, as a factor.
_FARTHEST = 8**0.5


@dataclass(frozen=True)
class Alarm:
    """How often a run of equally right implementations would be called wrong.

    Attributes:
        rate: upper bound of the chance that any of the taps of a clean run alarms.
        taps: how many taps share it.
        threshold: error over floor from which a tap alarms, the largest of all taps.
        samples: how many equally right variants the floors come from.
    """

    rate: float
    taps: int
    threshold: float
    samples: int


@dataclass(frozen=True)
class Bound:
    """What a tap may be off by.

    Attributes:
        allowed: the largest relative L2 error that agrees; 0 where equality is asked for.
        floor: what equally right orders of rounding do, by which it is judged.
        upstream: how far upstream's bfloat16 is from float32; None where that is not asked, and in float32.
        counted: whether it comes from how many elements bfloat16 rounds the other way.
    """

    allowed: float
    floor: float = 0.0
    upstream: float | None = None
    counted: bool = False

    def exceeded_by(self, difference: Difference) -> bool:
        """Whether a tap is farther, or cannot be close at all."""
        return difference.beyond(self.allowed)


EQUAL = Bound(0.0)
"""Of what must be equal."""


@dataclass(frozen=True)
class Bounds:
    """The bounds of taps, and how often they alarm."""

    taps: dict[str, Bound]
    alarm: Alarm

    def allowed(self, name: str) -> float:
        """The largest error with which a tap agrees."""
        return self.taps[name].allowed

    def floor(self, name: str) -> float:
        """What rounding alone does to a tap."""
        return self.taps[name].floor


class Scale(NamedTuple):
    """What is known of a tap's values, all relative to their squared norm: units in the last place, squared.

    Attributes:
        total: their sum.
        lump: their mean, each weighed with itself: what one rounding amounts to that falls the other way.
        peak: the largest.
        estimated: whether errors are told from sketches.
    """

    dtype: str
    total: float
    lump: float
    peak: float
    estimated: bool = False


def scale_of(value: Tap | Sketch, carried: bool = False) -> Scale:
    """The scale of a tap, or of a sketch by what its elements are on average; integers round to nothing.

    Where bfloat16's roundings are `carried` into float32 it is that of bfloat16, in whose units they are.
    """
    if value.dtype == "int32":
        return Scale(value.dtype, 0.0, 0.0, 0.0)
    # Behind a norm a value may have half the unit that it was rounded by.
    dtype, times = ("bfloat16", 4.0) if carried and value.dtype == "float32" else (value.dtype, 1.0)
    if isinstance(value, Sketch):
        one = times * ULP[dtype] ** 2 / max(value.size, 1)
        return Scale(dtype, value.size * one, one, one, estimated=True)
    norm = float(np.square(value.array, dtype=np.float64).sum()) / times
    if not norm:
        return Scale(dtype, 0.0, 0.0, 0.0)
    steps = step_squares(value.array, dtype)
    return Scale(dtype, steps.total / norm, steps.squares / steps.total / norm, steps.largest / norm)


def bounds_of(floors: Floors, values: Mapping[str, Tap | Sketch], dtype: str) -> Bounds:
    """The bounds of all taps that have floors and values, in a run of a dtype."""
    carried = {n: dtype == "bfloat16" and floors.flips[n] > 0 for n in floors.levels}
    scales = {n: scale_of(values[n], carried[n]) for n in floors.levels if n in values}
    return bounds_by_scale(floors, scales, dtype)


def bounds_by_scale(floors: Floors, scales: Mapping[str, Scale], dtype: str) -> Bounds:
    """The bounds of taps whose scales are known, in a run of a dtype."""
    chance = FALSE_ALARM / max(len(scales), 1)
    found = {name: _bound(floors, name, scale, dtype, chance) for name, scale in scales.items()}
    widest = max((bound.allowed / bound.floor for bound in found.values() if bound.floor), default=1.0)
    return Bounds(found, Alarm(FALSE_ALARM, len(found), widest, len(floors.variants)))


def _bound(floors: Floors, name: str, scale: Scale, dtype: str, chance: float) -> Bound:
    level, spread = floors.levels[name], floors.spreads[name]
    wider = 1 + ACCURACY * scale.estimated
    if scale.dtype != "bfloat16" or not scale.lump:
        # One rounding, of the largest element, is always allowed for.
        floor = max(level, scale.peak**0.5)
        return Bound(floor * _apart(spread, chance, dtype) * wider, floor)
    square = max(level**2, floors.flips[name] * scale.total)
    counted = poisson_quantile(square / scale.lump, chance) * scale.lump + scale.peak
    far = square**0.5 * _apart(spread, chance, dtype) if square > scale.lump else 0.0
    return Bound(max(counted**0.5, far) * wider, max(square, scale.peak) ** 0.5, counted=True)


def _apart(spread: float, chance: float, dtype: str) -> float:
    """How many floors two right runs may be apart; `spread` is the standard deviation of an error's logarithm.

    Under bfloat16 it comes from roundings that fall one way or the other, of which the floor has seen many.
    """
    degrees = max(1 / (2 * spread**2), 1.0) if spread else math.inf
    beyond = 1 + far_quantile(chance) / (2 * degrees) ** 0.5
    return min(_APART * beyond, _FARTHEST) if dtype == "bfloat16" else _APART * beyond


@lru_cache(maxsize=64)
def far_quantile(chance: float) -> float:
    """How many standard deviations a normal number exceeds with at most a given chance."""
    return NormalDist().inv_cdf(1 - chance)


@lru_cache(maxsize=65536)
def poisson_quantile(mean: float, chance: float) -> int:
    """The smallest number that a Poisson number of a mean exceeds with at most a given chance."""
    if mean > 500:
        far = far_quantile(chance)
        return math.ceil(mean + far * mean**0.5 + far**2 / 2)
    count, term = 0, math.exp(-mean)
    within = term
    # Summed from below until what is left is as small as that.
    while 1 - within > chance and count < mean + 40 + 12 * mean**0.5:
        count += 1
        term *= mean / count
        within += term
    return count
