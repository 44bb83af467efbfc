"""Values that a run goes on with at some taps: what the trusted side computes there from the run's own values."""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace

from parity.tensors.recording import Observed, Recording, Tap


class Mending(Mapping[str, Tap]):
    """Forced values that are not known before: each is computed when the run comes to it.

    Attributes:
        recorded: what the run has recorded so far; set by whatever runs.
    """

    def __init__(self, names: Collection[str], compute: Callable[[str, Observed], Tap]) -> None:
        """`compute` is given a tap's name and what the run recorded before, as it went on with it."""
        self._names, self._compute = frozenset(names), compute
        self._used: Recording = {}
        self.recorded: Callable[[], Observed] = lambda: Observed({}, {}, {})

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tap:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._used:
            found = self.recorded()
            before = {other: tap for other, tap in found.recording.items() if other != name}
            self._used[name] = self._compute(name, replace(found, recording=before | self._used))
        return self._used[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
