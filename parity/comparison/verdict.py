"""How far a tap may be from the oracle's when a run goes its own way, and how comparisons can end.

The bound of a tap comes from what equally right variants of the reference do (parity/oracle/bounds.py). The median tap
may not be farther than MEDIAN floors, where the squares of two runs' errors add up that are each a whole floor off
everywhere: that sees what moves every tap by a little.

An answer is run with the oracle's tokens, so that its taps can be compared to the end; a choice may be another one only
where the logits are a rounding apart.
"""

from collections.abc import Mapping
from dataclasses import replace
from statistics import median

from parity.bundle.reading import Bundle
from parity.oracle.bounds import EQUAL, Alarm, Bound, bounds_of
from parity.oracle.floors import Floors
from parity.tensors.metrics import Difference
from parity.tensors.recording import Recording

MEDIAN = 2**0.5

AGREE, DIVERGE, INCONCLUSIVE, UNUSABLE = "agree", "diverge", "inconclusive", "unusable"


def limits_from(bundle: Bundle, floors: Floors, logits: Recording) -> tuple[dict[str, Bound], Alarm]:
    """The bound of every tap of a bundle and of the reference's `logits`, and how often they alarm falsely.

    Integers must be equal.
    """
    bounds = bounds_of(floors, bundle.expected | logits, bundle.dtype)
    limits = {}
    for name in [*bundle.expected, *logits]:
        if name in bounds.taps:
            limits[name] = replace(bounds.taps[name], upstream=floors.upstream.get(name))
        else:
            limits[name] = EQUAL
    return limits, bounds.alarm


def median_over_floor(differences: Mapping[str, Difference], limits: Mapping[str, Bound]) -> float | None:
    """The median over the taps of error / floor, None where no tap has a floor."""
    ratios = [
        difference.rel_l2 / limits[name].floor
        for name, difference in differences.items()
        if limits[name].floor and difference.rel_l2 is not None
    ]
    return median(ratios) if ratios else None


def median_over_upstream(differences: Mapping[str, Difference], limits: Mapping[str, Bound]) -> float | None:
    """The median over the taps of error / upstream's own rounding error, None where it has none (float32)."""
    ratios = [
        difference.rel_l2 / upstream
        for name, difference in differences.items()
        if (upstream := limits[name].upstream) and difference.rel_l2 is not None
    ]
    return median(ratios) if ratios else None
