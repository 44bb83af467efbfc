"""From floors to bounds: how far over its floor a tap must be for a run to be called wrong.

The threshold on error / floor is measured. Each family of variants in turn is taken for an implementation under test
and the others for its floor; the logarithms of these ratios beyond their nine-tenth quantile are fitted by a
generalized Pareto distribution (by its moments), for each dtype by itself, and the threshold is where its tail, over
all taps compared, leaves a chance of FALSE_ALARM for a false alarm anywhere in the run (Bonferroni's bound, which holds
however the taps depend on each other). A few hundred ratios tell a far quantile roughly: what counts is the upper end
of its bootstrap interval. With lognormal errors a run of right implementations is then called wrong in 1 % of cases or
fewer, which the plain fit exceeds several times over.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from parity.bundle import Bundle
from parity.findings import Alarm
from parity.floors import Floors
from parity.oracle import Oracle
from parity.rounding import ULP, quantum

FALSE_ALARM = 0.01
"""Largest chance that a run of equally right implementations is called wrong anywhere."""
_TAIL = 0.1
_RESAMPLES, _CONFIDENCE = 200, 0.95


def floor(errors: np.ndarray, least: float) -> float:
    """The floor of a tap: the largest error of the variants, or the least that any tap has."""
    return max(float(errors.max(initial=0.0)), least)


def threshold(ratios: np.ndarray, count: int, taps: int) -> float:
    """Fit the threshold on error / floor of a run that compares so many taps to what the families are to each other.

    `ratios` are the largest of `count`, in falling order.
    """
    if not count:
        return 1.0
    logs = np.log(ratios.astype(np.float64))
    start = max(float(logs[min(int(_TAIL * count), len(logs) - 1)]), 0.0)
    beyond = logs[logs > start] - start
    chance = FALSE_ALARM / max(taps, 1) / max(beyond.size / count, FALSE_ALARM / max(taps, 1))
    far = _far(beyond, chance) if beyond.size > 1 else 0.0
    # Never below what was seen, nor below the floor itself.
    return float(np.exp(max(start + far, logs[0], 0.0)))


@dataclass(frozen=True)
class Bounds:
    """What a tap may be off by: its floor, and the threshold on errors over it, which is one for each dtype."""

    levels: dict[str, float]
    kinds: dict[str, tuple[str, int]]
    thresholds: dict[str, float]
    alarm: Alarm

    def allowed(self, name: str) -> float:
        """The largest error with which a tap agrees.

        A rounding in bfloat16 falls one way or the other: another right run has not as many elements off by a bit but
        about as many, which in a small tap is a large part. Their number is taken for Poisson's.
        """
        level, (dtype, size) = self.levels[name], self.kinds[name]
        bound = level * self.thresholds[dtype]
        if dtype != "bfloat16" or not size:
            return bound
        one = ULP[dtype] * (2 / size) ** 0.5  # a unit in the last place, between 2**-8 and 2**-7 of an element
        usual = (level / one) ** 2 + 1
        far = NormalDist().inv_cdf(1 - self.alarm.rate / max(self.alarm.taps, 1))
        return max(bound, one * (usual + far * usual**0.5 + far**2 / 2) ** 0.5)


def local_bounds(oracle: Oracle, floors: Floors) -> Bounds:
    """The bounds of taps computed from the oracle's input."""
    taps = oracle.taps
    least = {name: quantum(taps[name]) for name in floors.errors}
    kinds = {name: (taps[name].dtype, taps[name].array.size) for name in floors.errors}
    return bounds_of(floors, least, kinds, oracle.bundle.dtype)


def free_bounds(bundle: Bundle, floors: Floors) -> Bounds:
    """The same for runs from their own input, whose states are of the run's dtype and may be off by a bit."""
    least = {name: quantum(bundle.expected[name], bundle.dtype) for name in floors.errors}
    kinds = {name: (bundle.dtype, bundle.expected[name].size) for name in floors.errors}
    return bounds_of(floors, least, kinds, bundle.dtype)


def bounds_of(floors: Floors, least: Mapping[str, float], kinds: dict[str, tuple[str, int]], dtype: str) -> Bounds:
    """The bounds of taps of given least floors, dtypes and sizes, in a run of a dtype."""
    levels = {name: floor(errors, least[name]) for name, errors in floors.errors.items()}
    thresholds = {d: threshold(found, floors.count[d], len(levels)) for d, found in floors.ratios.items()}
    count = sum(floors.count.values())
    bounds = Bounds(levels, kinds, thresholds, Alarm(FALSE_ALARM, len(levels), thresholds[dtype], count))
    widest = max((bounds.allowed(name) / level for name, level in levels.items() if level), default=1.0)
    return replace(bounds, alarm=replace(bounds.alarm, threshold=widest))


def _far(excesses: np.ndarray, chance: float) -> float:
    """The upper end of the bootstrap interval of the excess that is exceeded with a given chance."""
    drawn = np.random.default_rng(0).integers(0, excesses.size, (_RESAMPLES, excesses.size))
    resampled = _pareto_quantiles(excesses[drawn], chance)
    return max(float(np.quantile(resampled, _CONFIDENCE)), float(_pareto_quantiles(excesses[None], chance)[0]))


def _pareto_quantiles(samples: np.ndarray, chance: float) -> np.ndarray:
    """For each row of excesses what is exceeded with a given chance, by a generalized Pareto distribution of the same
    moments."""
    mean, spread = samples.mean(axis=1), samples.var(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        # An error is bounded, so in logarithms no tail is heavier than the exponential one, whose shape is 0.
        shape = np.minimum((1 - mean**2 / spread) / 2, 0.0)
        scale = mean * (1 - shape)
        bounded = scale / shape * (chance**-shape - 1)
    exponential = -scale * np.log(chance)
    return np.where(spread > 0, np.where(shape > -1e-6, exponential, bounded), mean)
