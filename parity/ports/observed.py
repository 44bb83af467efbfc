"""What a given port's run recorded, as the engine takes it."""

from collections.abc import Container, Mapping

import numpy as np

from parity.errors import ParityError
from parity.ports.probe import Held
from parity.tensors.recording import DTYPES, Observed, Recording, Tap

REQUIRED = ("run", "weights")
"""What a port from a file has to have; of the rest there are defaults."""


def observed_of(
    taps: Mapping[str, Held],
    exact: Mapping[str, np.ndarray],
    absent: Mapping[str, np.ndarray],
    names: Container[str],
    what: str,
) -> Observed:
    """Hold a probe's record as taps; raises ParityError, `what` in front, for a dtype that cannot be compared."""
    recording: Recording = {}
    for name, (array, dtype) in taps.items():
        if name not in names:
            continue
        if dtype not in DTYPES:
            raise ParityError(f"{what}: {name} is {dtype}: only {', '.join(DTYPES)} can be compared")
        recording[name] = Tap(array, dtype)
    kinds = {name: Tap(array, "float32" if array.dtype.kind == "f" else "int32") for name, array in exact.items()}
    return Observed(recording, kinds, {}, {n: mask for n, mask in absent.items() if n in recording or n in kinds})
