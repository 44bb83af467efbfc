"""Every tap's local, propagated and total error."""

import math
import re
from collections.abc import Mapping

import numpy as np

from parity.localize.findings import TapError
from parity.oracle.bounds import Bounds
from parity.oracle.oracle import Oracle
from parity.tensors.metrics import compare
from parity.tensors.names import TapName
from parity.tensors.recording import Recording, Tap
from parity.tensors.sketch import Sketch


def tap_errors(
    oracle: Oracle,
    expected_of: Mapping[str, Tap | Sketch],
    forced: Recording,
    free: Recording,
    bounds: Bounds,
    along: Bounds,
) -> list[TapError]:
    """The errors of all taps that a steered run computed, in order of execution.

    `forced` was computed from the oracle's values, and so was `expected_of`, which it is held against; `free` was
    computed from the run's own, is held against the oracle, and may lack taps. Where the steered run lacks the taps
    between, rounding adds up over those; `along` are the bounds over upstream's own, wider steps.
    """
    between = lacking_before(oracle, forced)
    errors: list[TapError] = []
    before: dict[str, float] = {}
    held = oracle.taps | oracle.bundle.sketches
    for name, expected in oracle.taps.items():
        if name not in forced or name not in expected_of:
            continue
        tap = oracle.bundle.locate(name)
        local, total = compare(expected_of[name], forced[name], tap.most), None
        if name in free and free[name].array.shape == expected.array.shape:
            total = compare(held[name], free[name]).error
        propagated = propagated_error(expected, forced[name], free.get(name))
        exact = expected.dtype == "int32"
        level, allowed = (0.0, 0.0) if exact else (bounds.floor(name), bounds.allowed(name))
        if not exact and between[name]:
            passed = [other for other in between[name] if other in bounds.taps]
            level += sum(map(bounds.floor, passed))
            allowed += sum(map(bounds.allowed, passed))
            if name in along.taps:
                level, allowed = max(level, along.floor(name)), max(allowed, along.allowed(name))
        previous = before.get(tap.call)
        gain = propagated / previous if propagated is not None and previous else None
        if total is not None:
            before[tap.call] = total
        errors.append(
            TapError(
                tap=tap,
                source=oracle.source(name),
                shape=expected.array.shape,
                dtype=expected.dtype,
                local=math.nan if local.odd else local.rel_l2,
                propagated=propagated,
                total=total,
                gain=gain,
                floor=level,
                allowed=allowed,
                mismatch=local.mismatch,
                accuracy=local.accuracy,
                passed=between[name],
            )
        )
    return errors


def propagated_error(expected: Tap, local: Tap, own: Tap | None) -> float | None:
    """What earlier errors do to a tap, relative to the oracle's; None where there is no run of its own to tell."""
    if own is None or not (expected.array.shape == local.array.shape == own.array.shape):
        return None
    norm = float(np.linalg.norm(expected.array.astype(np.float64)))
    moved = float(np.linalg.norm(own.array.astype(np.float64) - local.array))
    return moved / norm if norm else (0.0 if not moved else None)


def lacking_before(oracle: Oracle, recording: Recording) -> dict[str, list[str]]:
    """For each tap of a steered run those before it in its block that the run lacks, and computes on the way."""
    lacking: dict[str, list[TapName]] = {}
    found = {}
    for name in oracle.taps:
        tap = oracle.bundle.locate(name)
        if name not in recording:
            lacking.setdefault(tap.call, []).append(tap)
            continue
        block = re.match(r"(.*\.\d+)?", tap.path)[0]
        inside = f"{block}." if block else ""
        found[name] = [other.name for other in lacking.get(tap.call, ()) if other.path.startswith(inside)]
    return found
