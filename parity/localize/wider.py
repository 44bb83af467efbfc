"""Ports that compute wider than upstream: float32 where its policy rounds to bfloat16.

Every tap of such a port is off by the rounding that it leaves out, which says nothing of what it computes. It is held
against the reference in float32 instead, from the same values and the same rounded weights: what agrees there is right
but for its dtype, which is one finding however many taps it shows in. What does not is rounded and judged as any other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from parity.model import definition
from parity.oracle.bounds import EQUAL, Bound
from parity.oracle.oracle import Oracle
from parity.tensors.metrics import compare
from parity.tensors.names import component_kind
from parity.tensors.recording import Observed, Tap
from parity.tensors.rounding import ULP, rounded

# Two right float32 runs are this many times as far apart as one float32 and one float64 run of a component's kind: one
# draw tells the size, and a rounding that is left out is a thousand times larger.
APART = 16.0


@dataclass(frozen=True)
class Wider:
    """A steered run whose wider taps are settled.

    Attributes:
        forced: the run; what is right but for its dtype is the oracle's there, the rest is rounded.
        right: taps that are right but for their dtype, with what was computed.
        beyond: those of them that rounding the result alone does not explain: something before it is not rounded.
    """

    forced: Observed
    right: Mapping[str, Tap]
    beyond: frozenset[str]


def settled(oracle: Oracle, forced: Observed, bounds: Mapping[str, Bound]) -> Wider:
    """Tell of each wider tap whether it is right in float32; `bounds` are of what rounding does to taps otherwise."""
    wide = [n for n, tap in forced.recording.items() if tap.dtype == "float32" and oracle.own[n].dtype == "bfloat16"]
    if not wide:
        return Wider(forced, {}, frozenset())
    single, double = (_own(oracle, dtype) for dtype in ("float32", "float64"))
    levels: dict[str, float] = {}
    for name in wide:
        kind = component_kind(name)
        levels[kind] = max(levels.get(kind, ULP["float32"]), _error(double[name], single[name]))
    recording, right, beyond = dict(forced.recording), {}, set()
    for name in wide:
        computed, own = forced.recording[name], oracle.own[name]
        narrow = Tap(rounded(computed.array, "bfloat16"), "bfloat16")
        if _error(single[name], computed) <= APART * levels[component_kind(name)]:
            right[name], recording[name] = computed, own
            if not _error(own, narrow) <= bounds.get(name, EQUAL).allowed:
                beyond.add(name)
        else:
            recording[name] = narrow
    return Wider(replace(forced, recording=recording), right, frozenset(beyond))


def _own(oracle: Oracle, dtype: str) -> Mapping[str, Tap]:
    run = definition().load_wider(oracle.bundle, dtype)
    given = {n: Tap(tap.array, "float32") if tap.dtype == "bfloat16" else tap for n, tap in oracle.passes.items()}
    return definition().cut(run, definition().run_passes(run, given))


def _error(expected: Tap, got: Tap) -> float:
    if expected.shape != got.shape:
        return np.inf
    error = compare(Tap(expected.array, "float32"), Tap(got.array, "float32")).rel_l2
    return np.inf if error is None else error
