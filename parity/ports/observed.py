"""What a given port's run recorded, as the engine takes it."""

from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from parity.errors import ParityError
from parity.ports.probe import Held
from parity.tensors.names import parse
from parity.tensors.recording import DTYPES, Observed, Recording, Tap

REQUIRED = ("run",)
"""What a port from a file has to have; of the rest there are defaults."""


def told_weights(weights: Iterable[Any]) -> Iterator[tuple[str, np.ndarray]]:
    """A port's weights one by one; raises ParityError for what is no name with an array, and for a name told twice."""
    seen = set()
    for item in weights:
        if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)):
            raise ParityError(f"weights() yields {type(item).__name__}: yield (name, array)")
        name, array = item
        if np.asarray(array).dtype.kind not in "iubf":
            raise ParityError(f"weight {name} is {type(array).__name__}: yield a NumPy array")
        if name in seen:
            raise ParityError(f"weight {name} is told twice")
        seen.add(name)
        yield name, np.asarray(array, np.float32)


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
    unknown: Iterable[str],
    names: Container[str],
    what: str,
) -> Observed:
    """Hold a probe's record as taps; raises ParityError, `what` in front, for a dtype or a name that there is not."""
    for name in (*unknown, *exact):
        try:
            parse(name)
        except ParityError as error:
            raise ParityError(f"{what}: {error}") from error
    recording: Recording = {}
    for name, (array, dtype) in taps.items():
        if name not in names:
            continue
        if dtype not in DTYPES:
            raise ParityError(f"{what}: {name} is {dtype}: only {', '.join(DTYPES)} can be compared")
        recording[name] = Tap(array, dtype)
    kinds = {name: Tap(array, "float32" if array.dtype.kind == "f" else "int32") for name, array in exact.items()}
    return Observed(recording, kinds, {}, {n: mask for n, mask in absent.items() if n in recording or n in kinds})
