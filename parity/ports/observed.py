"""What a given port's run recorded, as the engine takes it."""

from collections.abc import Container, Iterator, Mapping

import numpy as np

from parity.errors import ParityError
from parity.ports.probe import Held
from parity.tensors.names import parse
from parity.tensors.recording import DTYPES, Observed, Recording, Tap

REQUIRED = ("run",)
"""What a port from a file has to have; of the rest there are defaults."""


class HeldTaps(Mapping[str, Held]):
    """Taps as a probe holds them."""

    def __init__(self, taps: Mapping[str, Tap]) -> None:
        self._taps = taps

    def __getitem__(self, name: str) -> Held:
        tap = self._taps[name]
        return tap.array, tap.dtype

    def __contains__(self, name: object) -> bool:
        return name in self._taps

    def __iter__(self) -> Iterator[str]:
        return iter(self._taps)

    def __len__(self) -> int:
        return len(self._taps)


def observed_of(
    taps: Mapping[str, Held],
    exact: Mapping[str, np.ndarray],
    absent: Mapping[str, np.ndarray],
    unknown: Mapping[str, str],
    names: Container[str],
) -> Observed:
    """Hold a probe's record as taps; raises ParityError for a dtype or a name that there is not.

    `unknown` are names that nobody asked for, and where they were told.
    """
    for name, place in unknown.items():
        try:
            parse(name)
        except ParityError as error:
            raise ParityError(f"{error} ({place})") from None
    recording: Recording = {}
    for name, (array, dtype) in taps.items():
        if name not in names:
            continue
        if dtype not in DTYPES:
            raise ParityError(f"{name} is {dtype}: only {', '.join(DTYPES)} can be compared")
        recording[name] = Tap(array, dtype)
    kinds = {name: Tap(array, "float32" if array.dtype.kind == "f" else "int32") for name, array in exact.items()}
    return Observed(recording, kinds, {}, {n: mask for n, mask in absent.items() if n in recording or n in kinds})
