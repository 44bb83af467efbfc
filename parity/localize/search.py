"""What is wrong by itself, in order, and what explains it: integers and weights first, then taps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from parity.comparison.exact import ORDER, ExactMismatch
from parity.comparison.trajectory import Margin
from parity.hypotheses import Hypothesis
from parity.hypotheses.tap_probe import TapProbe, site_of
from parity.localize.explain import Causes, explain, removed, rules_out
from parity.localize.findings import EXACT, EXPLAINS, LOCAL, STRUCTURE, Explanation, Finding, Picture, TapError
from parity.localize.found import Found
from parity.localize.holding import holding
from parity.localize.slices import place_of, slice_errors, slice_sizes
from parity.localize.wider import Wider
from parity.model import definition
from parity.oracle.oracle import Oracle
from parity.tensors.metrics import Difference, compare
from parity.tensors.names import TapName, component_kind, parse
from parity.tensors.recording import Observed, Recording, Tap
from parity.tensors.sketch import Sketch

# Kinds of taps that are named where a run lacks more.
SHOWN = 8
# Taps of one kind that an explanation is tried on before it is believed for all of them.
SAMPLED = 4
# Explanations that say no more of a component than that its result is wider.
WIDE_ONLY = ("is not rounded", "and the result are not rounded", "rounds only its result")


class Search:
    """Looks through what differs for what is wrong by itself.

    Args:
        held: what each tap was held against.
        tell: is told what is being done.

    Attributes:
        found: the findings.
        pictures: the first tap of each finding, to be drawn.
    """

    def __init__(
        self,
        oracle: Oracle,
        held: Mapping[str, Tap | Sketch],
        hypotheses: Sequence[Hypothesis],
        tell: Callable[[str], None],
    ) -> None:
        self.oracle, self.held, self.hypotheses, self.tell = oracle, held, hypotheses, tell
        self.exact = oracle.exact
        self.found = Found(oracle.bundle)
        self.pictures: list[Picture] = []

    def run(
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
        self.found.all = [self._held(finding, compared, forced.recording) for finding in self.found.all]

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
            kinds_left = listed(list(dict.fromkeys(component_kind(name) for name in rest)))
            detail = f"{len(names)} of {len(named)} taps are float32 where the oracle's are {first.dtype}: {kinds_left}"
            causes = Causes((), 0.0, (Explanation("it computes in float32 what upstream rounds, rightly", 1.0),))
            error = compare(self.oracle.own[rest[0]], wider.right[rest[0]]).rel_l2
            self.found.add(rest[0], LOCAL, error, first.floor, causes, [], None, rest[1:], detail, first.allowed)
        for tap, causes, alike in apart.values():
            error = compare(self.oracle.own[alike[0]], wider.right[alike[0]])
            detail = _sentence(alike[0], error)
            self.found.add(alike[0], LOCAL, error.rel_l2, tap.floor, causes, [], None, alike[1:], detail, tap.allowed)

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
        self.found.add(first.tap, kind, first.error, 0.0, causes, slices, place, also, first.detail, support=support)
        for mismatch, site, causing in left:
            more = explain(site, None, self.hypotheses, causing) if site is not None else Causes((), 0.0, ())
            alone = explain(site, None, self.hypotheses) if site is not None and not more.together else more
            slices, place = self._slices(site) if site is not None else ([], None)
            self.found.add(mismatch.tap, kind, mismatch.error, 0.0, alone, slices, place, [], mismatch.detail)

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
        findings = [each for each in self.found.all if tap.tap.name in (each.tap, *each.also)]
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
        self.found.add(
            name, LOCAL, first.local, first.floor, causes, slices, place, sorted(covered), _sentence(name, difference),
            first.allowed,
        )  # fmt: skip
        self.pictures.append(Picture(first.tap, site.expected, site.got))
        return [tap for tap in wrong[1:] if tap.tap.name not in covered]

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


def listed(kinds: list[str]) -> str:
    """Kinds of taps, the first few by name."""
    more = len(kinds) - SHOWN
    return ", ".join(kinds[:SHOWN]) + (f" and {more} more" if more > 0 else "")


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
