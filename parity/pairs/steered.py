"""A port given the trusted model's values wherever it tells its own: how far each part of it is off by itself."""

from collections.abc import Callable, Iterator, Set
from dataclasses import replace

from parity.errors import one_line
from parity.localize.findings import TapError
from parity.oracle.bounds import EQUAL, Bounds, bounds_of
from parity.oracle.oracle import UPSTREAM
from parity.pairs.layouts import in_groups
from parity.pairs.mlx_side import MlxSide
from parity.pairs.names import kind_of, parse
from parity.pairs.pair import Pair
from parity.pairs.rounding import measured
from parity.pairs.sides import OUTPUT
from parity.pairs.torch_side import TorchSide
from parity.tensors.metrics import compare, rel_l2
from parity.tensors.recording import Recording

# Kinds of parts that differ of which it is looked at what comes of them.
TRIED = 16
# How many times what is allowed a part has to be off for it to be seen whether anything comes of that, and how far what
# comes of it may be, which also has the part's own rounding.
FAR, PASSED_ON = 20, 2


class Steering:
    """Runs of a pair's port with trusted taps in the place of its own; `tell` is told what is done.

    Its methods raise ParityError where one of the models cannot run.
    """

    def __init__(self, pair: Pair, name: str, own: TorchSide, tell: Callable[[str], None]) -> None:
        self._pair, self._name, self._own, self._taps, self._tell = pair, name, own, own.taps, tell

    def run(self, told: Set[str], dtype: str) -> tuple[MlxSide, Bounds]:
        """The port given the trusted values at the taps that it tells, and how far it may be then."""
        given = {name: tap for name, tap in self._taps.items() if name in told}
        with one_line(f"the port of {self._name} cannot run"):
            self._tell("steered port")
            steered = MlxSide(self._pair, self._own, given).run()
        with one_line(f"the trusted model of {self._name} cannot run"):
            self._tell("rounding")
            floors = measured(self._pair, self._taps, given)
        return steered, bounds_of(floors, given, dtype)

    def elsewhere(self, steered: MlxSide, bounds: Bounds) -> set[str]:
        """Taps that differ and of which all that comes is right: the port parts its work elsewhere than the trusted
        model, as one that scales its embeddings after it looked them up."""
        wrong = {error.tap.name: error for error in self.errors(bounds, {}, steered.taps) if error.wrong}
        groups: dict[str, set[str]] = {}
        for name, error in wrong.items():
            # What is off by little would be lost in the rounding of what comes of it.
            if error.mismatch or error.allowed is None or error.local > FAR * error.allowed:
                groups.setdefault(kind_of(name).partition(" (")[0], set()).add(name)
        found: set[str] = set()
        for kind, names in list(groups.items())[:TRIED]:
            if kind.startswith(OUTPUT):
                continue
            given = {name: tap for name, tap in self._taps.items() if name in bounds.taps and name not in names}
            self._tell(f"what comes of {kind}")
            with one_line(f"the port of {self._name} cannot run"):
                left = MlxSide(self._pair, self._own, given).run()
            still = {error.tap.name: error for error in self.errors(bounds, {}, left.taps) if error.wrong}
            if all(name in wrong or _rounds(error) for name, error in still.items()):
                found |= names | (wrong.keys() - still.keys())
        return found

    def errors(self, bounds: Bounds, free: Recording, steered: Recording) -> Iterator[TapError]:
        """How far every tap that both tell is from the trusted value, given those before it and by itself."""
        for name, expected in self._taps.items():
            bound = EQUAL if expected.dtype == "int32" else bounds.taps.get(name)
            if name not in steered or bound is None:
                continue
            got = steered[name]
            # Keys of fewer heads than there are stand for all that they are repeated for.
            wide = in_groups(expected.array, got.shape)
            expected = expected if wide is None else replace(expected, array=wide)
            difference = compare(expected, got)
            total = rel_l2(expected.array, free[name].array) if name in free else None
            yield TapError(
                parse(name), UPSTREAM, expected.shape, expected.dtype, difference.rel_l2, None, total, None,
                bound.floor, bound.allowed, difference.mismatch,
            )  # fmt: skip


def _rounds(error: TapError) -> bool:
    """Whether a tap is off by no more than its own rounding and that of what was not given its value."""
    return error.mismatch is None and error.allowed is not None and error.local <= PASSED_ON * error.allowed
