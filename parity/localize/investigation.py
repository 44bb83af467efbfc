"""Localizing: which component is wrong by itself first, by how much more than rounding, and what explains it."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from parity import memory
from parity.bundle.reading import Bundle, read_bundle
from parity.comparison.check import first_unequal
from parity.comparison.exact import (
    ORDER,
    ExactMismatch,
    check_exact,
    check_preprocessed,
    check_weights,
    rounding_of_times,
)
from parity.comparison.trajectory import Margin, margins, teacher_forced, trajectory
from parity.comparison.verdict import AGREE, DIVERGE, INCONCLUSIVE
from parity.errors import ParityError
from parity.hypotheses import Hypothesis
from parity.hypotheses.tap_probe import TapProbe, site_of
from parity.localize.attribution import Attributing
from parity.localize.explain import Causes, explain, removed, rules_out
from parity.localize.findings import (
    EXACT,
    EXPLAINS,
    LOCAL,
    STRUCTURE,
    Explanation,
    Finding,
    Localization,
    Picture,
    TapError,
)
from parity.localize.holding import holding
from parity.localize.slices import place_of, slice_errors, slice_sizes
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
from parity.tensors.metrics import Difference, compare
from parity.tensors.names import TapName, component_kind, parse
from parity.tensors.recording import Observed, Recording, Tap
from parity.tensors.sketch import Sketch

# Fewer activations than this say too little for a run to be called right.
FEWEST_TAPS = 10
# Kinds of taps that are named where a run lacks more.
SHOWN = 8
# Taps of one kind that an explanation is tried on before it is believed for all of them.
SAMPLED = 4
# Explanations that say no more of a component than that its result is wider.
WIDE_ONLY = ("is not rounded", "and the result are not rounded", "rounds only its result")
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
        self.held: dict[str, Tap | Sketch] = dict(oracle.own)

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
        mismatches += check_preprocessed(preprocessed, self.bundle.inputs)
        held, blind, remark = self.oracle.own, judgement.sentence(), ""
        if blind and clears(judgement, led_by_upstream.recording, self.bundle.expected, along.taps):
            # What the reference computes between upstream's taps is nothing to go by.
            held, bounds, forced = self.bundle.expected, along, led_by_upstream
            blind, remark = "", f"{blind}; {self.port.name} agrees with the oracle there"
        blind = blind or unsteered or ""
        if self.port.partial and (lacks := lacking(self.oracle.taps, forced)):
            remark = "; ".join(filter(None, [remark, f"judged on what {self.port.name} shares with upstream: {lacks}"]))
        remark = "; ".join(filter(None, [remark, rounding_of_times(self.exact, forced)]))
        self.held = held
        taps = tap_errors(self.oracle, held, forced.recording, free.recording, bounds, along)
        answered = margins(self.oracle, led.recording)
        if not blind:
            self._find(mismatches, taps, forced, answered, wider)
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

    def _find(
        self,
        mismatches: Sequence[ExactMismatch],
        taps: Sequence[TapError],
        forced: Observed,
        answered: Sequence[Margin],
        wider: Wider,
    ) -> None:
        """Explain what is wrong, first things first; what an explanation covers is no finding of its own."""
        for group in _grouped(mismatches):
            self._exact_finding(group, forced)
        if wider.right:
            self._wider_findings(wider, taps)
        # A steered run chooses from the oracle's logits: only of two that are equal may it take either.
        ties = {margin.step for margin in answered if not margin.margin}
        wrong = [tap for tap in taps if tap.wrong and not self._only_ties(tap, forced.recording, ties)]
        compared: dict[str, list[TapError]] = {}
        for tap in taps:
            compared.setdefault(_kind(tap), []).append(tap)
        while wrong:
            wrong = self._local_finding(wrong, compared, forced.recording)
        self.findings = [self._held(finding, compared, forced.recording) for finding in self.findings]

    def _wider_findings(self, wider: Wider, taps: Sequence[TapError]) -> None:
        """One finding for all that is right but for its dtype; and one for each kind of which more is told why."""
        named = {tap.tap.name: tap for tap in taps}
        names = [name for name in named if name in wider.right]
        apart: dict[str, tuple[TapError, Causes, list[str]]] = {}
        kinds: dict[str, list[str]] = {}
        for name in names:
            if name in wider.beyond:
                kinds.setdefault(component_kind(name), []).append(name)
        for alike in kinds.values():
            sites = [self._site(replace(named[name], mismatch=None), wider.right) for name in alike[:2]]
            causes = explain(sites[0], sites[1] if sites[1:] else None, self.hypotheses)
            if causes.together and not causes.together[0].name.endswith(WIDE_ONLY):
                first = (named[alike[0]], causes, [])
                apart.setdefault(causes.together[0].name, first)[2].extend(alike)
        told = {name for _, _, alike in apart.values() for name in alike}
        rest = [name for name in names if name not in told]
        if rest:
            first = named[rest[0]]
            listed = _listed(list(dict.fromkeys(component_kind(name) for name in rest)))
            detail = f"{len(names)} of {len(named)} taps are float32 where the oracle's are {first.dtype}: {listed}"
            causes = Causes((), 0.0, (Explanation("it computes in float32 what upstream rounds, rightly", 1.0),))
            error = compare(self.oracle.own[rest[0]], wider.right[rest[0]]).rel_l2
            self._add(rest[0], LOCAL, error, first.floor, causes, [], None, rest[1:], detail, first.allowed)
        for tap, causes, alike in apart.values():
            error = compare(self.oracle.own[alike[0]], wider.right[alike[0]])
            detail = _sentence(alike[0], error)
            self._add(alike[0], LOCAL, error.rel_l2, tap.floor, causes, [], None, alike[1:], detail, tap.allowed)

    def _only_ties(self, tap: TapError, recording: Recording, ties: set[int]) -> bool:
        if tap.tap.name != "tokens":
            return False
        expected, got = self.oracle.taps["tokens"].array, recording["tokens"].array
        if expected.shape != got.shape:
            return False
        return all(int(step) in ties for step in np.flatnonzero(expected != got))

    def _exact_finding(self, group: Sequence[ExactMismatch], forced: Observed) -> None:
        """Explain the first of some mismatches; what its causes leave of the others is a finding of its own."""
        first, rest = group[0], list(group[1:])
        component = parse(first.tap).component
        self.tell(f"hypotheses about {component}")
        exact = self._exact_values(group)
        # What comes later follows of what is given in the place of this: that it is right says nothing.
        before = ORDER[: ORDER.index(first.tap)] if first.tap in ORDER else ()
        whole = [name for name in before if name in exact and name in forced.exact and name not in forced.absent]
        right = [TapProbe(self.oracle, parse(name), exact[name], exact[name], exact) for name in whole]
        sites = [self._exact_site(mismatch, exact, right) for mismatch in group]
        causes, slices, place = Causes((), 0.0, ()), [], None
        if sites[0] is not None:
            second = next((site for site in sites[1:] if site is not None), None)
            causes = explain(sites[0], second, self.hypotheses)
            slices, place = self._slices(sites[0])
        # What a cause says nothing about, such as other words about roles, it leaves as it is.
        failed = causes.failed
        known = [[h for h in causes.together if site and removed(site, [h], failed) is not None] for site in sites[1:]]
        covered, left = [], []
        for mismatch, site, causing in zip(rest, sites[1:], known, strict=True):
            whole = site is not None and (removed(site, causing, failed) or 0.0) >= 1 - 1e-9
            (covered if whole or not causes.together else left).append((mismatch, site, causing))
        also = [mismatch.tap for mismatch, _, _ in covered]
        kind = STRUCTURE if first.got is None else EXACT
        # Where a cause would change what is right, it is so only elsewhere.
        alike = [site for site in right if causes.together and _alike(site.tap.name, first.tap)]
        spared = [site.tap for site in alike if removed(site, causes.together, failed) == 0]
        told = [parse(name) for name in (first.tap, *also)]
        support = holding(told, [*told, *spared])
        self._add(first.tap, kind, first.error, 0.0, causes, slices, place, also, first.detail, support=support)
        for mismatch, site, causing in left:
            more = explain(site, None, self.hypotheses, causing) if site is not None else Causes((), 0.0, ())
            alone = explain(site, None, self.hypotheses) if site is not None and not more.together else more
            slices, place = self._slices(site) if site is not None else ([], None)
            self._add(mismatch.tap, kind, mismatch.error, 0.0, alone, slices, place, [], mismatch.detail)

    def _exact_site(
        self, mismatch: ExactMismatch, exact: Mapping[str, np.ndarray], right: Sequence[TapProbe]
    ) -> TapProbe | None:
        """The site of a mismatch, and of the arrays that are right those that are of the same component and arm."""
        if mismatch.got is None or mismatch.expected is None:
            return None
        tap, arm = parse(mismatch.tap), definition().arm_of
        near = [site for site in right if site.component == tap.component and arm(site.tap) == arm(tap)]
        given = (self.oracle, tap, mismatch.expected, mismatch.got, exact)
        return TapProbe(*given, shared=mismatch.shared, right=near)

    def _exact_values(self, group: Sequence[ExactMismatch]) -> dict[str, np.ndarray]:
        values = dict(self.exact.arrays)
        return values | {mismatch.tap: mismatch.expected for mismatch in group if mismatch.expected is not None}

    def _held(self, finding: Finding, compared: Mapping[str, Sequence[TapError]], recording: Recording) -> Finding:
        """A finding with where it holds among the compared taps of its kind.

        Others limit that where they would be seen to have its cause, and have not.
        """
        kind = component_kind(finding.tap)
        if finding.kind != LOCAL or kind not in compared:
            return finding
        own = {finding.tap, *finding.also}
        others = [tap for tap in compared[kind] if tap.tap.name not in own and tap.allowed is not None]
        if cause := finding.cause:
            others = [tap for tap in others if self._without(tap, cause, recording)]
        told = [tap.tap for tap in compared[kind] if tap.tap.name in own]
        return replace(finding, support=holding(told, [*told, *(tap.tap for tap in others)]))

    def _without(self, tap: TapError, cause: Hypothesis, recording: Recording) -> bool:
        """Whether a tap is seen not to have a cause, beside those that it has."""
        findings = [each for each in self.findings if tap.tap.name in (each.tap, *each.also)]
        beside = [each.cause for each in findings if each.cause]
        if len(beside) < len(findings) or cause.name in [each.name for each in beside] or tap.mismatch:
            return False
        if not cause.about(tap.tap.component):
            return False
        # What is computed as by the cause alone has it, whatever else was said of it.
        site = self._site(tap, recording)
        return rules_out(site, [*beside, cause]) and (not beside or rules_out(site, [cause]))

    def _local_finding(
        self, wrong: list[TapError], compared: Mapping[str, Sequence[TapError]], recording: Recording
    ) -> list[TapError]:
        """Explain the first of the wrong taps; return those that have another cause."""
        first = wrong[0]
        name = first.tap.name
        site = self._site(first, recording)
        alike = [tap for tap in wrong[1:] if _kind(tap) == _kind(first)]
        # Another call of the same component says more than another layer of the same call.
        alike.sort(key=lambda tap: (tap.tap.component != first.tap.component, tap.tap.call == first.tap.call))
        second = self._site(alike[0], recording) if alike else None
        self.tell(f"hypotheses about {first.tap.component}")
        causes = explain(site, second, self.hypotheses)
        others = [tap for tap in alike[1:] if tap.tap.arm != alike[0].tap.arm]
        if not causes.together and others:
            # The second may have a cause of its own.
            causes = explain(site, self._site(others[0], recording), self.hypotheses)
        alike = [tap.tap for tap in compared[_kind(first)]]
        covered = self._covered(first, wrong[1:], causes, alike, recording)
        slices, place = self._slices(site)
        difference = compare(self.oracle.own[name], recording[name], first.tap.most)
        self._add(
            name, LOCAL, first.local, first.floor, causes, slices, place, sorted(covered), _sentence(name, difference),
            first.allowed,
        )  # fmt: skip
        self.pictures.append(Picture(first.tap, site.expected, site.got))
        return [tap for tap in wrong[1:] if tap.tap.name not in covered]

    def _add(
        self,
        tap: str,
        kind: str,
        error: float | None,
        level: float | None,
        causes: Causes,
        slices: Sequence,
        place: str | None,
        also: Sequence[str],
        detail: str,
        allowed: float | None = None,
        support: str | None = None,
    ) -> None:
        """Add a finding for every cause that meets in a place."""
        parsed = self.bundle.locate(tap)
        finding = Finding(
            component=parsed.component,
            tap=tap,
            call=parsed.call,
            kind=kind,
            local_error=error,
            floor=level,
            slice=place,
            slices=slices,
            explanations=causes.ranked,
            also=also,
            detail=detail,
            allowed=allowed,
            support=support,
            failed=tuple(causes.failed.items()),
            cause=causes.together[0] if len(causes.together) == 1 else None,
        )
        if causes.parts:
            self._add_parts(finding, causes)
            return
        if len(causes.together) < 2:
            self._join_or_append(finding)
            return
        # Of causes that meet, none is more certain than what describes the rest.
        describes = any(hypothesis.describes for hypothesis in causes.together)
        for hypothesis in causes.together:
            if hypothesis in causes.beside:
                continue
            own = replace(Explanation.of(hypothesis, causes.removed, agrees=causes.agrees), describes=describes)
            others = [e for e in causes.ranked if e.name != hypothesis.name]
            self.findings.append(replace(finding, explanations=(own, *others), cause=hypothesis))

    def _join_or_append(self, finding: Finding) -> None:
        """Append a finding; weights, and taps of one kind, that are wrong for one reason are one finding."""
        for place, other in enumerate(self.findings):
            if not (finding.explained and other.explained and finding.kind == other.kind):
                continue
            alike = _group_of(other.tap) == _group_of(finding.tap)
            if alike and other.explanations[0].name == finding.explanations[0].name:
                self.findings[place] = replace(other, also=[*other.also, finding.tap, *finding.also])
                return
        self.findings.append(finding)

    def _add_parts(self, finding: Finding, causes: Causes) -> None:
        """Add a finding for the cause of each part of some integers, and one for those that are left."""
        for hypothesis, part in zip(causes.together, causes.parts, strict=True):
            whole = replace(Explanation.of(hypothesis, 1.0), figure=None)
            self.findings.append(replace(finding, explanations=(whole,), part=part, cause=hypothesis))
        if (left := 1 - sum(causes.parts)) > 1e-9:
            others = [e for e in causes.ranked if e.name not in {h.name for h in causes.together}]
            unexplained = [replace(e, residual_removed=min(e.residual_removed, 0.0)) for e in others]
            detail = f"{left:.1%} of the values that differ are left; {finding.detail}"
            self.findings.append(replace(finding, explanations=unexplained, part=left, also=(), detail=detail))

    def _covered(
        self,
        first: TapError,
        wrong: Sequence[TapError],
        causes: Causes,
        compared: Sequence[TapName],
        recording: Recording,
    ) -> set[str]:
        """Names of the other wrong taps that have the same cause; `compared` are all taps of the first one's kind."""
        if not causes.together:
            # What has no cause is taken for one where no component of the kind is right; else each may have its own.
            alike = [tap for tap in wrong if _kind(tap) == _kind(first)]
            components = {tap.tap.component for tap in (first, *alike)}
            whole = components == {tap.component for tap in compared}
            return {tap.tap.name for tap in alike if whole or tap.tap.component == first.tap.component}
        covered: set[str] = set()
        kinds: dict[str, list[TapError]] = {}
        for tap in wrong:
            if all(hypothesis.about(tap.tap.component) for hypothesis in causes.together):
                kinds.setdefault(_kind(tap), []).append(tap)
        for taps in kinds.values():
            step = max(len(taps) // SAMPLED, 1)
            if all(self._explained(tap, causes, recording) for tap in taps[::step]):
                covered |= {tap.tap.name for tap in taps}
            else:
                covered |= {tap.tap.name for tap in taps if self._explained(tap, causes, recording)}
        return covered

    def _explained(self, tap: TapError, causes: Causes, recording: Recording) -> bool:
        amount = removed(self._site(tap, recording), causes.together, causes.failed)
        return amount is not None and amount >= EXPLAINS

    def _site(self, tap: TapError, recording: Recording) -> TapProbe:
        name = tap.tap.name
        # A wrong dtype or a value beyond bounds is no rounding, however small it is.
        floor = 0.0 if tap.mismatch else tap.floor or 0.0
        # What a tap was held against is what an explanation has to start from.
        allowed = None if tap.mismatch else tap.allowed
        given = (self.oracle, name, recording[name].array, self.exact.arrays, floor, self.held, tap.passed, allowed)
        return site_of(*given)

    def _slices(self, site: TapProbe) -> tuple[list, str | None]:
        slices = slice_errors(site.tap, site.expected, site.got, self.oracle.layout)
        sizes = slice_sizes(site.tap, site.expected, self.oracle.layout) if slices else {}
        return slices, place_of(slices, sizes)

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
    said = [f"it does not tell {_listed(list(kinds))}"] if kinds else []
    said += [f"it has not all rows of {_listed(rows)}"] if rows else []
    return "; ".join(said)


def _listed(kinds: list[str]) -> str:
    more = len(kinds) - SHOWN
    return ", ".join(kinds[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _group_of(tap: str) -> str:
    return "weights" if tap.startswith("weights/") else component_kind(tap)


def _grouped(mismatches: Sequence[ExactMismatch]) -> list[list[ExactMismatch]]:
    """Breaches with one cause: what is derived from something wrong is wrong too."""
    groups: dict[str, list[ExactMismatch]] = {}
    for mismatch in mismatches:
        weight = mismatch.tap.startswith("weights/")
        key = component_kind(mismatch.tap) if weight else parse(mismatch.tap).component
        groups.setdefault(key, []).append(mismatch)
    return list(groups.values())


def _sentence(name: str, difference: Difference) -> str:
    if difference.mismatch:
        return f"{name}: {difference.mismatch}"
    if difference.at is None:
        return f"{name} is equal"
    at = list(difference.at)
    return f"{name} is {difference.got:.7g} at {at} where it should be {difference.expected:.7g}"


def _alike(one: str, other: str) -> bool:
    """Whether two arrays are the same thing of two guidance arms."""
    return one.partition(".")[0] == other.partition(".")[0]


def _kind(tap: TapError) -> str:
    return component_kind(tap.tap.name)
