"""Localizing: which component is wrong by itself first, by how much more than rounding, and what explains it."""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from parity import memory
from parity.bundle.reading import Bundle, read_bundle
from parity.comparison.check import first_unequal
from parity.comparison.exact import (
    check_exact,
    check_preprocessed,
    check_weights,
    rounding_of_times,
)
from parity.comparison.trajectory import margins, teacher_forced, trajectory
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE
from parity.errors import ParityError
from parity.hypotheses import Hypothesis
from parity.localize.attribution import Attributing
from parity.localize.findings import (
    STRUCTURE,
    Finding,
    Localization,
    Picture,
    TapError,
)
from parity.localize.search import Search, listed
from parity.localize.steering import require_steering, steered
from parity.localize.tap_errors import tap_errors
from parity.localize.wider import Wider, settled
from parity.model import definition
from parity.oracle.bounds import bounds_of
from parity.oracle.floors_file import judged
from parity.oracle.judgement import clears, segment_bounds
from parity.oracle.oracle import FREE, SEGMENT, Oracle
from parity.oracle.oracle import LOCAL as STEERED
from parity.ports.loading import port_loader
from parity.ports.port import Loader, Port
from parity.ports.provenance import provenance_of
from parity.tensors.names import component_kind, parse
from parity.tensors.recording import Observed, Recording

# Fewer activations than this say too little for a run to be called right.
FEWEST_TAPS = 10
_NOTHING = Observed({}, {}, {})
Progress = Callable[[str], None]


def localize(
    path: Path,
    impl: str | Loader = "mlx",
    faults: Sequence[Any] = (),
    hypotheses: Sequence[Hypothesis] | None = None,
    progress: Progress | None = None,
    attribute: bool = False,
) -> Localization:
    """Find everything that is wrong by itself in an implementation's run of a bundle, in order, and explain it.

    `impl` is a port's name, FILE.py:NAME, or what loads one. `faults` break the port for the duration; `hypotheses` are
    the model's where none are given. `progress` is told what is being done. With `attribute` the errors of the results
    are owed to the findings. Raises ParityError for a bundle that is
    unusable or an implementation that cannot run it.
    """
    tell = progress or (lambda what: None)
    memory.reset_peak()
    started = time.perf_counter()
    bundle = read_bundle(path)
    definition().require_consistent(bundle)
    tell("reference")
    oracle = Oracle.of(bundle)
    port = (port_loader(impl) if isinstance(impl, str) else impl)(bundle)
    if faults and not hasattr(port, "broken_by"):
        raise ParityError(f"faults break lance_mlx, not {port.name}: leave --impl out")
    return Investigation(
        bundle, oracle, port, list(faults), list(definition().HYPOTHESES if hypotheses is None else hypotheses), tell
    ).run(started, attribute)


class Investigation:
    """One localization under way.

    Attributes:
        thorough: whether the request is also run free, twice, and from the oracle's states: without that there are no
            propagated errors, no trajectory and no check of determinism, only what is wrong by itself.
    """

    def __init__(
        self,
        bundle: Bundle,
        oracle: Oracle,
        port: Port,
        faults: list[Any],
        hypotheses: list[Hypothesis],
        tell: Progress,
        thorough: bool = True,
    ) -> None:
        self.thorough = thorough
        self.bundle, self.oracle, self.port = bundle, oracle, port
        self.faults, self.hypotheses, self.tell = faults, hypotheses, tell
        self.exact = oracle.exact
        self.findings: list[Finding] = []
        self.pictures: list[Picture] = []

    def run(self, started: float | None = None, attribute: bool = False) -> Localization:
        """Run the port free, steered and from the oracle's states, and judge what it computed."""
        started = time.perf_counter() if started is None else started
        self.tell("floors")
        floors, judgement = judged(self.oracle, self.tell)
        bounds = bounds_of(floors[STEERED], self.oracle.own, self.bundle.dtype)
        self.tell("weights")
        with ExitStack() as stack:
            if self.faults:
                stack.enter_context(self.port.broken_by(self.faults))
            checked = check_weights(self.port, self.oracle)
            broken = {mismatch.tap.removeprefix("weights/"): mismatch.expected for mismatch in checked.mismatches}
            given = {name: array for name, array in broken.items() if array is not None}
            self.tell("determinism")
            free, failure, unstable = self._free_runs() if self.thorough else (_NOTHING, None, None)
            unsteered = None
            if self.thorough and not failure:
                self.tell("steering")
                unsteered = self._attempt(lambda: require_steering(self.port, self.oracle, free.recording))[1]
            with self.port.with_weights(given) if given else nullcontext():
                self.tell("steered run")
                forced, stuck = self._attempt(lambda: steered(self.port, self.oracle))
                along, led_by_upstream = segment_bounds(self.oracle, floors[SEGMENT]), _NOTHING
                if not judgement.agree:
                    upstream = {name: tap for name, tap in self.bundle.taps.items() if name in self.oracle.taps}
                    led_by_upstream = self._attempt(lambda: self.port.run(set(upstream), upstream, self.exact))[0]
            self.tell("trajectory")
            led = self._attempt(lambda: teacher_forced(self.port, self.oracle))[0] if self.thorough else _NOTHING
            preprocessed = self.port.preprocessed(self.bundle.path.parent)
        wider = settled(self.oracle, forced, bounds.taps) if self.port.partial else Wider(forced, {}, frozenset())
        forced = wider.forced
        mismatches = [*checked.mismatches, *check_exact(self.exact, forced)]
        mismatches += check_preprocessed(preprocessed, self.bundle.inputs, definition().drawn_visuals(self.bundle))
        held, blind, remark = self.oracle.own, judgement.sentence(), ""
        if blind and clears(judgement, led_by_upstream.recording, self.bundle.expected, along.taps):
            # What the reference computes between upstream's taps is nothing to go by.
            held, bounds, forced = self.bundle.expected, along, led_by_upstream
            blind, remark = "", f"{blind}; {self.port.name} agrees with the oracle there"
        blind = blind or unsteered or ""
        if self.port.partial and (lacks := lacking(self.oracle.taps, forced)):
            remark = "; ".join(filter(None, [remark, f"judged on what {self.port.name} shares with upstream: {lacks}"]))
        remark = "; ".join(filter(None, [remark, rounding_of_times(self.exact, forced)]))
        taps = tap_errors(self.oracle, held, forced.recording, free.recording, bounds, along)
        answered = margins(self.oracle, led.recording)
        if not blind:
            search = Search(self.oracle, held, self.hypotheses, self.tell)
            search.run(mismatches, taps, forced, answered, wider)
            self.findings, self.pictures = search.found.all, search.pictures
        if stuck:
            self._stop(stuck)
        self._show_pixels(free.recording)
        departures = trajectory(self.oracle, led.recording, free.recording) if self.thorough else []
        verdict, reason = self._verdict(taps, unstable, failure, blind)
        attribution = None
        if attribute and self.findings:
            with self.port.broken_by(self.faults) if self.faults else nullcontext():
                limits = bounds_of(floors[FREE], self.oracle.taps, self.bundle.dtype).taps
                attribution = Attributing(
                    self.port, self.oracle, self.findings, self.hypotheses, forced, self.tell
                ).run(limits)
        return Localization(
            bundle=self.bundle.name,
            impl=self.port.name,
            task=self.bundle.task,
            entry=self.bundle.entry,
            dtype=self.bundle.dtype,
            verdict=verdict,
            reason=reason,
            remark=remark,
            findings=self.findings,
            taps=taps,
            exact=[name for name in self.exact.arrays if name in forced.exact],
            alarm=bounds.alarm,
            trajectory=departures,
            margins=answered,
            pictures=self.pictures,
            faults=[fault.name for fault in self.faults],
            request=self.bundle.request,
            provenance=provenance_of(self.bundle, self.port, checked.checksum, checked.compared),
            seconds=time.perf_counter() - started,
            peak_bytes=memory.peak(),
            attribution=attribution,
        )

    def _free_runs(self) -> tuple[Observed, str | None, str | None]:
        """Run twice as it is; also why it cannot run, and the first tap in which the two differ."""
        names = set(self.oracle.taps)
        free, failure = self._attempt(lambda: self.port.run(names).filled(self.oracle.taps))
        if failure:
            return free, failure, None
        again, failure = self._attempt(lambda: self.port.run(names).filled(self.oracle.taps))
        return free, failure, first_unequal(free.recording, again.recording)

    def _attempt(self, run: Callable[[], Any]) -> tuple[Any, str | None]:
        try:
            return run(), None
        except ParityError as error:
            return _NOTHING, str(error)

    def _show_pixels(self, free: Recording) -> None:
        """Keep what the run's own way ends in, to be seen beside the oracle's, where it ends in a picture as large."""
        expected, got = self.oracle.taps.get("pixels"), free.get("pixels")
        if self.findings and expected is not None and got is not None and expected.array.shape == got.array.shape:
            self.pictures.append(Picture(parse("pixels"), expected.array, got.array))

    def _stop(self, message: str) -> None:
        """Add what ended the steered run as the last finding: what comes after it was never seen."""
        self.findings.append(Finding("run", "inputs/request", "inputs", STRUCTURE, None, 0.0, detail=message))

    def _verdict(
        self, taps: Sequence[TapError], unstable: str | None, failure: str | None, blind: str
    ) -> tuple[str, str]:
        if unstable:
            return INCONCLUSIVE, f"two equal runs differ first at {unstable}: what is random cannot be compared"
        if blind:
            return INCONCLUSIVE, blind
        if self.findings:
            return DIVERGE, failure or ""
        if failure:
            return INCONCLUSIVE, failure
        compared = {tap.tap.name for tap in taps}
        missing = [name for name in self.bundle.expected if name not in compared]
        if missing and not self.port.partial:
            return INCONCLUSIVE, f"{len(missing)} of upstream's taps were not computed, the first is {missing[0]}"
        if len(taps) < FEWEST_TAPS:
            return INCONCLUSIVE, f"{len(taps)} compared: fewer than {FEWEST_TAPS} taps say too little"
        return AGREE, ""


def lacking(taps: Iterable[str], forced: Observed) -> str:
    """What a run lacks of the oracle's, in a sentence: kinds of taps, and rows of others."""
    kinds = dict.fromkeys(component_kind(name) for name in taps if name not in forced.recording)
    rows = sorted({component_kind(name) for name in forced.absent})
    said = [f"it does not tell {listed(list(kinds))}"] if kinds else []
    said += [f"it has not all rows of {listed(rows)}"] if rows else []
    return "; ".join(said)
