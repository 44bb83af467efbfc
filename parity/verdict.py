"""How far a tap may be from the oracle's: fixed bounds for float32, measured floors for bfloat16.

float32. Changing every weight by half a unit in its last place moves upstream's own taps by about 1e-6, relative L2.
FIRST_STEP (2e-5) therefore leaves room for rounding alone, and LATER (1e-4) for what guidance amplifies from step to
step and the VAE adds. Nothing structural is that small.

bfloat16. The PyTorch reference measures two floors of every tap for the bundle at hand: U, how far upstream's own
bfloat16 is from float32, and R, how far apart equally right orders of rounding of the same bfloat16 run are. A tap may
be twice as far as U (or as R where chance makes that the larger), but no more than ORDER_FACTOR times R. U alone would
pass a RoPE whose frequencies are not rounded: that moves the queries by 2e-3 to 4e-3, which is less than U. R does not,
because before the first attention all orders agree in nearly every bit.

Measured with 48 to 2048 hidden channels, 1 to 10 layers, 2 to 30 steps, both entries: equally right orders are up to
1.74 R from each other and from lance_mlx, so ORDER_FACTOR is 4. Where R is next to nothing an error up to that of a few
flipped last bits is allowed (`flipped_bits`): at the official width lance_mlx is off by 2.8e-4 there, the least that a
wrong place of rounding makes is 2e-3 (embeddings summed in float32), and the bound is 8e-4.

An answer's tokens are equal up to where the equally right orders themselves part: there two tokens are all but equally
probable, and what follows hangs on which is taken.

The median tap may not be farther than U, or than ORDER_MEDIAN times R: in the few taps of a full-sequence bundle all
orders are saturated, about as far from each other (1.0 to 1.1 U in the median, 1.0 R) as from float32.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from parity.bundle import Bundle
from parity.metrics import Difference
from parity.recording import Recording, Tap
from parity.registry import within_first_step

FIRST_STEP = 2e-5
LATER = 1e-4
UPSTREAM_FACTOR = 2.0
UPSTREAM_MEDIAN = 1.0
ORDER_FACTOR = 4.0
ORDER_MEDIAN = 1.5
# The relative size of one unit in the last place of bfloat16 is 2**-8 to 2**-7.
BFLOAT16_ULP = 2.0**-8
# Whatever the size of a tap, one element in 25 may be off by it.
FLIPPED_SHARE = 1 / 25

AGREE, DIVERGE, UNUSABLE = "agree", "diverge", "unusable"


@dataclass(frozen=True)
class Limit:
    """The largest relative L2 error with which a tap agrees, and the floors it comes from (None for float32).

    `leading` is how many tokens of an answer can be compared, None for all: after them equally right orders of rounding
    answer differently, so near a tie lie the probabilities.
    """

    error: float
    upstream: float | None = None
    order: float | None = None
    leading: int | None = None


def float32_limits(bundle: Bundle) -> dict[str, Limit]:
    """Return the fixed bound of every tap of a float32 bundle; integers have none."""
    return {name: Limit(_fixed(bundle, name, tap)) for name, tap in bundle.taps.items()}


def bfloat16_limits(bundle: Bundle, exact: Recording, orders: Sequence[Recording]) -> dict[str, Limit]:
    """Return the measured bound of every tap of a bfloat16 bundle.

    `exact` is the reference's float32 run of the bundle, `orders` its bfloat16 runs under different orders of rounding.
    """
    limits = {}
    for name, tap in bundle.taps.items():
        upstream = _distance(tap, exact[name]) if name in exact else 0.0
        known = [run[name] for run in orders if name in run]
        if name == "tokens":
            limits[name] = Limit(0.0, leading=_fewest(_shared_start(tap, other) for other in known))
            continue
        order = max((_distance(a, b) for i, a in enumerate(known) for b in known[:i]), default=0.0)
        if tap.dtype == "int32" or upstream < FIRST_STEP:
            # Upstream rounds nothing here: bfloat16 or not, the bound is that of float32.
            limits[name] = Limit(_fixed(bundle, name, tap), upstream, order)
            continue
        flips = flipped_bits(tap.array.size)
        error = max(flips, min(UPSTREAM_FACTOR * max(upstream, order), ORDER_FACTOR * order))
        limits[name] = Limit(error, upstream, order)
    return limits


def flipped_bits(size: int) -> float:
    """Return the relative L2 error of a tap of which sqrt(size) elements, or FLIPPED_SHARE, are off by one last bit."""
    share = max(FLIPPED_SHARE, max(size, 1) ** -0.5)
    return BFLOAT16_ULP * share**0.5


def rounding_median(
    differences: Mapping[str, Difference], limits: Mapping[str, Limit], order_factor: float = 0.0
) -> float | None:
    """Return the median over the taps of error / max(U, order_factor * R), None where no tap has a U (float32)."""
    ratios = []
    for name, difference in differences.items():
        limit = limits[name]
        if limit.upstream is not None and limit.upstream >= FIRST_STEP and difference.rel_l2 is not None:
            ratios.append(difference.rel_l2 / max(limit.upstream, order_factor * (limit.order or 0.0)))
    return median(ratios) if ratios else None


def _fewest(counts: Iterable[int | None]) -> int | None:
    return min((count for count in counts if count is not None), default=None)


def _shared_start(a: Tap, b: Tap) -> int | None:
    """How many leading tokens two answers share, None when they are equal."""
    length = min(len(a.array), len(b.array))
    different = np.flatnonzero(a.array[:length] != b.array[:length])
    if different.size:
        return int(different[0])
    return None if len(a.array) == len(b.array) else length


def _fixed(bundle: Bundle, name: str, tap: Tap) -> float:
    if tap.dtype == "int32":
        return 0.0
    return FIRST_STEP if within_first_step(bundle.locate(name)) else LATER


def _distance(a: Tap, b: Tap) -> float:
    if a.array.shape != b.array.shape:
        return 0.0
    norm = np.linalg.norm(a.array.astype(np.float64))
    error = np.linalg.norm(a.array.astype(np.float64) - b.array)
    # A run of the reference that is off the scale says nothing about rounding.
    return float(error / norm) if norm and np.isfinite(error) else 0.0
