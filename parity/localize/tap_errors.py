"""Every tap's local, propagated and total error."""

from collections.abc import Mapping

import numpy as np

from parity.localize.findings import TapError
from parity.oracle.bounds import Bounds
from parity.oracle.oracle import Oracle
from parity.tensors.metrics import compare
from parity.tensors.recording import Recording, Tap
from parity.tensors.sketch import Sketch


def tap_errors(
    oracle: Oracle, expected_of: Mapping[str, Tap | Sketch], forced: Recording, free: Recording, bounds: Bounds
) -> list[TapError]:
    """The errors of all taps that a steered run computed, in order of execution.

    `forced` was computed from the oracle's values, and so was `expected_of`, which it is held against; `free` was
    computed from the run's own, is held against the oracle, and may lack taps.
    """
    errors: list[TapError] = []
    before: dict[str, float] = {}
    held = oracle.taps | oracle.bundle.sketches
    for name, expected in oracle.taps.items():
        if name not in forced or name not in expected_of:
            continue
        tap = oracle.bundle.locate(name)
        local, total = compare(expected_of[name], forced[name], tap.most), None
        if name in free and free[name].array.shape == expected.array.shape:
            total = compare(held[name], free[name]).rel_l2
        propagated = propagated_error(expected, forced[name], free.get(name))
        exact = expected.dtype == "int32"
        level = 0.0 if exact else bounds.floor(name)
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
                local=local.rel_l2,
                propagated=propagated,
                total=total,
                gain=gain,
                floor=level,
                allowed=0.0 if exact else bounds.allowed(name),
                mismatch=local.mismatch,
                accuracy=local.accuracy,
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
