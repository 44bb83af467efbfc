"""From causes to results: how much of what a run ends in is owed to each finding.

A finding is mended by letting the trusted side compute its taps from the run's own values, while all else stays the
port's. With all of them mended nothing but rounding may be left: otherwise the list of findings is not complete. What
each is worth is its Shapley value: by how much it brings the result nearer to the oracle's, on average over the orders
in which they may be mended.
"""

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from parity.errors import ParityError
from parity.hypotheses import Hypothesis, attempt
from parity.hypotheses.tap_probe import site_of
from parity.localize.findings import EXACT, LOCAL, Finding
from parity.model import definition
from parity.oracle.bounds import EQUAL, Bound
from parity.oracle.oracle import Oracle
from parity.ports.mending import Mending
from parity.ports.port import Port
from parity.tensors.metrics import compare, finite
from parity.tensors.names import component_kind
from parity.tensors.recording import Observed, Recording, Tap

# So many causes are tried in every subset, which is 2 ** EVERY runs; of more, this many orders are drawn and reversed.
EVERY, ORDERS = 8, 3


@dataclass(frozen=True)
class Cause:
    """One or several findings that are mended together.

    Attributes:
        name: what is wrong, in words.
        numbers: of the findings, from 1.
        taps: those that the trusted side computes when it is mended.
        exact: arrays in `inputs/` that it changes, each with the hypothesis that does; None where the array is the
            cause's as a whole.
        weights: parameters that get the oracle's values.
    """

    name: str
    numbers: tuple[int, ...]
    taps: frozenset[str] = frozenset()
    exact: Mapping[str, Hypothesis | None] = field(default_factory=dict)
    weights: tuple[str, ...] = ()


@dataclass(frozen=True)
class Worth:
    """What a cause is worth.

    Attributes:
        cause: its name; `numbers` of its findings.
        share: for each result, its Shapley value: the relative L2 error that mending it takes away, on average.
        alone: the error that is left when it alone is wrong.
        without: the error that is left when it alone is mended.
        result: the last result, when it alone is wrong.
    """

    cause: str
    numbers: tuple[int, ...]
    share: dict[str, float]
    alone: dict[str, float]
    without: dict[str, float]
    result: Tap | None = None


@dataclass(frozen=True)
class Attribution:
    """What the errors of a run's results are owed to.

    Attributes:
        before: relative L2 error of each result as the port computes it, with the sequence given where it has to be.
        own: the same with nothing given, where a sequence is given: without the oracle's tokens, as far as the port has
            places for them, none of its rows is known to be one of the oracle's. Else empty.
        left: the same with all causes mended; `allowed` is what rounding may do to it.
        worths: of each cause, in the order of the findings.
        unmended: findings that cannot be mended from outside, in words.
        orders: in how many orders the causes were mended; 0 where every subset was tried.
        result, expected: name of the last result, and the oracle's.
    """

    before: dict[str, float]
    left: dict[str, float]
    allowed: dict[str, float]
    worths: Sequence[Worth]
    unmended: Sequence[str]
    orders: int
    result: str = ""
    expected: Tap | None = None
    own: dict[str, float] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether nothing is left but rounding, of what rounds: integers, such as colours, may flip with it."""
        judged = [error <= self.allowed[name] for name, error in self.left.items() if self.allowed[name]]
        return bool(judged) and all(judged)

    def sentence(self) -> str:
        """Say whether the findings are all there is."""
        given = "the oracle's tokens given, as far as the port has places for them, " if self.own else ""
        if self.complete:
            idle = "" if self.own or not self.unmended else f", so that nothing comes of {'; '.join(self.unmended)}"
            return f"{given}with all of them mended nothing is left but rounding{idle}"
        part = max(self.left[name] / self.before[name] if self.before[name] else math.inf for name in self.left)
        rest = f"; not mended: {'; '.join(self.unmended)}" if self.unmended else ": something is not among the findings"
        return f"{given}with all that can be mended {part:.1%} of the error is left{rest}"

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""

        def plain(errors: Mapping[str, float]) -> dict[str, float | None]:
            return {name: finite(error) for name, error in errors.items()}

        return {
            "complete": self.complete,
            "own": plain(self.own),
            "before": plain(self.before),
            "left": plain(self.left),
            "allowed": plain(self.allowed),
            "orders": self.orders,
            "unmended": list(self.unmended),
            "causes": [
                {
                    "cause": worth.cause,
                    "findings": list(worth.numbers),
                    "share": plain(worth.share),
                    "alone": plain(worth.alone),
                    "without": plain(worth.without),
                }
                for worth in self.worths
            ],
        }


class Attributing:
    """One attribution under way: runs of a port with some causes mended, each tried once."""

    def __init__(
        self,
        port: Port,
        oracle: Oracle,
        findings: Sequence[Finding],
        hypotheses: Sequence[Hypothesis],
        forced: Observed,
        tell: Callable[[str], None],
    ) -> None:
        self.port, self.oracle, self.tell = port, oracle, tell
        self.findings = findings
        self.forced, self.known = forced, {hypothesis.name: hypothesis for hypothesis in hypotheses}
        self.results = [name for name in definition().RESULTS if name in oracle.taps]
        if not set(self.results) & forced.recording.keys():
            wanted = ", ".join(self.results or definition().RESULTS)
            raise ParityError(f"--attribute needs a run that ends in one of {wanted}: there is nothing to be owed here")
        # In passes over all tokens a call's own rows are no input that the trusted side could go on from.
        self._cached = oracle.bundle.entry == "kv_cache"
        self.unmended: list[str] = []
        self.causes = self._causes(findings)
        self._tried: dict[frozenset[int], dict[str, float]] = {}
        self._last: dict[frozenset[int], Tap | None] = {}
        self._sequence: dict[str, np.ndarray] = {}
        self._seconds = 0.0
        self._orders = [] if len(self.causes) <= EVERY else list(_orders(len(self.causes)))
        self._planned = len(set(self._subsets()))
        self._own = self._give_sequence()

    def run(self, bounds: Mapping[str, Bound]) -> Attribution:
        """Mend the causes in every way, or in some orders; `bounds` are of what rounding does to the results."""
        every = frozenset(range(len(self.causes)))
        before, left = self.errors(frozenset()), self.errors(every)
        shares = [self._shapley(number) for number in every]
        worths = [
            Worth(
                cause.name,
                cause.numbers,
                shares[number],
                self.errors(every - {number}),
                self.errors(frozenset({number})),
                self._last[every - {number}],
            )
            for number, cause in enumerate(self.causes)
        ]
        allowed = {name: bounds.get(name, EQUAL).allowed for name in left}
        last = list(left)[-1] if left else ""
        expected = self.oracle.taps.get(last)
        return Attribution(before, left, allowed, worths, self.unmended, len(self._orders), last, expected, self._own)

    def _give_sequence(self) -> dict[str, float]:
        """Give the tokens that findings which cannot be mended are about, where a run by itself tells less without;
        return its errors then.

        Raises ParityError where it still tells less than one that is steered: what it does not tell cannot be mended.
        """
        recording = self._record(frozenset())
        if recording.keys() >= self.forced.recording.keys():
            return {}
        own = self._errors(recording)
        numbered = {line.partition(".")[0] for line in self.unmended}
        first = [f for n, f in enumerate(self.findings, 1) if str(n) in numbered and f.kind == EXACT]
        taps = {tap for finding in first for tap in (finding.tap, *finding.also)}
        exact = self.oracle.exact.arrays
        self._sequence = {tap: exact[tap] for tap in taps if tap in exact and tap in self.forced.exact}
        lacking = self.forced.recording.keys() - self._record(frozenset()).keys()
        if lacking:
            name = next(name for name in self.oracle.taps if name in lacking)
            raise ParityError(f"{self.port.name} by itself does not tell {name}: nothing before it can be told apart")
        return own

    def errors(self, mended: frozenset[int]) -> dict[str, float]:
        """The relative L2 error of each result with some causes mended."""
        if mended not in self._tried:
            self._record(mended)
        return self._tried[mended]

    def _record(self, mended: frozenset[int]) -> Recording:
        """Run with some causes mended, and keep the errors; the first run tells how long all of them will take."""
        number, started = len(self._tried) + 1, time.perf_counter()
        left = max(self._planned - len(self._tried), 1) * self._seconds / 60
        rest = f", about {max(round(left), 1)} min left" if self._seconds else ""
        what = f"{len(mended)} of {len(self.causes)} mended{rest}"
        self.tell(f"attribution, run {number} of {self._planned}: {what}")
        recording = self._run(mended)
        self._tried[mended] = found = self._errors(recording)
        self._last[mended] = recording[list(found)[-1]] if found else None
        self._seconds = max(self._seconds, time.perf_counter() - started)
        return recording

    def _subsets(self) -> Iterator[frozenset[int]]:
        """What is mended in each run."""
        count = len(self.causes)
        every = frozenset(range(count))
        if not self._orders:
            yield from (frozenset(part) for size in range(count + 1) for part in itertools.combinations(every, size))
            return
        yield from (frozenset(order[:size]) for order in self._orders for size in range(count + 1))
        for number in every:
            yield from (frozenset({number}), every - {number})

    def _errors(self, recording: Recording) -> dict[str, float]:
        found = {n: compare(self.oracle.taps[n], recording[n]).rel_l2 for n in self.results if n in recording}
        return {name: math.inf if error is None else error for name, error in found.items()}

    def _shapley(self, number: int) -> dict[str, float]:
        others = [other for other in range(len(self.causes)) if other != number]
        if self._orders:
            weighed = [(frozenset(order[: order.index(number)]), 1 / len(self._orders)) for order in self._orders]
        else:
            count = len(self.causes)
            weighed = [
                (frozenset(part), 1 / (count * math.comb(count - 1, size)))
                for size in range(count)
                for part in itertools.combinations(others, size)
            ]
        total = dict.fromkeys(self.errors(frozenset()), 0.0)
        for mended, weight in weighed:
            before, after = self.errors(mended), self.errors(mended | {number})
            for name in total:
                total[name] += weight * (before[name] - after[name])
        return total

    def _causes(self, findings: Sequence[Finding]) -> list[Cause]:
        causes: dict[Any, Cause] = {}
        kinds: dict[str, list[str]] = {}
        for name in self.oracle.taps:
            kinds.setdefault(component_kind(name), []).append(name)
        for number, finding in enumerate(findings, 1):
            named = finding.explanations[0].name if finding.explained else "unexplained"
            name = f"{finding.component}: {named}"
            if finding.tap.startswith("weights/"):
                weights = tuple(tap.removeprefix("weights/") for tap in (finding.tap, *finding.also))
                causes[finding.tap] = Cause(name, (number,), weights=weights)
            elif finding.kind == LOCAL and (self._cached or "/" not in finding.tap):
                # Several causes of one tap are mended together: their taps are the same.
                told = causes.get(finding.tap)
                names = {kind for tap in (finding.tap, *finding.also) for kind in kinds[component_kind(tap)]}
                if told is None:
                    causes[finding.tap] = Cause(name, (number,), frozenset(names))
                else:
                    causes[finding.tap] = Cause(f"{told.name}, {named}", (*told.numbers, number), told.taps)
            elif finding.kind == EXACT and self._fits(finding.tap):
                hypothesis = self.known.get(named) if finding.explained else None
                causes[finding.tap, named] = Cause(name, (number,), exact={finding.tap: hypothesis})
            else:
                self.unmended.append(f"{number}. {name}")
        return self._spread(list(causes.values()))

    def _fits(self, tap: str) -> bool:
        """Whether a run can be given the oracle's array: it has as many values."""
        got, expected = self.forced.exact.get(tap), self.oracle.exact.arrays.get(tap)
        if got is None or expected is None:
            return False
        lacking = self.forced.absent.get(tap)
        return got.array.shape[-1:] == ((expected.shape[-1],) if lacking is None else (int((~lacking).sum()),))

    def _spread(self, causes: list[Cause]) -> list[Cause]:
        """A cause changes every array of its component that it says something about, not only the first."""
        arrays: dict[str, list[str]] = {}
        for tap in self.forced.exact:
            arrays.setdefault(component_of(tap), []).append(tap)
        found = []
        for cause in causes:
            exact = dict(cause.exact)
            for tap, hypothesis in cause.exact.items():
                for other in arrays[component_of(tap)]:
                    if hypothesis is not None and self._fits(other) and self._changes(other, hypothesis):
                        exact.setdefault(other, hypothesis)
            found.append(Cause(cause.name, cause.numbers, cause.taps, exact, cause.weights))
        return found

    def _changes(self, tap: str, hypothesis: Hypothesis) -> bool:
        array = self._under(tap, [hypothesis])
        return array is not None and not np.array_equal(array, self.oracle.exact.arrays[tap])

    def _under(self, tap: str, hypotheses: Sequence[Hypothesis]) -> np.ndarray | None:
        """The oracle's array as some hypotheses change it."""
        expected = self.oracle.exact.arrays[tap]
        return attempt(site_of(self.oracle, tap, expected, self.oracle.exact.arrays), hypotheses)

    def _run(self, mended: frozenset[int]) -> Recording:
        causes = [self.causes[number] for number in sorted(mended)]
        exact = dict(self._sequence)
        for tap in {tap for cause in causes for tap in cause.exact}:
            rest = [c.exact[tap] for n, c in enumerate(self.causes) if n not in mended and tap in c.exact]
            if None in rest:
                continue
            array = self._under(tap, rest) if rest else self.oracle.exact.arrays[tap]
            if array is not None:
                exact[tap] = array
        given = replace(self.oracle.exact, arrays=exact) if exact else None
        names = {tap for cause in causes for tap in cause.taps}
        force = Mending(names, self._mend) if names else None
        weights = {name for cause in causes for name in cause.weights}
        own = definition().oracle_weights(self.oracle) if weights else ()
        values = {name: array for name, array in own if name in weights}
        with self.port.with_weights(values) if values else nullcontext():
            found = self.port.run(set(self.oracle.taps), force, given).filled(self.oracle.taps).recording
        # What a run ends in may itself be mended.
        return found | {name: force[name] for name in self.results if force and name in force and name in found}

    def _mend(self, name: str, before: Observed) -> Tap:
        """What the trusted side computes at a tap from a run's own values before it."""
        # Of what a run does not tell, states and times are the oracle's; what lies within calls is computed on the way.
        given = {other: tap for other, tap in self.oracle.taps.items() if "/" not in other}
        own = before.filled(self.oracle.taps).recording
        given |= {other: tap for other, tap in own.items() if self._cached or "/" not in other}
        array = self.oracle.run.recompute(name, {other: tap for other, tap in given.items() if other != name})
        expected = self.oracle.taps[name]
        if array is None:
            raise ParityError(f"the reference never comes to {name}: it cannot be mended")
        return Tap(np.ascontiguousarray(array, expected.array.dtype), expected.dtype)


def _orders(count: int) -> Iterator[list[int]]:
    """Orders and their reverses: together they are nearer to the mean than as many drawn apart."""
    draw = random.Random(count)
    for _ in range(ORDERS):
        order = draw.sample(range(count), count)
        yield from (order, order[::-1])


def component_of(tap: str) -> str:
    """The component of an array in `inputs/`."""
    return definition().parse(tap).component
