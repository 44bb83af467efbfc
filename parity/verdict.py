"""How far a tap may be from the oracle's when a run goes its own way, and how comparisons can end.

The bound of a tap is its floor, measured for the bundle with equally right variants of the reference, times a
threshold that is measured as well (parity/floors.py, parity/bounds.py). The median tap may not be farther than MEDIAN
floors: that sees what moves every tap by a little. Measured on all captured bundles, lance_mlx and the reference reach
1.1 in the median of float32 runs and where every order of rounding is saturated, as in bfloat16 runs of a few steps.

An answer's tokens are equal up to where the equally right variants themselves part: there two tokens are all but
equally probable, and what follows hangs on which is taken.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from parity.bounds import free_bounds
from parity.bundle import Bundle
from parity.findings import Alarm
from parity.floors import Floors
from parity.metrics import Difference

MEDIAN = 2.0

AGREE, DIVERGE, INCONCLUSIVE, UNUSABLE = "agree", "diverge", "inconclusive", "unusable"


@dataclass(frozen=True)
class Limit:
    """The largest relative L2 error with which a tap agrees, and what it comes from.

    Attributes:
        error: the bound, `floor` times the run's threshold.
        floor: what equally right orders of rounding do.
        upstream: how far upstream's bfloat16 is from float32; None for float32.
        leading: how many tokens of an answer can be compared, None for all: after them equally right orders of rounding
            answer differently, so near a tie lie the probabilities.
    """

    error: float
    floor: float = 0.0
    upstream: float | None = None
    leading: int | None = None


def limits_from(bundle: Bundle, floors: Floors) -> tuple[dict[str, Limit], Alarm]:
    """The limit of every tap of a bundle, and how often they alarm falsely; integers must be equal."""
    bounds = free_bounds(bundle, floors)
    limits = {}
    for name in bundle.expected:
        if name == "tokens":
            limits[name] = Limit(0.0, leading=floors.leading)
        elif name in bounds.levels:
            limits[name] = Limit(bounds.allowed(name), bounds.levels[name], floors.upstream.get(name))
        else:
            limits[name] = Limit(0.0)
    return limits, bounds.alarm


def median_over_floor(differences: Mapping[str, Difference], limits: Mapping[str, Limit]) -> float | None:
    """The median over the taps of error / floor, None where no tap has a floor."""
    ratios = [
        difference.rel_l2 / limits[name].floor
        for name, difference in differences.items()
        if limits[name].floor and difference.rel_l2 is not None
    ]
    return median(ratios) if ratios else None


def median_over_upstream(differences: Mapping[str, Difference], limits: Mapping[str, Limit]) -> float | None:
    """The median over the taps of error / upstream's own rounding error, None where it has none (float32)."""
    ratios = [
        difference.rel_l2 / upstream
        for name, difference in differences.items()
        if (upstream := limits[name].upstream) and difference.rel_l2 is not None
    ]
    return median(ratios) if ratios else None
