"""Whether a model computes numbers, and the same ones each time."""

import numpy as np

from parity.errors import ParityError
from parity.pairs.known import NEAR
from parity.pairs.names import parse
from parity.pairs.sides import OUTPUT
from parity.tensors.metrics import rel_l2
from parity.tensors.recording import Recording


def require_sound(pair: str, taps: Recording, again: Recording) -> None:
    """Raise ParityError where two runs of a trusted model show that it is nothing to hold a port against."""
    broken = [name for name, tap in taps.items() if not np.isfinite(tap.array).all()]
    if any(parse(name).path.startswith(OUTPUT) for name in broken):
        raise ParityError(
            f"the trusted model of {pair} computes NaN or infinity, first in {broken[0]}: "
            "give it inputs and weights of which it does not"
        )
    drawn = differing(taps, again)
    if drawn is not None:
        raise ParityError(
            f"the trusted model of {pair} computes something else each time, first in {drawn}: "
            "put it into eval mode, or seed what it draws"
        )


def differing(one: Recording, other: Recording) -> str | None:
    """The first tap that is not the same in two runs of one model, but for rounding."""
    for name, tap in one.items():
        again = other.get(name)
        if again is None or again.shape != tap.shape:
            return name
        error = rel_l2(tap.array, again.array)
        if error is not None and error > NEAR.get(tap.dtype, 0.0):
            return name
    return None
