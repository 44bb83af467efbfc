"""Running a port from the oracle's values: every part of it is given what the oracle has before it."""

import numpy as np

from parity.comparison.check import first_unequal
from parity.errors import ParityError
from parity.oracle.oracle import Oracle
from parity.ports.port import Port
from parity.tensors.recording import Observed, Recording, Tap

TRIED = 3
"""Values that are forced, one at a time, until one shows: the last one of a part may lead nowhere."""


def steered(port: Port, oracle: Oracle) -> Observed:
    """Run a port with every part of it given what the oracle has before it."""
    return port.run(set(oracle.taps), given_to(port, oracle), oracle.exact).filled(oracle.own)


def given_to(port: Port, oracle: Oracle) -> Recording:
    """What a port is given to be steered."""
    return oracle.passes if port.whole_passes else oracle.taps


def require_steering(port: Port, oracle: Oracle, free: Recording) -> None:
    """Force a value of the wrong sign, and see that something else changes; raises ParityError where nothing does.

    Of a port that records but goes on with its own values all would seem wrong by itself that follows from its first
    error. `free` is what the port computes by itself.
    """
    given = given_to(port, oracle)
    names = [n for n, tap in free.items() if "/" in n and n in given and tap.dtype != "int32" and np.any(tap.array)]
    for name in names[:TRIED]:
        # Of whole passes what is given has more rows than what is told.
        forced = port.run(set(free), {name: Tap(-given[name].array, given[name].dtype)}).recording
        if first_unequal({n: tap for n, tap in free.items() if n != name}, forced) is not None:
            return
    if names:
        raise ParityError(
            f"{port.name} does not go on with the values that it is given, such as that at {names[0]}: what is wrong "
            "by itself cannot be told from what follows; let it use what `force` holds"
        )
